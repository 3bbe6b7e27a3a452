"""Random scenarios for the batcher, each made from one seed, and what has to hold in all of them.

    seed ─► Scenario (arrivals, faults, cancellations, a close) ─► play ─► checks while and after

Time is virtual: a loop that has nothing to do moves its clock to the next timer instead of
waiting, and a loop with neither work nor timer has found a request that would hang for ever. The
worker thread is a timer, too, so that a seed always plays the same way. `play(seed, real=True)` is
the same scenario with the real clock and the real thread, squeezed into milliseconds.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import selectors
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from raywards.errors import (
    DeadlineError,
    NonFiniteError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
)
from raywards.serve import batcher as module
from raywards.serve.batcher import Batcher, Scored, packed_cost, padded_cost

Ids = tuple[int, ...]

# Tokens that make the score function fail for whatever sequence holds them.
RAISES, NOT_FINITE, NAN, TOO_FEW, STOPS = 666, 667, 668, 669, 670
FAULTS = (RAISES, NOT_FINITE, NAN, TOO_FEW, STOPS)
# A sequence that begins with such a token, or one above, shares a prefix with others.
FAMILY = 1000
# A probe begins with a token of its own.
PROBE = 1_000_000
MOST_OVERTAKEN = 8
WALL_S = 30
REAL_SCALE = 0.002


def reward_of(ids: Ids) -> float:
    """A number that no other sequence is likely to have."""
    return sum(token * (place + 1) for place, token in enumerate(ids)) / 7


class Wrong(AssertionError):
    """A scenario that did not end as it must."""


@dataclass
class Arrival:
    """One call of the batcher, and what will happen to it."""

    kind: str
    """`submit`, `timed`, `each`, `some` (of each, then the caller leaves) or `probe`."""
    sequences: list[Ids]
    at: float
    timeout: float | None
    cancel_after: float | None
    outcome: Any = None
    """Rewards, or the error; of `each` by position."""


@dataclass
class Scenario:
    """All that is random, drawn from one seed before anything runs."""

    seed: int
    packs: bool = False
    max_batch_tokens: int = 100
    max_batch_sequences: int = 8
    max_queued_tokens: int = 10_000
    memory: int | None = None
    """Cost of a forward above which it raises MemoryError."""
    memory_first: bool = True
    """Whether it does so before a sequence can make it fail."""
    flaky: float = 0.0
    """How often a forward fails for nobody's fault; never twice for one sequence."""
    pace: float = 0.1
    """Seconds of a usual forward."""
    arriving: int = 0
    """Tokens that are said to be on their way, most of the time."""
    close_at: float | None = None
    crash_at: int | None = None
    """The call of the cost function that raises."""
    prefixes: dict[int, Ids] = field(default_factory=dict)
    arrivals: list[Arrival] = field(default_factory=list)

    def prefix_length(self, ids: Ids) -> int:
        """A function of the ids, as `Scorer.split` is."""
        return len(self.prefixes.get(ids[0], ()))

    def cost(self, sequences: list[Ids]) -> int:
        """Of one forward; a common prefix counts once where the scorer packs."""
        if not self.packs:
            return len(sequences) * max(map(len, sequences))
        lengths = [self.prefix_length(ids) for ids in sequences]
        heads = {ids[:n] for ids, n in zip(sequences, lengths, strict=True)}
        return sum(map(len, sequences)) - sum(lengths) + sum(map(len, heads))


