"""Every ZeRO stage and precision through a change of the number of ranks, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
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
STEPS = 18  # three epochs of 45 pairs in global batches of 8
FIRST, SECOND = 5, 11  # steps after which the run is stopped

ZERO: dict[int, Any] = {
    0: 0,
    1: 1,
    2: 2,
    # Without the threshold every tensor of a tiny model stays whole, and nothing is partitioned.
    3: {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
}
FULL = [(stage, bf16) for stage in ZERO for bf16 in (False, True)]


def trainer(model: Path, output: Path, **changes: Any) -> RewardTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_workers": 2,
        "use_cpu": True,
        "bf16": False,
        "learning_rate": 1e-3,
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
        str(model), RewardConfig(**settings), train_dataset=datasets.Dataset.from_list(ROWS)
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of one process without ZeRO, undisturbed, in fp32."""
    run = trainer(
        model, tmp_path_factory.mktemp("reference") / "run", deepspeed=0, num_workers=0,
        per_device_train_batch_size=8, save_strategy="no",
    )  # fmt: skip
    run.train()
    records = [record["loss"] for record in run.state.log_history if "loss" in record]
    assert records[0] - records[-1] > 0.1, "nothing was learned: comparisons prove nothing"
    return load_file(run.paths.export / "model.safetensors")


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


@pytest.mark.slow
def test_every_stage_goes_through_two_ranks_one_and_two_again(
    model: Path, tmp_path: Path, reference: dict[str, torch.Tensor]
) -> None:
    def run(stage: int, bf16: bool, **changes: Any) -> RewardTrainer:
        output = tmp_path / f"zero{stage}-{'bf16' if bf16 else 'fp32'}"
        return trainer(model, output, deepspeed=ZERO[stage], bf16=bf16, **changes)

    run_on_two_ranks([task(run(*case), stop_after=FIRST) for case in FULL])
    for case in FULL:
        stop_here(run(*case, num_workers=0), SECOND)
    run_on_two_ranks([task(run(*case)) for case in FULL])

    start = trainer(model, tmp_path / "start").model.state_dict()
    far = distance(reference, start)
    for case in FULL:
        done = run(*case)
        ranks = {
            manifest["step"]: manifest["num_ranks"]
            for manifest in map(manifest_of, complete_checkpoints(done.paths.run))
        }
        assert ranks[FIRST] == ranks[STEPS] == 2
        assert ranks[SECOND] == 1
        weights = load_file(done.paths.export / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        off = distance(weights, reference)
        assert off < (far / 4 if case[1] else 1e-4), f"{case}: {off} of {far}"
        scorer = Scorer.from_pretrained(done.paths.export)
        scorer.verify()
        assert scorer.info["training"]["num_pairs"] == 3 * len(ROWS)


def manifest_of(checkpoint: Path) -> dict[str, Any]:
    return read_manifest(checkpoint, kind="checkpoint")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean distance between two sets of weights."""
    assert a.keys() == b.keys()
    return sum((a[name] - b[name]).pow(2).sum().item() for name in a) ** 0.5
