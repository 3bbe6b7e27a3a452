"""Training in this process, without Ray: equality with TRL, resume, refusals before any work."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from preferences_data import conversation_rows
from safetensors.torch import load_file
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import complete_checkpoints
from raywards.errors import CheckpointError, ConfigError, NonFiniteError, RowError
from raywards.train.rows import Rows

pytestmark = pytest.mark.trains

ROWS = conversation_rows(45)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "num_workers": 0,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 0,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **changes,
    }


def run(
    model: Path, output: Path, rows: list[dict[str, Any]] = ROWS, **changes: Any
) -> RewardTrainer:
    trainer = RewardTrainer(
        model=str(model),
        args=RewardConfig(**settings(output, **changes)),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    trainer.train()
    return trainer


def records(trainer: Any) -> list[dict[str, Any]]:
    """What was logged while it trained."""
    return [record for record in trainer.state.log_history if "loss" in record]


def losses(trainer: Any, name: str = "loss") -> list[float]:
    return [record[name] for record in records(trainer)]


def weights(run_folder: Path) -> dict[str, torch.Tensor]:
    return load_file(run_folder / "export" / "model.safetensors")


def same_weights(a: Path, b: Path) -> float:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_losses_and_metrics_are_those_of_trl(model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    shared = {
        name: value
        for name, value in settings(tmp_path).items()
        if name not in ("num_workers", "deepspeed", "output_dir")
    }
    shared |= {"warmup_steps": 3, "weight_decay": 0.01, "center_rewards_coefficient": 0.01}
    rows = [{**row, "margin": 0.1 * (i % 3)} for i, row in enumerate(ROWS)]
    theirs = trl.RewardTrainer(
        str(model),
        trl.RewardConfig(output_dir=str(tmp_path / "trl"), report_to="none", **shared),
        train_dataset=datasets.Dataset.from_list(rows),
    )
    theirs.train()
    ours = run(model, tmp_path / "ours", rows, **shared)

    pairs = list(
        zip(
            records(theirs),
            records(ours),
            strict=True,
        )
    )
    assert len(pairs) == 12
    assert pairs[0][0]["loss"] - pairs[-1][0]["loss"] > 0.05, "nothing was learned: proves nothing"
    for their, our in pairs:
        for name in ("loss", "grad_norm", "margin", "mean_reward", "learning_rate", "epoch"):
            assert our[name] == pytest.approx(their[name], abs=1e-5, rel=1e-5), name
        assert our["accuracy"] == their["accuracy"]
        assert our["num_tokens"] == their["num_tokens"]


def test_a_swapped_pair_of_the_other_probability_trains_the_same(
    model: Path, tmp_path: Path
) -> None:
    there = [{**row, "probability": (1.0, 0.75, 0.5, 0.125)[i % 4]} for i, row in enumerate(ROWS)]
    back = [
        {"chosen": r["rejected"], "rejected": r["chosen"], "probability": 1 - r["probability"]}
        for r in there
    ]
    one, other = run(model, tmp_path / "there", there), run(model, tmp_path / "back", back)
    assert losses(one) == pytest.approx(losses(other), rel=1e-5)
    assert losses(one, "accuracy") == losses(other, "accuracy")
    sure = run(model, tmp_path / "sure", ROWS)
    assert losses(one) != pytest.approx(losses(sure), rel=1e-2), "it was not used"


def test_smoothed_labels_are_pairs_of_a_probability(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "probability": 0.875} for row in ROWS]
    one = run(model, tmp_path / "column", rows)
    other = run(model, tmp_path / "setting", ROWS, label_smoothing=0.125)
    assert losses(one) == pytest.approx(losses(other), rel=1e-6)
    # Whether the model is right is another matter: there the labels are sure, and stay so.
    assert losses(one, "accuracy") == pytest.approx(
        [0.125 + 0.75 * sure for sure in losses(other, "accuracy")]
    )


@pytest.fixture
def rows_a_step(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each step of the run was dealt; evaluations, too."""
    counts: list[int] = []
    plan = Rows.plan

    def counting(rows: Rows, *args: Any) -> list[list[list[int]]]:
        dealt = plan(rows, *args)
        counts.append(len(dealt[0]))
        return dealt

    monkeypatch.setattr(Rows, "plan", counting)
    return counts


