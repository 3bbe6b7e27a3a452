"""Of several sources, what is logged while it trains is also there for each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from preferences_data import conversation_rows
from test_objectives import CASES
from test_train_here import settings
from tiny import tiny_qwen2
from two_ranks import run_on_two_ranks, task

from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.errors import NonFiniteError
from raywards.metrics import PairMetrics
from raywards.objectives import build_objective
from raywards.train import loop
from raywards.train.card import last_evaluation
from raywards.train.runlog import read_history

CPU = torch.device("cpu")
ROWS = conversation_rows(45)
# Odd names, one of them that of a figure; the second source has two datasets.
WEB, FORUM = "web/loss/a b|é", "eval_num_pairs"
PARTS = {WEB: range(30), FORUM: range(30, 45)}
STEPS = 12  # two epochs of 45 pairs in global batches of 8
# Rows of few tokens: every global batch takes several forwards.
CHANGES: dict[str, Any] = {"max_tokens_per_row": 128, "save_strategy": "steps", "save_steps": 1}
TOTALS = {
    *("step", "epoch", "loss", "accuracy", "tie_rate", "margin", "num_tokens"),
    *("min_reward", "mean_reward", "max_reward", "grad_norm", "learning_rate", "pairs_per_second"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def sources(rows: list[dict[str, Any]]) -> dict[str, Any]:
    table = datasets.Dataset.from_list(rows)
    return {
        WEB: table.select(range(30)),
        FORUM: [table.select(range(30, 40)), table.select(range(40, 45))],
    }


def trainer(
    model: Path, output: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any
) -> RewardTrainer:
    return RewardTrainer(
        str(model), RewardConfig(**settings(output, **changes)), train_dataset=sources(rows)
    )


def log_of(run: Path) -> list[dict[str, Any]]:
    """The records of training that the last checkpoint has, without what depends on the clock."""
    records = read_history(complete_checkpoints(run)[-1] / "metrics.jsonl")
    return [
        {name: value for name, value in record.items() if name != "pairs_per_second"}
        for record in records
    ]


def of_source(record: dict[str, Any], figure: str) -> dict[str, float]:
    return {name: record[f"{figure}/{name}"] for name in PARTS if f"{figure}/{name}" in record}


def weighted(record: dict[str, Any], figure: str) -> float:
    """The mean of a figure over the sources, each with its pairs."""
    counts = of_source(record, "num_pairs")
    by_source = of_source(record, figure)
    return sum(counts[name] * by_source[name] for name in by_source) / sum(counts.values())


def assert_alike(one: list[dict[str, Any]], other: list[dict[str, Any]], **off: float) -> None:
    assert len(one) == len(other) > 1
    for mine, theirs in zip(one, other, strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, **off)


# ---------------------------------------------------------------- sums


def test_groups_of_a_ranking_count_for_the_source_of_their_ranking() -> None:
    objective = build_objective(RewardConfig(objective="all_pairs"))
    judged = objective.judge(
        torch.tensor([3.0, 1.0, 2.0, 0.0, 5.0, -1.0, -1.0]),
        {
            "sequences": [[[1], [2, 3], [4]], [[5], [6]], [[7], [8, 9, 9]]],
            "ranks": [[1.0, 2.0, 2.0], None, [1.0, 1.0]],
            "margin": [None, None, None],
            "probability": [None, 0.75, None],
            "source": ["a", "b", "c"],
        },
    )
    metrics = objective.metrics(CPU, ["b", "a", "c", "d"])
    metrics.add(*judged.counted)
    values = metrics.compute()
    losses = judged.losses.tolist()
    assert {name: value for name, value in values.items() if "/" in name} == pytest.approx(
        {
            **{"num_pairs/a": 1, "num_pairs/b": 1, "num_pairs/c": 1, "num_pairs/d": 0},
            **{"loss/a": losses[0], "loss/b": losses[1], "loss/c": losses[2]},
            "accuracy/a": 1.0,  # 3 over 1, 3 over 2
            "accuracy/b": 0.25,  # 0 over 5, as three of four judges say
        }  # c is a tie: there is nothing to be right about
    )
    assert values["accuracy"] == pytest.approx((1 + 1 + 0.25) / 3)


def test_attributes_have_a_loss_by_source() -> None:
    objective = build_objective(
        RewardConfig(objective="regression", attributes={"helpfulness": 0.75, "verbosity": -0.25})
    )
    judged = objective.judge(
        torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 4.0]]),
        {
            "sequences": [[[1, 2]], [[3]], [[4]]],
            "scores": [[2.0, 2.0], [3.0, None], [4.0, 0.0]],
            "source": ["a", "a", "b"],
        },
    )
    metrics = objective.metrics(CPU, ["a", "b"])
    metrics.add(*judged.counted)
    by_source = {name: value for name, value in metrics.compute().items() if "/" in name}
    assert by_source == {"num_pairs/a": 2, "num_pairs/b": 1, "loss/a": 0.25, "loss/b": 16.0}


def test_a_window_from_before_there_were_figures_by_source_is_taken_up() -> None:
    def add(metrics: PairMetrics, *names: str) -> None:
        rewards = torch.arange(float(len(names)))
        metrics.add(rewards, rewards, 1 - rewards, torch.ones(len(names)), 10, names)

    old, new, whole = PairMetrics(CPU), PairMetrics(CPU, ["a", "b"]), PairMetrics(CPU)
    for metrics in (old, whole):
        add(metrics, "a", "b", "b")
    new.restore(old.gather_on_first_rank(0), 0)
    for metrics in (new, whole):
        add(metrics, "a", "a")
    found = new.compute()
    assert {name: found.pop(name) for name in list(found) if "/" in name} == {
        **{"num_pairs/a": 2, "loss/a": 0.5, "accuracy/a": 0.5},
        "num_pairs/b": 0,
    }
    assert found == whole.compute()


def test_the_name_of_a_source_is_no_evaluation_to_the_card() -> None:
    record = {"step": 1, "loss": 1.0, f"loss/a_{FORUM}": 1.0, f"num_pairs/a_{FORUM}": 3}
    assert last_evaluation([record], up_to=1) == ({}, {})


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Log of one process: a record every fourth step."""
    run = trainer(model, tmp_path_factory.mktemp("one") / "run", logging_steps=4, **CHANGES)
    run.train()
    log = log_of(run.paths.run)
    assert [record["step"] for record in log] == [4, 8, 12]
    assert log[0]["loss"] - log[-1]["loss"] > 0.05, "nothing was learned: proves nothing"
    return log


