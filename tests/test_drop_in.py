"""TRL's own reward script with its imports changed, and the parts of the trainer it touches."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from preferences_data import conversation_rows
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import read_manifest

pytestmark = pytest.mark.trains


def test_the_reward_script_of_trl_runs_with_its_imports_changed(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("TRL is not installed")
    source = (Path(spec.origin).parent / "scripts" / "reward.py").read_text()
    script = tmp_path / "reward.py"
    changed = source.replace(
        "from trl import RewardTrainer, get_dataset",
        "from raywards import RewardTrainer\n    from trl import get_dataset",
    ).replace(
        "from trl import DatasetMixtureConfig, ModelConfig, RewardConfig, ",
        "from raywards import RewardConfig\n"
        "    from trl import DatasetMixtureConfig, ModelConfig, ",
    )
    assert changed.count("from raywards import") == 2, "TRL's script has changed: look at it again"
    script.write_text(changed)
    tiny_qwen2(tmp_path / "model", num_labels=None)
    for split, rows in (("train", conversation_rows(24)), ("test", conversation_rows(6, seed=1))):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text(lines)
    done = subprocess.run(
        [
            sys.executable, str(script),
            "--model_name_or_path", str(tmp_path / "model"),
            "--dataset_name", str(tmp_path / "data"),
            "--output_dir", str(tmp_path / "out"),
            "--num_train_epochs", "1",
            "--per_device_train_batch_size", "8",
            "--learning_rate", "1e-3",
            "--eval_strategy", "epoch",
            "--num_workers", "0",
            "--bf16", "False",
            "--use_cpu",
        ],
        env=os.environ, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Training completed" in done.stderr
    assert "eval_accuracy" in (tmp_path / "out" / "metrics.jsonl").read_text()
    manifest = read_manifest(tmp_path / "out", kind="export")  # the script's save_model(output_dir)
    assert "README.md" in manifest["files"]
    Scorer.from_pretrained(tmp_path / "out").verify()


def test_metrics_and_state_are_logged_and_saved_as_scripts_of_transformers_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_qwen2(tmp_path / "model", num_labels=None)
    trainer = RewardTrainer(
        str(model),
        RewardConfig(
            output_dir=str(tmp_path / "out"), num_workers=0, use_cpu=True, bf16=False, max_steps=2,
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(conversation_rows(8)),
        eval_dataset=datasets.Dataset.from_list(conversation_rows(4, seed=1)),
    )  # fmt: skip
    result = trainer.train()
    assert trainer.is_world_process_zero()
    for split, metrics in (("train", result.metrics), ("eval", trainer.evaluate())):
        trainer.log_metrics(split, metrics)
        trainer.save_metrics(split, metrics)
    trainer.save_state()
    assert "eval_accuracy" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "all_results.json").read_text())
    assert saved["train_loss"] == result.training_loss
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert state["log_history"] == trainer.state.log_history
    with pytest.raises(AttributeError, match="Use `Scorer` on the export"):
        trainer.predict(None)
    with pytest.raises(AttributeError, match="no such name"):
        _ = trainer.perdict
