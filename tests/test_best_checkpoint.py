"""The best checkpoint, early stopping and retention: the same through a stop as undisturbed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import pytest
import torch
from preferences_data import conversation_rows
from safetensors.torch import load_file
from tiny import tiny_qwen2
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState

import raywards.train.loop as loop
from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import complete_checkpoints, read_manifest, write_manifest
from raywards.errors import CheckpointError, ConfigError
from raywards.evaluation import HeldOut, figures
from raywards.train.best import Goal
from raywards.train.job import State
from raywards.train.storage import SharedFolder, retain

ROWS = conversation_rows(45)
# Every third pair is the wrong way round, so a model that grows surer gets worse in time.
HELD_OUT = [
    {"chosen": row["rejected"], "rejected": row["chosen"]} if i % 3 == 0 else row
    for i, row in enumerate(conversation_rows(24, seed=1))
]
TURNS = {"learning_rate": 7e-4, "lr_scheduler_type": "constant", "max_steps": 10}
BEST = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def trainer(model: Path, output: Path, held_out: Any = HELD_OUT, **changes: Any) -> RewardTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_workers": 0,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 0,
        "per_device_train_batch_size": 8,
        "logging_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
        "load_best_model_at_end": True,
        "disable_tqdm": True,
        **TURNS,
        **changes,
    }
    sets = held_out
    if isinstance(held_out, list):
        sets = datasets.Dataset.from_list(held_out)
    return RewardTrainer(
        str(model),
        RewardConfig(**settings),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=sets,
    )


def run(model: Path, output: Path, held_out: Any = HELD_OUT, **changes: Any) -> RewardTrainer:
    one = trainer(model, output, held_out, **changes)
    one.train()
    return one


def curve(run: RewardTrainer, name: str = "eval_loss") -> dict[int, float]:
    return {e["step"]: e[name] for e in run.state.log_history if name in e}


def steps(folder: Path) -> list[int]:
    return [
        int(read_manifest(found, kind="checkpoint")["step"])
        for found in complete_checkpoints(folder)
    ]


def weights(run: RewardTrainer) -> dict[str, torch.Tensor]:
    return load_file(run.paths.export / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    clocks = ("runtime", "per_second")
    return [{k: v for k, v in e.items() if not k.endswith(clocks)} for e in history]


class Killed(BaseException):
    """Not an `Exception`: nothing of ours may take it for a failure and tidy up."""


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Make one of the loop's functions end the run, once, at the given step."""

    def arrange(name: str, step: int) -> None:
        function = getattr(loop, name)

        def dying(worker: Any, *args: Any) -> Any:
            result = function(worker, *args)
            if worker.state.step == step:
                monkeypatch.setattr(loop, name, function)
                raise Killed
            return result

        monkeypatch.setattr(loop, name, dying)

    return arrange


# ---------------------------------------------------------------- the goal, by itself


def taken(values: list[float], **settings: Any) -> tuple[State, list[bool], int | None]:
    """A goal's state after evaluations of `values`, which were best, and where it gave up."""
    config = RewardConfig(eval_strategy="steps", metric_for_best_model="accuracy", **settings)
    goal, state, best, end = Goal.of(config), State(), [], None
    for step, value in enumerate(values, 1):
        state.step = step
        best.append(goal.take(state, {"eval_accuracy": value}))
        if goal.is_given_up(state):
            end = step
            break
    return state, best, end


SERIES = [
    [0.5, 0.6, 0.6, 0.65, 0.64, 0.63, 0.9],
    [0.5, 0.505, 0.51, 0.515, 0.52, 0.525],  # each under the threshold, by which patience goes
    [0.5, math.nan, 0.4, 0.6],
    [0.9, 0.8, 0.7, 0.6, 0.5],
]


@pytest.mark.parametrize("greater", [True, False])
@pytest.mark.parametrize("values", SERIES, ids=range(len(SERIES)))
def test_best_and_patience_are_those_of_transformers(values: list[float], greater: bool) -> None:
    args = SimpleNamespace(
        greater_is_better=greater, metric_for_best_model="accuracy", save_strategy="steps"
    )
    theirs, control, expected = TrainerState(), TrainerControl(), None
    callback = EarlyStoppingCallback(2, 0.01)
    best = []
    for step, value in enumerate(values, 1):
        theirs.global_step = step
        callback.on_evaluate(args, theirs, control, {"eval_accuracy": value})
        ahead = numpy.greater if greater else numpy.less
        # Trainer._determine_best_metric, which is called after the callback.
        start = -math.inf if greater else math.inf
        best.append(bool(ahead(value, start if theirs.best_metric is None else theirs.best_metric)))
        if best[-1]:
            theirs.best_metric, theirs.best_global_step = value, step
        if control.should_training_stop:
            expected = step
            break
    state, ours, end = taken(
        values, greater_is_better=greater, early_stopping_patience=2, early_stopping_threshold=0.01
    )
    assert (state.best_metric, state.best_step) == (theirs.best_metric, theirs.best_global_step)
    assert ours == best
    assert end == expected


