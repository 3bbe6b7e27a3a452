"""Two ranks of the training loop without Ray: processes with a gloo group and a session of theirs.

For what is about ranks, not about Ray: it starts once for many jobs, and can stop a run where a
test wants it to.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from raywards import RewardTrainer
from raywards.checkpoint import read_manifest
from raywards.train.job import Job
from raywards.train.loop import train
from raywards.train.storage import SharedFolder, Storage, checkpoint_of, newest_checkpoint

NUM_RANKS = 2


class Stopped(Exception):
    """The run was stopped right after the checkpoint that a test named."""


@dataclass(frozen=True)
class Task:
    """A job, and the step after whose checkpoint every rank stops (None: at the end)."""

    job: Job
    stop_after: int | None = None


def task(trainer: RewardTrainer, stop_after: int | None = None) -> Task:
    """What `trainer.train()` would hand to its workers."""
    return Task(trainer._prepare_job(trainer._fixed_settings(None)), stop_after)


def run_on_two_ranks(tasks: Sequence[Task]) -> None:
    """Run tasks one after the other on two ranks; raises where one of them fails."""
    store = f"/tmp/two-ranks-{uuid.uuid4().hex}"
    context = torch.multiprocessing.get_context("spawn")
    ranks = [
        context.Process(target=_run_rank, args=(rank, store, list(tasks)))
        for rank in range(NUM_RANKS)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    Path(store).unlink(missing_ok=True)
    assert [process.exitcode for process in ranks] == [0] * NUM_RANKS


class TwoRankSession:
    """One of two processes that share a disk."""

    def __init__(self, rank: int, storage: Storage, stop_after: int | None) -> None:
        self.rank, self.world_size, self.ranks_on_node = rank, NUM_RANKS, NUM_RANKS
        self.device = torch.device("cpu")
        self.storage, self._stop_after = storage, stop_after
        self.is_first_here = rank == 0
        names = [uuid.uuid4().hex[:8]]
        torch.distributed.broadcast_object_list(names, src=0)
        self.attempt = names[0]

    def send(self, kind: str, record: dict[str, Any]) -> None:
        """Nobody listens: what counts is on disk."""

    @contextlib.contextmanager
    def resume_from(self) -> Iterator[Path | None]:
        found = newest_checkpoint(self.storage)
        torch.distributed.barrier()
        yield self.storage.local / found if found else None

    def scratch(self, name: str) -> Path:
        folder = self.storage.local / f".{name}.rank{self.rank}"
        folder.mkdir(parents=True)
        return folder

    def commit(self, folder: Path, name: str, *, best_step: int | None) -> None:
        self.storage.put_part(folder, name)
        if self.rank == 0:
            self.storage.complete(folder, name)
        torch.distributed.barrier()
        shutil.rmtree(folder)
        manifest = read_manifest(self.storage.local / name, kind="checkpoint")
        if manifest["step"] == self._stop_after:
            raise Stopped

    def check(self) -> None:
        """Nothing happens in the background."""

    def settle(self) -> None:
        """Nothing happens in the background."""

    def find(self, step: int) -> str | None:
        return checkpoint_of(self.storage, step)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Path]:
        yield self.storage.local / name


def _run_rank(rank: int, store: str, tasks: list[Task]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, NUM_RANKS),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=120),
    )
    for one in tasks:
        with contextlib.suppress(Stopped):
            train(one.job, TwoRankSession(rank, SharedFolder(one.job.paths.run), one.stop_after))
    sys.stdout.flush()
    torch.distributed.destroy_process_group()
