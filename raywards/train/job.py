"""What a worker is told, and where a run stands. Plain values: they are pickled and written."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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

    def seen_from(self, run: Path) -> Job:
        """The job for a process that sees the run folder, or its copy of it, at `run`."""
        ours = self.paths.run

        def moved(path: Path) -> Path:
            return run / path.relative_to(ours) if path.is_relative_to(ours) else path

        def moved_id(model: Any) -> Any:
            is_ours = isinstance(model, str) and Path(model).is_relative_to(ours)
            return str(moved(Path(model))) if is_ours else model

        return replace(
            self,
            paths=RunPaths(run.parent, run.name),
            model=moved_id(self.model),
            train=moved(self.train),
            evals={prefix: moved(folder) for prefix, folder in self.evals.items()},
            adapter=None if self.adapter is None else moved(self.adapter),
            untrained=moved_id(self.untrained),
        )

    def in_run_folder(self) -> list[str]:
        """What a worker reads from the run folder, by name."""
        ours = self.paths.run
        models = [Path(m) for m in (self.model, self.untrained) if isinstance(m, str)]
        folders = {self.train, *self.evals.values(), *models, *filter(None, [self.adapter])}
        return sorted(str(f.relative_to(ours)) for f in folders if f.is_relative_to(ours))


@dataclass
class State:
    """Where a run stands: all of it is in a checkpoint."""

    step: int = 0
    num_pairs: int = 0
    num_tokens: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0
