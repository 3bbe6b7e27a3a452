"""The loss of a pair: values worked out by hand, and TRL's formula."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywards.loss import bradley_terry, centering, smoothed

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
