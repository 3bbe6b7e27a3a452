"""The best checkpoint by a held-out figure, and stopping where that figure gets no better.

The rules are those of transformers' Trainer and its EarlyStoppingCallback; where a run stands by
them is in `State`, hence in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raywards.checkpoint import read_manifest
from raywards.config import RewardConfig
from raywards.errors import CheckpointError, ConfigError, did_you_mean
from raywards.objectives import build_objective
from raywards.train.job import State
from raywards.train.saving import counted, load_engine
from raywards.train.table import PairTable
from raywards.train.worker import Worker


@dataclass(frozen=True)
class Goal:
    """What the evaluations of a run are to reach. Without a `metric` nothing is asked of them."""

    metric: str | None
    """Key of an evaluation's record, such as `eval_loss`."""
    greater_is_better: bool
    patience: int | None
    """Evaluations without improvement after which the run stops."""
    threshold: float
    """What the figure has to be better by to count as an improvement."""

    @classmethod
    def of(cls, config: RewardConfig) -> Goal:
        """The goal that the settings state. Raises `ConfigError` where they state none well."""
        patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
        if patience is None and threshold:
            raise ConfigError(
                f"early_stopping_threshold={threshold:g}: has no effect without "
                "early_stopping_patience; set that too."
            )
        wants = {
            "metric_for_best_model": config.metric_for_best_model is not None,
            "load_best_model_at_end": config.load_best_model_at_end,
            "early_stopping_patience": patience is not None,
            "save_strategy='best'": config.save_strategy == "best",
        }
        asked = [name for name, wanted in wants.items() if wanted]
        if not asked:
            if config.greater_is_better is not None:
                raise ConfigError(
                    f"greater_is_better={config.greater_is_better}: has no effect without "
                    "metric_for_best_model; set that too."
                )
            return cls(None, False, None, 0.0)
        if config.eval_strategy == "no":
            raise ConfigError(
                f"{asked[0]} needs evaluations, and eval_strategy is 'no': set it to 'steps' or "
                "'epoch'."
            )
        name = config.metric_for_best_model or "loss"
        metric = name if name.startswith("eval_") else f"eval_{name}"
        greater = config.greater_is_better
        if greater is None:
            greater = _greater_is_better(name, config)
        return cls(metric, greater, patience, threshold)

    def refuse_unknown_metric(self, config: RewardConfig, evals: Mapping[str, Path]) -> None:
        """Raise `ConfigError` where no evaluation of these prepared sets has the metric."""
        if self.metric is None:
            return
        held_out = build_objective(config).held_out()
        known = {f"{prefix}_{figure}" for prefix in evals for figure in held_out.choosable}
        if self.metric not in known and f"{held_out.by_source}/" in self.metric:
            known |= {
                f"{prefix}_{held_out.by_source}/{source}"
                for prefix, folder in evals.items()
                for sources in [PairTable(folder).sources]
                for source in sources
                if len(sources) > 1
            }
        if self.metric not in known:
            raise self._unknown(known)

    def take(self, state: State, record: Mapping[str, float]) -> bool:
        """Enter an evaluation into `state`; whether it is the best one so far.

        A figure that is NaN is no improvement, nor is one that was there and is not now: rewards
        that are all alike have no correlation. Raises `ConfigError` where it never was there.
        """
        if self.metric is None:
            return False
        best = state.best_metric
        if self.metric not in record and best is None:
            raise self._unknown(record)
        value = record.get(self.metric, math.nan)
        ahead = value - (best if best is not None else value)
        if not self.greater_is_better:
            ahead = -ahead
        is_best = ahead > 0 or (best is None and value == value)
        if is_best and (best is None or ahead > self.threshold):
            state.evaluations_without_improvement = 0
        else:
            state.evaluations_without_improvement += 1
        if is_best:
            state.best_metric, state.best_step = value, state.step
        return is_best

    def is_given_up(self, state: State) -> bool:
        """Whether the run is to stop at this step."""
        if self.patience is None:
            return False
        return state.evaluations_without_improvement >= self.patience

    def _unknown(self, known: Mapping[str, float] | set[str]) -> ConfigError:
        near = did_you_mean(str(self.metric), known)
        return ConfigError(
            f"metric_for_best_model: no evaluation gives {self.metric!r}.{near} There are: "
            f"{', '.join(sorted(known))}."
        )


def check_best_is_there(worker: Worker) -> None:
    """Raise `CheckpointError` where a resumed run would end without its best checkpoint.

    It lies beside the checkpoint that was named in another run folder. A collective.
    """
    config, state = worker.job.config, worker.state
    if not config.load_best_model_at_end or state.best_step is None:
        return
    if worker.session.find(state.best_step) is None:
        raise CheckpointError(
            f"{worker.session.storage.where()}: does not hold the best checkpoint so far, of step "
            f"{state.best_step}, and load_best_model_at_end=True will need it. Copy it here "
            "together with the checkpoint to start from, and leave resume_from_checkpoint out."
        )


def load_best(worker: Worker) -> State:
    """Bring the weights of the best checkpoint into the engine, if that is asked for.

    Returns where the run stood with the weights that the engine holds now. A collective.
    """
    config = worker.job.config
    worker.metrics.gather_on_first_rank(worker.session.rank)
    state = counted(worker)
    if not config.load_best_model_at_end or state.best_step == state.step:
        return state
    if state.best_step is None:
        if worker.session.rank == 0:
            text = "No evaluation found a best checkpoint: the export is of the last step."
            worker.session.send("note", {"text": text})
        return state
    name = worker.session.find(state.best_step)
    if name is None:
        raise CheckpointError(
            f"{worker.session.storage.where()}: the best checkpoint, of step {state.best_step}, is "
            "gone, so load_best_model_at_end=True cannot be done. Put it back; nothing else has "
            "its weights."
        )
    with worker.session.open(name) as folder:
        manifest = read_manifest(folder, kind="checkpoint")
        load_engine(worker, folder, manifest)
    return dataclasses.replace(
        state, **{name: manifest[name] for name in ("step", "num_pairs", "num_tokens")}
    )


def _greater_is_better(name: str, config: RewardConfig) -> bool:
    """As the figure has it: transformers goes by whether the name ends with "loss"."""
    held_out = build_objective(config).held_out()
    if f"{held_out.by_source}/" in name:  # what follows is the name of a source
        return bool(held_out.choosable[held_out.by_source])
    figures = [one for one in held_out.choosable if name == one or name.endswith(f"_{one}")]
    if not figures:
        return False  # `refuse_unknown_metric` will tell, which knows the sets
    greater: bool | None = held_out.choosable[max(figures, key=len)]
    if greater is None:
        raise ConfigError(
            f"metric_for_best_model={name!r}: it is not obvious whether more of it is better; set "
            "greater_is_better to True or False."
        )
    return greater