EQUIVALENT: dict[str, tuple[dict[str, Any], set[int]]] = {
    # settings, and rows of a step: 8 pairs of some 60 tokens, and 5 in the last step of an epoch
    "accumulation": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, {1}),
    "short rows": ({"max_tokens_per_row": 150}, {2, 3, 4, 5}),
    "pairs alone": ({"max_tokens_per_row": 1}, {5, 8}),
    "recomputed activations": ({"gradient_checkpointing": True}, {1}),
    "both": ({"max_tokens_per_row": 150, "gradient_checkpointing": True}, {2, 3, 4, 5}),
}


@pytest.mark.parametrize("case", EQUIVALENT)
def test_how_a_batch_is_computed_does_not_change_its_losses(
    case: str, model: Path, tmp_path: Path, rows_a_step: list[int]
) -> None:
    changes, expected_rows = EQUIVALENT[case]
    whole = run(model, tmp_path / "whole", gradient_checkpointing=False)
    assert set(rows_a_step) == {1}
    rows_a_step.clear()
    parts = run(model, tmp_path / "parts", **changes)
    assert len(rows_a_step) == 12
    assert set(rows_a_step) <= expected_rows
    assert losses(parts) == pytest.approx(losses(whole), abs=1e-6)
    assert same_weights(tmp_path / "whole", tmp_path / "parts") < 1e-5


