"""Checkpoints of a run: written by all ranks, loaded by any number of them."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import transformers

import raywards
from raywards.checkpoint import list_files, read_manifest, write_manifest
from raywards.errors import CheckpointError
from raywards.train.job import State
from raywards.train.reshard import load_resharded, resharded
from raywards.train.runfolder import checkpoint_settings, refuse_other_run
from raywards.train.storage import checkpoint_name, writing
from raywards.train.tuning import (
    load_trained,
)
from raywards.train.worker import Worker, note

_TAG = "engine"
_LOG = "metrics.jsonl"


def save(worker: Worker) -> None:
    """Write this rank's part of a checkpoint and hand it over. A collective."""
    session, state = worker.session, worker.state
    name = checkpoint_name(state.step, session.attempt)
    folder = session.scratch(name)
    try:
        with writing(folder):
            _write_part(worker, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    session.commit(folder, name, best_step=state.best_step)
    worker.saved_step = state.step
    if session.rank == 0:
        session.send("save", {"step": state.step, "checkpoint": name})


def _write_part(worker: Worker, folder: Path) -> None:
    session, state = worker.session, worker.state
    window = worker.metrics.gather_on_first_rank(session.rank)
    client_state = {"raywards": {**dataclasses.asdict(state), "window": window}}
    worker.engine.save_checkpoint(
        str(folder),
        tag=_TAG,
        client_state=client_state,
        exclude_frozen_parameters=worker.job.untrained is not None,
    )
    torch.save(random_state(session.device), folder / f"random-{session.rank}.pt")

    if session.rank == 0:
        # The driver may die before it has fetched the last ones.
        lines = (json.dumps(record) + "\n" for record in worker.history)
        (folder / _LOG).write_text("".join(lines), encoding="utf-8")
    parts: list[Any] = [None] * session.world_size
    torch.distributed.all_gather_object(parts, list_files(folder))
    files = {file: size for part in parts for file, size in part.items()}
    if session.rank == 0:
        content = {
            "kind": "checkpoint",
            "raywards": raywards.__version__,
            "settings": worker.job.settings,
            "num_ranks": session.world_size,
            **dataclasses.asdict(counted(worker)),
        }
        write_manifest(folder, content, files)


def counted(worker: Worker) -> State:
    """Where the run stands, with the tokens since the last log. For rank 0, when it has been given
    the sums of all ranks."""
    tokens = worker.state.num_tokens + worker.metrics.num_tokens
    return dataclasses.replace(worker.state, num_tokens=tokens)


def resume(worker: Worker) -> State:
    """Bring engine, counters and random state to the newest checkpoint, if there is one."""
    with worker.session.resume_from() as folder:
        if folder is None:
            return worker.state
        manifest = read_manifest(folder, kind="checkpoint")
        check_fits(folder, manifest, worker)
        saved = dict(load_engine(worker, folder, manifest)["raywards"])
        worker.metrics.restore(saved.pop("window"), worker.session.rank)
        worker.state = State(**saved)
        worker.saved_step = worker.state.step
        if worker.session.rank == 0:
            lines = (folder / _LOG).read_text(encoding="utf-8").splitlines()
            worker.history = [json.loads(line) for line in lines]
        file = folder / f"random-{worker.session.rank}.pt"
        if file.is_file():
            set_random_state(torch.load(file, weights_only=False), worker.session.device)
        else:  # of a rank that was not there: its dropout starts from a seed of its own
            own = 7919 * worker.state.step + worker.session.rank
            transformers.set_seed((worker.job.config.seed + own) % 2**32)
    return worker.state


def load_engine(worker: Worker, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Weights, optimizer and schedule of a checkpoint, written by any number of ranks.

    A collective. Returns what `save` handed DeepSpeed besides.
    """
    engine, session = worker.engine, worker.session
    stage = engine.zero_optimization_stage()
    if stage == 0 or manifest["num_ranks"] == session.world_size:
        path, client_state = engine.load_checkpoint(
            str(folder),
            tag=_TAG,
            custom_load_fn=None if worker.job.untrained is None else load_trained,
        )
    else:
        note(
            session,
            f"{folder.name} is of {manifest['num_ranks']} workers and there are "
            f"{session.world_size} now: its ZeRO-{stage} shards are converted.",
        )
        with resharded(folder / _TAG, session) as converted:
            path, client_state = load_resharded(engine, converted)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load in it.")
    return dict(client_state)


def check_fits(folder: Path, manifest: dict[str, Any], worker: Worker) -> None:
    """Refuse a checkpoint of another run: to go on would train something nobody asked for."""
    theirs = checkpoint_settings(folder, manifest)
    refuse_other_run(f"{folder}: is", theirs, worker.job.settings)


def random_state(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
