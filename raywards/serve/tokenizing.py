"""Items to token ids, in threads beside the loop, within the request's limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from raywards.errors import ConversationError, DeadlineError, RequestRefusedError
from raywards.rendering import truncate
from raywards.serve.dialects import Encoder, Item, ScoringRequest

# No tokenizer of a language model makes a token of more characters; text beyond cannot fit.
_CHARACTERS_PER_TOKEN = 250
# What text usually has: for admission before the real count is known.
_USUAL_CHARACTERS_PER_TOKEN = 4
_THREADS = 2


class TokenizerLike(Encoder, Protocol):
    """The part of `Scorer` that is asked here."""

    def split(self, ids: Sequence[int]) -> int: ...

    def has_text(self, ids: Sequence[int]) -> bool: ...


@dataclass(frozen=True)
class Encoded:
    """One item, ready to be scored."""

    ids: list[int]
    truncated: bool
    prefix: int
    """How many of the ids other sequences may begin with, too."""


def guessed_tokens(request: ScoringRequest) -> int:
    """Of all items, by the length of their texts; ids are tokens already."""
    characters = sum(item.characters() for item in request.items)
    ids = sum(item.num_ids() for item in request.items)
    return characters // _USUAL_CHARACTERS_PER_TOKEN + ids


class Tokenizer:
    """Of one model. Belongs to one event loop, which goes on serving others."""

    def __init__(self, encoder: TokenizerLike) -> None:
        self.waiting_tokens = 0
        """Of requests that are being tokenised or wait for it: a guess."""
        self._encoder = encoder
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenize")

    async def encode(
        self, request: ScoringRequest, deadline: float
    ) -> list[Encoded | RequestRefusedError]:
        """Each item, or why it cannot be scored, in order.

        `deadline` is an instant of `time.monotonic()`. Raises `DeadlineError`, and, where the
        request fails as a whole, `RequestRefusedError` for its first bad item. A caller that leaves
        stops the work.
        """
        guess, gone = guessed_tokens(request), threading.Event()
        self.waiting_tokens += guess
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._threads, self._encode_all, request, deadline, gone
            )
        finally:
            gone.set()
            self.waiting_tokens -= guess

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _encode_all(
        self, request: ScoringRequest, deadline: float, gone: threading.Event
    ) -> list[Encoded | RequestRefusedError]:
        encoded: list[Encoded | RequestRefusedError] = []
        for item in request.items:
            if gone.is_set() or time.monotonic() > deadline:
                raise DeadlineError(
                    "the deadline passed before the request was tokenised; allow more time, or "
                    "send less at once",
                    status=504,
                )
            try:
                encoded.append(self._encode(item, request))
            except ConversationError as error:
                told = _refused(error, item)
                if request.fails_as_a_whole:
                    raise told from None
                encoded.append(told)
        return encoded

    def _encode(self, item: Item, request: ScoringRequest) -> Encoded:
        """Ask for no truncation first: else nobody would know whether it took place."""
        characters, limit = item.characters(), self._encoder.max_length
        if characters > limit * _CHARACTERS_PER_TOKEN:
            raise ConversationError(
                f"{characters} characters cannot fit into {limit} tokens; at most "
                f"{limit * _CHARACTERS_PER_TOKEN} are read, also where the text is truncated",
                reason="too_long",
            )
        truncated = False
        try:
            ids = item.encode(self._encoder, "error")
        except ConversationError as error:
            if error.reason != "too_long" or request.truncation == "error":
                raise
            ids = item.encode(self._encoder, request.truncation)
            truncated = True
        if request.max_length is not None and len(ids) > request.max_length:
            if request.truncation == "error":
                raise ConversationError(
                    f"{len(ids)} tokens are more than the request's max_length="
                    f"{request.max_length}; raise it, or ask for truncation 'left' or 'right'",
                    reason="too_long",
                )
            ids = truncate(ids, request.max_length, request.truncation)
            truncated = True
        if truncated and not self._encoder.has_text(ids):
            raise ConversationError(
                f"cut to {len(ids)} tokens, nothing is left but control tokens; allow more",
                reason="empty",
            )
        return Encoded(ids, truncated, self._encoder.split(ids))


def _refused(error: ConversationError, item: Item) -> RequestRefusedError:
    """The renderer's finding, with the field of the request in front."""
    details = error.__dict__
    field = item.field
    if details.get("field") in ("chat_template_kwargs", "tools"):
        field = details["field"]
    elif details.get("message_index") is not None:
        field = item.field_of_message(details["message_index"])
    return RequestRefusedError(
        f"{field}: {error}", status=422, field=field, code=details.get("reason", "invalid_value")
    )
