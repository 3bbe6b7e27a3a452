"""Pair-weighted metrics of training: sums on the device, one reduction over the ranks per log.

Names are TRL's. Values are those of the pairs since the last log, each pair counted once: TRL
averages batch means, calls a tie a loss, and reports means of minima.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SUMS = ("pairs", "loss", "accuracy", "ties", "margin", "reward", "tokens")


class PairMetrics:
    """Sums over pairs; `compute` turns those of all ranks into the values of a log record."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()

    def reset(self) -> None:
        self._sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=self.device)
        # Kept as [-min, max], so that one maximum over the ranks serves both.
        self._extremes = torch.full((2,), -torch.inf, dtype=torch.float64, device=self.device)
        self._not_finite = torch.zeros(1, dtype=torch.int64, device=self.device)

    def add(
        self,
        losses: Tensor,
        chosen: Tensor,
        rejected: Tensor,
        probability: Tensor,
        num_tokens: int,
    ) -> None:
        """Count P pairs: all but `num_tokens`, which counts both sides, are [P].

        Accuracy is the share of judges that agree, of whom `probability` prefer chosen.
        """
        if losses.numel() == 0:
            return
        given = (losses, chosen, rejected, probability)
        losses, chosen, rejected, probability = (x.detach().double() for x in given)
        ties = (chosen == rejected).double()
        agree = torch.where(chosen > rejected, probability, 1 - probability)
        rewards = torch.cat([chosen, rejected])
        self._sums += torch.stack(
            [
                torch.ones_like(losses).sum(),
                losses.sum(),
                torch.where(chosen == rejected, 0.5, agree).sum(),
                ties.sum(),
                (chosen - rejected).sum(),
                rewards.sum(),
                losses.new_tensor(num_tokens),
            ]
        )
        extremes = torch.stack([-rewards.min(), rewards.max()])
        self._extremes = torch.maximum(self._extremes, extremes)
        self._not_finite += (~torch.isfinite(losses)).sum()

    def num_not_finite(self) -> Tensor:
        """Pairs of this rank since `reset` whose loss is NaN or infinite, [1] int64."""
        return self._not_finite.clone()

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
        """Take up the sums that `gather_on_first_rank` returned."""
        self.reset()
        if rank == 0:
            sums, extremes = window
            self._sums = torch.tensor(sums, dtype=torch.float64, device=self.device)
            self._extremes = torch.tensor(extremes, dtype=torch.float64, device=self.device)

    def compute(self) -> dict[str, float]:
        """Values over the pairs of every rank since `reset`. A collective: every rank calls it."""
        totals, extremes = self._over_ranks()
        sums = dict(zip(_SUMS, totals.tolist(), strict=True))
        pairs = sums["pairs"]
        if pairs == 0:
            return {"num_pairs": 0.0, "num_tokens": 0.0}
        negated_min, maximum = extremes.tolist()
        return {
            "loss": sums["loss"] / pairs,
            "accuracy": sums["accuracy"] / pairs,
            "tie_rate": sums["ties"] / pairs,
            "margin": sums["margin"] / pairs,
            "min_reward": -negated_min,
            "mean_reward": sums["reward"] / (2 * pairs),
            "max_reward": maximum,
            "num_pairs": pairs,
            "num_tokens": sums["tokens"],
        }

    def _over_ranks(self) -> tuple[Tensor, Tensor]:
        """Sums and extremes of all ranks; those of this rank stay as they are."""
        sums, extremes = self._sums.clone(), self._extremes.clone()
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX)
        return sums, extremes