def test_a_first_figure_that_is_nan_is_not_the_best() -> None:
    state, best, end = taken([math.nan, 0.5, math.nan], early_stopping_patience=2)
    assert (best, end, state.best_step) == ([False, True, False], None, 2)
    assert taken([math.nan, math.nan], early_stopping_patience=2)[2] == 2


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("loss", False), ("eval_loss", False), ("eval_helpful_log_loss", False),
        ("accuracy", True), ("eval_accuracy/web", True), ("web_accuracy/my_loss", True),
        ("calibration_error", False),
        ("eval_kind_tie_rate", False), ("margin_p05", True),
    ],
)  # fmt: skip
def test_whether_more_is_better_goes_by_the_figure(metric: str, greater: bool) -> None:
    config = RewardConfig(eval_strategy="epoch", metric_for_best_model=metric)
    assert Goal.of(config).greater_is_better is greater


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("mse", False), ("eval_web_mae", False), ("pearson", True), ("eval_loss", False),
        ("mse/brevity", False), ("eval_web_pearson/my_loss", True), ("loss/my_pearson", False),
    ],
)  # fmt: skip
def test_whether_more_is_better_goes_by_the_figures_of_the_objective(
    metric: str, greater: bool
) -> None:
    config = RewardConfig(
        objective="regression",
        attributes={"brevity": 1.0, "my_loss": 1.0},
        eval_strategy="epoch",
        metric_for_best_model=metric,
    )
    assert Goal.of(config).greater_is_better is greater


def test_a_figure_that_goes_missing_is_no_improvement() -> None:
    config = RewardConfig(
        objective="regression",
        eval_strategy="steps",
        metric_for_best_model="pearson",
        early_stopping_patience=1,
    )
    goal, state = Goal.of(config), State(step=1)
    with pytest.raises(ConfigError, match="no evaluation gives 'eval_pearson'"):
        goal.take(state, {"eval_loss": 1.0})
    assert goal.take(state, {"eval_pearson": -0.5})
    assert not goal.take(state, {"eval_loss": 1.0})
    assert goal.is_given_up(state)
    assert (state.best_metric, state.best_step) == (-0.5, 1)


def test_every_figure_can_be_chosen_by() -> None:
    columns = ("loss", "chosen", "rejected", "probability", "chosen_tokens", "rejected_tokens")
    table = {name: numpy.array([1.0, 2.0 + i]) for i, name in enumerate(columns)}
    found = figures(table, ["a", "b"])
    counts = {"num_pairs", "num_tokens", "accuracy/a", "accuracy/b"}
    assert found.keys() - counts == HeldOut.choosable.keys()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"load_best_model_at_end": True}, "load_best_model_at_end needs evaluations"),
    ({"early_stopping_patience": 2}, "early_stopping_patience needs evaluations"),
    ({"save_strategy": "best"}, "save_strategy='best' needs evaluations"),
    ({"early_stopping_threshold": 0.1}, "no effect without early_stopping_patience"),
    ({"greater_is_better": True}, "no effect without metric_for_best_model"),
    (
        {"metric_for_best_model": "length_bias", "eval_strategy": "steps"},
        "'length_bias': it is not obvious whether more of it is better; set greater_is_better",
    ),
]


