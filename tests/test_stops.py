"""Runs that have to stop: a loss or gradient that is not finite, a full disk, a folder in use."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from preferences_data import conversation_rows
from safetensors.torch import load_file, save_file
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer
from raywards.checkpoint import complete_checkpoints, list_files, read_manifest, write_manifest
from raywards.errors import ConfigError, NonFiniteError, TrainingError
from raywards.train.storage import Background, SharedFolder, hold_folder

ROWS = conversation_rows(40)
trains = pytest.mark.trains


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=1)


@pytest.fixture(scope="module")
def zero_head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rewards are 0 until the first update."""
    folder = tiny_qwen2(tmp_path_factory.mktemp("zero"), num_labels=1)
    weights = load_file(folder / "model.safetensors")
    weights["score.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def trainer(model: Path, output: Path, rows: Any = ROWS, **changes: Any) -> RewardTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_workers": 0,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 0,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "train_sampling_strategy": "sequential",
        "max_steps": 4,
        "logging_steps": 3,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return RewardTrainer(
        str(model), RewardConfig(**settings), train_dataset=datasets.Dataset.from_list(rows)
    )


def run(model: Path, output: Path, rows: Any = ROWS, **changes: Any) -> RewardTrainer:
    one = trainer(model, output, rows, **changes)
    one.train()
    return one


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the files of a checkpoint, random state included."""
    found: dict[str, torch.Tensor] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{name}.{key}", inner)
        elif isinstance(value, list | tuple):
            for place, inner in enumerate(value):
                walk(f"{name}.{place}", inner)

    for file in sorted(checkpoint.rglob("*.pt")):
        walk(file.name, torch.load(file, weights_only=False))
    return found


def check_left(left: Path, expected: Path) -> None:
    """The checkpoint that a stop left is the one that a run writes at that step: bit for bit."""
    one, other = tensors(left), tensors(expected)
    assert one.keys() == other.keys()
    assert len(one) > 20
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
        assert tensor.isfinite().all(), name
    told = [read_manifest(folder, kind="checkpoint") for folder in (left, expected)]
    for manifest in told:
        del manifest["files"]
    assert told[0] == told[1]


USUAL = [(0, False), (3, True)]
STAGES = [
    (stage, bf16) if (stage, bf16) in USUAL else pytest.param(stage, bf16, marks=pytest.mark.slow)
    for stage in range(4)
    for bf16 in (False, True)
]


# A term that is 0 while all rewards are. From the second step on its sum with a margin that nearly
# fills fp32 overflows; without one, its gradient does.
OVERFLOWS = {"center_rewards_coefficient": 3e38, "max_grad_norm": 1.0}


@trains
@pytest.mark.parametrize(("stage", "bf16"), STAGES)
def test_a_loss_that_is_not_finite_names_its_rows_and_leaves_a_checkpoint(
    stage: int, bf16: bool, zero_head: Path, tmp_path: Path
) -> None:
    rows = [{**row, "margin": 3.4028e38 if i in (11, 14) else 0.0} for i, row in enumerate(ROWS)]
    changes = {**OVERFLOWS, "deepspeed": stage, "bf16": bf16, "learning_rate": 1e-2}
    stopped = trainer(zero_head, tmp_path / "run", rows, **changes)
    with pytest.raises(NonFiniteError, match=r"step 2: the loss of 2 pairs is NaN") as caught:
        stopped.train()
    assert [row for _, row in caught.value.rows] == [11, 14]
    assert "infinite: dataset row 11, 14. The update was not applied" in str(caught.value)
    assert "checkpoint of step 1" in str(caught.value)
    assert not stopped.paths.export.exists()
    [left] = complete_checkpoints(tmp_path / "run")

    saving = trainer(
        zero_head, tmp_path / "saving", rows, save_strategy="steps", save_steps=1, **changes
    )
    with pytest.raises(NonFiniteError):
        saving.train()
    [expected] = complete_checkpoints(tmp_path / "saving")  # that of step 1 is not written twice
    check_left(left, expected)

    with pytest.raises(NonFiniteError) as again:
        trainer(zero_head, tmp_path / "run", rows, **changes).train()
    assert str(again.value) == str(caught.value)
    assert complete_checkpoints(tmp_path / "run") == [left]


@trains
@pytest.mark.parametrize(("stage", "bf16"), STAGES)
def test_a_gradient_that_is_not_finite_stops_before_the_update_at_any_stage(
    stage: int, bf16: bool, zero_head: Path, tmp_path: Path
) -> None:
    changes = {**OVERFLOWS, "deepspeed": stage, "bf16": bf16, "learning_rate": 1e-2}
    stopped = trainer(zero_head, tmp_path / "run", **changes)
    with pytest.raises(NonFiniteError, match="step 2: the norm of the gradient is") as caught:
        stopped.train()
    assert "global batch of dataset row 8, 9, 10, 11, 12 and 3 more. The update" in str(
        caught.value
    )
    assert [row for _, row in caught.value.rows] == [8, 9, 10, 11, 12]
    [left] = complete_checkpoints(tmp_path / "run")
    saving = trainer(zero_head, tmp_path / "saving", save_strategy="steps", save_steps=1, **changes)
    with pytest.raises(NonFiniteError):
        saving.train()
    [expected_checkpoint] = complete_checkpoints(tmp_path / "saving")
    check_left(left, expected_checkpoint)
    with pytest.raises(NonFiniteError) as again:
        trainer(zero_head, tmp_path / "run", **changes).train()
    assert str(again.value) == str(caught.value)


@trains
def test_a_stop_at_the_first_step_leaves_no_checkpoint(model: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="Nothing was trained before it") as caught:
        run(model, tmp_path / "run", **OVERFLOWS)
    assert caught.value.step == 1
    assert complete_checkpoints(tmp_path / "run") == []
    # So the run can be mended under its name.
    run(model, tmp_path / "run", max_steps=1)


@pytest.mark.parametrize(
    "given",
    [{"bf16": {"check_grad_overflow": False}}, {"zero_optimization": {"compute_grad_norm": False}}],
)
def test_a_gradient_must_not_go_unchecked(
    given: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="a gradient that is not finite would be applied"):
        trainer(model, tmp_path / "run", deepspeed=given).train()


# ---------------------------------------------------------------- a full disk

CHANGES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}

# What a disk that fills up while a run goes on looks like, in a process of its own: the system says
# so there and nowhere else.
FILLS_UP = """
    import resource, shutil, subprocess, sys
    from pathlib import Path
    import raywards.train.loop as loop
    from raywards.errors import TrainingError
    from test_stops import CHANGES, run

    model, disk, kept, how = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    ballast = disk / "ballast"
    if how == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)

    def fill():
        if how == "limit":  # no file may grow beyond this
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
            return
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                pass

    def empty():
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        ballast.unlink(missing_ok=True)

    step = loop.accumulate_gradients

    def stepping(worker, indices):
        if worker.state.step == 2:  # its checkpoint is there
            fill()
        step(worker, indices)

    loop.accumulate_gradients = stepping
    try:
        run(model, disk / "run", **CHANGES)
    except TrainingError as error:
        (kept / "error.txt").write_text(f"{type(error).__name__}: {error}")
    loop.accumulate_gradients = step
    listed = sorted(path.name for path in (disk / "run").iterdir())
    (kept / "listed.txt").write_text("\\n".join(listed))
    empty()
    run(model, disk / "run", **CHANGES)
    shutil.copytree(disk / "run", kept / "run")
