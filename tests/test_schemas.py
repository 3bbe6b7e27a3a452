"""A body means exactly one thing, or it is refused with the field that is wrong."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from raywards.errors import RequestRefusedError
from raywards.schemas import (
    ErrorBody,
    RewardRequest,
    RewardResponse,
    field_path,
    parse_body,
)

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


def with_input(**fields: Any) -> dict[str, Any]:
    return {"input": "Hi", **fields}


def with_messages(**fields: Any) -> dict[str, Any]:
    return {"messages": [TURNS], **fields}


@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({"messages": TURNS}, 1),
        ({"messages": [TURNS, TURNS]}, 2),
        ({"prompt": "Hi", "responses": ["", "a", "b"]}, 3),
        ({"prompt": "", "responses": ["a"]}, 1),
        ({"prompt": TURNS[:1], "responses": ["a", "b"]}, 2),
        ({"input": "<s>Hi</s>"}, 1),
        ({"input": ["a", "b"]}, 2),
        ({"input_ids": [1, 2, 3]}, 1),
        ({"input_ids": [[1], [2], [3]]}, 3),
    ],
)
def test_each_kind_of_input_is_counted(body: dict[str, Any], count: int) -> None:
    assert RewardRequest.parse(body).count() == count


@pytest.mark.parametrize(
    "body",
    [
        with_input(timeout_s=5, ids=["a"], on_error="item", activation="sigmoid", max_length=1),
        with_messages(
            chat_template_kwargs={"thinking": False, "n": 3, "x": 0.5, "s": "", "z": None}
        ),
        with_messages(tools=[{"type": "function", "function": {"name": "f"}}]),
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {"messages": [{"role": "user", "content": "\0 \u202e e\u0301 🙂"}]},
        # What happens anyway, spelled out.
        with_input(normalize=False, priority=0, deterministic=False, add_special_tokens=None),
    ],
)
def test_every_option_is_accepted_where_it_means_something(body: dict[str, Any]) -> None:
    assert RewardRequest.parse(body).count() == 1


def one(**message: Any) -> dict[str, Any]:
    return {"messages": [[TURNS[0], message]]}


REFUSED: list[tuple[Any, str | None, str, str]] = [
    # body, field, code, words of the message
    (None, None, "not_an_object", "null"),
    ([], None, "not_an_object", "an empty list"),
    ("x", None, "not_an_object", "object"),
    ({}, None, "invalid_value", "exactly one of"),
    ({"input": "a", "input_ids": [1]}, "input_ids", "invalid_value", "input and input_ids"),
    ({"input": "a", "prompt": "b", "responses": ["c"]}, "input", "invalid_value", "exactly one"),
    ({"prompt": "a"}, "responses", "invalid_value", "missing beside `prompt`"),
    ({"responses": ["a"]}, "prompt", "invalid_value", "missing beside `responses`"),
    ({"messages": []}, "messages", "invalid_value", "at least 1"),
    ({"messages": [[]]}, "messages[0]", "invalid_value", "at least 1"),
    ({"messages": "Hi"}, "messages", "invalid_value", "a list"),
    ({"messages": {"role": "user"}}, "messages", "invalid_value", "a list"),
    ({"messages": [TURNS, "Hi"]}, "messages[1]", "invalid_value", "a list"),
    ({"messages": [TURNS, TURNS[0]]}, "messages[1]", "invalid_value", "a list"),
    ({"messages": [TURNS[0], TURNS]}, "messages[1]", "invalid_value", "an object"),
    ({"messages": [[TURNS]]}, "messages[0][0]", "invalid_value", "an object"),
    (one(content="x"), "messages[0][1].role", "missing_field", "required"),
    (one(role="user"), "messages[0][1].content", "missing_field", "required"),
    (one(role="user", content=None), "messages[0][1].content", "missing_field", "required"),
    (one(role="user", content=3), "messages[0][1].content", "invalid_value", "a string, got 3"),
    (one(role="asistant", content="x"), "messages[0][1].role", "invalid_value", "'assistant'?"),
    (one(role="user", contents="x"), "messages[0][1].contents", "unknown_field", "'content'?"),
    (
        one(role="user", content=[{"type": "image_url", "image_url": {"url": "x"}}]),
        "messages[0][1].content[0].image_url",
        "unknown_field",
        "type, text",
    ),
    (one(role="user", content="\ud800"), "messages[0][1].content", "invalid_value", "surrogate"),
    ({"prompt": 3, "responses": ["a"]}, "prompt", "invalid_value", "a string"),
    ({"prompt": [], "responses": ["a"]}, "prompt", "invalid_value", "at least 1"),
    ({"prompt": "a", "responses": []}, "responses", "invalid_value", "at least 1"),
    ({"prompt": "a", "responses": "b"}, "responses", "invalid_value", "a list"),
    ({"prompt": "a", "responses": ["b", None]}, "responses[1]", "invalid_value", "null"),
    ({"input": ""}, "input", "invalid_value", "empty"),
    ({"input": " \n"}, "input", "invalid_value", "empty"),
    ({"input": []}, "input", "invalid_value", "at least 1"),
    ({"input": ["a", ""]}, "input[1]", "invalid_value", "empty"),
    ({"input": ["a", None]}, "input[1]", "invalid_value", "null"),
    ({"input": [["a"]]}, "input[0]", "invalid_value", "a string"),
    ({"input_ids": []}, "input_ids", "invalid_value", "at least 1"),
    ({"input_ids": [[1], []]}, "input_ids[1]", "invalid_value", "at least 1"),
    ({"input_ids": [1, -1]}, "input_ids[1]", "invalid_value", "-1"),
    ({"input_ids": [1, True]}, "input_ids[1]", "invalid_value", "true"),
    ({"input_ids": [1, 1.0]}, "input_ids[1]", "invalid_value", "1.0"),
    ({"input_ids": ["1"]}, "input_ids[0]", "invalid_value", "an integer"),
    ({"input_ids": [2**70]}, "input_ids[0]", "invalid_value", "huge"),
    ({"input_ids": [[[1]]]}, "input_ids[0][0]", "invalid_value", "an integer"),
    ({"message": [TURNS]}, "message", "unknown_field", "Did you mean 'messages'?"),
    (with_input(activaton="none"), "activaton", "unknown_field", "Did you mean 'activation'?"),
    (with_input(zzz=1), "zzz", "unknown_field", "Known here: messages"),
    (with_input(activation="softmax"), "activation", "invalid_value", "'none' or 'sigmoid'"),
    (with_input(activation=None), "activation", "invalid_value", "null"),
    (with_input(truncation="left "), "truncation", "invalid_value", "'left'"),
    (with_input(max_length=0), "max_length", "invalid_value", "0"),
    (with_input(max_length=1.5), "max_length", "invalid_value", "1.5"),
    (with_input(timeout_s=0), "timeout_s", "invalid_value", "0"),
    (with_input(timeout_s=-1), "timeout_s", "invalid_value", "-1"),
    (with_input(timeout_s=1e12), "timeout_s", "invalid_value", "86400"),
    (with_input(timeout_s=True), "timeout_s", "invalid_value", "true"),
    (with_input(timeout_s=float("nan")), "timeout_s", "invalid_value", "finite"),
    (with_input(ids=["a", "b"]), "ids", "invalid_value", "2 names for 1"),
    (with_input(ids=[1]), "ids[0]", "invalid_value", "a string"),
    (with_input(ids=["x" * 300]), "ids[0]", "invalid_value", "256"),
    (with_input(on_error="skip"), "on_error", "invalid_value", "'item'"),
    (with_input(model=""), "model", "invalid_value", "at least 1"),
    (with_input(model="m" * 300), "model", "invalid_value", "256"),
    (with_input(chat_template_kwargs={}), "chat_template_kwargs", "invalid_value", "no effect"),
    (with_input(tools=[{}]), "tools", "invalid_value", "no effect"),
    (with_messages(tools=[3]), "tools[0]", "invalid_value", "an object"),
    (with_messages(chat_template_kwargs=[]), "chat_template_kwargs", "invalid_value", "an object"),
    *[
        (
            with_messages(chat_template_kwargs={name: value}),
            f"chat_template_kwargs.{name}",
            "invalid_value",
            words,
        )
        for name, value, words in [
            ("chat_template", "{{ 1 }}", "may set"),
            ("tokenize", True, "may set"),
            ("messages", "x", "may set"),
            ("__class__", 1, "may set"),
            ("_private", 1, "may set"),
            ("a b", 1, "may set"),
            ("x", {}, "an object"),
            ("x", [1], "a list"),
            ("x", 10**9, "1000000"),
            ("x", float("inf"), "1000000"),
            ("x", "y" * 5000, "4096"),
        ]
    ],
    *[
        (with_input(**{name: value}), name, "unsupported_field", "not supported by this server")
        for name, value in [
            *[("normalize", v) for v in (True, None, 0)],
            *[("priority", v) for v in (1, False, 0.0, None)],
            *[("deterministic", v) for v in (True, None, "no")],
            *[("add_special_tokens", v) for v in (True, False)],
            ("return", ["tokens"]),
            ("chat_template", "{{ 1 }}"),
        ]
    ],
]


@pytest.mark.parametrize(("body", "field", "code", "words"), REFUSED)
def test_a_bad_body_is_refused_by_field(
    body: Any, field: str | None, code: str, words: str
) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        RewardRequest.parse(body)
    assert caught.value.field == field
    assert caught.value.__dict__["code"] == code
    assert caught.value.status == 422
    assert words in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b"not json", "not JSON"),
        (b'{"input": "a"', "not JSON"),
        (b'{"input": "a"} {}', "not JSON"),
        (b"{'input': 'a'}", "not JSON"),
        (b'{"input": "a", "input": "b"}', "'input' is there twice"),
        (b'{"messages": [{"role": "user", "role": "system", "content": ""}]}', "'role'"),
        (b'{"timeout_s": NaN}', "NaN"),
        (b'{"timeout_s": -Infinity}', "Infinity"),
        (b'{"timeout_s": 1e400}', "too large"),
        (b'{"max_length": ' + b"9" * 5000 + b"}", "thousands of digits"),
        (b"[" * 100_000 + b"]" * 100_000, "nested"),
        (b'{"a":' * 100_000, "nested"),
        (b'{"input": "\xff"}', "UTF-8 (byte 11)"),
        ('{"input": "a"}'.encode("utf-16"), "UTF-8"),
        (b'\xef\xbb\xbf{"input": "a"}', "not JSON"),
    ],
)
def test_a_body_that_is_not_plain_json_is_malformed(raw: bytes, words: str) -> None:
    with pytest.raises(RequestRefusedError) as caught:
        parse_body(raw)
    assert caught.value.status == 400
    assert words in str(caught.value)


def test_a_key_among_a_hundred_thousand_is_found_soon() -> None:
    pairs = [f'"{n}":1' for n in range(100_000)] + ['"99999":1']
    started = time.monotonic()
    with pytest.raises(RequestRefusedError, match="'99999' is there twice"):
        parse_body(("{" + ",".join(pairs) + "}").encode())
    assert time.monotonic() - started < 2


def test_a_name_of_megabytes_is_not_compared() -> None:
    long = "a" * 16_000_000
    many = with_input(**{f"field{n}": n for n in range(300_000)})
    started = time.monotonic()
    for body in (with_input(**{long: 1}), with_input(activation=long), many):
        with pytest.raises(RequestRefusedError) as caught:
            RewardRequest.parse(body)
        assert "Did you mean" not in str(caught.value)
    assert time.monotonic() - started < 1


def test_a_million_wrong_entries_are_refused_at_the_first() -> None:
    with pytest.raises(RequestRefusedError, match=r"input_ids\[0\]"):
        RewardRequest.parse({"input_ids": ["a"] * 1_000_000})


def test_a_message_text_is_never_repeated_in_an_error() -> None:
    secret = "my very private text"
    for body in (with_input(activation=secret), one(role=secret, content="x"), secret):
        with pytest.raises(RequestRefusedError) as caught:
            RewardRequest.parse(body)
        assert secret not in str(caught.value)


def test_a_field_path_reads_like_the_body() -> None:
    assert field_path(("messages", "|many", 0, 1, "content")) == "messages[0][1].content"
    assert len(field_path(("x" * 10_000,))) < 100


def test_the_schema_shows_every_field_with_its_text() -> None:
    schema = RewardRequest.model_json_schema()
    assert set(schema["properties"]) == set(RewardRequest.model_fields)
    assert all(field.get("description") for field in schema["properties"].values())
    assert schema["additionalProperties"] is False


def test_a_client_ignores_reply_fields_that_it_does_not_know() -> None:
    reply = {
        "id": "reward-1",
        "created": 1,
        "model": "rm",
        "revision": None,
        "data": [{"index": 0, "reward": 0.1, "score": 0.1, "num_tokens": 3, "later": 1}],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
        "timing": {"queue_ms": 0.0, "tokenize_ms": 0.0, "forward_ms": 0.0, "batch_size": 1},
        "later": {},
    }
    assert RewardResponse.model_validate_json(json.dumps(reply)).data[0].reward == 0.1
    body = {"error": {"message": "m", "type": "t", "later": 1}}
    assert ErrorBody.model_validate(body).error.param is None
