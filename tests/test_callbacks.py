"""Callbacks and trackers: which events come, what a callback may ask for, what is refused."""

from __future__ import annotations

import errno
import inspect
import json
import os
import re
import shutil
import sqlite3
import uuid
from pathlib import Path
from typing import Any

import datasets
import pytest
import transformers
from preferences_data import conversation_rows
from safetensors.torch import load_file
from tiny import tiny_qwen2
from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TrackioCallback, WandbCallback

from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.errors import ConfigError
from raywards.train import callbacks as module
from raywards.train.callbacks import EVENTS
from raywards.train.cluster import _Mailbox
from raywards.train.runlog import RunLog, read_history

pytestmark = pytest.mark.trains

ROWS = conversation_rows(45)
HELD_OUT = conversation_rows(9, seed=1)
STEPS = 12  # two epochs of 45 pairs in batches of 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def records(run: RewardTrainer) -> list[dict[str, Any]]:
    """The history without its last entry, which sums the run up."""
    *records, summary = run.state.log_history
    assert "train_runtime" in summary
    return records


SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "learning_rate": 1e-3,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 8,
    "logging_steps": 4,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "disable_tqdm": True,
}


def trainer(
    model: Path, output: Path, callbacks: list[Any] | None = None, **changes: Any
) -> RewardTrainer:
    ours = {"num_workers": 0, "deepspeed": 0, "output_dir": str(output)}
    return RewardTrainer(
        str(model),
        RewardConfig(**SETTINGS | ours | changes),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=datasets.Dataset.from_list(HELD_OUT),
        callbacks=callbacks,
    )