@pytest.mark.trains
def test_figures_by_source_are_those_of_its_pairs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, float]] = []
    judge = loop.judge

    def watched(engine: Any, table: Any, indices: list[int], *rest: Any) -> Any:
        judged = judge(engine, table, indices, *rest)
        _, chosen, rejected, *_ = judged.counted
        differences = (chosen - rejected).tolist()
        seen.extend(zip(indices, differences, strict=True) if indices else [])
        return judged

    monkeypatch.setattr(loop, "judge", watched)
    run = trainer(
        model, tmp_path / "run", logging_steps=5, max_tokens_per_row=128,
        dataset_weights={WEB: 0.5, FORUM: 2},
    )  # fmt: skip
    run.train()
    records = [record for record in run.state.log_history if "loss" in record]
    # An epoch has 15 + 30 pairs: of the last record's steps, one has 5 pairs.
    lengths = [sum(of_source(record, "num_pairs").values()) for record in records]
    assert lengths == [40, 37, 13]
    assert sum(record[f"num_pairs/{WEB}"] for record in records) == 30
    losses = []
    for record, count in zip(records, map(int, lengths), strict=True):
        window, seen = seen[:count], seen[count:]
        for name, part in PARTS.items():
            mine = [difference for index, difference in window if index in part]
            assert mine, "there is nothing to compare"
            assert record[f"num_pairs/{name}"] == len(mine)
            surprises = [math.log1p(math.exp(-difference)) for difference in mine]
            losses.append(sum(surprises) / len(mine))
            assert record[f"loss/{name}"] == pytest.approx(losses[-1], abs=1e-6)
            right = [1.0 if d > 0 else 0.5 if d == 0 else 0.0 for d in mine]
            assert record[f"accuracy/{name}"] == pytest.approx(sum(right) / len(mine))
        for figure in ("loss", "accuracy"):
            assert weighted(record, figure) == pytest.approx(record[figure])
    assert not seen
    assert max(losses) - min(losses) > 0.05, "all are the same: proves nothing"


