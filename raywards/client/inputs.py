"""What a caller hands over, as lists of the kind that was asked for. Pure.

Raises `ConversationError`, before anything is sent. What a message may hold is the server's to say.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypedDict

from raywards.errors import ConfigError, ConversationError, RequestRefusedError, did_you_mean
from raywards.schemas import RewardRequest

Message = Mapping[str, Any]
Conversation = Sequence[Message]


class Cut(TypedDict, total=False):
    """Options of every kind of sequence, with the meaning of the same fields in docs/http.md."""

    truncation: Literal["error", "left", "right"]
    max_length: int | None


class Options(Cut, total=False):
    """Options of what the server renders."""

    chat_template_kwargs: dict[str, Any] | None
    tools: list[dict[str, Any]] | None


def as_options(options: Mapping[str, Any], kind: type[Cut]) -> dict[str, Any]:
    """Fields of a request, checked here: they would be wrong for every part of a long list.

    Raises `ConfigError`.
    """
    for name in options:
        if name not in kind.__annotations__:
            near = did_you_mean(name, kind.__annotations__)
            raise ConfigError(
                f"{name}: unknown here.{near} Known: {', '.join(kind.__annotations__)}"
            )
    given = {name: value for name, value in options.items() if value is not None}
    try:
        RewardRequest.parse({"messages": [{"role": "user", "content": ""}], **given})
    except RequestRefusedError as error:
        raise ConfigError(str(error)) from None
    return given


def as_list(name: str, value: object, expected: str, *, part: type = str) -> list[Any]:
    """The entries of any iterable, a generator too.

    part: what stands in an entry. A single entry where a list of them is expected would be split
    into nonsense.
    """
    entries = list(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if isinstance(value, str | Mapping) or (
        part is not str and entries and isinstance(entries[0], part)
    ):
        raise ConversationError(
            f"{name}: expected a list such as {expected}, got a single one; put it in a list",
            reason="not_a_list",
        )
    if entries is None:
        raise ConversationError(
            f"{name}: expected a list such as {expected}, got {_kind(value)}", reason="not_a_list"
        )
    return entries


def as_text(name: str, value: object) -> str:
    """A text."""
    if not isinstance(value, str):
        raise ConversationError(f"{name}: expected text, got {_kind(value)}", reason="not_text")
    return value


def as_messages(name: str, value: object) -> list[Any]:
    """The messages of one conversation."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ConversationError(
            f"{name}: expected a list of messages, got {_kind(value)}. For a model of plain text "
            "use score_responses(prompt, responses)",
            reason="not_messages",
        )
    return list(value)


def as_prompt(name: str, value: object) -> str | list[Any]:
    """Text or messages."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise ConversationError(
            f"{name}: expected text or a list of messages, got {_kind(value)}",
            reason="not_messages",
        )
    return list(value)


def as_pair(name: str, value: object) -> tuple[str | list[Any], str]:
    """A prompt and the answer to it."""
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        count = f" of {len(value)}" if isinstance(value, tuple | list) else ""
        raise ConversationError(
            f"{name}: expected a pair (prompt, answer), got {_kind(value)}{count}",
            reason="not_a_pair",
        )
    return as_prompt(f"{name}[0]", value[0]), as_text(f"{name}[1]", value[1])


def as_token_ids(name: str, value: object) -> list[int]:
    """Token ids of one sequence, numpy's and torch's integers too."""
    try:
        return [operator.index(token) for token in value]  # type: ignore[attr-defined]
    except TypeError:
        raise ConversationError(
            f"{name}: expected a list of token ids (integers), got {_kind(value)}",
            reason="not_token_ids",
        ) from None


def as_json(name: str, value: object) -> str:
    """Compact JSON."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConversationError(
            f"{name} cannot be written as JSON: {error}", reason="not_json"
        ) from None


def characters(value: str | Conversation) -> int:
    """Of a text, or of the messages whose content is one."""
    if isinstance(value, str):
        return len(value)
    contents = [one.get("content") for one in value if isinstance(one, Mapping)]
    return sum(len(content) for content in contents if isinstance(content, str))


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