class Recorder(TrainerCallback):
    """Every event that raywards has, with what it was told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float]] = []
        self.logs: list[dict[str, Any]] = []
        self.metrics: list[dict[str, Any]] = []
        self.about: list[tuple[Any, ...]] = []

    def note(self, event: str, args: Any, state: Any, kwargs: dict[str, Any]) -> None:
        if "train_runtime" in kwargs.get("logs", {}):
            return  # transformers' last record, which raywards returns from train() alone
        self.events.append((event, state.global_step, round(state.epoch or 0, 6)))
        self.logs += [kwargs["logs"]] if "logs" in kwargs else []
        self.metrics += [kwargs["metrics"]] if "metrics" in kwargs else []
        self.about.append(
            (args.learning_rate, args.run_name, state.max_steps, state.num_train_epochs,
             state.is_world_process_zero, len(state.log_history))
        )  # fmt: skip


def recording(event: str) -> Any:
    def method(self: Recorder, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.note(event, args, state, kwargs)

    return method


for _event in EVENTS:
    setattr(Recorder, _event, recording(_event))


def test_events_come_as_in_trl(model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    theirs, ours = Recorder(), Recorder()
    trl.RewardTrainer(
        str(model),
        trl.RewardConfig(output_dir=str(tmp_path / "trl"), report_to="none", **SETTINGS),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=datasets.Dataset.from_list(HELD_OUT),
        callbacks=[theirs],
    ).train()
    run = trainer(model, tmp_path / "ours", [ours])
    run.train()

    assert ours.events == theirs.events
    assert [event for event, *_ in ours.events] == [
        "on_init_end",
        "on_train_begin",
        *("on_epoch_begin", "on_log", "on_epoch_end", "on_log", "on_evaluate", "on_save"),
        *("on_epoch_begin", "on_log", "on_log", "on_epoch_end", "on_log", "on_evaluate", "on_save"),
        "on_train_end",
    ]
    history = [
        {name: value for name, value in record.items() if name != "step"} for record in records(run)
    ]
    assert ours.logs == history
    assert ours.metrics == [record for record in history if "eval_loss" in record]
    assert ours.about[-1] == (1e-3, "ours", STEPS, 2, True, len(history))


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def test_a_callback_stops_a_run_which_can_be_continued(model: Path, tmp_path: Path) -> None:
    quiet = {"eval_strategy": "no", "save_strategy": "no", "logging_steps": 1}
    stopped = trainer(model, tmp_path / "run", [StopAt(5)], **quiet)
    assert stopped.train().global_step == 5
    assert read_manifest(stopped.paths.export, kind="export")["training"]["step"] == 5
    [checkpoint] = complete_checkpoints(stopped.paths.run)
    assert read_manifest(checkpoint, kind="checkpoint")["step"] == 5

    callbacks = stopped.callback_handler
    assert callbacks.stopping
    callbacks.new_run()
    assert not callbacks.stopping, "a worker's note before its start would end the next run"
    [stops] = [c for c in callbacks.callbacks if isinstance(c, StopAt)]
    stops.step = 7
    assert stopped.train().global_step == 7, "what ended the last call ended this one"
    continued = trainer(model, tmp_path / "run", **quiet)
    assert continued.train().global_step == STEPS
    assert [record["step"] for record in records(continued)] == list(range(1, STEPS + 1))
    whole = trainer(model, tmp_path / "whole", **quiet)
    whole.train()
    left, right = (load_file(run.paths.export / "model.safetensors") for run in (continued, whole))
    assert all(left[name].equal(right[name]) for name in left)


def test_a_log_whose_start_could_not_be_kept_keeps_what_comes_after(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(model, tmp_path / "run", [])
    (tmp_path / "run").mkdir()
    log = RunLog(one.paths.metrics, one.callback_handler, one.storage, show_progress=True)
    start = {"step": 0, "total": 9, "history": [], "steps_per_epoch": 3}
    with monkeypatch.context() as full:
        full.setattr("os.replace", raises_no_space)
        with pytest.raises(OSError, match="No space left"):
            log.keep("start", start)
    for step in (1, 2):
        log.keep("log", {"step": step, "loss": 0.5})
    log.keep("finish", {"step": 9})
    log.close()
    assert log.finished == {"step": 9}
    assert [record["step"] for record in read_history(one.paths.metrics)] == [1, 2]


def raises_no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_message_is_there_until_it_has_arrived() -> None:
    box = _Mailbox()
    for step in range(3):
        box.put("log", {"step": step})
    assert len(box.take(0)) == 3
    assert len(box.take(0)) == 3, "the reply was lost, and with it the messages"
    box.put("finish", {})
    assert box.take(3) == [("finish", {})]
    assert box.take(3) == [("finish", {})]
    assert box.take(4) == []


class Fails(TrainerCallback):
    error: type[Exception] = KeyError

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 8:
            raise self.error("a mistake of the callback's own")


# The second is one that the log itself may meet without ending the run.
@pytest.mark.parametrize("error", [KeyError, ConnectionError])
def test_what_a_callback_raises_ends_the_run(
    error: type[Exception], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fails, "error", error)
    run = trainer(model, tmp_path / "run", [Fails])
    with pytest.raises(error, match="a mistake of the callback's own"):
        run.train()
    assert not run.paths.export.exists()
    assert len(complete_checkpoints(run.paths.run)) == 1  # of the first epoch
    run.remove_callback(Fails)
    recorder = Recorder()
    run.add_callback(recorder)
    run.train()
    assert recorder.events[0] == ("on_train_begin", 6, 1.0)
    steps = [record["step"] for record in records(run)]
    assert steps == [4, 6, 8, 12, 12]


def test_evaluate_is_an_event_too(model: Path, tmp_path: Path) -> None:
    recorder = Recorder()
    metrics = trainer(model, tmp_path / "run", [recorder]).evaluate()
    assert [event for event, *_ in recorder.events] == ["on_init_end", "on_log", "on_evaluate"]
    assert recorder.metrics == [metrics]


class Saves(TrainerCallback):
    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        control.should_save = True
        return control


def test_a_flag_without_effect_is_told(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(model, tmp_path / "run", [Saves], max_steps=6, save_strategy="no")
    run.train()
    [text] = [record.getMessage() for record in caplog.records if "should_" in record.getMessage()]
    assert text == (
        "a callback set control.should_save in on_epoch_end, which has no effect: use "
        "save_strategy and save_steps"
    )


class EachStep(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None: ...

    def on_optimizer_step(self, *_: Any, **__: Any) -> None: ...


REFUSED = [
    ([EachStep()], "EachStep defines on_optimizer_step, on_step_end, which would never be called"),
    ([EachStep], "Events are on_init_end, on_train_begin"),
    ([transformers.ProgressCallback], "ProgressCallback defines on_step_end"),
    ([transformers.EarlyStoppingCallback(3)], "set early_stopping_patience"),
    ([print], "is not a transformers.TrainerCallback"),
    (Recorder(), "expected a list of callbacks, got Recorder"),
]


@pytest.mark.parametrize(("callbacks", "told"), REFUSED)
def test_a_callback_that_cannot_work_is_refused(
    model: Path, tmp_path: Path, callbacks: Any, told: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        trainer(model, tmp_path, callbacks)
    if isinstance(callbacks, list):
        with pytest.raises(ConfigError, match=re.escape(told)):
            trainer(model, tmp_path).add_callback(callbacks[0])


# ---------------------------------------------------------------- trackers


def test_trackio_is_told_all_that_is_logged(model: Path, tmp_path: Path) -> None:
    project = uuid.uuid4().hex
    report = {"report_to": ["trackio", "tensorboard"], "project": project, "hub_token": "s3c"}
    run = trainer(model, tmp_path / "run", **report)
    run.train()
    # The folder was set in conftest.py: trackio reads it when it is imported.
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by id").fetchall()
        [[config]] = database.execute("select config from configs").fetchall()
    assert len(rows) == len(records(run)) == 5
    for (name, metrics), record in zip(rows, records(run), strict=True):
        assert name == "run"
        told = json.loads(metrics)
        assert told.pop("train/global_step") == record["step"]
        kinds = {f"{'eval/' if n.startswith('eval_') else 'train/'}{n.removeprefix('eval_')}": v
                 for n, v in record.items() if n != "step"}  # fmt: skip
        kinds["train/epoch"] = record["epoch"]
        assert told == pytest.approx(kinds)
    assert json.loads(config)["learning_rate"] == 1e-3
    assert "s3c" not in str(config)


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_tracker_that_is_not_installed_is_named_at_once(
    name: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(ConfigError, match=f"report_to: {name} is not installed.*pip install"):
        trainer(model, tmp_path, report_to=name)
    trainer(model, tmp_path, report_to="all")  # all that are installed: none


@pytest.mark.parametrize("variable", ["WANDB_LOG_MODEL", "WANDB_WATCH", "HF_MLFLOW_LOG_ARTIFACTS"])
def test_a_tracker_that_wants_the_weights_is_refused(
    variable: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=f"{variable}=true: the weights are with the workers"):
        trainer(model, tmp_path, report_to="trackio")


def test_all_that_the_trackers_of_transformers_read_is_there(model: Path, tmp_path: Path) -> None:
    """W&B and MLflow are too large to install for a test: their callbacks are read instead."""
    handler = trainer(model, tmp_path / "run").callback_handler
    # Behind WANDB_LOG_MODEL, which is refused.
    elsewhere = {"load_best_model_at_end", "metric_for_best_model"}
    for cls in (WandbCallback, MLflowCallback, TrackioCallback):
        source = inspect.getsource(cls)
        for owner, thing in (("args", handler.args), ("state", handler.state)):
            names = set(re.findall(rf"(?<![\w.]){owner}\.(\w+)", source)) - elsewhere
            assert names, cls
            for name in names:
                getattr(thing, name)
        idle = {"__init__": lambda self: None, "__del__": lambda self: None}
        handler.add_callback(type(cls.__name__, (cls,), idle))
    assert handler.args.to_dict()["num_train_epochs"] == 2
    assert json.loads(handler.args.to_json_string()) == handler.args.to_dict()
    assert all(
        isinstance(value, (bool, int, float, str))
        for value in handler.args.to_sanitized_dict().values()
    )
    assert handler.model.config.num_labels == 1


# ---------------------------------------------------------------- docs/tracking.md

PAGE = (Path(__file__).parent.parent / "docs" / "tracking.md").read_text(encoding="utf-8")


def test_the_page_has_every_event_and_its_example_runs(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = re.findall(r"^\| (`on_.*?) \|", PAGE, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(table))) == sorted(EVENTS)
    assert all(f"`{event}`" in PAGE for event in module._NEVER_CALLED)
    assert {*EVENTS, *module._NEVER_CALLED, "on_predict"} == {
        name for name in vars(TrainerCallback) if name.startswith("on_")
    }
    shutil.copytree(model, tmp_path / "model")
    for name, rows in (("train", conversation_rows(32)), ("test", HELD_OUT)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    [example] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace("eval_strategy=", "learning_rate=1e-2, eval_strategy="), names)
    assert names["trainer"].state.global_step == 4, "one epoch was enough"
