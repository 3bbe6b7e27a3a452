"""What each dialect says when there is no reward: status, body and headers, as its clients read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from contract import EXAMPLES, Example, shape
from gates import KEY, Gate, filled
from served import Served

from raywards.serve.http import ROUTES

# vLLM: entrypoints/serve/engine/protocol.py. TEI: router/src/http/server.rs and its docs/openapi.
# Cohere: docs.cohere.com/reference/errors. NIM and Jina speak OpenAI's envelope, as we do.
OPENAI = {"error": {"message": "str", "type": "str", "code": "str", "request_id": "str"}}
VLLM = {"error": {"message": "str", "type": "str", "code": "int"}}
SHAPES: dict[str, Any] = {
    "native": OPENAI,
    "nim": OPENAI,
    "jina": OPENAI,
    "vllm": VLLM,
    "tei": {"error": "str", "error_type": "str"},
    "cohere": {"message": "str"},
}
# verl gives up on every 4xx and OpenRLHF waits on all alike, so they read 503. The clients of
# rerankers and chat models wait on 429.
BUSY = {"native": 503, "vllm": 503, "nim": 429, "jina": 429, "cohere": 429, "tei": 429}
FAILED = {"tei": 424}
NOT_VALID = {"vllm": 400}

every = pytest.mark.parametrize(
    "example", EXAMPLES, ids=[f"{e.path}-{'-'.join(e.body)}" for e in EXAMPLES]
)


def test_every_route_has_an_example() -> None:
    assert {example.path for example in EXAMPLES} == {route.path for route in ROUTES}
    assert len(EXAMPLES) >= len(ROUTES)


@every
def test_the_examples_are_answered(example: Example, rm: Served) -> None:
    rm.post(example.path, example.body)


def check(example: Example, response: httpx.Response, status: int) -> Any:
    assert response.status_code == status, response.text
    body = response.json()
    found = shape(body)
    if isinstance(found.get("error"), dict):
        assert found["error"].pop("param") in ("NoneType", "str")
        assert body["error"]["code"] == status or example.errors != "vllm"
    assert found == SHAPES[example.errors]
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    return body


@every
def test_without_the_key_it_is_401(example: Example, guarded: Served) -> None:
    # Before the body is read, nobody knows whose it is: a path has one style for that.
    style = {"/rerank": "jina"}.get(example.path, example.errors)
    for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": KEY}):
        response = guarded.http.post(example.path, json=example.body, headers=headers)
        check(example._replace(errors=style), response, 401)
        assert response.headers["www-authenticate"] == "Bearer"
    guarded.post(example.path, example.body, authorization=f"Bearer {KEY}")


def test_a_full_queue_is_told_with_the_time_to_wait(small: Gate) -> None:
    with filled(small):
        for example in EXAMPLES:
            response = small.server.http.post(example.path, json=example.body)
            body = check(example, response, BUSY[example.errors])
            assert 1 <= int(response.headers["retry-after"]) <= 60
            if example.errors == "tei":
                assert body["error_type"] == "Overloaded"
    for example in EXAMPLES:
        small.server.post(example.path, example.body)


@every
def test_a_deadline_that_passes_is_504(example: Example, late: Served) -> None:
    check(example, late.http.post(example.path, json=example.body), 504)


@every
def test_a_model_that_fails_is_told_without_its_message(example: Example, broken: Served) -> None:
    response = broken.http.post(example.path, json=example.body)
    check(example, response, FAILED.get(example.errors, 500))
    assert "the model failed" not in response.text


@every
def test_an_unknown_field_is_refused_by_its_name(example: Example, rm: Served) -> None:
    for name in ("use_activaton", "n_best", "logit_bias"):
        if example.path == "/get_reward":  # its trainer adds fields as it likes
            rm.post(example.path, {**example.body, name: False})
            continue
        response = rm.http.post(example.path, json={**example.body, name: False})
        body = check(example, response, NOT_VALID.get(example.errors, 422))
        assert name in str(body)


@every
def test_another_model_is_404_where_the_dialect_names_one(example: Example, rm: Served) -> None:
    response = rm.http.post(example.path, json={**example.body, "model": "another"})
    if example.names_model:
        assert "'rm' is" in str(check(example, response, 404))
        rm.post(example.path, {**example.body, "model": "rm"})
    elif example.path != "/get_reward":
        assert "model" in str(check(example, response, NOT_VALID.get(example.errors, 422)))


@every
def test_what_is_no_request_at_all_is_refused(example: Example, rm: Served) -> None:
    plain = {"content-type": "application/json"}
    style = example._replace(errors={"/rerank": "jina"}.get(example.path, example.errors))
    refusals: list[tuple[Callable[[], httpx.Response], int]] = [
        (lambda: rm.http.post(example.path, content=b"{", headers=plain), 400),
        (lambda: rm.http.post(example.path, content=b"", headers=plain), 400),
        (lambda: rm.http.post(example.path, content=b"{}", headers={"content-type": "a/b"}), 415),
        (
            lambda: rm.http.post(example.path, json=[example.body]),
            NOT_VALID.get(style.errors, 422),
        ),
    ]
    for ask, status in refusals:
        check(style, ask(), status)
    rm.post(example.path, example.body)


LISTS = {
    "messages": lambda n: None,
    "input": lambda n: ["Good."] * n,
    "query": lambda n: ["Good."] * n,
    "text": lambda n: ["Good."] * n,
    "text_2": lambda n: ["Good."] * n,
    "data_2": lambda n: ["Good."] * n,
    "items": lambda n: ["Good."] * n,
    "inputs": lambda n: [["Good."]] * n,
    "texts": lambda n: ["Good."] * n,
    "documents": lambda n: ["Good."] * n,
}


@every
def test_more_items_than_are_accepted_are_413(example: Example, guarded: Served) -> None:
    # The last field that may be a list is what there can be many of.
    many = [name for name in example.body if name in LISTS][-1:]
    if many in ([], ["messages"]):
        assert example.path in ("/remote_rm", "/v1/chat/completions", "/v1/reward")
        return
    key = {"authorization": f"Bearer {KEY}"}
    body = {**example.body, many[0]: LISTS[many[0]](9)}
    body = check(example, guarded.http.post(example.path, json=body, headers=key), 413)
    assert "9 sequences" in str(body)
    assert "8 are accepted" in str(body)


@every
def test_what_stands_behind_the_question_mark_has_a_meaning(example: Example, rm: Served) -> None:
    """Else a reward would be given under another setting than the one that was asked for."""
    response = rm.http.post(f"{example.path}?activation=sigmoid", json=example.body)
    body = check(example, response, 400 if example.errors == "vllm" else 422)
    assert "activation" in str(body)
