"""What every worker runs: read `train` first. It knows no Ray; `session` is its way to the outside.

The global batch, the pairs of one optimizer step over all workers, is the unit. Its loss is the sum
over its pairs, divided by their number, at any number of workers and forwards. DeepSpeed divides
the sum over the ranks by their number, so each rank multiplies by it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from raywards import loss
from raywards.config import RewardConfig
from raywards.errors import NonFiniteError
from raywards.evaluation import HeldOut
from raywards.model import RewardModel
from raywards.packing import PackedRow, pack_pairs
from raywards.settle import settle_path
from raywards.train.rows import EVALUATION_TOKENS, Rows
from raywards.train.session import Session
from raywards.train.table import PairTable
from raywards.train.tuning import offloading
from raywards.train.worker import Job, Worker, build_worker, export, resume, save

_TICK_S = 0.5
_EVALUATED_AT_ONCE = 2048


def train(job: Job, session: Session) -> None:
    """Train one reward model on this worker, from the newest checkpoint to the last step."""
    worker = build_worker(job, session)
    try:
        run(worker)
    finally:
        worker.engine.module.unwrap()  # it may be the caller's own model
        if worker.adapters is not None:
            worker.adapters.close()


def run(worker: Worker) -> None:
    """Every step from the newest checkpoint to the last, then the export."""
    config, session = worker.job.config, worker.session
    state = resume(worker)
    clock = Clock()
    if session.rank == 0:
        session.send("start", {"step": state.step, "total": worker.total_steps})
    if config.eval_on_start and state.step == 0:
        evaluate(worker)

    for step, indices in worker.plan.steps(state.step, worker.total_steps):
        learning_rate = worker.engine.get_lr()[0]
        accumulate_gradients(worker, indices)
        stop_if_not_finite(worker, step)
        worker.engine.step()
        stop_if_skipped(worker, step)
        state.step, state.num_pairs = step + 1, state.num_pairs + len(indices)

        if is_due(worker, config.logging_steps, config.logging_first_step) or is_last(worker):
            log(worker, learning_rate, clock)
        if config.eval_strategy == "epoch" and ends_epoch(worker):
            evaluate(worker)
        if config.eval_strategy == "steps" and is_due(
            worker, config.eval_steps or config.logging_steps
        ):
            evaluate(worker)
        if is_save_due(worker):
            save(worker)
        if session.rank == 0 and clock.ticks():
            session.send("tick", {"step": state.step})

    export(worker)


# ---------------------------------------------------------------- one step


def accumulate_gradients(worker: Worker, indices: Sequence[int]) -> None:
    """Forward and backward over this rank's rows of a global batch."""
    config, session = worker.job.config, worker.session
    worker.engine.train()
    plan = worker.rows.plan(
        worker.pairs, indices, session.world_size, config.per_device_train_batch_size
    )
    for row in plan[session.rank]:
        with offloading(config, session.device):
            judged = judge(worker.engine, worker.pairs, row, config, session.device)
        if row:
            worker.metrics.add(*judged.values, judged.num_tokens)
        # A rank without pairs goes through the motions with weight zero: its peers wait for it.
        weight = session.world_size / len(indices) if row else 0.0
        worker.engine.backward(judged.losses.sum() * weight, scale_wrt_gas=False)


@dataclass(frozen=True)
class Judged:
    """The pairs of a row and what the model makes of them; tensors are [P]."""

    losses: Tensor
    chosen: Tensor
    rejected: Tensor
    probability: Tensor
    pairs: dict[str, list[Any]]

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.losses, self.chosen, self.rejected, self.probability

    @property
    def lengths(self) -> list[tuple[int, int]]:
        sides = zip(self.pairs["chosen_ids"], self.pairs["rejected_ids"], strict=True)
        return [(len(chosen), len(rejected)) for chosen, rejected in sides]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))


def judge(
    model: Callable[[PackedRow], Tensor],
    table: PairTable,
    indices: Sequence[int],
    config: RewardConfig,
    device: torch.device,
) -> Judged:
    """Rewards and loss of each pair of a row. An empty row is a made-up pair."""
    pairs = table.take(list(indices)) if indices else _NOTHING
    row = pack_pairs(pairs["chosen_ids"], pairs["rejected_ids"])
    chosen, rejected = model(row.to(device)).view(-1, 2).unbind(1)
    # Sources with and without them may be mixed.
    margin = _or_else(pairs["margin"], 0.0, device)
    probability = _or_else(pairs["probability"], 1.0, device)
    believed = loss.smoothed(probability, config.label_smoothing)
    losses = loss.bradley_terry(chosen, rejected, margin, believed)
    if config.center_rewards_coefficient is not None:
        losses = losses + config.center_rewards_coefficient * loss.centering(chosen, rejected)
    return Judged(losses, chosen, rejected, probability, pairs)


def _or_else(values: list[float | None], otherwise: float, device: torch.device) -> Tensor:
    filled = [otherwise if value is None else value for value in values]
    return torch.tensor(filled, dtype=torch.float32, device=device)


_NOTHING: dict[str, list[Any]] = {
    "chosen_ids": [[0]],
    "rejected_ids": [[0]],
    "margin": [None],
    "probability": [None],
}


