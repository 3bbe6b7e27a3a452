"""What a replica counts, times, logs and traces: everything has happened, and nothing is said."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from served import Served, served
from tiny import tiny_qwen2

from raywards.serve import replica
from raywards.serve.metrics import Kind, Metric, Metrics, Write

SECRET = "PRIVATE_TEXT"
TALK = [{"role": "user", "content": SECRET}, {"role": "assistant", "content": "Yes, of course."}]
LONGER = [TALK[0], {"role": "assistant", "content": "No, that I will not tell you."}]


class Written:
    """What would be exported."""

    def __init__(self) -> None:
        self.values: dict[str, list[tuple[float, dict[str, str]]]] = defaultdict(list)
        self.kinds: dict[str, Kind] = {}
        self.metrics = Metrics("rm", self.make)

    def make(self, name: str, kind: Kind) -> Write:
        self.kinds[name] = kind

        def write(value: float, labels: Mapping[str, str]) -> None:
            assert set(labels) == {"model", *kind.labels}, (name, labels)
            self.values[name].append((float(value), dict(labels)))

        return write

    def total(self, metric: Metric, **labels: str) -> float:
        self.metrics.flush()
        rows = self.values[f"raywards_{metric.name}"]
        return sum(value for value, given in rows if labels.items() <= given.items())

    def count(self, metric: Metric) -> int:
        return len(self.values[f"raywards_{metric.name}"])


@pytest.fixture(scope="module")
def rm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tiny_qwen2(tmp_path_factory.mktemp("metrics") / "rm"), max_length=64) as running:
        yield running


@pytest.fixture
def written(rm: Served) -> Iterator[Written]:
    found, before = Written(), rm.service.metrics
    rm.service.metrics = found.metrics
    yield found
    rm.service.metrics = before


def test_a_request_is_counted_by_its_route_items_and_tokens(rm: Served, written: Written) -> None:
    reply = rm.post("/v1/reward", {"messages": [TALK, LONGER, TALK]})
    rm.post("/classify", {"messages": TALK})
    tokens = [row["num_tokens"] for row in reply["data"]]
    assert written.total(Metric.requests_total, route="/v1/reward", code="200") == 1
    assert written.total(Metric.requests_total, route="/classify", code="200") == 1
    assert written.total(Metric.items_total, outcome="scored") == 4
    # Equal sequences are computed once, and a prefix that two share.
    assert written.total(Metric.tokens_total, kind="real") == tokens[0] * 2 + tokens[1]
    assert 0 < written.total(Metric.tokens_total, kind="cached") < tokens[0]
    assert written.total(Metric.tokens_total, kind="padded") == 0
    assert written.total(Metric.batch_items) == 3
    for metric in (Metric.request_seconds, Metric.queue_seconds, Metric.tokenize_seconds):
        assert written.count(metric) == 2
    assert written.count(Metric.forward_seconds) == 2
    for row in reply["data"]:
        assert -0.5 < row["reward"] <= 0.5
    edges = {"0", "0.5"}
    assert sum(written.total(Metric.rewards_total, edge=edge) for edge in edges) == 4


def test_answers_that_come_one_by_one_share_their_prompt(
    rm: Served, written: Written, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is tokenised while the second is still on its way."""
    monkeypatch.setattr("raywards.serve.batcher._ARRIVING_S", 30.0)
    encode, may_go_on = rm.scorer.encode, threading.Event()

    def held(messages: Any, **options: Any) -> list[int]:
        if messages == LONGER:
            assert may_go_on.wait(30)
        return encode(messages, **options)

    monkeypatch.setattr(rm.scorer, "encode", held)
    with ThreadPoolExecutor() as pool:
        longer = pool.submit(rm.post, "/v1/reward", {"messages": LONGER})
        wait_until(lambda: rm.service.load_tokens > 0)
        shorter = pool.submit(rm.post, "/v1/reward", {"messages": TALK})
        wait_until(lambda: rm.service.stats()["queued_sequences"] == 1)
        assert written.count(Metric.forward_seconds) == 0
        may_go_on.set()
        longer.result()
        shorter.result()
    assert written.count(Metric.forward_seconds) == 1
    assert written.total(Metric.batch_items) == 2
    assert written.total(Metric.tokens_total, kind="cached") > 0


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_goes_wrong_is_counted_by_its_reason(rm: Served, written: Written) -> None:
    rm.refused("/v1/reward", {"message": [TALK]})
    long = [[TALK[0], {"role": "assistant", "content": "word " * 100}], TALK]
    reply = rm.post("/v1/reward", {"messages": long, "on_error": "item"})
    assert [row["error"] is None for row in reply["data"]] == [False, True]
    reply = rm.post("/v1/reward", {"messages": long, "truncation": "left"})
    assert [row["truncated"] for row in reply["data"]] == [True, False]
    assert written.total(Metric.requests_total, code="422") == 1
    assert written.total(Metric.rejected_total, reason="unknown_field") == 1
    assert written.total(Metric.items_total, outcome="failed") == 1
    assert written.total(Metric.items_total, outcome="scored") == 3
    assert written.total(Metric.truncated_total) == 1


