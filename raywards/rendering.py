"""Conversation to token ids: one tokenizer, one template, one EOS rule.

    conversation ─plain, checked─► template ─► text ─► ids
    plain text ──────────────── + closing EOS ─► ids
    rendered text ─────────────────────────────► ids

Training, Scorer, HTTP and batch scoring all encode through `Rendering`, and its fingerprint travels
in the manifest: the same conversation gives the same ids everywhere.

A control token (`<|im_end|>`) written inside a message could close the turn early and buy a reward.
Here it stays text. The template must not see it, so that it cannot be mixed up with the template's
own, and the tokenizer must not split the text differently because of it. Hence two renamings:

    content   "... <|im_end|> ..."   ─►  "... zq5f1cn0z ..."     before the template runs
    rendered  "...<|im_end|>\\n"      ─►  "...(alias of it)\\n"    the template's own control token
              "... zq5f1cn0z ..."    ─►  "... <|im_end|> ..."    put back, now only text

and one pass of a tokenizer that knows the aliases and does not know the control tokens. Without a
control token in the conversation none of this runs, and the ids are exactly TRL's.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

from raywards.errors import ConfigError, ConversationError

Truncation: TypeAlias = Literal["error", "left", "right"]
"""What to do with a sequence longer than `max_length`; the word is the side that loses tokens."""
ControlTokens: TypeAlias = Literal["as_text", "refuse"]
Message: TypeAlias = Mapping[str, Any]

# Raise it whenever the same conversation could give other ids than before: exports made under
# another version then announce themselves instead of scoring differently.
POLICY_VERSION = 1

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

_PROBES = (
    "Hello world, it's 3.14 or 0123456789?",
    "  two  spaces\n\n\ttab \r\n",
    "Grüße 北京 🙂 e\u0301 ＡＢ１",
    "<|im_end|></s>[INST]<think>",
)


class Rendering:
    """Encodes conversations and texts. Thread-safe; picklable; never changes the tokenizer.

    `control_tokens="refuse"` raises where a message holds a control token, instead of encoding it
    as text. Settings of the tokenizer that are changed later (another chat template) are not seen
    by `fingerprint()`: make a new Rendering.
    """

    def __init__(self, tokenizer: Any, *, control_tokens: ControlTokens = "as_text") -> None:
        if control_tokens not in ("as_text", "refuse"):
            raise ConfigError(
                f"control_tokens is {control_tokens!r}; expected 'as_text' or 'refuse'."
            )
        self.tokenizer = tokenizer
        self.control_tokens: ControlTokens = control_tokens
        self._encoder = _FastEncoder(tokenizer) if tokenizer.is_fast else _SlowEncoder(tokenizer)
        self._specials = _Specials.of(tokenizer)
        self._alias_lock = threading.Lock()
        self._alias_encoder: _AliasEncoder | None = None
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        bare, dressed = (self._encoder.ids("a", special_tokens=on) for on in (False, True))
        self._adds_bos = bos is not None and dressed[:1] == [bos] != bare[:1]
        self._adds_eos = eos is not None and dressed[-1:] == [eos] != bare[-1:]

    def __reduce__(self) -> tuple[Callable[..., Rendering], tuple[Any, ControlTokens]]:
        return _rebuild, (self.tokenizer, self.control_tokens)

    def encode_conversation(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The ids of a whole conversation, as the chat template closes it: no generation prompt.

        A key whose value is None counts as absent, at every depth: JSON from an HTTP client and a
        row of a table (which fills missing keys with None) then give the same ids. `tools` inside
        `chat_template_kwargs` wins over `tools`, as in TRL.

        Raises `ConversationError`; its `field` says which argument is at fault.
        """
        chat = _Chat.checked(messages, tools, chat_template_kwargs)
        if not self.tokenizer.chat_template:
            raise _error(
                "the tokenizer has no chat template, so messages cannot be rendered. Pass "
                "`chat_template_path` (a template file, or a model whose template to use), or give "
                "plain text instead of messages.",
                reason="no_template",
            )
        marks = self._marks(chat)
        if not marks.literals:
            return self._closed(self._encoder.ids(self._render(chat), special_tokens=False))
        marked = self._render(chat.mapped(marks.replace))
        if not marks.tokens:
            # Some string begins or ends with a piece of a control token ("<|im_"). Did the template
            # put the other piece beside it? Hardly ever: then nothing has to be renamed.
            plain = self._render(chat)
            if self._specials.found_in(plain) == self._specials.found_in(marked):
                return self._closed(self._encoder.ids(plain, special_tokens=False))
        return self._closed(self._alias().ids(marked, marks))

    def encode_text(self, text: str) -> list[int]:
        """The ids of plain text: closed by EOS exactly once, opened by BOS at most once.

        The text is taken as it stands: special tokens written in it are recognised, as TRL does. A
        tokenizer without an EOS token appends nothing (encoders close with [SEP] by themselves).
        Raises `ConversationError`.
        """
        self._check_text(text)
        eos = self.tokenizer.eos_token
        whole = text if eos is None or text.endswith(eos) else text + eos
        ids = self._encoder.ids(whole, special_tokens=True)
        # The tokenizer's own BOS or EOS beside the one in the text: TRL keeps both.
        bos_id, eos_id = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self._adds_bos and ids[:2] == [bos_id, bos_id]:
            ids = ids[1:]
        if self._adds_eos and ids[-2:] == [eos_id, eos_id]:
            ids = ids[:-1]
        return self._closed(ids)

    def encode_rendered(self, text: str) -> list[int]:
        """The ids of text that a chat template has rendered: specials recognised, none added."""
        self._check_text(text)
        return self._closed(self._encoder.ids(text, special_tokens=False))

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        largest: int = max(self.tokenizer.get_vocab().values())
        return largest + 1

    def fingerprint(self) -> str:
        """`"sha256:..."` over all that decides which ids a conversation gets.

        The pad token is left out: pooling takes the last token of a sequence, whatever it is, and
        an export chooses its pad token when it is written. A pad token that is *added* to the
        vocabulary makes another vocabulary, and another fingerprint.
        """
        return self._fingerprint

    def describe(self) -> dict[str, Any]:
        """What a manifest records, as plain JSON."""
        tokenizer = self.tokenizer
        template = json.dumps(tokenizer.chat_template, ensure_ascii=True, sort_keys=True)
        return {
            "fingerprint": self.fingerprint(),
            "version": POLICY_VERSION,
            "control_tokens": self.control_tokens,
            "eos_rule": "text: closed by EOS once; conversation: as the template closes it",
            "eos_token": tokenizer.eos_token,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token": tokenizer.bos_token,
            "bos_token_id": tokenizer.bos_token_id,
            "chat_template_sha256": (
                hashlib.sha256(template.encode()).hexdigest() if tokenizer.chat_template else None
            ),
        }

    @cached_property
    def _fingerprint(self) -> str:
        tokenizer = self.tokenizer
        encoder = self._encoder
        probes = [encoder.ids(text, special_tokens=on) for text in _PROBES for on in (False, True)]
        content = [
            POLICY_VERSION,
            self.control_tokens,
            [self._adds_bos, self._adds_eos],
            tokenizer.chat_template,
            [tokenizer.eos_token, tokenizer.eos_token_id],
            [tokenizer.bos_token, tokenizer.bos_token_id],
            sorted(tokenizer.get_vocab().items()),
            probes,
        ]
        text = json.dumps(content, ensure_ascii=True, sort_keys=True)
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def _render(self, chat: _Chat) -> str:
        """Run the template. What it raises is about the conversation, in its author's words."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                chat.messages, tokenize=False, tools=chat.tools, **chat.kwargs
            )
        except TemplateError as error:
            raise _error(f"the chat template refused it: {error}", reason="template") from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise _error(
                f"the chat template failed on it: {type(error).__name__}: {error}",
                reason="template",
            ) from error
        for index, message in enumerate(chat.messages):
            content = message.get("content")
            if isinstance(content, list) and any(repr(part) in text for part in content):
                # `{{ message.content }}` over a list prints Python, and nobody would notice.
                raise _error(
                    f"messages[{index}].content is a list of parts, and this chat template prints "
                    "such a list as Python source. Join the parts into one string.",
                    reason="template",
                    message_index=index,
                )
        return text

    def _marks(self, chat: _Chat) -> _Marks:
        """Find the control tokens in the conversation's strings, refusing those not to be kept."""
        marks = _Marks(self._specials)
        for index, text in chat.strings():
            tokens = self._specials.found_in(text) if self._specials.pattern else []
            if tokens:
                tokens = [token for token in tokens if token not in self._alias().ordinary]
            elif self._specials.hidden_in(text):
                raise _error(
                    f"{_place(index)} holds characters that the tokenizer's normaliser turns into "
                    "a control token. Write that token in plain ASCII, or remove it.",
                    reason="control_token",
                    message_index=index,
                )
            if tokens and self.control_tokens == "refuse":
                raise _error(
                    f"{_place(index)} holds the control token {tokens[0]!r}, and this rendering "
                    "refuses those. Remove it, or use control_tokens='as_text'.",
                    reason="control_token",
                    message_index=index,
                )
            marks.note(text, tokens)
        for index, message in enumerate(chat.messages):
            if self._specials.found_in(message["role"]):
                raise _error(
                    f"messages[{index}].role is {message['role']!r}, which holds a control token. "
                    "A role is a word such as 'user' or 'assistant'.",
                    reason="control_token",
                    message_index=index,
                )
        return marks

    def _alias(self) -> _AliasEncoder:
        """The second tokenizer, made when the first control token turns up in a content."""
        with self._alias_lock:
            if self._alias_encoder is None:
                if not self.tokenizer.is_fast:
                    raise _error(
                        "a message holds a control token, and this tokenizer (not a fast one) "
                        "cannot encode it as text. Remove it from the content, or convert the "
                        "tokenizer to a tokenizer.json.",
                        reason="control_token",
                    )
                self._alias_encoder = _AliasEncoder(self.tokenizer, self._specials)
            return self._alias_encoder

    def _check_text(self, text: object) -> None:
        if not isinstance(text, str):
            raise _error(f"the text is {_kind(text)}; expected str.", reason="not_text")
        if not text:
            raise _error("the text is empty.", reason="empty")
        _check_unicode(text, "the text")

    def _closed(self, ids: list[int]) -> list[int]:
        if not ids:
            raise _error("it renders to no tokens at all.", reason="empty")
        return ids


