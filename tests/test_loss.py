"""The loss of a pair: values worked out by hand, and TRL's formula."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywards.loss import bradley_terry, centering

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
