"""What a worker needs of its surroundings: where to resume from, where checkpoints and records go.

Two kinds of surroundings, one set of verbs: a Ray Train worker group, and this process alone.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch

from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.errors import ConfigError

Send = Callable[[str, dict[str, Any]], None]
"""Hands one record to whoever keeps the log: its kind ("log", "tick", ...) and its content."""


class Session(Protocol):
    """The surroundings of one worker for one attempt at a run."""

    rank: int
    world_size: int
    ranks_on_node: int
    """Workers that share this node's memory."""
    device: torch.device
    attempt: str
    """Shared by all ranks and new for every attempt: makes the names of checkpoints unique."""

    def send(self, kind: str, record: dict[str, Any]) -> None:
        """Hand a record to the driver; rank 0 alone calls it."""

    def resume_from(self) -> contextlib.AbstractContextManager[Path | None]:
        """The newest complete checkpoint as a local folder, or None for a fresh start."""

    def scratch(self, name: str) -> Path:
        """A new local folder to write this rank's part of checkpoint `name` into."""

    def commit(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        """Make the parts of all ranks the checkpoint `name`. A barrier: every rank calls it."""


class RaySession:
    """A worker of a Ray Train worker group. The process group is up when the loop starts."""

    def __init__(self, send: Send, *, run: Path, explicit: Path | None) -> None:
        import ray.train.torch

        context = ray.train.get_context()
        self.rank = context.get_world_rank()
        self.world_size = context.get_world_size()
        self.ranks_on_node = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self.send = send
        self._run, self._explicit = run, explicit
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # NCCL moves objects through the current device
        names = [uuid.uuid4().hex[:8]]
        torch.distributed.broadcast_object_list(names, src=0)
        self.attempt = names[0]
        name = hashlib.sha256(str(run).encode()).hexdigest()[:12]
        self._scratch = Path(tempfile.gettempdir()) / f"raywards-{name}"
        self._sweep()

    def _sweep(self) -> None:
        """Remove what killed attempts at this run left on this node's disk."""
        for folder in self._scratch.glob("checkpoint-*"):
            if self.attempt not in folder.name:
                shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        # Not Ray's own choice: its controller hears of a checkpoint seconds after the last file of
        # it is there, so after a kill it would go back further than it has to. The manifest tells.
        newest: list[Path | None] = [None]
        if self.rank == 0:
            complete = complete_checkpoints(self._run)
            newest = [complete[-1] if complete else None]
        torch.distributed.broadcast_object_list(newest, src=0)
        yield newest[0] or self._explicit

    def scratch(self, name: str) -> Path:
        folder = self._scratch / f"{name}-rank{self.rank}"
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        import ray.train

        try:
            ray.train.report(
                metrics,
                checkpoint=ray.train.Checkpoint.from_directory(folder),
                checkpoint_dir_name=name,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class LocalSession:
    """This process alone: a notebook, or one GPU. Checkpoints lie in the run folder directly."""

    def __init__(
        self, send: Send, run: Path, *, explicit: Path | None, keep: int | None, use_gpu: bool
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
        self.send = send
        self._run, self._explicit, self._keep = run, explicit, keep
        for cut_off in run.glob(".checkpoint-*.partial"):
            shutil.rmtree(cut_off)

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
        complete = complete_checkpoints(self._run)
        yield complete[-1] if complete else self._explicit

    def scratch(self, name: str) -> Path:
        folder = self._run / f".{name}.partial"
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, name: str, metrics: dict[str, float]) -> None:
        del metrics  # they are in the manifest
        read_manifest(folder, kind="checkpoint")
        os.replace(folder, self._run / name)
        if self._keep is not None:
            for old in complete_checkpoints(self._run)[: -self._keep]:
                shutil.rmtree(old)
