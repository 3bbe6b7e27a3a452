"""The clients against a real HTTP server: the app that replicas run, without Serve around it."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import pytest
import uvicorn

from raywards.client import AsyncRewardClient, RewardClient
from raywards.config import ServeConfig
from raywards.errors import (
    ConfigError,
    ConversationError,
    DeadlineError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
    UnreachableError,
)
from raywards.schemas import RewardRequest
from raywards.serve.http import create_app
from raywards.serve.replica import RewardService, load

KEY = "s3cret-key"


class FakeScorer:
    """A model of arithmetic: ids are the bytes of the text, the reward is made of them."""

    max_length = 1000
    vocab_size = 300
    packs = True

    def __init__(self) -> None:
        self.info: dict[str, Any] = {
            "vocab_size": 300,
            "revision": "sha256:abc",
            "label": "LABEL_0",
            "problem_type": "regression",
            "device": "cpu",
        }
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.computed = 0

    def encode(
        self,
        conversation: Sequence[Mapping[str, Any]] | str,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncation: str = "error",
    ) -> list[int]:
        if isinstance(conversation, str):
            return self.encode_rendered(conversation, truncation=truncation)
        for index, message in enumerate(conversation):
            if "FORBIDDEN" in str(message["content"]):
                raise ConversationError("refused", reason="template", message_index=index)
        text = json.dumps([*conversation, chat_template_kwargs or {}])
        return self.encode_rendered(text, truncation=truncation)

    def encode_response(
        self,
        prompt: Sequence[Mapping[str, Any]] | str,
        response: str,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncation: str = "error",
    ) -> list[int]:
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns.append({"role": "assistant", "content": response})
        return self.encode(turns, chat_template_kwargs=chat_template_kwargs, truncation=truncation)

    def encode_rendered(
        self, text: str, *, special_tokens: bool = False, truncation: str = "error"
    ) -> list[int]:
        return self.check_ids(list(text.encode()), truncation=truncation)

    def check_ids(self, ids: Sequence[int], *, truncation: str = "error") -> list[int]:
        if any(token >= self.vocab_size for token in ids):
            raise ConversationError("not in the vocabulary", reason="not_in_vocabulary")
        if len(ids) > self.max_length:
            if truncation == "error":
                raise ConversationError("too many tokens", reason="too_long")
            side = slice(-self.max_length, None) if truncation == "left" else slice(self.max_length)
            return list(ids)[side]
        return list(ids)

    def split(self, ids: Sequence[int]) -> int:
        return 0

    def has_text(self, ids: Sequence[int]) -> bool:
        return True

    def free_memory(self) -> None:
        raise AssertionError("it has no memory to free")

    def fit_memory(self) -> int:
        return 1000

    def score_encoded(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        self.entered.set()
        assert self.gate.wait(20)
        self.computed += len(sequences)
        return [math.nan if 299 in ids else reward_of(ids) for ids in sequences]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def reward_of(ids: Sequence[int]) -> float:
    return sum(token * (place % 7 - 3) for place, token in enumerate(ids)) / 1000


def talk(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]


Scope = Mapping[str, Any]
Play = Callable[[Any], Awaitable[None]]


class Flaky:
    """In front of the app, like a proxy: plays `script` first, one entry a request."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.script: list[Play] = []
        self.seen: list[dict[str, str]] = []

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            self.seen.append({key.decode(): value.decode() for key, value in scope["headers"]})
            if self.script:
                await self.script.pop(0)(send)
                return
        await self.app(scope, receive, send)


def says(status: int, body: bytes = b"", **headers: str) -> Play:
    async def play(send: Any) -> None:
        lines = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
        lines.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": lines})
        await send({"type": "http.response.body", "body": body})

    return play


async def drops(send: Any) -> None:
    """The connection breaks in the middle of a reply."""
    headers = [(b"content-length", b"1000")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b'{"id": "rew', "more_body": False})


class Served:
    """A server in a thread, and what a test may turn on it."""

    def __init__(self, **settings: Any) -> None:
        self.scorer = FakeScorer()
        self.service = RewardService(self.scorer, ServeConfig(model="fake", **settings))
        self.proxy = Flaky(create_app(lambda: self.service))
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(self.proxy, log_level="critical"))
        self._thread = threading.Thread(target=self._run, args=(listener,))

    def __enter__(self) -> Served:
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self._server.started
        return self

    def __exit__(self, *_: object) -> None:
        self.scorer.gate.set()
        self._server.should_exit = True
        self._thread.join(10)
        assert not self._thread.is_alive()

    def client(self, **settings: Any) -> RewardClient:
        return RewardClient(self.url, **settings)

    def post(self, body: Any = None, /, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return httpx.post(f"{self.url}/v1/reward", timeout=20, **options)

    def _run(self, listener: socket.socket) -> None:
        async def main() -> None:
            self.service.start()
            await self._server.serve([listener])

        asyncio.run(main())


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served() as server:
        yield server


@pytest.fixture(autouse=True)
def no_script_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "served" in request.fixturenames:
        assert request.getfixturevalue("served").proxy.script == []


# ---- the clients


def test_the_client_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys, raywards.client, raywards.schemas\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'fastapi') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == "[]"


