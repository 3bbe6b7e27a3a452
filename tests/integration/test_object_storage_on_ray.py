"""Workers that share object storage alone: each node has its copy, and the run is the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import transformers
from preferences_data import conversation_rows
from s3_server import ObjectStore, object_store
from safetensors.torch import load_file
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.loader import create_model_from_path
from raywards.train import prepare
from raywards.train.storage import node_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROWS = conversation_rows(45)
STEPS = 32  # the driver's word to stop comes some steps late


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with pytest.MonkeyPatch.context() as patched, object_store(patched) as server:
        yield server


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


class Ends(transformers.TrainerCallback):
    """Ends a run with an error once it has a checkpoint."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise ZeroDivisionError


def trainer(model: Path, output: Path, *, ends: bool = False, **changes: Any) -> RewardTrainer:
    """Adapters in a model that is given as an object: workers have neither of the two."""
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "run_name": "rm",
        "num_workers": 2,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 2,
        "learning_rate": 5e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_steps": 4,
        "disable_tqdm": True,
        **changes,
    }
    transformers.set_seed(7)
    classifier = create_model_from_path(
        str(model), transformers.AutoModelForSequenceClassification, num_labels=1, device_map=None
    )
    return RewardTrainer(
        classifier,
        RewardConfig(**settings),
        train_dataset=datasets.Dataset.from_list(ROWS),
        peft_config=peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        callbacks=[Ends()] if ends else None,
    )


def losses(run: RewardTrainer) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def test_two_workers_then_one_on_another_machine_end_in_the_weights_of_a_disk(
    store: ObjectStore, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(
        model, tmp_path / "disk" / "rm", num_workers=0, deepspeed=0, per_device_train_batch_size=8
    )
    one.train()
    assert losses(one)[0] - losses(one)[-1] > 0.1, "nothing was learned: proves nothing"

    monkeypatch.setattr(prepare, "_ROWS_PER_SHARD", 10)
    first = trainer(
        model, tmp_path / "first" / "rm", storage_path=store.address, save_steps=1, ends=True
    )
    with pytest.raises(ZeroDivisionError):
        first.train()
    prepared = [name for name in store.files() if "/prepared/" in name and "pairs-" in name]
    assert len(prepared) == 5, "the pairs were not encoded as tasks"
    step, _ = first.storage.checkpoints()[-1]
    assert 0 < step < STEPS
    assert not list(first.paths.run.glob("checkpoint-*"))

    # Resharded from two workers to one; the global batch is that of the first start.
    again = trainer(model, tmp_path / "again" / "rm", storage_path=store.address, num_workers=1)
    again.train()
    assert losses(again) == pytest.approx(losses(one), abs=1e-5)
    left, right = (load_file(run.paths.export / "model.safetensors") for run in (again, one))
    assert left.keys() == right.keys()
    assert max((left[name] - right[name]).abs().max().item() for name in left) < 1e-5
    assert (again.paths.adapter / "adapter_model.safetensors").is_file()
    assert {"rm/adapter/adapter_model.safetensors", "rm/export/README.md"} <= {*store.files()}
    Scorer.from_pretrained(again.paths.export).verify()
    # Nothing is left on the node but what was there before.
    assert not list(node_folder(again.storage.where()).glob("run-*/*"))
