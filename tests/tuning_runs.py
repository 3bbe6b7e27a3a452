"""Short runs of `RewardTrainer` in this process, and what plain peft makes of their exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from preferences_data import conversation_rows
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import complete_checkpoints, read_manifest

ROWS = conversation_rows(45)

# ZeRO-3 keeps small weights whole: with these, not even a tiny model's.
ZERO_3: dict[str, Any] = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}


def zero(stage: int) -> Any:
    """The `deepspeed` setting of a stage that does what it does to a large model."""
    return ZERO_3 if stage == 3 else stage


def trainer(model: Any, output: Path, **changes: Any) -> RewardTrainer:
    """Eight steps of eight pairs; what is no setting goes to `RewardTrainer`."""
    given = {
        name: changes.pop(name)
        for name in ("peft_config", "quantization_config", "eval_dataset", "processing_class")
        if name in changes
    }
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_workers": 0,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 0,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "logging_steps": 1,
        "save_steps": 3,
        "disable_tqdm": True,
        **changes,
    }
    return RewardTrainer(
        str(model) if isinstance(model, Path) else model,
        RewardConfig(**settings),
        train_dataset=datasets.Dataset.from_list(ROWS),
        **given,
    )


def train(
    model: Any, output: Path, resume_from: Path | None = None, **changes: Any
) -> RewardTrainer:
    """A run of `trainer`, from the start or from a checkpoint."""
    made = trainer(model, output, **changes)
    made.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return made


def losses(run: RewardTrainer) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def goes_on_as(whole: Path, resumed: Path) -> bool:
    """Whether a run resumed at step 3 of `whole` did not begin anew, and ended as it did."""
    steps = [read_manifest(one, kind="checkpoint")["step"] for one in complete_checkpoints(resumed)]
    return steps == [6, 8] and same_export(whole, resumed)


def learned(run: RewardTrainer) -> bool:
    """Whether the loss fell so far that a comparison of results proves something."""
    return losses(run)[0] - losses(run)[-1] > 0.05


def notes(caplog: Any) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "export" / "model.safetensors")


def same_export(one: Path, other: Path) -> bool:
    """Bit for bit."""
    left, right = exported(one), exported(other)
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def off_by_plain_peft(base: Path, run: Path, **loading: Any) -> float:
    """How far the base with the adapter beside the export is from the export's stored rewards."""
    from peft import PeftModel

    loaded = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, **{"dtype": torch.float32, **loading}
    )
    model = PeftModel.from_pretrained(loaded, run / "adapter").eval()
    stored = read_manifest(run / "export", kind="export")["rewards"]
    return max(abs(plain_reward(model, one["input_ids"]) - one["reward"]) for one in stored)


@torch.no_grad()
def plain_reward(model: Any, ids: list[int]) -> float:
    return float(model(input_ids=torch.tensor([ids])).logits.item())


def bound(run: Path) -> float:
    """How far apart two fp32 computations of an export's reward may be."""
    return float(read_manifest(run / "export", kind="export")["bounds"]["float32"])