@pytest.mark.parametrize("path", ["masked", "padded"])
def test_every_path_gives_the_same_losses(
    path: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = run(model, tmp_path / "packed")
    settled: list[str] = []

    def settle(model: Any, **_: Any) -> None:
        settled.append(model.path)
        model.use(path)

    monkeypatch.setattr("raywards.train.worker.settle_path", settle)
    other = run(model, tmp_path / path)
    assert settled == ["packed"]  # what it would have been
    assert losses(other) == pytest.approx(losses(packed), abs=1e-6)
    assert same_weights(tmp_path / "packed", tmp_path / path) < 1e-5


def test_a_trainer_without_settings_names_its_folder_after_the_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = RewardTrainer(str(model), train_dataset=datasets.Dataset.from_list(ROWS))
    assert trainer.paths.run == tmp_path / f"{model.name}-Reward"
    assert not trainer.paths.run.exists()


def test_a_model_object_is_trained_in_place(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(42)
    loaded = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    before = loaded.score.weight.detach().clone()
    trainer = RewardTrainer(
        loaded,
        RewardConfig(**settings(tmp_path / "object")),
        train_dataset=datasets.Dataset.from_list(ROWS),
    )
    trainer.train()
    assert not torch.equal(before, loaded.score.weight)
    by_path = run(model, tmp_path / "path")
    assert losses(trainer) == pytest.approx(losses(by_path), abs=1e-7)


def test_evaluation_weighs_pairs_and_the_export_agrees(model: Path, tmp_path: Path) -> None:
    held_out = conversation_rows(13, seed=1)
    trainer = RewardTrainer(
        str(model),
        RewardConfig(
            **settings(tmp_path / "run", eval_strategy="epoch", per_device_eval_batch_size=4)
        ),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset={
            "kind": [datasets.Dataset.from_list(rows) for rows in (held_out[:9], held_out[9:])]
        },
    )
    result = trainer.train()
    evals = [r for r in trainer.state.log_history if "eval_kind_accuracy" in r]
    assert [r["epoch"] for r in evals] == [1.0, 2.0]
    scorer = Scorer.from_pretrained(tmp_path / "run" / "export")
    chosen = scorer.score([row["chosen"] for row in held_out])
    rejected = scorer.score([row["rejected"] for row in held_out])
    right = [c > r for c, r in zip(chosen, rejected, strict=True)]
    accuracy = sum(right) / 13
    assert evals[-1]["eval_kind_accuracy"] == pytest.approx(accuracy)
    by_source = {name: v for name, v in evals[-1].items() if "accuracy/" in name}
    assert list(by_source.values()) == pytest.approx([sum(right[:9]) / 9, sum(right[9:]) / 4])
    surprises = [math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True)]
    assert evals[-1]["eval_kind_log_loss"] == pytest.approx(sum(surprises) / 13, abs=1e-5)
    assert evals[-1]["eval_kind_num_pairs"] == 13
    assert result.metrics["eval_kind_accuracy"] == pytest.approx(accuracy)
    again = trainer.evaluate()
    assert again["eval_kind_loss"] == pytest.approx(evals[-1]["eval_kind_loss"], abs=1e-6)

    trainer.save_model(str(tmp_path / "copy"))
    copied = Scorer.from_pretrained(tmp_path / "copy").score([held_out[0]["chosen"]])
    assert copied == pytest.approx(chosen[:1], abs=1e-5)


def test_a_killed_run_goes_on_where_its_checkpoint_stood(model: Path, tmp_path: Path) -> None:
    """SIGKILL a process after a checkpoint, start it again, compare with an undisturbed run."""
    undisturbed = run(model, tmp_path / "undisturbed", num_train_epochs=8)
    script = tmp_path / "train.py"
    changes = {"num_train_epochs": 8, "save_strategy": "steps", "save_steps": 4}
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\nimport raywards.train.loop as loop\n"
        "from test_train_here import run\n"
        "step = loop.accumulate_gradients\n"
        # Slow enough to be killed in the middle.
        "loop.accumulate_gradients = lambda *a: (time.sleep(0.1), step(*a))\n"
        f"run(Path({str(model)!r}), Path({str(tmp_path / 'killed')!r}), **{changes!r})\n"
    )
    child = subprocess.Popen([sys.executable, script], env=os.environ, start_new_session=True)
    deadline = time.monotonic() + 120
    while len(complete_checkpoints(tmp_path / "killed")) < 2:
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "killed" / "export").exists()
    orphan = tmp_path / "killed" / "checkpoint-000099-cut0ff00"
    orphan.mkdir()

    resumed = run(model, tmp_path / "killed", **changes)
    assert [r["step"] for r in records(resumed)] == list(range(1, 49))
    # Bit for bit: one process, the same kernels, the same order of pairs.
    assert losses(resumed) == losses(undisturbed)
    assert records(resumed)[-1]["num_tokens"] == records(undisturbed)[-1]["num_tokens"]
    assert same_weights(tmp_path / "undisturbed", tmp_path / "killed") == 0.0


def test_a_run_with_other_settings_or_pairs_is_refused(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "run", num_train_epochs=1)
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(CheckpointError, match=r"learning_rate: was 0.001, is 0.002") as caught:
        run(model, tmp_path / "run", num_train_epochs=1, learning_rate=2e-3)
    assert str(tmp_path / "run") in str(caught.value)
    with pytest.raises(CheckpointError, match="pairs: was"):
        run(model, tmp_path / "run", ROWS[1:], num_train_epochs=1)
    assert (tmp_path / "run" / "run.json").read_text() == before


def test_a_finished_run_started_again_trains_nothing_more(model: Path, tmp_path: Path) -> None:
    first = run(model, tmp_path / "run", num_train_epochs=1)
    log = tmp_path / "run" / "metrics.jsonl"
    # A driver that is killed has not fetched the last records: they are in the checkpoint.
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-2]))
    again = run(model, tmp_path / "run", num_train_epochs=1)
    assert records(again) == records(first)
    assert [json.loads(line) for line in log.read_text().splitlines()] == records(first)
    assert len(records(again)) == 6