"""


def ways_to_fill() -> list[Any]:
    """A small tmpfs, where this user may mount one for a process; else a limit on files' sizes."""
    mount = ["unshare", "-rm", "mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", "/tmp"]
    allowed = subprocess.run(mount, capture_output=True).returncode == 0
    return ["tmpfs", pytest.param("limit", marks=pytest.mark.slow)] if allowed else ["limit"]


@trains
@pytest.mark.parametrize("how", ways_to_fill())
def test_a_full_disk_is_told_of_and_costs_no_checkpoint(
    how: str, model: Path, tmp_path: Path
) -> None:
    for name in ("disk", "kept"):
        (tmp_path / name).mkdir()
    script = tmp_path / "fills_up.py"
    script.write_text(textwrap.dedent(FILLS_UP))
    command = [sys.executable, script, model, tmp_path / "disk", tmp_path / "kept", how]
    done = subprocess.run(
        ["unshare", "-rm", *command] if how == "tmpfs" else command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    kept = tmp_path / "kept"
    told = (kept / "error.txt").read_text()
    assert told.startswith("TrainingError: ")
    assert "/run/checkpoint-000004-" in told
    assert "the disk is full" in told
    left = (kept / "listed.txt").read_text().split()
    assert [name[:17] for name in left if "checkpoint" in name] == ["checkpoint-000002"]

    undisturbed = run(model, tmp_path / "undisturbed", **CHANGES)
    steps = [
        read_manifest(f, kind="checkpoint")["step"] for f in complete_checkpoints(kept / "run")
    ]
    assert steps == [2, 4, 6]
    one, other = (
        load_file(folder / "export" / "model.safetensors")
        for folder in (kept / "run", undisturbed.paths.run)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    logged = [json.loads(line) for line in (kept / "run" / "metrics.jsonl").open()]
    losses = [
        [record["loss"] for record in records if "loss" in record]
        for records in (logged, undisturbed.state.log_history)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


# ---------------------------------------------------------------- the way into the run folder


def part(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / "engine").mkdir(exist_ok=True)
        (folder / "engine" / name).write_text(text)
    return folder


def test_a_checkpoint_is_complete_only_with_the_parts_of_all_ranks(tmp_path: Path) -> None:
    first, second = part(tmp_path / "0", a="aa", b="b"), part(tmp_path / "1", c="ccc")
    files = {**list_files(first), **list_files(second)}
    write_manifest(first, {"kind": "checkpoint", "step": 3}, files)
    storage, name = SharedFolder(tmp_path / "run"), "checkpoint-000003-0000abcd"
    target = tmp_path / "run" / name
    background = Background()

    def upload() -> None:
        storage.put_part(first, name)
        storage.complete(first, name)

    background.start(upload)
    time.sleep(0.3)
    background.check()  # not done, and nothing wrong
    assert (target / "engine" / "b").is_file()
    assert complete_checkpoints(tmp_path / "run") == []
    (target / "engine" / "c").write_text("c")  # cut off
    time.sleep(0.3)
    assert complete_checkpoints(tmp_path / "run") == []
    storage.put_part(second, name)
    background.wait()
    assert complete_checkpoints(tmp_path / "run") == [target]


def test_uploads_go_one_by_one_and_their_errors_reach_the_caller() -> None:
    background, order, gate = Background(), [], threading.Event()
    background.start(lambda: (gate.wait(), order.append("first"))[0] and None)
    background.check()
    threading.Timer(0.2, gate.set).start()
    background.start(lambda: order.append("second"))
    assert order[0] == "first"
    background.wait()
    assert order == ["first", "second"]

    def fail() -> None:
        raise TrainingError("the disk is full")

    background.start(fail)
    time.sleep(0.1)
    with pytest.raises(TrainingError):
        background.check()
    background.wait()  # told once


# ---------------------------------------------------------------- one folder, two runs

HOLDS = """
    import sys, time
    from pathlib import Path
    from raywards.train.storage import hold_folder

    with hold_folder(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(600)
"""


def test_a_folder_in_use_is_refused_until_its_holder_is_dead(model: Path, tmp_path: Path) -> None:
    script = tmp_path / "holds.py"
    script.write_text(textwrap.dedent(HOLDS))
    folder = tmp_path / "run"
    child = subprocess.Popen(
        [sys.executable, script, folder],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == b"held\n"
        second = trainer(model, folder)
        with pytest.raises(ConfigError, match="another run trains into this folder") as caught:
            second.train()
        assert f"process {child.pid} on " in str(caught.value)
        assert [path.name for path in folder.iterdir()] == ["run.lock"]
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    with hold_folder(folder):
        pass
    assert second.train().global_step == 4


def test_a_folder_is_free_again_after_an_error_and_swept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = trainer(model, tmp_path / "run")
    half = [".adapter.0123abcd.partial", ".resharded-0123abcd", "prepared/.train.0123abcd.partial"]
    whole = ["prepared/train-0123abcd", "checkpoint-best"]
    for name in (*half, *whole):
        (one.paths.run / name).mkdir(parents=True)
    cut_off = one.paths.run / "checkpoint-000004-0123abcd"
    cut_off.mkdir(parents=True)

    def train_into_it(*_: Any) -> None:
        assert not cut_off.exists()
        assert not any((one.paths.run / name).exists() for name in half)
        assert all((one.paths.run / name).exists() for name in whole)
        with pytest.raises(ConfigError, match=str(os.getpid())), one.storage.hold():
            pass
        cut_off.mkdir()
        raise ZeroDivisionError

    monkeypatch.setattr(one, "_train", train_into_it)
    with pytest.raises(ZeroDivisionError):
        one.train()
    assert not cut_off.exists()
    with one.storage.hold():
        pass


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with hold_folder(tmp_path / "run"):
        assert "has no locks (No locks available)" in caplog.text
