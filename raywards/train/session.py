"""What a worker needs of its surroundings: where to resume from, where checkpoints and records go.

Two kinds of surroundings, one set of verbs: a Ray Train worker group, and this process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, Protocol

import torch

from raywards.errors import ConfigError, TrainingError
from raywards.train.storage import (
    Background,
    Storage,
    checkpoint_of,
    newest_checkpoint,
    node_folder,
    retain,
)

Send = Callable[[str, dict[str, Any]], None]
"""Hands one record to whoever keeps the log: its kind ("log", "tick", ...) and its content."""


class Word(IntEnum):
    """What the driver says to a run."""

    GO = 0
    STOP = 1
    """End here, with a checkpoint and an export."""
    GIVE_UP = 2
    """End with an error."""


class Session(Protocol):
    """The surroundings of one worker for one attempt at a run."""

    rank: int
    world_size: int
    ranks_on_node: int
    """Workers that share this node's memory."""
    device: torch.device
    storage: Storage
    is_first_here: bool
    """Whether it is the first of the ranks that see one and the same `storage.local`."""
    attempt: str
    """Shared by all ranks and new for every attempt: makes the names of checkpoints unique."""

    def send(self, kind: str, record: dict[str, Any]) -> None:
        """Hand a record to the driver; rank 0 alone calls it."""

    def resume_from(self) -> contextlib.AbstractContextManager[Path | None]:
        """The newest complete checkpoint as a local folder, or None for a fresh start."""

    def scratch(self, name: str) -> Path:
        """A new folder to write this rank's part of checkpoint `name` into."""

    def commit(self, folder: Path, name: str, *, best_step: int | None) -> None:
        """Make the parts of all ranks the checkpoint `name`, and drop old checkpoints, but not that
        of `best_step`. May go on in the background; every rank calls it."""

    def check(self) -> None:
        """Raise what went wrong in the background."""

    def settle(self) -> None:
        """Wait until what was committed is complete. A barrier: every rank calls it."""

    def find(self, step: int) -> str | None:
        """Name of the complete checkpoint of a step. Every rank calls it."""

    def open(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """A checkpoint in storage as a local folder. Every rank calls it."""

    def should_stop(self) -> bool:
        """Whether the driver has asked the run to stop, alike on all ranks: every rank calls it."""


class RaySession:
    """A worker of a Ray Train worker group. The process group is up when the loop starts."""

    def __init__(
        self,
        send: Send,
        *,
        ask: Callable[[], Word],
        storage: Storage,
        explicit: Path | None,
        keep: int | None,
    ) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.ranks_on_node = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self.send = send
        self.storage = storage
        self.is_first_here = (self.rank if storage.shared else context.get_local_rank()) == 0
        self._explicit, self._keep = explicit, keep
        self._ask = ask
        self._uploads = Background()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # NCCL moves objects through the current device
        names = [uuid.uuid4().hex[:8]]
        torch.distributed.broadcast_object_list(names, src=0)
        self.attempt = names[0]
        self._scratch = node_folder(storage.where())
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed attempts at this run left on this node's disk and half-written."""
        if self.rank == 0:
            self.storage.remove_cut_off()
        for folder in self._scratch.glob("checkpoint-*"):
            if self.attempt not in folder.name:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        # Not Ray's own choice: its controller hears of a checkpoint seconds after the last file of
        # it is there, so after a kill it would go back further than it has to. The manifest tells.
        newest = self._ask_first_rank(lambda: newest_checkpoint(self.storage))
        if newest is None:
            yield self._explicit
            return
        with self.open(newest) as folder:
            yield folder

    def scratch(self, name: str) -> Path:
        folder = self._scratch / f"{name}-rank{self.rank}"
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, name: str, *, best_step: int | None) -> None:
        # Not by `ray.train.report`: it cannot keep the newest and the best (its score is fixed when
        # a checkpoint is reported), does not start again where we removed a folder, and ends an
        # attempt from outside, without our error, where its background upload fails.
        def upload() -> None:
            try:
                self.storage.put_part(folder, name)
                if self.rank == 0:
                    self.storage.complete(folder, name)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            if self.rank == 0 and self._keep is not None:
                retain(self.storage, self._keep, best_step)

        self._uploads.start(upload)

    def check(self) -> None:
        self._uploads.check()

    def settle(self) -> None:
        self._uploads.wait()
        torch.distributed.barrier()

    def find(self, step: int) -> str | None:
        return self._ask_first_rank(lambda: checkpoint_of(self.storage, step))

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Path]:
        self.storage.pull(name)
        yield self.storage.local / name
        torch.distributed.barrier()  # all have read it
        if self.is_first_here:
            self.storage.drop(name)

    def _ask_first_rank(self, question: Callable[[], str | None]) -> str | None:
        answer = [question() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(answer, src=0)
        return answer[0]

    def should_stop(self) -> bool:
        # Ranks would hear of it at different steps if each asked.
        word = torch.tensor([self._ask() if self.rank == 0 else Word.GO], device=self.device)
        torch.distributed.broadcast(word, src=0)
        if word.item() == Word.GIVE_UP:
            raise TrainingError("The run was given up where train() was called, which says why.")
        return word.item() == Word.STOP


class LocalSession:
    """This process alone: a notebook, or one GPU. Checkpoints lie in the run folder directly."""

    def __init__(
        self,
        send: Send,
        storage: Storage,
        *,
        should_stop: Callable[[], bool],
        explicit: Path | None,
        keep: int | None,
        use_gpu: bool,
    ) -> None:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                f"num_workers=0 trains in this process alone, and WORLD_SIZE="
                f"{os.environ['WORLD_SIZE']} is set: start the script once, without torchrun, and "
                "set num_workers."
            )
        self.rank, self.world_size, self.ranks_on_node = 0, 1, 1
        self.device = torch.device("cuda:0" if use_gpu else "cpu")
        self.attempt = uuid.uuid4().hex[:8]
        self.send, self.should_stop = send, should_stop
        self.storage, self.is_first_here = storage, True
        self._explicit, self._keep = explicit, keep

    @contextlib.contextmanager
    def process_group(self, timeout_s: int) -> Iterator[None]:
        """Inside it there is the process group of one that DeepSpeed asks for.

        The group stays until the process ends: DeepSpeed keeps references to it, and a second run
        in the same notebook would fail on a new one. The variables go: whoever trains next here,
        or is started from here, would take itself for one of a job (accelerate, torchrun).
        """
        # DeepSpeed reads these even where the group exists.
        variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        added = {name: value for name, value in variables.items() if name not in os.environ}
        os.environ.update(added)
        try:
            if not torch.distributed.is_initialized():
                self._make_process_group(timeout_s)
            yield
        finally:
            for name in added:
                os.environ.pop(name, None)

    def _make_process_group(self, timeout_s: int) -> None:
        torch.distributed.init_process_group(
            "nccl" if self.device.type == "cuda" else "gloo",
            store=torch.distributed.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=timedelta(seconds=timeout_s),
        )
        atexit.register(torch.distributed.destroy_process_group)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        newest = newest_checkpoint(self.storage)
        if newest is None:
            yield self._explicit
            return
        with self.open(newest) as folder:
            yield folder

    def scratch(self, name: str) -> Path:
        folder = self.storage.local / name
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, name: str, *, best_step: int | None) -> None:
        self.storage.put_part(folder, name)
        self.storage.complete(folder, name)
        self.storage.drop(name)
        if self._keep is not None:
            retain(self.storage, self._keep, best_step)

    def check(self) -> None:
        """Nothing happens in the background."""

    def settle(self) -> None:
        """Nothing happens in the background."""

    def find(self, step: int) -> str | None:
        return checkpoint_of(self.storage, step)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Path]:
        self.storage.pull(name)
        yield self.storage.local / name
        self.storage.drop(name)
