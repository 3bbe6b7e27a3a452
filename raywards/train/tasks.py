"""Work as Ray tasks, results in order: what preparation spreads over a cluster.

Ray Data would keep no order, and its order-keeping mode waits for stragglers; here each task's
output has its place in a name, and only small summaries come back.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

_CANCEL_TIMEOUT_S = 30


def in_order(
    ray: Any,
    function: Callable[..., Any],
    shared: Any,
    work: Iterator[tuple[Any, ...]],
    *,
    at_once: int | None,
) -> Generator[Any, None, None]:
    """`function(shared, *one)` for each of `work`, as tasks of one CPU; results in its order.

    `work` is taken up as tasks end, so no more of it is in memory than runs: `at_once` tasks, or as
    many as the cluster has CPUs. A task of a lost node or process runs again. Tasks that still run
    when the iterator is closed are ended before that returns.
    """
    task = ray.remote(function).options(num_cpus=1, scheduling_strategy="SPREAD")
    with _ended(ray) as running:
        everywhere = ray.put(shared)
        results: dict[int, Any] = {}
        given = taken = 0
        while True:
            most = at_once or max(1, int(ray.cluster_resources().get("CPU", 1)))
            while len(running) < most and (one := next(work, None)) is not None:
                running[task.remote(everywhere, *one)] = given
                given += 1
            if not running:
                return
            [done], _ = ray.wait(list(running), num_returns=1)
            results[running.pop(done)] = ray.get(done)
            while taken in results:
                yield results.pop(taken)
                taken += 1


@contextmanager
def _ended(ray: Any) -> Iterator[dict[Any, int]]:
    """Running tasks by their place; those that are left are ended."""
    running: dict[Any, int] = {}
    try:
        yield running
    finally:
        for one in running:
            ray.cancel(one, force=True)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=_CANCEL_TIMEOUT_S)
