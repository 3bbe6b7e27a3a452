"""How many replicas: as many as the tokens that wait and are computed are batches for.

Requests say little of the work: one may hold a thousand conversations, or ten tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

TOKENS = "raywards_tokens"
"""Of the figures that a replica reports: tokens that wait or are being computed."""


class ReplicasForTokens:
    """A policy of Serve's: replicas that have `target_tokens` each.

    Serve applies bounds and delays to what it says.
    """

    def __init__(self, target_tokens: int) -> None:
        self._target_tokens = target_tokens

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """While any request is under way there is one replica at least: tokens are counted by
        replicas, and from zero there is none to count them."""
        by_replica = (context.aggregated_metrics or {}).get(TOKENS, {})
        tokens = sum(by_replica.values())
        # Those that the proxy holds back are on no replica; they will be like those that are.
        running = context.total_num_requests - context.total_queued_requests
        if running > 0:
            tokens *= context.total_num_requests / running
        wanted = math.ceil(tokens / self._target_tokens)
        return max(wanted, 1 if context.total_num_requests > 0 else 0), {}