def test_both_clients_have_the_same_methods_and_signatures() -> None:
    def surface(cls: type) -> dict[str, str]:
        def signature(member: Callable[..., Any]) -> str:
            # What the reward functions of the second return is awaited, too.
            return re.sub(r"Awaitable\[(.*?)\]\]", r"\1]", str(inspect.signature(member)))

        return {
            name.replace("__aenter__", "__enter__").replace("__aexit__", "__exit__"): (
                signature(member) + str(member.__doc__)
            )
            for name, member in inspect.getmembers(cls, inspect.isfunction)
            if not name.startswith("_") or name in ("__init__", "__repr__")
        }

    assert surface(RewardClient) == surface(AsyncRewardClient)
    assert {"score", "score_responses", "score_ids", "reward", "info", "ready"} <= set(
        surface(RewardClient)
    )


def test_rewards_are_those_of_the_scorer(served: Served) -> None:
    scorer = served.scorer
    with served.client() as client:
        talks = [talk(f"answer {n}" * n) for n in range(5)]
        assert client.score(talks) == [reward_of(scorer.encode(one)) for one in talks]
        assert client.score_responses("Hi", ["a", ""]) == [
            reward_of(scorer.encode_response("Hi", text)) for text in ("a", "")
        ]
        assert client.score_responses(talks[1], ["b"]) == [
            reward_of(scorer.encode_response(talks[1], "b"))
        ]
        assert client.score_ids([[1, 2], range(3)]) == [reward_of([1, 2]), reward_of([0, 1, 2])]
        assert client.score([]) == client.score_ids([]) == client.score_responses("x", []) == []


def test_the_async_client_gives_the_same(served: Served) -> None:
    async def main() -> None:
        async with AsyncRewardClient(served.url, max_items_per_request=2) as client:
            await client.wait_until_ready(5)
            assert await client.ready()
            talks = [talk(f"answer {n}") for n in range(9)]
            expected = [reward_of(served.scorer.encode(one)) for one in talks]
            assert await client.score(talks) == expected
            assert await client.score_responses("Hi", ["a"])
            assert await client.score_ids([[1]]) == [reward_of([1])]
            assert (await client.reward({"input": "a"})).data[0].reward == reward_of([97])
            assert (await client.info())["name"] == "rm"
            with pytest.raises(RequestRefusedError, match=r"messages\[5\]"):
                await client.score([*talks[:5], talk("FORBIDDEN"), talk("x")])

    asyncio.run(main())


def test_a_long_list_is_split_and_put_together_in_order(served: Served) -> None:
    served.proxy.seen.clear()
    with served.client(max_items_per_request=7) as client:
        rewards = client.score_ids([[n % 250, 1] for n in range(100)])
    assert rewards == [reward_of([n % 250, 1]) for n in range(100)]
    assert len(served.proxy.seen) == 15


def test_a_request_is_split_by_its_text_as_well(served: Served) -> None:
    served.proxy.seen.clear()
    with served.client() as client:
        client.score_ids([[1] * 1000] * 33)  # 4,000 characters each
    assert len(served.proxy.seen) == 3


def test_what_the_server_finds_too_large_is_halved() -> None:
    with Served(max_items_per_request=3, max_queued_tokens=20) as server, server.client() as client:
        assert client.score_ids([[n] for n in range(20)]) == [reward_of([n]) for n in range(20)]
        assert client.score_ids([[1] * 15, [2] * 15]) == [reward_of([1] * 15), reward_of([2] * 15)]


def test_an_error_names_the_position_in_the_callers_list(served: Served) -> None:
    with served.client(max_items_per_request=4) as client:
        with pytest.raises(RequestRefusedError) as caught:
            client.score([*[talk("a")] * 6, talk("FORBIDDEN")])
        assert caught.value.field == "messages[6][1]"
        assert "messages[6][1]" in str(caught.value)
        assert caught.value.status == 422
        assert caught.value.request_id


@pytest.mark.parametrize(
    "failures",
    [
        [says(500)],
        [says(500, b"<html>Internal Server Error</html>")],
        [says(502), says(504), says(408)],
        [says(503, b"no replica", retry_after="0")],
        [says(429, retry_after="0.01")],
        [drops, drops],
        [says(500, b'{"error": "a dict of somebody else"}')],
    ],
)
def test_what_a_dying_replica_leaves_behind_is_tried_again(
    served: Served, failures: list[Play]
) -> None:
    served.proxy.seen.clear()
    served.proxy.script = list(failures)
    with served.client() as client:
        assert client.score_ids([[1, 2, 3]]) == [reward_of([1, 2, 3])]
    assert len(served.proxy.seen) == len(failures) + 1
    assert len({headers["x-request-id"] for headers in served.proxy.seen}) == 1


