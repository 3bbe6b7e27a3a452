"""A checkpoint of one number of ranks, loaded by another.

ZeRO-1 to 3 cut the optimizer's state over the ranks, and load it only at the number that wrote it.
DeepSpeed's own converter makes a *universal checkpoint* of the shards: a file for each parameter,
from which any number of ranks takes its part. One process converts, the others wait.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.checkpoint import ds_to_universal

from raywards.train.session import Session

_NAME = "universal"


@contextlib.contextmanager
def resharded(engine_folder: Path, session: Session) -> Iterator[Path]:
    """Inside, the shards in `engine_folder` as a universal checkpoint. A collective.

    It lies in the run folder or this node's copy of it, takes as much space as the shards (twice
    that while it is made), and is gone afterwards.
    """
    folder = session.storage.local / f".resharded-{session.attempt}"
    failure: BaseException | None = None
    if session.is_first_here:
        for left in folder.parent.glob(".resharded-*"):  # by an attempt that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            _convert(engine_folder, folder / _NAME)
        except Exception as error:
            failure = error
    failures: list[BaseException | None] = [None] * session.world_size
    torch.distributed.all_gather_object(failures, failure)  # the others must not wait for ever
    try:
        for found in failures:
            if found is not None:
                raise found
        yield folder
        torch.distributed.barrier()  # all have read it
    finally:
        if session.is_first_here:
            shutil.rmtree(folder, ignore_errors=True)


def load_resharded(engine: Any, folder: Path) -> tuple[str | None, dict[str, Any]]:
    """What `engine.load_checkpoint` does and returns, from a universal checkpoint."""
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    # The setting of DeepSpeed's dict is read once, before it is known what there is to load.
    engine._config.load_universal_checkpoint = True
    try:
        path, client_state = engine.load_checkpoint(str(folder), tag=_NAME)
    finally:
        engine._config.load_universal_checkpoint = False
    # ZeRO-3 gives every group the settings of the first: biases and norms would decay, too. And all
    # parameters get one and the same tensor of steps, which torch's AdamW counts up for each.
    for group, decay in zip(engine.optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    for state in engine.optimizer.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
    return path, client_state


def _convert(shards: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    options = argparse.Namespace(
        input_folder=str(shards),
        output_folder=str(folder),
        # Each more is a process that imports torch and DeepSpeed, and holds a shard in memory.
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)  # it prints its progress
