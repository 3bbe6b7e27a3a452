"""Training metrics: each pair weighs the same, whatever the batches, the ranks and the breaks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from raywards.loss import bradley_terry
from raywards.metrics import PairMetrics

# Five pairs: one win, one tie, three losses.
CHOSEN = torch.tensor([3.0, 1.0, -2.0, 0.0, 0.5])
REJECTED = torch.tensor([1.0, 1.0, 2.0, 4.0, 1.0])


def fresh() -> PairMetrics:
    return PairMetrics(torch.device("cpu"))


def add(metrics: PairMetrics, part: slice, num_tokens: int = 10) -> None:
    chosen, rejected = CHOSEN[part], REJECTED[part]
    sure = torch.ones_like(chosen)
    metrics.add(bradley_terry(chosen, rejected), chosen, rejected, sure, num_tokens)


def whole() -> dict[str, float]:
    metrics = fresh()
    add(metrics, slice(None), 20)
    return metrics.compute()


def test_the_values_are_those_worked_out_by_hand() -> None:
    values = whole()
    losses = [math.log1p(math.exp(-d)) for d in (2, 0, -4, -4, -0.5)]
    assert values == {
        "loss": pytest.approx(sum(losses) / 5),
        "accuracy": pytest.approx(1.5 / 5),  # a tie is half
        "tie_rate": pytest.approx(1 / 5),
        "margin": pytest.approx((2 + 0 - 4 - 4 - 0.5) / 5),
        "min_reward": -2.0,
        "mean_reward": pytest.approx((CHOSEN.sum() + REJECTED.sum()).item() / 10),
        "max_reward": 4.0,
        "num_pairs": 5.0,
        "num_tokens": 20.0,
    }


def test_accuracy_is_the_share_of_the_judges_that_agree() -> None:
    metrics = fresh()
    probability = torch.tensor([0.8, 0.8, 0.8, 0.5, 0.0])
    metrics.add(bradley_terry(CHOSEN, REJECTED), CHOSEN, REJECTED, probability, 20)
    # A win, a tie, a loss, a loss where the judges tie, a loss where all prefer the other.
    assert metrics.compute()["accuracy"] == pytest.approx((0.8 + 0.5 + 0.2 + 0.5 + 1.0) / 5)


def test_five_pairs_in_batches_of_four_and_one_weigh_the_same() -> None:
    metrics = fresh()
    add(metrics, slice(0, 4))
    add(metrics, slice(4, 5))
    assert metrics.compute() == pytest.approx(whole())
    mean_of_means = (1.5 / 4 + 0 / 1) / 2  # what TRL reports
    assert metrics.compute()["accuracy"] != pytest.approx(mean_of_means)


def test_one_win_of_five_is_a_fifth() -> None:
    metrics = fresh()
    chosen, rejected = torch.tensor([0.0, 0, 0, 0, 1]), torch.tensor([1.0, 1, 1, 1, 0])
    for part in (slice(0, 4), slice(4, 5)):
        c, r = chosen[part], rejected[part]
        metrics.add(bradley_terry(c, r), c, r, torch.ones_like(c), 1)
    assert metrics.compute()["accuracy"] == pytest.approx(0.2)  # TRL says 0.5


def test_extremes_are_those_of_all_rewards_not_means_over_batches() -> None:
    metrics = fresh()
    for part in (slice(0, 1), slice(1, 3), slice(3, 5)):
        add(metrics, part)
    values = metrics.compute()
    assert (values["min_reward"], values["max_reward"]) == (-2.0, 4.0)


def test_swapping_the_sides_mirrors_the_values() -> None:
    metrics = fresh()
    metrics.add(bradley_terry(REJECTED, CHOSEN), REJECTED, CHOSEN, torch.ones(5), 20)
    there, back = whole(), metrics.compute()
    assert back["accuracy"] == pytest.approx(1 - there["accuracy"])
    assert back["margin"] == pytest.approx(-there["margin"])
    for name in ("tie_rate", "min_reward", "mean_reward", "max_reward", "num_pairs"):
        assert back[name] == pytest.approx(there[name])


def test_computing_changes_nothing_and_resetting_forgets() -> None:
    metrics = fresh()
    add(metrics, slice(None))
    assert metrics.compute() == metrics.compute()
    metrics.reset()
    assert metrics.compute() == {"num_pairs": 0.0, "num_tokens": 0.0}


def test_an_empty_forward_counts_nothing() -> None:
    metrics = fresh()
    add(metrics, slice(0, 0))
    assert metrics.compute()["num_pairs"] == 0
    add(metrics, slice(None), 20)
    add(metrics, slice(0, 0))
    assert metrics.compute() == pytest.approx(whole())


def test_losses_that_are_not_finite_are_counted() -> None:
    metrics = fresh()
    chosen = torch.tensor([math.nan, 1.0, math.inf])
    rejected = torch.zeros(3)
    metrics.add(torch.tensor([math.nan, 1.0, math.inf]), chosen, rejected, torch.ones(3), 3)
    assert metrics.num_not_finite().item() == 2
    metrics.reset()
    assert metrics.num_not_finite().item() == 0


def test_a_window_that_was_saved_goes_on_where_it_stopped() -> None:
    before, after = fresh(), fresh()
    add(before, slice(0, 3))
    window = before.gather_on_first_rank(0)
    add(before, slice(3, 5))
    after.restore(window, 0)
    add(after, slice(3, 5))
    assert before.compute() == after.compute() == pytest.approx(whole())
    second = fresh()
    second.restore(window, rank=1)
    assert second.compute()["num_pairs"] == 0


def test_a_window_survives_json() -> None:
    import json

    metrics = fresh()
    add(metrics, slice(None), 20)
    window = json.loads(json.dumps(metrics.gather_on_first_rank(0)))
    restored = fresh()
    restored.restore(window, 0)
    assert restored.compute() == whole()


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    metrics = fresh()
    add(metrics, slice(0, 2) if rank == 0 else slice(2, 3), 5)
    window = metrics.gather_on_first_rank(rank)
    add(metrics, slice(3, 5) if rank == 0 else slice(0, 0), 10)
    computed, again = metrics.compute(), metrics.compute()

    restored = fresh()
    restored.restore(window, rank)
    add(restored, slice(0, 0) if rank == 0 else slice(3, 5), 10)
    torch.save([computed, again, restored.compute()], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.trains
def test_two_processes_count_every_pair_once(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    expected: Any = pytest.approx(whole())
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        assert len(results) == 3
        assert all(values == expected for values in results)
