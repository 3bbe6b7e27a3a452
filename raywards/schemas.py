"""Wire types of the native route `POST /v1/reward`: what client and replica say to each other.

Strict on the way in: a body means exactly one thing, or it is refused with the field that is
wrong, the limit, and the nearest valid name. Lenient on the way out: a client ignores reply fields
that it does not know, so that an older client keeps working. Knows nothing of models, tokens,
HTTP or Ray, and imports neither torch, ray nor transformers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError

from raywards.errors import RequestRefusedError, did_you_mean

INPUTS = ("messages", "prompt", "input", "input_ids")

# Part of the wire format, and refused until this server honours them: silence would be a lie.
NOT_BUILT = {
    "normalize": "rewards are returned as the model gives them",
    "priority": "requests are served oldest first",
    "deterministic": "rewards may differ in the last bits between batches",
    "add_special_tokens": "`messages` and `responses` get the model's own, the others none",
    "return": "the reply always has `num_tokens` and `truncated`",
    "chat_template": "conversations are rendered with the model's own template",
}
# What happens anyway: clients that are made from the format's description send it.
_NEUTRAL = {
    "normalize": False,
    "priority": 0,
    "deterministic": False,
    "add_special_tokens": None,
}

# What the renderer passes to the template itself, and what would reach behind the template.
_RESERVED_VARIABLES = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "raise_exception",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "self",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)

# pydantic's words for what was expected, in the words of JSON.
_EXPECTED = {
    "bool_type": "expected true or false",
    "dict_type": "expected an object",
    "finite_number": "expected a finite number",
    "float_type": "expected a number",
    "int_type": "expected an integer",
    "list_type": "expected a list",
    "model_type": "expected an object with `role` and `content`",
    "string_too_long": "expected at most {max_length} characters",
    "string_too_short": "expected at least {min_length} character",
    "string_type": "expected a string",
    "too_long": "expected at most {max_length} entries",
    "too_short": "expected at least {min_length} entry",
}

_MAX_KWARGS = 32
_MAX_KWARG_CHARACTERS = 4096
# Templates may loop over a number: `range(10**9)` would hold the renderer for minutes.
_MAX_KWARG_NUMBER = 1_000_000
_MAX_SHOWN = 64
MAX_NESTING = 100
"""Levels of lists and objects in a body. Templates render fewer (`conversation.MAX_NESTING`)."""


def _whole_text(value: str) -> str:
    """Refuse half a surrogate pair: no tokenizer has an answer to it."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("holds a lone surrogate (half a character)") from None
    return value


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty; a rendered text has at least one visible character")
    return value


def _one_or_many(value: Any) -> str:
    """One of them, or a list of them? The first element tells."""
    return "|many" if isinstance(value, list) and value[:1] and _is_list(value[0]) else "|one"


def _text_or_list(value: Any) -> str:
    return "|list" if isinstance(value, list) else "|text"


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


Text = Annotated[str, AfterValidator(_whole_text)]
Rendered = Annotated[
    Text, AfterValidator(_not_blank), WithJsonSchema({"type": "string", "pattern": r"\S"})
]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
CallerId = Annotated[Text, Field(max_length=256)]

T = TypeVar("T")
# One finding is enough: a hostile body could have millions.
Some = Annotated[list[T], Field(min_length=1, fail_fast=True)]


def _check_variables(variables: Mapping[str, Any]) -> Mapping[str, Any]:
    """Only names a template could define, only plain values: nothing that reaches behind it."""
    for name, value in variables.items():
        field = field_path(("chat_template_kwargs", name))
        if name in _RESERVED_VARIABLES or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,63}", name):
            raise finding(field, "is not a variable that a request may set")
        if value is None or isinstance(value, bool):
            continue
        if isinstance(value, str):
            if len(_whole_text(value)) > _MAX_KWARG_CHARACTERS:
                raise finding(field, f"is longer than {_MAX_KWARG_CHARACTERS} characters")
        elif not isinstance(value, int | float):
            raise finding(field, f"expected a string, number, boolean or null, got {_kind(value)}")
        elif not abs(value) <= _MAX_KWARG_NUMBER:
            raise finding(field, f"is not a number of at most {_MAX_KWARG_NUMBER}")
    return variables


TemplateVariables = Annotated[
    dict[str, Any],
    Field(max_length=_MAX_KWARGS),
    AfterValidator(_check_variables),
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {"type": ["string", "number", "boolean", "null"]},
            "maxProperties": _MAX_KWARGS,
        }
    ),
]


