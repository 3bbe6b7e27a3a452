"""A conversation as callers write it, checked and made of plain data: `Chat`.

    messages, tools, template variables ─Chat.checked─► dicts, lists and strings, without None

What is no conversation raises `ConversationError`; its `field` says which argument is at fault and
its `message_index` which message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raywards.errors import ConversationError

# Arguments of `apply_chat_template` that decide what kind of thing comes back, not what is in it.
RESERVED_TEMPLATE_KWARGS = frozenset(
    {
        *("conversation", "messages", "chat_template", "tokenize", "tokenizer_kwargs"),
        *("add_generation_prompt", "continue_final_message", "sanitize_control_tokens"),
        *("padding", "truncation", "max_length"),
        *("return_dict", "return_tensors", "return_assistant_tokens_mask"),
    }
)
MAX_NESTING = 64


@dataclass(frozen=True)
class Chat:
    """A checked conversation, made of plain dicts, lists and strings, without None values."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    kwargs: dict[str, Any]

    @classmethod
    def checked(cls, messages: object, tools: object, kwargs: object) -> Chat:
        """From what a caller gave. Raises `ConversationError`."""
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise conversation_error(
                f"chat_template_kwargs is {kind_of(kwargs)}; expected a mapping such as "
                "{'enable_thinking': False}.",
                reason="bad_kwargs",
                field="chat_template_kwargs",
            )
        options: dict[str, Any] = dict(kwargs or {})
        for key in options:
            if not isinstance(key, str) or key in RESERVED_TEMPLATE_KWARGS:
                raise conversation_error(
                    f"chat_template_kwargs has the key {key!r}, which raywards sets itself. Only "
                    "variables that the template reads belong here.",
                    reason="bad_kwargs",
                    field="chat_template_kwargs",
                )
        if options.get("tools") is not None:
            tools = options["tools"]
        options.pop("tools", None)
        return cls(
            [_check_message(message, index) for index, message in _check_list(messages)],
            _check_tools(tools),
            _mapped(options, _same, "chat_template_kwargs"),
        )

    def mapped(self, change: Callable[[str], str]) -> Chat:
        """The same conversation with `change` applied to each string except the roles."""
        messages = [
            {"role": message["role"]}
            | {
                change(key): _mapped(value, change, "messages")
                for key, value in message.items()
                if key != "role"
            }
            for message in self.messages
        ]
        return Chat(
            messages,
            _mapped(self.tools, change, "tools"),
            _mapped(self.kwargs, change, "chat_template_kwargs"),
        )

    def strings(self) -> Iterator[tuple[int | str, str]]:
        """Each string beside the message's index, or beside the name of the argument."""
        for index, message in enumerate(self.messages):
            for key, value in message.items():
                if key != "role":
                    yield from ((index, text) for text in _strings({key: value}))
        yield from (("tools", text) for text in _strings(self.tools))
        yield from (("chat_template_kwargs", text) for text in _strings(self.kwargs))


def conversation_error(
    problem: str, *, reason: str, field: str = "messages", message_index: int | None = None
) -> ConversationError:
    """`message_index` is the message at fault, or None where it is no single message."""
    return ConversationError(problem, reason=reason, field=field, message_index=message_index)


def kind_of(value: object) -> str:
    """The name of the value's type; None is called None."""
    return "None" if value is None else type(value).__name__


def check_unicode(text: str, name: str) -> None:
    """Raise `ConversationError` where the text holds half a surrogate pair."""
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise conversation_error(
            f"{name} holds half a surrogate pair ({text[error.start]!r} at character "
            f"{error.start}), which is no Unicode text. Decode the source as UTF-8 first.",
            reason="surrogate",
        ) from None


def _check_list(messages: object) -> Iterator[tuple[int, object]]:
    if not isinstance(messages, (list, tuple)):
        hint = " Put the message into a list." if isinstance(messages, Mapping) else ""
        raise conversation_error(
            f"the conversation is {kind_of(messages)}; expected a list of messages such as "
            f"{{'role': 'user', 'content': 'Hi'}}.{hint}",
            reason="malformed",
        )
    if not messages:
        raise conversation_error("the conversation is an empty list.", reason="empty")
    return enumerate(messages)


def _check_message(message: object, index: int) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        problem = f"{name} is {kind_of(message)}; expected a mapping with 'role' and 'content'."
    elif not isinstance(message.get("role"), str) or not message["role"].strip():
        role = message.get("role")
        seen = "missing" if role is None else "empty" if isinstance(role, str) else kind_of(role)
        problem = f"{name}.role is {seen}; expected a word such as 'user' or 'assistant'."
    else:
        problem = _content_problem(message, f"{name}.content")
    if problem:
        reason = "unsupported" if "not supported" in problem else "malformed"
        raise conversation_error(problem, reason=reason, message_index=index)
    plain: dict[str, Any] = _mapped(message, _same, name)
    return plain


def _content_problem(message: Mapping[str, Any], name: str) -> str:
    """What is wrong with `message["content"]`, or an empty string."""
    content = message.get("content")
    if isinstance(content, str):
        return ""
    if content is None:
        if message.get("tool_calls"):
            return ""
        return f"{name} is missing; expected text (only a message with tool_calls may omit it)."
    if not isinstance(content, (list, tuple)):
        return f"{name} is {kind_of(content)}; expected text, or a list of text parts."
    for number, part in enumerate(content):
        if not isinstance(part, Mapping):
            return (
                f"{name}[{number}] is {kind_of(part)}; expected {{'type': 'text', 'text': '...'}}."
            )
        kind = part.get("type")
        if kind != "text":
            return (
                f"{name}[{number}] has the type {kind!r}, which is not supported: raywards scores "
                "text. Expected {'type': 'text', 'text': '...'}."
            )
        if not isinstance(part.get("text"), str):
            return f"{name}[{number}].text is {kind_of(part.get('text'))}; expected text."
    return "" if content else f"{name} is an empty list; expected text."


def _check_tools(tools: object) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise conversation_error(
            f"tools is {kind_of(tools)}; expected a list of JSON schemas.",
            reason="bad_tools",
            field="tools",
        )
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise conversation_error(
                f"tools[{index}] is {kind_of(tool)}; expected a JSON schema (a mapping).",
                reason="bad_tools",
                field="tools",
            )
    plain: list[Any] = _mapped(tools, _same, "tools")
    return plain


def _mapped(value: Any, change: Callable[[str], str], name: str, depth: int = 0) -> Any:
    """A copy of plain data with `change` applied to each string, keys too, and without None."""
    if depth > MAX_NESTING:
        raise conversation_error(
            f"{name} is nested deeper than {MAX_NESTING} levels.", reason="malformed"
        )
    if isinstance(value, str):
        check_unicode(value, name)
        return change(value)
    if isinstance(value, Mapping):
        return {
            _mapped(key, change, name, depth + 1): _mapped(item, change, name, depth + 1)
            for key, item in value.items()
            if item is not None
        }
    if isinstance(value, (list, tuple)):
        return [_mapped(item, change, name, depth + 1) for item in value]
    return value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _same(text: str) -> str:
    return text
