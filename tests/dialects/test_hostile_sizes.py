"""Bodies that are small to send and long to look at: answered soon, so that nobody waits for them.

A body is parsed and validated where all other requests are served. The times that are asserted are
generous: what they bound took minutes, or ten times as long.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from typing import Any

import pytest
from hostile import JSON
from served import Served
from starlette.requests import Request
from talks import QUESTION, TALKS
from test_hostile_bodies import is_refused

from raywards.config import ServeConfig
from raywards.errors import OverloadedError, RequestRefusedError
from raywards.serve import incoming
from raywards.serve.dialects import Conversation, Response
from raywards.serve.incoming import Bodies

SOON_S = 4.0
TURN = {"role": "user", "content": "a"}
MILLIONS_OF_INTS = [1] * 2_000_000


def packed(body: Any) -> bytes:
    return json.dumps(body, separators=(",", ":")).encode()


LONG_TO_LOOK_AT: dict[str, tuple[Any, int]] = {
    "a prompt for a thousand": ({"prompt": [TURN] * 6000, "responses": ["a"] * 1024}, 422),
    "tools for a thousand": ({"messages": [TALKS[0]] * 1024, "tools": [{"a": 1}] * 40_000}, 422),
    "a long value": ({"input": "a", "activation": "a" * 16_000_000}, 422),
    "a list for a value": ({"input": "a", "activation": [1] * 90_000}, 422),
    "a long name": ({"input": "a", "a" * 16_000_000: 1}, 422),
    "unknown fields": ({f"field{n}": n for n in range(4000)}, 422),
    "unknown fields of a message": ({"messages": [{f"f{n}": n for n in range(4000)}]}, 422),
}


@pytest.mark.trains
@pytest.mark.parametrize("name", LONG_TO_LOOK_AT)
def test_what_is_long_to_look_at_is_answered_soon(name: str, rm: Served) -> None:
    body, status = LONG_TO_LOOK_AT[name]
    content = packed(body)
    started = time.monotonic()
    response = rm.http.post("/v1/reward", content=content, headers=JSON)
    assert time.monotonic() - started < SOON_S
    assert response.status_code == status
    is_refused(response, name)


def test_a_key_that_is_there_twice_among_thirty_thousand_is_found_soon(rm: Served) -> None:
    keys = [f"{n:05d}" for n in range(30_000)] + ["29999"]
    content = "{" + ",".join(f'"{key}":1' for key in keys) + "}"
    started = time.monotonic()
    response = rm.http.post("/v1/reward", content=content, headers=JSON)
    assert time.monotonic() - started < SOON_S
    assert response.status_code == 400
    assert "'29999' is there twice" in is_refused(response, "keys")


NOT_LOOKED_AT: dict[str, tuple[str, Any]] = {
    "numbers in tools": ("values", {"messages": TALKS[0], "tools": [{"x": MILLIONS_OF_INTS}]}),
    "numbers for a value": ("values", {"input": "a", "activation": MILLIONS_OF_INTS}),
    "fewer numbers in tools": (
        "texts, messages and fields",
        {"messages": TALKS[0], "tools": [{"x": [1] * 110_000}]},
    ),
    "booleans where no id stands": ("texts, messages and fields", {"responses": [True] * 110_000}),
    "ids": ("values", {"input_ids": [5] * 8_000_000}),
    "ids in too many sequences": ("sequences, far more", {"input_ids": [[5]] * 99_000}),
    "ids in millions of sequences": ("messages", {"input_ids": [[5]] * 2_000_000}),
    "texts": ("sequences, far more", {"input": ["a"] * 90_000}),
    "conversations": ("sequences, far more", {"messages": [[TURN]] * 20_000}),
    "documents": ("sequences, far more", {"query": "a", "documents": [{"text": "a"}] * 40_000}),
    "strings alone": ("values", {"x": [""] * 5_000_000}),
    "fields": ("fields in one object", {f"field{n}": n for n in range(9000)}),
}


@pytest.mark.trains
@pytest.mark.parametrize("name", NOT_LOOKED_AT)
def test_what_is_too_much_is_refused_before_pydantic_sees_it(name: str, rm: Served) -> None:
    word, body = NOT_LOOKED_AT[name]
    response = rm.http.post("/v1/reward", content=packed(body), headers=JSON)
    assert response.status_code == 413
    message = is_refused(response, name)
    assert word in message
    assert "send fewer" in message


def test_what_is_legal_stays_legal(rm: Served) -> None:
    """As many sequences and ids as the queue holds, and text that looks like a million values."""
    ids = {"input_ids": [[5] * 250] * 1024}
    assert len(rm.post("/v1/reward", ids)["data"]) == rm.config.max_items_per_request
    commas = '[{",\\"' * 60_000
    assert len(packed({"input": commas})) > 262_144
    message = is_refused(rm.http.post("/v1/reward", json={"input": commas}), "commas")
    assert "characters cannot fit" in message
    long = {"input_ids": [5] * 1_000_000, "truncation": "right"}
    assert rm.post("/v1/reward", long)["data"][0]["num_tokens"] == rm.scorer.max_length
    label = [{"case": n} for n in range(2000)]
    rm.post("/remote_rm", {"prompt": TALKS[0][:1], "response": "a", "label": label})


def test_commas_and_brackets_are_counted_outside_of_strings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At whatever place the pieces of a body are cut."""

    def refuses(body: bytes, most: int, most_ids: int) -> bool:
        try:
            incoming._check_commas(body, most, most_ids)
        except RequestRefusedError:
            return True
        return False

    draw = random.Random(5)
    for _ in range(300):
        monkeypatch.setattr(incoming, "_COUNT_AT_ONCE_BYTES", draw.randint(1, 9))
        texts = ["".join(draw.choices('\\",[{a}]\u00e9', k=9)) for _ in range(4)]
        body = packed({"a": texts, "b": [{}, [1, 2]]})
        commas, containers = 3 + 1 + 1 + 1, 5
        assert not refuses(body, containers - 1, commas - containers + 1)
        assert refuses(body, containers - 2, 1000)
        assert refuses(body, containers - 1, commas - containers)


