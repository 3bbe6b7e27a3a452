"""Two real Ray Train workers with DeepSpeed: equal to one process, through a kill, at any stage."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import torch
from preferences_data import conversation_rows
from safetensors.torch import load_file
from tiny import llama_like_tokenizer, tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import complete_checkpoints
from raywards.errors import CheckpointError, TrainingError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

ROWS = conversation_rows(45)
EPOCHS = 6
STEPS = 6 * EPOCHS  # 45 pairs in global batches of 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def trainer(model: Path, output: Path, **changes: Any) -> RewardTrainer:
    settings: dict[str, Any] = {
        "output_dir": str(output),
        "num_workers": 2,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 2,
        "learning_rate": 1e-3,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }
    return RewardTrainer(
        str(model), RewardConfig(**settings), train_dataset=datasets.Dataset.from_list(ROWS)
    )


@pytest.fixture(scope="module")
def reference(model: Path, tmp_path_factory: pytest.TempPathFactory) -> RewardTrainer:
    """The same pairs and global batches in one process without ZeRO, undisturbed."""
    one = trainer(
        model,
        tmp_path_factory.mktemp("reference") / "run",
        num_workers=0,
        deepspeed=0,
        per_device_train_batch_size=8,
    )
    one.train()
    assert losses(one)[0] - losses(one)[-1] > 0.1, "nothing was learned: comparisons prove nothing"
    return one


def records(run: RewardTrainer) -> list[dict[str, Any]]:
    """What was logged while it trained."""
    return [record for record in run.state.log_history if "loss" in record]


def losses(run: RewardTrainer) -> list[float]:
    return [record["loss"] for record in records(run)]


def difference(a: RewardTrainer, b: RewardTrainer) -> float:
    left, right = weights_of(a), weights_of(b)
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def weights_of(run: RewardTrainer) -> dict[str, torch.Tensor]:
    return load_file(run.paths.export / "model.safetensors")


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Euclidean distance between two sets of weights."""
    assert a.keys() == b.keys()
    return sum((a[name] - b[name]).pow(2).sum().item() for name in a) ** 0.5


def check_lineage(run: RewardTrainer, reference: RewardTrainer) -> None:
    """Every step stands in the log once, and every pair of every epoch was trained once."""
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    last = Scorer.from_pretrained(run.paths.export).info["training"]
    assert (last["step"], last["num_pairs"]) == (STEPS, len(ROWS) * EPOCHS)
    tokens = [records(each)[-1]["num_tokens"] for each in (run, reference)]
    assert tokens[0] == tokens[1]


def kill_one_worker(run: RewardTrainer) -> None:
    """SIGKILL a worker between its first checkpoint and the end."""
    while not complete_checkpoints(run.paths.run):
        time.sleep(0.05)
    time.sleep(0.3)  # past the checkpoint, into steps that will be lost
    workers = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]
    assert len(workers) == 2
    os.kill(workers[-1], signal.SIGKILL)


def test_the_reference_is_what_trl_trains(
    model: Path, tmp_path: Path, reference: RewardTrainer
) -> None:
    """So what equals the reference, at any number of workers and any ZeRO stage, equals TRL.

    TRL's own test of two processes (ddp, zero2, zero3) asks only that they end.
    """
    trl = pytest.importorskip("trl")
    theirs = trl.RewardTrainer(
        str(model),
        trl.RewardConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False,
            learning_rate=1e-3, num_train_epochs=EPOCHS, per_device_train_batch_size=8,
            logging_steps=1, save_strategy="no", disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
    )  # fmt: skip
    theirs.train()
    assert losses(reference) == pytest.approx(losses(theirs), abs=1e-5)
    trained, ours = theirs.model.state_dict(), weights_of(reference)
    assert ours.keys() == trained.keys()
    assert max((ours[name] - trained[name]).abs().max().item() for name in ours) < 1e-4


def test_a_killed_worker_costs_time_and_no_pair(
    model: Path, tmp_path: Path, reference: RewardTrainer
) -> None:
    run = trainer(model, tmp_path / "run", save_strategy="steps", save_steps=5)
    killer = threading.Thread(target=kill_one_worker, args=(run,))
    killer.start()
    result = run.train()
    killer.join()

    assert result.global_step == STEPS
    attempts = {folder.name.rsplit("-", 1)[1] for folder in complete_checkpoints(run.paths.run)}
    assert len(attempts) == 2, "the worker was killed too late: nothing was resumed"
    check_lineage(run, reference)
    assert losses(run) == pytest.approx(losses(reference), abs=1e-5)
    assert difference(run, reference) < 1e-5
    Scorer.from_pretrained(run.paths.export).verify()

    # Started again under the same name with another learning rate, it is refused at once.
    with pytest.raises(CheckpointError, match="learning_rate"):
        trainer(model, tmp_path / "run", learning_rate=2e-3).train()


@pytest.mark.slow
def test_a_run_that_failed_goes_on_under_its_name(
    model: Path, tmp_path: Path, reference: RewardTrainer
) -> None:
    """No restarts are allowed, a worker is killed, and the same script is started again."""
    changes = {"save_strategy": "steps", "save_steps": 5}
    failing = trainer(model, tmp_path / "run", max_failures=0, **changes)
    killer = threading.Thread(target=kill_one_worker, args=(failing,))
    killer.start()
    with pytest.raises(TrainingError, match="started again, it goes on there"):
        failing.train()
    killer.join()
    assert not failing.paths.export.exists()
    done = len(complete_checkpoints(failing.paths.run))

    again = trainer(model, tmp_path / "run", **changes)
    again.train()
    assert done >= 1
    check_lineage(again, reference)
    assert losses(again) == pytest.approx(losses(reference), abs=1e-5)
    assert difference(again, reference) < 1e-5