def test_an_answer_of_the_server_itself_is_not_tried_again(served: Served) -> None:
    served.proxy.seen.clear()
    with served.client() as client:
        with pytest.raises(ServiceError, match="not a finite number") as caught:
            client.score_ids([[299]])
        assert caught.value.status == 500
        assert len(served.proxy.seen) == 1


def test_retries_end_with_their_number(served: Served) -> None:
    served.proxy.seen.clear()
    served.proxy.script = [says(503)] * 3
    with served.client(max_retries=2) as client, pytest.raises(OverloadedError) as caught:
        client.score_ids([[1]])
    assert caught.value.status == 503
    assert len(served.proxy.seen) == 3


def test_retries_end_with_the_time(served: Served) -> None:
    served.proxy.script = [says(503, retry_after="30")]
    started = time.monotonic()
    with served.client(timeout_s=1) as client, pytest.raises(OverloadedError) as caught:
        client.score_ids([[1]])
    assert caught.value.retry_after_s == 30
    assert time.monotonic() - started < 1


def test_a_reply_from_something_else_is_an_error(served: Served) -> None:
    with served.client() as client:
        for reply in (b"<html>hello</html>", b"[]", b'{"id": "x"}'):
            served.proxy.script = [says(200, reply)]
            with pytest.raises(ServiceError, match="not one of a raywards server"):
                client.score_ids([[1]])
        served.proxy.script = [says(404, b"not found")]
        with pytest.raises(RequestRefusedError, match="route prefix"):
            client.score_ids([[1]])
        served.proxy.script = [says(200, b"hello")]
        with pytest.raises(ServiceError, match="JSON object"):
            client.info()


def test_a_reply_that_lacks_a_reward_is_an_error(served: Served) -> None:
    whole = served.post({"input_ids": [[1], [2]]}).json()
    damages: list[Callable[[dict[str, Any]], Any]] = [
        lambda reply: reply["data"].pop(),
        lambda reply: reply["data"].reverse(),
        lambda reply: reply["data"][1].update(reward=None),
    ]
    with served.client() as client:
        for damage in damages:
            reply = json.loads(json.dumps(whole))
            damage(reply)
            served.proxy.script = [says(200, json.dumps(reply).encode())]
            with pytest.raises(ServiceError):
                client.score_ids([[1], [2]])


def test_nobody_at_the_address_is_unreachable() -> None:
    with RewardClient("http://127.0.0.1:9", max_retries=1) as client:
        with pytest.raises(UnreachableError, match="Is the server running"):
            client.score_ids([[1]])
        assert client.ready() is False
        with pytest.raises(UnreachableError):
            client.wait_until_ready(0.3)


def test_the_clients_own_time_limit_is_a_deadline() -> None:
    with Served() as server, server.client(timeout_s=0.3) as client:
        server.scorer.gate.clear()
        with pytest.raises(DeadlineError):
            client.score_ids([[1]])


