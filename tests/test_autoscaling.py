"""How many replicas a load asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from raywards.serve.autoscaling import TOKENS, ReplicasForTokens


def load(by_replica: dict[str, float], *, running: float, queued: float = 0.0) -> Any:
    """What Serve tells a policy."""
    metrics = {TOKENS: by_replica} if by_replica else None
    return SimpleNamespace(
        aggregated_metrics=metrics,
        total_num_requests=running + queued,
        total_queued_requests=queued,
    )


@pytest.mark.parametrize(
    ("context", "replicas"),
    [
        (load({}, running=0), 0),
        (load({}, running=1), 1),
        (load({"a": 0.0}, running=0), 0),
        (load({"a": 10.0}, running=1), 1),
        (load({"a": 1000.0}, running=9), 1),
        (load({"a": 1001.0}, running=9), 2),
        (load({"a": 1500.0, "b": 1400.0}, running=9), 3),
        # The proxy holds nine times as many back as are on replicas, which are at their limit.
        (load({"a": 500.0}, running=100, queued=900), 5),
        (load({}, running=0, queued=3), 1),
    ],
)
def test_replicas_are_as_many_as_the_tokens_ask_for(context: Any, replicas: int) -> None:
    assert ReplicasForTokens(target_tokens=1000)(context) == (replicas, {})
