"""The DeepSpeed dict, and the op whose build may have been killed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from raywards.config import RewardConfig
from raywards.errors import ConfigError, TrainingError
from raywards.train.zero import build_ops, stage_of, zero_config


def config(**settings: Any) -> RewardConfig:
    return RewardConfig(per_device_train_batch_size=4, gradient_accumulation_steps=2, **settings)


def zero_dict(settings: RewardConfig, *, num_ranks: int, bf16: bool) -> dict[str, Any]:
    return zero_config(
        settings, settings.deepspeed, num_ranks=num_ranks, global_batch=8 * num_ranks, bf16=bf16
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "0", "3"])
def test_a_stage_number_becomes_a_whole_dict(stage: Any) -> None:
    settings = zero_dict(config(deepspeed=stage), num_ranks=3, bf16=True)
    assert stage_of(settings) == int(stage)
    assert settings["train_batch_size"] == 24
    # At stage 0 the weights themselves are the fp32 masters.
    assert settings["bf16"] == {"enabled": int(stage) > 0}
    assert ("torch_autocast" in settings) == (int(stage) == 0)
    # What the loss rests on: nobody else scales by the number of forwards.
    assert settings["managed_gradient_accumulation"] is False


def test_auto_is_filled_in_as_transformers_does(tmp_path: Path) -> None:
    given = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": "auto",
            "reduce_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(given))
    by_dict = zero_dict(config(deepspeed=given, max_grad_norm=0.5), num_ranks=2, bf16=False)
    by_file = zero_dict(config(deepspeed=str(file), max_grad_norm=0.5), num_ranks=2, bf16=False)
    assert by_dict == by_file
    assert by_dict["train_micro_batch_size_per_gpu"] == 4
    assert by_dict["gradient_clipping"] == 0.5
    assert by_dict["bf16"]["enabled"] is False
    assert "optimizer" not in by_dict
    assert given["train_batch_size"] == "auto", "the caller's dict was changed"


def test_fewer_ranks_share_the_same_global_batch() -> None:
    given = {"train_batch_size": 16}
    settings = zero_config(config(), given, num_ranks=1, global_batch=16, bf16=False)
    assert settings["train_batch_size"] == 8, "DeepSpeed insists on micro x accumulation x ranks"
    with pytest.raises(ConfigError, match="train_batch_size=16"):
        zero_config(config(), given, num_ranks=2, global_batch=24, bf16=False)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"gradient_clipping": 0.3}, "deepspeed.gradient_clipping=0.3"),
        ({"train_batch_size": 7}, "deepspeed.train_batch_size=7"),
        ({"bf16": {"enabled": True}}, r"deepspeed\.bf16\.enabled=True"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1.0}}}, "learning_rate"),
        ({"zero_optimization": {"stage": 7}}, "stage=7"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, "overlap_comm"),
        ({"communication_data_type": "auto"}, "deepspeed.communication_data_type"),
    ],
)
def test_a_value_that_contradicts_its_setting_is_refused(given: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        zero_dict(config(deepspeed=given), num_ranks=2, bf16=False)


@pytest.fixture
def op_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder = tmp_path / "deepspeed_shm_comm"
    folder.mkdir()
    return folder


def test_the_lock_of_a_killed_build_is_removed_and_said(op_folder: Path) -> None:
    lock = op_folder / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 60, time.time() - 60))
    said: list[str] = []
    build_ops(said.append)
    assert not lock.exists()
    assert "killed" in said[0]
    assert "about a minute" in said[1]


def test_the_lock_of_a_build_that_goes_on_is_left_alone(op_folder: Path) -> None:
    (op_folder / "lock").touch()
    build_ops(lambda text: None)
    assert (op_folder / "lock").exists()


def test_an_op_that_is_there_is_not_mentioned(op_folder: Path) -> None:
    (op_folder / "deepspeed_shm_comm.so").touch()
    said: list[str] = []
    build_ops(said.append)
    assert said == []


def test_a_missing_compiler_is_named_before_deepspeed_fails_on_it(
    op_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(op_folder))
    with pytest.raises(TrainingError, match="ninja is not on PATH"):
        build_ops(lambda text: None)
