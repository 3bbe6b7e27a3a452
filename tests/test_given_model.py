"""A model that is passed as an object: trained in place, again, and told apart from another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import tuning_runs as runs
from safetensors.torch import load_file, save_file
from tiny import tiny_qwen2
from transformers import AutoModelForSequenceClassification, TrainerCallback

from raywards import Scorer
from raywards.errors import CheckpointError, ConfigError
from raywards.loader import create_model_from_path

pytestmark = pytest.mark.trains

IDS = [5, 60, 7, 80, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"))


def loaded(model: Path) -> Any:
    return create_model_from_path(
        str(model), AutoModelForSequenceClassification, num_labels=1, device_map=None
    )


def lora() -> Any:
    return peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])


def exported(run: Any) -> dict[str, torch.Tensor]:
    return load_file(run.paths.export / "model.safetensors")


class Fails(TrainerCallback):
    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            raise ZeroDivisionError


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA"])
def test_an_interrupted_run_of_an_object_goes_on(
    adapted: bool, model: Path, tmp_path: Path
) -> None:
    options = {"peft_config": lora()} if adapted else {}
    whole = runs.trainer(loaded(model), tmp_path / "whole", **options)
    whole.train()
    run = runs.trainer(loaded(model), tmp_path / "run", **options)
    run.add_callback(Fails)
    with pytest.raises(ZeroDivisionError):
        run.train()
    run.remove_callback(Fails)
    assert run.train().global_step == 8
    assert run.train().global_step == 8  # finished, and started again
    for name, tensor in exported(whole).items():
        torch.testing.assert_close(exported(run)[name], tensor, atol=1e-6, rtol=0)


CASES = [
    pytest.param(stage, bf16, adapted, marks=() if usual else pytest.mark.slow)
    for stage in range(3)
    for bf16 in (False, True)
    for adapted in (False, True)
    for usual in [(stage, bf16) in ((0, True), (2, True))]
]


@pytest.mark.parametrize(("stage", "bf16", "adapted"), CASES)
def test_the_object_is_what_is_exported_in_the_type_it_had(
    stage: int, bf16: bool, adapted: bool, model: Path, tmp_path: Path
) -> None:
    options = {"peft_config": lora()} if adapted else {}
    given = loaded(model)
    run = runs.trainer(given, tmp_path / "run", deepspeed=stage, bf16=bf16, **options)
    run.train()
    after = run.model
    assert {p.dtype for p in after.parameters()} == {torch.float32}
    if adapted:
        after = after.merge_and_unload()
    else:
        assert after is given
    state = after.state_dict()
    for name, tensor in exported(run).items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=0)
    Scorer.from_pretrained(run.paths.export).verify()


def test_zero_3_would_leave_the_object_without_weights(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ZeRO stage 3 would partition .* Pass its path"):
        runs.trainer(loaded(model), tmp_path / "run", deepspeed=3).train()
    assert not (tmp_path / "run").exists()


PARTLY: dict[str, dict[str, Any]] = {
    "LoRA": {"peft_config": lora()},
    "frozen": {"freeze": ["model.layers.0"]},
}


@pytest.mark.parametrize("kind", PARTLY)
def test_weights_that_are_not_trained_may_not_change_between_starts(
    kind: str, model: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(model, tmp_path / "model")
    run = runs.trainer(own, tmp_path / "run", **PARTLY[kind])
    run.add_callback(Fails)
    with pytest.raises(ZeroDivisionError):
        run.train()
    before = (own / "model.safetensors").read_bytes()
    tensors = load_file(own / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 3
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    assert (own / "model.safetensors").stat().st_size == len(before), "the sizes would tell"
    with pytest.raises(CheckpointError, match="untrained_weights: was"):
        runs.trainer(own, tmp_path / "run", **PARTLY[kind]).train()
    (own / "model.safetensors").write_bytes(before)
    assert runs.trainer(own, tmp_path / "run", **PARTLY[kind]).train().global_step == 8


def test_an_object_with_other_frozen_weights_is_refused(model: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"freeze": ["model.layers.0"]}
    runs.trainer(loaded(model), tmp_path / "run", **options).train()
    other = loaded(model)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight *= 3
    with pytest.raises(CheckpointError, match="untrained_weights: was"):
        runs.trainer(other, tmp_path / "run", **options).train()
    assert runs.trainer(loaded(model), tmp_path / "run", **options).train().global_step == 8


# ---------------------------------------------------------------- a start that fails


@pytest.mark.parametrize("adapted", [False, True])
def test_a_start_that_fails_leaves_the_model_as_it_was(
    model: Path, tmp_path: Path, adapted: bool
) -> None:
    given = loaded(model)
    if adapted:
        given = peft.get_peft_model(
            given, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])
        )
    given.eval()
    before = runs.plain_reward(given, IDS), str(given), given.state_dict().keys()
    with pytest.raises(TypeError, match="bad"):
        runs.train(given, tmp_path / "run", lr_scheduler_kwargs={"bad": 1})
    given.eval()
    assert (runs.plain_reward(given, IDS), str(given), given.state_dict().keys()) == before
    assert isinstance(given, peft.PeftModel) == adapted
    assert runs.learned(runs.train(given, tmp_path / "again"))
