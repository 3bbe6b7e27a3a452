"""Figures of held-out pairs, against values worked out by hand."""

from __future__ import annotations

import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from raywards.evaluation import (
    HeldOut,
    HeldOutRankings,
    HeldOutRatings,
    agree,
    calibration_error,
    figures,
    length_bias,
    log_loss,
)

# Five pairs: a win, a tie, a loss, a loss where the judges tie, a loss that all judges want.
CHOSEN = [3.0, 1.0, -2.0, 0.0, 0.5]
REJECTED = [1.0, 1.0, 2.0, 4.0, 1.0]
PROBABILITY = [1.0, 1.0, 0.75, 0.5, 0.0]
LENGTHS = [(9, 5), (4, 4), (3, 8), (7, 6), (5, 9)]
SOURCES = ["a", "a", "b", "b", "b"]


def column(values: list[float]) -> NDArray[numpy.float64]:
    return numpy.asarray(values, dtype=float)


def add(held_out: HeldOut, part: slice) -> None:
    chosen, rejected = torch.tensor(CHOSEN[part]), torch.tensor(REJECTED[part])
    probability = torch.tensor(PROBABILITY[part])
    losses = (chosen - rejected).abs()
    held_out.add(losses, chosen, rejected, probability, LENGTHS[part], SOURCES[part])


def whole() -> dict[str, float]:
    held_out = HeldOut()
    add(held_out, slice(None))
    return held_out.compute()