def truncate(ids: list[int], max_length: int, side: Literal["left", "right"]) -> list[int]:
    """At most `max_length` tokens. `"left"` cuts at the left: the last tokens stay."""
    assert max_length >= 1
    if len(ids) <= max_length:
        return ids
    return ids[-max_length:] if side == "left" else ids[:max_length]


@dataclass(frozen=True)
class _Chat:
    """A checked conversation, made of plain dicts, lists and strings, without None values."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    kwargs: dict[str, Any]

    @classmethod
    def checked(cls, messages: object, tools: object, kwargs: object) -> _Chat:
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise _error(
                f"chat_template_kwargs is {_kind(kwargs)}; expected a mapping such as "
                "{'enable_thinking': False}.",
                reason="bad_kwargs",
                field="chat_template_kwargs",
            )
        options: dict[str, Any] = dict(kwargs or {})
        for key in options:
            if not isinstance(key, str) or key in RESERVED_TEMPLATE_KWARGS:
                raise _error(
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

    def mapped(self, change: Callable[[str], str]) -> _Chat:
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
        return _Chat(
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


@dataclass(frozen=True)
class _Specials:
    """The special tokens of a tokenizer, and how to find them in a string."""

    tokens: tuple[str, ...]
    normalizer: Any = None  # set where some special token is matched in the normalised text
    pattern: re.Pattern[str] | None = field(init=False)
    _heads: tuple[str, ...] = field(init=False)
    _tails: tuple[str, ...] = field(init=False)
    _first: frozenset[str] = field(init=False)
    _last: frozenset[str] = field(init=False)
    _longest: int = field(init=False)

    @classmethod
    def of(cls, tokenizer: Any) -> _Specials:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = {token.content for token in added} | set(tokenizer.all_special_tokens)
        normalizer = None
        if tokenizer.is_fast and any(token.normalized for token in added):
            normalizer = tokenizer.backend_tokenizer.normalizer
        longest_first = sorted(
            (name for name in names if name), key=lambda name: (-len(name), name)
        )
        return cls(tuple(longest_first), normalizer)

    def __post_init__(self) -> None:
        joined = "|".join(map(re.escape, self.tokens))
        cuts = [(token, cut) for token in self.tokens for cut in range(1, len(token))]
        derived = {
            "pattern": re.compile(joined) if joined else None,
            "_heads": tuple({token[:cut] for token, cut in cuts}),
            "_tails": tuple({token[cut:] for token, cut in cuts}),
            "_first": frozenset(token[0] for token in self.tokens),
            "_last": frozenset(token[-1] for token in self.tokens),
            "_longest": max(map(len, self.tokens), default=1),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def found_in(self, text: str) -> list[str]:
        return self.pattern.findall(text) if self.pattern else []

    def head_ends(self, text: str) -> bool:
        """Whether the text ends with the first part of a token (`<|im_`)."""
        # There are thousands of parts where a vocabulary reserves hundreds of tokens: look for the
        # characters that tokens begin with first.
        end = text[-self._longest :]
        return not self._first.isdisjoint(end) and end.endswith(self._heads)

    def tail_begins(self, text: str) -> bool:
        """Whether the text begins with the last part of a token (`end|>`)."""
        begin = text[: self._longest]
        return not self._last.isdisjoint(begin) and begin.startswith(self._tails)

    def hidden_in(self, text: str) -> bool:
        """Whether a control token appears only when the text is normalised (`＜/s＞`)."""
        if self.normalizer is None or text.isascii():
            return False
        return bool(self.found_in(self.normalizer.normalize_str(text)))


@dataclass
class _Marks:
    """The strings of one conversation that stand for literal text while the template runs."""

    specials: _Specials
    tokens: set[str] = field(default_factory=set)
    literals: list[str] = field(default_factory=list)
    # Letters and digits only: a template may escape, trim or change the case of anything else.
    nonce: str = field(default_factory=lambda: "zq" + secrets.token_hex(8))

    def note(self, text: str, tokens: list[str]) -> None:
        self.tokens.update(tokens)
        self.literals.extend(dict.fromkeys(token for token in tokens if token not in self.literals))
        if "" not in self.literals and self._open_ends(text.strip()) != (False, False):
            self.literals.append("")

    def replace(self, text: str) -> str:
        core = text.strip()
        before, after = text[: text.find(core)], text[text.find(core) + len(core) :]
        begins, ends = self._open_ends(core)
        if self.tokens and self.specials.pattern:
            core = self.specials.pattern.sub(
                lambda match: self._mark(match[0]) if match[0] in self.tokens else match[0], core
            )
        # An empty mark keeps "<|im_" at the end of one string from meeting "end|>" of the next.
        core = (self._mark("") if begins else "") + core + (self._mark("") if ends else "")
        return before + core + after

    def restore(self, text: str) -> str:
        found = re.sub(
            rf"{self.nonce}n(\d+)z",
            lambda match: self.literals[int(match[1])],
            text,
            flags=re.IGNORECASE,
        )
        if self.nonce[:10] in found.lower():
            raise _error(
                "the chat template cuts a text in the middle of a control token. Remove the token "
                "from the message.",
                reason="control_token",
            )
        return found

    def _mark(self, literal: str) -> str:
        return f"{self.nonce}n{self.literals.index(literal)}z"

    def _open_ends(self, core: str) -> tuple[bool, bool]:
        """Whether the text begins with the rest of a token, and whether it ends with a start."""
        return self.specials.tail_begins(core), self.specials.head_ends(core)


class _FastEncoder:
    """A private copy of the tokenizer's backend, on which nobody can turn padding on.

    `tokenizer(...)` writes padding, truncation and the handling of specials into the backend that
    all threads share. This copy is only read.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = _copied_backend(tokenizer)
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)

    def ids(self, text: str, *, special_tokens: bool) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=special_tokens).ids)


