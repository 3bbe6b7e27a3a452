"""Held-out pairs to figures: how often a reward model is right, how sure it may be, what fools it.

Pairs are kept one by one, because calibration and quantiles need them all: some 60 bytes each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

_BINS = 10
_COLUMNS = ("loss", "chosen", "rejected", "probability", "chosen_tokens", "rejected_tokens")

Floats = NDArray[numpy.float64]


class HeldOut:
    """Rewards of held-out pairs on this rank; `compute` turns those of all ranks into figures."""

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
        parts: list[Any] = [(self._rows, self._sources)]
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            mine, parts = parts[0], [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, mine)
        rows = [row for part, _ in parts for row in part]
        if not rows:
            return {"num_pairs": 0.0, "num_tokens": 0.0}
        table = dict(zip(_COLUMNS, numpy.vstack(rows).T, strict=True))
        return figures(table, [source for _, part in parts for source in part])


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
