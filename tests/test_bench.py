"""The benchmarks run, on tiny models: their figures there mean nothing, that they finish does."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from preferences_data import conversation_rows
from tiny import tiny_qwen2

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


def run(script: str, *args: object, out: Path | None = None) -> dict[str, Any]:
    """Run a benchmark on one thread, and return its results."""
    written = ["--out", str(out)] if out else []
    command = [sys.executable, f"bench/{script}", *map(str, args), *written]
    # A test that trained in this process leaves these behind, and TRL would look for a peer.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text()) if out else {}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in conversation_rows(48)) + "\n")
    return file


def test_the_core_is_measured_without_data(tmp_path: Path) -> None:
    args = ["--geometry", "tiny", "--dtype", "float32", "--pairs", 16, "--batch", 4, "--repeat", 1]
    found = run("core.py", *args, "--threads", 1, out=tmp_path / "core.json")
    assert len(found["figures"]) == 6
    assert all(side["pairs_per_second"] > 0 for side in found["figures"].values())


def test_training_is_measured_beside_trl(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    model = tiny_qwen2(tmp_path / "model", num_labels=None)
    args = ["--model", model, "--data", data, "--dtype", "float32", "--batch", 4, "--steps", 3]
    args += ["--warmup-steps", 1, "--rounds", 1, "--losses", 3, "--threads", 1]
    found = run("train_vs_trl.py", *args, out=tmp_path / "train.json")
    assert found["speed"].keys() == {"default", "tuned"}
    assert found["losses"]["largest_difference"] < 1e-5
    assert str(tmp_path) not in json.dumps(found)


def test_scoring_is_measured_beside_transformers(data: Path, tmp_path: Path) -> None:
    base, model = tiny_qwen2(tmp_path / "base", num_labels=None), tmp_path / "rm"
    run("score.py", "--make-model", base, model)
    sides = "scorer,scorer_deterministic,plain_random,plain_sorted"
    args = ["--model", model, "--data", data, "--dtype", "float32", "--sides", sides]
    args += ["--workload", "conversations,pairs", "--count", 16, "--rounds", 1, "--threads", 1]
    found = run("score.py", *args, out=tmp_path / "score.json")
    assert found["workloads"].keys() == {"conversations", "pairs"}
    for work in found["workloads"].values():
        assert all(side["agrees"] for side in work["sides"].values())
    assert str(tmp_path) not in json.dumps(found)


def test_preparation_is_measured_and_its_table_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_qwen2(tmp_path / "model", num_labels=None)
    args = ["--tokenizer", tokenizer, "--pairs", "21000,22000"]
    found = run("prepare.py", *args, out=tmp_path / "prepare_million.json")
    few, many = found["by_pairs"].values()
    assert few["prepare_1"]["pairs"] == few["prepare_2"]["pairs"] == 21_000
    assert few["prepare_2"]["peak_mib"].keys() == {"driver", "task"}
    assert many["forty"]["pairs"] == 40 * 22_000
    assert str(tmp_path) not in json.dumps(found)
    assert not list(tmp_path.glob("tmp*")), "the rows were left"
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    report = importlib.import_module("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "| 21,000 | 22,000 | 880,000 |" in report.preparation()