class Strict(BaseModel):
    """A body: no unknown field, no number for a string, nothing that is infinite."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class TextPart(Strict):
    """A piece of a message's content. Images and sound are not scored."""

    type: Literal["text"]
    """Always `text`."""
    text: Text
    """The piece."""


class Message(Strict):
    """One turn of a conversation. Control tokens in it are read as plain text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who speaks."""
    content: (
        Annotated[
            Annotated[Text, Tag("|text")] | Annotated[Some[TextPart], Tag("|list")],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    """What is said. Only a message with `tool_calls` may leave it out."""
    name: Text | None = None
    """Name of the speaker or the tool, where the model's template has a place for it."""
    reasoning_content: Text | None = None
    """Thoughts before the answer, where the model's template has a place for them."""
    tool_calls: Some[dict[str, Any]] | None = None
    """Calls that the assistant makes."""
    tool_call_id: Text | None = None
    """The call that a tool answers."""

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.tool_calls is None:
            raise PydanticCustomError("no_content", "is required")
        return self


OneConversation = Some[Message]


class RewardRequest(Strict):
    """Body of `POST /v1/reward`: exactly one of `messages`, `prompt` with `responses`, `input`,
    `input_ids`."""

    messages: (
        Annotated[
            Annotated[OneConversation, Tag("|one")]
            | Annotated[Some[OneConversation], Tag("|many")],
            Discriminator(_one_or_many),
        ]
        | None
    ) = None
    """One conversation, or a list of them."""
    prompt: (
        Annotated[
            Annotated[Text, Tag("|text")] | Annotated[OneConversation, Tag("|list")],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    """What all `responses` answer: text for a model of plain text, or messages."""
    responses: Some[Text] | None = None
    """Answers to `prompt`, one reward each."""
    input: (
        Annotated[
            Annotated[Rendered, Tag("|text")] | Annotated[Some[Rendered], Tag("|list")],
            Discriminator(_text_or_list),
        ]
        | None
    ) = None
    """Text that is rendered already: control tokens are recognised, none is added."""
    input_ids: (
        Annotated[
            Annotated[Some[TokenId], Tag("|one")] | Annotated[Some[Some[TokenId]], Tag("|many")],
            Discriminator(_one_or_many),
        ]
        | None
    ) = None
    """Token ids, scored as they are: one sequence, or a list of them."""

    model: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    """Name of the served model. Default: whichever is served."""
    activation: Literal["none", "sigmoid"] = "none"
    """What `score` is: the reward itself, or its sigmoid."""
    truncation: Literal["error", "left", "right"] = "error"
    """What happens to a sequence that is too long: refused, or cut at the start or at the end."""
    max_length: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    """Longest sequence in tokens; at most the model's own."""
    chat_template_kwargs: TemplateVariables | None = None
    """Variables for the model's chat template. Only with messages."""
    tools: Some[dict[str, Any]] | None = None
    """JSON schemas of the tools that the assistant could call. Only with messages."""
    timeout_s: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """Give up after this many seconds. The server's own limit applies as well."""
    ids: Annotated[list[CallerId], Field(fail_fast=True)] | None = None
    """The caller's names for the sequences, repeated in the reply."""
    on_error: Literal["request", "item"] = "request"
    """A sequence that cannot be scored fails the request, or only gets an `error` of its own."""

    @model_validator(mode="after")
    def _fields_agree(self) -> RewardRequest:
        if (self.responses is None) != (self.prompt is None):
            absent = "responses" if self.responses is None else "prompt"
            present = "prompt" if self.responses is None else "responses"
            raise finding(absent, f"is missing beside `{present}`")
        given = [name for name in INPUTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise finding(
                given[1] if given else None,
                "expected exactly one of `messages`, `prompt` with `responses`, `input`, "
                f"`input_ids`; got {' and '.join(given) or 'none of them'}",
            )
        for name in ("chat_template_kwargs", "tools"):
            if getattr(self, name) is not None and given[0] in ("input", "input_ids"):
                raise finding(name, f"has no effect on `{given[0]}`; leave it out")
        if self.ids is not None and len(self.ids) != self.count():
            raise finding("ids", f"has {len(self.ids)} names for {self.count()} sequences")
        return self

    @classmethod
    def parse(cls, body: object) -> RewardRequest:
        """`body` validated. Raises `RequestRefusedError`."""
        if isinstance(body, Mapping):
            body = {name: value for name, value in body.items() if not _is_neutral(name, value)}
        return validated(cls, body, NOT_BUILT)

    def count(self) -> int:
        """Number of sequences that the request asks rewards for."""
        if self.responses is not None:
            return len(self.responses)
        given = self.messages or self.input_ids or self.input or ()
        if isinstance(given, str) or (given and isinstance(given[0], Message | int)):
            return 1
        return len(given)


def _is_neutral(name: str, value: object) -> bool:
    """Whether a field of `NOT_BUILT` asks for what happens anyway. False is not 0."""
    if name not in _NEUTRAL:
        return False
    neutral = _NEUTRAL[name]
    return type(value) is type(neutral) and value == neutral


class ReplyModel(BaseModel):
    """A part of a reply: fields that a client does not know are passed over."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )


class ErrorInfo(ReplyModel):
    """Why a request, or one sequence of it, has no reward."""

    message: str
    """What was seen, what is expected, and the next move."""
    type: str
    """Kind of error, named as OpenAI does: `invalid_request_error`, `overloaded_error`, ..."""
    param: str | None = None
    """Field that is at fault, such as `messages[0][1].content`."""
    code: str | None = None
    """Word for programs: `unknown_field`, `too_long`, `overloaded`, ..."""
    request_id: str | None = None
    """Header `x-request-id` of the request, for the server's log."""


class ErrorBody(ReplyModel):
    """Body of every reply that is not a success."""

    error: ErrorInfo
    """What went wrong."""


class RewardItem(ReplyModel):
    """The reward of one sequence."""

    index: int
    """Position in the request."""
    id: str | None = None
    """The caller's name for it."""
    reward: float | None
    """The model's raw scalar. `null` only beside an `error`."""
    score: float | None
    """The reward after `activation`."""
    num_tokens: int | None
    """Length of the sequence that was scored."""
    truncated: bool = False
    """Whether it was cut to fit."""
    error: ErrorInfo | None = None
    """Why there is no reward, with `on_error="item"`."""


class Usage(ReplyModel):
    """Tokens of the request."""

    prompt_tokens: int
    """Tokens scored."""
    total_tokens: int
    """The same: nothing is generated."""
    cached_tokens: int = 0
    """Tokens that were not computed again."""


class Timing(ReplyModel):
    """Where the time went, in milliseconds."""

    queue_ms: float
    """From admission to the start of the forward."""
    tokenize_ms: float
    """Rendering and tokenising."""
    forward_ms: float
    """The model."""
    batch_size: int
    """Sequences in the largest batch that had a part in the request."""


class RewardResponse(ReplyModel):
    """Reply to `POST /v1/reward`: one item per sequence, in the order of the request."""

    id: str
    """Name of this reply."""
    object: Literal["list"] = "list"
    """Always `list`."""
    created: int
    """Unix time in seconds."""
    model: str
    """Name of the served model."""
    revision: str | None
    """Digest of the served weights and rendering."""
    data: list[RewardItem]
    """One per sequence."""
    usage: Usage
    """Tokens of the request."""
    timing: Timing
    """Where the time went."""


def parse_body(body: bytes) -> object:
    """JSON bytes to Python values, refusing all that two parsers could read in two ways.

    Duplicate keys, NaN and Infinity, integers of thousands of digits, invalid UTF-8 and a nesting
    too deep for Python raise `RequestRefusedError` (400). Lone surrogates are left to the schema,
    which knows their field.
    """
    if not body:
        _malformed("the body is empty; expected a JSON object")
    try:
        text = body.decode()
        return json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except UnicodeDecodeError as error:
        _malformed(f"the body is not UTF-8 (byte {error.start})")
    except json.JSONDecodeError as error:
        _malformed(f"the body is not JSON: {error.msg} (line {error.lineno}, column {error.colno})")
    except RecursionError:  # at a depth that every Python sets anew, and far beyond ours
        raise too_deep() from None
    except ValueError:  # Python refuses to convert integers of thousands of digits
        _malformed("the body holds an integer of thousands of digits")


def too_deep() -> RequestRefusedError:
    """The error for a body of more than `MAX_NESTING` levels."""
    return refused(
        f"the body is nested deeper than {MAX_NESTING} levels; send flatter `tools` and "
        "`tool_calls`",
        code="malformed_json",
        status=400,
    )


_NESTED: Mapping[int | str, type[BaseModel]] = {
    "messages": Message,
    "prompt": Message,
    "content": TextPart,
}

Model = TypeVar("Model", bound=BaseModel)


def validated(cls: type[Model], body: object, not_built: Mapping[str, str]) -> Model:
    """`body` as a `cls`. The most telling finding becomes a `RequestRefusedError` (422).

    `not_built`: fields that the format has and this server does not honour, with what it does
    instead.
    """
    if not isinstance(body, Mapping):
        raise refused(f"expected a JSON object, got {_kind(body)}", code="not_an_object")
    known = [field.alias or name for name, field in cls.model_fields.items()]
    takes_others = cls.model_config.get("extra") == "ignore"
    for name in body:
        if name in not_built:
            raise refused(
                f"`{name}` is not supported by this server: {not_built[name]}. Leave it out.",
                field=name,
                code="unsupported_field",
            )
        if name not in known and not takes_others:
            # Before pydantic, which would collect a hundred thousand of them.
            raise _unknown(field_path((name,)), name, known)
    try:
        return cls.model_validate(body)
    except ValidationError as error:
        findings = error.errors(include_url=False)
    # An unknown name explains what else is wrong, such as a field that seems to be missing.
    telling = next((f for f in findings if f["type"] == "extra_forbidden"), findings[0])
    raise _told(telling, cls)


def refused(
    message: str, *, field: str | None = None, code: str = "invalid_value", status: int = 422
) -> RequestRefusedError:
    """The error for a request that will never succeed as it is."""
    return RequestRefusedError(message, field=field, code=code, status=status)


def field_path(parts: Iterable[int | str]) -> str:
    """`("messages", 0, 1, "content")` as `messages[0][1].content`."""
    path = ""
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif not part.startswith("|"):  # tags of unions
            path += ("." if path else "") + shortened(part)
    return path


def shortened(text: str) -> str:
    """A caller's word as it may stand in an error message."""
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def _told(finding: ErrorDetails, cls: type[BaseModel]) -> RequestRefusedError:
    """pydantic's finding in our words: field, what was seen, what is expected."""
    kind, context = finding["type"], finding.get("ctx", {})
    field = context.get("field") or field_path(finding["loc"]) or None
    place = f"{field}: " if field else ""
    if kind == "extra_forbidden":
        parents = [part for part in finding["loc"][:-1] if part in _NESTED]
        known = (_NESTED[parents[-1]] if parents else cls).model_fields
        return _unknown(field, str(finding["loc"][-1]), known)
    elif kind == "no_content":
        field = f"{field}.content"
        return refused(f"{field}: is required", field=field, code="missing_field")
    elif kind == "missing":
        return refused(f"{place}is required", field=field, code="missing_field")
    elif kind == "literal_error":
        given, words = finding["input"], re.findall(r"'(\w+)'", context["expected"])
        near = did_you_mean(given, words) if isinstance(given, str) else ""
        seen = _kind(given)
        return refused(f"{place}expected {context['expected']}, got {seen}.{near}", field=field)
    elif kind in ("raywards", "value_error"):
        return refused(place + finding["msg"].removeprefix("Value error, "), field=field)
    expected = _EXPECTED.get(kind, finding["msg"].replace("Input should be", "expected"))
    message = f"{place}{expected.format(**context)}, got {_kind(finding['input'])}"
    return refused(message, field=field)


def _unknown(field: str | None, name: str, known: Iterable[str]) -> RequestRefusedError:
    near = did_you_mean(name, known) or f" Known here: {', '.join(known)}."
    return refused(f"{field}: unknown field.{near}", field=field, code="unknown_field")


def _kind(value: object) -> str:
    """What was seen, without repeating a text that may be private or long."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    elif isinstance(value, int | float):
        return repr(value) if abs(value) < 1e21 else "a huge number"
    elif isinstance(value, str):
        return repr(value) if len(value) <= _MAX_SHOWN and value.isidentifier() else "a string"
    elif isinstance(value, Mapping):
        return "an object"
    elif isinstance(value, list):
        return "a list" if value else "an empty list"
    return f"a {type(value).__name__}"


def finding(field: str | None, reason: str) -> PydanticCustomError:
    """For validators: what is wrong with `field`, or with the body as a whole."""
    return PydanticCustomError("raywards", "{reason}", {"field": field, "reason": reason})


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                _malformed(f"the key {shortened(name)!r} is there twice in one object")
            seen.add(name)
    return body


def _no_constant(name: str) -> NoReturn:
    _malformed(f"the body holds {name}, which is not JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        _malformed("the body holds a number that is too large")
    return number


def _malformed(message: str) -> NoReturn:
    raise refused(message, code="malformed_json", status=400)
