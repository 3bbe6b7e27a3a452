"""What a wire format and the scoring core say to each other.

A dialect is a module with one `Route` per path. Its `answer` turns a parsed JSON body into a
`ScoringRequest`, awaits the core's `ScoringResult`, and shapes the reply; its `describe` shapes an
error. Everything else is the core's: limits, tokenising, batching, deadlines, status codes.

Knows nothing of HTTP, models or Ray.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from pydantic import BaseModel

from raywards.errors import ServiceError

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

    def encode_rendered(self, text: str, *, truncation: Truncation = "error") -> list[int]: ...

    def check_ids(self, ids: Sequence[int], *, truncation: Truncation = "error") -> list[int]: ...


@dataclass(frozen=True)
class Item(ABC):
    """One sequence to score. `field` is where the caller wrote it, such as `messages[3]`."""

    field: str

    @abstractmethod
    def characters(self) -> int:
        """Length of the text, known before it is tokenised."""

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

    def characters(self) -> int:
        return _characters(self.messages)

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

    def characters(self) -> int:
        return _characters(self.prompt) + len(self.response)

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
    """Text that a template has rendered already."""

    text: str

    def characters(self) -> int:
        return len(self.text)

    def encode(self, encoder: Encoder, truncation: Truncation) -> list[int]:
        return encoder.encode_rendered(self.text, truncation=truncation)


@dataclass(frozen=True)
class Ids(Item):
    """Token ids of the caller's own."""

    ids: Sequence[int]

    def characters(self) -> int:
        return 0

    def encode(self, encoder: Encoder, truncation: Truncation) -> list[int]:
        return encoder.check_ids(self.ids, truncation=truncation)


@dataclass(frozen=True)
class ScoringRequest:
    """What every dialect asks of the core."""

    items: Sequence[Item]
    model: str | None = None
    truncation: Truncation = "error"
    max_length: int | None = None
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


Core = Callable[[ScoringRequest], Awaitable[ScoringResult]]


@dataclass(frozen=True)
class Route:
    """One path of a dialect."""

    path: str
    body: type[BaseModel]
    """Documents the body; `answer` does the reading."""
    reply: type[BaseModel]
    answer: Callable[[object, Core], Awaitable[dict[str, Any]]]
    """From the parsed JSON body to the reply. Raises `ServiceError`."""
    describe: Callable[[ServiceError], dict[str, Any]]
    """The body of an error reply."""


def sigmoid(reward: float) -> float:
    """Stable for rewards of any size."""
    small = math.exp(-abs(reward))
    return 1 / (1 + small) if reward >= 0 else small / (1 + small)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    elif isinstance(value, Mapping):
        return sum(_characters(key) + _characters(entry) for key, entry in value.items())
    return sum(map(_characters, value)) if isinstance(value, Sequence) else 0