def test_overload_is_waited_out_by_the_client() -> None:
    with Served(max_queued_tokens=10) as server, server.client() as client:
        server.scorer.gate.clear()
        waiting = []
        for ids in ([1], [2] * 8):  # one computes, one waits
            waiting.append(threading.Thread(target=server.post, args=({"input_ids": ids},)))
            waiting[-1].start()
            assert server.scorer.entered.wait(10)
        wait_until(lambda: server.service.info()["batcher"]["queued_tokens"] == 8)
        full = server.post({"input_ids": [3] * 5})
        assert full.status_code == 503
        assert int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["code"] == "overloaded_error"
        threading.Timer(0.3, server.scorer.gate.set).start()
        assert client.score_ids([[3] * 5]) == [reward_of([3] * 5)]
        for thread in waiting:
            thread.join()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda client: client.score(talk("a")), "put it in a list"),
        (lambda client: client.score("text"), "put it in a list"),
        (lambda client: client.score(["text"]), "score_responses"),
        (lambda client: client.score_responses("p", "r"), "put it in a list"),
        (lambda client: client.score_ids([1, 2]), "list of token ids"),
        (lambda client: client.score_ids([[1.5]]), "list of token ids"),
        (lambda client: client.score_ids(["12"]), "list of token ids"),
        (lambda client: client.score_ids([None]), "list of token ids"),
        (lambda client: client.score_ids(3), "expected a list"),
        (lambda client: client.score(None), "expected a list"),
        (lambda client: client.score([None]), r"conversations\[0\]: expected a list of messages"),
        (lambda client: client.score_texts([1]), r"texts\[0\]: expected text, got int"),
        (lambda client: client.score_texts("a"), "put it in a list"),
        (lambda client: client.score_responses("p", ["a", None]), r"responses\[1\]: expected text"),
        (lambda client: client.score_responses("p", 1), "expected a list"),
        (lambda client: client.score_responses(None, ["a"]), "prompt: expected text or a list"),
        (lambda client: client.score_responses({"role": "user"}, ["a"]), "prompt: expected text"),
        (lambda client: client.score_pairs([("a", "b", "c")]), r"pairs\[0\]: .*tuple of 3"),
        (lambda client: client.score_pairs(("a", "b")), r"pairs\[0\]: expected a pair"),
        (lambda client: client.score_pairs([("a", None)]), r"pairs\[0\]\[1\]: expected text"),
        (lambda client: client.score_pairs([(None, "a")]), r"pairs\[0\]\[0\]: expected text"),
        (lambda client: client.score_pairs([([{1: {2}}], "a")]), r"pairs\[0\]\[0\] cannot be"),
        (lambda client: client.score([[{"role": "user", "content": b"a"}]]), "JSON"),
        (lambda client: client.score([nested()]), "JSON"),
        (lambda client: client.reward(5), "RewardRequest or a dict"),
        (lambda client: client.reward({(1, 2): 3}), "JSON"),
        (lambda client: client.as_trl_reward_func()(["p"], ["a", "b"]), "1 prompts and 2"),
        (lambda client: client.as_trl_reward_func()([None], ["a"]), "expected text or a list"),
        (lambda client: client.as_trl_reward_func()([None], [[]]), r"prompts\[0\]: expected text"),
        (lambda client: client.reward({"input": {1, 2}}), "JSON"),
        (lambda client: client.reward({"input": "a", "timeout_s": math.nan}), "JSON"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_it_is_sent(
    call: Callable[[Any], Any], words: str
) -> None:
    with pytest.raises(ConversationError, match=words):
        call(RewardClient("http://127.0.0.1:9"))
    with pytest.raises(ConversationError, match=words):
        asyncio.run(call(AsyncRewardClient("http://127.0.0.1:9")))


def nested() -> list[Any]:
    """Deeper than JSON can be written."""
    found: list[Any] = []
    for _ in range(100_000):
        found = [found]
    return found


def test_what_can_be_read_once_is_scored(served: Served) -> None:
    scorer, talks = served.scorer, [talk("a"), talk("b")]
    expected = [reward_of(scorer.encode(one)) for one in talks]
    with served.client(max_items_per_request=1) as client:
        assert client.score(iter(one) for one in talks) == expected
        assert client.score_texts(text for text in "ab") == [reward_of([97]), reward_of([98])]
        assert client.score_ids(range(n) for n in (1, 2)) == [reward_of([0]), reward_of([0, 1])]
        assert client.score_responses(iter(talks[0]), iter("ab")) == [
            reward_of(scorer.encode_response(talks[0], text)) for text in "ab"
        ]
        pairs = [("p", "a"), (talks[0], "b"), ("p", "c")]
        assert client.score_pairs(iter(pairs)) == [
            reward_of(scorer.encode_response(*pair)) for pair in pairs
        ]


# ---- options, and completions that cannot be scored

LONG = "a" * 1001


def test_what_is_too_long_is_cut_where_that_is_asked_for(served: Served) -> None:
    scorer = served.scorer
    with served.client() as client:
        for method, given in [
            (client.score, [talk(LONG)]),
            (client.score_texts, [LONG]),
            (client.score_ids, [[1] * 1001]),
            (client.score_pairs, [("p", LONG)]),
            (
                lambda responses, **options: client.score_responses("p", responses, **options),
                [LONG],
            ),
        ]:
            with pytest.raises(RequestRefusedError, match="too many tokens"):
                method(given)
            assert len(method(given, truncation="right")) == 1
        ids = list(range(100))
        assert client.score_ids([ids], truncation="left", max_length=9) == [reward_of(ids[-9:])]
        assert client.score_texts([LONG + "b"], truncation="right") == [reward_of([97] * 1000)]
        assert client.score_ids([ids], max_length=None) == [reward_of(ids)]
        reward_func = client.as_trl_reward_func(truncation="left", max_length=9)
        assert reward_func(["p"], [LONG]) == [
            reward_of(scorer.encode_response("p", LONG, truncation="left")[-9:])
        ]
        compute_score = client.as_verl_compute_score(truncation="left", max_length=9)
        assert compute_score("any", LONG, None, {"prompt": "p"}) == reward_func(["p"], [LONG])[0]

    async def main() -> list[float]:
        async with AsyncRewardClient(served.url) as client:
            return await client.score_ids([ids], truncation="left", max_length=9)

    assert asyncio.run(main()) == [reward_of(ids[-9:])]


def test_variables_of_the_template_reach_it_by_every_method(served: Served) -> None:
    variables = {"thinking": True}
    pair = ("p", "a")
    expected = [
        reward_of(served.scorer.encode(talk("a"), chat_template_kwargs=variables)),
        reward_of(served.scorer.encode_response(*pair, chat_template_kwargs=variables)),
    ]
    with served.client() as client:
        told: dict[str, Any] = {"chat_template_kwargs": variables}
        reward_func = client.as_trl_reward_func(**told)
        assert client.score([talk("a")], **told) == reward_func([talk("a")[:1]], [talk("a")[1:]])
        assert client.score([talk("a")], **told) == expected[:1]
        assert client.score_pairs([pair], **told) == expected[1:]
        assert client.score_responses("p", ["a"], **told) == expected[1:]
        assert client.score([talk("a")]) != expected[:1]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda client: client.score([], truncate="left"), "Did you mean 'truncation'"),
        (lambda client: client.score([], on_error="item"), "on_error: unknown here"),
        (lambda client: client.score([], truncation="middle"), "expected 'error', 'left' or"),
        (lambda client: client.score([], max_length=0), "max_length"),
        (lambda client: client.score_ids([], chat_template_kwargs={}), "unknown here"),
        (lambda client: client.as_trl_reward_func(truncation="middle"), "truncation"),
        (lambda client: client.as_trl_reward_func(on_error="item"), "'raise' or 'none'"),
        (lambda client: client.as_verl_compute_score(max_length="9"), "max_length"),
    ],
)
def test_an_option_that_cannot_be_meant_is_a_config_error(
    call: Callable[[RewardClient], Any], words: str
) -> None:
    with RewardClient("http://127.0.0.1:9") as client, pytest.raises(ConfigError, match=words):
        call(client)


