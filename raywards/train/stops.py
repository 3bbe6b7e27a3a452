"""The update of a step, or the end of the run where a loss or the gradient is not finite.

Such a run stops before the update, names the rows, and leaves a checkpoint of where it stood.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.distributed import ReduceOp

from raywards.errors import NonFiniteError
from raywards.metrics import Metrics
from raywards.train.saving import random_state, save, set_random_state
from raywards.train.worker import Worker

_ROWS_NAMED = 5


@dataclass(frozen=True)
class Moment:
    """What a step changes before its update: sums of the metrics, and random state."""

    metrics: Metrics
    random: dict[str, Any]


def remember(worker: Worker) -> Moment:
    """The state of before a step, beside that of the engine."""
    return Moment(copy.deepcopy(worker.metrics), random_state(worker.session.device))


def update(worker: Worker, indices: Sequence[int], before: Moment) -> None:
    """The optimizer's step for the gradients of the global batch `indices`.

    Raises `NonFiniteError` on every rank instead, if the loss of any pair, or the norm of the
    gradient, is not finite.
    """
    _refuse_losses(worker, before)
    try:
        worker.engine.step()
        norm = worker.grad_norm()
        finite = norm is None or math.isfinite(norm)
    except NonFiniteError:  # by the clipper, before the optimizer began
        finite = False
    else:
        if not finite:  # ZeRO has left the update out, but counted it
            worker.engine.global_steps -= 1
            worker.engine.skipped_steps -= 1
            worker.engine.optimizer.overflow = False
    if not finite:
        rows = _names(worker, indices[:_ROWS_NAMED])
        more = len(indices) - len(rows)
        _stop(
            worker,
            before,
            f"the norm of the gradient is not finite, of a global batch of {_listed(rows, more)}",
            rows,
        )


def _refuse_losses(worker: Worker, before: Moment) -> None:
    bad = worker.metrics.num_not_finite()
    torch.distributed.all_reduce(bad, op=ReduceOp.SUM)
    if not bad.item():
        return
    mine = [
        index
        for row, losses in worker.losses
        for index, loss in zip(row, losses.tolist(), strict=True)
        if not math.isfinite(loss)
    ]
    parts: list[Any] = [None] * worker.session.world_size
    torch.distributed.all_gather_object(parts, sorted(mine)[:_ROWS_NAMED])
    rows = _names(worker, sorted(index for part in parts for index in part)[:_ROWS_NAMED])
    number = int(bad.item())
    _stop(
        worker,
        before,
        f"the loss of {number} pair{'s' if number > 1 else ''} is NaN or infinite: "
        f"{_listed(rows, number - len(rows))}",
        rows,
    )


def _stop(worker: Worker, before: Moment, what: str, rows: list[tuple[str, int]]) -> NoReturn:
    """Leave a checkpoint of before the step, and raise. A collective."""
    worker.metrics = before.metrics
    set_random_state(before.random, worker.session.device)
    step = worker.state.step
    left = "Nothing was trained before it."
    if step > 0:
        if worker.saved_step != step:
            save(worker)
        worker.session.settle()
        run = worker.session.storage.where()
        left = f"The checkpoint of step {step} in {run} is the state before it."
    raise NonFiniteError(
        f"step {step + 1}: {what}. The update was not applied. {left} Started again with the same "
        "settings, the run meets the same pairs. Look at these rows and take out what is wrong "
        "with them, or lower learning_rate or max_grad_norm, under another output_dir.",
        step=step + 1,
        rows=rows,
    )


def _names(worker: Worker, indices: Sequence[int]) -> list[tuple[str, int]]:
    """Source and row number of pairs."""
    taken = worker.pairs.take(list(indices))
    return list(zip(taken["source"], taken["row"], strict=True))


def _listed(rows: list[tuple[str, int]], more: int) -> str:
    sources = dict.fromkeys(source for source, _ in rows)
    named = "; ".join(
        f"{source} row {', '.join(str(row) for its, row in rows if its == source)}"
        for source in sources
    )
    return f"{named} and {more} more" if more > 0 else named
