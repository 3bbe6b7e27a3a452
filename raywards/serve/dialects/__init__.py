"""What a wire format and the scoring core say to each other.

A dialect is a module with one `Route` per path. Its `answer` turns a `Call` into a
`ScoringRequest`, awaits the core's `ScoringResult`, and shapes the `Reply`; its `describe` shapes
an error. Everything else is the core's: limits, tokenising, batching, deadlines.

Several dialects may share a path: the first whose `claims` knows the body by its keys answers it.

Knows nothing of HTTP, models or Ray.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from raywards.errors import ConversationError, ServiceError

Truncation = Literal["error", "left", "right"]


class Encoder(Protocol):
    """The part of `Scorer` that turns what a caller sent into token ids."""

    max_length: int

    def encode(
        self,
        conversation: Sequence[Mapping[str, Any]] | str,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncation: Truncation = "error",
    ) -> list[int]: ...

    def encode_response(
        self,
        prompt: Sequence[Mapping[str, Any]] | str,
        response: Sequence[Mapping[str, Any]] | str,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        truncation: Truncation = "error",
    ) -> list[int]: ...

    def encode_rendered(
        self, text: str, *, special_tokens: bool = False, truncation: Truncation = "error"
    ) -> list[int]: ...

    def check_ids(self, ids: Sequence[int], *, truncation: Truncation = "error") -> list[int]: ...


@dataclass(frozen=True)
class Item(ABC):
    """One sequence to score. `field` is where the caller wrote it, such as `messages[3]`."""

    field: str

    @abstractmethod
    def characters(self) -> int:
        """Length of the text, known before it is tokenised."""

    def num_ids(self) -> int:
        """Tokens that need no guess, since the caller sent them as ids."""
        return 0

    @abstractmethod
    def encode(self, encoder: Encoder, truncation: Truncation) -> list[int]:
        """Its token ids. Raises `ConversationError`."""

    def field_of_message(self, index: int) -> str:
        """Where the caller wrote the message at `index` of what was rendered."""
        return f"{self.field}[{index}]"


@dataclass(frozen=True)
class Conversation(Item):
    """Messages, rendered with the model's chat template."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] | None = None
    shared_characters: int | None = None
    """Of the variables, where they were counted already for other items of the request."""

    def characters(self) -> int:
        return self._characters

    @cached_property
    def _characters(self) -> int:
        shared = self.shared_characters
        if shared is None:
            shared = characters_in(self.variables)
        return shared + characters_in(self.messages)

    def encode(self, encoder: Encoder, truncation: Truncation) -> list[int]:
        return encoder.encode(
            self.messages, chat_template_kwargs=self.variables, truncation=truncation
        )


@dataclass(frozen=True)
class Response(Item):
    """An answer to a prompt."""

    prompt: Sequence[Mapping[str, Any]] | str
    response: str
    variables: Mapping[str, Any] | None = None
    shared_characters: int | None = None
    """Of the prompt and the variables, where they were counted already for other responses."""

    def characters(self) -> int:
        return self._characters

    @cached_property
    def _characters(self) -> int:
        shared = self.shared_characters
        if shared is None:
            shared = characters_in(self.prompt) + characters_in(self.variables)
        return shared + len(self.response)

    def encode(self, encoder: Encoder, truncation: Truncation) -> list[int]:
        return encoder.encode_response(
            self.prompt,
            self.response,
            chat_template_kwargs=self.variables,
            truncation=truncation,
        )

    def field_of_message(self, index: int) -> str:
        in_prompt = not isinstance(self.prompt, str) and index < len(self.prompt)
        return f"prompt[{index}]" if in_prompt else self.field


@dataclass(frozen=True)
class Rendered(Item):
    """Text that a template has rendered already; its control tokens are recognised.

    `special_tokens`: the tokenizer opens and closes it as its class does, with one BOS at most.
    """

    text: str
    special_tokens: bool = False

    def characters(self) -> int:
        return len(self.text)

    def encode(self, encoder: Encoder, truncation: Truncation) -> list[int]:
        return encoder.encode_rendered(
            self.text, special_tokens=self.special_tokens, truncation=truncation
        )


