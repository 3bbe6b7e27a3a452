"""LoRA and DoRA: the head is trained, the export is base plus adapter, and a run can go on."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import tuning_runs as runs
from peft import LoraConfig, PeftModel, get_peft_model
from preferences_data import conversation_rows
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import chatml_tokenizer, tiny_qwen2
from transformers import AutoModelForSequenceClassification, set_seed

from raywards import Scorer
from raywards.adapters import check_peft_config
from raywards.checkpoint import complete_checkpoints
from raywards.cli import main
from raywards.errors import ConfigError, TrainingError
from raywards.model import RewardModel, disable_dropout
from raywards.train import start
from raywards.train.adapters import Adapters, attach, classifier_in

pytestmark = pytest.mark.trains

HELD_OUT = datasets.Dataset.from_list(conversation_rows(9, seed=1))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", **changes})


def classifier(folder: Path, **loading: Any) -> Any:
    set_seed(42)
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, **{"dtype": torch.float32, **loading}
    )


def peft_model(folder: Path, config: LoraConfig) -> PeftModel:
    """With adapters that do something: fresh ones add nothing."""
    adapted = get_peft_model(classifier(folder), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return adapted


# ---------------------------------------------------------------- what is trained and written


@pytest.mark.parametrize(
    ("kind", "stage"),
    [
        ("lora", 0),
        *(
            pytest.param(kind, stage, marks=pytest.mark.slow)
            for kind, stage in (
                ("lora", 3),
                ("dora", 0),
                ("dora", 3),
                ("rslora", 0),
                ("rslora", 3),
                ("lora with biases", 0),
                ("lora with biases", 3),
            )
        ),
    ],
)
def test_the_export_is_the_base_with_the_adapter_beside_it(
    model: Path, tmp_path: Path, kind: str, stage: int
) -> None:
    changes: dict[str, dict[str, Any]] = {
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "lora with biases": {"bias": "lora_only"},
    }
    run = runs.train(
        model,
        tmp_path / "run",
        peft_config=lora(**changes.get(kind, {})),
        deepspeed=runs.zero(stage),
    )
    assert runs.learned(run)
    assert runs.off_by_plain_peft(model, tmp_path / "run") <= runs.bound(tmp_path / "run")
    Scorer.from_pretrained(tmp_path / "run" / "export").verify()

    weights, base = runs.exported(tmp_path / "run"), classifier(model).state_dict()
    assert weights.keys() == base.keys()
    changed = {name for name in weights if not torch.equal(weights[name], base[name])}
    assert {name for name in weights if "proj.weight" in name} | {"score.weight"} <= changed
    assert all("proj" in name or name == "score.weight" for name in changed)

    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == ["score"]
    assert config["base_model_name_or_path"] == str(model)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert torch.equal(adapter["base_model.model.score.weight"], weights["score.weight"])
    assert not any("score" in name and "lora" in name for name in adapter)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "score"], r".*(v_proj|score)"])
def test_no_adapter_is_put_onto_the_head(model: Path, targets: Any) -> None:
    config = check_peft_config(LoraConfig(r=4, target_modules=targets))
    adapted = attach(classifier(model), config, seed=0)
    adapters = Adapters(adapted)
    assert type(adapters.inner.score) is torch.nn.Linear
    assert adapters.inner.score.weight.requires_grad
    names = [name for name, p in adapters.inner.named_parameters() if p.requires_grad]
    assert sum("lora" in name for name in names) >= 4
    assert [name for name in names if "score" in name] == ["score.weight"]
    assert config.modules_to_save is None, "the caller's config was changed"


def test_what_is_trained_is_said(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "raywards")
    runs.train(model, tmp_path / "run", peft_config=LoraConfig(r=4), max_steps=1)
    said = runs.notes(caplog)
    # q_proj and v_proj of two layers of 32, and the head: 2 * 4 * (32 + 32 + 32 + 16) + 32.
    assert "LoRA of rank 4: 928 of 31,872 parameters are trained. Trained in full: score." in said
    assert said.count("the reward head (score.weight) is new") == 1


def test_the_draw_of_the_adapters_follows_the_seed_alone(model: Path) -> None:
    config = check_peft_config(lora())
    drawn = []
    for seed, before in ((1, 0), (1, 7), (2, 0)):
        torch.manual_seed(before)
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
        adapted = attach(base, config, seed=seed)
        drawn.append(adapted.state_dict()["base_model.model.model.layers.0.self_attn.q_proj"
                                          ".lora_A.default.weight"])  # fmt: skip
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("path", [pytest.param("masked", marks=pytest.mark.slow), "padded"])
def test_packed_rows_train_as_padded_ones_do(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    config = lora(use_dora=True)
    packed = runs.train(model, tmp_path / "packed", peft_config=config)
    assert runs.learned(packed)
    monkeypatch.setattr(RewardModel, "_may_pack", lambda self: False)
    if path == "padded":
        monkeypatch.setattr(RewardModel, "_may_mask", lambda self: False)
    other = runs.train(model, tmp_path / "other", peft_config=config)
    assert runs.losses(other) == pytest.approx(runs.losses(packed), abs=1e-5)


def test_losses_are_those_of_trl_where_it_trains_the_head(model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    adapted = peft_model(model, lora(modules_to_save=["score"]))
    ours = runs.train(copy.deepcopy(adapted), tmp_path / "ours", learning_rate=1e-3)
    theirs = trl.RewardTrainer(
        adapted,
        trl.RewardConfig(
            output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False,
            learning_rate=1e-3, max_steps=8, logging_steps=1, gradient_checkpointing=False,
        ),
        train_dataset=datasets.Dataset.from_list(runs.ROWS),
        processing_class=chatml_tokenizer(),
    )  # fmt: skip
    theirs.train()
    expected = [record["loss"] for record in theirs.state.log_history if "loss" in record]
    assert len(expected) == 8
    assert expected[0] - expected[-1] > 0.02, "nothing was learned: proves nothing"
    assert runs.losses(ours) == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- models given as objects


def test_a_peft_model_is_trained_in_place_and_its_head_too(model: Path, tmp_path: Path) -> None:
    adapted = peft_model(model, LoraConfig(r=4))  # peft would leave the head as it was drawn
    frozen = adapted.get_base_model().model.embed_tokens.weight.detach().clone()
    run = runs.train(adapted, tmp_path / "run", eval_dataset=HELD_OUT)
    assert runs.learned(run)
    assert run.model is adapted
    assert torch.equal(adapted.get_base_model().model.embed_tokens.weight, frozen)
    ids = [5, 60, 7, 80, 9]
    [reward] = Scorer.from_pretrained(tmp_path / "run" / "export").score_ids([ids])
    assert runs.plain_reward(adapted.eval(), ids) == pytest.approx(reward, abs=1e-5)
    assert run.evaluate()["eval_loss"] < runs.losses(run)[0] - 0.05
    assert runs.off_by_plain_peft(tmp_path / "run" / "initial-model", tmp_path / "run") <= 1e-5
    # The caller's own object: saved by peft, it is what is beside the export.
    adapted.save_pretrained(tmp_path / "saved")
    theirs = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_a_classifier_and_a_peft_config_make_a_peft_model(model: Path, tmp_path: Path) -> None:
    given = classifier(model)
    config = lora()
    run = runs.train(given, tmp_path / "object", peft_config=config)
    assert isinstance(run.model, PeftModel)
    assert run.model.get_base_model() is given
    drawn = attach(classifier(model), check_peft_config(config), seed=run.args.seed)
    by_peft_model = runs.train(drawn, tmp_path / "drawn")
    assert runs.learned(run)
    assert runs.losses(run) == runs.losses(by_peft_model)
    assert runs.same_export(tmp_path / "object", tmp_path / "drawn")


def test_workers_get_base_and_adapter_of_a_peft_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray would pickle and its workers would load, in this process."""
    adapted = peft_model(model, lora(use_dora=True, modules_to_save=["score", "embed_tokens"]))
    with torch.no_grad():
        adapted.get_base_model().score.modules_to_save["default"].weight += 1
    sent: list[bytes] = []
    monkeypatch.setattr(
        "raywards.train.trainer.run_on_ray", lambda job, *_, **__: sent.append(pickle.dumps(job))
    )
    with pytest.raises(TrainingError, match="without an export"):
        runs.train(adapted, tmp_path / "run", num_workers=2)
    job = pickle.loads(sent[0])
    inner, adapters = start.load_model(job, stage=0)
    assert adapters is not None
    with classifier_in(adapted) as ours:
        expected = dict(ours.named_parameters())
        found = dict(inner.named_parameters())
        assert found.keys() == expected.keys()
        for name, parameter in expected.items():
            assert torch.equal(found[name], parameter), name
            assert found[name].requires_grad == parameter.requires_grad, name


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("kind", ["config", "object"])
def test_two_workers_train_adapters_as_one_process_does(
    model: Path, tmp_path: Path, kind: str
) -> None:
    config = lora(use_dora=True, task_type="SEQ_CLS")
    given = {"config": model, "object": peft_model(model, config)}[kind]
    extra: dict[str, Any] = {"peft_config": config} if kind == "config" else {}
    two = runs.train(
        copy.deepcopy(given),
        tmp_path / "two",
        num_workers=2,
        per_device_train_batch_size=4,
        deepspeed=runs.zero(3),
        **extra,
    )
    one = runs.train(given, tmp_path / "one", **extra)
    assert runs.learned(one)
    assert runs.losses(two) == pytest.approx(runs.losses(one), abs=1e-5)