def test_the_figures_are_those_worked_out_by_hand() -> None:
    def surprise(difference: float) -> float:
        return math.log1p(math.exp(-difference))

    assert whole() == {
        "loss": pytest.approx((2 + 0 + 4 + 4 + 0.5) / 5),  # whatever the objective says
        "log_loss": pytest.approx(
            (
                surprise(2)
                + surprise(0)
                + 0.75 * surprise(-4)
                + 0.25 * surprise(4)
                + 0.5 * (surprise(-4) + surprise(4))
                + surprise(0.5)
            )
            / 5
        ),
        "accuracy": pytest.approx((1 + 0.5 + 0.25 + 0.5 + 1) / 5),
        "calibration_error": pytest.approx(
            (
                abs(1 - sigmoid(2))  # each in a bin of its own, but for the two of 4
                + abs(0.5 - sigmoid(0))
                + abs(0.25 + 0.5 - 2 * sigmoid(4))
                + abs(1 - sigmoid(0.5))
            )
            / 5
        ),
        "tie_rate": pytest.approx(1 / 5),
        "margin": pytest.approx((2 + 0 - 4 - 4 - 0.5) / 5),
        "margin_p05": pytest.approx(-4.0),
        "margin_p50": pytest.approx(-0.5),
        "margin_p95": pytest.approx(1.6),
        "min_reward": -2.0,
        "mean_reward": pytest.approx((sum(CHOSEN) + sum(REJECTED)) / 10),
        "max_reward": 4.0,
        "sd_reward": pytest.approx(statistics.pstdev([*CHOSEN, *REJECTED])),
        "num_pairs": 5.0,
        "num_tokens": 60.0,
        # The model prefers the longer side in three of four pairs; the judges in 1, 0.25, 0.5, 1.
        "length_bias": pytest.approx(3 / 4 - (1 + 0.25 + 0.5 + 1) / 4),
        "accuracy/a": pytest.approx(0.75),
        "accuracy/b": pytest.approx((0.25 + 0.5 + 1) / 3),
    }


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_page_has_every_figure() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+)(?:/SOURCE)?`", page))
    assert {name.partition("/")[0] for name in whole()} <= named


def test_in_parts_they_are_the_same() -> None:
    held_out = HeldOut()
    for part in (slice(0, 1), slice(1, 1), slice(1, 4), slice(4, 5)):
        add(held_out, part)
    assert held_out.compute() == whole()


def test_of_no_pairs_there_are_none() -> None:
    assert HeldOut().compute() == {"num_pairs": 0.0, "num_tokens": 0.0}


def test_one_source_has_no_accuracy_of_its_own() -> None:
    held_out = HeldOut()
    add(held_out, slice(0, 2))
    assert not [name for name in held_out.compute() if "/" in name]


pairs = st.lists(
    st.tuples(st.floats(-20, 20), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.integers(-9, 9)),
    min_size=1,
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(pairs)
def test_swapping_the_sides_changes_nothing(rows: list[tuple[float, float, int]]) -> None:
    difference, probability, longer_by = (
        column(list(values)) for values in zip(*rows, strict=True)
    )
    back = (-difference, 1 - probability)
    assert agree(difference, probability) == pytest.approx(agree(*back))
    assert log_loss(difference, probability) == pytest.approx(log_loss(*back), abs=1e-9)
    error = calibration_error(difference, probability)
    assert error == pytest.approx(calibration_error(*back))
    assert 0 <= error <= 1
    bias = length_bias(difference, probability, longer_by)
    assert bias == pytest.approx(length_bias(*back, -longer_by))
    assert bias is None or -1 <= bias <= 1


def test_a_model_that_says_what_the_judges_say_is_calibrated() -> None:
    probability = column([0.75, 0.9, 0.5, 0.25])
    difference = numpy.log(probability / (1 - probability))
    assert calibration_error(difference, probability) == pytest.approx(0, abs=1e-12)
    assert calibration_error(3 * difference, probability) > 0.05


def test_a_model_that_likes_length_shows() -> None:
    longer_by = column([3, -2, 5, -1, 0])
    judges = column([1, 1, 0, 0, 1])  # prefer the longer side in half of the pairs
    assert length_bias(longer_by, judges, longer_by) == pytest.approx(0.5)
    assert length_bias(-longer_by, judges, longer_by) == pytest.approx(-0.5)
    assert length_bias(judges * 2 - 1, judges, longer_by) == 0
    assert length_bias(judges, judges, numpy.zeros(5)) is None


def test_a_reward_that_is_nan_is_seen() -> None:
    chosen = column([math.nan, 1.0])
    table = {
        "loss": chosen,
        "chosen": chosen,
        "rejected": column([0.0, 0.0]),
        "probability": column([1.0, 1.0]),
        "chosen_tokens": column([2, 3]),
        "rejected_tokens": column([3, 2]),
    }
    found = figures(table, ["a", "a"])
    finite = {name for name, value in found.items() if not math.isnan(value)}
    assert finite == {"tie_rate", "num_pairs", "num_tokens"}


def rankings(parts: list[slice]) -> dict[str, float]:
    """Each of the pairs above as a ranking of two."""
    held_out = HeldOutRankings()
    for part in parts:
        sides = zip(CHOSEN[part], REJECTED[part], strict=True)
        rewards = torch.tensor([reward for pair in sides for reward in pair])
        better = list(range(0, len(rewards), 2))
        held_out.add(
            torch.tensor(CHOSEN[part]).square(),
            rewards,
            [tokens for pair in LENGTHS[part] for tokens in pair],
            better,
            [place + 1 for place in better],
            PROBABILITY[part],
            SOURCES[part],
        )
    return held_out.compute()


def ratings(parts: list[slice]) -> dict[str, float]:
    """The sides of the pairs above as what is predicted of two attributes."""
    held_out = HeldOutRatings(["a", "b"], [1.0, -0.5])
    for part in parts:
        predicted = torch.tensor([CHOSEN[part], REJECTED[part]]).T
        scores = torch.tensor([PROBABILITY[part], CHOSEN[part]]).T
        tokens = [pair[0] for pair in LENGTHS[part]]
        held_out.add(predicted.sum(1), predicted, scores, tokens, SOURCES[part])
    return held_out.compute()


def test_rankings_of_two_have_the_figures_of_pairs() -> None:
    found, expected = rankings([slice(0, 5)]), whole()
    losses = [reward**2 for reward in CHOSEN]
    assert found == expected | {
        "loss": pytest.approx(sum(losses) / 5),
        "num_comparisons": 5.0,
        "mean_reward": pytest.approx(expected["mean_reward"]),
    }
    assert HeldOutRankings().compute() == HeldOutRatings(["a"], [1.0]).compute()


def _rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    held_out = HeldOut()
    if rank == 0:
        add(held_out, slice(0, 4))
    else:
        add(held_out, slice(4, 5))
    torch.save(held_out.compute(), f"{folder}/{rank}.pt")
    parts = [slice(0, 3), slice(3, 3)] if rank == 0 else [slice(3, 3), slice(3, 5)]
    torch.save([compute(parts) for compute in (rankings, ratings)], f"{folder}/{rank}-groups.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.trains
def test_two_processes_count_every_pair_once(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    expected: Any = pytest.approx(whole())
    alone = [pytest.approx(compute([slice(0, 5)])) for compute in (rankings, ratings)]
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == expected
        assert torch.load(tmp_path / f"{rank}-groups.pt") == alone