@pytest.mark.parametrize(
    "content", [None, "half \ud800", LONG, "FORBIDDEN", 7, [], "a" * 250_001], ids=repr
)
def test_a_completion_that_cannot_be_scored_has_none(served: Served, content: Any) -> None:
    """Whether a sequence is at fault, or the whole body breaks the schema because of it."""
    prompt = [{"role": "user", "content": "Hi"}]
    good = [[{"role": "assistant", "content": f"answer {n}"}] for n in range(6)]
    bad = [{"role": "assistant", "content": content}]
    completions = [*good[:2], bad, *good[2:], bad]
    expected = [reward_of(served.scorer.encode([*prompt, *one])) for one in good]
    with served.client(max_items_per_request=5) as client:
        found = client.as_trl_reward_func(on_error="none")([prompt] * 8, completions)
        assert found == [*expected[:2], None, *expected[2:], None]
        with pytest.raises(RequestRefusedError) as caught:
            client.as_trl_reward_func()([prompt] * 8, completions)
        assert (caught.value.field or "").startswith(("messages[2]", "messages[7]"))
        if isinstance(content, str):
            texts = ["one", content, "two"]
            tolerant = client.as_trl_reward_func(on_error="none")
            assert [one is None for one in tolerant(["p"] * 3, texts)] == [False, True, False]
            assert tolerant(["p", content, "q"], ["a"] * 3)[1] is None
            assert None not in tolerant(["p", "q"], ["a", "b"])

    async def main() -> list[float | None]:
        async with AsyncRewardClient(served.url, max_items_per_request=5) as client:
            return await client.as_trl_reward_func(on_error="none")([prompt] * 8, completions)

    assert asyncio.run(main()) == found


def test_what_is_wrong_with_every_completion_is_raised(served: Served) -> None:
    """`on_error="none"` would turn it into a run without rewards."""
    for settings, options in [
        ({"model": "another"}, {}),
        ({}, {"max_length": 100_000}),
        ({"base_url": f"{served.url}/nowhere"}, {}),
    ]:
        settings = {"base_url": served.url, **settings}
        with RewardClient(**settings) as client:
            reward_func = client.as_trl_reward_func(on_error="none", **options)
            with pytest.raises(RequestRefusedError):
                reward_func(["p"] * 2, ["a", "b"])


def test_a_completion_larger_than_a_body_has_none() -> None:
    with Served(max_body_bytes=2000) as server, server.client() as client:
        completions = ["a", "b" * 3000, "c"]
        found = client.as_trl_reward_func(on_error="none")(["p"] * 3, completions)
        assert [one is None for one in found] == [False, True, False]
        with pytest.raises(RequestRefusedError) as caught:
            client.as_trl_reward_func()(["p"] * 3, completions)
        assert caught.value.status == 413


def test_an_error_names_the_position_of_the_pair(served: Served) -> None:
    pairs = [("p", "a"), ("q", "b"), ("p", "FORBIDDEN")]
    with served.client() as client, pytest.raises(RequestRefusedError) as caught:
        client.score_pairs(pairs)
    assert caught.value.field == "responses[2]"


