"""Whatever a body holds: an answer that is right, or a clear refusal; and the next one is right."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from contract import EXAMPLES, RENDERED, Example
from hostile import (
    BLANKS,
    JSON,
    NO_IDS,
    NO_MESSAGES,
    NO_MODELS,
    NO_TEXTS,
    NO_VALUES,
    NO_VARIABLES,
    ODD_TEXTS,
    REFUSED,
    SURROGATES,
    raw,
)
from served import Served
from talks import QUESTION, TALKS

BOUND = 1e-5
# Of pydantic and of Python: what none of our messages says, and no field is called.
INTERNALS = re.compile(
    r"function-|functools|constrained|tagged-union|list\[|dict\[|Literal|Annotated|pydantic"
    r"|\bstr\b|\bNoneType\b|Input should|\|(one|many|text|list|ids|pair)"
)
# Where the example's last field is a text, or a list of them.
TEXTS = [example for example in EXAMPLES if "messages" not in example.body]
MESSAGES = [
    Example("/v1/reward", {"messages": TALKS[0]}, "native"),
    Example("/v1/reward", {"prompt": TALKS[0][:1], "responses": ["a"]}, "native"),
    Example("/classify", {"messages": TALKS[0]}, "vllm"),
    Example("/v1/classify", {"messages": TALKS[0]}, "vllm"),
    Example("/pooling", {"messages": TALKS[0]}, "vllm"),
    Example("/v1/chat/completions", {"messages": TALKS[0]}, "nim"),
    Example("/remote_rm", {"prompt": TALKS[0][:1], "response": "a"}, "native"),
]
IDS = [
    Example("/v1/reward", {"input_ids": [5, 6]}, "native"),
    Example("/classify", {"input": [5, 6]}, "vllm"),
    Example("/classify", {"input_ids": [5, 6]}, "vllm"),
    Example("/pooling", {"input": [5, 6]}, "vllm"),
    Example("/v1/embeddings", {"input": [5, 6]}, "vllm"),
]


def each(examples: list[Example]) -> Any:
    names = [f"{example.path}-{'-'.join(example.body)}" for example in examples]
    return pytest.mark.parametrize("example", examples, ids=names)


@pytest.fixture(autouse=True)
def next_request_is_right(rm: Served, rewards: list[float]) -> Iterator[None]:
    """After each test: nothing waits, and a good request has its reward."""
    yield
    found = [row["reward"] for row in rm.post("/v1/reward", {"messages": TALKS})["data"]]
    assert found == pytest.approx(rewards, abs=BOUND)
    assert rm.http.get("/ready").status_code == 200
    waiting = rm.http.get("/stats").json()
    assert waiting["queued_sequences"] == waiting["queued_tokens"] == 0


def is_refused(response: httpx.Response, what: object) -> str:
    """Assert a refusal that says something; gives its message."""
    assert response.status_code in REFUSED, (what, response.status_code, response.text[:300])
    body = response.json()
    error = body.get("error", body)
    message = error if isinstance(error, str) else error["message"]
    assert 10 < len(message) < 1000, (what, message)
    assert len(response.content) < 3000, (what, len(response.content))
    param = error.get("param") if isinstance(error, dict) else None
    assert not INTERNALS.search(f"{param} {message}"), (what, param, message)
    return str(message)


def field_of(example: Example) -> str:
    """What holds the texts: the last field."""
    return list(example.body)[-1]


@each(EXAMPLES)
def test_what_is_no_json_request_is_refused(example: Example, rm: Served) -> None:
    for case in raw(example):
        response = rm.http.post(example.path, content=case.content, headers=dict(case.headers))
        is_refused(response, case.name)
        expected = 415 if "type" in case.name or case.headers.get("content-encoding") else None
        assert expected in (None, response.status_code), case.name


@each(TEXTS)
def test_what_is_no_text_is_refused(example: Example, rm: Served) -> None:
    for value in NO_TEXTS:
        response = rm.http.post(example.path, json={**example.body, field_of(example): value})
        is_refused(response, value)
    response = rm.http.post(
        example.path, json={k: v for k, v in example.body.items() if k != field_of(example)}
    )
    is_refused(response, "missing")


@each([example for example in TEXTS if json.dumps(RENDERED) in json.dumps(example.body)])
def test_a_rendered_text_is_not_blank(example: Example, rm: Served) -> None:
    for blank in BLANKS:
        for value in (blank, [blank], ["a", blank]):
            if example.errors == "tei" and len(value) == 2 and isinstance(value, list):
                continue  # there, a prompt and its response
            response = rm.http.post(example.path, json={**example.body, field_of(example): value})
            is_refused(response, value)


@each(MESSAGES)
def test_what_is_no_conversation_is_refused(example: Example, rm: Served) -> None:
    name = next(iter(example.body))
    for value in NO_MESSAGES:
        if name == "prompt" and isinstance(value, str):
            continue  # a prompt may be text
        response = rm.http.post(example.path, json={**example.body, name: value})
        is_refused(response, value)


@each(IDS)
def test_what_is_no_token_id_is_refused(example: Example, rm: Served) -> None:
    name = next(iter(example.body))
    strings = [["5"], ["0x5"]] if name == "input_ids" else []
    for value in [*NO_IDS, *strings, [5] * (rm.scorer.max_length + 1)]:
        is_refused(rm.http.post(example.path, json={name: value}), value)


@each(IDS)
def test_an_id_beyond_the_vocabulary_is_named_once(example: Example, rm: Served) -> None:
    name = next(iter(example.body))
    for value, place in (([5, 999_999], name), ([[5], [5, 999_999]], f"{name}[1]")):
        message = is_refused(rm.http.post(example.path, json={name: value}), value)
        assert message.startswith(f"{place}: id 1 is 999999; expected an integer from 0 to")


@each([e for e in EXAMPLES if isinstance(e.body[field_of(e)], list) and e in TEXTS])
def test_a_list_is_refused_at_its_bad_entry(example: Example, rm: Served) -> None:
    """And not as a whole, for not being a text."""
    for bad in (3, True, ["b"]):
        if example.body[field_of(example)] == [[RENDERED]]:
            value: Any = [["a"], [bad]]
        else:
            value = ["a", bad]
        response = rm.http.post(example.path, json={**example.body, field_of(example): value})
        message = is_refused(response, value)
        assert f"{field_of(example)}[1]" in message
        assert "a string" in message


def test_two_inputs_at_once_are_refused(rm: Served) -> None:
    inputs: dict[str, Any] = {"messages": TALKS[0], "input": "a", "input_ids": [5]}
    for left in inputs:
        for right in ("prompt", *inputs):
            if left != right:
                body = {left: inputs[left], right: inputs.get(right, "a")}
                is_refused(rm.http.post("/v1/reward", json=body), body.keys())
    for path in ("/classify", "/pooling"):
        is_refused(rm.http.post(path, json={"input": "a", "messages": TALKS[0]}), path)
    is_refused(rm.http.post("/classify", json={"text": "a", "input_ids": [5]}), "sglang")
    is_refused(rm.http.post("/score", json={"text_1": "a", "text_2": "b", "items": "c"}), "score")


def test_responses_are_a_list_of_texts_of_a_size(rm: Served) -> None:
    for value in (None, [], {}, "a", [None], [3], [["a"]], [True], ["a", 3]):
        body = {"prompt": TALKS[0][:1], "responses": value}
        assert "responses" in is_refused(rm.http.post("/v1/reward", json=body), value)
    for count in (1025, 200_000):
        body = {"prompt": TALKS[0][:1], "responses": ["a"] * count}
        response = rm.http.post("/v1/reward", json=body)
        assert response.status_code == 413
        assert "send fewer" in is_refused(response, count)


MILLIONS: dict[str, Any] = {
    "responses": {"prompt": "a", "responses": ["a"] * 500_000},
    "sequences": {"input_ids": [[5]] * 300_000},
    "ids": {"input_ids": [5] * 2_000_000},
    "conversations": {"messages": [TALKS[0]] * 100_000},
    "turns": {"messages": TALKS[0] * 100_000},
    "parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 300_000}]},
    "fields": {f"field{n}": n for n in range(150_000)},
    "tools": {"messages": TALKS[0], "tools": [{"name": "a"}] * 150_000},
}


@pytest.mark.trains
@pytest.mark.parametrize("name", MILLIONS)
def test_a_body_of_millions_is_refused_before_anyone_looks_at_them(name: str, rm: Served) -> None:
    content = json.dumps(MILLIONS[name], separators=(",", ":")).encode()
    assert len(content) < rm.config.max_body_bytes
    response = rm.http.post("/v1/reward", content=content, headers=JSON)
    assert response.status_code == 413
    is_refused(response, name)


@pytest.mark.parametrize("name", NO_VALUES)
def test_settings_without_a_meaning_are_refused_by_name(name: str, rm: Served) -> None:
    example = next(e for e in EXAMPLES if e.path == name)
    for field, value in NO_VALUES[name]:
        response = rm.http.post(name, json={**example.body, field: value})
        assert field in is_refused(response, (field, value))


@each([e for e in MESSAGES if e.path in ("/v1/reward", "/classify", "/pooling")])
def test_variables_that_reach_behind_the_template_are_refused(example: Example, rm: Served) -> None:
    for value in NO_VARIABLES:
        body = {**example.body, "chat_template_kwargs": value}
        assert "chat_template_kwargs" in is_refused(rm.http.post(example.path, json=body), value)


@each([example for example in EXAMPLES if example.names_model])
def test_nothing_is_served_under_other_names(example: Example, rm: Served) -> None:
    for name in NO_MODELS:
        response = rm.http.post(example.path, json={**example.body, "model": name})
        message = is_refused(response, str(name)[:80])
        if isinstance(name, str) and len(name) < 100:
            assert response.status_code == 404
            assert "'rm' is" in message


def test_a_text_that_is_cut_to_a_control_token_has_no_reward(rm: Served) -> None:
    """The first token of a rendered conversation is one: its reward would say nothing."""
    native = {"input": RENDERED, "truncation": "right", "max_length": 1}
    assert "control tokens" in is_refused(rm.http.post("/v1/reward", json=native), 1)
    theirs = {"input": RENDERED, "truncate_prompt_tokens": 1}
    assert "control tokens" in is_refused(rm.http.post("/classify", json=theirs), 1)
    assert rm.post("/v1/reward", {**native, "max_length": 2})["data"][0]["num_tokens"] == 2


# ---- what is text, and no more


def _asked(example: Example, text: str) -> tuple[dict[str, Any], Any]:
    """A body with `text` as what was answered, and the conversation that it means."""
    body = dict(example.body)
    name = field_of(example)
    if name == "messages":
        body[name] = [TALKS[0][0], {"role": "assistant", "content": text}]
    elif isinstance(body[name], list):
        body[name] = [text]
    else:
        body[name] = text
    return body, [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": text}]


# What they say is text inside of a conversation; elsewhere it is a rendered text.
SPEAK = [
    Example("/v1/reward", {"messages": TALKS[0]}, "native"),
    Example("/v1/reward", {"prompt": TALKS[0][:1], "responses": ["a"]}, "native"),
    Example("/classify", {"messages": TALKS[0]}, "vllm"),
    Example("/pooling", {"messages": TALKS[0]}, "vllm"),
    Example("/score", {"text_1": QUESTION, "text_2": "a"}, "vllm"),
    Example("/score", {"query": QUESTION, "items": ["a"]}, "vllm"),
    Example("/rerank", {"raw_scores": True, "query": QUESTION, "texts": ["a"]}, "tei"),
    Example("/v1/rerank", {"raw_scores": True, "query": QUESTION, "documents": ["a"]}, "jina"),
    Example("/remote_rm", {"prompt": TALKS[0][:1], "response": "a"}, "native"),
    Example("/v1/chat/completions", {"messages": TALKS[0]}, "nim"),
]


def reward_in(reply: Any) -> float:
    """The one reward of a reply in any dialect."""
    found: list[float] = []

    def look(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            for key, entry in value.items():
                look(entry, key)
        elif isinstance(value, list):
            for entry in value:
                look(entry, name)
        elif name in ("reward", "relevance_score", "logprob") or (
            name in ("probs", "data", "score", "scores") and isinstance(value, float)
        ):
            found.append(value)

    look({"reward": reply} if isinstance(reply, float) else reply, "")
    assert len(set(found)) == 1, reply
    return found[0]


@each(SPEAK)
def test_odd_texts_have_the_reward_of_the_scorer(example: Example, rm: Served) -> None:
    for name, text in ODD_TEXTS.items():
        body, talk = _asked(example, text)
        [expected] = rm.scorer.score([talk])
        assert reward_in(rm.post(example.path, body)) == pytest.approx(expected, abs=BOUND), name


def test_control_tokens_of_a_message_stay_text(rm: Served) -> None:
    tokenizer = rm.scorer._rendering.tokenizer
    _, talk = _asked(SPEAK[0], ODD_TEXTS["specials"])
    specials = set(tokenizer.all_special_ids)
    plain = rm.scorer.encode([talk[0], {"role": "assistant", "content": "Good."}])
    count = sum(token in specials for token in rm.scorer.encode(talk))
    assert count == sum(token in specials for token in plain)


@each(EXAMPLES)
def test_half_characters_are_refused(example: Example, rm: Served) -> None:
    body, _ = _asked(example, "PLACE")
    assert json.dumps(body).count('"PLACE"') == 1
    for half in SURROGATES:
        content = json.dumps(body).replace('"PLACE"', half).encode()
        is_refused(rm.http.post(example.path, content=content, headers=JSON), half)


@each(EXAMPLES)
def test_texts_that_are_far_too_long_end_at_once(example: Example, rm: Served) -> None:
    """Refused, or cut where the dialect cuts: TEI's does, unless it is told not to."""
    cuts = example.errors == "tei"
    for text in ("word " * 2000, "a" * 2_000_000, "e" + "\u0301" * 1_000_000, " " * 1_000_000):
        body, _ = _asked(example, text)
        response = rm.http.post(example.path, json=body)
        if cuts and response.status_code == 200:
            assert text.startswith("word ")
            response = rm.http.post(example.path, json={**body, "truncate": False})
        is_refused(response, text[:5])


