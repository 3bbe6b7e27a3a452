"""The batcher under plain asyncio: what is computed when, and who gets which answer."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from raywards.errors import (
    DeadlineError,
    NonFiniteError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
)
from raywards.serve.batcher import Batcher, Forward

Ids = list[int]


def reward_of(ids: Ids) -> float:
    return sum(token * (place + 1) for place, token in enumerate(ids)) / 7


class FakeScorer:
    """Scores, and remembers the batches. `hold()` keeps the worker thread in a batch."""

    def __init__(self, answer: Callable[[Ids], float] = reward_of) -> None:
        self.batches: list[list[Ids]] = []
        self.answer = answer
        self._open = threading.Event()
        self._open.set()
        self.entered = threading.Event()

    def __call__(self, sequences: list[Ids]) -> list[float]:
        self.batches.append(sequences)
        self.entered.set()
        assert self._open.wait(10)
        return [self.answer(ids) for ids in sequences]

    def hold(self) -> None:
        self._open.clear()

    def release(self) -> None:
        self._open.set()


Scenario = Callable[[Batcher, FakeScorer], Awaitable[None]]


def play(scenario: Scenario, scorer: FakeScorer | None = None, **limits: Any) -> None:
    """Run `scenario` with a started batcher, and close it after."""
    scorer = scorer or FakeScorer()
    settings = {"max_batch_tokens": 100, "max_batch_sequences": 8, "max_queued_tokens": 10_000}

    async def run() -> None:
        batcher = Batcher(scorer, **(settings | limits))
        batcher.start()
        try:
            await asyncio.wait_for(scenario(batcher, scorer), 20)
        finally:
            scorer.release()
            await asyncio.wait_for(batcher.close(), 10)
        assert batcher.stats.queued_tokens == batcher.stats.queued_sequences == 0

    asyncio.run(run())


async def occupy(batcher: Batcher, scorer: FakeScorer) -> asyncio.Task[list[float]]:
    """Keep the worker thread busy, so that what is submitted next has to queue."""
    scorer.hold()
    task = asyncio.create_task(batcher.submit([[999]]))
    await asyncio.to_thread(scorer.entered.wait, 10)
    scorer.batches.clear()
    return task


async def queue(batcher: Batcher, *requests: list[Ids]) -> list[asyncio.Task[list[float]]]:
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)
    return tasks


def test_each_request_gets_its_own_rewards_in_order() -> None:
    draw = random.Random(0)
    requests = [
        [
            [draw.randrange(50) for _ in range(draw.randint(1, 60))]
            for _ in range(draw.randint(1, 9))
        ]
        for _ in range(60)
    ]

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        rewards = await asyncio.gather(*map(batcher.submit, requests))
        assert rewards == [[reward_of(ids) for ids in request] for request in requests]
        assert 1 < len(scorer.batches) < sum(map(len, requests))
        for batch in scorer.batches:
            assert len(batch) <= 8
            assert len(batch) * max(map(len, batch)) <= 100

    play(scenario)


def test_an_empty_request_has_no_rewards() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        assert await batcher.submit([]) == []
        assert [found async for found in batcher.submit_each([])] == []
        assert scorer.batches == []

    play(scenario)


def test_what_piled_up_during_a_forward_is_the_next_batch_oldest_first() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        tasks = await queue(batcher, *[[[n] * 10] for n in range(12)])
        scorer.release()
        await asyncio.gather(*tasks)
        firsts = [sorted(ids[0] for ids in batch) for batch in scorer.batches]
        assert firsts == [list(range(8)), list(range(8, 12))]

    play(scenario)


def test_a_batch_takes_the_oldest_and_its_neighbours_in_length() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        lengths = [30, 1000, 28, 900, 31, 29]
        tasks = await queue(batcher, *[[[n] * length] for n, length in enumerate(lengths)])
        scorer.release()
        await asyncio.gather(*tasks)
        found = [sorted(map(len, batch)) for batch in scorer.batches]
        assert found == [[28, 29, 30, 31], [900, 1000]]

    play(scenario, max_batch_tokens=2000)


def test_a_batch_waits_for_what_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raywards.serve.batcher._ARRIVING_S", 10.0)
    arriving = [20]

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        tasks = await queue(batcher, [[1] * 20])
        await asyncio.sleep(0.05)
        assert scorer.batches == []
        arriving[0] = 0
        tasks += await queue(batcher, [[2] * 20])
        await asyncio.gather(*tasks)
        assert scorer.batches == [[[1] * 20, [2] * 20]]

    play(scenario, arriving=lambda: arriving[0])


@pytest.mark.parametrize(
    ("queued", "arriving"), [(20, 2), (100, 1000)], ids=["that is little", "the batch is full"]
)
def test_it_does_not_wait_where(
    queued: int, arriving: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raywards.serve.batcher._ARRIVING_S", 60.0)

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await batcher.submit([[1] * queued])

    play(scenario, arriving=lambda: arriving)


def test_what_never_comes_is_waited_for_no_longer_than_a_moment() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await batcher.submit([[1] * 20])
        assert scorer.batches == [[[1] * 20]]

    play(scenario, arriving=lambda: 1000)


def test_the_cost_function_decides_what_fits() -> None:
    def packed(count: int, longest: int, total: int) -> int:
        return total

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        tasks = await queue(batcher, [[1] * 90], [[2] * 5], [[3] * 5])
        scorer.release()
        await asyncio.gather(*tasks)
        assert [len(batch) for batch in scorer.batches] == [3]

    play(scenario, cost=packed)


def test_a_sequence_above_the_budget_runs_alone() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        tasks = await queue(batcher, [[1] * 500], [[2] * 500], [[3]])
        scorer.release()
        await asyncio.gather(*tasks)
        assert [[len(ids) for ids in batch] for batch in scorer.batches] == [[500], [500], [1]]

    play(scenario)


def test_a_large_request_is_spread_over_batches() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        rewards = await batcher.submit([[n] * 10 for n in range(100)])
        assert rewards == [reward_of([n] * 10) for n in range(100)]
        assert len(scorer.batches) == 13

    play(scenario)


def test_no_length_starves_under_a_stream_of_another() -> None:
    """Short ones keep coming, and the long ones that came early are served within a bound."""

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        longs = await queue(batcher, *[[[n] * 90] for n in range(4)])
        shorts = await queue(batcher, *[[[n] * 3] for n in range(8 * 200)])
        scorer.release()
        await asyncio.gather(*longs, *shorts)
        served = [i for i, batch in enumerate(scorer.batches) if len(batch[0]) == 90]
        assert served == [0, 1, 2, 3]

    play(scenario)


def test_an_overtaken_sequence_goes_first_whatever_its_length() -> None:
    """Twelve kinds of length, too far apart to share a batch, each with a younger twin. The odd one
    between the old and the young would be last."""
    kinds = [int(200 * 1.8**k) for k in range(12)]

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        old, young = ([[[n] * length] for length in kinds] for n in (1, 2))
        tasks = await queue(batcher, *old, [[3] * 20], *young)
        scorer.release()
        await asyncio.gather(*tasks)
        place = next(i for i, batch in enumerate(scorer.batches) if [3] * 20 in batch)
        assert place == 8
        assert len(scorer.batches) > 9

    play(
        scenario,
        FakeScorer(lambda ids: float(ids[0])),
        max_batch_tokens=1_000_000,
        max_queued_tokens=1_000_000,
    )


def test_equal_sequences_of_a_batch_are_computed_once() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        same = [5, 6, 7]
        tasks = await queue(batcher, *[[same, [n] * 3] for n in range(5)], [same, same])
        scorer.release()
        rewards = await asyncio.gather(*tasks)
        assert scorer.batches[0].count(same) == 1
        assert rewards == [
            *[[reward_of(same), reward_of([n] * 3)] for n in range(5)],
            [reward_of(same)] * 2,
        ]
        assert batcher.stats.computed_sequences < batcher.stats.sequences

    play(scenario)


def test_a_cancelled_request_is_not_computed_and_frees_its_place() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        gone, stays = await queue(batcher, [[1] * 10, [2] * 10], [[3] * 10])
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.stats.queued_tokens == 10
        scorer.release()
        assert await stays == [reward_of([3] * 10)]
        assert scorer.batches == [[[3] * 10]]
        assert batcher.stats.dropped_sequences == 2

    play(scenario)


def test_an_expired_request_is_not_computed() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        late = asyncio.create_task(batcher.submit([[1]], deadline=time.monotonic() + 0.05))
        with pytest.raises(DeadlineError) as caught:
            await late
        assert caught.value.status == 504
        scorer.release()
        assert await batcher.submit([[2]]) == [reward_of([2])]
        assert scorer.batches == [[[2]]]

    play(scenario)


def test_a_deadline_that_is_over_already_costs_no_forward() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        with pytest.raises(DeadlineError):
            await batcher.submit([[1]], deadline=time.monotonic() - 1)
        assert await batcher.submit([[2]]) == [reward_of([2])]
        assert scorer.batches == [[[2]]]

    play(scenario)


def test_a_deadline_that_passes_while_the_loop_is_blocked_is_seen_before_compute() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        late = asyncio.create_task(batcher.submit([[1]], deadline=time.monotonic() + 0.05))
        await asyncio.sleep(0)
        scorer.release()
        time.sleep(0.1)  # as a loop that is busy with something else
        with pytest.raises(DeadlineError):
            await late
        await asyncio.sleep(0.05)
        assert scorer.batches == []

    play(scenario)


def test_a_full_queue_refuses_at_once_with_a_time_to_come_back() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        [waiting] = await queue(batcher, [[1] * 40])
        with pytest.raises(OverloadedError, match="40 tokens wait and 50 may") as caught:
            await batcher.submit([[2] * 11])
        assert caught.value.status == 503
        assert caught.value.retry_after_s is not None
        assert 1 <= caught.value.retry_after_s <= 60
        [fits] = await queue(batcher, [[2] * 10])
        scorer.release()
        await asyncio.gather(waiting, fits)
        assert await batcher.submit([[2] * 11])

    play(scenario, max_queued_tokens=50)


def test_what_never_fits_is_refused_for_good_but_a_single_sequence_is_let_in() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        with pytest.raises(RequestRefusedError, match="60 tokens in 2 sequences") as caught:
            await batcher.submit([[1] * 30, [2] * 30])
        assert caught.value.status == 413
        assert await batcher.submit([[1] * 60])

    play(scenario, max_queued_tokens=50)


def test_retry_after_follows_the_measured_speed() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        assert batcher.retry_after_s() == 1.0
        batcher.stats.tokens_per_s = 100.0
        batcher.stats.queued_tokens = 700
        assert batcher.retry_after_s() == 7.0
        batcher.stats.queued_tokens = 10**9
        assert batcher.retry_after_s() == 60.0
        batcher.stats.queued_tokens = 0

    play(scenario)


def poisoned(ids: Ids) -> float:
    if 13 in ids:
        raise ValueError("cannot score the secret text")
    return reward_of(ids)


def test_a_poisoned_input_fails_its_own_request_only() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        tasks = await queue(batcher, [[1, 2]], [[3, 4], [13, 5]], [[6, 7]])
        scorer.release()
        one, bad, two = await asyncio.gather(*tasks, return_exceptions=True)
        assert one == [reward_of([1, 2])]
        assert two == [reward_of([6, 7])]
        assert isinstance(bad, ServiceError)
        assert bad.status == 500
        assert "ValueError" in str(bad)
        assert "secret" not in str(bad)
        assert batcher.stats.failed_batches == 1
        assert await batcher.submit([[8]]) == [reward_of([8])]

    play(scenario, FakeScorer(poisoned))


def test_a_passing_failure_is_retried_once() -> None:
    class FailsOnce(FakeScorer):
        def __call__(self, sequences: list[Ids]) -> list[float]:
            answers = super().__call__(sequences)
            if len(self.batches) == 1:
                raise RuntimeError("out of memory")
            return answers

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        assert await batcher.submit([[1], [2]]) == [reward_of([1]), reward_of([2])]
        assert len(scorer.batches) == 2

    play(scenario, FailsOnce())


def test_each_sequence_of_submit_each_fails_on_its_own() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        found = dict([outcome async for outcome in batcher.submit_each([[1], [13]])])
        good, bad = found[0], found[1]
        assert not isinstance(good, Exception)
        assert good.rewards == [reward_of([1])]
        assert isinstance(bad, ServiceError)

    play(scenario, FakeScorer(poisoned))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_fails_its_request(value: float) -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        tasks = await queue(batcher, [[1], [2]], [[3], [13]])
        scorer.release()
        fine, broken = await asyncio.gather(*tasks, return_exceptions=True)
        assert fine == [reward_of([1]), reward_of([2])]
        assert isinstance(broken, ServiceError)
        assert broken.__dict__["code"] == "non_finite_reward"
        assert broken.__dict__["index"] == 1

    play(scenario, FakeScorer(lambda ids: value if 13 in ids else reward_of(ids)))


def test_a_scorer_that_refuses_non_finite_rewards_itself_is_understood() -> None:
    class Strict(FakeScorer):
        def __call__(self, sequences: list[Ids]) -> list[float]:
            answers = super().__call__(sequences)
            for index, ids in enumerate(sequences):
                if 13 in ids:
                    raise NonFiniteError("nan", index=index)
            return answers

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        with pytest.raises(ServiceError) as caught:
            await batcher.submit([[1], [1], [13]])
        assert caught.value.__dict__["code"] == "non_finite_reward"
        assert caught.value.__dict__["index"] == 2

    play(scenario, Strict())


def test_too_few_rewards_are_a_failure_and_not_shifted() -> None:
    class Short(FakeScorer):
        def __call__(self, sequences: list[Ids]) -> list[float]:
            return super().__call__(sequences)[:-1]

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        with pytest.raises(ServiceError, match="scoring failed"):
            await batcher.submit([[1], [2]])

    play(scenario, Short())


def test_the_death_of_the_owner_fails_its_waiters_at_once() -> None:
    def broken_cost(count: int, longest: int, total: int) -> int:
        if longest > 5:
            raise ZeroDivisionError
        return total

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        assert batcher.healthy
        tasks = await queue(batcher, [[1] * 6], [[2] * 6], [[3]])
        scorer.release()
        outcomes = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 5)
        assert all(isinstance(outcome, ServiceError) for outcome in outcomes)
        assert "ZeroDivisionError" in str(outcomes[0])
        assert not batcher.healthy
        with pytest.raises(OverloadedError):
            await batcher.submit([[1]])
        with pytest.raises(ServiceError):
            await batcher.probe([1], deadline=time.monotonic() + 5)

    play(scenario, cost=broken_cost)


def test_closing_finishes_what_is_queued_and_refuses_the_rest() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        [queued] = await queue(batcher, [[1] * 10 for _ in range(30)])
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError, match="stopping"):
            await batcher.submit([[2]])
        scorer.release()
        await closing
        assert len(await queued) == 30
        assert not batcher.healthy

    play(scenario)


def test_a_probe_passes_the_queue_and_is_not_refused_by_a_full_one() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        [waiting] = await queue(batcher, [[1] * 50])
        probe = asyncio.create_task(batcher.probe([4, 5], deadline=time.monotonic() + 10))
        await asyncio.sleep(0)
        assert batcher.forward_age_s > 0
        scorer.release()
        await probe
        await waiting
        assert scorer.batches[0][0] == [4, 5]

    play(scenario, max_queued_tokens=50)


def test_probes_are_no_traffic_and_tell_nothing_of_the_speed() -> None:
    forwards: list[Forward] = []

    async def scenario(batcher: Batcher, _: FakeScorer) -> None:
        await batcher.submit([[1] * 40, [2] * 40])
        before = replace(batcher.stats)
        for _ in range(3):
            await batcher.probe([1, 1], deadline=time.monotonic() + 5)
        assert batcher.stats == before
        assert [(one.sequences, one.tokens, one.longest) for one in forwards] == [(2, 80, 40)]

    play(scenario, observe=forwards.append)


def test_who_leaves_takes_the_ids_along() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        running = await occupy(batcher, scorer)
        leaver = asyncio.create_task(batcher.submit([[7] * 90] * 3))
        await asyncio.sleep(0)
        leaver.cancel()
        await asyncio.wait([leaver])
        assert [len(entry.ids) + len(entry.key) for entry in batcher._queue] == [0] * 3
        scorer.release()
        await running

    play(scenario)


def test_where_the_time_went_is_told() -> None:
    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        task = asyncio.create_task(batcher.submit_timed([[1], [2]]))
        await asyncio.sleep(0.05)
        scorer.release()
        scored = await task
        assert scored.queue_s >= 0.04
        assert scored.forward_s > 0
        assert scored.batch_size == 2

    play(scenario)


def test_a_score_function_that_raises_stop_iteration_fails_its_request_and_hangs_nobody() -> None:
    def answer(ids: Ids) -> float:
        return next(iter(())) if ids == [1] else reward_of(ids)

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        with pytest.raises(ServiceError, match="scoring failed"):
            await batcher.submit([[1]])
        assert await batcher.submit([[2]]) == [reward_of([2])]

    play(scenario, FakeScorer(answer))


def test_a_request_for_which_the_memory_is_too_small_is_halved_also_where_it_is_tried_alone() -> (
    None
):
    """Its batch had failed for another reason, the fault of another request."""

    class Scorer(FakeScorer):
        def __call__(self, sequences: list[Ids]) -> list[float]:
            rewards = super().__call__(sequences)
            if [1] in sequences:
                raise RuntimeError("a sequence that no model can take")
            if len(sequences) > 2 or [9] * 9 in sequences:
                raise MemoryError
            return rewards

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        await occupy(batcher, scorer)
        requests = [[[1]], [[n] for n in range(2, 7)], [[9] * 9]]
        bad, good, large = await queue(batcher, *requests)
        scorer.release()
        found = await asyncio.gather(bad, good, large, return_exceptions=True)
        assert sorted(map(len, scorer.batches))[-1] == 7, "all were in one batch"
        assert isinstance(found[0], ServiceError)
        assert found[1] == [reward_of([n]) for n in range(2, 7)]
        assert isinstance(found[2], RequestRefusedError)
        assert found[2].status == 413

    play(scenario, Scorer())


def test_after_no_memory_for_sequences_that_share_a_prefix_batches_are_smaller() -> None:
    """The limit counts a prefix once, so what it is lowered to has to do so, too."""

    class Scorer(FakeScorer):
        failed = 0

        def __call__(self, sequences: list[Ids]) -> list[float]:
            rewards = super().__call__(sequences)
            if len(sequences) > 4:
                self.failed += 1
                raise MemoryError
            return rewards

    def packed(count: int, longest: int, total: int) -> int:
        return total

    async def scenario(batcher: Batcher, scorer: FakeScorer) -> None:
        assert isinstance(scorer, Scorer)
        for start in (100, 200):
            sequences = [[7] * 30 + [start + n] for n in range(8)]
            rewards = await batcher.submit(sequences, prefixes=[30] * 8)
            assert rewards == list(map(reward_of, sequences))
            assert scorer.failed == 1, "it had learnt nothing"

    play(scenario, Scorer(), cost=packed)