def test_a_damaged_checkpoint_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "run", num_train_epochs=1)
    [checkpoint] = complete_checkpoints(tmp_path / "run")
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    state = next((copy / "engine").glob("*.pt"))
    state.write_bytes(state.read_bytes()[:-10])
    trainer = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "other", num_train_epochs=1)),
        train_dataset=datasets.Dataset.from_list(ROWS),
    )
    with pytest.raises(CheckpointError, match=state.name):
        trainer.train(resume_from_checkpoint=str(copy))
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)


def test_a_loss_that_is_not_finite_stops_before_the_update(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "margin": 1e38 if i == 11 else 0.0} for i, row in enumerate(ROWS)]
    with pytest.raises(NonFiniteError, match=r"not finite|NaN or infinite"):
        run(model, tmp_path / "run", rows, center_rewards_coefficient=1e38, learning_rate=1.0)
    assert not (tmp_path / "run" / "export").exists()


REFUSED_AT_ONCE = [
    ({"deepspeed": 4}, "a ZeRO stage is 0, 1, 2 or 3"),
    ({"deepspeed": "nowhere.json"}, "there is no such file"),
    ({"deepspeed": {"train_micro_batch_size_per_gpu": 3}}, "train_micro_batch_size_per_gpu=3"),
    ({"deepspeed": {"optimizer": {"type": "Lamb"}}}, "optimizer.type='Lamb'"),
    ({"deepspeed": {"scheduler": {"type": "WarmupLR"}}}, "lr_scheduler_type"),
    ({"deepspeed": {"fp16": {"enabled": True}}}, "fp16"),
    ({"deepspeed": {"aio": {"block_size": "auto"}}}, "deepspeed.aio.block_size"),
    ({"eval_strategy": "epoch"}, "needs an eval_dataset"),
    ({"max_length": 2}, "no pair is left"),
    ({"model_init_kwargs": {"dtype": "bf16"}}, "Invalid `dtype`"),
    ({"model_init_kwargs": {"device_map": "auto"}}, "device_map"),
    ({"model_init_kwargs": {"num_labels": 2}}, "num_labels"),
    ({"use_gpu": True, "use_cpu": True}, "contradict"),
]


@pytest.mark.parametrize(("changes", "expected"), REFUSED_AT_ONCE)
def test_wrong_settings_are_refused_before_anything_is_written(
    model: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        run(model, tmp_path / "run", **changes)
    assert len(str(caught.value).splitlines()) < 15
    assert not list(tmp_path.glob("run/*.json"))
    assert not list(tmp_path.glob("run/prepared/*"))


@pytest.mark.parametrize(
    "name",
    ["data_collator", "compute_metrics", "callbacks", "optimizers", "peft_config",
     "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics"],
)  # fmt: skip
def test_arguments_of_trl_that_are_not_supported_are_refused_by_name(
    model: Path, name: str
) -> None:
    rows = datasets.Dataset.from_list(ROWS)
    with pytest.raises(ConfigError, match=name):
        RewardTrainer(str(model), train_dataset=rows, **{name: ["something"]})


def test_bad_rows_stop_the_run_or_are_dropped_and_counted(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    bad = [{"chosen": "same", "rejected": "same"}, {"chosen": "no other side"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in [*ROWS, *bad]))
    with pytest.raises(RowError, match=r"rows\.jsonl row 45 \(line 46\)") as caught:
        RewardTrainer(
            str(model), RewardConfig(**settings(tmp_path / "a")), train_dataset=str(file)
        ).train()
    assert "missing_field" in str(caught.value)
    trainer = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "b", on_bad_row="drop", num_train_epochs=1)),
        train_dataset=str(file),
    )
    result = trainer.train()
    assert result.metrics["num_dropped"] == {"train": 2}
    assert trainer.dropped["train"] == {"identical": 1, "missing_field": 1}


def test_torchrun_is_told_to_use_workers(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="num_workers=0 trains in this process alone"):
        run(model, tmp_path / "run")