# ---------------------------------------------------------------- resume


STAGES = [
    pytest.param(stage, bf16, marks=() if (stage, bf16) == (3, True) else
                 pytest.mark.slow)
    for stage in range(4) for bf16 in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("stage", "bf16"), STAGES)
def test_a_resumed_run_ends_in_the_same_bits(
    model: Path, tmp_path: Path, stage: int, bf16: bool
) -> None:
    changes: dict[str, Any] = {
        "peft_config": lora(), "deepspeed": runs.zero(stage), "bf16": bf16,
    }  # fmt: skip
    whole = runs.train(model, tmp_path / "whole", **changes)
    assert runs.learned(whole)
    third, sixth, _ = complete_checkpoints(tmp_path / "whole")
    assert "embed_tokens" not in str(parameters_in(sixth)), "the base is in the checkpoint, too"
    resumed = runs.train(model, tmp_path / "resumed", resume_from=third, **changes)
    assert runs.losses(resumed) == runs.losses(whole)
    assert runs.goes_on_as(tmp_path / "whole", tmp_path / "resumed")
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in
                ("whole", "resumed")]  # fmt: skip
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    # The base is as it was loaded, whatever DeepSpeed made of its copy of it.
    assert torch.equal(
        runs.exported(tmp_path / "whole")["model.embed_tokens.weight"],
        classifier(model).model.embed_tokens.weight,
    )
    assert runs.off_by_plain_peft(model, tmp_path / "whole") <= runs.bound(tmp_path / "whole")
    Scorer.from_pretrained(tmp_path / "whole" / "export").verify()


