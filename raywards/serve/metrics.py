"""What a replica counts and times, under the names that Prometheus gets.

`ray.serve.metrics` writes them: Ray's exporters put `ray_` in front of a name, and the application,
the deployment and the replica beside its labels. Without Ray nobody reads them, and they go
nowhere. `docs/grafana.json` shows them.
"""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
_TOKENS = (64.0, 256.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0)
_RATIOS = (1.0, 1.05, 1.1, 1.25, 1.5, 2.0, 4.0)
_REWARDS = (-20.0, -10.0, -5.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0)
_REWARD_LABELS = [*(f"{edge:g}" for edge in _REWARDS), "+Inf"]


@dataclass(frozen=True)
class Kind:
    """One metric: how it is written, what it says, its labels and the edges of a histogram."""

    type: str
    text: str
    labels: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()


class Metric(Enum):
    """Every metric. A value's name is that of the metric, after `raywards_`."""

    requests_total = Kind("Counter", "Requests by path and status.", ("route", "code"))
    items_total = Kind("Counter", "Sequences: scored, or refused or failed alone.", ("outcome",))
    tokens_total = Kind(
        "Counter",
        "Tokens of scored sequences (real), of these not computed since a batch-mate shares "
        "them (cached), and computed as padding (padded).",
        ("kind",),
    )
    rejected_total = Kind("Counter", "Requests that were answered with an error.", ("reason",))
    cancelled_total = Kind("Counter", "Requests whose caller left before the answer.")
    truncated_total = Kind("Counter", "Sequences that were cut, as their requests asked.")
    nonfinite_total = Kind("Counter", "Sequences whose reward was no finite number.")
    canary_total = Kind("Counter", "Requests for the canary: answered there, or here after all.",
                        ("outcome",))  # fmt: skip
    request_seconds = Kind("Histogram", "A request, from its headers to its reply.", ("route",),
                           _SECONDS)  # fmt: skip
    queue_seconds = Kind("Histogram", "A request's wait for its first forward.", (), _SECONDS)
    tokenize_seconds = Kind("Histogram", "A request's tokenising, with its wait.", (), _SECONDS)
    forward_seconds = Kind("Histogram", "One forward.", (), _SECONDS)
    batch_items = Kind("Histogram", "Sequences of one forward.", (), _COUNTS)
    batch_tokens = Kind("Histogram", "Tokens of one forward's sequences.", (), _TOKENS)
    padding_ratio = Kind("Histogram", "Tokens of one forward with padding, to those without.", (),
                         _RATIOS)  # fmt: skip
    # Ray's histograms take no negative edges.
    rewards_total = Kind("Counter", "Rewards, by the edge that they do not exceed.", ("edge",))
    reward_mean = Kind("Gauge", "Mean of the last rewards: it drifts where the prompts do.")
    reward_std = Kind("Gauge", "Standard deviation of the last rewards.")
    queue_items = Kind("Gauge", "Sequences that wait.")
    queue_tokens = Kind("Gauge", "Tokens that wait.")
    model_info = Kind("Gauge", "Always 1: what is served stands in its labels.",
                      ("revision", "dtype"))  # fmt: skip


Write = Callable[[float, Mapping[str, str]], None]
"""Adds to a counter, sets a gauge, or enters into a histogram, with labels."""
Make = Callable[[str, Kind], Write]


def _nowhere(name: str, kind: Kind) -> Write:
    return lambda value, labels: None


class Metrics:
    """The metrics of one model. `make` is called once for each.

    Belongs to one thread. Writing takes some microseconds, so what is counted is added up here, and
    written by `flush`.
    """

    def __init__(self, model: str, make: Make = _nowhere) -> None:
        self._model = {"model": model}
        self._write = {metric: make(f"raywards_{metric.name}", metric.value) for metric in Metric}
        self._counted: dict[tuple[Metric, frozenset[tuple[str, str]]], float] = {}

    def of(self, model: str) -> Metrics:
        """The same metrics, of another model of this replica."""
        other = copy.copy(self)
        other._model = {"model": model}
        other._counted = {}
        return other

    def put(self, metric: Metric, value: float = 1.0, **labels: str) -> None:
        """Add `value` to a counter, set a gauge to it, or enter it into a histogram."""
        if metric.value.type != "Counter":
            self._write[metric](value, {**self._model, **labels})
        elif value:
            key = (metric, frozenset(labels.items()))
            self._counted[key] = self._counted.get(key, 0.0) + value

    def put_reward(self, reward: float) -> None:
        """Count a reward where it belongs."""
        self.put(Metric.rewards_total, edge=_REWARD_LABELS[bisect_left(_REWARDS, reward)])

    def flush(self) -> None:
        """Write what has been counted since the last time."""
        counted, self._counted = self._counted, {}
        for (metric, labels), value in counted.items():
            self._write[metric](value, {**self._model, **dict(labels)})


def make_for_ray(name: str, kind: Kind) -> Write:
    """In a replica: metrics that Ray exports."""
    from ray.serve import metrics

    options: dict[str, Any] = {
        "description": kind.text,
        "tag_keys": ("model", *kind.labels),
    }
    if kind.type == "Counter":
        counter = metrics.Counter(name, **options)
        return lambda value, labels: counter.inc(value, dict(labels))
    elif kind.type == "Gauge":
        gauge = metrics.Gauge(name, **options)
        return lambda value, labels: gauge.set(value, dict(labels))
    histogram = metrics.Histogram(name, boundaries=list(kind.boundaries), **options)
    return lambda value, labels: histogram.observe(value, dict(labels))
