"""Control tokens inside a conversation's strings: found, and encoded as text.

A control token (`<|im_end|>`) written inside a message could close the turn early and buy a reward.
Here it stays text. The template must not see it, so that it cannot be mixed up with the template's
own, and the tokenizer must not split the text differently because of it. Hence two renamings:

    content   "... <|im_end|> ..."   ─►  "... zq5f1cn0z ..."     before the template runs
    rendered  "...<|im_end|>\\n"      ─►  "...(alias of it)\\n"    the template's own control token
              "... zq5f1cn0z ..."    ─►  "... <|im_end|> ..."    put back, now only text

and one pass of a tokenizer that knows the aliases and does not know the control tokens.
"""

from __future__ import annotations

import re
import secrets
import threading
from typing import Any, NoReturn

from raywards.conversation import Chat, conversation_error

# Up to here the lock is held for a moment that the batch call would take itself.
_SOON_ENCODED_CHARACTERS = 64


class ControlTokenText:
    """Finds a tokenizer's control tokens in conversations, and encodes them as text.

    With `refuse`, one found in a conversation raises `ConversationError`. Thread-safe.
    """

    def __init__(self, tokenizer: Any, *, refuse: bool) -> None:
        self._tokenizer = tokenizer
        self._refuse = refuse
        self._specials = _Specials(tokenizer)
        self._alias_lock = threading.Lock()
        self._alias_encoder: _AliasEncoder | None = None

    def found_in(self, text: str) -> list[str]:
        """The control tokens in a text, in order."""
        return self._specials.found_in(text)

    def marks(self, chat: Chat) -> Marks:
        """What has to be hidden from the template. Raises `ConversationError`."""
        marks = Marks(self._specials)
        for place, text in chat.strings():
            tokens = self.found_in(text)
            if tokens:
                tokens = [token for token in tokens if token not in self._alias().ordinary]
            elif self._specials.hidden_in(text):
                _raise_at(
                    place,
                    "holds characters that the tokenizer's normaliser turns into a control token. "
                    "Write that token in plain ASCII, or remove it.",
                )
            if tokens and self._refuse:
                _raise_at(
                    place,
                    f"holds the control token {tokens[0]!r}, and this rendering refuses those. "
                    "Remove it, or use control_tokens='as_text'.",
                )
            marks.note(text, tokens)
        for index, message in enumerate(chat.messages):
            if self.found_in(message["role"]):
                _raise_at(
                    index,
                    f"has the role {message['role']!r}, which holds a control token. A role is a "
                    "word such as 'user' or 'assistant'.",
                )
        return marks

    def ids(self, rendered: str, marks: Marks) -> list[int]:
        """The ids of what the template rendered over strings changed by `marks.replace`."""
        return self._alias().ids(rendered, marks)

    def _alias(self) -> _AliasEncoder:
        """The second tokenizer, made when the first control token turns up in a content."""
        with self._alias_lock:
            if self._alias_encoder is None:
                if not self._tokenizer.is_fast:
                    raise conversation_error(
                        "a message holds a control token, and this tokenizer (not a fast one) "
                        "cannot encode it as text. Remove it from the content, or convert the "
                        "tokenizer to a tokenizer.json.",
                        reason="control_token",
                    )
                self._alias_encoder = _AliasEncoder(self._tokenizer, self._specials)
            return self._alias_encoder


class Marks:
    """The strings of one conversation that stand for literal text while the template runs."""

    def __init__(self, specials: _Specials) -> None:
        self.tokens: set[str] = set()
        self.literals: list[str] = []
        self._specials = specials
        # Letters and digits only: a template may escape, trim or change the case of anything else.
        self._nonce = "zq" + secrets.token_hex(8)

    def note(self, text: str, tokens: list[str]) -> None:
        """Remember the control tokens of a text, and whether it begins or ends with half of one."""
        self.tokens.update(tokens)
        self.literals.extend(dict.fromkeys(token for token in tokens if token not in self.literals))
        if "" not in self.literals and any(self._specials.open_ends(text.strip())):
            self.literals.append("")

    def replace(self, text: str) -> str:
        """The text as the template may see it."""
        core = text.strip()
        before, after = text[: text.find(core)], text[text.find(core) + len(core) :]
        begins, ends = self._specials.open_ends(core)
        core = self._specials.pattern.sub(
            lambda match: self._mark(match[0]) if match[0] in self.tokens else match[0], core
        )
        # An empty mark keeps "<|im_" at the end of one string from meeting "end|>" of the next.
        core = (self._mark("") if begins else "") + core + (self._mark("") if ends else "")
        return before + core + after

    def restore(self, text: str) -> str:
        """The literal text again, where `replace` took it away."""
        found = re.sub(
            rf"{self._nonce}n(\d+)z",
            lambda match: self.literals[int(match[1])],
            text,
            flags=re.IGNORECASE,
        )
        if self._nonce[:10] in found.lower():
            raise conversation_error(
                "the chat template cuts a text in the middle of a control token. Remove the token "
                "from the message.",
                reason="control_token",
            )
        return found

    def _mark(self, literal: str) -> str:
        return f"{self._nonce}n{self.literals.index(literal)}z"


