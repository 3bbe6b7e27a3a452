"""Frozen weights, other kinds of models to start from, quantised bases, and what saves memory."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import tuning_runs as runs
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import chatml_tokenizer, tiny_qwen2
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig, set_seed
from transformers.models.qwen2 import modeling_qwen2

from raywards import Scorer
from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.errors import ConfigError
from raywards.loader import create_model_from_path
from raywards.train import tuning

pytestmark = pytest.mark.trains
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None,
    reason="needs bitsandbytes, which every process with peft would import: 1.3 s of CPU each",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def classifier(folder: Path) -> Any:
    set_seed(42)
    return create_model_from_path(str(folder), AutoModelForSequenceClassification)


# ---------------------------------------------------------------- frozen


STAGES = [
    pytest.param(stage, bf16, marks=() if (stage, bf16) in ((0, False), (2, True)) else
                 pytest.mark.slow)
    for stage in range(4) for bf16 in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("stage", "bf16"), STAGES)
def test_frozen_weights_are_the_same_bits_in_the_export(
    model: Path, tmp_path: Path, stage: int, bf16: bool
) -> None:
    changes: dict[str, Any] = {
        "freeze": ["model.embed_tokens", "model.layers.[0-0]", "*.k_proj.*"],
        "deepspeed": runs.zero(stage),
        "bf16": bf16,
    }
    whole = runs.train(model, tmp_path / "whole", **changes)
    assert runs.learned(whole)
    weights, before = runs.exported(tmp_path / "whole"), classifier(model).state_dict()
    assert weights.keys() == before.keys()
    for name, value in weights.items():
        frozen = "embed_tokens" in name or "layers.0." in name or "k_proj" in name
        assert torch.equal(value, before[name]) == frozen, name

    third, *_ = complete_checkpoints(tmp_path / "whole")
    resumed = runs.train(model, tmp_path / "resumed", resume_from=third, **changes)
    assert runs.losses(resumed) == runs.losses(whole)
    assert runs.goes_on_as(tmp_path / "whole", tmp_path / "resumed")


@pytest.mark.parametrize("given", ["path", "object"])
def test_a_backbone_can_be_frozen_whole(model: Path, tmp_path: Path, given: str) -> None:
    start = model if given == "path" else classifier(model)
    run = runs.train(start, tmp_path / "run", freeze="model", learning_rate=0.3, deepspeed=1)
    assert runs.losses(run)[-1] < runs.losses(run)[0] - 0.01
    weights, before = runs.exported(tmp_path / "run"), classifier(model).state_dict()
    assert [n for n in weights if not torch.equal(weights[n], before[n])] == ["score.weight"]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["model.embed_token"], r"'model.embed_token' names no parameter .*model\.embed_tokens"),
        (["model.layers.7"], r"'model.layers.7' names no parameter"),
        (["*"], r"'\*' names score.weight, which is of the reward head"),
        (["model", "score"], "'score' names score.weight"),
    ],
)
def test_patterns_that_freeze_nothing_or_the_head_are_refused(
    model: Path, tmp_path: Path, patterns: list[str], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        runs.train(model, tmp_path / "run", freeze=patterns)


def test_settings_that_exclude_each_other_are_refused_at_once(model: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4)
    for changes, expected in (
        ({"peft_config": config, "freeze": ["model"]}, "freeze: .* frozen anyway"),
        ({"activation_offloading": True, "gradient_checkpointing": False}, "what is offloaded"),
    ):
        with pytest.raises(ConfigError, match=expected):
            runs.trainer(model, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_reentrant_checkpoints_pass_gradients_over_frozen_embeddings(
    model: Path, tmp_path: Path
) -> None:
    changes = {"freeze": ["model.embed_tokens"]}
    kept = runs.train(model, tmp_path / "kept", gradient_checkpointing=False, **changes)
    recomputed = runs.train(
        model,
        tmp_path / "recomputed",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        **changes,
    )
    assert runs.learned(kept)
    assert runs.losses(recomputed) == pytest.approx(runs.losses(kept), abs=1e-5)


# ---------------------------------------------------------------- what training starts from


def save(folder: Path, family: str, head: str, **config: Any) -> Path:
    """A tiny model of a family with the tests' tokenizer."""
    tokenizer = chatml_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 512, "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = getattr(transformers, f"{family}Config")(**settings | config)
        getattr(transformers, f"{family}For{head}")(made).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def encoder(folder: Path) -> Path:
    return save(folder, "ModernBert", "MaskedLM", cls_token_id=0, sep_token_id=1)


def mixture(folder: Path) -> Path:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return save(folder, "Qwen3Moe", "CausalLM", head_dim=8, **sizes)


