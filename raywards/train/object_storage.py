"""The run folder in object storage: S3, Google Cloud Storage, whatever pyarrow reaches by address.

Every process works on a copy on its own disk, and puts what others need into storage: the driver's
copy is where the run folder would be without object storage, a worker's lies in its node's
temporary folder, for all workers there, and goes with the run.

There are no renames and no locks here. An object is there whole or not at all, so a manifest that
is written last makes a folder complete, as on a disk; a run folder is held by an object that is
written again every few seconds.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, fs

from raywards.checkpoint import MANIFEST, check_manifest, list_files, sort_complete
from raywards.config import RewardConfig, RunPaths, is_address, without_keys
from raywards.errors import CheckpointError, ConfigError
from raywards.train.storage import (
    LOCK,
    SharedFolder,
    Storage,
    held_by_another,
    hold_folder,
    is_checkpoint_name,
    node_folder,
    on_this_node,
    this_process,
    writing,
)

logger = logging.getLogger(__name__)

_FILES_AT_ONCE = 4
_LOOK_AGAIN_S = 1.0
_BEAT_S = 5.0
_BEATS_MISSED = 3


def storage_of(config: RewardConfig, paths: RunPaths) -> Storage:
    """Where the settings say that the run folder is kept."""
    if config.storage_path and is_address(config.storage_path):
        return ObjectStorage(config.storage_path, paths.name, paths.run)
    return SharedFolder(paths.run)


class ObjectStorage:
    """The run folder `name` below the address `storage_path`, for instance "s3://bucket/rewards".

    Raises `ConfigError` where there is no such kind of storage. What the network or the storage
    refuses later is an `OSError`, which says what was done.
    """

    shared = False

    def __init__(self, storage_path: str, name: str, local: Path, start: str | None = None) -> None:
        self.local = local
        self._storage_path, self._name = storage_path, name
        self._start = start or uuid.uuid4().hex[:8]
        try:
            self._files, path = fs.FileSystem.from_uri(storage_path)
            if not path:
                raise ValueError("it names no bucket")
        except (ArrowException, OSError, ValueError) as error:
            raise ConfigError(
                f"storage_path: {without_keys(storage_path)} cannot be used: "
                f"{str(error).splitlines()[0]}. Give a folder that every node sees, or an address "
                "such as s3://bucket/rewards or gs://bucket/rewards."
            ) from None
        self._run = f"{path.rstrip('/')}/{name}"

    def on_worker(self) -> ObjectStorage:
        # A copy of this start's own: what an earlier one left may have been of another model.
        folder = node_folder(self.where())
        local = folder / f"run-{self._start}"
        for left in folder.glob("run-*"):
            if left != local:
                shutil.rmtree(left, ignore_errors=True)
        return ObjectStorage(self._storage_path, self._name, local, self._start)

    def __reduce__(self) -> Any:
        # The connection is made anew, with the credentials that are found on that node.
        return ObjectStorage, (self._storage_path, self._name, self.local, self._start)

    def where(self, name: str = "") -> str:
        run = f"{without_keys(self._storage_path)}/{self._name}"
        return f"{run}/{name}" if name else run

    def check(self) -> None:
        bucket = self._run.partition("/")[0]
        try:
            if self._files.get_file_info(bucket).type == fs.FileType.NotFound:
                raise OSError(f"there is no {bucket!r}")
        except OSError as error:
            raise ConfigError(
                f"storage_path: {self.where()} cannot be reached from here: "
                f"{str(error).splitlines()[0]}. Check the address, the network and the credentials."
            ) from None

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """By an object with a mark that changes every few seconds while this process lives.

        One that was left by a killed process is seen through after a few of these seconds.
        """
        with hold_folder(self.local), _Hold(self):
            yield

    # ------------------------------------------------------------ files

    def push(self, name: str, only: Iterable[str] | None = None) -> None:
        here = self.local / name
        if here.is_file():
            self._upload(here, name)
            return
        if not here.is_dir():
            return
        files = sorted(list_files(here) if only is None else only)
        replaces = only is None and (here / MANIFEST).is_file()
        there = self._sizes(name) if replaces else {}
        if MANIFEST in there:
            self.delete(f"{name}/{MANIFEST}")
        self._upload_all(here, name, files)
        for file in there.keys() - {*files, MANIFEST}:
            self.delete(f"{name}/{file}")
        if (here / MANIFEST).is_file():
            self._upload(here / MANIFEST, f"{name}/{MANIFEST}")

    def push_missing(self, name: str) -> None:
        if not _has(self.local / name, self._sizes(name)):
            self.push(name)

    def pull(self, name: str, *, again: bool = False) -> None:
        target = self.local / name
        self.local.mkdir(parents=True, exist_ok=True)
        with on_this_node(self.local / ".pull.lock"), writing(target):
            sizes = self._sizes(name)
            if not sizes or (not again and _has(target, sizes)):
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            for left in target.parent.glob(f".{target.name}.*.partial"):
                shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
            partial = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
            try:
                self._download_all(name, sizes, partial)
                shutil.rmtree(target, ignore_errors=True)
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def drop(self, name: str) -> None:
        shutil.rmtree(self.local / name, ignore_errors=True)

    def leave(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)

    def read(self, name: str) -> bytes | None:
        with _doing("read", self.where(name)):
            try:
                with self._files.open_input_stream(f"{self._run}/{name}") as stream:
                    content: bytes = stream.read()
            except FileNotFoundError:
                return None
        return content

    def write(self, name: str, text: str) -> None:
        with (
            _doing("written", self.where(name)),
            self._files.open_output_stream(f"{self._run}/{name}") as stream,
        ):
            stream.write(text.encode())

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        with _doing("removed", self.where(name)), contextlib.suppress(FileNotFoundError):
            self._files.delete_file(f"{self._run}/{name}")

    # ------------------------------------------------------------ checkpoints

    def checkpoints(self) -> list[tuple[int, str]]:
        folders: dict[str, dict[str, int]] = {}
        for path, size in self._sizes().items():
            folder, _, file = path.partition("/")
            if folder.startswith("checkpoint-"):
                folders.setdefault(folder, {})[file] = size
        return sort_complete(
            (name, functools.partial(self._manifest, name, sizes))
            for name, sizes in folders.items()
            if MANIFEST in sizes
        )

    def put_part(self, part: Path, name: str) -> None:
        self._upload_all(part, name, sorted(list_files(part)))

    def complete(self, part: Path, name: str) -> None:
        files = json.loads((part / MANIFEST).read_text(encoding="utf-8"))["files"]
        while not files.items() <= self._sizes(name).items():
            time.sleep(_LOOK_AGAIN_S)
        self._upload(part / MANIFEST, f"{name}/{MANIFEST}")

    def remove(self, name: str) -> None:
        self.delete(f"{name}/{MANIFEST}")
        with _doing("removed", self.where(name)):
            self._files.delete_dir(f"{self._run}/{name}")

    def remove_cut_off(self) -> None:
        sizes = self._sizes()
        for name in {path.partition("/")[0] for path in sizes}:
            if is_checkpoint_name(name) and f"{name}/{MANIFEST}" not in sizes:
                with _doing("removed", self.where(name)):
                    self._files.delete_dir(f"{self._run}/{name}")

    def _manifest(self, name: str, sizes: dict[str, int]) -> dict[str, Any]:
        content = self.read(f"{name}/{MANIFEST}")
        if content is None:
            raise CheckpointError(f"{self.where(name)}: was removed meanwhile.")
        return check_manifest(self.where(name), content, sizes.get, kind="checkpoint")

    # ------------------------------------------------------------ one thing each

    def _sizes(self, name: str = "") -> dict[str, int]:
        """Every file below a folder, as relative name to size in bytes."""
        path = f"{self._run}/{name}".rstrip("/")
        with _doing("listed", self.where(name)):
            selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
            return {
                info.path.removeprefix(f"{path}/"): info.size
                for info in self._files.get_file_info(selector)
                if info.is_file
            }

    def _upload_all(self, folder: Path, name: str, files: Iterable[str]) -> None:
        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(lambda file: self._upload(folder / file, f"{name}/{file}"), files))

    def _upload(self, file: Path, name: str) -> None:
        with _doing("written", self.where(name)):
            fs.copy_files(
                str(file),
                f"{self._run}/{name}",
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=self._files,
            )

    def _download_all(self, name: str, files: Iterable[str], folder: Path) -> None:
        def download(file: str) -> None:
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            with _doing("read", self.where(f"{name}/{file}")):
                fs.copy_files(
                    f"{self._run}/{name}/{file}",
                    str(target),
                    source_filesystem=self._files,
                    destination_filesystem=fs.LocalFileSystem(),
                )

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            list(pool.map(download, files))


class _Hold:
    """While it is entered, the run folder is this process's."""

    def __init__(self, storage: ObjectStorage) -> None:
        self._storage = storage
        self._own = uuid.uuid4().hex
        self._holder = this_process()
        self._beats = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="raywards-hold", daemon=True)

    def __enter__(self) -> None:
        self._wait_for_another()
        self._beat()
        time.sleep(_LOOK_AGAIN_S)  # of two that begin at once, the one that wrote last goes on
        if (found := self._read()) is not None and found["by"] != self._own:
            raise held_by_another(self._storage.where(), found["holder"])
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        try:
            found = self._read()
            if found is not None and found["by"] == self._own:  # not one that took over meanwhile
                self._storage.delete(LOCK)
        except OSError as error:  # a later start waits for it to grow old
            logger.warning("%s", error)

    def _wait_for_another(self) -> None:
        first = found = self._read()
        for _ in range(_BEATS_MISSED):
            if found is None:
                return
            logger.info("%s: waiting to see whether it is in use", self._storage.where())
            time.sleep(_BEAT_S)
            found = self._read()
            if found is not None and found != first:
                raise held_by_another(self._storage.where(), found["holder"])

    def _keep(self) -> None:
        while not self._done.wait(_BEAT_S):
            try:
                found = self._read()
                if found is not None and found["by"] != self._own:  # after an outage of our own
                    logger.error("%s", held_by_another(self._storage.where(), found["holder"]))
                    return
                self._beat()
            except OSError as error:
                logger.warning("%s", error)

    def _beat(self) -> None:
        self._beats += 1
        mark = {"by": self._own, "beats": self._beats, "holder": self._holder}
        self._storage.write(LOCK, json.dumps(mark))

    def _read(self) -> dict[str, Any] | None:
        content = self._storage.read(LOCK)
        try:
            mark: dict[str, Any] | None = json.loads(content) if content else None
        except ValueError:
            return None
        return mark


@contextlib.contextmanager
def _doing(done: str, where: str) -> Iterator[None]:
    """Say of an error of the storage, or of the local disk, what could not be done with what."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        told = f"{where}: could not be {done} ({error})"
        raise (OSError(error.errno, told) if error.errno else OSError(told)) from error


def _has(target: Path, sizes: dict[str, int]) -> bool:
    there = {**list_files(target)} if target.is_dir() else {}
    if (target / MANIFEST).is_file():
        there[MANIFEST] = (target / MANIFEST).stat().st_size
    return there == sizes
