"""What the bodies of the dialects have in common: strict models, texts, token ids, messages."""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag

from raywards.schemas import Message, Some, Text, TokenId, refused, shortened, validated
from raywards.schemas import Rendered as RenderedText
from raywards.serve.dialects import Call, Conversation, Ids, Item, Rendered

Model = TypeVar("Model", bound=BaseModel)


def _kind_of_input(value: Any) -> str:
    """One text, texts, one sequence of ids, or sequences of ids? The first element tells."""
    if not isinstance(value, list):
        return "|text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "|sequences"
    return "|ids" if isinstance(first, int) and not isinstance(first, bool) else "|texts"


Input = Annotated[
    Annotated[RenderedText, Tag("|text")]
    | Annotated[Some[RenderedText], Tag("|texts")]
    | Annotated[Some[TokenId], Tag("|ids")]
    | Annotated[Some[Some[TokenId]], Tag("|sequences")],
    Discriminator(_kind_of_input),
]
"""Text, texts, token ids, or lists of token ids: what OpenAI's `input` may be."""


def one_or_many(value: Any) -> str:
    """For discriminators of a value and a list of such."""
    return "|many" if isinstance(value, list) else "|one"


Prompt = Annotated[Text, Field(min_length=1)]
Prompts = Annotated[
    Annotated[Prompt, Tag("|one")] | Annotated[Some[Prompt], Tag("|many")],
    Discriminator(one_or_many),
]
"""One text or several."""
Responses = Annotated[
    Annotated[Text, Tag("|one")] | Annotated[Some[Text], Tag("|many")],
    Discriminator(one_or_many),
]
"""One text or several. A policy may answer nothing at all: that has a reward, too."""


def begins_with_prompt(pair: list[str]) -> list[str]:
    """For validators of a prompt with its response: the second may be empty."""
    if pair[0] == "":
        raise ValueError("the first text is empty; expected a prompt")
    return pair


def _no_boolean(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError(f"expected a number, got {str(value).lower()}")
    return value


def _a_boolean(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("expected false, got a number")
    return value


# `Literal` compares, and in Python False is 0.
Zero = Annotated[Literal[0], BeforeValidator(_no_boolean)]
One = Annotated[Literal[1], BeforeValidator(_no_boolean)]
No = Annotated[Literal[False], BeforeValidator(_a_boolean)]

ModelName = Annotated[str, Field(min_length=1, max_length=256)]


def has(body: object, *names: str) -> bool:
    """Whether one of the fields stands in the body; null is none."""
    return isinstance(body, dict) and any(body.get(name) is not None for name in names)


def read(
    cls: type[Model],
    body: object,
    *,
    ignored: frozenset[str] = frozenset(),
    not_built: Mapping[str, str] | None = None,
) -> Model:
    """`body` as a `cls`; raises `RequestRefusedError`, as `schemas.validated`.

    `ignored`: fields that the peer itself does nothing with. Of the others, null means absent:
    clients that are made from a schema send every optional field.
    """
    if isinstance(body, Mapping):
        body = {name: v for name, v in body.items() if v is not None and name not in ignored}
    return validated(cls, body, not_built or {})


def read_query(cls: type[Model], query: Mapping[str, str]) -> Model:
    """The parameters behind `?` as a `cls`. Raises `RequestRefusedError`."""
    return validated(cls, dict(query), {})


def refuse_query(call: Call) -> None:
    """For routes whose settings all stand in the body. Raises `RequestRefusedError`."""
    for name in call.query:
        told = shortened(name)
        raise refused(
            f"{told}: this route takes no parameter behind `?`; its settings stand in the body",
            field=told,
            code="unknown_field",
        )


def items_of(name: str, value: Any, *, special_tokens: bool = False) -> list[Item]:
    """The sequences of an `Input` that stood in the field `name`."""
    kind = _kind_of_input(value)
    if kind == "|text":
        return [Rendered(name, value, special_tokens)]
    elif kind == "|ids":
        return [Ids(name, value)]
    many: list[Item] = []
    for i, one in enumerate(value):
        field = f"{name}[{i}]"
        many.append(Rendered(field, one, special_tokens) if kind == "|texts" else Ids(field, one))
    return many


def plain(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """Messages as the renderer takes them."""
    return [message.model_dump(exclude_none=True) for message in messages]


def conversation_of(messages: Sequence[Message], variables: Mapping[str, Any] | None) -> Item:
    """The one conversation of a body with OpenAI's `messages`."""
    return Conversation("messages", plain(messages), variables or None)


def vector_of_one(reward: float, encoding_format: Literal["float", "base64"]) -> list[float] | str:
    """A reward where a peer has a vector: numbers, or base64 of float32s, which holds it exactly.

    OpenAI's client asks for base64 unless it is told otherwise.
    """
    if encoding_format == "float":
        return [reward]
    return base64.b64encode(struct.pack("<f", reward)).decode()
