"""Checkpoints on their way into a run folder and out of it: written, moved, kept, removed.

A folder of ours without a manifest was cut off while it was written. The manifest comes last on the
way in and goes first on the way out, so nothing half-written passes for a checkpoint.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

from raywards.checkpoint import MANIFEST, complete_checkpoints, list_files, read_manifest
from raywards.errors import TrainingError

_OURS = re.compile(r"checkpoint-\d{6,}-[0-9a-f]{8}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch and safetensors say so in words of their own: the first names neither disk nor reason.
_FULL_IN_WORDS = ("inline_container.cc", "write(): fd", "(os error 28)", "(os error 27)")
_LOOK_AGAIN_S = 0.1


def checkpoint_name(step: int, attempt: str) -> str:
    """Name of a checkpoint's folder; `attempt` makes it unique."""
    return f"checkpoint-{step:06d}-{attempt}"


def checkpoint_of(run: Path, step: int) -> Path | None:
    """The complete checkpoint of a step; the last one where several attempts wrote it."""
    return next((f for f in reversed(complete_checkpoints(run)) if _step(f) == step), None)


def retain(run: Path, keep: int, best_step: int | None) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, but never the newest or the best.

    The best counts as one of the `keep`, as in transformers. With `keep=1` two may stay.
    """
    *older, newest = complete_checkpoints(run) or [run]
    best = [folder for folder in older if _step(folder) == best_step]
    others = [folder for folder in older if folder not in best]
    room = max(0, keep - len({newest, *best}))
    for folder in others[: len(others) - room]:
        _remove(folder)


def remove_cut_off(run: Path) -> None:
    """Remove checkpoints that were never finished. Only while nobody writes into the run folder."""
    for folder in run.glob("checkpoint-*"):
        if _OURS.fullmatch(folder.name) and not (folder / MANIFEST).exists():
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """While `folder` is written: a full disk becomes a `TrainingError` that says so."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        free = shutil.disk_usage(folder if folder.is_dir() else folder.parent).free
        raise TrainingError(
            f"{folder}: could not be written, the disk is full: {free:,} bytes were left "
            f"({reason}). Nothing of it is kept. Make room, for instance by a lower "
            "save_total_limit, and start the run again: it goes on from its last complete "
            "checkpoint."
        ) from error


class Background:
    """One piece of work at a time beside the training; what goes wrong is raised in the caller."""

    def __init__(self) -> None:
        self._pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, once what was begun before has ended."""
        self.wait()
        pending: Future[None] = Future()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                pending.set_exception(error)
            else:
                pending.set_result(None)

        self._pending = pending
        # A daemon: a process that has to end must not wait for the parts of a peer that is dead.
        threading.Thread(target=run, name="raywards-upload", daemon=True).start()

    def check(self) -> None:
        """Raise what went wrong so far; does not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def move_part(part: Path, target: Path) -> None:
    """Move this rank's files of a checkpoint, but for the manifest, into the run folder.

    On one disk this is a rename. What was moved before a failure is left for `remove_cut_off`:
    other ranks still write beside it.
    """
    with writing(target):
        for name in list_files(part):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(part / name, target / name)


def complete(part: Path, target: Path) -> None:
    """Wait until the files of every rank are in `target`, then put rank 0's manifest beside them.

    There is no barrier between the ranks: the files and their sizes tell.
    """
    files = json.loads((part / MANIFEST).read_text(encoding="utf-8"))["files"]
    while any(_size(target / name) != size for name, size in files.items()):
        time.sleep(_LOOK_AGAIN_S)
    with writing(target):
        partial = target / f".{MANIFEST}.partial"
        shutil.copyfile(part / MANIFEST, partial)
        os.replace(partial, target / MANIFEST)


def _step(folder: Path) -> int:
    return int(read_manifest(folder, kind="checkpoint")["step"])


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _remove(folder: Path) -> None:
    """Without its manifest it is no checkpoint any more, should the rest not be removed."""
    (folder / MANIFEST).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(words in str(error) for words in _FULL_IN_WORDS)
