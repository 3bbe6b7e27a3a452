"""`RewardClient` and `AsyncRewardClient`: rewards from a served model over HTTP.

    with RewardClient("http://127.0.0.1:8000") as client:
        rewards = client.score([[{"role": "user", "content": "2+2?"},
                                 {"role": "assistant", "content": "4"}]])

Scoring changes nothing on the server, so a request that meets a full, restarting or killed replica
is sent again, until `timeout_s` is over or `max_retries` are used up: `plans.py` decides that, and
`blocking.py` and `loops.py` carry it out. `as_trl_reward_func` and `as_verl_compute_score` make of
a client what those trainers call. Imports neither torch, ray nor transformers.

What the methods that score take beside their sequences (`truncation`, `max_length`, and
`chat_template_kwargs`, `tools` where the server renders) are fields of `POST /v1/reward`, with the
same meaning: docs/http.md. They raise `InputError` for what cannot be meant, `ServiceError` where
no reward came.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

from raywards.client import rlhf
from raywards.client.blocking import Blocking
from raywards.client.inputs import Conversation, Cut, Options, as_options
from raywards.client.loops import Loops
from raywards.client.plans import Plans
from raywards.schemas import RewardRequest, RewardResponse

__all__ = ["AsyncRewardClient", "RewardClient"]


class RewardClient(Plans):
    """Rewards from a served model. Threads may share one; it keeps connections open."""

    _transport: Blocking

    def _open(self, max_connections: int, trust_env: bool) -> None:
        self._transport = Blocking(max_connections, trust_env)

    def score(
        self, conversations: Iterable[Conversation], **options: Unpack[Options]
    ) -> list[float]:
        """One reward per conversation, in order. A conversation is a list of messages."""
        return self._transport.gather(
            self._of_conversations(conversations, as_options(options, Options))
        )

    def score_responses(
        self,
        prompt: str | Conversation,
        responses: Iterable[str],
        **options: Unpack[Options],
    ) -> list[float]:
        """One reward per answer to `prompt`, in order."""
        return self._transport.gather(
            self._of_responses(prompt, responses, as_options(options, Options))
        )

    def score_ids(self, sequences: Iterable[Iterable[int]], **options: Unpack[Cut]) -> list[float]:
        """One reward per sequence of token ids, in order. The ids are scored as they are."""
        return self._transport.gather(self._of_ids(sequences, as_options(options, Cut)))

    def score_pairs(
        self, pairs: Iterable[tuple[str | Conversation, str]], **options: Unpack[Options]
    ) -> list[float]:
        """One reward per pair of a prompt and an answer to it, in order."""
        return self._transport.gather(self._of_pairs(pairs, as_options(options, Options)))

    def score_texts(self, texts: Iterable[str], **options: Unpack[Cut]) -> list[float]:
        """One reward per text that a chat template has rendered already, in order."""
        return self._transport.gather(self._of_texts(texts, as_options(options, Cut)))

    def reward(self, request: RewardRequest | Mapping[str, Any]) -> RewardResponse:
        """The whole reply to one request of the native format. Nothing is split."""
        return self._transport.carry_out(self._reward(request))

    def info(self) -> dict[str, Any]:
        """What is served there: model, revision, limits, rendering."""
        return self._transport.carry_out(self._info())

    def ready(self) -> bool:
        """Whether a replica answers and has verified its model; False if nothing answers."""
        return self._transport.carry_out(self._ready())

    def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return once `ready()`; after `timeout_s` raise what stood in the way."""
        self._transport.carry_out(self._until_ready(timeout_s))

    def as_trl_reward_func(
        self,
        *,
        name: str = "raywards",
        on_error: rlhf.OnError = "raise",
        **options: Unpack[Options],
    ) -> Callable[..., list[float | None]]:
        """A function for `reward_funcs` of TRL's trainers.

        Args:
            name: Its `__name__`, which TRL logs `rewards/NAME/mean` under.
            on_error: What becomes of a completion that the server refuses, such as one that is too
                long or empty: `raise`, or `none`, which TRL leaves out of that group. What is wrong
                with the request as a whole (another model, a key) is raised in both cases.
            options: As for `score`.
        """
        wanted = {**as_options(options, Options), **rlhf.of_on_error(on_error)}

        def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **_: Any
        ) -> list[float | None]:
            return self._transport.gather(self._of_trl(prompts, completions, wanted))

        reward.__name__ = name
        return reward

    def as_verl_compute_score(
        self,
        *,
        prompt: str | Callable[[Mapping[str, Any]], Any] = "prompt",
        **options: Unpack[Options],
    ) -> Callable[..., float]:
        """A function for verl's `custom_reward_function`.

        Args:
            prompt: The key of `extra_info` under which the rows keep their prompt (text or
                messages), or a function that finds it there.
            options: As for `score`.
        """
        wanted = as_options(options, Options)

        def compute_score(
            data_source: str,
            solution_str: str,
            ground_truth: Any,
            extra_info: Mapping[str, Any] | None = None,
            **_: Any,
        ) -> float:
            pair = rlhf.of_verl(prompt, solution_str, extra_info)
            [score] = self._transport.gather(self._of_pairs([pair], wanted))
            return float(score)

        return compute_score

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class AsyncRewardClient(Plans):
    """`RewardClient` for asyncio: the same methods, to be awaited, on any event loop."""

    _transport: Loops

    def _open(self, max_connections: int, trust_env: bool) -> None:
        self._transport = Loops(max_connections, trust_env)

    async def score(
        self, conversations: Iterable[Conversation], **options: Unpack[Options]
    ) -> list[float]:
        """One reward per conversation, in order. A conversation is a list of messages."""
        return await self._transport.gather(
            self._of_conversations(conversations, as_options(options, Options))
        )

    async def score_responses(
        self,
        prompt: str | Conversation,
        responses: Iterable[str],
        **options: Unpack[Options],
    ) -> list[float]:
        """One reward per answer to `prompt`, in order."""
        return await self._transport.gather(
            self._of_responses(prompt, responses, as_options(options, Options))
        )

    async def score_ids(
        self, sequences: Iterable[Iterable[int]], **options: Unpack[Cut]
    ) -> list[float]:
        """One reward per sequence of token ids, in order. The ids are scored as they are."""
        return await self._transport.gather(self._of_ids(sequences, as_options(options, Cut)))

    async def score_pairs(
        self, pairs: Iterable[tuple[str | Conversation, str]], **options: Unpack[Options]
    ) -> list[float]:
        """One reward per pair of a prompt and an answer to it, in order."""
        return await self._transport.gather(self._of_pairs(pairs, as_options(options, Options)))

    async def score_texts(self, texts: Iterable[str], **options: Unpack[Cut]) -> list[float]:
        """One reward per text that a chat template has rendered already, in order."""
        return await self._transport.gather(self._of_texts(texts, as_options(options, Cut)))

    async def reward(self, request: RewardRequest | Mapping[str, Any]) -> RewardResponse:
        """The whole reply to one request of the native format. Nothing is split."""
        return await self._transport.carry_out(self._reward(request))

    async def info(self) -> dict[str, Any]:
        """What is served there: model, revision, limits, rendering."""
        return await self._transport.carry_out(self._info())

    async def ready(self) -> bool:
        """Whether a replica answers and has verified its model; False if nothing answers."""
        return await self._transport.carry_out(self._ready())

    async def wait_until_ready(self, timeout_s: float = 60.0) -> None:
        """Return once `ready()`; after `timeout_s` raise what stood in the way."""
        await self._transport.carry_out(self._until_ready(timeout_s))

    def as_trl_reward_func(
        self,
        *,
        name: str = "raywards",
        on_error: rlhf.OnError = "raise",
        **options: Unpack[Options],
    ) -> Callable[..., Awaitable[list[float | None]]]:
        """A function for `reward_funcs` of TRL's trainers.

        Args:
            name: Its `__name__`, which TRL logs `rewards/NAME/mean` under.
            on_error: What becomes of a completion that the server refuses, such as one that is too
                long or empty: `raise`, or `none`, which TRL leaves out of that group. What is wrong
                with the request as a whole (another model, a key) is raised in both cases.
            options: As for `score`.
        """
        wanted = {**as_options(options, Options), **rlhf.of_on_error(on_error)}

        async def reward(
            prompts: Sequence[Any], completions: Sequence[Any], **_: Any
        ) -> list[float | None]:
            return await self._transport.gather(self._of_trl(prompts, completions, wanted))

        reward.__name__ = name
        return reward

    def as_verl_compute_score(
        self,
        *,
        prompt: str | Callable[[Mapping[str, Any]], Any] = "prompt",
        **options: Unpack[Options],
    ) -> Callable[..., Awaitable[float]]:
        """A function for verl's `custom_reward_function`.

        Args:
            prompt: The key of `extra_info` under which the rows keep their prompt (text or
                messages), or a function that finds it there.
            options: As for `score`.
        """
        wanted = as_options(options, Options)

        async def compute_score(
            data_source: str,
            solution_str: str,
            ground_truth: Any,
            extra_info: Mapping[str, Any] | None = None,
            **_: Any,
        ) -> float:
            pair = rlhf.of_verl(prompt, solution_str, extra_info)
            [score] = await self._transport.gather(self._of_pairs([pair], wanted))
            return float(score)

        return compute_score

    async def close(self) -> None:
        """Close the connections."""
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()
