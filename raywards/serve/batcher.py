"""Batches across requests: a queue of sequences, filled into forwards of bounded cost.

    submit ─► queue (oldest first) ─► batch ─► one worker thread ─► rewards ─► waiters

One task owns the queue. While the thread computes, requests pile up; what has piled up is the next
batch, so there is no waiting time to set. The task waits a moment only for what is being tokenised:
the answers to one prompt come together, in a request each. A batch is opened by the oldest sequence
and filled with those nearest to it in length, within a window of the oldest; a sequence that has
been overtaken too often goes first whatever its length. A request of many sequences is spread over
batches.

Knows only lists of token ids and a function that scores them: nothing of models, HTTP or Ray.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import traceback
from array import array
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field

from raywards.errors import (
    DeadlineError,
    NonFiniteError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
)

logger = logging.getLogger(__name__)

Score = Callable[[list[list[int]]], list[float]]
"""Rewards of unique sequences, in order. `MemoryError`: fewer at once could do."""
Cost = Callable[[int, int, int], int]
"""Cost in tokens of one forward, from its count of sequences, the longest, and their sum."""

# Sequences are looked at in the order of arrival, up to so many batches' worth.
_WINDOW_BATCHES = 8
# A sequence that so many batches with younger ones have passed over is taken next.
_MOST_OVERTAKEN = 8
# A neighbour may cost this many times what it costs alone, plus a little: beyond that, padding
# eats what batching gains.
_MOST_WASTE = 1.5
_WASTE_TOKENS = 64
# How fast the measured speed forgets.
_FORGET_PER_BATCH = 0.1
_RETRY_AFTER_S = (1.0, 60.0)
# A batch waits for what is on its way, if that is such a share of what is here, at most so long.
_ARRIVING_SHARE, _ARRIVING_S = 1 / 8, 0.01


def padded_cost(count: int, longest: int, total: int) -> int:
    """Every sequence is padded to the longest."""
    return count * longest


def packed_cost(count: int, longest: int, total: int) -> int:
    """Sequences lie end to end. A prefix that some share makes it cheaper than said here."""
    return total


@dataclass(frozen=True)
class Scored:
    """Rewards of one submission, in its order, and where the time went."""

    rewards: list[float]
    queue_s: float
    forward_s: float
    batch_size: int


@dataclass(frozen=True)
class Forward:
    """One that succeeded, of sequences that somebody waits for."""

    sequences: int
    """That were computed: equal ones count once."""
    tokens: int
    """Of these."""
    longest: int
    shared_tokens: int
    """Of these tokens, those of a prefix that another sequence of the batch has, too."""
    seconds: float


@dataclass
class BatcherStats:
    """Counters since the start, and what waits now."""

    queued_tokens: int = 0
    queued_sequences: int = 0
    batches: int = 0
    sequences: int = 0
    computed_sequences: int = 0
    tokens: int = 0
    refused: int = 0
    dropped_sequences: int = 0
    failed_batches: int = 0
    tokens_per_s: float | None = None


class Batcher:
    """Scores sequences in batches. All methods belong to one event loop.

    score: called in one worker thread with unique sequences; gives one reward for each.
    max_batch_tokens: cost of one forward. A sequence above it runs alone.
    max_batch_sequences: unique sequences of one forward.
    max_queued_tokens: tokens that may wait; beyond, `submit` raises at once.
    cost: of a forward: `padded_cost`, or `packed_cost` where the scorer packs.
    observe: is told of each forward, but for those of probes alone.
    arriving: about how many tokens will be submitted in a moment.
    """

    def __init__(
        self,
        score: Score,
        *,
        max_batch_tokens: int,
        max_batch_sequences: int,
        max_queued_tokens: int,
        cost: Cost = padded_cost,
        observe: Callable[[Forward], None] = lambda forward: None,
        arriving: Callable[[], int] = lambda: 0,
    ) -> None:
        self.stats = BatcherStats()
        self._observe = observe
        self._arriving = arriving
        self._score = score
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_sequences = max_batch_sequences
        self._max_queued_tokens = max_queued_tokens
        self._cost = cost
        self._queue: deque[_Entry] = deque()
        self._waiting: set[_Submission] = set()
        self._work = asyncio.Event()
        self._closing = False
        self._owner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._forward_started: float | None = None
        self.computing_tokens = 0
        """Of the present forward."""
        self._recent_tokens = 0.0
        self._recent_s = 0.0

    @property
    def healthy(self) -> bool:
        """Whether the owner task runs. Once it has died or is closed, nothing is computed."""
        return self._owner is not None and not self._owner.done()

    @property
    def forward_age_s(self) -> float:
        """How long the present forward has been running; 0 between forwards."""
        started = self._forward_started
        return 0.0 if started is None else time.monotonic() - started

    def start(self) -> None:
        """Start the owner task on the running loop."""
        assert self._owner is None, "a batcher is started once"
        self._owner = asyncio.get_running_loop().create_task(self._own(), name="batcher")

    async def submit(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        prefixes: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> list[float]:
        """One reward per sequence, in order.

        `prefixes`: of each sequence, the length of the part that others may share with it: such
        sequences are put into one batch, and count it once. `deadline` is an instant of
        `time.monotonic()`. Raises `OverloadedError` where the queue is
        full or closing, `RequestRefusedError` where it could never hold the request,
        `DeadlineError`, and `ServiceError` where scoring failed. If the caller is cancelled, what
        was not yet computed will not be.
        """
        return (await self.submit_timed(sequences, prefixes=prefixes, deadline=deadline)).rewards

    async def submit_timed(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        prefixes: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> Scored:
        """`submit`, with where the time went."""
        return await self._outcome(_Submission(sequences, prefixes, deadline))

    async def submit_each(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        prefixes: Sequence[int] | None = None,
        deadline: float | None = None,
    ) -> AsyncGenerator[tuple[int, Scored | Exception], None]:
        """Each sequence with its position, as it succeeds or fails on its own.

        Raises, before the first, what `submit` raises at once.
        """
        singly = [
            _Submission([ids], [prefix], deadline)
            for ids, prefix in zip(sequences, prefixes or [0] * len(sequences), strict=True)
        ]
        async with aclosing(self._outcomes(singly, deadline)) as outcomes:
            async for outcome in outcomes:
                yield outcome

    async def probe(self, ids: Sequence[int], *, deadline: float) -> None:
        """Score one sequence ahead of the queue, to see that scores still come out."""
        if not self.healthy:
            raise ServiceError("the batcher of this replica is not running", status=500)
        await self._outcome(_Submission([ids], None, deadline, is_probe=True))

    def retry_after_s(self) -> float:
        """When there should be room again: the backlog at the measured speed, 1 to 60 seconds."""
        least, most = _RETRY_AFTER_S
        speed = self.stats.tokens_per_s
        return min(max(self.stats.queued_tokens / speed, least), most) if speed else least

    async def close(self) -> None:
        """Refuse new work, finish what is queued, stop."""
        self._closing = True
        self._work.set()
        if self._owner is not None:
            await asyncio.wait([self._owner])
        self._thread.shutdown(wait=False)

    # ---- admission

    async def _outcome(self, submission: _Submission) -> Scored:
        """Queue it and wait: what one request costs most of the time."""
        self._enqueue([submission])
        try:
            async with asyncio.timeout(submission.remaining_s()):
                await submission.done
        except TimeoutError:
            raise _too_late() from None
        finally:
            self._leave([submission])
        scored = submission.outcome()
        if isinstance(scored, Exception):
            raise scored
        return scored

    async def _outcomes(
        self, submissions: Sequence[_Submission], deadline: float | None
    ) -> AsyncGenerator[tuple[int, Scored | Exception], None]:
        """Queue each, and tell of each when it is done; all are admitted, or none."""
        self._enqueue(submissions)
        left = {submission.done: index for index, submission in enumerate(submissions)}
        try:
            while left:
                done, _ = await asyncio.wait(
                    left,
                    timeout=None if deadline is None else deadline - time.monotonic(),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for future in sorted(done or left, key=left.__getitem__):
                    index = left.pop(future)
                    submissions[index].fail(_too_late())  # unless it is done
                    yield index, submissions[index].outcome()
        finally:
            self._leave(submissions)

    def _enqueue(self, submissions: Sequence[_Submission]) -> None:
        """All are admitted, or none. A probe goes to the front, and is never refused."""
        if not any(submission.is_probe for submission in submissions):
            self._admit([entry.length for each in submissions for entry in each.entries])
        for submission in submissions:
            self._waiting.add(submission)
            at_front = submission.is_probe
            (self._queue.extendleft if at_front else self._queue.extend)(submission.entries)
            self._count(submission.entries, +1)
        self._work.set()

    def _leave(self, submissions: Sequence[_Submission]) -> None:
        """Nobody waits for them any more."""
        for submission in submissions:
            self._waiting.discard(submission)
            self._void(submission)

    def _admit(self, lengths: Sequence[int]) -> None:
        tokens, count = sum(lengths), len(lengths)
        if self._closing or (self._owner is not None and self._owner.done()):
            raise OverloadedError(
                "this replica is stopping; try again, another one takes over",
                status=503,
                retry_after_s=1.0,
            )
        assert self._owner is not None, "start() the batcher first"
        if tokens > self._max_queued_tokens and count > 1:
            self.stats.refused += 1
            raise RequestRefusedError(
                f"the request has {tokens} tokens in {count} sequences, and at most "
                f"{self._max_queued_tokens} fit into the queue; send fewer sequences per request",
                status=413,
                code="too_many_tokens",
            )
        if 0 < self.stats.queued_tokens > self._max_queued_tokens - tokens:
            self.stats.refused += 1
            raise OverloadedError(
                f"the queue is full: {self.stats.queued_tokens} tokens wait and "
                f"{self._max_queued_tokens} may; try again after the time in Retry-After",
                status=503,
                retry_after_s=self.retry_after_s(),
            )

    def _void(self, submission: _Submission) -> None:
        """What it still has in the queue will not be computed."""
        submission.done.cancel()
        void = [entry for entry in submission.entries if entry.queued]
        self._count(void, -1)
        self.stats.dropped_sequences += len(void)
        for entry in void:
            entry.void()

    def _count(self, entries: Iterable[_Entry], sign: int) -> None:
        for entry in entries:
            self.stats.queued_tokens += sign * entry.length
            self.stats.queued_sequences += sign

    # ---- the owner task

    async def _own(self) -> None:
        try:
            while True:
                self._drop_void()
                if not self._queue:
                    if self._closing:
                        return
                    self._work.clear()
                    await self._work.wait()
                    continue
                await self._let_arrive()
                batch = self._fill()
                if batch:
                    await self._compute(batch)
        except BaseException as error:
            logger.error("the batcher died: %s", raised_at(error))
            for submission in self._waiting:
                submission.fail(_failed("the batcher of this replica died", error))
            if not isinstance(error, Exception):
                raise

    async def _let_arrive(self) -> None:
        """Wait for what is on its way: a prompt whose answers are in two batches is computed twice.

        Under load what waits is more by far, and nothing stands still.
        """
        until = time.monotonic() + _ARRIVING_S
        while 0 < self.stats.queued_tokens < self._max_batch_tokens:
            if self._arriving() < _ARRIVING_SHARE * self.stats.queued_tokens:
                return
            self._work.clear()
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._work.wait()
            except TimeoutError:
                return

    def _drop_void(self) -> None:
        while self._queue and not self._queue[0].queued:
            self._queue.popleft()

    def _fill(self) -> list[_Entry]:
        """Take the next batch out of the queue."""
        window = self._window()
        if not window:
            return []
        first = window[0]
        filling = _Filling(self._cost, self._max_batch_tokens, self._max_batch_sequences)
        same: dict[bytes, list[_Entry]] = {}
        for entry in window:
            same.setdefault(entry.key, []).append(entry)
        filling.add(first)
        for entry in window[1:]:
            if entry.overtaken >= _MOST_OVERTAKEN and entry.key not in filling.chosen:
                if not filling.fits(entry):
                    break
                filling.add(entry)
        filling.add_neighbours([twins[0] for twins in same.values()], first)
        batch = [entry for key in filling.chosen for entry in same[key]]
        self._take(batch, window)
        return batch

    def _window(self) -> list[_Entry]:
        """The oldest entries that are still wanted. The late ones fail here, before compute."""
        window: list[_Entry] = []
        now, tokens = time.monotonic(), 0
        for entry in self._queue:
            if not entry.queued:
                continue
            submission = entry.submission
            if submission.late(now):
                submission.fail(_too_late())
            if submission.done.done():
                self._void(submission)
                continue
            window.append(entry)
            tokens += entry.length
            if tokens >= _WINDOW_BATCHES * self._max_batch_tokens:
                break
        return window

    def _take(self, batch: list[_Entry], window: list[_Entry]) -> None:
        now = time.monotonic()
        self._count(batch, -1)
        for entry in batch:
            entry.queued = False
            entry.submission.started(now)
        left = [entry for entry in window if entry.queued]
        youngest = max((i for i, entry in enumerate(window) if not entry.queued), default=0)
        for entry in window[:youngest]:
            entry.overtaken += entry.queued
        # All of the window stood at the front, between entries that are void by now.
        last = window[-1]
        while self._queue.popleft() is not last:
            pass
        self._queue.extendleft(reversed(left))

    # ---- forwards

    async def _compute(self, batch: list[_Entry]) -> None:
        try:
            rewards, seconds = await self._forward(batch)
        except MemoryError:
            self.stats.failed_batches += 1
            await self._halve(batch)
        except Exception as error:
            self.stats.failed_batches += 1
            logger.warning(
                "a batch of %d sequences failed (%s); each request is tried on its own",
                len(batch),
                type(error).__name__,
            )
            await self._isolate(batch)
        else:
            self._deliver(batch, rewards, seconds)

    async def _halve(self, batch: list[_Entry]) -> None:
        """Too much at once: each half on its own, and less at once from now on."""
        keys = list({entry.key: entry for entry in batch}.values())
        if len(keys) == 1:
            for entry in batch:
                entry.submission.fail(_too_large(entry))
            return
        filled = _Filling(self._cost, self._max_batch_tokens, self._max_batch_sequences)
        for entry in keys:
            filled.add(entry)
        cost = filled.costs()
        self._max_batch_tokens = min(self._max_batch_tokens, max(1, cost // 2))
        logger.warning(
            "no memory for a batch of %d tokens; batches have at most %d from now on",
            cost,
            self._max_batch_tokens,
        )
        first = {entry.key for entry in keys[: len(keys) // 2]}
        for half in (
            [entry for entry in batch if entry.key in first],
            [entry for entry in batch if entry.key not in first],
        ):
            wanted = [entry for entry in half if not entry.submission.done.done()]
            if wanted:
                await self._compute(wanted)

    async def _isolate(self, batch: list[_Entry]) -> None:
        """Whose input was it? Each request's part runs once more, without the others'."""
        parts: dict[_Submission, list[_Entry]] = {}
        for entry in batch:
            parts.setdefault(entry.submission, []).append(entry)
        for submission, part in parts.items():
            if submission.done.done() or submission.late(time.monotonic()):
                continue
            try:
                rewards, seconds = await self._forward(part)
            except MemoryError:
                await self._halve(part)
            except Exception as error:
                logger.error("scoring failed for one request: %s", raised_at(error))
                submission.fail(_scoring_failed(error, part))
            else:
                self._deliver(part, rewards, seconds)

    async def _forward(self, entries: list[_Entry]) -> tuple[dict[bytes, float], float]:
        """Rewards by sequence, and the seconds it took. Equal sequences are computed once."""
        once = {entry.key: entry for entry in entries}
        unique = {key: list(entry.ids) for key, entry in once.items()}
        self.computing_tokens = sum(map(len, unique.values()))
        loop = asyncio.get_running_loop()
        started = self._forward_started = time.monotonic()
        try:
            rewards = await loop.run_in_executor(self._thread, self._scores, list(unique.values()))
        finally:
            self._forward_started = None
            self.computing_tokens = 0
        seconds = time.monotonic() - started
        if len(rewards) != len(unique):
            raise RuntimeError(f"{len(rewards)} rewards for {len(unique)} sequences")
        if not all(entry.submission.is_probe for entry in entries):
            self._tell(list(once.values()), len(entries), seconds)
        return dict(zip(unique, rewards, strict=True)), seconds

    def _tell(self, computed: list[_Entry], answered: int, seconds: float) -> None:
        prefixes = {entry.prefix: entry.prefix_length for entry in computed}
        tokens = sum(entry.length for entry in computed)
        forward = Forward(
            sequences=len(computed),
            tokens=tokens,
            longest=max(entry.length for entry in computed),
            shared_tokens=sum(e.prefix_length for e in computed) - sum(prefixes.values()),
            seconds=seconds,
        )
        self._measure(tokens, seconds)
        self.stats.batches += 1
        self.stats.sequences += answered
        self.stats.computed_sequences += len(computed)
        self.stats.tokens += tokens
        self._observe(forward)

    def _scores(self, sequences: list[list[int]]) -> list[float]:
        """Called in the thread. No future can hold a StopIteration: its waiter would hang."""
        try:
            return self._score(sequences)
        except StopIteration as error:
            raise RuntimeError("the score function raised StopIteration") from error

    def _measure(self, tokens: int, seconds: float) -> None:
        """Sums that fade, not a mean of speeds: a batch counts by its tokens."""
        keep = 1 - _FORGET_PER_BATCH
        self._recent_tokens = keep * self._recent_tokens + tokens
        self._recent_s = keep * self._recent_s + seconds
        self.stats.tokens_per_s = self._recent_tokens / max(self._recent_s, 1e-6)

    def _deliver(self, batch: list[_Entry], rewards: dict[bytes, float], seconds: float) -> None:
        computed: set[_Submission] = set()
        for entry in batch:
            submission, reward = entry.submission, rewards[entry.key]
            if submission not in computed:
                computed.add(submission)
                submission.forward_s += seconds
                submission.batch_size = max(submission.batch_size, len(rewards))
            if math.isfinite(reward):
                submission.deliver(entry.index, reward)
            else:
                submission.fail(_not_finite(entry.index))


class _Submission:
    """Sequences that are answered together."""

    def __init__(
        self,
        sequences: Sequence[Sequence[int]],
        prefixes: Sequence[int] | None,
        deadline: float | None,
        *,
        is_probe: bool = False,
    ) -> None:
        shared = prefixes or [0] * len(sequences)
        self.is_probe = is_probe
        self.entries = [
            _Entry(ids, i, self, prefix)
            for i, (ids, prefix) in enumerate(zip(sequences, shared, strict=True))
        ]
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.forward_s = 0.0
        self.batch_size = 0
        self._deadline = deadline
        self._rewards = [math.nan] * len(self.entries)
        self._missing = len(self.entries)
        self._error: Exception | None = None
        self._arrived = time.monotonic()
        self._started: float | None = None
        if not self.entries:
            self.done.set_result(None)

    def late(self, now: float) -> bool:
        return self._deadline is not None and now >= self._deadline

    def remaining_s(self) -> float | None:
        return None if self._deadline is None else self._deadline - time.monotonic()

    def started(self, now: float) -> None:
        self._started = now if self._started is None else self._started

    def deliver(self, index: int, reward: float) -> None:
        self._rewards[index] = reward
        self._missing -= 1
        if self._missing == 0 and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self._error = error
            self.done.set_result(None)

    def outcome(self) -> Scored | Exception:
        if self._error is not None:
            return self._error
        assert self._missing == 0
        queue_s = (self._started or self._arrived) - self._arrived
        return Scored(self._rewards, queue_s, self.forward_s, self.batch_size)


@dataclass(eq=False)
class _Entry:
    """One sequence in the queue."""

    ids: Sequence[int]
    index: int
    submission: _Submission
    prefix_length: int = 0
    """Of the part that other sequences may share, in tokens."""
    overtaken: int = 0
    queued: bool = True
    length: int = field(init=False)
    key: bytes = field(init=False)
    """The ids again: bytes remember their hash, and are compared fast."""
    prefix: bytes = field(init=False)
    """The ids of the shared part; empty where there is none."""

    def __post_init__(self) -> None:
        ids = array("q", self.ids)
        self.length = len(ids)
        self.key = ids.tobytes()
        self.prefix = ids[: self.prefix_length].tobytes()

    def void(self) -> None:
        """It stays in the queue until the owner task comes by, without its ids."""
        self.queued = False
        self.ids, self.key, self.prefix = (), b"", b""


@dataclass
class _Filling:
    """A batch that is being put together. A prefix is counted once for all that share it."""

    cost: Cost
    max_tokens: int
    max_sequences: int
    chosen: dict[bytes, None] = field(default_factory=dict)
    prefixes: set[bytes] = field(default_factory=set)
    longest: int = 0
    total: int = 0

    def fits(self, entry: _Entry) -> bool:
        return len(self.chosen) < self.max_sequences and self._with(entry) <= self.max_tokens

    def add(self, entry: _Entry) -> None:
        self.total += self._adds(entry)
        self.longest = max(self.longest, entry.length)
        self.chosen[entry.key] = None
        self.prefixes.add(entry.prefix)

    def costs(self) -> int:
        """Of what is in it, in tokens."""
        return self.cost(len(self.chosen), self.longest, self.total)

    def add_neighbours(self, entries: list[_Entry], first: _Entry) -> None:
        """Add what shares the prefix of `first`, then others, the nearest in length first, each
        with what shares its prefix."""
        families: dict[bytes | int, list[_Entry]] = {}
        for number, entry in enumerate(entries):
            families.setdefault(entry.prefix or number, []).append(entry)

        # Sorting is stable: of equal lengths the oldest comes first.
        def distance(family: list[_Entry]) -> int:
            near = family[0].prefix and family[0].prefix == first.prefix
            return -1 if near else abs(family[0].length - first.length)

        closed: set[bool] = set()
        for family in sorted(families.values(), key=distance):
            for entry in family:
                is_longer = entry.length > first.length
                if entry.key in self.chosen or is_longer in closed:
                    continue
                if self.fits(entry) and self._is_worth_it(entry):
                    self.add(entry)
                elif entry is family[0]:
                    closed.add(is_longer)  # what comes after it is farther off still
            if len(closed) == 2:
                return

    def _adds(self, entry: _Entry) -> int:
        return entry.length - (entry.prefix_length if entry.prefix in self.prefixes else 0)

    def _with(self, entry: _Entry) -> int:
        longest = max(self.longest, entry.length)
        return self.cost(len(self.chosen) + 1, longest, self.total + self._adds(entry))

    def _is_worth_it(self, entry: _Entry) -> bool:
        extra = self._with(entry) - self.costs()
        return extra <= _MOST_WASTE * self.cost(1, entry.length, entry.length) + _WASTE_TOKENS


def raised_at(error: BaseException) -> str:
    """`ValueError at model.py:31 in forward < scorer.py:9 in score`: for the log.

    Without its message and its notes, which could repeat what was scored.
    """
    told: list[str] = []
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        frames = reversed(traceback.extract_tb(one.__traceback__))
        places = " < ".join(f"{frame.filename}:{frame.lineno} in {frame.name}" for frame in frames)
        told.append(f"{type(one).__name__} at {places or 'no known place'}")
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    return "; caused by ".join(told)


def _scoring_failed(error: Exception, part: list[_Entry]) -> ServiceError:
    if isinstance(error, NonFiniteError):
        position = error.__dict__.get("index", 0)
        return _not_finite(list({entry.key: entry.index for entry in part}.values())[position])
    return _failed("scoring failed", error)


def _not_finite(index: int) -> ServiceError:
    return ServiceError(
        f"the reward of sequence {index} is not a finite number: the model's weights or its "
        "precision are broken for this input",
        status=500,
        code="non_finite_reward",
        index=index,
    )


def _failed(what: str, cause: BaseException) -> ServiceError:
    """The cause's text is told to nobody: it could repeat what was scored."""
    error = ServiceError(
        f"{what} ({type(cause).__name__}); the server's log says where",
        status=500,
        code="scoring_failed",
    )
    error.__cause__ = cause
    return error


def _too_large(entry: _Entry) -> RequestRefusedError:
    return RequestRefusedError(
        f"sequence {entry.index} has {entry.length} tokens, for which this server has not enough "
        "memory; send a shorter one",
        status=413,
        code="too_many_tokens",
        index=entry.index,
    )


def _too_late() -> DeadlineError:
    return DeadlineError(
        "the deadline passed before the reward was there; allow more time, or send less at once",
        status=504,
    )
