"""The last rewards of a replica: their mean, their spread and a histogram."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Any

_KEPT = 1000
_BINS = 24


class Recent:
    """The last rewards that were answered."""

    def __init__(self) -> None:
        self._rewards: deque[float] = deque(maxlen=_KEPT)

    def add(self, reward: float) -> None:
        """One more."""
        self._rewards.append(reward)

    def describe(self) -> dict[str, Any]:
        """`count`, and where there are any: `mean`, `std`, and `counts` in bins of equal width
        from `low` to `high`."""
        rewards = list(self._rewards)
        if not rewards:
            return {"count": 0}
        low, high = min(rewards), max(rewards)
        counts = [0] * _BINS
        for reward in rewards:
            place = int(_BINS * (reward - low) / (high - low)) if high > low else _BINS // 2
            counts[min(place, _BINS - 1)] += 1
        return {
            "count": len(rewards),
            "mean": statistics.fmean(rewards),
            "std": statistics.pstdev(rewards),
            "low": low,
            "high": high,
            "counts": counts,
        }