@pytest.mark.parametrize(
    "settings",
    [
        {"base_url": "localhost:8000"},
        {"base_url": "ftp://x"},
        {"base_url": "http://host:abc"},
        {"base_url": "http://host:99999"},
        {"base_url": "http://[::1"},
        {"base_url": "http://" + "a" * 64},
        {"base_url": "http://host/?key=1"},
        {"base_url": "http://"},
        {"base_url": None},
        {"api_key": ""},
        {"api_key": "a\nb"},
        {"timeout_s": 0},
        {"max_retries": -1},
        {"max_connections": 0},
        {"max_items_per_request": 0},
    ],
)
def test_a_bad_setting_is_a_config_error(settings: dict[str, Any]) -> None:
    for kind in (RewardClient, AsyncRewardClient):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            kind(**settings)


def test_the_key_is_sent_and_never_shown() -> None:
    with Served(api_key=KEY) as server:
        with server.client(api_key=KEY) as client:
            assert client.score_ids([[1]]) == [reward_of([1])]
            assert KEY not in repr(client)
            assert "***" in repr(client)
        for wrong in (None, "x", KEY + "x"):
            with server.client(api_key=wrong) as client:
                with pytest.raises(RequestRefusedError) as caught:
                    client.score_ids([[1]])
                assert caught.value.status == 401
                assert client.ready()


# ---- the app


def test_the_reply_has_all_that_was_promised(served: Served) -> None:
    response = served.post(
        {"messages": [talk("a"), talk("b")], "ids": ["x", "y"], "activation": "sigmoid"},
        headers={"x-request-id": "mine-1"},
    )
    assert response.status_code == 200
    assert response.headers["x-request-id"] == "mine-1"
    reply = response.json()
    assert reply["object"] == "list"
    assert (reply["model"], reply["revision"]) == ("rm", "sha256:abc")
    assert [row["index"] for row in reply["data"]] == [0, 1]
    assert [row["id"] for row in reply["data"]] == ["x", "y"]
    for row, text in zip(reply["data"], "ab", strict=True):
        ids = served.scorer.encode(talk(text))
        assert row["reward"] == reward_of(ids)
        assert row["score"] == pytest.approx(1 / (1 + math.exp(-row["reward"])))
        assert (row["num_tokens"], row["truncated"], row["error"]) == (len(ids), False, None)
    assert reply["usage"]["prompt_tokens"] == sum(row["num_tokens"] for row in reply["data"])
    assert set(reply["timing"]) == {"queue_ms", "tokenize_ms", "forward_ms", "batch_size"}


@pytest.mark.parametrize(("side", "kept"), [("left", slice(-4, None)), ("right", slice(4))])
def test_a_long_sequence_is_cut_on_the_side_that_was_asked_for(
    served: Served, side: str, kept: slice
) -> None:
    request = {"input_ids": [list(range(9)), [1, 2]], "max_length": 4, "truncation": side}
    rows = served.post(request).json()["data"]
    assert [row["truncated"] for row in rows] == [True, False]
    assert rows[0]["reward"] == reward_of(list(range(9))[kept])
    longer = served.post({"input": "a" * 1001, "truncation": side}).json()["data"][0]
    assert (longer["num_tokens"], longer["truncated"]) == (1000, True)


def test_variables_and_tools_reach_the_template(served: Served) -> None:
    tools = [{"type": "function"}]
    with served.client() as client:
        request = RewardRequest(
            messages=talk("a"), chat_template_kwargs={"thinking": True}, tools=tools
        )
        [row] = client.reward(request).data
    variables = {"thinking": True, "tools": tools}
    expected = served.scorer.encode(talk("a"), chat_template_kwargs=variables)
    assert row.reward == reward_of(expected)


REFUSED: list[tuple[dict[str, Any], int, str | None, str]] = [
    ({"input": "a", "model": "other"}, 404, "model", "model_not_found"),
    ({"input": "a", "model": "rm@sha256:old"}, 404, "model", "model_not_found"),
    ({"input": "a", "max_length": 1001}, 422, "max_length", "invalid_value"),
    ({"input": "a" * 1001}, 422, "input", "too_long"),
    ({"input": ["a", "b" * 5], "max_length": 4}, 422, "input[1]", "too_long"),
    ({"input": "a" * 250_001, "truncation": "left"}, 422, "input", "too_long"),
    ({"input_ids": [[1], [300]]}, 422, "input_ids[1]", "not_in_vocabulary"),
    ({"messages": talk("FORBIDDEN")}, 422, "messages[1]", "template"),
    ({"prompt": talk("FORBIDDEN"), "responses": ["a"]}, 422, "prompt[1]", "template"),
    ({"prompt": "a", "responses": ["b", "FORBIDDEN"]}, 422, "responses[1]", "template"),
    ({"input_ids": [[1]] * 1025}, 413, None, "too_many_items"),
    ({"input": "a", "frob": 1}, 422, "frob", "unknown_field"),
]


