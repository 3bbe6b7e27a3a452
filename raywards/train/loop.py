"""What every worker runs: read `train` first. It knows no Ray; `session` is its way to the outside.

The global batch, the pairs (or other groups: see `objectives`) of one optimizer step over all
workers, is the unit. Its loss is the sum over its groups, divided by their number, at any number of
workers and forwards. DeepSpeed divides the sum over the ranks by their number, so each rank
multiplies by it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raywards.config import RewardConfig
from raywards.model import RewardModel
from raywards.objectives import Judged, build_objective
from raywards.packing import PackedRow, pack_groups
from raywards.settle import settle_path
from raywards.train.best import Goal, check_best_is_there, load_best
from raywards.train.export import export
from raywards.train.job import Job
from raywards.train.rows import EVALUATION_TOKENS, Rows
from raywards.train.saving import resume, save
from raywards.train.session import Session
from raywards.train.stops import remember, update
from raywards.train.table import PairTable
from raywards.train.tuning import offloading
from raywards.train.worker import Worker, open_worker

_TICK_S = 0.5
_EVALUATED_AT_ONCE = 2048


def train(job: Job, session: Session) -> None:
    """Train one reward model on this worker, from the newest checkpoint to the last step."""
    with open_worker(job, session) as worker:
        run(worker)


def run(worker: Worker) -> None:
    """Every step from the newest checkpoint to the last, then the export."""
    config, session = worker.job.config, worker.session
    goal = Goal.of(config)
    state = resume(worker)
    check_best_is_there(worker)
    clock = Clock()
    if session.rank == 0:
        start = {"step": state.step, "total": worker.total_steps, "history": worker.history}
        session.send("start", {**start, "steps_per_epoch": worker.plan.steps_per_epoch})
    if config.eval_on_start and state.step == 0:
        evaluate(worker)

    for step, indices in worker.plan.steps(state.step, worker.total_steps):
        if goal.is_given_up(state):
            break
        learning_rate = worker.engine.get_lr()[0]
        before = remember(worker)
        accumulate_gradients(worker, indices)
        update(worker, indices, before)
        state.step, state.num_pairs = step + 1, state.num_pairs + len(indices)

        due = is_due(worker, config.logging_steps, config.logging_first_step) or is_last(worker)
        if due:
            log(worker, learning_rate, clock)
        if ends_epoch(worker) and session.rank == 0:
            session.send("epoch", {"step": state.step})
        # Before the checkpoint, which thus knows what the evaluation of its step has found.
        is_best = is_evaluation_due(worker) and goal.take(state, evaluate(worker))
        if goal.is_given_up(state) and not due:
            log(worker, learning_rate, clock)
        if is_save_due(worker, is_best) or goal.is_given_up(state):
            save(worker)
        if session.rank == 0 and clock.ticks():
            session.send("tick", {"step": state.step})
        session.check()
        if worker.job.may_stop and session.should_stop():
            stop(worker)
            break

    session.settle()
    tell_of_stop(worker, goal)
    export(worker, load_best(worker))


def stop(worker: Worker) -> None:
    """End a run that a callback asked to stop, after this step. A collective."""
    if worker.saved_step != worker.state.step:
        save(worker)
    if worker.session.rank == 0:
        text = f"Stopped after step {worker.state.step}, as a callback asked."
        worker.session.send("note", {"text": text})


# ---------------------------------------------------------------- one step


def accumulate_gradients(worker: Worker, indices: Sequence[int]) -> None:
    """Forward and backward over this rank's rows of a global batch."""
    config, session = worker.job.config, worker.session
    worker.engine.train()
    worker.losses.clear()
    plan = worker.rows.plan(
        worker.pairs, indices, session.world_size, config.per_device_train_batch_size
    )
    for row in plan[session.rank]:
        with offloading(config, session.device):
            judged = judge(worker.engine, worker.pairs, row, config, session.device)
        if row:
            worker.metrics.add(*judged.counted)
            worker.losses.append((row, judged.losses.detach()))
        # A rank without pairs goes through the motions with weight zero: its peers wait for it.
        weight = session.world_size / len(indices) if row else 0.0
        worker.engine.backward(judged.losses.sum() * weight, scale_wrt_gas=False)


def judge(
    model: Callable[[PackedRow], Tensor],
    table: PairTable,
    indices: Sequence[int],
    config: RewardConfig,
    device: torch.device,
) -> Judged:
    """Rewards and loss of each group of a row. An empty row is a made-up group."""
    objective = build_objective(config)
    groups = objective.nothing
    if indices:
        groups = table.take(list(indices)) | {"source": table.sources_of(list(indices))}
    return objective.judge(model(pack_groups(groups["sequences"]).to(device)), groups)


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


def is_evaluation_due(worker: Worker) -> bool:
    config = worker.job.config
    if config.eval_strategy == "epoch":
        return ends_epoch(worker)
    every = config.eval_steps or config.logging_steps
    return config.eval_strategy == "steps" and is_due(worker, every)


def is_save_due(worker: Worker, is_best: bool) -> bool:
    config = worker.job.config
    if is_last(worker):
        return True
    if is_best and (config.load_best_model_at_end or config.save_strategy == "best"):
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
        worker.log({k: v for k, v in record.items() if v is not None})


def tell_of_stop(worker: Worker, goal: Goal) -> None:
    """Say why the run ends before its last step, where it does."""
    state, session = worker.state, worker.session
    if session.rank == 0 and goal.is_given_up(state) and not is_last(worker):
        text = (
            f"{goal.metric} has not improved in {state.evaluations_without_improvement} "
            f"evaluations: stopped after step {state.step} of {worker.total_steps}. Its best value "
            f"is {state.best_metric}, of step {state.best_step}."
        )
        session.send("note", {"text": text})


@torch.no_grad()
def evaluate(worker: Worker) -> dict[str, float]:
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
        worker.log({"step": worker.state.step, "epoch": epoch, **record})
    return record


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
    held_out = build_objective(config).held_out()
    for start in range(0, len(table), _EVALUATED_AT_ONCE):
        some = range(start, min(start + _EVALUATED_AT_ONCE, len(table)))
        plan = rows.plan(table, some, num_ranks, config.per_device_eval_batch_size)
        for row in plan[rank]:
            judged = judge(model, table, row, config, device)
            if row:
                held_out.add(*judged.held_out)
    return {**held_out.compute(), "runtime": time.monotonic() - started}
