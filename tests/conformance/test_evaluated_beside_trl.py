"""Held-out rows of every kind that TRL takes, through TRL and through raywards.

Eight pairs in batches of four: where every batch is full and of one set, TRL's figures are right,
and ours have to be the same. What they are otherwise is in `test_where_trl_is_wrong.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from both import ROWS, Both, assert_same_run, build_ours, build_theirs, table, train_both
from preferences_data import conversation_rows
from tiny import tiny_qwen2

pytestmark = pytest.mark.trains

HELD_OUT = conversation_rows(8, seed=1)
FIGURES = ("loss", "accuracy", "margin", "mean_reward")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "qwen2", num_labels=None)


def stream(rows: list[dict[str, Any]]) -> Any:
    return table(rows).to_iterable_dataset()


KINDS: list[Any] = [
    pytest.param(lambda: table(HELD_OUT), id="Dataset"),
    pytest.param(lambda: {"data1": table(HELD_OUT), "data2": table(HELD_OUT[:4])}, id="dict"),
    pytest.param(
        lambda: datasets.DatasetDict(data1=table(HELD_OUT), data2=table(HELD_OUT[:4])),
        id="DatasetDict",
        marks=pytest.mark.slow,
    ),
    pytest.param(lambda: stream(HELD_OUT), id="IterableDataset"),
    pytest.param(
        lambda: {"data1": stream(HELD_OUT), "data2": stream(HELD_OUT[:4])},
        id="dict of streams",
        marks=pytest.mark.slow,
    ),
    pytest.param(
        lambda: datasets.IterableDatasetDict(data1=stream(HELD_OUT), data2=stream(HELD_OUT[:4])),
        id="IterableDatasetDict",
    ),
]


def assert_same_figures(their: dict[str, Any], our: dict[str, Any], prefix: str = "eval") -> None:
    for name in FIGURES:
        assert our[f"{prefix}_{name}"] == pytest.approx(their[f"{prefix}_{name}"], abs=1e-5), name


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_rows_of_each_kind_are_evaluated_as_in_trl(
    kind: Callable[[], Any], model: Path, tmp_path: Path
) -> None:
    """While it trains, from the constructor; afterwards, from `evaluate`; under TRL's names."""
    both = train_both(
        model, tmp_path, theirs={"eval_dataset": kind()}, ours={"eval_dataset": kind()},
        eval_strategy="epoch",
    )  # fmt: skip
    named = isinstance(kind(), dict)
    for name, size in (("eval_data1", 8), ("eval_data2", 4)) if named else (("eval", 8),):
        losses = list(both.records(f"{name}_loss"))
        assert len(losses) == 2
        for their, our in losses:
            assert (our["epoch"], our["step"]) == (their["epoch"], their["step"])
            assert our[f"{name}_loss"] == pytest.approx(their[f"{name}_loss"], abs=1e-5)
            assert our[f"{name}_num_pairs"] == size
        assert losses[0][0][f"{name}_loss"] - losses[1][0][f"{name}_loss"] > 0.05
    # The second time, as raw rows: they are prepared again.
    their, our = both.theirs.evaluate(kind()), both.ours.evaluate(kind())
    assert {key for key in their if key.endswith("loss")} <= our.keys()
    for key in {key for key in their if key.endswith("loss")}:
        assert our[key] == pytest.approx(their[key], abs=1e-5)
    if not named:
        assert_same_figures(their, our)
        for before, after in both.records("eval_loss"):
            assert_same_figures(before, after)


def test_evaluation_between_steps_changes_nothing_and_comes_when_it_does_in_trl(
    model: Path, tmp_path: Path
) -> None:
    both = train_both(
        model, tmp_path, eval_dataset=table(HELD_OUT), eval_strategy="steps", eval_steps=2,
        eval_on_start=True,
    )  # fmt: skip
    assert_same_run(both)
    steps = [(their["step"], our["step"]) for their, our in both.records("eval_loss")]
    assert steps == [(0, 0), (2, 2), (4, 4), (6, 6)]
    for their, our in both.records("eval_loss"):
        assert_same_figures(their, our)


def test_eval_steps_default_to_logging_steps_as_in_trl(model: Path, tmp_path: Path) -> None:
    both = train_both(
        model, tmp_path, eval_dataset=table(HELD_OUT), eval_strategy="steps", logging_steps=3
    )
    assert [our["step"] for _, our in both.records("eval_loss")] == [3, 6]


def test_the_page_about_trl_has_every_metric_that_trl_logs(model: Path, tmp_path: Path) -> None:
    """A metric called refused is not there, every other one is."""
    both = train_both(
        model, tmp_path, eval_dataset=table(HELD_OUT), eval_strategy="epoch", num_train_epochs=1
    )
    theirs, ours = (
        {name for record in trainer.state.log_history for name in record}
        for trainer in (both.theirs, both.ours)
    )
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\w+)", page.partition("## Metrics")[2], re.MULTILINE)
    assert {name for name, _ in rows} == theirs
    assert {name for name, verdict in rows if verdict != "refused"} == theirs & ours


def test_the_prefix_of_evaluate_is_used_as_in_trl(model: Path, tmp_path: Path) -> None:
    theirs, ours = build_theirs(model, tmp_path), build_ours(model, tmp_path)
    rows = table(HELD_OUT)
    their = theirs.evaluate(rows, metric_key_prefix="test")
    our = ours.evaluate(rows, metric_key_prefix="test")
    assert our["test_loss"] == pytest.approx(their["test_loss"], abs=1e-5)
    assert_same_figures({k.replace("eval", "test"): v for k, v in their.items()}, our, "test")


def test_an_evaluation_without_rows_is_refused_before_training(model: Path, tmp_path: Path) -> None:
    """TRL refuses it in the constructor, raywards in `train()`."""
    with pytest.raises(ValueError, match="eval_dataset"):
        build_theirs(model, tmp_path, eval_strategy="epoch")
    with pytest.raises(ValueError, match="eval_dataset"):
        build_ours(model, tmp_path, eval_strategy="epoch").train()


def test_bad_held_out_rows_are_named_before_training(model: Path, tmp_path: Path) -> None:
    """TRL stops with an AttributeError that names no row."""
    rows = table([{"chosen": "a good one", "rejected": None}, {"chosen": "x", "rejected": "y"}])
    ours = build_ours(model, tmp_path, eval_dataset=rows, eval_strategy="epoch")
    with pytest.raises(ValueError, match="row 0: rejected is None"):
        ours.train()
    assert not list(ours.paths.run.glob("checkpoint-*"))


def test_both_can_be_trained_with_held_out_rows_that_are_never_used(
    model: Path, tmp_path: Path
) -> None:
    both = train_both(model, tmp_path, ROWS, eval_dataset=table(HELD_OUT), max_steps=3)
    assert_same_run(both, steps=3)
    assert not list(Both.records(both, "eval_loss"))