@pytest.mark.parametrize("depth", [101, 200, 300, 500, 900, 950, 985, 3000])
@pytest.mark.parametrize(("opens", "closes"), [(b"[", b"]"), (b'{"a":', b"}")])
@pytest.mark.parametrize("where", ["tools", "tool_calls", "label"])
def test_a_deep_body_is_refused_with_the_limit(
    where: str, opens: bytes, closes: bytes, depth: int, rm: Served
) -> None:
    deep = opens * depth + b"1" + closes * depth
    path, body = "/v1/reward", packed({"messages": TALKS[0], "tools": [{"x": "DEEP"}]})
    if where == "tool_calls":
        turn = {"role": "assistant", "content": "a", "tool_calls": [{"x": "DEEP"}]}
        body = packed({"messages": [TURN, turn]})
    elif where == "label":
        path = "/remote_rm"
        body = packed({"prompt": [TURN], "response": "a", "label": "DEEP"})
    response = rm.http.post(path, content=body.replace(b'"DEEP"', deep), headers=JSON)
    assert response.status_code == 400
    assert "deeper than 100 levels" in is_refused(response, depth)


def test_a_nesting_that_a_template_may_have_is_not_too_deep(rm: Served) -> None:
    deep: Any = "a"
    for _ in range(90):
        deep = [deep]
    body = {"prompt": [TURN], "response": "a", "label": deep}
    assert isinstance(rm.post("/remote_rm", body), float)
    # 64 levels are the renderer's limit, and it says so.
    status, reply = rm.refused("/v1/reward", {"messages": TALKS[0], "tools": [{"x": deep}]})
    assert (status, "64 levels" in reply["error"]["message"]) == (422, True)


# ---- what a request is taken to weigh


def test_tools_and_variables_count_as_characters(rm: Served) -> None:
    variables = {"tools": [{"name": "abc", "n": [1, True, None, 0.5]}], "shout": "yes"}
    bare = Conversation("messages", TALKS[0]).characters()
    found = Conversation("messages", TALKS[0], variables).characters()
    assert found - bare >= len("toolsnameabcn1111shoutyes")
    with_prompt = Response("r", TALKS[0][:1], "a", variables).characters()
    assert with_prompt - Response("r", TALKS[0][:1], "a").characters() == found - bare
    assert Response("r", QUESTION, "a").characters() == len(QUESTION) + 1
    body = {"messages": TALKS[0], "tools": [{"x": "1 " * 250_000}]}
    assert "characters cannot fit" in is_refused(rm.http.post("/v1/reward", json=body), "tools")


def test_a_nesting_of_any_depth_can_be_counted() -> None:
    deep: Any = "abc"
    for _ in range(100_000):
        deep = [deep]
    assert Conversation("messages", [{"role": deep}]).characters() > 100_000


# ---- what is held of bodies that have arrived


def test_a_body_is_held_until_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServeConfig(model="rm", max_body_bytes=300_000)
    content = b'{"input":"' + b"a" * 280_000 + b'"}'
    may_parse = threading.Event()
    parse = incoming._parse

    def held_up(body: bytes, config: ServeConfig) -> object:
        assert may_parse.wait(30)
        return parse(body, config)

    monkeypatch.setattr(incoming, "_parse", held_up)

    def arriving() -> Request:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        headers = [(b"content-type", b"application/json")]
        return Request({"type": "http", "headers": headers}, receive)

    async def main() -> None:
        bodies = Bodies()
        waiting = [
            asyncio.ensure_future(bodies.read_json(arriving(), config))
            for _ in range(incoming._MOST_BODIES + 1)
        ]
        await asyncio.sleep(0.2)
        assert not any(one.done() for one in waiting)
        with pytest.raises(OverloadedError, match="large bodies"):
            await bodies.read_json(arriving(), config)
        may_parse.set()
        assert all(await asyncio.gather(*waiting))
        assert await bodies.read_json(arriving(), config) == json.loads(content)

    asyncio.run(main())