@dataclass(frozen=True)
class Ids(Item):
    """Token ids of the caller's own."""

    ids: Sequence[int]

    def characters(self) -> int:
        return 0

    def num_ids(self) -> int:
        return len(self.ids)

    def encode(self, encoder: Encoder, truncation: Truncation) -> list[int]:
        try:
            return encoder.check_ids(self.ids, truncation=truncation)
        except ConversationError as error:
            # The scorer names its own argument, and the caller's name for it stands in front.
            told = re.sub(r"^input_ids\[(\d+)\]", r"id \1", str(error))
            raise ConversationError(told, **error.__dict__) from None


@dataclass(frozen=True)
class ScoringRequest:
    """What every dialect asks of the core."""

    items: Sequence[Item]
    model: str | None = None
    truncation: Truncation = "error"
    max_length: int | None = None
    max_length_field: str = "max_length"
    """What the caller wrote it under."""
    timeout_s: float | None = None
    fails_as_a_whole: bool = True


@dataclass(frozen=True)
class ScoredItem:
    """The raw reward of one item, or why it has none."""

    reward: float | None
    num_tokens: int | None
    truncated: bool = False
    error: ServiceError | None = None


@dataclass(frozen=True)
class ScoringResult:
    """What the core answers: one entry per item, in order."""

    items: Sequence[ScoredItem]
    model: str
    revision: str | None
    queue_s: float
    tokenize_s: float
    forward_s: float
    batch_size: int
    label: str = "LABEL_0"
    """What the model's config calls its one label."""
    is_regression: bool = True
    """Whether the config says so: engines then leave the reward as it is, else take its sigmoid."""
    device: str = "cpu"
    """Of the model, as torch names it."""

    @property
    def rewards(self) -> list[float]:
        """Of a request that fails as a whole."""
        return [item.reward for item in self.items if item.reward is not None]

    @property
    def num_tokens(self) -> int:
        """Of all items together."""
        return sum(item.num_tokens or 0 for item in self.items)


class Core(Protocol):
    """What a dialect asks."""

    async def score(self, request: ScoringRequest) -> ScoringResult:
        """All items. Raises `ServiceError`."""

    def stream(self, request: ScoringRequest) -> AsyncGenerator[tuple[int, ScoredItem], None]:
        """Each item with its position, as soon as it is scored or has failed.

        Raises `ServiceError` before the first, where the request as a whole is refused.
        """


@dataclass(frozen=True)
class Call:
    """A request as it came."""

    body: object
    """The parsed JSON."""
    request_id: str = ""
    given_id: str | None = None
    """The request id where the caller chose it."""
    query: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """What stands behind `?` in the address."""


@dataclass(frozen=True)
class Reply:
    """What is sent back with status 200."""

    body: Any
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Describe:
    """Status and body of an error reply."""

    of: Callable[[ServiceError], tuple[int, Any]]
    body: type[BaseModel]
    """Documents the body."""

    def __call__(self, error: ServiceError) -> tuple[int, Any]:
        return self.of(error)


@dataclass(frozen=True)
class Route:
    """One path of a dialect."""

    path: str
    body: type[BaseModel]
    """Documents the body; `answer` does the reading."""
    reply: Any
    """Documents the reply: a type."""
    answer: Callable[[Call, Core], Coroutine[Any, Any, Reply]]
    """Raises `ServiceError`."""
    describe: Describe
    """Status and body of an error reply."""
    claims: Callable[[object], bool] = lambda body: True
    """Whether a body at this path is of this dialect."""
    lines: Callable[[Call, Core], AsyncGenerator[dict[str, Any], None]] | None = None
    """The reply as NDJSON, an object a line, where the caller asks for it. Raises as `answer`."""
    query: type[BaseModel] | None = None
    """Documents what may stand behind `?` in the address."""
    null_is_absent: bool = True
    """Whether null stands for a field that is left out, as `bodies.read` takes it."""


def sigmoid(reward: float) -> float:
    """Stable for rewards of any size."""
    small = math.exp(-abs(reward))
    return 1 / (1 + small) if reward >= 0 else small / (1 + small)


def characters_in(value: Any) -> int:
    """Length of the text that plain data, such as messages or tools, at least becomes."""
    found, left = 0, [] if value is None else [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            found += len(one)
            continue
        found += 1  # a bracket, or a digit
        if isinstance(one, Mapping):
            left += one
            left += one.values()
        elif isinstance(one, Sequence):
            left += one
        elif isinstance(one, int):
            found += one.bit_length() // 4
    return found
