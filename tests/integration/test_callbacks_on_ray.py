"""A callback in the driver, two workers: it stops them at the same step, or with its own error."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
from preferences_data import conversation_rows
from tiny import tiny_qwen2
from transformers import TrainerCallback

from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import complete_checkpoints, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

STEPS = 400


def trainer(folder: Path, callback: TrainerCallback) -> RewardTrainer:
    return RewardTrainer(
        str(tiny_qwen2(folder / "model", num_labels=None)),
        RewardConfig(
            output_dir=str(folder / "run"),
            num_workers=2,
            use_cpu=True,
            bf16=False,
            deepspeed=2,
            max_steps=STEPS,
            per_device_train_batch_size=4,
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(conversation_rows(45)),
        callbacks=[callback],
    )


class Stops(TrainerCallback):
    def __init__(self) -> None:
        self.events: list[str] = []
        self.threads: set[str] = set()

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.events.append("log")
        self.threads.add(threading.current_thread().name)
        control.should_training_stop = state.global_step >= 3

    def on_save(self, *_: Any, **__: Any) -> None:
        self.events.append("save")

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.events.append("end")
        self.threads.add(threading.current_thread().name)


def test_a_callback_stops_all_workers_at_the_same_step(tmp_path: Path) -> None:
    callback = Stops()
    run = trainer(tmp_path, callback)
    step = run.train().global_step
    assert 3 <= step < STEPS
    [checkpoint] = complete_checkpoints(run.paths.run)
    manifest = read_manifest(checkpoint, kind="checkpoint")
    assert (manifest["step"], manifest["num_ranks"]) == (step, 2)
    export = read_manifest(run.paths.export, kind="export")
    assert export["training"]["step"] == step
    assert "README.md" in export["files"]
    assert callback.events == ["log"] * step + ["save", "end"]
    assert callback.threads == {"raywards-log"}  # trackers keep state by thread


class Fails(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            # A kind that the log itself may raise without ending the run.
            raise ConnectionError("the tracker cannot be reached")


@pytest.mark.slow
def test_what_a_callback_raises_is_raised_by_train(tmp_path: Path) -> None:
    run = trainer(tmp_path, Fails())
    with pytest.raises(ConnectionError, match="the tracker cannot be reached"):
        run.train()
    assert not run.paths.export.exists()
    kept = [record["step"] for record in run.state.log_history]
    assert kept[:3] == [1, 2, 3]
