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


def replicas_for_tokens(
    context: AutoscalingContext, *, target_tokens: int
) -> tuple[float, dict[str, Any]]:
    """Replicas that have `target_tokens` each. Serve applies bounds and delays to it.

    While any request is under way there is one at least: tokens are counted by replicas, and from
    zero there is none to count them.
    """
    by_replica = (context.aggregated_metrics or {}).get(TOKENS, {})
    wanted = math.ceil(sum(by_replica.values()) / target_tokens)
    return max(wanted, 1 if context.total_num_requests > 0 else 0), {}