def test_every_metric_has_a_text_and_edges_where_it_needs_them() -> None:
    for metric in Metric:
        kind = metric.value
        assert kind.text.endswith(".")
        assert kind.type in ("Counter", "Gauge", "Histogram")
        assert bool(kind.boundaries) == (kind.type == "Histogram")
        assert metric.name.endswith("_total") == (kind.type == "Counter")
        assert all(edge > 0 for edge in kind.boundaries), "Ray refuses others"
        assert list(kind.boundaries) == sorted(kind.boundaries)


def test_the_dashboard_shows_every_metric() -> None:
    text = (Path(__file__).parent.parent / "docs" / "grafana.json").read_text(encoding="utf-8")
    asked = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    for metric in Metric:
        suffix = "_bucket" if metric.value.type == "Histogram" else ""
        assert any(f"ray_raywards_{metric.name}{suffix}{{" in one for one in asked), metric


def test_the_log_is_json_and_holds_no_text(rm: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "raywards"):
        rm.post("/v1/reward", {"messages": TALK}, **{"x-request-id": "mine"})
        rm.refused("/v1/reward", {"messages": TALK, SECRET: 1})
        rm.refused("/v1/reward", {"messages": [{"role": SECRET, "content": SECRET}]})
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["event"] for line in lines] == ["scored", "refused", "refused"]
    assert lines[0]["request_id"] == "mine"
    assert lines[0]["items"] == 1
    assert SECRET not in caplog.text


def test_an_answer_in_lines_is_told_like_any_other(
    rm: Served, written: Written, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG, "raywards"):
        response = rm.http.post(
            "/v1/reward",
            json={"messages": [TALK, LONGER]},
            headers={"accept": "application/x-ndjson"},
        )
    assert len(response.text.splitlines()) == 3
    [line] = [json.loads(record.getMessage()) for record in caplog.records]
    assert (line["event"], line["items"]) == ("scored", 2)
    assert written.count(Metric.queue_seconds) == written.count(Metric.tokenize_seconds) == 1
    assert written.total(Metric.items_total, outcome="scored") == 2


def test_a_trace_has_a_span_for_each_answer_with_its_figures_and_no_text(
    rm: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    assert isinstance(replica._TRACER, trace.ProxyTracer | trace.Tracer)
    monkeypatch.setattr(replica, "_TRACER", provider.get_tracer("raywards"))
    rm.post("/v1/reward", {"messages": [TALK, LONGER]})
    [span] = exporter.get_finished_spans()
    assert span.name == "raywards.score"
    assert span.attributes is not None
    assert span.attributes["raywards.items"] == 2
    assert span.attributes["raywards.forward_ms"] > 0  # type: ignore[operator]
    assert SECRET not in span.to_json()
