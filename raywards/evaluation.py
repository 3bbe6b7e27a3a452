"""Held-out pairs to figures: how often a reward model is right, how sure it may be, what fools it.

Pairs are kept one by one, because calibration and quantiles need them all: some 60 bytes each. So
are rankings, as the pairs in them, and rated texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

_BINS = 10
_COLUMNS = ("loss", "chosen", "rejected", "probability", "chosen_tokens", "rejected_tokens")

Floats = NDArray[numpy.float64]
T = TypeVar("T")

_REWARDS: dict[str, bool | None] = dict.fromkeys(
    ("min_reward", "mean_reward", "max_reward", "sd_reward")
)
_OF_PAIRS: dict[str, bool | None] = {
    "loss": False,
    "log_loss": False,
    "accuracy": True,
    "calibration_error": False,
    "tie_rate": False,
    "margin": True,
    "margin_p05": True,
    "margin_p50": True,
    "margin_p95": True,
    **_REWARDS,
    "length_bias": None,
}
_OF_SCORES = {"mse": False, "mae": False, "pearson": True}


class HeldOut:
    """Rewards of held-out pairs on this rank; `compute` turns those of all ranks into figures."""

    choosable = _OF_PAIRS
    """Figures that a model may be chosen by, and whether more is better; None where it depends."""
    by_source = "accuracy"
    """The one of them that is also given by source, where a set has several."""

    def __init__(self) -> None:
        self._rows: list[Floats] = []
        self._sources: list[str] = []

    def add(
        self,
        losses: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        probability: Tensor,
        lengths: Sequence[tuple[int, int]],
        sources: Sequence[str],
    ) -> None:
        """Count P pairs: tensors are [P]; `lengths` are tokens of chosen and rejected."""
        given = torch.stack([losses, chosen, rejected, probability], 1).detach().double().cpu()
        self._rows.append(numpy.hstack([given.numpy(), numpy.reshape(lengths, (-1, 2))]))
        self._sources += sources

    def compute(self) -> dict[str, float]:
        """Figures over the pairs of every rank. A collective: every rank calls it."""
        parts = _of_all_ranks((self._rows, self._sources))
        rows = [row for part, _ in parts for row in part]
        if not rows:
            return {"num_pairs": 0.0, "num_tokens": 0.0}
        table = dict(zip(_COLUMNS, numpy.vstack(rows).T, strict=True))
        return figures(table, [source for _, part in parts for source in part])


class HeldOutRankings:
    """The same of rankings: figures over the pairs of different rank in them, each weighing alike.

    Loss and rewards are those of the rankings and their responses, each counted once.
    """

    choosable = HeldOut.choosable
    by_source = HeldOut.by_source

    def __init__(self) -> None:
        self._pairs = HeldOut()
        self._groups: list[Floats] = []
        self._sequences: list[Floats] = []

    def add(
        self,
        losses: Tensor,
        rewards: Tensor,
        lengths: Sequence[int],
        chosen: Sequence[int],
        rejected: Sequence[int],
        probability: Sequence[float],
        sources: Sequence[str],
    ) -> None:
        """Count G rankings of S responses in all, and the P pairs in them.

        `losses` are [G], `rewards` and `lengths` (tokens) [S]; `chosen` and `rejected` are places
        among the S responses, and they, `probability` and `sources` are [P].
        """
        self._groups.append(_floats(losses))
        self._sequences.append(numpy.stack([_floats(rewards), numpy.asarray(lengths, float)], 1))
        if chosen:
            better, worse = rewards[list(chosen)], rewards[list(rejected)]
            tokens = [(lengths[i], lengths[j]) for i, j in zip(chosen, rejected, strict=True)]
            sure = torch.tensor(probability, device=rewards.device)
            unused = torch.zeros_like(better)  # a pair in a ranking has no loss of its own
            self._pairs.add(unused, better, worse, sure, tokens, sources)

    def compute(self) -> dict[str, float]:
        """Figures over the rankings of every rank. A collective: every rank calls it."""
        found = self._pairs.compute()
        parts = _of_all_ranks((self._groups, self._sequences))
        groups = [losses for part, _ in parts for losses in part]
        if not groups:
            return {"num_pairs": 0.0, "num_tokens": 0.0}
        losses = numpy.concatenate(groups)
        rewards, tokens = numpy.vstack([some for _, part in parts for some in part]).T
        return {
            **found,
            "loss": float(losses.mean()),
            **_extremes(rewards),
            "num_comparisons": found["num_pairs"],
            "num_pairs": float(len(losses)),
            "num_tokens": float(tokens.sum()),
        }


class HeldOutRatings:
    """Rated texts that are held out, with A attributes; `compute` gives errors and correlations."""

    by_source = "loss"

    def __init__(self, attributes: Sequence[str], weights: Sequence[float]) -> None:
        self.choosable: dict[str, bool | None] = {"loss": False, **_OF_SCORES, **_REWARDS}
        if len(attributes) > 1:
            self.choosable |= {
                f"{figure}/{name}": greater
                for name in attributes
                for figure, greater in _OF_SCORES.items()
            }
        self._attributes = attributes
        self._weights = numpy.asarray(weights, dtype=float)
        self._rows: list[Floats] = []
        self._sources: list[str] = []

    def add(
        self,
        losses: Tensor,
        predicted: Tensor,
        scores: Tensor,
        lengths: Sequence[int],
        sources: Sequence[str],
    ) -> None:
        """Count R rated texts: `predicted` and `scores` are [R, A], NaN where nobody gave one."""
        columns = (_floats(losses)[:, None], numpy.reshape(lengths, (-1, 1)))
        self._rows.append(numpy.hstack([*columns, _floats(predicted), _floats(scores)]))
        self._sources += sources

    def compute(self) -> dict[str, float]:
        """Figures over the texts of every rank. A collective: every rank calls it."""
        parts = _of_all_ranks((self._rows, self._sources))
        rows = [row for part, _ in parts for row in part]
        if not rows:
            return {"num_pairs": 0.0, "num_tokens": 0.0}
        table = numpy.vstack(rows)
        (losses, tokens), (predicted, scores) = table[:, :2].T, numpy.hsplit(table[:, 2:], 2)
        rewards = predicted @ self._weights
        whole = ~numpy.isnan(scores).any(1)
        target = scores @ self._weights
        found = {
            "loss": losses.mean(),
            **_errors(predicted, scores),
            **_correlation(rewards[whole], target[whole]),
            **_extremes(rewards),
            "num_pairs": len(table),
            "num_tokens": tokens.sum(),
        }
        if len(self._attributes) > 1:
            for name, ours, theirs in zip(self._attributes, predicted.T, scores.T, strict=True):
                given = ~numpy.isnan(theirs)
                figures = _errors(ours, theirs) | _correlation(ours[given], theirs[given])
                found |= {f"{figure}/{name}": value for figure, value in figures.items()}
        sources = [source for _, part in parts for source in part]
        if len(set(sources)) > 1:
            names = numpy.asarray(sources)
            found |= {f"loss/{name}": losses[names == name].mean() for name in sorted({*sources})}
        return {name: float(value) for name, value in found.items()}


def figures(table: dict[str, Floats], sources: Sequence[str]) -> dict[str, float]:
    """All figures; each column of the table is [P], and so are the sources."""
    difference = table["chosen"] - table["rejected"]
    probability = table["probability"]
    agreement = agree(difference, probability)
    rewards = numpy.concatenate([table["chosen"], table["rejected"]])
    low, middle, high = numpy.quantile(difference, [0.05, 0.5, 0.95])
    found = {
        "loss": table["loss"].mean(),
        "log_loss": log_loss(difference, probability),
        "accuracy": agreement.mean(),
        "calibration_error": calibration_error(difference, probability),
        "tie_rate": (difference == 0).mean(),
        "margin": difference.mean(),
        "margin_p05": low,
        "margin_p50": middle,
        "margin_p95": high,
        "min_reward": rewards.min(),
        "mean_reward": rewards.mean(),
        "max_reward": rewards.max(),
        "sd_reward": rewards.std(),
        "num_pairs": len(difference),
        "num_tokens": table["chosen_tokens"].sum() + table["rejected_tokens"].sum(),
    }
    bias = length_bias(difference, probability, table["chosen_tokens"] - table["rejected_tokens"])
    if bias is not None:
        found["length_bias"] = bias
    names = numpy.asarray(sources)
    if len(set(sources)) > 1:
        found |= {
            f"accuracy/{name}": agreement[names == name].mean() for name in sorted({*sources})
        }
    return {name: float(value) for name, value in found.items()}


def agree(difference: Floats, probability: Floats) -> Floats:
    """Share of the judges [P] that agree with the sign of `difference`; a tie agrees with half."""
    sided = numpy.where(difference > 0, probability, 1 - probability)
    # NaN is neither above nor equal: it must not count as a preference for the other.
    sided = numpy.where(numpy.isnan(difference), numpy.nan, sided)
    return numpy.where(difference == 0, 0.5, sided)


def log_loss(difference: Floats, probability: Floats) -> float:
    """Mean cross entropy of `sigmoid(difference)` with `probability`: no margin, no smoothing."""
    with numpy.errstate(invalid="ignore"):  # of NaN
        losses = numpy.logaddexp(0, -difference) + (1 - probability) * difference
    return float(losses.mean())


def calibration_error(difference: Floats, probability: Floats) -> float:
    """How far the model's probabilities are from the share that agrees, on average.

    The expected calibration error of Guo et al. (arXiv 1706.04599), over ten bins of equal width of
    `sigmoid(|difference|)`, from a half to 1: 0.1 says that where the model is 80 % sure, 70 or 90
    % agree.
    """
    sure = 1 / (1 + numpy.exp(-numpy.abs(difference)))
    if numpy.isnan(sure).any():
        return float("nan")
    bins = numpy.minimum(((sure - 0.5) * 2 * _BINS).astype(int), _BINS - 1)
    excess = numpy.bincount(bins, weights=agree(difference, probability) - sure, minlength=_BINS)
    return float(numpy.abs(excess).sum() / len(difference))


def length_bias(difference: Floats, probability: Floats, longer_by: Floats) -> float | None:
    """How much more often the model prefers the longer side than the judges do.

    Over pairs whose sides differ in tokens, chosen being longer by `longer_by`; None without any. 0
    follows the data, above 0 likes length better than people do.
    """
    unequal = longer_by != 0
    if not unequal.any():
        return None
    longer = numpy.sign(longer_by[unequal])
    model = agree(longer * difference[unequal], numpy.ones(int(unequal.sum())))
    judges = numpy.where(longer > 0, probability[unequal], 1 - probability[unequal])
    return float(model.mean() - judges.mean())


def _errors(predicted: Floats, scores: Floats) -> dict[str, float]:
    """Mean squared and mean absolute error of the scores that are there; nothing without any."""
    errors = (predicted - scores)[~numpy.isnan(scores)]
    if not errors.size:
        return {}
    return {"mse": float((errors**2).mean()), "mae": float(numpy.abs(errors).mean())}


def _correlation(rewards: Floats, scores: Floats) -> dict[str, float]:
    """Pearson's; nothing where one of the two is constant, or there are none."""
    if not rewards.size:
        return {}
    ours, theirs = rewards - rewards.mean(), scores - scores.mean()
    norms = numpy.linalg.norm(ours), numpy.linalg.norm(theirs)
    sizes = numpy.linalg.norm(rewards), numpy.linalg.norm(scores)
    # What is constant but for rounding is constant.
    if norms[0] <= 1e-6 * sizes[0] or norms[1] <= 1e-6 * sizes[1]:
        return {}
    return {"pearson": float(ours @ theirs / norms[0] / norms[1])}


def _extremes(rewards: Floats) -> dict[str, float]:
    return {
        "min_reward": float(rewards.min()),
        "mean_reward": float(rewards.mean()),
        "max_reward": float(rewards.max()),
        "sd_reward": float(rewards.std()),
    }


def _floats(values: Tensor) -> Floats:
    found: Floats = values.detach().double().cpu().numpy()
    return found


def _of_all_ranks(mine: T) -> list[T]:
    """What every rank has, in the order of the ranks. A collective."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [mine]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts
