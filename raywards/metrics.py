"""Metrics of training: sums on the device, one reduction over the ranks per log.

Names are TRL's. Values are those of the pairs since the last log, each pair counted once: TRL
averages batch means, calls a tie a loss, and reports means of minima. Rankings are counted as the
pairs in them, rated texts one by one. Of several sources, the same by source.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Metrics(ABC):
    """Named sums, and the extremes of the rewards; `compute` turns those of all ranks into values.

    `names` are those of the sums, `by_source` the figures that each of several sources has, too.
    """

    names: tuple[str, ...]
    by_source: tuple[str, ...]

    def __init__(self, device: torch.device, sources: Sequence[str] = ()) -> None:
        self.device = device
        several = len(sources) > 1
        self._sources = {name: place for place, name in enumerate(sources)} if several else {}
        self.reset()

    def reset(self) -> None:
        # Those of `names`; then of each figure and source a sum, and the number of its summands.
        size = len(self.names) + 2 * len(self.by_source) * len(self._sources)
        self._sums = torch.zeros(size, dtype=torch.float64, device=self.device)
        # Kept as [-min, max], so that one maximum over the ranks serves both.
        self._extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=self.device)
        self._not_finite = torch.zeros(1, dtype=torch.int64, device=self.device)

    def num_not_finite(self) -> Tensor:
        """Groups of this rank since `reset` whose loss is NaN or infinite, [1] int64."""
        return self._not_finite.clone()

    @property
    def num_tokens(self) -> int:
        """Tokens that this rank has counted since `reset`."""
        return int(self._sums[self.names.index("tokens")])

    def gather_on_first_rank(self, rank: int) -> list[list[float]]:
        """Move the sums of all ranks to rank 0 and return them, for a checkpoint. Collective.

        What `compute` gives later is the same.
        """
        sums, extremes = self._over_ranks()
        not_finite = self._not_finite
        self.reset()
        self._not_finite = not_finite
        if rank == 0:
            self._sums, self._extremes = sums, extremes
        return [sums.tolist(), extremes.tolist()]

    def restore(self, window: list[list[float]], rank: int) -> None:
        """Take up the sums that `gather_on_first_rank` returned.

        A window of an earlier version has none by source: these begin here.
        """
        self.reset()
        if rank == 0:
            sums, extremes = window
            self._sums[: len(sums)] = self._sums.new_tensor(sums)
            self._extremes = torch.tensor(extremes, dtype=torch.float64, device=self.device)

    def compute(self) -> dict[str, float]:
        """Values over the groups of every rank since `reset`. A collective: every rank calls it."""
        totals, extremes = self._over_ranks()
        sums = dict(zip(self.names, totals[: len(self.names)].tolist(), strict=True))
        if sums["groups"] == 0:
            return {"num_pairs": 0.0, "num_tokens": 0.0}
        negated_min, maximum = extremes.tolist()
        return {
            "loss": sums["loss"] / sums["groups"],
            **self._values(sums),
            "min_reward": -negated_min,
            "mean_reward": sums["reward"] / sums["rewards"],
            "max_reward": maximum,
            "num_pairs": sums["groups"],
            "num_tokens": sums["tokens"],
            **self._of_sources(totals),
        }

    @abstractmethod
    def add(self, *args: Any, **kwargs: Any) -> None:
        """Count groups: what each objective has to say of them."""

    @abstractmethod
    def _values(self, sums: dict[str, float]) -> dict[str, float]:
        """What this objective adds."""

    def _add(self, losses: Tensor, rewards: Tensor, num_tokens: int, **sums: Tensor) -> None:
        """Count groups with these losses [G] and rewards [S], and further sums."""
        sums |= {
            "groups": torch.ones_like(losses).sum(),
            "loss": losses.sum(),
            "reward": rewards.sum(),
            "rewards": torch.ones_like(rewards).sum(),
            "tokens": losses.new_tensor(num_tokens),
        }
        self._sums[: len(self.names)].add_(torch.stack([sums[name] for name in self.names]))
        extremes = torch.stack([-rewards.min(), rewards.max()])
        self._extremes = torch.maximum(self._extremes, extremes)
        self._not_finite += (~torch.isfinite(losses)).sum()

    def _add_by_source(self, figure: str, values: Tensor, sources: Sequence[str]) -> None:
        """Count what `figure` is the mean of, for the source of each: both are [N]."""
        if not self._sources:
            return
        numbers = [self._sources[name] for name in sources]
        # Not made on the device at once, which would wait for what the device has in hand.
        places = torch.tensor(numbers, dtype=torch.int64).to(self.device, non_blocking=True)
        counted = torch.stack([values, torch.ones_like(values)], 1)
        self._table(self._sums)[self.by_source.index(figure)].index_add_(0, places, counted)

    def _table(self, sums: Tensor) -> Tensor:
        """The part by source, [figures, sources, 2]: a view."""
        return sums[len(self.names) :].view(len(self.by_source), len(self._sources), 2)

    def _of_sources(self, totals: Tensor) -> dict[str, float]:
        """Figures of each of several sources; of one without pairs only that it has none."""
        found: dict[str, float] = {}
        for figure, rows in zip(self.by_source, self._table(totals).tolist(), strict=True):
            for name, (value, count) in zip(self._sources, rows, strict=True):
                if figure == "loss":
                    found[f"num_pairs/{name}"] = count
                if count:
                    found[f"{figure}/{name}"] = value / count
        return found

    def _over_ranks(self) -> tuple[Tensor, Tensor]:
        """Sums and extremes of all ranks; those of this rank stay as they are."""
        sums, extremes = self._sums.clone(), self._extremes.clone()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
        return sums, extremes


class PairMetrics(Metrics):
    """Of pairs, and of rankings as the pairs of different rank in them."""

    names = (
        *("groups", "loss", "reward", "rewards", "tokens"),
        *("pairs", "accuracy", "ties", "margin"),
    )
    by_source = ("loss", "accuracy")

    def add(
        self,
        losses: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        probability: Tensor,
        num_tokens: int,
        sources: Sequence[str] = (),
        rewards: Tensor | None = None,
        sources_of_pairs: Sequence[str] | None = None,
    ) -> None:
        """Count P pairs: `chosen`, `rejected` and `probability` are [P].

        `losses` and `sources` are those of G groups, for pairs these same; `sources_of_pairs` [P],
        default: these, too. `rewards` are those of S sequences, default: of the pairs. `num_tokens`
        counts every sequence. Accuracy is the share of judges that agree, of whom `probability`
        prefer chosen.
        """
        if losses.numel() == 0:
            return
        given = (losses, chosen, rejected, probability)
        losses, chosen, rejected, probability = (x.detach().double() for x in given)
        agree = torch.where(chosen > rejected, probability, 1 - probability)
        agree = torch.where(chosen == rejected, 0.5, agree)
        rewards = torch.cat([chosen, rejected]) if rewards is None else rewards.detach().double()
        self._add(
            losses,
            rewards,
            num_tokens,
            pairs=torch.ones_like(chosen).sum(),
            accuracy=agree.sum(),
            ties=(chosen == rejected).double().sum(),
            margin=(chosen - rejected).sum(),
        )
        self._add_by_source("loss", losses, sources)
        of_pairs = sources if sources_of_pairs is None else sources_of_pairs
        self._add_by_source("accuracy", agree, of_pairs)

    def _values(self, sums: dict[str, float]) -> dict[str, float]:
        pairs = sums["pairs"]
        if pairs == 0:  # rankings that are all ties
            return {}
        return {
            "accuracy": sums["accuracy"] / pairs,
            "tie_rate": sums["ties"] / pairs,
            "margin": sums["margin"] / pairs,
        }


class RatingMetrics(Metrics):
    """Of rated texts: errors of the scores that are there, correlation of reward and score."""

    names = (
        *("groups", "loss", "reward", "rewards", "tokens"),
        *("scores", "absolute", "squared"),
        *("whole", "x", "y", "xx", "yy", "xy"),
    )
    by_source = ("loss",)

    def add(
        self,
        losses: Tensor,
        predicted: Tensor,
        scores: Tensor,
        weights: Tensor,
        num_tokens: int,
        sources: Sequence[str] = (),
    ) -> None:
        """Count R rated texts of R sources: `losses` are [R], `predicted` and `scores` [R, A],
        `weights` [A].

        NaN is a score that nobody gave. The reward of a text is the weighted sum of what is
        predicted; it is correlated with that of the scores, over texts that have them all.
        """
        if losses.numel() == 0:
            return
        losses, predicted, scores, weights = (
            given.detach().double() for given in (losses, predicted, scores, weights)
        )
        given = ~scores.isnan()
        errors = torch.where(given, predicted - scores, 0.0)
        whole = given.all(1)
        rewards = predicted @ weights
        x = torch.where(whole, rewards, 0.0)
        y = torch.where(whole, scores @ weights, 0.0)
        self._add(
            losses,
            rewards,
            num_tokens,
            scores=given.sum().double(),
            absolute=errors.abs().sum(),
            squared=(errors**2).sum(),
            whole=whole.sum().double(),
            x=x.sum(),
            y=y.sum(),
            xx=(x * x).sum(),
            yy=(y * y).sum(),
            xy=(x * y).sum(),
        )
        self._add_by_source("loss", losses, sources)

    def _values(self, sums: dict[str, float]) -> dict[str, float]:
        values = {
            "mse": sums["squared"] / sums["scores"],
            "mae": sums["absolute"] / sums["scores"],
        }
        n, x, y = sums["whole"], sums["x"], sums["y"]
        spreads = n * sums["xx"] - x * x, n * sums["yy"] - y * y
        # Of what is constant but for rounding there is no correlation.
        if spreads[0] > 1e-12 * n * sums["xx"] and spreads[1] > 1e-12 * n * sums["yy"]:
            values["pearson"] = (n * sums["xy"] - x * y) / math.sqrt(spreads[0] * spreads[1])
        return values