@pytest.mark.parametrize(("body", "status", "param", "code"), REFUSED)
def test_a_request_that_cannot_be_served_is_refused_by_field(
    served: Served, body: dict[str, Any], status: int, param: str | None, code: str
) -> None:
    response = served.post(body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["request_id"] == response.headers["x-request-id"]
    assert served.post({"input": "a"}).status_code == 200


def test_the_model_may_be_named_with_its_revision(served: Served) -> None:
    for model in ("rm", "rm@sha256:abc"):
        assert served.post({"input": "a", "model": model}).status_code == 200


@pytest.mark.parametrize(
    ("options", "status"),
    [
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"content": b"{}"}, 415),
        ({"json": {"input": "a"}, "headers": {"content-encoding": "gzip"}}, 415),
        ({"content": b"", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"{", "headers": {"content-type": "application/json; charset=utf-8"}}, 400),
        ({"content": b"[]", "headers": {"content-type": "application/json"}}, 422),
    ],
)
def test_a_body_of_the_wrong_kind_is_refused(
    served: Served, options: dict[str, Any], status: int
) -> None:
    response = served.post(**options)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    with Served(max_body_bytes=100) as server:
        assert server.post({"input": "a" * 50}).status_code == 200
        assert server.post({"input": "a" * 100}).status_code == 413

        def pieces() -> Iterator[bytes]:  # chunked: no length is declared
            yield b'{"input": "'
            yield from [b"a" * 40] * 5
            yield b'"}'

        headers = {"content-type": "application/json"}
        assert server.post(content=pieces(), headers=headers).status_code == 413


def test_a_large_body_is_read_whole(served: Served) -> None:
    rows = served.post({"input_ids": [[n % 250] * 400 for n in range(500)]}).json()["data"]
    assert [row["reward"] for row in rows] == [reward_of([n % 250] * 400) for n in range(500)]


def test_a_bad_item_may_fail_alone(served: Served) -> None:
    body = {"input_ids": [[1], [300], [299], [2], [7] * 1001], "on_error": "item"}
    rows = served.post(body).json()["data"]
    assert [row["reward"] for row in rows] == [reward_of([1]), None, None, reward_of([2]), None]
    assert [row["error"] and row["error"]["code"] for row in rows] == [
        None,
        "not_in_vocabulary",
        "non_finite_reward",
        None,
        "too_long",
    ]
    with served.client() as client:
        assert client.reward(body).data[1].error is not None


def test_the_deadline_of_a_request_is_kept() -> None:
    with Served() as server:
        server.scorer.gate.clear()
        response = server.post({"input": "a", "timeout_s": 0.2})
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "timeout_error"
        server.scorer.gate.set()
        assert server.post({"input": "a"}).status_code == 200