def parameters_in(checkpoint: Path) -> list[str]:
    """Names of the parameters of which a checkpoint has values."""
    names = []
    for file in (checkpoint / "engine").glob("*model_states.pt"):
        state = torch.load(file, weights_only=False)
        names += [name for name, value in state["module"].items() if value is not None]
        names += list(state.get("frozen_param_fragments") or ())
    assert any("lora_A" in name for name in names)
    return names


def test_a_run_with_another_rank_is_another_run(model: Path, tmp_path: Path) -> None:
    runs.train(model, tmp_path / "run", peft_config=lora(), max_steps=1)
    runs.train(model, tmp_path / "run", peft_config=lora(), max_steps=1)  # the same one: goes on
    with pytest.raises(ValueError, match="peft_config: was"):
        runs.train(model, tmp_path / "run", peft_config=lora(r=8), max_steps=1)


# ---------------------------------------------------------------- dropout, checkpointing, types


@pytest.mark.slow
def test_the_dropout_of_lora_stays_where_disable_dropout_is_on(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapted = attach(
        classifier(model, attention_dropout=0.5), check_peft_config(lora(lora_dropout=0.25)), seed=0
    )
    inner = adapted.get_base_model()
    disable_dropout(inner)
    assert inner.model.layers[0].self_attn.attention_dropout == 0
    assert inner.model.layers[0].self_attn.q_proj.lora_dropout["default"].p == 0.25

    # A prefix that is computed once would be masked once, where the two sides have a mask each.
    caplog.set_level(logging.INFO, "raywards")
    without = runs.train(model, tmp_path / "without", peft_config=lora())
    assert "The model takes packed rows" in runs.notes(caplog)
    caplog.clear()
    dropping = runs.train(model, tmp_path / "with", peft_config=lora(lora_dropout=0.25))
    assert "The model takes padded rows" in runs.notes(caplog)
    assert runs.learned(dropping)
    assert abs(runs.losses(dropping)[2] - runs.losses(without)[2]) > 1e-3, "nothing was dropped"
    assert runs.off_by_plain_peft(model, tmp_path / "with") <= runs.bound(tmp_path / "with")


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_train_adapters_the_same(
    model: Path, tmp_path: Path, reentrant: bool
) -> None:
    kept = runs.train(model, tmp_path / "kept", peft_config=lora(), gradient_checkpointing=False)
    recomputed = runs.train(
        model,
        tmp_path / "recomputed",
        peft_config=lora(),
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )
    assert runs.learned(kept)
    assert runs.losses(recomputed) == pytest.approx(runs.losses(kept), abs=1e-5)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_adapters_of_a_half_precision_base_have_fp32_masters(
    model: Path, tmp_path: Path, stage: int
) -> None:
    changes: dict[str, Any] = {"model_init_kwargs": {"dtype": "bfloat16"}, "bf16": True}
    if stage == 0:
        with pytest.raises(ConfigError, match="no fp32 masters"):
            runs.train(model, tmp_path / "full", deepspeed=0, **changes)
    # Updates far below a bfloat16's last bit: without masters nothing would move.
    run = runs.train(
        model, tmp_path / "run", peft_config=lora(), deepspeed=runs.zero(stage),
        learning_rate=1e-6, lr_scheduler_type="constant", **changes,
    )  # fmt: skip
    adapter = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
    with safe_open(adapter, "pt") as file:
        head = file.get_tensor("base_model.model.score.weight")
    assert head.dtype == torch.float32
    set_seed(42)
    start = classifier(model, dtype=torch.bfloat16).score.weight.float()
    moved = (head - start).abs()
    assert moved.max() > 0
    assert (moved < 2e-5).all()
    assert {tensor.dtype for tensor in runs.exported(tmp_path / "run").values()} == {torch.bfloat16}
    assert run.state.global_step == 8


# ---------------------------------------------------------------- refused


REFUSED: dict[str, tuple[Any, str]] = {
    "a dict": ({"r": 4}, "expected a peft.LoraConfig .* got dict"),
    "prompts": (peft.PromptTuningConfig(num_virtual_tokens=4), "got PromptTuningConfig"),
    "AdaLora": (peft.AdaLoraConfig(total_step=9), "got AdaLoraConfig"),
    "a language model": (lora(task_type="CAUSAL_LM"), "--lora_task_type SEQ_CLS"),
    "a tagger": (lora(task_type="TOKEN_CLS"), 'task_type="SEQ_CLS"'),
    "another base": (lora(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "more layers": (lora(layer_replication=[(0, 1)]), "layer_replication"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_adapters_are_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, case: str
) -> None:
    config, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected):
        runs.trainer(model, tmp_path / "run", peft_config=config)
    assert not (tmp_path / "run").exists()


def test_targets_that_name_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'qproj'.* The layers of Qwen2.* q_proj, up_proj"):
        runs.train(model, tmp_path / "run", peft_config=lora(target_modules=["qproj"]))


def test_peft_models_that_cannot_be_trained_are_refused(model: Path, tmp_path: Path) -> None:
    adapted = peft_model(model, lora())
    with pytest.raises(ConfigError, match="Leave peft_config out, or merge"):
        runs.trainer(adapted, tmp_path / "run", peft_config=lora())
    adapted.add_adapter("second", lora())
    with pytest.raises(ConfigError, match="the adapters default, second; one is trained"):
        runs.trainer(adapted, tmp_path / "run")
    adapted.delete_adapter("second")
    adapted.save_pretrained(tmp_path / "saved")
    loaded = PeftModel.from_pretrained(classifier(model), tmp_path / "saved")
    with pytest.raises(ConfigError, match="is_trainable=True"):
        runs.trainer(loaded, tmp_path / "run")
    on_head = get_peft_model(classifier(model), LoraConfig(r=4, target_modules=["score"]))
    with pytest.raises(ConfigError, match="LoRA on its head, score"):
        runs.trainer(on_head, tmp_path / "run")


# ---------------------------------------------------------------- from the command line


def test_the_flags_of_trl_train_adapters(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in conversation_rows(24)))
    config = tmp_path / "train.yaml"
    config.write_text(
        f"model_name_or_path: {model}\ndataset_name: {rows}\noutput_dir: {tmp_path / 'run'}\n"
        "num_workers: 0\nuse_cpu: true\nbf16: false\nmax_steps: 2\ndisable_tqdm: true\n"
        "use_peft: true\nlora_r: 4\nlora_target_modules: [q_proj, v_proj]\n"
    )
    flags = ["--lora_alpha", "8", "--lora_task_type", "SEQ_CLS", "--use_dora"]
    assert main(["train", "--config", str(config), *flags]) == 0, capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["use_dora"]) == (4, 8, True)
    assert sorted(written["target_modules"]) == ["q_proj", "v_proj"]
    assert main(["train", "--config", str(config), "--lora_task_type", "CAUSAL_LM"]) == 2
    assert "SEQ_CLS" in capsys.readouterr().err
