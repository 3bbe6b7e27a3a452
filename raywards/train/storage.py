"""Where the files of a run are kept, and the checkpoints among them: written, kept, removed.

A checkpoint's folder without a manifest was cut off while it was written. The manifest comes last
on the way in and goes first on the way out, so nothing half-written passes for a checkpoint.

Two kinds of storage, one set of verbs: a folder that every node sees, here, and object storage, in
`object_storage`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol, TextIO

from raywards.checkpoint import MANIFEST, list_checkpoints, list_files
from raywards.errors import ConfigError, TrainingError

logger = logging.getLogger(__name__)

LOCK = "run.lock"
_OURS = re.compile(r"checkpoint-\d{6,}-[0-9a-f]{8}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# torch and safetensors say so in words of their own: the first names neither disk nor reason.
_FULL_IN_WORDS = ("inline_container.cc", "write(): fd", "(os error 28)", "(os error 27)")
_LOOK_AGAIN_S = 0.1


class Storage(Protocol):
    """The run folder, by the names of what is in it."""

    local: Path
    """The run folder as this process sees it: the folder itself, or this machine's copy of it."""
    shared: bool
    """Whether what one process writes into `local` is there for all."""

    def on_worker(self) -> Storage:
        """The same storage for a worker, which may be on another node."""

    def check(self) -> None:
        """Raise `ConfigError` where the storage cannot be reached."""

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Keep the run folder to this process; `ConfigError` where another trains into it."""

    def where(self, name: str = "") -> str:
        """Path or address, for people."""

    def push(self, name: str, only: Iterable[str] | None = None) -> None:
        """Put the folder or file `local / name`, if there is one, into storage, its manifest last.

        Of a folder, all that it holds or `only` these files. One with a manifest replaces what is
        there."""

    def push_missing(self, name: str) -> None:
        """`push` a folder that never changes, unless it is in storage already."""

    def pull(self, name: str, *, again: bool = False) -> None:
        """Bring the folder or file `name` to `local`, if it is in storage; what is there already
        stays, unless it is to be brought `again`."""

    def drop(self, name: str) -> None:
        """Remove this machine's copy of a folder that is in storage."""

    def leave(self) -> None:
        """Remove all of this machine's copy. For a worker, at the end of its run."""

    def read(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none."""

    def write(self, name: str, text: str) -> None:
        """Write a file, at once or not at all."""

    def checkpoints(self) -> list[tuple[int, str]]:
        """Step and name of the complete checkpoints, oldest step first."""

    def put_part(self, part: Path, name: str) -> None:
        """Bring this rank's files of checkpoint `name`, but for the manifest, into storage."""

    def complete(self, part: Path, name: str) -> None:
        """Wait until the files of every rank are there, then put rank 0's manifest beside them.

        There is no barrier between the ranks: the files and their sizes tell.
        """

    def remove(self, name: str) -> None:
        """Remove a checkpoint, its manifest first."""

    def remove_cut_off(self) -> None:
        """Remove checkpoints that were never finished. Only while nobody writes one."""


def checkpoint_name(step: int, attempt: str) -> str:
    """Name of a checkpoint's folder; `attempt` makes it unique."""
    return f"checkpoint-{step:06d}-{attempt}"


def is_checkpoint_name(name: str) -> bool:
    """Whether raywards gives such names to folders of checkpoints."""
    return _OURS.fullmatch(name) is not None


def newest_checkpoint(storage: Storage) -> str | None:
    """Name of the complete checkpoint of the highest step."""
    found = storage.checkpoints()
    return found[-1][1] if found else None


def checkpoint_of(storage: Storage, step: int) -> str | None:
    """The complete checkpoint of a step; the last one where several attempts wrote it."""
    return next((name for its, name in reversed(storage.checkpoints()) if its == step), None)


def retain(storage: Storage, keep: int, best_step: int | None) -> None:
    """Remove the oldest complete checkpoints beyond `keep`, but never the newest or the best.

    The best counts as one of the `keep`, as in transformers. With `keep=1` two may stay.
    """
    found = storage.checkpoints()
    if not found:
        return
    *older, newest = found
    best = [one for one in older if one[0] == best_step]
    others = [one for one in older if one not in best]
    room = max(0, keep - len({newest, *best}))
    for _, name in others[: len(others) - room]:
        storage.remove(name)


class SharedFolder:
    """A folder that every node sees. Pickled, it is its path."""

    shared = True

    def __init__(self, folder: Path) -> None:
        self.local = folder

    def on_worker(self) -> SharedFolder:
        return self

    def check(self) -> None:
        """`hold` makes the folder, or says why it cannot."""

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """By a lock of the operating system, which ends with the process however that ends."""
        with hold_folder(self.local):
            yield

    def where(self, name: str = "") -> str:
        return str(self.local / name)

    def push(self, name: str, only: Iterable[str] | None = None) -> None:
        """It is there."""

    def push_missing(self, name: str) -> None:
        """It is there."""

    def pull(self, name: str, *, again: bool = False) -> None:
        """It is there, or nowhere."""

    def drop(self, name: str) -> None:
        """There is no copy."""

    def leave(self) -> None:
        """There is no copy."""

    def read(self, name: str) -> bytes | None:
        file = self.local / name
        return file.read_bytes() if file.is_file() else None

    def write(self, name: str, text: str) -> None:
        file = self.local / name
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)

    def checkpoints(self) -> list[tuple[int, str]]:
        return list_checkpoints(self.local)

    def put_part(self, part: Path, name: str) -> None:
        """On one disk this is a rename. What was moved before a failure is left for
        `remove_cut_off`: other ranks still write beside it."""
        target = self.local / name
        if part == target:
            return
        with writing(target):
            for file in list_files(part):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(part / file, target / file)

    def complete(self, part: Path, name: str) -> None:
        target = self.local / name
        if part == target:
            return
        files = json.loads((part / MANIFEST).read_text(encoding="utf-8"))["files"]
        while any(_size(target / file) != size for file, size in files.items()):
            time.sleep(_LOOK_AGAIN_S)
        with writing(target):
            partial = target / f".{MANIFEST}.partial"
            shutil.copyfile(part / MANIFEST, partial)
            os.replace(partial, target / MANIFEST)

    def remove(self, name: str) -> None:
        # Without its manifest it is no checkpoint any more, should the rest not be removed.
        (self.local / name / MANIFEST).unlink()
        shutil.rmtree(self.local / name, ignore_errors=True)

    def remove_cut_off(self) -> None:
        for folder in self.local.glob("checkpoint-*"):
            if is_checkpoint_name(folder.name) and not (folder / MANIFEST).exists():
                shutil.rmtree(folder, ignore_errors=True)