def test_training_leaves_no_variable_of_a_job_behind(model: Path, tmp_path: Path) -> None:
    """accelerate would take a later trainer in this process for one worker of several."""
    before = dict(os.environ)
    run(model, tmp_path / "run", max_steps=1)
    job = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    assert {name: os.environ.get(name) for name in job} == {n: before.get(n) for n in job}
    run(model, tmp_path / "again", max_steps=1)


def test_a_torch_dtype_in_the_settings_reaches_model_and_export(
    model: Path, tmp_path: Path
) -> None:
    changes = {"max_steps": 2, "model_init_kwargs": {"dtype": torch.bfloat16}, "bf16": True}
    with pytest.raises(ConfigError, match="no fp32 masters"):
        run(model, tmp_path / "refused", deepspeed=0, **changes)
    run(model, tmp_path / "run", deepspeed=1, **changes)
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.bfloat16}
    Scorer.from_pretrained(tmp_path / "run" / "export").verify()


def test_an_epoch_without_a_full_batch_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leaves nothing to train"):
        run(model, tmp_path / "run", dataloader_drop_last=True, per_device_train_batch_size=64)


def test_weights_without_fp32_masters_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without fp32 masters"):
        run(model, tmp_path / "run", max_steps=2, model_init_kwargs={"dtype": "bfloat16"})


def test_sources_with_and_without_margins_can_be_mixed(model: Path, tmp_path: Path) -> None:
    files = [tmp_path / "plain.jsonl", tmp_path / "margins.jsonl"]
    files[0].write_text("".join(json.dumps(row) + "\n" for row in ROWS[:12]))
    files[1].write_text("".join(json.dumps({**row, "margin": 0.5}) + "\n" for row in ROWS[12:24]))
    trainer = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "mixed", num_train_epochs=1)),
        train_dataset=[str(file) for file in files],
    )
    trainer.train()
    rows = [{**row, "margin": 0.0 if i < 12 else 0.5} for i, row in enumerate(ROWS[:24])]
    spelled_out = run(model, tmp_path / "spelled-out", rows, num_train_epochs=1)
    without = run(model, tmp_path / "without", ROWS[:24], num_train_epochs=1)
    assert losses(trainer) == losses(spelled_out)
    assert losses(trainer) != losses(without)


def test_an_export_keeps_the_type_in_which_weights_were_loaded(model: Path, tmp_path: Path) -> None:
    run(model, tmp_path / "run", max_steps=1, model_init_kwargs={"dtype": "auto"}, bf16=True)
    assert {tensor.dtype for tensor in weights(tmp_path / "run").values()} == {torch.float32}


def test_a_run_shorter_than_its_log_interval_is_still_logged(model: Path, tmp_path: Path) -> None:
    trainer = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "run", max_steps=3, logging_steps=10)),
        train_dataset=datasets.Dataset.from_list(ROWS),
    )
    result = trainer.train()
    [record] = records(trainer)
    assert record["step"] == 3
    assert result.training_loss == record["loss"]


def test_an_older_checkpoint_does_not_pass_for_the_newest(model: Path, tmp_path: Path) -> None:
    changes = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 1}
    first = run(model, tmp_path / "run", **changes)
    oldest = complete_checkpoints(tmp_path / "run")[0]
    with pytest.raises(CheckpointError, match="has a newer checkpoint"):
        first.train(resume_from_checkpoint=str(oldest))
    with pytest.raises(ConfigError, match=r"=False: .*goes on from the newest"):
        first.train(resume_from_checkpoint=False)
    with pytest.raises(ConfigError, match="=3: expected the folder of a checkpoint"):
        first.train(resume_from_checkpoint=3)  # type: ignore[arg-type]
    elsewhere = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "again", **changes)),
        train_dataset=datasets.Dataset.from_list(ROWS),
    )
    elsewhere.train(resume_from_checkpoint=oldest)
    assert losses(elsewhere) == losses(first), "the log of a lineage begins with its first step"
    assert same_weights(tmp_path / "run", tmp_path / "again") == 0.0


