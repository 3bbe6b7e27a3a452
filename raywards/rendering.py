"""Conversation to token ids: one tokenizer, one template, one EOS rule.

    conversation ─plain, checked─► template ─► text ─► ids
    plain text ──────────────── + closing EOS ─► ids
    rendered text ─────────────────────────────► ids

Training, Scorer, HTTP and batch scoring all encode through `Rendering`, and its fingerprint travels
in the manifest: the same conversation gives the same ids everywhere.

A control token written inside a message is encoded as text (`control_tokens.py`), or refused. Where
a conversation holds none, its ids are exactly TRL's.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias

from raywards.control_tokens import ControlTokenText, copied_backend, encoded
from raywards.conversation import Chat, check_unicode, conversation_error, kind_of
from raywards.errors import ConfigError, ConversationError
from raywards.packing import common_prefix

Truncation: TypeAlias = Literal["error", "left", "right"]
"""What to do with a sequence longer than `max_length`; the word is the side that loses tokens."""
ControlTokens: TypeAlias = Literal["as_text", "refuse"]
Message: TypeAlias = Mapping[str, Any]

# Raise it whenever the same conversation could give other ids than before: exports made under
# another version then announce themselves instead of scoring differently.
POLICY_VERSION = 1

# Their first characters merge with what stands before them in as many ways as may be.
_ANSWERS = ("Yes.", "No way", "The sea", "I am sorry", "good", " 7", "\n\nSo", "(a)")
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
        self._control = ControlTokenText(tokenizer, refuse=control_tokens == "refuse")
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
        chat = Chat.checked(messages, tools, chat_template_kwargs)
        if not self.tokenizer.chat_template:
            raise conversation_error(
                "the tokenizer has no chat template, so messages cannot be rendered. Pass "
                "`chat_template_path` (a template file, or a model whose template to use), or give "
                "plain text instead of messages.",
                reason="no_template",
            )
        marks = self._control.marks(chat)
        if not marks.literals:
            return self._closed(self._encoder.ids(self._render(chat), special_tokens=False))
        marked = self._render(chat.mapped(marks.replace))
        if not marks.tokens:
            # Some string begins or ends with a piece of a control token ("<|im_"). Did the template
            # put the other piece beside it? Hardly ever: then nothing has to be renamed.
            plain = self._render(chat)
            if self._control.found_in(plain) == self._control.found_in(marked):
                return self._closed(self._encoder.ids(plain, special_tokens=False))
        return self._closed(self._control.ids(marked, marks))

    def encode_text(self, text: str) -> list[int]:
        """The ids of plain text: closed by EOS exactly once, opened by BOS at most once.

        The text is taken as it stands: special tokens written in it are recognised, as TRL does. A
        tokenizer without an EOS token appends nothing (encoders close with [SEP] by themselves).
        Raises `ConversationError`.
        """
        self._check_text(text)
        eos = self.tokenizer.eos_token
        whole = text if eos is None or text.endswith(eos) else text + eos
        return self._closed(self._dressed(whole))

    def encode_rendered(self, text: str, *, special_tokens: bool = False) -> list[int]:
        """The ids of text that a chat template has rendered: specials recognised, none added.

        With `special_tokens`, the tokenizer opens and closes it as it does any text; a BOS or EOS
        that stands there already is not repeated. Raises `ConversationError`.
        """
        self._check_text(text)
        if special_tokens:
            return self._closed(self._dressed(text))
        return self._closed(self._encoder.ids(text, special_tokens=False))

    def split(self, ids: Sequence[int]) -> int:
        """Where scoring parts a sequence in prefix and branch: behind its last assistant header.

        It follows from the ids alone, so who else is scored changes nothing; responses to one
        prompt then share it. 0 where there is no header with something behind it.
        """
        header = self._assistant_header
        if not header:
            return 0
        last = header[-1]
        for end in range(len(ids) - 1, len(header) - 1, -1):
            if ids[end - 1] == last and tuple(ids[end - len(header) : end]) == header:
                return end
        return 0

    @cached_property
    def _assistant_header(self) -> tuple[int, ...]:
        """The ids that the template puts between a turn and the assistant's answer to it."""
        if not self.tokenizer.chat_template:
            return ()
        before = []
        for question in ("Say something", "What is 2 + 2?"):
            turn = {"role": "user", "content": question}
            try:
                first, *others = (
                    self.encode_conversation([turn, {"role": "assistant", "content": answer}])
                    for answer in _ANSWERS
                )
            except ConversationError:  # a template with rules of its own
                return ()
            before.append(first[: min(common_prefix(first, other) for other in others)])
        shared = common_prefix(before[0][::-1], before[1][::-1])
        return tuple(before[0][len(before[0]) - shared :])

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

    def _render(self, chat: Chat) -> str:
        """Run the template. What it raises is about the conversation, in its author's words."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                chat.messages, tokenize=False, tools=chat.tools, **chat.kwargs
            )
        except TemplateError as error:
            raise conversation_error(
                f"the chat template refused it: {error}", reason="template"
            ) from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise conversation_error(
                f"the chat template failed on it: {type(error).__name__}: {error}",
                reason="template",
            ) from error
        for index, message in enumerate(chat.messages):
            content = message.get("content")
            if isinstance(content, list) and any(repr(part) in text for part in content):
                # `{{ message.content }}` over a list prints Python, and nobody would notice.
                raise conversation_error(
                    f"messages[{index}].content is a list of parts, and this chat template prints "
                    "such a list as Python source. Join the parts into one string.",
                    reason="template",
                    message_index=index,
                )
        return text

    def _dressed(self, text: str) -> list[int]:
        """With the tokenizer's own BOS and EOS, each once where it is in the text, too.

        TRL keeps both.
        """
        ids = self._encoder.ids(text, special_tokens=True)
        bos_id, eos_id = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self._adds_bos and ids[:2] == [bos_id, bos_id]:
            ids = ids[1:]
        if self._adds_eos and ids[-2:] == [eos_id, eos_id]:
            ids = ids[:-1]
        return ids

    def _check_text(self, text: object) -> None:
        if not isinstance(text, str):
            raise conversation_error(
                f"the text is {kind_of(text)}; expected str.", reason="not_text"
            )
        if not text:
            raise conversation_error("the text is empty.", reason="empty")
        check_unicode(text, "the text")

    def _closed(self, ids: list[int]) -> list[int]:
        if not ids:
            raise conversation_error("it renders to no tokens at all.", reason="empty")
        return ids


def truncate(ids: list[int], max_length: int, side: Literal["left", "right"]) -> list[int]:
    """At most `max_length` tokens. `"left"` cuts at the left: the last tokens stay."""
    assert max_length >= 1
    if len(ids) <= max_length:
        return ids
    return ids[-max_length:] if side == "left" else ids[:max_length]


class _FastEncoder:
    """A private copy of the tokenizer's backend, on which nobody can turn padding on.

    `tokenizer(...)` writes padding, truncation and the handling of specials into the backend that
    all threads share. This copy is only read.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._backend = copied_backend(tokenizer)
        self._backend.encode_special_tokens = bool(tokenizer.split_special_tokens)

    def ids(self, text: str, *, special_tokens: bool) -> list[int]:
        return encoded(self._backend, text, special_tokens=special_tokens)


class _SlowEncoder:
    """A tokenizer written in Python, one thread at a time."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()

    def ids(self, text: str, *, special_tokens: bool) -> list[int]:
        with self._lock:
            return list(self._tokenizer(text, add_special_tokens=special_tokens)["input_ids"])


def _rebuild(tokenizer: Any, control_tokens: ControlTokens) -> Rendering:
    return Rendering(tokenizer, control_tokens=control_tokens)
