"""The batcher under random arrivals, cancellations, deadlines and faults.

`RAYWARDS_FUZZ_S=600 pytest -m slow tests/test_batcher_fuzz.py -s` runs for ten minutes;
`RAYWARDS_FUZZ_SEED` is where the seeds begin.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator

import pytest
from batcher_scenarios import play_many

LENGTH_S = float(os.environ.get("RAYWARDS_FUZZ_S", "120"))
FIRST_SEED = int(os.environ.get("RAYWARDS_FUZZ_SEED", "0"))
# What must have happened, or the scenarios test nothing.
USUAL = (
    "scored",
    "cancelled",
    "too late",
    "failed: scoring_failed",
    "failed: non_finite_reward",
    "failed: too_many_tokens",
    "refused at the door: OverloadedError",
    "refused at the door: RequestRefusedError",
    "out of memory",
    "flaky forwards",
    "wrong count",
    "overdue",
)


def seeds_for(seconds: float, first: int) -> Iterator[int]:
    """Consecutive seeds until the time is over."""
    end = time.monotonic() + seconds
    return itertools.takewhile(lambda _: time.monotonic() < end, itertools.count(first))


def test_every_request_of_400_scenarios_gets_what_it_deserves() -> None:
    counts = play_many(iter(range(400)))
    assert counts["scenarios"] == 400
    for event in USUAL:
        assert counts[event] > 3, f"{event}: {counts[event]} times"


def test_the_same_holds_with_the_real_clock_and_the_real_thread() -> None:
    counts = play_many(iter(range(20)), real=True)
    assert counts["scored"] > 20


@pytest.mark.slow
def test_every_request_of_as_many_scenarios_as_the_time_allows_gets_what_it_deserves() -> None:
    virtual = play_many(seeds_for(LENGTH_S * 0.8, FIRST_SEED + 10_000))
    real = play_many(seeds_for(LENGTH_S * 0.2, FIRST_SEED + 10_000), real=True)
    for name, counts in (("virtual time", virtual), ("real threads", real)):
        print(f"\n{name}: " + ", ".join(f"{what} {n}" for what, n in sorted(counts.items())))
    assert virtual["scenarios"] > LENGTH_S
    assert all(virtual[event] for event in USUAL)