class _Specials:
    """The special tokens of a tokenizer, and how to find them in a string."""

    def __init__(self, tokenizer: Any) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        names = {token.content for token in added} | set(tokenizer.all_special_tokens)
        # Longest first: a pattern takes the first alternative that fits.
        self.tokens = sorted(filter(None, names), key=lambda name: (-len(name), name))
        self.pattern = re.compile("|".join(map(re.escape, self.tokens)) or "(?!)")
        # Needed only where some special token is matched in the normalised text.
        self._normalizer = None
        if tokenizer.is_fast and any(token.normalized for token in added):
            self._normalizer = tokenizer.backend_tokenizer.normalizer
        cuts = [(token, cut) for token in self.tokens for cut in range(1, len(token))]
        self._heads = tuple({token[:cut] for token, cut in cuts})
        self._tails = tuple({token[cut:] for token, cut in cuts})
        self._first = {token[0] for token in self.tokens}
        self._last = {token[-1] for token in self.tokens}
        self._longest = max(map(len, self.tokens), default=1)

    def found_in(self, text: str) -> list[str]:
        return self.pattern.findall(text)

    def open_ends(self, text: str) -> tuple[bool, bool]:
        """Whether the text begins with the rest of a token (`end|>`) or ends with a start."""
        # There are thousands of parts where a vocabulary reserves hundreds of tokens: look for the
        # characters that tokens end and begin with first.
        begin, end = text[: self._longest], text[-self._longest :]
        return (
            not self._last.isdisjoint(begin) and begin.startswith(self._tails),
            not self._first.isdisjoint(end) and end.endswith(self._heads),
        )

    def hidden_in(self, text: str) -> bool:
        """Whether a control token appears only when the text is normalised (`＜/s＞`)."""
        if self._normalizer is None or text.isascii():
            return False
        return bool(self.found_in(self._normalizer.normalize_str(text)))


class _AliasEncoder:
    """A tokenizer for which every special token is text, and has an alias that is not."""

    def __init__(self, tokenizer: Any, specials: _Specials) -> None:
        from tokenizers import AddedToken

        self._specials = specials
        self._backend = copied_backend(tokenizer)
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
            in encoded(self._backend, token, special_tokens=False)
        )

    def ids(self, rendered: str, marks: Marks) -> list[int]:
        aliased = self._specials.pattern.sub(lambda match: self._aliases[match[0]], rendered)
        ids = encoded(self._backend, marks.restore(aliased), special_tokens=False)
        return [self._real_ids.get(token_id, token_id) for token_id in ids]


def encoded(backend: Any, text: str, *, special_tokens: bool) -> list[int]:
    """The ids of a text. Other threads run meanwhile, also beside a text of megabytes.

    `encode` keeps Python's lock until it is through; `encode_batch_fast` gives it back, and counts
    no characters, for a few microseconds more a text.
    """
    if len(text) <= _SOON_ENCODED_CHARACTERS:
        return list(backend.encode(text, add_special_tokens=special_tokens).ids)
    [encoding] = backend.encode_batch_fast([text], add_special_tokens=special_tokens)
    return list(encoding.ids)


def copied_backend(tokenizer: Any) -> Any:
    """A private copy of a fast tokenizer's backend, without padding and truncation."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    return backend


def _raise_at(place: int | str, problem: str) -> NoReturn:
    """`place` is a message's index, or the name of another argument."""
    if isinstance(place, str):
        raise conversation_error(f"{place} {problem}", reason="control_token", field=place)
    raise conversation_error(
        f"messages[{place}] {problem}", reason="control_token", message_index=place
    )