def test_a_conversation_of_ten_thousand_turns_is_too_long(rm: Served) -> None:
    for example in MESSAGES:
        if "messages" in example.body:
            body = {"messages": TALKS[0] * 5000}
            is_refused(rm.http.post(example.path, json=body), example.path)


def test_the_pad_token_inside_of_ids_moves_nothing(rm: Served) -> None:
    pad = rm.scorer._rendering.tokenizer.pad_token_id
    for ids in ([5, pad, 6], [pad, 5, 6], [5, 6, 7, pad, 8]):
        [expected] = rm.scorer.score_ids([ids])
        for example in IDS:
            found = rm.post(example.path, {next(iter(example.body)): ids})
            got = found.get("embedding") or found["data"][0].get("embedding")
            reward = got[0] if got else reward_in(found["data"])
            assert reward == pytest.approx(expected, abs=BOUND), (example.path, ids)


# ---- what is answered


def test_rewards_are_written_with_all_their_digits(rm: Served, rewards: list[float]) -> None:
    """Each is a float32, and not one of fewer bits."""
    rows = rm.post("/v1/reward", {"messages": TALKS * 20})["data"]
    assert [row["index"] for row in rows] == list(range(60))
    for row, expected in zip(rows, rewards * 20, strict=True):
        assert row["reward"] == pytest.approx(expected, abs=BOUND)
        assert struct.unpack("f", struct.pack("f", row["reward"]))[0] == row["reward"]
    bits = [int.from_bytes(struct.pack(">f", row["reward"])) & 0xFFFF for row in rows]
    assert any(bits), "rounded to bf16"


def test_one_bad_item_changes_nothing_for_the_others(rm: Served) -> None:
    texts = [f"{RENDERED}{n}" for n in range(6)]
    expected = [row["reward"] for row in rm.post("/v1/reward", {"input": texts})["data"]]
    mixed = [*texts[:3], "word " * 3000, *texts[3:]]
    status, reply = rm.refused("/v1/reward", {"input": mixed})
    assert (status, reply["error"]["param"]) == (422, "input[3]")
    rows = rm.post("/v1/reward", {"input": mixed, "on_error": "item"})["data"]
    assert [row["error"] is not None for row in rows] == [n == 3 for n in range(7)]
    found = [row["reward"] for row in rows if row["error"] is None]
    assert found == pytest.approx(expected, abs=BOUND)