STAGES: list[Any] = [
    0,
    1,
    2,
    # Without the threshold every tensor of a tiny model stays whole, and nothing is partitioned.
    {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
]


# Every stage in both types, on two ranks without Ray, is tests/test_world_size.py's.
@pytest.mark.parametrize(("stage", "bf16"), [(0, True), (1, False), (2, True)])
@pytest.mark.slow
def test_every_stage_trains_the_same_model(
    model: Path, tmp_path: Path, reference: RewardTrainer, stage: Any, bf16: bool
) -> None:
    start = trainer(model, tmp_path / "start").model.state_dict()
    run = trainer(model, tmp_path / "run", deepspeed=stage, bf16=bf16)
    run.train()
    check_lineage(run, reference)
    assert losses(run) == pytest.approx(losses(reference), abs=3e-2 if bf16 else 1e-5)
    # bf16 rounds every step; what counts is that it went to the same place, not beside it.
    far = distance(weights_of(reference), start)
    assert far > 0.1
    assert distance(weights_of(run), weights_of(reference)) < (far / 4 if bf16 else 1e-4)
    stored = load_file(run.paths.export / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    Scorer.from_pretrained(run.paths.export).verify()


@pytest.mark.slow
def test_zero_3_partitions_trains_and_exports_the_same_model(
    model: Path, tmp_path: Path, reference: RewardTrainer
) -> None:
    run = trainer(model, tmp_path / "run", deepspeed=STAGES[3])
    run.train()
    check_lineage(run, reference)
    assert losses(run) == pytest.approx(losses(reference), abs=1e-5)
    assert difference(run, reference) < 1e-5
    [checkpoint] = complete_checkpoints(run.paths.run)
    shards = list((checkpoint / "engine").glob("zero_pp_rank_*_model_states.pt"))
    assert len(shards) == 2


@pytest.mark.slow
def test_the_newest_and_the_best_are_kept_through_a_kill(model: Path, tmp_path: Path) -> None:
    """Two workers, a kill, a limit of two checkpoints, an early best, and the run started again."""
    held_out = conversation_rows(12, seed=1)
    wrong = [{"chosen": r["rejected"], "rejected": r["chosen"]} for r in held_out]  # gets worse
    changes = {
        "save_strategy": "steps", "save_steps": 5, "save_total_limit": 2, "num_train_epochs": 3,
        "eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True,
    }  # fmt: skip

    def start(folder: str = "run", **more: Any) -> RewardTrainer:
        run = trainer(model, tmp_path / folder, **changes, **more)
        run.eval_dataset = datasets.Dataset.from_list(wrong)
        return run

    failing = start(max_failures=0)
    killer = threading.Thread(target=kill_one_worker, args=(failing,))
    killer.start()
    with pytest.raises(TrainingError, match="started again, it goes on there"):
        failing.train()
    killer.join()
    assert len(complete_checkpoints(failing.paths.run)) <= 2

    run = start()
    run.train()
    curve = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = min(curve, key=curve.__getitem__)
    assert list(curve) == [3, 6, 9, 12, 15, 18]
    assert best == 3, "the best is to be older than the newest two: proves nothing"
    kept = [int(folder.name.split("-")[1]) for folder in complete_checkpoints(run.paths.run)]
    assert kept == [best, 18]
    assert len(list(run.paths.run.glob("checkpoint-0*"))) == 2, "something was left half-written"
    assert Scorer.from_pretrained(run.paths.export).info["training"]["step"] == best
    one = start("one", num_workers=0, deepspeed=0, per_device_train_batch_size=8)
    one.train()
    assert losses(run) == pytest.approx(losses(one), abs=1e-5)
    assert difference(run, one) < 1e-5

    # Finished, and started again: nothing that Ray keeps of the run misses what was removed.
    again = start()
    before = weights_of(run)
    again.train()
    assert distance(weights_of(again), before) == 0.0
    assert again.state.log_history[:-1] == run.state.log_history[:-1]


@pytest.mark.slow
def test_a_vocabulary_grows_alike_on_every_rank(model: Path, tmp_path: Path) -> None:
    """The template of another tokenizer brings tokens; ZeRO-3 partitions what is drawn for them."""
    tokenizer = llama_like_tokenizer()
    tokenizer.chat_template = None
    other = tiny_qwen2(tmp_path / "other", num_labels=None, tokenizer=tokenizer)
    changes = {"chat_template_path": str(model), "num_train_epochs": 2}
    one = trainer(
        other, tmp_path / "one", num_workers=0, deepspeed=0, per_device_train_batch_size=8,
        **changes,
    )  # fmt: skip
    one.train()
    two = trainer(other, tmp_path / "two", deepspeed=STAGES[3], **changes)
    two.train()
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    assert difference(one, two) < 1e-5
    assert weights_of(two)["model.embed_tokens.weight"].shape[0] % 64 == 0


@pytest.mark.slow
def test_an_error_that_a_restart_cannot_mend_reaches_the_driver_as_itself(
    model: Path, tmp_path: Path
) -> None:
    run = trainer(model, tmp_path / "run", num_train_epochs=1, num_workers=0)
    run.train()
    [checkpoint] = complete_checkpoints(run.paths.run)
    other = trainer(model, tmp_path / "other", num_train_epochs=1, learning_rate=2e-3)
    started = time.monotonic()
    with pytest.raises(CheckpointError, match="of another run"):
        other.train(resume_from_checkpoint=str(checkpoint))
    assert time.monotonic() - started < 120
    assert not other.paths.export.exists()