def test_a_failure_inside_shows_only_its_request_id(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> list[int]:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(served.scorer, "check_ids", explode)
    response = served.post({"input_ids": [1]}, headers={"x-request-id": "find-me"})
    assert response.status_code == 500
    assert "secret" not in response.text
    assert "find-me" in response.json()["error"]["message"]


def test_headers_that_forge_a_key_are_refused() -> None:
    with Served(api_key=KEY) as server:
        attempts: list[list[tuple[str, str]]] = [
            [],
            [("authorization", "Bearer")],
            [("authorization", f"Basic {KEY}")],
            [("authorization", KEY)],
            [("authorization", f"Bearer {KEY}"), ("authorization", "Bearer x")],
            [("x-api-key", KEY)],
        ]
        for headers in attempts:
            response = server.post({"input": "a"}, headers=headers)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"
        assert httpx.post(f"{server.url}/v1/reward?api_key={KEY}", json={}).status_code == 401
        bearer = {"authorization": f"bearer {KEY}"}
        assert server.post({"input": "a"}, headers=bearer).status_code == 200


def test_other_paths_and_methods_get_the_same_kind_of_error(served: Served) -> None:
    for method, path, status in [
        ("GET", "/v1/reward", 405),
        ("POST", "/v1/rewards", 404),
        ("GET", "/nowhere", 404),
    ]:
        response = httpx.request(method, served.url + path)
        assert response.status_code == status
        assert "/v1/reward" in response.json()["error"]["message"]


def test_the_docs_show_the_body_that_is_parsed_by_hand(served: Served) -> None:
    schema = httpx.get(f"{served.url}/openapi.json").json()
    body = schema["paths"]["/v1/reward"]["post"]["requestBody"]["content"]["application/json"]
    assert body["schema"]["$ref"].endswith("/RewardRequest")
    schemas = schema["components"]["schemas"]
    assert {"RewardRequest", "Message", "RewardResponse", "ErrorBody"} <= set(schemas)
    assert "input_ids" in schemas["RewardRequest"]["properties"]
    text = json.dumps(schema)
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    assert httpx.get(f"{served.url}/docs").status_code == 200


def test_info_tells_model_limits_and_load(served: Served) -> None:
    with served.client() as client:
        info = client.info()
    assert info["name"] == "rm"
    assert info["revision"] == "sha256:abc"
    assert info["limits"]["max_length"] == 1000
    assert info["batcher"]["queued_tokens"] == 0


def test_a_stopping_server_says_so_and_finishes_what_it_took() -> None:
    with Served() as server:
        server.scorer.gate.clear()
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(server.post({"input": "a"})))
        thread.start()
        assert server.scorer.entered.wait(10)
        loop_calls = asyncio.run_coroutine_threadsafe(server.service.close(), server_loop(server))
        wait_until(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        assert server.post({"input": "b"}).status_code == 503
        server.scorer.gate.set()
        loop_calls.result(10)
        thread.join(10)
        assert answers[0].status_code == 200


def test_no_text_of_a_request_reaches_the_log(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="raywards"):
        served.post({"input": "PRIVATE-TEXT"})
        served.post({"messages": talk("FORBIDDEN PRIVATE-TEXT")})
        served.post({"PRIVATE-TEXT": 1})
    lines = [json.loads(r.getMessage()) for r in caplog.records if r.name.startswith("raywards")]
    assert [line["event"] for line in lines] == ["scored", "refused", "refused"]
    assert all(line["request_id"] for line in lines)
    assert "PRIVATE-TEXT" not in caplog.text


@pytest.mark.parametrize("fails", ["score_encoded", "encode_rendered"])
def test_no_text_of_an_exception_reaches_log_or_caller(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    def fail(*_: object, **__: object) -> Any:
        try:
            raise ValueError("PRIVATE-TEXT")
        except ValueError as error:
            raise KeyError("PRIVATE-TEXT too") from error

    with Served() as server, caplog.at_level("INFO", logger="raywards"):
        monkeypatch.setattr(server.scorer, fails, fail)
        if fails == "score_encoded":
            server.service._batcher._score = fail
        response = server.post({"input": "PRIVATE-TEXT"})
    assert response.status_code == 500
    assert "PRIVATE-TEXT" not in response.text + caplog.text
    [told] = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert "KeyError at" in told
    assert "caused by ValueError at" in told
    assert "test_client.py:" in told


def test_a_batcher_that_dies_tells_no_text(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Any:
        raise ValueError("PRIVATE-TEXT")

    with Served() as server:
        monkeypatch.setattr(server.service._batcher, "_fill", fail)
        response = server.post({"input": "a"})
    assert response.status_code == 500
    assert "the batcher died: ValueError at" in caplog.text
    assert "PRIVATE-TEXT" not in response.text + caplog.text


@pytest.mark.parametrize(
    ("settings", "device"),
    [({}, "cpu"), ({"num_gpus": 0.5}, "cuda"), ({"num_gpus": 1, "device": "cuda:1"}, "cuda:1")],
)
def test_a_replica_takes_a_gpu_only_where_it_has_one(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], device: str
) -> None:
    from raywards.scorer import Scorer

    asked = []

    def from_pretrained(folder: str, **settings: Any) -> Any:
        asked.append(settings["device"])
        return FakeScorer()

    monkeypatch.setattr(Scorer, "from_pretrained", from_pretrained)
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # so that it is put back
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    load(ServeConfig(model="fake", verify=False, **settings))
    assert asked == [device]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"


def test_a_dead_batcher_makes_the_health_check_fail() -> None:
    with Served() as server, server.client(max_retries=0) as client:
        loop = server_loop(server)
        asyncio.run_coroutine_threadsafe(server.service.check(), loop).result(10)
        owner = server.service._batcher._owner
        assert owner is not None
        loop.call_soon_threadsafe(owner.cancel)
        deadline = time.monotonic() + 5
        while server.service.healthy and time.monotonic() < deadline:
            time.sleep(0.01)
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert client.ready() is False
        with pytest.raises(ServiceError):
            asyncio.run_coroutine_threadsafe(server.service.check(), loop).result(10)


def server_loop(server: Served) -> asyncio.AbstractEventLoop:
    owner = server.service._batcher._owner
    assert owner is not None
    return owner.get_loop()


def test_many_clients_at_once_get_their_own_answers(served: Served) -> None:
    async def main() -> None:
        async with AsyncRewardClient(served.url) as client:
            asked = [[[n % 250, m] for m in range(n % 5 + 1)] for n in range(200)]
            found = await asyncio.gather(*map(client.score_ids, asked))
            assert found == [[reward_of(ids) for ids in one] for one in asked]

    asyncio.run(main())
