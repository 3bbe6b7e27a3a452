"""What rewards are trained to be: the loss of each group, and what its figures are made of.

    rewards + what the rows say ─judge─► Judged ─► metrics while it trains, figures held out

An objective knows no model: it is handed the outputs for the sequences of some groups, end to end.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from raywards import loss
from raywards.config import RewardConfig, attribute_weights
from raywards.evaluation import HeldOut, HeldOutRankings, HeldOutRatings
from raywards.metrics import Metrics, PairMetrics, RatingMetrics

Columns: TypeAlias = dict[str, list[Any]]
"""Groups of a prepared table, column by column."""


@dataclass(frozen=True)
class Judged:
    """G groups of a row and what the model makes of them."""

    losses: Tensor
    """[G]."""
    groups: Columns
    counted: tuple[Any, ...]
    """What `add` of the objective's metrics takes."""
    held_out: tuple[Any, ...]
    """What `add` of its held-out figures takes."""


class Objective(Protocol):
    """Loss and figures of one kind of run."""

    nothing: Columns
    """A made-up group, for a rank that has no row where its peers have one."""

    def judge(self, outputs: Tensor, groups: Columns) -> Judged:
        """Loss of each group, from the outputs [S] or [S, A] for their sequences, end to end."""
        ...

    def metrics(self, device: torch.device, sources: Sequence[str] = ()) -> Metrics:
        """Metrics of training on groups of these sources."""
        ...

    def held_out(self) -> Any: ...


def build_objective(config: RewardConfig) -> Objective:
    """The objective that the settings name."""
    if config.objective == "bradley_terry":
        return _Pairs(config)
    return _Ratings(config) if config.objective == "regression" else _Rankings(config)


_NO_PAIR: Columns = {"sequences": [[[0], [0]]], "margin": [None], "probability": [None]}


class _Pairs:
    """`bradley_terry`."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self.nothing = _NO_PAIR

    def judge(self, outputs: Tensor, groups: Columns) -> Judged:
        chosen, rejected = outputs.view(-1, 2).unbind(1)
        losses, probability = _losses_of_pairs(chosen, rejected, groups, self._config)
        lengths = [(len(one), len(other)) for one, other in groups["sequences"]]
        values = (losses, chosen, rejected, probability)
        return Judged(
            losses,
            groups,
            counted=(*values, sum(map(sum, lengths)), groups.get("source", ())),
            held_out=(*values, lengths, groups.get("source")),
        )

    def metrics(self, device: torch.device, sources: Sequence[str] = ()) -> Metrics:
        return PairMetrics(device, sources)

    def held_out(self) -> HeldOut:
        return HeldOut()


class _Rankings:
    """`plackett_luce` and `all_pairs`. Pairs may be among the rankings, and are judged as such."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self.nothing = _NO_PAIR | {"ranks": [None]}

    def judge(self, outputs: Tensor, groups: Columns) -> Judged:
        sizes = [len(sequences) for sequences in groups["sequences"]]
        starts = [0, *itertools.accumulate(sizes)][:-1]
        alike: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for index, ranks in enumerate(groups["ranks"]):
            alike[sizes[index], ranks is None].append(index)
        parts, order = [], []
        for (size, are_pairs), members in alike.items():
            some = {name: [values[i] for i in members] for name, values in groups.items()}
            places = [list(range(starts[i], starts[i] + size)) for i in members]
            rewards = outputs[torch.tensor(places, device=outputs.device)]
            if are_pairs:
                chosen, rejected = rewards.unbind(1)
                parts.append(_losses_of_pairs(chosen, rejected, some, self._config)[0])
            else:
                parts.append(self._losses(rewards, some["ranks"]))
            order += members
        losses = torch.cat(parts)[torch.tensor(order, device=outputs.device).argsort()]
        lengths = [len(ids) for sequences in groups["sequences"] for ids in sequences]
        seen = _comparisons(groups, starts)
        better, worse = (
            outputs[torch.tensor(side, dtype=torch.int64, device=outputs.device)]
            for side in (seen.better, seen.worse)
        )
        probability = torch.tensor(seen.probability, device=outputs.device)
        named = zip(groups.get("source", ()), seen.counts, strict=False)
        sources = [source for source, count in named for _ in range(count)]
        return Judged(
            losses,
            groups,
            counted=(
                *(losses, better, worse, probability, sum(lengths)),
                *(groups.get("source", ()), outputs, sources),
            ),
            held_out=(losses, outputs, lengths, seen.better, seen.worse, seen.probability, sources),
        )

    def _losses(self, rewards: Tensor, ranks: list[list[float]]) -> Tensor:
        """Of rankings of one size: rewards are [G, N]."""
        config = self._config
        given = torch.tensor(ranks, device=rewards.device)
        if config.objective == "plackett_luce":
            losses = loss.plackett_luce(rewards, given)
        else:
            losses = loss.all_pairs(rewards, given, config.label_smoothing)
        if config.center_rewards_coefficient is not None:
            penalty = loss.centering_of_rankings(rewards)
            losses = losses + config.center_rewards_coefficient * penalty
        return losses

    def metrics(self, device: torch.device, sources: Sequence[str] = ()) -> Metrics:
        return PairMetrics(device, sources)

    def held_out(self) -> HeldOutRankings:
        return HeldOutRankings()