def deberta(folder: Path) -> Path:
    return save(folder, "DebertaV2", "MaskedLM")


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
STARTS: dict[str, tuple[Any, LoraConfig | None]] = {
    "encoder": (encoder, None),
    "encoder, LoRA": (encoder, LoraConfig(r=4, target_modules="all-linear")),
    "encoder with a pooler, LoRA": (deberta, LoraConfig(r=4, target_modules="all-linear")),
    "experts": (mixture, None),
    "experts, LoRA by TRL's names": (
        mixture, LoraConfig(r=4, target_modules=["gate_proj", "up_proj", "down_proj", "score"])
    ),
    "experts, LoRA by parameter": (
        mixture, LoraConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS)
    ),
}  # fmt: skip


SLOW = ("encoder", "experts", "encoder with a pooler, LoRA", "experts, LoRA by TRL's names")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in STARTS]
)
def test_encoders_and_mixtures_of_experts_are_trained(tmp_path: Path, case: str) -> None:
    make, config = STARTS[case]
    start = make(tmp_path / "start")
    given = {} if config is None else {"peft_config": config}
    run = runs.train(start, tmp_path / "run", **given)
    assert runs.losses(run)[-1] < runs.losses(run)[0] - (0.05 if "pooler" not in case else 1e-3)
    Scorer.from_pretrained(tmp_path / "run" / "export").verify()
    weights, before = runs.exported(tmp_path / "run"), load_file(start / "model.safetensors")
    heads = {name for name in weights if name.split(".")[0] in ("score", "classifier", "pooler")}
    assert heads
    if config is not None:
        assert runs.off_by_plain_peft(start, tmp_path / "run") <= runs.bound(tmp_path / "run")
        assert torch.equal(weights[EMBEDDINGS[make]], before[EMBEDDINGS[make]])
    if "experts" in case:
        experts = [name for name in weights if "experts" in name and name in before]
        assert experts
        assert any(not torch.equal(weights[name], before[name]) for name in experts)


EMBEDDINGS = {
    encoder: "model.embeddings.tok_embeddings.weight",
    deberta: "deberta.embeddings.word_embeddings.weight",
    mixture: "model.embed_tokens.weight",
}


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_finished_reward_model_is_trained_further(
    model: Path, tmp_path: Path, adapted: bool
) -> None:
    first = runs.train(model, tmp_path / "first")
    export = tmp_path / "first" / "export"
    given = {"peft_config": LoraConfig(r=4)} if adapted else {}
    again = runs.train(export, tmp_path / "again", learning_rate=1e-4, **given)
    # It starts where the other ended: with another head it would be at ln 2.
    assert runs.losses(again)[0] < runs.losses(first)[-1] + 0.05 < 0.4
    [moved] = (runs.exported(tmp_path / "again")["score.weight"]
               - runs.exported(tmp_path / "first")["score.weight"]).abs()  # fmt: skip
    assert 0 < moved.max() < 1e-2
    manifest = read_manifest(tmp_path / "again" / "export", kind="export")
    assert manifest["training"]["base_model"] == str(export)


# ---------------------------------------------------------------- quantised


@needs_bitsandbytes
@pytest.mark.parametrize(
    "bits", [4, pytest.param(8, marks=pytest.mark.slow)], ids=lambda bits: f"{bits} bits"
)
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_the_export_of_a_quantised_base_is_what_was_trained(
    tmp_path: Path, bits: int, stage: int
) -> None:
    model = tiny_qwen2(tmp_path / "m", num_labels=None, hidden_size=64, intermediate_size=128)
    quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    changes: dict[str, Any] = {
        "quantization_config": quantised,
        "peft_config": LoraConfig(r=4, target_modules="all-linear"),
        "deepspeed": stage,
        "bf16": stage == 2,
    }
    run = runs.train(model, tmp_path / "run", **changes)
    assert runs.learned(run)
    weights = runs.exported(tmp_path / "run")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    Scorer.from_pretrained(tmp_path / "run" / "export").verify()

    base = classifier_of(model, quantised)
    kind = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert type(base.model.layers[0].self_attn.q_proj).__name__ == kind
    assert type(base.score) is torch.nn.Linear
    # bitsandbytes rounds inputs too in its own inference; dequantised, the base is the export's.
    dense = base.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert runs.off_by_plain_peft(tmp_path / "dense", tmp_path / "run") <= runs.bound(
        tmp_path / "run"
    )
    rounded = dense.model.layers[0].self_attn.q_proj.weight
    original = classifier(model).model.layers[0].self_attn.q_proj.weight
    assert not torch.equal(rounded, original), "nothing was quantised: proves nothing"

    third, *_ = complete_checkpoints(tmp_path / "run")
    resumed = runs.train(model, tmp_path / "resumed", resume_from=third, **changes)
    assert runs.losses(resumed) == runs.losses(run)
    assert runs.goes_on_as(tmp_path / "run", tmp_path / "resumed")


def classifier_of(model: Path, quantised: BitsAndBytesConfig) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32, quantization_config=quantised
    )


