"""schemathesis reads our OpenAPI document and tries the real server with it.

Its checks are all on but those of `OFF`. It draws the same requests in every run, and prints a
`curl` line for each that found something.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from served import Served, served
from tiny import tiny_qwen2

KEY = "a-key-for-schemathesis"
GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
OFF = (
    # A schema cannot say which fields go together (`prompt` with `responses`), which ids are in the
    # vocabulary, or what fits into the model: many a body that fits the schema is refused.
    "positive_data_acceptance",
    # No route makes, names or deletes anything that a later request could ask for.
    "use_after_free",
    "ensure_resource_availability",
)


class Statuses:
    """An app that counts what it answers, by path and status."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, int]] = Counter()

    def around(self, app: Any) -> Any:
        async def counting(scope: Any, receive: Any, send: Any) -> None:
            async def counted(message: Any) -> None:
                if message["type"] == "http.response.start":
                    self.counts[scope["path"], message["status"]] += 1
                await send(message)

            await app(scope, receive, counted if scope["type"] == "http" else send)

        return counting

    def of(self, status: int) -> int:
        return sum(count for (_, one), count in self.counts.items() if one == status)


@pytest.fixture(scope="module")
def statuses() -> Statuses:
    return Statuses()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, statuses: Statuses) -> Iterator[Served]:
    folder = tiny_qwen2(tmp_path_factory.mktemp("model"))
    with served(folder, wrap=statuses.around, api_key=KEY) as running:
        running.http.headers["Authorization"] = f"Bearer {KEY}"
        yield running


def run(server: Served, folder: Path, *flags: str) -> str:
    """What schemathesis says of the server; it must have found nothing."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {KEY}"),
            *("--phases", "examples,coverage,fuzzing"),
            *("--exclude-checks", ",".join(OFF), "--continue-on-failure", "--no-color", *flags),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def expect_good_requests_still_right(server: Served) -> None:
    reply = server.post("/v1/reward", GOOD)
    expected = server.scorer.score([GOOD["messages"]])[0]
    assert reply["data"][0]["reward"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.trains
def test_schemathesis_finds_nothing(server: Served, statuses: Statuses, tmp_path: Path) -> None:
    statuses.counts.clear()
    told = run(server, tmp_path, "--generation-deterministic", "--max-examples", "4")
    paths = server.http.get("/openapi.json").json()["paths"]
    assert f"Tested: {len(paths) + 1}" in told, told  # `/` is a GET and a POST
    for path in paths:
        assert statuses.counts[path, 200], f"{path}: no request was good"
    assert statuses.of(401) > 10
    assert statuses.of(422) > 100
    assert not [one for one in statuses.counts if one[1] >= 500]
    expect_good_requests_still_right(server)


def test_the_document_asks_for_a_key_where_the_server_does_and_the_probes_do_not(
    server: Served,
) -> None:
    schema = server.http.get("/openapi.json").json()
    [[scheme]] = schema["security"]
    assert schema["components"]["securitySchemes"][scheme]["scheme"] == "bearer"
    assert schema["paths"]["/health"]["get"]["security"] == []
    assert "security" not in schema["paths"]["/v1/reward"]["post"]


def test_the_document_has_the_error_bodies_of_each_dialect_and_what_stands_behind_the_path(
    server: Served,
) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]

    def error(path: str) -> str:
        return json.dumps(paths[path]["post"]["responses"]["422"]["content"])

    assert "/ErrorBody" in error("/v1/reward")
    assert "/VllmErrorBody" in error("/pooling")
    assert "/TeiErrorBody" in error("/predict")
    assert "/CohereErrorBody" in error("/v2/rerank")
    assert "/TeiErrorBody" in error("/rerank")
    assert "/ErrorBody" in error("/rerank")
    names = {one["name"] for one in paths["/remote_rm"]["post"]["parameters"]}
    assert names == {"truncation", "dict"}


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/embeddings", "priority", False),
        ("/v1/rerank", "priority", False),
        ("/v1/score", "item_first", 0),
        ("/v1/score", "apply_softmax", 0.0),
        ("/v1/chat/completions", "n", True),
        ("/v1/chat/completions", "stream", 0),
        ("/pooling", "add_generation_prompt", 0),
    ],
)
def test_no_number_is_taken_for_a_boolean_nor_a_boolean_for_a_number(
    server: Served, path: str, field: str, value: object
) -> None:
    good: dict[str, dict[str, Any]] = {
        "/v1/embeddings": {"input": "hello"},
        "/v1/rerank": {"query": "hello", "documents": ["hi"]},
        "/v1/score": {"query": "hello", "items": ["hi"]},
        "/v1/chat/completions": GOOD,
        "/pooling": GOOD,
    }
    server.post(path, good[path])
    status, body = server.refused(path, {**good[path], field: value})
    assert status in (400, 422)
    assert body["error"]["param"] == field


def test_a_wrong_method_is_told_all_that_the_path_has(server: Served) -> None:
    refused = server.http.request("OPTIONS", "/")
    assert refused.status_code == 405
    assert refused.headers["allow"] == "GET, POST"
    assert server.http.get("/pooling").headers["allow"] == "POST"


@pytest.mark.slow
def test_schemathesis_finds_nothing_in_many_requests(server: Served, tmp_path: Path) -> None:
    run(server, tmp_path, "--generation-deterministic", "--max-examples", "100")
    expect_good_requests_still_right(server)
