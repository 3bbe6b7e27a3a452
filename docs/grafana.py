"""The Grafana dashboard of a served model, made from the metrics that a replica writes."""

from __future__ import annotations

import json
from typing import Any

from raywards.serve.metrics import Metric

_PER_ROW = 3
_WIDTH, _HEIGHT = 24 // _PER_ROW, 8
_QUANTILES = (0.5, 0.95, 0.99)
_CHOSEN = '{application=~"$application"}'


def dashboard() -> str:
    """The JSON to import. Each metric is in one panel at least; a test counts them."""
    panels = [
        panel("Requests a second",
              {"{{route}} {{code}}": per_s(Metric.requests_total, "route", "code")}),
        panel("Time of a request", quantiles(Metric.request_seconds), "s"),
        panel("Refused a second", {"{{reason}}": per_s(Metric.rejected_total, "reason"),
                                   "callers that left": per_s(Metric.cancelled_total)}),
        panel("Sequences a second", {"{{outcome}}": per_s(Metric.items_total, "outcome"),
                                     "cut": per_s(Metric.truncated_total)}),
        panel("Tokens a second", {"{{kind}}": per_s(Metric.tokens_total, "kind")}),
        panel("Waiting", {"tokens": f"sum({name(Metric.queue_tokens)}{_CHOSEN})",
                          "sequences": f"sum({name(Metric.queue_items)}{_CHOSEN})"}),
        panel("Wait for the first forward", quantiles(Metric.queue_seconds), "s"),
        panel("Tokenising", quantiles(Metric.tokenize_seconds), "s"),
        panel("One forward", quantiles(Metric.forward_seconds), "s"),
        panel("Sequences of a forward", quantiles(Metric.batch_items)),
        panel("Tokens of a forward", quantiles(Metric.batch_tokens)),
        panel("Tokens with padding, to those without", quantiles(Metric.padding_ratio)),
        panel("Rewards, by the edge that they do not exceed",
              {"{{edge}}": per_s(Metric.rewards_total, "edge")}),
        panel("Mean and deviation of the last rewards",
              {"mean": f"avg({name(Metric.reward_mean)}{_CHOSEN})",
               "deviation": f"avg({name(Metric.reward_std)}{_CHOSEN})"}),
        panel("Rewards that are no finite number, a second",
              {"sequences": per_s(Metric.nonfinite_total)}),
        panel("The canary's requests a second",
              {"{{outcome}}": per_s(Metric.canary_total, "outcome")}),
        panel("Replicas by what they serve",
              {"{{model}} {{revision}} {{dtype}}":
               f"sum by (model, revision, dtype) ({name(Metric.model_info)}{_CHOSEN})"}),
    ]  # fmt: skip
    for number, one in enumerate(panels):
        row, column = divmod(number, _PER_ROW)
        place = {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT}
        one.update(id=number + 1, gridPos=place)
    application = {
        "name": "application",
        "type": "query",
        "query": f"label_values({name(Metric.model_info)}, application)",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "includeAll": True,
        "multi": True,
        "refresh": 2,
    }
    source = {"name": "datasource", "type": "datasource", "query": "prometheus"}
    made = {
        "title": "raywards: served reward models",
        "uid": "raywards-serve",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [source, application]},
        "panels": panels,
    }
    return json.dumps(made, indent=2) + "\n"


def name(metric: Metric) -> str:
    """As Ray's exporter calls it."""
    return f"ray_raywards_{metric.name}"


def per_s(metric: Metric, *labels: str) -> str:
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({name(metric)}{_CHOSEN}[1m]))"


def quantiles(metric: Metric) -> dict[str, str]:
    rates = f"sum by (le) (rate({name(metric)}_bucket{_CHOSEN}[1m]))"
    return {f"p{share * 100:g}": f"histogram_quantile({share}, {rates})" for share in _QUANTILES}


def panel(title: str, lines: dict[str, str], unit: str = "short") -> dict[str, Any]:
    """A graph of one line for each legend, or more where the legend has labels in it."""
    return {
        "title": title,
        "type": "timeseries",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "fieldConfig": {"defaults": {"unit": unit, "min": None}, "overrides": []},
        "targets": [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend}
            for number, (legend, expression) in enumerate(lines.items())
        ],
    }