@pytest.mark.parametrize(("settings", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_goals_that_cannot_be_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        Goal.of(RewardConfig(**settings))


# ---------------------------------------------------------------- retention, by itself


def checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step:06d}-{step:08x}"
    folder.mkdir(parents=True)
    (folder / "part").write_text("x")
    write_manifest(folder, {"kind": "checkpoint", "step": step}, {"part": 1})
    return folder


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [5]), (2, None, [4, 5]), (9, None, [1, 2, 3, 4, 5]),
        (1, 2, [2, 5]), (2, 2, [2, 5]), (3, 2, [2, 4, 5]), (2, 5, [4, 5]), (1, 5, [5]),
        (2, 7, [4, 5]),  # a best step whose checkpoint was never written
    ],
)  # fmt: skip
def test_the_newest_and_the_best_are_kept(
    keep: int, best: int | None, left: list[int], tmp_path: Path
) -> None:
    for step in (3, 1, 2, 5, 4):
        checkpoint(tmp_path, step)
    retain(SharedFolder(tmp_path), keep, best)
    assert steps(tmp_path) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_nothing_is_removed_for_a_checkpoint_that_is_not_complete(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-000003-00000003" / "part").unlink()
    retain(SharedFolder(tmp_path), 1, None)
    assert steps(tmp_path) == [2]
    retain(SharedFolder(tmp_path / "empty"), 1, None)


def test_what_was_cut_off_is_removed_and_nothing_else(tmp_path: Path) -> None:
    whole, cut_off = checkpoint(tmp_path, 1), checkpoint(tmp_path, 2)
    (cut_off / "raywards.json").unlink()
    others = [
        tmp_path / name for name in ("checkpoint-500", "checkpoint-best", "checkpoint-000007")
    ]
    for other in others:
        other.mkdir()
    SharedFolder(tmp_path).remove_cut_off()
    assert sorted(tmp_path.iterdir()) == sorted([whole, *others])


# ---------------------------------------------------------------- runs

trains = pytest.mark.trains


@pytest.fixture(scope="module")
def undisturbed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    """All steps, every one evaluated; exports its best."""
    one = run(model, tmp_path_factory.mktemp("undisturbed") / "run")
    values = curve(one)
    assert min(values, key=values.__getitem__) == BEST, "all that follows rests on it"
    return one


@pytest.fixture(scope="module")
def early(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    """Stops at step 8, three evaluations after its best; keeps two checkpoints."""
    return run(model, tmp_path_factory.mktemp("early") / "run", **EARLY)


EARLY = {
    "early_stopping_patience": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}


@trains
def test_the_export_is_of_the_best_step(
    model: Path, tmp_path: Path, undisturbed: RewardTrainer
) -> None:
    value = curve(undisturbed)[BEST]
    training = read_manifest(undisturbed.paths.export, kind="export")["training"]
    assert (training["step"], training["last_step"]) == (BEST, 10)
    assert training["best_metric"] == value
    assert (undisturbed.state.global_step, undisturbed.state.best_global_step) == (10, BEST)
    assert undisturbed.state.best_metric == value
    folder = Path(str(undisturbed.state.best_model_checkpoint))
    manifest = read_manifest(folder, kind="checkpoint")
    assert (manifest["step"], manifest["best_step"]) == (BEST, BEST)
    assert training["num_pairs"] == manifest["num_pairs"] == 8 * BEST
    # Without `save_strategy`: one for each evaluation that was the best so far, and the last.
    assert steps(undisturbed.paths.run) == [1, 2, 3, 4, 5, 10]

    # What it exports is what a run of so many steps exports, and no other step's weights.
    short = run(model, tmp_path / "short", max_steps=BEST, load_best_model_at_end=False)
    assert same(weights(short), weights(undisturbed))
    tokens = [e["num_tokens"] for e in short.state.log_history if "loss" in e][-1]
    assert training["num_tokens"] == manifest["num_tokens"] == tokens
    assert undisturbed.evaluate()["eval_loss"] == pytest.approx(value, abs=1e-6)


@trains
def test_the_result_tells_of_what_was_exported(model: Path, undisturbed: RewardTrainer) -> None:
    before = weights(undisturbed)
    again = trainer(model, undisturbed.paths.run)
    result = again.train()  # it had finished: only the export is written again
    assert result.global_step == 10
    assert result.metrics["eval_loss"] == curve(undisturbed)[BEST]
    assert same(weights(again), before)


@trains
@pytest.mark.parametrize(
    ("stage", "bf16"),
    [
        (3, False),
        pytest.param(1, False, marks=pytest.mark.slow),
        pytest.param(2, True, marks=pytest.mark.slow),
        pytest.param(1, True, marks=pytest.mark.slow),
        pytest.param(2, False, marks=pytest.mark.slow),
        pytest.param(3, True, marks=pytest.mark.slow),
        pytest.param(0, True, marks=pytest.mark.slow),
    ],
)
def test_the_best_is_loaded_back_at_any_stage(
    stage: int, bf16: bool, model: Path, tmp_path: Path
) -> None:
    changes = {"deepspeed": stage, "bf16": bf16}
    one = run(model, tmp_path / "run", **changes)
    best = one.state.best_global_step
    assert 1 < best < 10, "the last step is the best: nothing is loaded"
    short = run(model, tmp_path / "short", max_steps=best, load_best_model_at_end=False, **changes)
    assert same(weights(short), weights(one))


@trains
def test_a_run_that_gets_no_better_stops_saves_and_exports(
    model: Path, tmp_path: Path, early: RewardTrainer, undisturbed: RewardTrainer
) -> None:
    assert early.state.global_step == 8
    assert curve(early) == {step: v for step, v in curve(undisturbed).items() if step <= 8}
    # Every pair up to the stop is in the log, though step 8 is no logging step.
    assert list(curve(early, "loss")) == [3, 6, 8]
    assert steps(early.paths.run) == [BEST, 8]
    assert same(weights(early), weights(undisturbed))
    last = run(model, tmp_path / "last", **{**EARLY, "load_best_model_at_end": False})
    assert last.state.global_step == 8
    assert read_manifest(last.paths.export, kind="export")["training"]["step"] == 8
    assert not same(weights(last), weights(early))


@trains
@pytest.mark.parametrize(
    ("function", "step"),
    [
        ("accumulate_gradients", 6),  # inside step 7: goes back to 6
        (
            "evaluate",
            6,
        ),  # evaluated, not yet saved: goes back to 5, the best, which was no save step
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in (
                ("save", BEST),  # saved as the best
                ("save", 6),
                ("save", 8),  # given up, not yet exported
                ("load_best", 8),
            )
        ),
    ],
)
def test_a_run_that_was_killed_stops_and_exports_as_if_it_were_not(
    function: str,
    step: int,
    kill: Callable[[str, int], None],
    model: Path,
    tmp_path: Path,
    early: RewardTrainer,
) -> None:
    kill(function, step)
    with pytest.raises(Killed):
        run(model, tmp_path / "run", **EARLY)
    assert not (tmp_path / "run" / "export").exists()
    again = run(model, tmp_path / "run", **EARLY)
    assert without_times(again.state.log_history) == without_times(early.state.log_history)
    assert steps(again.paths.run) == steps(early.paths.run)
    states = [
        read_manifest(complete_checkpoints(each.paths.run)[-1], kind="checkpoint")
        for each in (again, early)
    ]
    for name in ("step", "best_step", "best_metric", "evaluations_without_improvement"):
        assert states[0][name] == states[1][name], name
    assert states[0]["evaluations_without_improvement"] == 3
    assert same(weights(again), weights(early))


@trains
def test_patience_may_be_changed_and_the_metric_may_not(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "run", **EARLY)
    longer = run(model, tmp_path / "run", **{**EARLY, "early_stopping_patience": 4})
    assert longer.state.global_step == 9
    assert list(curve(longer)) == list(range(1, 10))
    with pytest.raises(CheckpointError, match="metric_for_best_model: was None, is 'accuracy'"):
        run(model, tmp_path / "run", metric_for_best_model="accuracy", **EARLY)


@trains
def test_only_the_best_may_be_saved(model: Path, tmp_path: Path) -> None:
    one = run(
        model, tmp_path / "run", save_strategy="best", save_total_limit=1,
        load_best_model_at_end=False,
    )  # fmt: skip
    assert steps(one.paths.run) == [BEST, 10]
    assert read_manifest(one.paths.export, kind="export")["training"]["step"] == 10


@trains
def test_a_figure_of_a_named_set_and_source_can_be_the_metric(model: Path, tmp_path: Path) -> None:
    def rows(*which: int) -> datasets.Dataset:
        return datasets.Dataset.from_list([HELD_OUT[i] for i in which])

    sets = {"web": [rows(*range(9)), rows(*range(9, 16))], "forum": rows(*range(16, 24))}
    changes = {"max_steps": 2, "load_best_model_at_end": False}
    first = run(model, tmp_path / "a", sets, metric_for_best_model="eval_web_log_loss", **changes)
    assert first.state.best_metric == min(curve(first, "eval_web_log_loss").values())
    evaluated = [record for record in first.state.log_history if "eval_web_loss" in record]
    [one, other] = [key for key in evaluated[-1] if "accuracy/" in key]
    second = run(model, tmp_path / "b", sets, metric_for_best_model=other, **changes)
    assert second.state.best_metric == max(curve(second, other).values())
    assert one != other

    for wrong, told in [
        ("web_acuracy", "Did you mean 'eval_web_accuracy'"),
        ("loss", "There are: .*eval_forum_loss, .*eval_web_loss"),
        (one.replace("web", "forum"), "'eval_forum_accuracy/"),  # it has one source
        ("runtime", "'eval_runtime'"),
    ]:
        third = trainer(model, tmp_path / "c", sets, metric_for_best_model=wrong, **changes)
        with pytest.raises(ConfigError, match=f"(?s)no evaluation gives .*{told}"):
            third.train()
        assert not (tmp_path / "c" / "run.json").exists()


@trains
def test_a_best_checkpoint_that_stayed_behind_is_missed_at_once(
    model: Path, tmp_path: Path, early: RewardTrainer
) -> None:
    copy = shutil.copytree(complete_checkpoints(early.paths.run)[-1], tmp_path / "copy")
    other = trainer(model, tmp_path / "run", **EARLY)
    with pytest.raises(CheckpointError, match=f"the best checkpoint so far, of step {BEST}"):
        other.train(resume_from_checkpoint=str(copy))
    # Doing what the message says.
    for folder in complete_checkpoints(early.paths.run):
        shutil.copytree(folder, tmp_path / "run" / folder.name)
    assert same(weights(run(model, tmp_path / "run", **EARLY)), weights(early))