def draw_scenario(seed: int) -> Scenario:
    """The scenario of a seed."""
    draw = random.Random(seed)
    it = Scenario(
        seed,
        packs=draw.random() < 0.5,
        max_batch_tokens=draw.choice([16, 40, 100, 200]),
        max_batch_sequences=draw.choice([1, 2, 4, 8, 32]),
        max_queued_tokens=draw.choice([60, 300, 10_000, 10_000]),
        flaky=draw.choice([0, 0, 0, 0.1, 0.5]),
        pace=draw.choice([0.001, 0.1, 0.1, 1.0]),
    )
    if draw.random() < 0.3:
        it.memory = draw.randint(it.max_batch_tokens // 4, it.max_batch_tokens)
        it.memory_first = draw.random() < 0.5
    for number in range(draw.randint(1, 4)):
        head = [FAMILY + number] + [draw.randrange(50) for _ in range(draw.randint(0, 20))]
        it.prefixes[head[0]] = tuple(head)
    fault = draw.choice([0, 0, 0.02, 0.1, 0.4])
    pool = [_draw_ids(draw, it, fault) for _ in range(6)]
    at, patience = 0.0, draw.choice([0.2, 2, 20]) * it.pace
    if draw.random() < 0.1:
        it.arrivals += _draw_crowd(draw, it)
    for _ in range(draw.randint(3, 50)):
        if draw.random() < 0.5:
            at += draw.expovariate(1 / it.pace) * draw.choice([0.1, 1, 4])
        it.arrivals.append(_draw_arrival(draw, it, fault, pool, at, patience))
    if draw.random() < 0.2:
        it.close_at = draw.uniform(0, at)
    if draw.random() < 0.05:
        it.crash_at = draw.randint(1, 60)
    it.arriving = draw.choice([0, 0, 5, 1000])
    return it


def _draw_crowd(draw: random.Random, it: Scenario) -> list[Arrival]:
    """Many at once, of lengths so unlike that each batch passes over most of them."""
    it.max_queued_tokens = 10_000
    it.max_batch_sequences = draw.choice([2, 3, 4])
    lengths = [max(1, int(it.max_batch_tokens * 0.7**power)) for power in range(12)]
    return [
        Arrival(
            "submit",
            [tuple(draw.randrange(600) for _ in range(draw.choice(lengths)))],
            at=draw.choice([0, 0, draw.uniform(0, 10) * it.pace]),
            timeout=None,
            cancel_after=None,
        )
        for _ in range(100)
    ]


def _draw_arrival(
    draw: random.Random, it: Scenario, fault: float, pool: list[Ids], at: float, patience: float
) -> Arrival:
    kind = draw.choice(["submit", "submit", "timed", "each", "some", "probe"])
    count = draw.choice([0, 1, 1, 1, 1, 2, 3, 12]) if kind != "probe" else 1
    sequences = [
        draw.choice(pool) if draw.random() < 0.3 else _draw_ids(draw, it, fault)
        for _ in range(count)
    ]
    if kind == "probe":
        sequences = [(PROBE + len(it.arrivals), *sequences[0])]
    return Arrival(
        kind,
        sequences,
        at,
        timeout=(
            draw.uniform(-0.1, 1) * patience if kind == "probe" or draw.random() < 0.3 else None
        ),
        cancel_after=draw.uniform(0, patience) if draw.random() < 0.15 else None,
    )


def _draw_ids(draw: random.Random, it: Scenario, fault: float) -> Ids:
    longest = draw.choice([3, 10, 10, it.max_batch_tokens // 2, it.max_batch_tokens + 5])
    ids = [draw.randrange(600) for _ in range(draw.randint(1, longest))]
    if draw.random() < fault:
        ids[draw.randrange(len(ids))] = draw.choice(FAULTS)
    if draw.random() < 0.4:
        return draw.choice(list(it.prefixes.values())) + tuple(ids)
    return tuple(ids)


# ---- virtual time


class Hang(Wrong):
    """Somebody waits, and nothing is left that could wake them."""


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    """Instead of waiting, lets the clock jump."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise Hang("nothing is left to do, and a request still waits")
        self.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never waits. What it is asked to run in a thread is a timer of `pace()`."""

    def __init__(self, pace: Callable[[], float]) -> None:
        self._jumping = _JumpingSelector()
        self._pace = pace
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def monotonic(self) -> float:
        """Stands in for `time.monotonic` in the batcher."""
        return self._jumping.now

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:
        future = self.create_future()
        try:
            told = future.set_result, func(*args)
        except Exception as error:
            told = future.set_exception, error

        def tell() -> None:
            if not future.done():
                told[0](told[1])

        self.call_later(self._pace(), tell)
        return future


# ---- the batcher, watched


class Watched(Batcher):
    """Checks each batch that is taken out of the queue, by rules of its own."""

    watch: Play

    def _take(self, batch: list[Any], window: list[Any]) -> None:
        self.watch.check_batch(batch, list(self._queue), self.stats)
        super()._take(batch, window)


class Play:
    """One scenario under way."""

    def __init__(self, scenario: Scenario, *, real: bool) -> None:
        self.it, self.real = scenario, real
        self.draw = random.Random(-1 - scenario.seed)
        self.alive: Counter[Ids] = Counter()
        """Sequences that somebody waits for."""
        self.overtaken: Counter[Any] = Counter()
        self.order: dict[Any, int] = {}
        """Of the queue's entries, as they were first seen there."""
        self.wrong: list[str] = []
        """What was found where raising would have been taken for a fault of the score function."""
        self.counts: Counter[str] = Counter()
        self.limit = scenario.max_batch_tokens
        self.forgiven: set[Ids] = set()
        """Sequences that have been in a failed forward: no other fails for nobody's fault."""
        self.crashed = self.closing = False
        self.costs_asked = self.arrived = 0
        self.scored_sequences = self.scored_batches = 0
        self.batcher: Watched

    # ---- what the batcher is given

    def cost(self, count: int, longest: int, total: int) -> int:
        self.costs_asked += 1
        if self.costs_asked == self.it.crash_at:
            self.crashed = True
            raise ZeroDivisionError("a fault in the batcher itself")
        return (packed_cost if self.it.packs else padded_cost)(count, longest, total)

    def arriving(self) -> int:
        return self.it.arriving * (self.draw.random() < 0.8)

    def score(self, sequences: list[list[int]]) -> list[float]:
        given = [tuple(ids) for ids in sequences]
        self.counts["forwards"] += 1
        self._expect(bool(given), "an empty forward")
        self._expect(len(set(given)) == len(given), "a sequence twice in one forward")
        self._expect(len(given) <= self.it.max_batch_sequences, "too many sequences at once")
        cost = self.it.cost(given)
        self._expect(
            cost <= self.it.max_batch_tokens or len(given) == 1, f"a forward of {cost} tokens"
        )
        if not self.real:
            for ids in given:
                self._expect(self.alive[ids] > 0, "computed, and nobody waits for it")
        else:
            time.sleep(self.duration())
        if self.it.memory_first:
            self._maybe_lack_memory(cost, len(given))
        self._maybe_fail(given)
        self._maybe_lack_memory(cost, len(given))
        rewards = [math.nan if NAN in ids else reward_of(ids) for ids in given]
        if any(TOO_FEW in ids for ids in given):
            self.counts["wrong count"] += 1
            return rewards[:-1]
        if not all(ids[0] >= PROBE for ids in given):  # probes are no traffic
            self.scored_batches += 1
            self.scored_sequences += len(given)
        return rewards

    def _maybe_lack_memory(self, cost: int, count: int) -> None:
        if self.it.memory is None or cost <= self.it.memory:
            return
        self.counts["out of memory"] += 1
        if count > 1:  # from the next batch on, no more than half of it
            self.limit = min(self.limit, max(1, cost // 2))
        raise MemoryError

    def _maybe_fail(self, given: list[Ids]) -> None:
        if self.forgiven.isdisjoint(given) and self.draw.random() < self.it.flaky:
            self.forgiven.update(given)
            self.counts["flaky forwards"] += 1
            raise OSError("for nobody's fault")
        if any(set(FAULTS) & set(ids) for ids in given):
            self.forgiven.update(given)
        for index, ids in enumerate(given):
            if NOT_FINITE in ids:
                raise NonFiniteError("not finite", index=index)
            if STOPS in ids:
                next(iter(()))
            elif RAISES in ids:
                raise RuntimeError("a sequence that no model can take")

    def duration(self) -> float:
        """Of the next forward, in seconds."""
        usual = self.draw.expovariate(1 / self.it.pace)
        told = usual * (50 if self.draw.random() < 0.05 else 1)
        return min(told, 5 * self.it.pace) * REAL_SCALE if self.real else told

    # ---- what is looked at while it runs

    def _expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.wrong.append(what)

    def check_batch(self, batch: list[Any], queue: list[Any], stats: Any) -> None:
        """Of what is taken from the queue: order, limits, age, and the counters."""
        for entry in queue:
            self.order.setdefault(entry, len(self.order))
        now = module.time.monotonic()
        live = [entry for entry in queue if entry.queued]
        self._expect(stats.queued_sequences == len(live), "queued_sequences is not what waits")
        self._expect(stats.queued_tokens == sum(e.length for e in live), "nor queued_tokens")
        for entry in batch:
            self._expect(entry.queued, "taken twice, or after its caller left")
            late = not self.real and entry.submission.late(now)
            self._expect(not late, "computed after its deadline")
        keys = {entry.key: tuple(entry.ids) for entry in batch}
        if len(keys) > 1:
            cost = self.it.cost(list(keys.values()))
            self._expect(cost <= self.limit, f"{cost} tokens, after no memory at {self.limit * 2}")
        if not self.real:  # there, a deadline may pass while this is looked at
            wanted = [e for e in live if not e.submission.done.done()]
            wanted = [e for e in wanted if not e.submission.late(now)]
            self._expect(wanted[0] in batch, "the oldest is not in the batch")
            probing = [e.ids[0] >= PROBE for e in wanted]
            self._expect(probing == sorted(probing, reverse=True), "a probe is not in front")
            order = [self.order[e] for e in wanted[sum(probing) :]]
            self._expect(order == sorted(order), "the queue is out of order")
            self._check_age(batch, wanted, keys)

    def _check_age(self, batch: list[Any], wanted: list[Any], keys: dict[bytes, Ids]) -> None:
        """Who was overtaken often enough is in the batch, or would not fit behind those before."""
        so_far = {wanted[0].key: tuple(wanted[0].ids)}
        for entry in wanted[1:]:
            if self.overtaken[entry] < MOST_OVERTAKEN or entry.key in so_far:
                continue
            so_far[entry.key] = tuple(entry.ids)
            fits = len(so_far) <= self.it.max_batch_sequences
            if not fits or self.it.cost(list(so_far.values())) > self.limit:
                break
            self.counts["overdue"] += 1
            self._expect(entry.key in keys, "overtaken too often, and passed over again")
        places = {entry: place for place, entry in enumerate(wanted)}
        youngest = max(places.get(entry, 0) for entry in batch)
        self.overtaken.update(set(wanted[:youngest]) - set(batch))

    # ---- callers

    async def call(self, arrival: Arrival, wait: float) -> None:
        await asyncio.sleep(wait)
        now = module.time.monotonic()
        scale = REAL_SCALE if self.real else 1
        deadline = None if arrival.timeout is None else now + arrival.timeout * scale
        self.alive.update(arrival.sequences)
        refusal = self._refusal(arrival)
        left = Counter(arrival.sequences)
        try:
            arrival.outcome = await self._ask(arrival, deadline, left)
        except ServiceError as error:
            arrival.outcome = error
        except asyncio.CancelledError:
            arrival.outcome = None
            if arrival.cancel_after is None:
                raise Wrong("a request that nobody cancelled was cancelled") from None
            self.counts["cancelled"] += 1
        finally:
            self.alive.subtract(left)
        ended = module.time.monotonic()
        if deadline is not None and not self.real and arrival.outcome is not None:
            assert ended <= max(deadline, now) + 1e-6, "a request outlived its deadline"
        self._judge(arrival, refusal, deadline, ended)

    async def _ask(self, arrival: Arrival, deadline: float | None, left: Counter[Ids]) -> Any:
        batcher, sequences = self.batcher, arrival.sequences
        prefixes = [self.it.prefix_length(ids) for ids in sequences]
        options: dict[str, Any] = {"prefixes": prefixes, "deadline": deadline}
        if arrival.kind == "probe":
            assert deadline is not None
            await batcher.probe(sequences[0], deadline=deadline)
            return [reward_of(sequences[0])]
        elif arrival.kind == "submit":
            return await batcher.submit(sequences, **options)
        elif arrival.kind == "timed":
            scored = await batcher.submit_timed(sequences, **options)
            assert scored.queue_s >= 0
            assert scored.batch_size <= self.it.max_batch_sequences
            return scored.rewards
        outcomes: dict[int, Any] = {}
        async with aclosing(batcher.submit_each(sequences, **options)) as each:
            async for position, outcome in each:
                assert position not in outcomes
                outcomes[position] = outcome
                left.subtract([sequences[position]])
                self.alive.subtract([sequences[position]])
                if arrival.kind == "some" and 2 * len(outcomes) >= len(sequences):
                    break
        return outcomes

    # ---- what each of them must get

    def _refusal(self, arrival: Arrival) -> type[ServiceError] | None:
        """What admission must say; it decides in the very step that asks."""
        stats, tokens = self.batcher.stats, sum(map(len, arrival.sequences))
        if arrival.kind == "probe":
            return None if self.batcher.healthy else ServiceError
        elif self.closing or not self.batcher.healthy:
            return OverloadedError
        elif tokens > self.it.max_queued_tokens and len(arrival.sequences) > 1:
            return RequestRefusedError
        elif stats.queued_tokens and stats.queued_tokens + tokens > self.it.max_queued_tokens:
            return OverloadedError
        return None

    def _judge(
        self,
        arrival: Arrival,
        refusal: type[ServiceError] | None,
        deadline: float | None,
        ended: float,
    ) -> None:
        if arrival.outcome is None:
            return
        late = deadline is not None and ended >= deadline - 1e-6
        if refusal is not None:
            assert type(arrival.outcome) is refusal, f"{arrival.outcome!r}, expected {refusal}"
            self.counts[f"refused at the door: {refusal.__name__}"] += 1
        elif isinstance(arrival.outcome, dict):
            enough = len(arrival.sequences)
            if arrival.kind == "some":
                enough = math.ceil(enough / 2)
            assert len(arrival.outcome) >= enough
            for position, outcome in arrival.outcome.items():
                got = outcome.rewards if isinstance(outcome, Scored) else outcome
                self._judge_unit([arrival.sequences[position]], got, late)
        else:
            self._judge_unit(arrival.sequences, arrival.outcome, late)

    def _judge_unit(self, sequences: list[Ids], got: Any, late: bool) -> None:
        """Sequences that are answered together: all their rewards, or an error they deserve."""
        deserved = {code for ids in sequences for code in self._deserved(ids)}
        if not isinstance(got, Exception):
            assert not deserved, f"{got} for what should have failed: {deserved}"
            assert got == [reward_of(ids) for ids in sequences], "wrong rewards"
            self.counts["scored"] += len(sequences)
        elif isinstance(got, DeadlineError):
            assert late, "its deadline has not passed"
            self.counts["too late"] += 1
        else:
            code = got.__dict__.get("code")
            if self.crashed:
                deserved.add("scoring_failed")
            assert code in deserved, f"{got!r} ({code}) for sequences that deserve {deserved}"
            index = got.__dict__.get("index")
            if index is not None:
                assert code in self._deserved(sequences[index]), f"{code} blames {index}"
            self.counts[f"failed: {code}"] += 1

    def _deserved(self, ids: Ids) -> set[str]:
        codes = set()
        if {RAISES, TOO_FEW, STOPS} & set(ids):
            codes.add("scoring_failed")
        if {NOT_FINITE, NAN} & set(ids):
            codes.add("non_finite_reward")
        if self.it.memory is not None and len(ids) > self.it.memory:
            codes.add("too_many_tokens")
        return codes

    # ---- the whole

    async def run(self) -> None:
        it, loop = self.it, asyncio.get_running_loop()
        scale = REAL_SCALE if self.real else 1
        self.batcher = Watched(
            self.score,
            max_batch_tokens=it.max_batch_tokens,
            max_batch_sequences=it.max_batch_sequences,
            max_queued_tokens=it.max_queued_tokens,
            cost=self.cost,
            arriving=self.arriving,
        )
        self.batcher.watch = self
        self.batcher.start()
        calls = []
        for arrival in it.arrivals:
            task = loop.create_task(self.call(arrival, arrival.at * scale))
            calls.append(task)
            if arrival.cancel_after is not None:
                loop.call_later((arrival.at + arrival.cancel_after) * scale, task.cancel)
        if it.close_at is not None:
            await asyncio.sleep(it.close_at * scale)
            await self._close()
        ends = await asyncio.gather(*calls, return_exceptions=True)
        if it.close_at is None:
            assert self.batcher.healthy or self.crashed, "the batcher died"
            await self._close()
        self._check_the_end()
        assert not self.wrong, "; ".join(sorted(set(self.wrong)))
        for end in ends:
            if isinstance(end, Exception):
                raise end
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, f"tasks are left: {others}"

    async def _close(self) -> None:
        self.closing = True
        await self.batcher.close()
        assert not self.batcher.healthy

    def _check_the_end(self) -> None:
        batcher, stats = self.batcher, self.batcher.stats
        assert stats.queued_tokens == stats.queued_sequences == 0, "counters did not return to 0"
        assert batcher.computing_tokens == 0
        assert batcher.forward_age_s == 0
        assert not batcher._waiting
        assert not batcher._queue or self.crashed
        assert stats.batches == self.scored_batches
        assert stats.computed_sequences == self.scored_sequences <= stats.sequences
        assert not +self.alive, "somebody still waits"


def play(seed: int, *, real: bool = False) -> Counter[str]:
    """Run the scenario of a seed; what happened, counted. Raises `AssertionError`."""
    playing = Play(draw_scenario(seed), real=real)
    complaints: list[str] = []
    loop = asyncio.new_event_loop() if real else VirtualLoop(playing.duration)
    loop.set_debug(seed % 16 == 0)
    loop.set_exception_handler(lambda _, context: complaints.append(str(context)))
    with _quiet(), _within(WALL_S), pytest.MonkeyPatch.context() as patch:
        if not real:
            patch.setattr(module, "time", loop)
        try:
            loop.run_until_complete(playing.run())
            loop.run_until_complete(loop.shutdown_asyncgens())
        finally:
            loop.close()
    playing.counts["calls"] += len(playing.it.arrivals)
    _expect_silence(complaints)
    return playing.counts


def play_many(seeds: Iterator[int], *, real: bool = False) -> Counter[str]:
    """Run scenarios, and look from time to time for what they left behind."""
    counts: Counter[str] = Counter()
    before = in_memory()
    for number, seed in enumerate(seeds):
        try:
            counts += play(seed, real=real)
        except BaseException as error:
            error.add_note(f"seed {seed}: again with batcher_scenarios.play({seed}, real={real})")
            raise
        counts["scenarios"] += 1
        if number % 500 == 499:
            expect_nothing_new(before)
    expect_nothing_new(before)
    return counts


def expect_nothing_new(before: Counter[str]) -> None:
    """A real thread lets go of its last forward a moment after it has told its result."""
    for _ in range(40):
        left = in_memory() - before
        if not left:
            return
        time.sleep(0.05)
    raise Wrong(f"left in memory: {dict(left)}")


def in_memory() -> Counter[str]:
    """How many requests, sequences, batchers and tasks there are."""
    gc.collect()
    kinds = (module._Entry, module._Submission, Batcher, asyncio.Task)
    # `type`, for `isinstance` would ask objects of strangers for their class.
    return Counter(type(one).__name__ for one in gc.get_objects() if issubclass(type(one), kinds))


def _expect_silence(complaints: list[str]) -> None:
    assert not complaints, f"asyncio complains: {complaints[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger(module.__name__)
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    """Against a loop that spins: no clock of asyncio would notice."""

    def stop(*_: object) -> None:
        raise Hang(f"it runs for more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