def stop_if_not_finite(worker: Worker, step: int) -> None:
    """Raise on every rank, before the update, if the loss of any pair is not finite."""
    bad = worker.metrics.num_not_finite()
    torch.distributed.all_reduce(bad, op=ReduceOp.SUM)
    if bad.item():
        raise NonFiniteError(
            f"step {step + 1}: the loss of {int(bad.item())} pairs is NaN or infinite. The update "
            "was not applied. Lower learning_rate, or look at these rows and at the model's dtype.",
            step=step + 1,
        )


def stop_if_skipped(worker: Worker, step: int) -> None:
    """Raise where DeepSpeed left an update out, or made one, from a gradient that is not finite."""
    norm = worker.grad_norm()
    finite = norm is None or math.isfinite(norm)
    if getattr(worker.engine.optimizer, "overflow", False) or not finite:
        raise NonFiniteError(
            f"step {step + 1}: the norm of the gradient is not finite. No checkpoint holds this "
            "step. Lower learning_rate, set max_grad_norm, or compute in fp32 (bf16=False).",
            step=step + 1,
        )


# ---------------------------------------------------------------- log, evaluate


class Clock:
    """Time since the last log, and whether it is time to move the progress bar."""

    def __init__(self) -> None:
        self._logged = self._ticked = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        seconds, self._logged = now - self._logged, now
        return max(seconds, 1e-9)

    def ticks(self) -> bool:
        if time.monotonic() - self._ticked < _TICK_S:
            return False
        self._ticked = time.monotonic()
        return True


def is_due(worker: Worker, every: int, first: bool = False) -> bool:
    """Whether something that happens every so many steps happens now."""
    step = worker.state.step
    return step % every == 0 or (first and step == 1)


def ends_epoch(worker: Worker) -> bool:
    return worker.state.step % worker.plan.steps_per_epoch == 0 or is_last(worker)


def is_last(worker: Worker) -> bool:
    return worker.state.step == worker.total_steps


def is_save_due(worker: Worker) -> bool:
    config = worker.job.config
    if is_last(worker):
        return True
    if config.save_strategy == "epoch":
        return ends_epoch(worker)
    return config.save_strategy == "steps" and is_due(worker, config.save_steps)


def log(worker: Worker, learning_rate: float, clock: Clock) -> None:
    """One record of the pairs since the last one. A collective."""
    state = worker.state
    values = worker.metrics.compute()
    worker.metrics.reset()
    state.num_tokens += int(values["num_tokens"])
    num_pairs = values.pop("num_pairs")
    if worker.session.rank == 0:
        record = {
            "step": state.step,
            "epoch": state.step / worker.plan.steps_per_epoch,
            **values,
            "num_tokens": state.num_tokens,
            "grad_norm": worker.grad_norm(),
            "learning_rate": learning_rate,
            "pairs_per_second": num_pairs / clock.lap(),
        }
        worker.session.send("log", {k: v for k, v in record.items() if v is not None})


@torch.no_grad()
def evaluate(worker: Worker) -> None:
    """Held-out metrics of every evaluation set, each pair counted once. A collective."""
    session = worker.session
    worker.engine.eval()
    record: dict[str, float] = {}
    for prefix, folder in worker.job.evals.items():
        values = evaluate_table(
            worker.engine,
            worker.rows,
            PairTable(folder),
            worker.job.config,
            session.device,
            rank=session.rank,
            num_ranks=session.world_size,
        )
        record.update({f"{prefix}_{name}": value for name, value in values.items()})
    if session.rank == 0 and record:
        epoch = worker.state.step / worker.plan.steps_per_epoch
        session.send("log", {"step": worker.state.step, "epoch": epoch, **record})


@torch.no_grad()
def evaluate_alone(inner: Any, folder: Path, config: RewardConfig) -> dict[str, float]:
    """The same metrics of a model that this process holds, which is left as it was."""
    model = RewardModel(inner).eval()
    try:
        settle_path(model)
        tokens = int(min(config.max_tokens_per_row or EVALUATION_TOKENS, model.most_tokens))
        rows = Rows(model.pads, tokens, model.window)
        device = next(model.parameters()).device
        return evaluate_table(model, rows, PairTable(folder), config, device, rank=0, num_ranks=1)
    finally:
        model.unwrap()


def evaluate_table(
    model: Callable[[PackedRow], Tensor],
    rows: Rows,
    table: PairTable,
    config: RewardConfig,
    device: torch.device,
    *,
    rank: int,
    num_ranks: int,
) -> dict[str, float]:
    """Figures over all pairs of a table, dealt to the ranks."""
    started = time.monotonic()
    held_out = HeldOut()
    for start in range(0, len(table), _EVALUATED_AT_ONCE):
        some = range(start, min(start + _EVALUATED_AT_ONCE, len(table)))
        plan = rows.plan(table, some, num_ranks, config.per_device_eval_batch_size)
        for row in plan[rank]:
            judged = judge(model, table, row, config, device)
            if row:
                held_out.add(*judged.values, judged.lengths, judged.pairs["source"])
    return {**held_out.compute(), "runtime": time.monotonic() - started}
