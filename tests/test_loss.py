"""Losses of pairs, rankings and ratings: values worked out by hand, symmetries, TRL's formula."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywards.loss import (
    all_pairs,
    bradley_terry,
    centering,
    centering_of_rankings,
    plackett_luce,
    smoothed,
    squared_error,
)

rewards = st.floats(-30, 30, width=32)


@pytest.mark.parametrize(
    ("chosen", "rejected", "margin", "expected"),
    [
        (1.0, 1.0, None, math.log(2)),
        (2.0, 0.0, None, math.log1p(math.exp(-2))),
        (0.0, 2.0, None, math.log1p(math.exp(2))),
        (2.0, 0.0, 2.0, math.log(2)),
        (2.0, 0.0, 0.5, math.log1p(math.exp(-1.5))),
        (2.0, 0.0, -1.0, math.log1p(math.exp(-3))),
        (0.0, 200.0, None, 200.0),
        (200.0, 0.0, None, 0.0),
    ],
)
def test_the_loss_of_a_pair_is_the_value_worked_out_by_hand(
    chosen: float, rejected: float, margin: float | None, expected: float
) -> None:
    loss = bradley_terry(
        torch.tensor([chosen]),
        torch.tensor([rejected]),
        None if margin is None else torch.tensor([margin]),
    )
    assert loss.tolist() == pytest.approx([expected], rel=1e-6, abs=1e-30)


@pytest.mark.parametrize(
    ("difference", "probability", "expected"),
    [
        (2.0, 1.0, math.log1p(math.exp(-2))),
        (2.0, 0.0, math.log1p(math.exp(2))),
        (2.0, 0.75, 0.75 * math.log1p(math.exp(-2)) + 0.25 * math.log1p(math.exp(2))),
        (0.0, 0.5, math.log(2)),
        (3.0, 0.5, math.log1p(math.exp(-3)) + 1.5),
        (-200.0, 0.0, 0.0),
        (-200.0, 0.25, 50.0),
        (200.0, 0.25, 150.0),
    ],
)
def test_with_a_probability_it_is_the_cross_entropy_worked_out_by_hand(
    difference: float, probability: float, expected: float
) -> None:
    chosen, rejected = torch.tensor([difference]), torch.tensor([0.0])
    loss = bradley_terry(chosen, rejected, None, torch.tensor([probability]))
    assert loss.tolist() == pytest.approx([expected], rel=1e-6, abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(rewards, rewards, st.floats(-3, 3, width=32), st.floats(0, 1, width=32))
def test_swapping_sides_margin_and_probability_changes_nothing(
    a: float, b: float, margin: float, probability: float
) -> None:
    x, y, m, p = (torch.tensor([value]) for value in (a, b, margin, probability))
    torch.testing.assert_close(
        bradley_terry(x, y, m, p), bradley_terry(y, x, -m, 1 - p), rtol=1e-5, atol=1e-4
    )


def test_the_loss_is_least_where_the_model_says_the_probability() -> None:
    rewards = torch.tensor([math.log(4.0)], requires_grad=True)  # sigmoid is 0.8
    bradley_terry(rewards, torch.zeros(1), None, torch.tensor([0.8])).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.item() == pytest.approx(0, abs=1e-7)


def test_a_sure_pair_has_the_bits_that_it_has_without_a_probability() -> None:
    chosen, rejected = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    sure = bradley_terry(chosen, rejected, None, smoothed(torch.ones(64), 0.0))
    assert torch.equal(sure, bradley_terry(chosen, rejected))


def test_smoothing_is_that_of_trls_dpo() -> None:
    chosen, rejected = torch.tensor([1.5, -0.5]), torch.tensor([0.5, 0.25])
    ours = bradley_terry(chosen, rejected, None, smoothed(torch.ones(2), 0.1))
    difference = chosen - rejected
    # trl/trainer/dpo_trainer.py, loss type "sigmoid", with beta = 1
    log_sigmoid = torch.nn.functional.logsigmoid
    theirs = -log_sigmoid(difference) * (1 - 0.1) - log_sigmoid(-difference) * 0.1
    torch.testing.assert_close(ours, theirs)
    assert smoothed(torch.tensor([0.0, 0.5, 1.0]), 0.1).tolist() == pytest.approx([0.1, 0.5, 0.9])


@settings(max_examples=60, deadline=None)
@given(rewards, rewards)
def test_swapping_the_sides_changes_the_loss_by_their_difference(a: float, b: float) -> None:
    x, y = torch.tensor([a]), torch.tensor([b])
    there, back = bradley_terry(x, y), bradley_terry(y, x)
    # -log s(d) - -log s(-d) = -d
    torch.testing.assert_close(there - back, y - x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(centering(x, y), centering(y, x))


def test_a_mean_over_pairs_is_trls_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen, rejected, margin = (torch.randn(16, generator=generator) for _ in range(3))
    # trl/trainer/reward_trainer.py, RewardTrainer.compute_loss
    theirs = -torch.nn.functional.logsigmoid(chosen - rejected - margin).mean()
    theirs = theirs + 0.01 * torch.mean((chosen + rejected) ** 2)
    ours = (
        bradley_terry(chosen, rejected, margin).mean() + 0.01 * centering(chosen, rejected).mean()
    )
    torch.testing.assert_close(ours, theirs)


def test_the_formula_compared_with_is_the_installed_trls() -> None:
    trl = pytest.importorskip("trl")
    source = inspect.getsource(trl.RewardTrainer.compute_loss)
    assert "logsigmoid(rewards_chosen - rewards_rejected - inputs" in source
    assert "torch.mean((rewards_chosen + rewards_rejected) ** 2)" in source


def test_bf16_rewards_are_subtracted_in_fp32() -> None:
    chosen, rejected = torch.tensor([10.0625]).bfloat16(), torch.tensor([0.015625]).bfloat16()
    exact = torch.nn.functional.logsigmoid(chosen.double() - rejected.double())
    assert bradley_terry(chosen, rejected).dtype == torch.float32
    torch.testing.assert_close(bradley_terry(chosen, rejected).double(), -exact, rtol=1e-5, atol=0)
    coarse = -torch.nn.functional.logsigmoid((chosen - rejected).double())
    assert abs(coarse + exact).item() / abs(exact).item() > 1e-3  # else this shows nothing


def test_centering_is_the_squared_sum_of_the_rewards() -> None:
    values = centering(torch.tensor([1.0, 2.0, -3.0]), torch.tensor([2.0, -2.0, -1.0]))
    assert values.tolist() == [9.0, 0.0, 16.0]


def test_gradients_are_the_ones_worked_out_by_hand() -> None:
    chosen = torch.tensor([1.0], requires_grad=True)
    rejected = torch.tensor([0.0], requires_grad=True)
    bradley_terry(chosen, rejected).sum().backward()
    expected = -1 / (1 + math.e)  # -(1 - sigmoid(1))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(expected)
    assert rejected.grad.item() == pytest.approx(-expected)


# ---------------------------------------------------------------- rankings

RankingLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
RANKINGS: list[RankingLoss] = [plackett_luce, all_pairs]


def ranked(loss: RankingLoss, rewards: list[float], ranks: list[float], *options: float) -> float:
    [value] = loss(torch.tensor([rewards]), torch.tensor([ranks]), *options).tolist()
    return float(value)


def surprise(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def test_plackett_luce_is_the_value_worked_out_by_hand() -> None:
    # Rewards log 4, log 3, log 1, ranked second, first, third: 3 of 8, then 4 of 5.
    rewards = [math.log(4), math.log(3), 0.0]
    expected = -(math.log(3 / 8) + math.log(4 / 5)) / 2
    assert ranked(plackett_luce, rewards, [2, 1, 3]) == pytest.approx(expected)
    assert ranked(plackett_luce, [0.0] * 5, [5, 3, 1, 2, 4]) == pytest.approx(math.log(120) / 4)


def test_all_pairs_is_the_value_worked_out_by_hand() -> None:
    rewards = [2.0, 3.0, 0.5]
    expected = (surprise(1) + surprise(2.5) + surprise(1.5)) / 3
    assert ranked(all_pairs, rewards, [2, 1, 3]) == pytest.approx(expected)
    tied = (surprise(1) + surprise(2.5) + (surprise(1.5) + surprise(-1.5)) / 2) / 3
    assert ranked(all_pairs, rewards, [2, 1, 2]) == pytest.approx(tied)
    smooth = sum(0.9 * surprise(d) + 0.1 * surprise(-d) for d in (1, 2.5, 1.5)) / 3
    assert ranked(all_pairs, rewards, [2, 1, 3], 0.1) == pytest.approx(smooth)


def test_plackett_luce_is_a_distribution_over_rankings() -> None:
    rewards = [0.3, -1.2, 2.0, 0.9]
    rankings = list(itertools.permutations([1.0, 2.0, 3.0, 4.0]))
    losses = plackett_luce(torch.tensor([rewards] * 24), torch.tensor(rankings))
    assert torch.exp(-3 * losses).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("loss", RANKINGS)
def test_of_two_responses_it_has_the_bits_of_bradley_terry(loss: RankingLoss) -> None:
    chosen, rejected = 8 * torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    chosen.requires_grad_()
    expected = bradley_terry(chosen, rejected)
    [gradient] = torch.autograd.grad(expected.sum(), chosen)
    for first, rewards in ((1, [chosen, rejected]), (2, [rejected, chosen])):
        ranks = torch.tensor([[first, 3 - first]] * 64)
        found = loss(torch.stack(rewards, 1), ranks)
        assert torch.equal(found, expected)
        assert torch.equal(torch.autograd.grad(found.sum(), chosen)[0], gradient)


several = st.lists(
    st.tuples(st.floats(-20, 20, width=32), st.integers(1, 3)), min_size=2, max_size=6
)


@pytest.mark.parametrize("loss", RANKINGS)
@settings(max_examples=60, deadline=None)
@given(responses=several, seed=st.integers(0, 99), shift=st.floats(-9, 9, width=32))
def test_the_order_of_the_responses_and_a_shift_of_all_rewards_change_nothing(
    loss: RankingLoss, responses: list[tuple[float, int]], seed: int, shift: float
) -> None:
    rewards, ranks = (torch.tensor([list(part)]) for part in zip(*responses, strict=True))
    if loss is plackett_luce:  # it knows no ties
        ranks = ranks.argsort(dim=1, stable=True).argsort(1)
    shuffled = torch.randperm(len(responses), generator=torch.Generator().manual_seed(seed))
    before = loss(rewards, ranks)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(loss(rewards[:, shuffled], ranks[:, shuffled]), before, **close)
    torch.testing.assert_close(loss(rewards + shift, ranks), before, **close)
    centred = centering_of_rankings(rewards)
    torch.testing.assert_close(centering_of_rankings(rewards[:, shuffled]), centred, **close)


@pytest.mark.parametrize("loss", RANKINGS)
def test_the_better_of_two_neighbours_in_rank_gains_by_a_step_down_the_gradient(
    loss: RankingLoss,
) -> None:
    rewards = torch.zeros(1, 4, requires_grad=True)
    loss(rewards, torch.tensor([[3, 1, 4, 2]])).sum().backward()
    assert rewards.grad is not None
    third, first, fourth, second = (-rewards.grad[0]).tolist()
    assert first > second > third > fourth
    assert sum((first, second, third, fourth)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss", RANKINGS)
def test_rankings_beside_each_other_are_those_alone_and_large_rewards_stay_finite(
    loss: RankingLoss,
) -> None:
    rewards = torch.tensor([[1e4, -1e4, 0.0], [1.0, 2.0, 3.0]], requires_grad=True)
    ranks = torch.tensor([[3, 1, 2], [1, 2, 3]])
    losses = loss(rewards, ranks)
    alone = [ranked(loss, r, k) for r, k in zip(rewards.tolist(), ranks.tolist(), strict=True)]
    assert losses.tolist() == pytest.approx(alone)
    losses.sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.isfinite().all()
    assert losses.isfinite().all()


def test_rankings_of_bf16_rewards_are_compared_in_fp32() -> None:
    rewards = torch.tensor([[10.0625, 0.015625, 3.0]]).bfloat16()
    ranks = torch.tensor([[3, 1, 2]])
    for loss in RANKINGS:
        assert torch.equal(loss(rewards, ranks), loss(rewards.float(), ranks))
        assert loss(rewards, ranks).dtype == torch.float32


def test_centering_of_a_ranking_is_that_of_a_pair_and_leaves_the_spread_alone() -> None:
    chosen, rejected = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    pairs = centering(chosen, rejected)
    torch.testing.assert_close(
        centering_of_rankings(torch.stack([chosen, rejected], 1)), pairs, rtol=0, atol=0
    )
    values = centering_of_rankings(torch.tensor([[5.0, -4.0, -1.0], [1.0, 2.0, 3.0]]))
    assert values.tolist() == [0.0, 16.0]


# ---------------------------------------------------------------- ratings


def test_the_squared_error_is_a_mean_over_the_scores_that_are_there() -> None:
    nan = math.nan
    predicted = torch.tensor([[1.0, 2.0], [0.5, 7.0], [3.0, 3.0]], requires_grad=True)
    scores = torch.tensor([[3.0, 1.0], [nan, 4.0], [3.0, nan]])
    losses = squared_error(predicted, scores)
    assert losses.tolist() == [(4 + 1) / 2, 9.0, 0.0]
    losses.sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.tolist() == [[-2.0, 1.0], [0.0, 6.0], [0.0, 0.0]]
    swapped = squared_error(predicted.flip(1), scores.flip(1))
    assert swapped.tolist() == losses.tolist()


def test_a_prediction_that_is_not_finite_shows_where_it_was_rated() -> None:
    predicted = torch.tensor([[math.nan, 1.0], [math.nan, 1.0]])
    losses = squared_error(predicted, torch.tensor([[1.0, 1.0], [math.nan, 1.0]]))
    assert losses.isnan().tolist() == [True, False]