@needs_bitsandbytes
def test_quantised_weights_are_not_trained_themselves(model: Path, tmp_path: Path) -> None:
    quantised = BitsAndBytesConfig(load_in_4bit=True)
    adapters = {"peft_config": LoraConfig(r=4)}
    with pytest.raises(ConfigError, match="Train adapters beside them"):
        runs.trainer(model, tmp_path / "run", quantization_config=quantised)
    with pytest.raises(ConfigError, match="and in model_init_kwargs"):
        runs.trainer(
            model, tmp_path / "run", quantization_config=quantised,
            model_init_kwargs={"quantization_config": quantised}, **adapters,
        )  # fmt: skip
    with pytest.raises(ConfigError, match="ZeRO stage 3 cannot partition"):
        runs.train(
            model, tmp_path / "run", quantization_config=quantised, deepspeed=3, **adapters
        )  # fmt: skip
    everything = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["nothing"])
    with pytest.raises(ConfigError, match=r"score was quantised.*llm_int8_skip_modules"):
        runs.train(model, tmp_path / "run", quantization_config=everything, **adapters)


def test_packages_that_are_missing_are_named(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        runs.trainer(
            model, tmp_path / "run", peft_config=LoraConfig(),
            quantization_config=BitsAndBytesConfig(load_in_4bit=True),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        runs.trainer(model, tmp_path / "run", use_liger_kernel=True)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"needs peft: pip install 'raywards\[train\]'"):
        runs.trainer(model, tmp_path / "run", peft_config=LoraConfig())


# ---------------------------------------------------------------- what saves memory


def test_offloaded_activations_train_the_same(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU nothing moves; that the states between layers are handed over, and no weights are,
    is seen here."""
    kept = runs.train(model, tmp_path / "kept")
    packed: list[torch.Tensor] = []
    trained = classifier(model)

    class Recording(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory: bool) -> None:
            assert not pin_memory
            super().__init__(lambda t: packed.append(t) or t, lambda t: t)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Recording)
    offloaded = runs.train(trained, tmp_path / "offloaded", activation_offloading=True)
    assert runs.learned(kept)
    assert runs.losses(offloaded) == pytest.approx(runs.losses(kept), abs=1e-6)
    states = [tensor for tensor in packed if tensor.ndim == 3 and tensor.shape[2] == 32]
    assert len({tensor.data_ptr() for tensor in states}) >= 2, "of two layers"
    weights = {p.data_ptr() for p in trained.model.layers.parameters()}
    assert not weights & {tensor.data_ptr() for tensor in packed}


OFFLOAD: dict[str, dict[str, Any]] = {
    "optimizer at 2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "both at 3": {
        **runs.ZERO_3["zero_optimization"],
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


@pytest.mark.parametrize(
    "case", ["optimizer at 2", pytest.param("both at 3", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True])
def test_zero_offload_trains_resumes_and_exports(
    model: Path, tmp_path: Path, case: str, bf16: bool
) -> None:
    changes: dict[str, Any] = {"deepspeed": {"zero_optimization": OFFLOAD[case]}, "bf16": bf16}
    whole = runs.train(model, tmp_path / "whole", **changes)
    assert runs.learned(whole)
    plain = runs.train(model, tmp_path / "plain", bf16=bf16, deepspeed=2)
    assert runs.losses(whole) == pytest.approx(runs.losses(plain), abs=0.01 if bf16 else 1e-5)
    third, *_ = complete_checkpoints(tmp_path / "whole")
    resumed = runs.train(model, tmp_path / "resumed", resume_from=third, **changes)
    assert runs.losses(resumed) == runs.losses(whole)
    assert runs.goes_on_as(tmp_path / "whole", tmp_path / "resumed")
    Scorer.from_pretrained(tmp_path / "whole" / "export").verify()


def test_liger_patches_this_model_and_nothing_else(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels need a GPU, so the package is a stand-in that patches as it does."""

    def patch(model: Any, **settings: Any) -> None:
        assert settings == {
            "rope": False, "cross_entropy": False, "fused_linear_cross_entropy": False
        }  # fmt: skip
        modeling_qwen2.Qwen2MLP = type("LigerMLP", (), {})
        for layer in model.model.layers:
            layer.mlp.forward = lambda hidden: hidden

    package = types.ModuleType("liger_kernel.transformers")
    package._apply_liger_kernel_to_instance = patch  # type: ignore[attr-defined]
    families = types.ModuleType("liger_kernel.transformers.monkey_patch")
    families.MODEL_TYPE_TO_APPLY_LIGER_FN = {"qwen2": patch}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, families.__name__, families)
    monkeypatch.setattr(transformers.integrations.liger, "is_liger_kernel_available", lambda: True)

    inner, original = classifier(model), modeling_qwen2.Qwen2MLP
    with pytest.raises(ConfigError, match="need a GPU"):
        tuning.apply_liger(inner, torch.device("cpu"))
    tuning.apply_liger(inner, torch.device("cuda"))
    assert modeling_qwen2.Qwen2MLP is original
    assert "forward" in vars(inner.model.layers[0].mlp)
    inner.config.model_type = "unheard_of"
    with pytest.raises(ConfigError, match="no kernels for unheard_of"):
        tuning.apply_liger(inner, torch.device("cuda"))