@pytest.mark.trains
@pytest.mark.parametrize("case", CASES)
def test_every_objective_has_figures_by_source(case: str, model: Path, tmp_path: Path) -> None:
    make, changes = CASES[case]
    run = trainer(model, tmp_path / "run", make(45), logging_steps=4, **changes)
    run.train()
    records = [record for record in run.state.log_history if "loss" in record]
    counts = [sum(of_source(record, "num_pairs").values()) for record in records]
    assert counts == [32, 29, 29]
    for record in records:
        assert weighted(record, "loss") == pytest.approx(record["loss"])
        rates = of_source(record, "accuracy")
        if changes["objective"] == "regression":
            assert not rates
        else:  # over the pairs inside the rankings: a mean of the two, weighted by these
            assert min(rates.values()) <= record["accuracy"] <= max(rates.values())
    one, other = PARTS
    assert any(record[f"loss/{one}"] != record[f"loss/{other}"] for record in records)


@pytest.mark.trains
def test_one_source_leaves_the_records_as_they_are(
    model: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    run = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "run", logging_steps=4, max_tokens_per_row=128)),
        # A source that has several datasets is one source.
        train_dataset={WEB: [*sources(ROWS)[FORUM], datasets.Dataset.from_list(ROWS[:30])]},
    )
    run.train()
    records = [record for record in run.state.log_history if "loss" in record]
    assert len(records) == 3
    assert all(record.keys() == TOTALS for record in records)
    by_source = {f"{figure}/{n}" for figure in ("loss", "accuracy", "num_pairs") for n in PARTS}
    assert all(r.keys() == TOTALS - {"pairs_per_second"} | by_source for r in undisturbed)


@pytest.mark.trains
def test_a_run_that_stops_before_a_bad_step_keeps_the_window_by_source(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: list[dict[str, Any]]
) -> None:
    changes = {**CHANGES, "logging_steps": 4, "save_steps": 100}
    run = trainer(model, tmp_path / "run", **changes)
    accumulate: Callable[..., None] = loop.accumulate_gradients

    def spoil(worker: Any, indices: Any) -> None:
        accumulate(worker, indices)
        if worker.state.step == 5:
            worker.metrics.add(*(torch.full((1,), math.nan),) * 4, 1, [WEB])

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", spoil)
        with pytest.raises(NonFiniteError):
            run.train()
    trainer(model, tmp_path / "run", **changes).train()
    assert_alike(log_of(run.paths.run), undisturbed, rel=1e-5, abs=1e-6)


@pytest.mark.trains
def test_ranks_and_breaks_change_no_figure_by_source(
    model: Path, tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    both = {**CHANGES, "logging_steps": 4, "num_workers": 2, "per_device_train_batch_size": 4}
    whole = trainer(model, tmp_path / "whole", **both)
    broken = trainer(model, tmp_path / "broken", **both)
    run_on_two_ranks([task(whole), task(broken, stop_after=6)])  # in the middle of a window
    assert_alike(log_of(whole.paths.run), undisturbed, rel=1e-4, abs=1e-5)
    assert len(log_of(broken.paths.run)) == 1
    # One rank takes up what two have counted.
    trainer(model, tmp_path / "broken", **both | {"num_workers": 0}).train()
    checkpoints = complete_checkpoints(broken.paths.run)
    ranks = {
        manifest["step"]: manifest["num_ranks"]
        for manifest in (read_manifest(folder, kind="checkpoint") for folder in checkpoints)
    }
    assert (ranks[6], ranks[STEPS]) == (2, 1)
    assert_alike(log_of(broken.paths.run), undisturbed, rel=1e-4, abs=1e-5)