def test_evaluate_before_train_is_of_the_starting_model(model: Path, tmp_path: Path) -> None:
    held_out = datasets.Dataset.from_list(conversation_rows(9, seed=1))
    run(model, tmp_path / "run", learning_rate=1e-2)
    fresh = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "run", learning_rate=1e-2)),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=held_out,
    )
    before = fresh.evaluate()["eval_loss"]
    fresh.train()
    assert fresh.evaluate()["eval_loss"] < before - 0.1


def test_run_json_is_whole_private_and_needed(model: Path, tmp_path: Path) -> None:
    changes = {"num_train_epochs": 1, "model_init_kwargs": {"token": "hf_secret"}}
    run(model, tmp_path / "run", **changes)
    file = tmp_path / "run" / "run.json"
    assert "hf_secret" not in file.read_text()
    assert "hf_secret" not in (tmp_path / "run" / "export" / "raywards.json").read_text()
    run(model, tmp_path / "run", **{**changes, "model_init_kwargs": {"token": "hf_other"}})
    file.write_text(file.read_text()[:50])
    with pytest.raises(CheckpointError, match=r"run\.json: is damaged"):
        run(model, tmp_path / "run", **changes)


def test_an_output_dir_that_cannot_be_is_named(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"output_dir: .* cannot be made a folder"):
        run(model, tmp_path / "file")


def test_a_held_out_set_may_have_any_name(model: Path, tmp_path: Path) -> None:
    held_out = datasets.Dataset.from_list(conversation_rows(8, seed=1))
    trainer = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "run", max_steps=1, eval_strategy="epoch")),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset={"trl-lib/helpful": held_out, "..": held_out},
    )
    metrics = trainer.train().metrics
    assert metrics["eval_trl-lib/helpful_loss"] == metrics["eval_.._loss"] > 0
    values = trainer.evaluate(held_out, metric_key_prefix="../test")
    assert values["../test_loss"] == pytest.approx(metrics["eval_.._loss"], abs=1e-5)
    assert not list(tmp_path.glob("test*"))


@pytest.mark.parametrize("empty", [{}, datasets.DatasetDict()], ids=["dict", "DatasetDict"])
def test_an_empty_mapping_of_held_out_sets_is_refused(
    empty: Any, model: Path, tmp_path: Path
) -> None:
    trainer = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "run", eval_strategy="epoch")),
        train_dataset=datasets.Dataset.from_list(ROWS),
        eval_dataset=empty,
    )
    with pytest.raises(ConfigError, match="eval_dataset: is an empty mapping"):
        trainer.train()
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="eval_dataset: is an empty mapping"):
        trainer.evaluate()


def test_held_out_rows_beyond_the_model_are_refused_before_the_first_step(tmp_path: Path) -> None:
    """And the advice can be followed, in the same folder."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    bounded = tiny_qwen2(
        tmp_path / "model", num_labels=None, max_position_embeddings=256, rope_parameters=rope
    )
    short, long = conversation_rows(4, seed=1), conversation_rows(4, seed=2)
    long[2]["chosen"] = [{**m, "content": m["content"] + " and" * 256} for m in long[2]["chosen"]]

    def trainer(**changes: Any) -> RewardTrainer:
        steps = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1}
        return RewardTrainer(
            str(bounded),
            RewardConfig(
                **settings(tmp_path / "run", save_strategy="steps", **{**steps, **changes})
            ),
            train_dataset=datasets.Dataset.from_list(ROWS),
            eval_dataset={
                "short": datasets.Dataset.from_list(short),
                "long": datasets.Dataset.from_list(long),
            },
        )

    first = trainer()
    with pytest.raises(ConfigError, match=r"tokens in 'eval_long'.* Set max_length=256"):
        first.train()
    assert not first.state.log_history
    assert not complete_checkpoints(tmp_path / "run")
    metrics = trainer(max_length=256).train().metrics
    assert (metrics["eval_long_num_pairs"], metrics["eval_short_num_pairs"]) == (3, 4)