class _SlowEncoder:
    """A tokenizer written in Python, one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def ids(self, text: str, *, special_tokens: bool) -> list[int]:
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])


class _AliasEncoder:
    """A tokenizer for which every special token is text, and has an alias that is not."""

    def __init__(self, tokenizer: Any, specials: _Specials) -> None:
        from tokenizers import AddedToken

        self._specials = specials
        self._backend = _copied_backend(tokenizer)
        self._backend.encode_special_tokens = True
        # An alias splits the text exactly where its token would, white space included.
        rules = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
        nonce = secrets.token_hex(8)
        self._aliases = {
            token: f"\ue000{nonce}{n}\ue001" for n, token in enumerate(specials.tokens)
        }
        added = []
        for token, alias in self._aliases.items():
            rule = rules.get(token)
            sides = (
                {"lstrip": rule.lstrip, "rstrip": rule.rstrip, "single_word": rule.single_word}
                if rule
                else {}
            )
            added.append(AddedToken(alias, normalized=False, special=False, **sides))
        self._backend.add_tokens(added)
        self._real_ids = {
            self._backend.token_to_id(alias): tokenizer.convert_tokens_to_ids(token)
            for token, alias in self._aliases.items()
        }
        # A "special" token that plain text produces too (a pad token "!") controls nothing.
        self.ordinary = frozenset(
            token
            for token in specials.tokens
            if tokenizer.convert_tokens_to_ids(token)
            in self._backend.encode(token, add_special_tokens=False).ids
        )

    def ids(self, rendered: str, marks: _Marks) -> list[int]:
        """The ids of text that a template rendered over marked strings."""
        pattern = self._specials.pattern
        assert pattern is not None
        aliased = pattern.sub(lambda match: self._aliases[match[0]], rendered)
        ids = self._backend.encode(marks.restore(aliased), add_special_tokens=False).ids
        return [self._real_ids.get(token_id, token_id) for token_id in ids]


def _rebuild(tokenizer: Any, control_tokens: ControlTokens) -> Rendering:
    return Rendering(tokenizer, control_tokens=control_tokens)


def _copied_backend(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _check_list(messages: object) -> Iterator[tuple[int, object]]:
    if not isinstance(messages, (list, tuple)):
        hint = " Put the message into a list." if isinstance(messages, Mapping) else ""
        raise _error(
            f"the conversation is {_kind(messages)}; expected a list of messages such as "
            f"{{'role': 'user', 'content': 'Hi'}}.{hint}",
            reason="malformed",
        )
    if not messages:
        raise _error("the conversation is an empty list.", reason="empty")
    return enumerate(messages)


def _check_message(message: object, index: int) -> dict[str, Any]:
    name = f"messages[{index}]"
    if not isinstance(message, Mapping):
        problem = f"{name} is {_kind(message)}; expected a mapping with 'role' and 'content'."
    elif not isinstance(message.get("role"), str) or not message["role"].strip():
        role = message.get("role")
        seen = "missing" if role is None else "empty" if isinstance(role, str) else _kind(role)
        problem = f"{name}.role is {seen}; expected a word such as 'user' or 'assistant'."
    else:
        problem = _content_problem(message, f"{name}.content")
    if problem:
        reason = "unsupported" if "not supported" in problem else "malformed"
        raise _error(problem, reason=reason, message_index=index)
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
        return f"{name} is {_kind(content)}; expected text, or a list of text parts."
    for number, part in enumerate(content):
        if not isinstance(part, Mapping):
            return f"{name}[{number}] is {_kind(part)}; expected {{'type': 'text', 'text': '...'}}."
        kind = part.get("type")
        if kind != "text":
            return (
                f"{name}[{number}] has the type {kind!r}, which is not supported: raywards scores "
                "text. Expected {'type': 'text', 'text': '...'}."
            )
        if not isinstance(part.get("text"), str):
            return f"{name}[{number}].text is {_kind(part.get('text'))}; expected text."
    return "" if content else f"{name} is an empty list; expected text."


def _check_tools(tools: object) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, (list, tuple)):
        raise _error(
            f"tools is {_kind(tools)}; expected a list of JSON schemas.",
            reason="bad_tools",
            field="tools",
        )
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise _error(
                f"tools[{index}] is {_kind(tool)}; expected a JSON schema (a mapping).",
                reason="bad_tools",
                field="tools",
            )
    plain: list[Any] = _mapped(tools, _same, "tools")
    return plain


def _mapped(value: Any, change: Callable[[str], str], name: str, depth: int = 0) -> Any:
    """A copy of plain data with `change` applied to each string, keys too, and without None."""
    if depth > MAX_NESTING:
        raise _error(f"{name} is nested deeper than {MAX_NESTING} levels.", reason="malformed")
    if isinstance(value, str):
        _check_unicode(value, name)
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


def _check_unicode(text: str, name: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _error(
            f"{name} holds half a surrogate pair ({text[error.start]!r} at character "
            f"{error.start}), which is no Unicode text. Decode the source as UTF-8 first.",
            reason="surrogate",
        ) from None


def _place(index: int | str) -> str:
    return index if isinstance(index, str) else f"messages[{index}]"


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _error(
    problem: str, *, reason: str, field: str = "messages", message_index: int | str | None = None
) -> ConversationError:
    """`message_index` is the message at fault, or None where it is no single message."""
    if isinstance(message_index, str):
        field, message_index = message_index, None
    return ConversationError(problem, reason=reason, field=field, message_index=message_index)
