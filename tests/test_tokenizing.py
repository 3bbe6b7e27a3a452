"""The line in front of the tokenizer: nobody is held up, and nobody waits past a deadline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from raywards.errors import DeadlineError, RequestRefusedError
from raywards.serve.dialects import Ids, Rendered, ScoringRequest
from raywards.serve.tokenizing import Encoded, Tokenizer


class Encoder:
    """Takes its time, and remembers what it was asked for."""

    max_length = 100

    def __init__(self, item_s: float = 0.0) -> None:
        self.item_s = item_s
        self.asked: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def encode_rendered(self, text: str, **_: Any) -> list[int]:
        assert self.gate.wait(20)
        time.sleep(self.item_s)
        self.asked.append(text)
        if text == "broken":
            raise KeyError(text)
        return list(map(ord, text))

    def split(self, ids: Sequence[int]) -> int:
        return 0

    def has_text(self, ids: Sequence[int]) -> bool:
        return True


def request(*texts: str, **options: Any) -> ScoringRequest:
    items = [Rendered(f"input[{i}]", text) for i, text in enumerate(texts)]
    return ScoringRequest(items, **options)


def play(scenario: Callable[[Tokenizer, Encoder], Awaitable[None]], item_s: float = 0.0) -> None:
    async def run() -> None:
        encoder: Any = Encoder(item_s)
        tokenizer = Tokenizer(encoder)
        try:
            await asyncio.wait_for(scenario(tokenizer, encoder), 20)
            assert tokenizer.waiting_tokens == 0
        finally:
            encoder.gate.set()
            tokenizer.close()

    asyncio.run(run())


async def encoded(tokenizer: Tokenizer, asked: ScoringRequest, within_s: float = 10.0) -> list[Any]:
    return await tokenizer.encode(asked, time.monotonic() + within_s, tokenizer.guess(asked))


def test_each_request_gets_its_own_ids_in_order() -> None:
    async def scenario(tokenizer: Tokenizer, _: Encoder) -> None:
        asked = [request(*(f"{n} {i}" for i in range(n % 5 + 1))) for n in range(200)]
        found = await asyncio.gather(*(encoded(tokenizer, one) for one in asked))
        for one, items in zip(asked, found, strict=True):
            texts = ["".join(map(chr, item.ids)) for item in items]
            assert texts == [item.text for item in one.items]  # type: ignore[attr-defined]

    play(scenario)


def test_large_requests_do_not_hold_up_a_small_one() -> None:
    async def scenario(tokenizer: Tokenizer, encoder: Encoder) -> None:
        large = [
            asyncio.create_task(encoded(tokenizer, request(*map(str, range(400)))))
            for _ in range(3)  # more than there are threads
        ]
        while len(encoder.asked) < 4:
            await asyncio.sleep(0.001)
        before = len(encoder.asked)
        await encoded(tokenizer, request("small"))
        # Each of the others had a turn before it, and no more than that.
        assert encoder.asked.index("small") - before < 100
        assert [len(items) for items in await asyncio.gather(*large)] == [400] * 3

    play(scenario, item_s=0.002)


def test_nobody_waits_past_a_deadline_however_long_a_text_takes() -> None:
    async def scenario(tokenizer: Tokenizer, encoder: Encoder) -> None:
        encoder.gate.clear()
        stuck = [asyncio.create_task(encoded(tokenizer, request("long"))) for _ in range(2)]
        await asyncio.sleep(0)  # they are in front
        started = time.monotonic()
        with pytest.raises(DeadlineError):
            await encoded(tokenizer, request("small"), within_s=0.1)
        assert time.monotonic() - started < 5
        encoder.gate.set()
        await asyncio.gather(*stuck)
        await encoded(tokenizer, request("next"))
        assert "small" not in encoder.asked

    play(scenario)


def test_who_leaves_stops_the_work() -> None:
    async def scenario(tokenizer: Tokenizer, encoder: Encoder) -> None:
        leaver = asyncio.create_task(encoded(tokenizer, request(*map(str, range(4000)))))
        while len(encoder.asked) < 4:
            await asyncio.sleep(0.001)
        leaver.cancel()
        await asyncio.wait([leaver])
        await encoded(tokenizer, request("next"))
        assert len(encoder.asked) < 3900

    play(scenario, item_s=0.002)


def test_a_bad_item_fails_the_request_or_itself_as_asked() -> None:
    async def scenario(tokenizer: Tokenizer, encoder: Encoder) -> None:
        far_too_long = "x" * 25_001
        with pytest.raises(RequestRefusedError, match=r"^input\[1\]: 25001 characters"):
            await encoded(tokenizer, request("a", far_too_long, "b"))
        assert "b" not in encoder.asked
        found = await encoded(tokenizer, request("a", far_too_long, "b", fails_as_a_whole=False))
        assert [isinstance(one, Encoded) for one in found] == [True, False, True]
        with pytest.raises(KeyError):
            await encoded(tokenizer, request("broken"))

    play(scenario)


def test_no_item_is_guessed_to_have_more_tokens_than_the_model_takes() -> None:
    async def scenario(tokenizer: Tokenizer, _: Encoder) -> None:
        assert tokenizer.guess(request("x" * 24_000, "y" * 40)) == 100 + 10
        ids = [Ids("input_ids[0]", [5] * 30), Ids("input_ids[1]", [5] * 3000)]
        assert tokenizer.guess(ScoringRequest(ids)) == 30 + 100

    play(scenario)
