"""`RewardClient` and `AsyncRewardClient`: rewards from a served model over HTTP.

    with RewardClient("http://127.0.0.1:8000") as client:
        rewards = client.score([[{"role": "user", "content": "2+2?"},
                                 {"role": "assistant", "content": "4"}]])

Scoring changes nothing on the server, so a request that meets a full, restarting or killed replica
is sent again, until `timeout_s` is over or `max_retries` are used up: `plans.py` decides that.
`as_trl_reward_func` and `as_verl_compute_score` make of a client what those trainers call. Imports
neither torch, ray nor transformers.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import httpx

from raywards.client import rlhf
from raywards.client.plans import (
    PARALLEL_REQUESTS,
    Conversation,
    Outcome,
    Pause,
    Plan,
    Plans,
    T,
)
from raywards.schemas import RewardRequest, RewardResponse

__all__ = ["AsyncRewardClient", "RewardClient"]


class RewardClient(Plans):
    """Rewards from a served model. Threads may share one; it keeps connections open."""

    _http: httpx.Client

    def _open(self, limits: httpx.Limits) -> None:
        self._http = httpx.Client(limits=limits)

    def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """One reward per conversation, in order. A conversation is a list of messages."""
        return self._gather(self._of_conversations(conversations))

    def score_responses(self, prompt: str | Conversation, responses: Sequence[str]) -> list[float]:
        """One reward per answer to `prompt`, in order."""
        return self._gather(self._of_responses(prompt, responses))

    def score_ids(self, sequences: Iterable[Iterable[int]]) -> list[float]:
        """One reward per sequence of token ids, in order. The ids are scored as they are."""
        return self._gather(self._of_ids(sequences))

    def score_pairs(self, pairs: Sequence[tuple[str | Conversation, str]]) -> list[float]:
        """One reward per pair of a prompt and an answer to it, in order."""
        plans, order = self._of_pairs(pairs)
        return _in_order(self._gather(plans), order)

    def score_texts(self, texts: Sequence[str]) -> list[float]:
        """One reward per text that a chat template has rendered already, in order."""
        return self._gather(self._of_texts(texts))

    def reward(self, request: RewardRequest | Mapping[str, Any]) -> RewardResponse:
        """The whole reply to one request of the native format. Nothing is split."""
        return self._carry_out(self._reward(request))

    def info(self) -> dict[str, Any]:
        """What is served there: model, revision, limits, rendering."""
        return self._carry_out(self._info())

    def ready(self) -> bool:
        """Whether a replica answers and has verified its model; False if nothing answers."""
        return self._carry_out(self._ready())

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return once `ready()`; after `timeout_s` raise what stood in the way."""
        self._carry_out(self._until_ready(timeout_s))

    def as_trl_reward_func(
        self, *, name: str = "raywards", on_error: rlhf.OnError = "raise"
    ) -> Callable[..., list[float | None]]:
        """A function for `reward_funcs` of TRL's trainers.

        Args:
            name: Its `__name__`, which TRL logs `rewards/NAME/mean` under.
            on_error: What becomes of a completion that the server refuses, such as one that is too
                long: `raise`, or `none`, which TRL leaves out of that group.
        """
        rlhf.check_on_error(on_error)

        def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **_: Any
        ) -> list[float | None]:
            given = rlhf.of_trl(prompts, completions)
            mode = "item" if on_error == "none" else "request"
            if given and isinstance(given[0], tuple):
                plans, order = self._of_pairs(given, on_error=mode)
                return _in_order(self._gather(plans), order)
            plans = self._of_conversations(given, on_error=mode)  # type: ignore[arg-type]
            return list(self._gather(plans))

        reward.__name__ = name
        return reward

    def as_verl_compute_score(
        self, *, prompt: str | Callable[[Mapping[str, Any]], Any] = "prompt"
    ) -> Callable[..., float]:
        """A function for verl's `custom_reward_function`.

        `prompt`: the key of `extra_info` under which the rows keep their prompt (text or messages),
        or a function that finds it there.
        """

        def compute_score(
            data_source: str,
            solution_str: str,
            ground_truth: Any,
            extra_info: Mapping[str, Any] | None = None,
            **_: Any,
        ) -> float:
            pair = rlhf.of_verl(prompt, solution_str, extra_info)
            [score] = self.score_pairs([pair])
            return score

        return compute_score

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _gather(self, plans: Sequence[Plan[list[float]]]) -> list[float]:
        if len(plans) < 2:
            return [reward for plan in plans for reward in self._carry_out(plan)]
        with ThreadPoolExecutor(min(len(plans), PARALLEL_REQUESTS)) as pool:
            running = [pool.submit(self._carry_out, plan) for plan in plans]
            try:
                return [reward for future in running for reward in future.result()]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _carry_out(self, plan: Plan[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = plan.send(outcome)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                outcome = None
            else:
                try:
                    outcome = self._http.request(**self._request(step))
                except httpx.TransportError as error:
                    outcome = error


class AsyncRewardClient(Plans):
    """`RewardClient` for asyncio: the same methods, to be awaited."""

    _http: httpx.AsyncClient

    def _open(self, limits: httpx.Limits) -> None:
        self._http = httpx.AsyncClient(limits=limits)

    async def score(self, conversations: Sequence[Conversation]) -> list[float]:
        """One reward per conversation, in order. A conversation is a list of messages."""
        return await self._gather(self._of_conversations(conversations))

    async def score_responses(
        self, prompt: str | Conversation, responses: Sequence[str]
    ) -> list[float]:
        """One reward per answer to `prompt`, in order."""
        return await self._gather(self._of_responses(prompt, responses))

    async def score_ids(self, sequences: Iterable[Iterable[int]]) -> list[float]:
        """One reward per sequence of token ids, in order. The ids are scored as they are."""
        return await self._gather(self._of_ids(sequences))

    async def score_pairs(self, pairs: Sequence[tuple[str | Conversation, str]]) -> list[float]:
        """One reward per pair of a prompt and an answer to it, in order."""
        plans, order = self._of_pairs(pairs)
        return _in_order(await self._gather(plans), order)

    async def score_texts(self, texts: Sequence[str]) -> list[float]:
        """One reward per text that a chat template has rendered already, in order."""
        return await self._gather(self._of_texts(texts))

    async def reward(self, request: RewardRequest | Mapping[str, Any]) -> RewardResponse:
        """The whole reply to one request of the native format. Nothing is split."""
        return await self._carry_out(self._reward(request))

    async def info(self) -> dict[str, Any]:
        """What is served there: model, revision, limits, rendering."""
        return await self._carry_out(self._info())

    async def ready(self) -> bool:
        """Whether a replica answers and has verified its model; False if nothing answers."""
        return await self._carry_out(self._ready())

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return once `ready()`; after `timeout_s` raise what stood in the way."""
        await self._carry_out(self._until_ready(timeout_s))

    def as_trl_reward_func(
        self, *, name: str = "raywards", on_error: rlhf.OnError = "raise"
    ) -> Callable[..., Awaitable[list[float | None]]]:
        """A function for `reward_funcs` of TRL's trainers.

        Args:
            name: Its `__name__`, which TRL logs `rewards/NAME/mean` under.
            on_error: What becomes of a completion that the server refuses, such as one that is too
                long: `raise`, or `none`, which TRL leaves out of that group.
        """
        rlhf.check_on_error(on_error)

        async def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **_: Any
        ) -> list[float | None]:
            given = rlhf.of_trl(prompts, completions)
            mode = "item" if on_error == "none" else "request"
            if given and isinstance(given[0], tuple):
                plans, order = self._of_pairs(given, on_error=mode)
                return _in_order(await self._gather(plans), order)
            plans = self._of_conversations(given, on_error=mode)  # type: ignore[arg-type]
            return list(await self._gather(plans))

        reward.__name__ = name
        return reward

    def as_verl_compute_score(
        self, *, prompt: str | Callable[[Mapping[str, Any]], Any] = "prompt"
    ) -> Callable[..., Awaitable[float]]:
        """A function for verl's `custom_reward_function`.

        `prompt`: the key of `extra_info` under which the rows keep their prompt (text or messages),
        or a function that finds it there.
        """

        async def compute_score(
            data_source: str,
            solution_str: str,
            ground_truth: Any,
            extra_info: Mapping[str, Any] | None = None,
            **_: Any,
        ) -> float:
            pair = rlhf.of_verl(prompt, solution_str, extra_info)
            [score] = await self.score_pairs([pair])
            return score

        return compute_score

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _gather(self, plans: Sequence[Plan[list[float]]]) -> list[float]:
        limit = asyncio.Semaphore(PARALLEL_REQUESTS)

        async def within_limit(plan: Plan[list[float]]) -> list[float]:
            async with limit:
                return await self._carry_out(plan)

        running = [asyncio.ensure_future(within_limit(plan)) for plan in plans]
        try:
            return [reward for rewards in await asyncio.gather(*running) for reward in rewards]
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _carry_out(self, plan: Plan[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = plan.send(outcome)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                outcome = None
            else:
                try:
                    outcome = await self._http.request(**self._request(step))
                except httpx.TransportError as error:
                    outcome = error


def _in_order(rewards: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """Rewards at their positions."""
    placed = dict(zip(order, rewards, strict=True))
    return [placed[index] for index in range(len(order))]