class _Ratings:
    """`regression`, on one score or on several attributes."""

    def __init__(self, config: RewardConfig) -> None:
        self._attributes = attribute_weights(config) or {"score": 1.0}
        self.nothing: Columns = {"sequences": [[[0]]], "scores": [[0.0] * len(self._attributes)]}

    def judge(self, outputs: Tensor, groups: Columns) -> Judged:
        predicted = outputs.view(-1, len(self._attributes))
        filled = [[float("nan") if s is None else s for s in row] for row in groups["scores"]]
        scores = torch.tensor(filled, dtype=torch.float32, device=outputs.device)
        losses = loss.squared_error(predicted, scores)
        lengths = [len(ids) for [ids] in groups["sequences"]]
        weights = torch.tensor(list(self._attributes.values()), device=outputs.device)
        return Judged(
            losses,
            groups,
            counted=(losses, predicted, scores, weights, sum(lengths), groups.get("source", ())),
            held_out=(losses, predicted, scores, lengths, groups.get("source")),
        )

    def metrics(self, device: torch.device, sources: Sequence[str] = ()) -> Metrics:
        return RatingMetrics(device, sources)

    def held_out(self) -> HeldOutRatings:
        return HeldOutRatings(list(self._attributes), list(self._attributes.values()))


def _losses_of_pairs(
    chosen: Tensor, rejected: Tensor, groups: Columns, config: RewardConfig
) -> tuple[Tensor, Tensor]:
    """Loss of each pair, and the probability that its row gives; all are [P]."""
    # Sources with and without them may be mixed.
    margin = _or_else(groups["margin"], 0.0, chosen.device)
    probability = _or_else(groups["probability"], 1.0, chosen.device)
    believed = loss.smoothed(probability, config.label_smoothing)
    losses = loss.bradley_terry(chosen, rejected, margin, believed)
    if config.center_rewards_coefficient is not None:
        losses = losses + config.center_rewards_coefficient * loss.centering(chosen, rejected)
    return losses, probability


class _Comparisons(NamedTuple):
    """The P pairs of different rank in some groups: places among the sequences of all of them."""

    better: list[int]
    worse: list[int]
    probability: list[float]
    counts: list[int]
    """Of each group [G]."""


def _comparisons(groups: Columns, starts: Sequence[int]) -> _Comparisons:
    found = _Comparisons([], [], [], [])
    for given, probability, start in zip(
        groups["ranks"], groups["probability"], starts, strict=True
    ):
        ranks, before = given or (1, 2), len(found.better)
        for i, j in itertools.permutations(range(len(ranks)), 2):
            if ranks[i] < ranks[j]:
                found.better.append(start + i)
                found.worse.append(start + j)
                found.probability.append(1.0 if probability is None else probability)
        found.counts.append(len(found.better) - before)
    return found


def _or_else(values: list[float | None], otherwise: float, device: torch.device) -> Tensor:
    filled = [otherwise if value is None else value for value in values]
    return torch.tensor(filled, dtype=torch.float32, device=device)
