"""The command line: what it refuses in one screen, and what it says of itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from preferences_data import conversation_rows
from tiny import tiny_qwen2

from raywards.cli import main
from raywards.train import cluster

TRAIN = ["train", "--model_name_or_path", "M", "--dataset_name", "D"]

WRONG = [
    (["trian"], "Did you mean 'train'?"),
    ([*TRAIN, "--lerning_rate", "1"], "Did you mean 'learning_rate'?"),
    ([*TRAIN, "--learning_rate"], "learning_rate"),
    ([*TRAIN, "--learning_rate", "fast"], "learning_rate"),
    ([*TRAIN, "--fsdp", "full_shard"], "deepspeed"),
    ([*TRAIN, "--num_workers", "-1"], "num_workers"),
    ([*TRAIN, "loose"], "'loose'"),
    ([*TRAIN, "--config", "nowhere.yaml"], "nowhere.yaml"),
    (TRAIN[:3], "dataset_name"),
    (["serve"], "model"),
    (["serve", "--model", "M", "--max_replica", "2"], "Did you mean 'max_replicas'?"),
    (["score", "--model", "M", "--input", "I"], "output"),
    (["quickstart", "--fast"], "usage"),
]


@pytest.mark.parametrize(("argv", "expected"), WRONG, ids=[" ".join(w[0][-2:]) for w in WRONG])
def test_a_wrong_command_is_answered_in_one_screen(
    argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(argv)
    told = capsys.readouterr()
    assert code == 2
    assert expected in told.err
    assert len(told.err.splitlines()) <= 20
    assert "Traceback" not in told.err


def test_large_pages_are_asked_for_unless_somebody_said_no(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in ((None, "1"), ("0", "0")):
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", said or "0")  # so that it is put back
        if said is None:
            monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
        worker = cluster._environment(cpus=1, use_gpu=False)
        assert worker["THP_MEM_ALLOC_ENABLE"] == expected
        main(["score", "--help"])
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected


@pytest.mark.parametrize("command", ["train", "serve", "score"])
def test_help_lists_every_setting_with_its_default(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"raywards {command}" in text
    assert "--model" in text
    assert "default" in text


def test_held_out_rows_are_never_the_training_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A plain file has no `test` split: read for it, it would give the training rows."""
    model = tiny_qwen2(tmp_path / "model", num_labels=None)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in conversation_rows(8)))
    argv = ["train", "--model_name_or_path", str(model), "--dataset_name", str(file)]
    argv += ["--output_dir", str(tmp_path / "run"), "--num_workers", "0", "--use_cpu"]
    assert main([*argv, "--eval_strategy", "epoch"]) == 2
    told = capsys.readouterr().err
    assert "eval_dataset_name" in told
    assert "pairs.jsonl" in told
    assert not (tmp_path / "run").exists()