def node_folder(where: str) -> Path:
    """Folder on this node's own disk for the run that is kept `where`."""
    name = hashlib.sha256(where.encode()).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"raywards-{name}"


@contextlib.contextmanager
def on_this_node(lock: Path) -> Iterator[None]:
    """One process of this node at a time."""
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep a folder on a disk to this process.

    Raises `ConfigError` where another process holds it, or where it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output_dir: {folder} cannot be made a folder ({error.strerror}). Give a path that "
            "this user may write to."
        ) from None
    with lock:
        _lock(lock, folder)
        lock.truncate(0)
        lock.write(this_process())
        lock.flush()
        yield


def this_process() -> str:
    """Who holds a run folder, for whoever finds it held."""
    return f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}"


def held_by_another(where: str, holder: str) -> ConfigError:
    return ConfigError(
        f"{where}: another run trains into this folder now ({holder}). Wait for its end, stop it, "
        "or give this run another output_dir or run_name."
    )


def _lock(file: TextIO, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise held_by_another(str(folder), file.read()) from None
    except OSError as error:
        logger.warning(
            "%s: this file system has no locks (%s): see to it that no two runs share the folder",
            folder,
            error.strerror,
        )


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


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return None


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL
    return any(words in str(error) for words in _FULL_IN_WORDS)
