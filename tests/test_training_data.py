"""Training on prepared data: mixtures, streams, and data that changes or is damaged meanwhile."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from preferences_data import conversation_rows
from test_train_here import losses, same_weights, settings
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import complete_checkpoints
from raywards.errors import CheckpointError, ConfigError, TrainingError
from raywards.train import loop

pytestmark = pytest.mark.trains

ROWS = conversation_rows(45)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def run(model: Path, output: Path, source: Any, **changes: Any) -> RewardTrainer:
    trainer = RewardTrainer(
        model=str(model), args=RewardConfig(**settings(output, **changes)), train_dataset=source
    )
    trainer.train()
    return trainer


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The global batches that are trained."""
    seen: list[list[int]] = []
    accumulate = loop.accumulate_gradients

    def watched(worker: Any, indices: list[int]) -> None:
        seen.append(list(indices))
        accumulate(worker, indices)

    monkeypatch.setattr(loop, "accumulate_gradients", watched)
    return seen


def table(rows: list[dict[str, Any]]) -> datasets.Dataset:
    return datasets.Dataset.from_list(rows)


def test_a_mixture_is_trained_by_its_weights(
    model: Path, tmp_path: Path, batches: list[list[int]]
) -> None:
    sources = {"much": table(ROWS[:10]), "little": table(ROWS[10:40])}
    changes: dict[str, Any] = {"num_train_epochs": 2, "save_strategy": "epoch"}
    weights = {"much": 2, "little": 0.5}
    found = run(model, tmp_path / "run", sources, dataset_weights=weights, **changes)
    assert found.state.global_step == 2 * 5  # 35 pairs an epoch, 8 a step
    trained = [i for batch in batches for i in batch]
    assert sorted(trained) == sorted([*range(10)] * 4 + [*range(10, 40)])
    with pytest.raises(CheckpointError, match="dataset_weights: was"):
        run(model, tmp_path / "run", sources, dataset_weights={"much": 2}, **changes)
    with pytest.raises(ConfigError, match=r"dataset_weights\.lots: there is no such source"):
        run(model, tmp_path / "other", sources, dataset_weights={"lots": 2}, **changes)


def test_an_endless_stream_is_trained_for_max_steps(
    model: Path, tmp_path: Path, batches: list[list[int]]
) -> None:
    def generate() -> Any:
        while True:
            yield from ROWS

    stream = datasets.IterableDataset.from_generator(generate)
    run(model, tmp_path / "run", stream, max_steps=4)
    assert sorted(i for batch in batches for i in batch) == list(range(4 * 8))


def test_a_cut_off_shard_is_made_anew_and_the_run_goes_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4}
    undisturbed = run(model, tmp_path / "undisturbed", table(ROWS), **changes)
    output = tmp_path / "run"
    accumulate = loop.accumulate_gradients

    def stopping(worker: Any, indices: list[int]) -> None:
        if worker.state.step == 6:
            raise TrainingError("stopped")
        accumulate(worker, indices)

    monkeypatch.setattr(loop, "accumulate_gradients", stopping)
    with pytest.raises(TrainingError, match="stopped"):
        run(model, output, table(ROWS), **changes)
    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    [before] = complete_checkpoints(output)
    [shard] = (output / "prepared").glob("train-*/pairs-*")
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])

    # With other rows the run is refused, and neither pairs nor checkpoint are touched.
    with pytest.raises(CheckpointError, match="pairs: was"):
        run(model, output, table(ROWS[1:]), **changes)
    assert complete_checkpoints(output) == [before]
    assert not list(output.rglob("*.partial"))

    resumed = run(model, output, table(ROWS), **changes)
    assert shard.read_bytes() == whole
    assert losses(resumed) == losses(undisturbed)
    assert losses(resumed)[0] - losses(resumed)[-1] > 0.01, "nothing was learned"
    assert same_weights(tmp_path / "undisturbed", output) == 0.0


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_training_data import ROWS, run, table
from raywards.train import prepare
prepare._ROWS_PER_SHARD = 10
found = run(Path({model!r}), Path({output!r}), table(ROWS), dataset_num_proc=2, max_steps=2)
import ray
print("steps", found.state.global_step, "ray is up:", ray.is_initialized())
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_script_without_a_main_guard_may_encode_with_several_tasks(
    model: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        SCRIPT.format(
            tests=str(Path(__file__).parent), model=str(model), output=str(tmp_path / "run")
        )
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=200)
    assert "steps 2 ray is up: False" in done.stdout, done.stderr[-3000:]
    assert len(list((tmp_path / "run" / "prepared").glob("train-*/pairs-*"))) == 5
