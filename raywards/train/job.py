"""What a worker is told, and where a run stands. Plain values: they are pickled and written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raywards.config import RewardConfig, RunPaths
from raywards.rendering import Rendering


@dataclass(frozen=True)
class Job:
    """All that a worker is told. Made by `RewardTrainer`; plain values, so it can be pickled."""

    config: RewardConfig = field(repr=False)
    paths: RunPaths
    model: Any
    """A folder or hub id; with `num_workers=0` it may be the model itself."""
    model_kwargs: dict[str, Any] = field(repr=False)  # may hold a token; Ray keeps a job's repr
    rendering: Rendering
    train: Path
    """Prepared folder."""
    evals: dict[str, Path]
    """Prepared folders by the prefix of their metrics."""
    settings: dict[str, Any]
    """What must not change while the run is continued (`runfolder.fixed_settings`)."""
    about: dict[str, Any]
    """What the export's manifest says of the run."""
    last_ids: list[int]
    may_stop: bool = False
    """Whether a callback may ask the run to stop; the ranks then agree on it after each step."""
    mixture: tuple[tuple[int, float], ...] = ()
    """Pairs and weight of each source, where some weigh other than 1."""
    peft: Any = None
    """A `peft.LoraConfig`: adapters to put into the model."""
    adapter: Path | None = None
    """A peft folder: the adapter that the model came with."""
    untrained: str | None = None
    """Folder or hub id of the model without adapters, where some of its weights are not trained:
    these are not in checkpoints, and the export takes them from there."""


@dataclass
class State:
    """Where a run stands: all of it is in a checkpoint."""

    step: int = 0
    num_pairs: int = 0
    num_tokens: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
