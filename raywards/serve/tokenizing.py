"""Items to token ids, in threads beside the loop, within the request's limits.

Requests stand in a line. A thread takes the first, encodes for a moment, and puts what is left of
it at the end: a large request holds nobody up. What is done goes back to the loop together, since
each way between threads costs more than a short text.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Protocol

from raywards.errors import ConversationError, DeadlineError, RequestRefusedError
from raywards.rendering import truncate
from raywards.serve.dialects import Encoder, Item, ScoringRequest

# No tokenizer of a language model makes a token of more characters; text beyond cannot fit.
_CHARACTERS_PER_TOKEN = 250
# What text usually has: for admission before the real count is known.
_USUAL_CHARACTERS_PER_TOKEN = 4
_THREADS = 2
# How long a thread stays with one request, and with those that are done before it hands them over.
_TURN_S, _TOGETHER_S = 0.01, 0.002


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


class Tokenizer:
    """Of one model. Belongs to one event loop, which goes on serving others."""

    def __init__(self, encoder: TokenizerLike) -> None:
        self.waiting_tokens = 0
        """Of requests that are being tokenised or wait for it: a guess."""
        self._encoder = encoder
        self._line: SimpleQueue[_Job | None] = SimpleQueue()
        for number in range(_THREADS):
            threading.Thread(target=self._work, name=f"tokenize_{number}", daemon=True).start()

    def guess(self, request: ScoringRequest) -> int:
        """Tokens of all items, by the length of their texts, and of their ids: none has more than
        the model takes."""
        longest = self._encoder.max_length
        return sum(
            min(item.characters() // _USUAL_CHARACTERS_PER_TOKEN + item.num_ids(), longest)
            for item in request.items
        )

    async def encode(
        self, request: ScoringRequest, deadline: float, guess: int
    ) -> list[Encoded | RequestRefusedError]:
        """Each item, or why it cannot be scored, in order.

        `deadline` is an instant of `time.monotonic()`; `guess` is that of this request. Raises
        `DeadlineError`, and, where the request fails as a whole, `RequestRefusedError` for its
        first bad item. A caller that leaves stops the work.
        """
        loop = asyncio.get_running_loop()
        job = _Job(request, loop, loop.create_future())
        self.waiting_tokens += guess
        self._line.put(job)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                return await job.done
        except TimeoutError:
            raise DeadlineError(
                "the deadline passed before the request was tokenised; allow more time, or send "
                "less at once",
                status=504,
            ) from None
        finally:
            job.wanted = False
            self.waiting_tokens -= guess

    def close(self) -> None:
        """The threads end when they have done what is in the line."""
        for _ in range(_THREADS):
            self._line.put(None)

    # ---- in a thread

    def _work(self) -> None:
        ready: list[_Job] = []
        since = 0.0
        while (job := self._line.get()) is not None:
            if not ready:
                since = time.monotonic()
            if self._work_on(job):
                ready.append(job)
            else:
                self._line.put(job)
            if ready and (self._line.empty() or time.monotonic() - since > _TOGETHER_S):
                _hand_over(ready)
                ready = []
        _hand_over(ready)

    def _work_on(self, job: _Job) -> bool:
        """For a moment; whether it is done."""
        until = time.monotonic() + _TURN_S
        for item in job.request.items[len(job.encoded) :]:
            if not job.wanted:
                return True
            try:
                job.encoded.append(self._encode(item, job.request))
            except ConversationError as error:
                refused = _refused(error, item)
                if job.request.fails_as_a_whole:
                    job.error = refused
                    return True
                job.encoded.append(refused)
            except Exception as error:  # its waiter would wait for ever
                job.error = error
                return True
            if time.monotonic() > until:
                break
        return len(job.encoded) == len(job.request.items)

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


@dataclass
class _Job:
    """A request in the line."""

    request: ScoringRequest
    loop: asyncio.AbstractEventLoop
    done: asyncio.Future[list[Encoded | RequestRefusedError]]
    encoded: list[Encoded | RequestRefusedError] = field(default_factory=list)
    error: Exception | None = None
    wanted: bool = True
    """False once its caller has left."""


def _hand_over(jobs: Sequence[_Job]) -> None:
    """What a thread has done, to the loop that waits for it."""
    if jobs and not jobs[0].loop.is_closed():
        jobs[0].loop.call_soon_threadsafe(_settle, jobs)


def _settle(jobs: Sequence[_Job]) -> None:
    for job in jobs:
        if job.done.done():  # its caller has left
            continue
        if job.error is None:
            job.done.set_result(job.encoded)
        else:
            job.done.set_exception(job.error)


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
