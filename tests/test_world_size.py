"""Every ZeRO stage, in fp32 and bf16, of all weights and of LoRA, through a change of the number of
ranks, and back."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import peft
import pytest
import torch
from preferences_data import conversation_rows
from safetensors.torch import load_file
from tiny import tiny_qwen2
from two_ranks import run_on_two_ranks, task

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import complete_checkpoints, read_manifest

pytestmark = pytest.mark.trains

ROWS = conversation_rows(45)
Weights = dict[str, torch.Tensor]
STEPS = 18  # three epochs of 45 pairs in global batches of 8
FIRST, SECOND = 5, 11  # steps after which the run is stopped

ZERO: dict[int, Any] = {
    0: 0,
    1: 1,
    2: 2,
    # Without the threshold every tensor of a tiny model stays whole, and nothing is partitioned.
    3: {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}


class Case(NamedTuple):
    """One way to train."""

    stage: int
    bf16: bool
    lora: bool

    def __str__(self) -> str:
        tuned = "lora" if self.lora else "full"
        return f"zero{self.stage}-{'bf16' if self.bf16 else 'fp32'}-{tuned}"


MATRIX = [
    Case(stage, bf16, lora) for stage in ZERO for bf16 in (False, True) for lora in (False, True)
]
USUAL = [Case(2, False, False), Case(3, True, True)]


def trainer(model: Path, output: Path, *, lora: bool = False, **changes: Any) -> RewardTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_workers": 2,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-2 if lora else 1e-3,
        # Groups with and without decay: a conversion must keep them apart.
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 3,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "disable_tqdm": True,
        **changes,
    }
    return RewardTrainer(
        str(model),
        RewardConfig(**settings),
        train_dataset=datasets.Dataset.from_list(ROWS),
        peft_config=peft.LoraConfig(**LORA) if lora else None,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Weights]:
    """Weights of one process without ZeRO, undisturbed, in fp32: of all weights, or of LoRA."""

    @cache
    def train(lora: bool) -> Weights:
        run = trainer(
            model, tmp_path_factory.mktemp("reference") / "run", lora=lora, deepspeed=0,
            num_workers=0, per_device_train_batch_size=8, save_strategy="no",
        )  # fmt: skip
        run.train()
        records = [record["loss"] for record in run.state.log_history if "loss" in record]
        assert records[0] - records[-1] > 0.1, "nothing was learned: comparisons prove nothing"
        return load_file(run.paths.export / "model.safetensors")

    return train


def stop_here(run: RewardTrainer, step: int) -> None:
    """Train in this process until the checkpoint of a step is written."""

    class Enough(Exception):
        pass

    from raywards.train.session import LocalSession

    commit = LocalSession.commit

    def and_stop(self: Any, folder: Path, name: str, *, best_step: int | None) -> None:
        commit(self, folder, name, best_step=best_step)
        if manifest_of(folder)["step"] == step:
            raise Enough

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalSession, "commit", and_stop)
        with pytest.raises(Enough):
            run.train()


@pytest.mark.parametrize(
    "cases", [USUAL, pytest.param(MATRIX, marks=pytest.mark.slow)], ids=["usual", "matrix"]
)
def test_a_run_goes_from_two_ranks_to_one_and_to_two_again(
    cases: list[Case], model: Path, tmp_path: Path, reference: Callable[[bool], Weights]
) -> None:
    def run(case: Case, **changes: Any) -> RewardTrainer:
        chosen = {"deepspeed": ZERO[case.stage], "bf16": case.bf16, "lora": case.lora}
        return trainer(model, tmp_path / str(case), **chosen, **changes)

    run_on_two_ranks([task(run(case), stop_after=FIRST) for case in cases])
    for case in cases:
        stop_here(run(case, num_workers=0), SECOND)
    run_on_two_ranks([task(run(case)) for case in cases])

    start = trainer(model, tmp_path / "start").model.state_dict()
    for case in cases:
        done = run(case)
        ranks = {
            manifest["step"]: manifest["num_ranks"]
            for manifest in map(manifest_of, complete_checkpoints(done.paths.run))
        }
        assert ranks[FIRST] == ranks[STEPS] == 2
        assert ranks[SECOND] == 1
        expected = reference(case.lora)
        weights = load_file(done.paths.export / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        far, off = distance(expected, start), distance(weights, expected)
        # bf16 rounds every step; what counts is that it went to the same place, not beside it.
        assert off < (far / 4 if case.bf16 else 1e-4), f"{case}: {off} of {far}"
        scorer = Scorer.from_pretrained(done.paths.export)
        scorer.verify()  # the export, loaded again, gives the rewards that it was written with
        assert scorer.info["training"]["num_pairs"] == 3 * len(ROWS)


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    return read_manifest(checkpoint, kind="checkpoint")


def distance(a: Weights, b: Weights) -> float:
    """Euclidean distance between two sets of weights."""
    assert a.keys() == b.keys()
    return sum((a[name] - b[name]).pow(2).sum().item() for name in a) ** 0.5
