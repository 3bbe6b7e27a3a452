"""Every family that transformers can sequence-classify is exact, or refused.

A handful is tried always, all of them by `make test-slow`, against the table in docs/families.md.
That is written by

    python tests/families.py --write docs/families.md
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import (
    FAMILIES,
    FAR,
    NEAR,
    NOT_BUILT,
    RANDOM_IN_TRAINING,
    VOCAB,
    WINDOW,
    Case,
    alone,
    find,
    gradients,
    model_class,
    rewards_alone,
    tiny_config,
    tiny_model,
)
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from raywards import attention, families
from raywards.errors import ModelError
from raywards.model import PATHS, RewardModel, disable_dropout
from raywards.model import Path as RowPath
from raywards.settle import settle_path

pytestmark = pytest.mark.trains

torch.set_num_threads(1)  # tensors this small: two threads would wait for each other

DOCS = Path(__file__).parent.parent / "docs" / "families.md"
USUAL = [
    "llama", "qwen2", "qwen3", "mistral", "gemma2", "gpt_oss", "gpt2", "mixtral", "jamba", "bert",
]  # fmt: skip
EACH = [
    pytest.param(name, marks=() if name in USUAL else pytest.mark.slow, id=name)
    for name in FAMILIES
]


def settled(name: str, **settings: Any) -> RewardModel:
    model = RewardModel(tiny_model(name, **settings)).eval()
    settle_path(model)
    return model


def assert_exact(
    model: RewardModel, path: RowPath, case: Case, expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    """Rewards to 1e-4 of their standard deviation, and so the gradients."""
    settled_on = model.path
    model.use(path)
    model.zero_grad()
    rewards = model(case.row)
    (rewards * case.weights).sum().backward()
    spread = expected[0].std()
    assert spread > 0.01, "all rewards are alike: nothing is compared"
    assert (rewards.detach() - expected[0]).abs().max() <= 1e-4 * spread
    assert_gradients(gradients(model.inner), expected[1])
    model.use(settled_on)


def assert_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of every parameter, to 1e-4. Where the true gradient is zero (biases of keys, which a softmax
    takes out) rounding is left, and that follows the size of the other gradients."""
    largest = max(grad.norm().item() for grad in expected.values())
    assert largest > 1e-2
    for name, grad in expected.items():
        off = (found[name] - grad).norm().item()
        assert off <= 1e-4 * grad.norm().item() + 1e-6 * largest, name


# ---------------------------------------------------------------- every family


@pytest.mark.parametrize("name", EACH)
def test_a_family_takes_the_path_that_the_table_says(name: str) -> None:
    assert find(name).line in DOCS.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", EACH)
def test_a_family_is_exact_or_refused(name: str) -> None:
    """On its path and on those that it may fall back on, in training as in evaluation.

    A sequence longer than the windows is in `FAR`; in `NEAR` only the row is.
    """
    if find(name).path == "refused":
        assert_refused(name)
        return
    model = settled(name)
    if name not in RANDOM_IN_TRAINING:
        disable_dropout(model.inner)
        model.train()
    for case in (NEAR, FAR):
        if case.row.layout.longest_path > model.max_tokens:
            with pytest.raises(ModelError, match=f"Set max_length={WINDOW}"):
                model(case.row)
            continue
        expected = alone(name, case)
        for path in PATHS[PATHS.index(model.path) :]:
            assert_exact(model, path, case, expected)


def assert_refused(name: str) -> None:
    """When it is loaded, in any precision, with a reason that is no guess of the probe's."""
    assert families.why_refused(tiny_config(name)) == find(name).note
    if name in NOT_BUILT:
        with pytest.raises(ImportError):
            tiny_model(name)
        return
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(ModelError, match="cannot be a reward model here"):
            settle_path(RewardModel(tiny_model(name).to(dtype)))


@pytest.mark.parametrize("name", EACH)
def test_the_path_does_not_hang_on_precision_or_on_how_sharp_attention_is(name: str) -> None:
    if find(name).path == "refused":
        return
    fresh = model_class(name)._from_config(tiny_config(name)).eval()
    for inner in (copy.deepcopy(fresh), fresh.bfloat16()):
        model = RewardModel(inner)
        settle_path(model)
        assert model.path == find(name).path


@pytest.mark.parametrize("name", EACH)
def test_a_tiny_model_has_layers_of_each_kind_and_looks_far(name: str) -> None:
    """Guards the tests above: what is not in the model, or does not matter, cannot go wrong."""
    if find(name).path == "refused":
        return
    kinds = set(getattr(CONFIG_MAPPING[name]().get_text_config(), "layer_types", None) or ())
    model = tiny_model(name)
    assert kinds <= set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    ids = NEAR.sequences[-1]
    other = [*ids[:10], 8 + (ids[10] - 7) % (VOCAB - 8), *ids[11:]]
    with torch.no_grad():
        one, another = rewards_alone(model, [ids, other])
    assert abs(one - another) > 1e-4


@pytest.mark.parametrize("name", EACH)
def test_trimming_the_last_layer_changes_no_reward(name: str) -> None:
    if find(name).path != "packed":
        return
    model = settled(name)
    assert model._trim is not None
    with torch.no_grad():
        trimmed = model(NEAR.row)
        model._trim.remove()
        whole = model(NEAR.row)
    assert (trimmed - whole).abs().max() <= 1e-5 * whole.std()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NOT_BUILT])
def test_a_refused_family_would_give_other_rewards_in_a_batch(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe sees most of them by itself. What it does not see is found in `FAR`."""
    if find(name).path != "refused":
        return
    monkeypatch.setattr(families, "why_refused", lambda config: None)
    try:
        model = settled(name)
    except ModelError:
        return
    assert name in ("big_bird", "mra", "reformer"), "the probe should have seen it"
    with torch.no_grad():
        if name == "mra":  # it pools the first token, and attends to nothing
            one, another = rewards_alone(model.inner, [[9, 10, 11, 12], [9, 20, 21, 22]])
            assert one == another
            return
        expected = rewards_alone(tiny_model(name), FAR.sequences)
        assert (model(FAR.row) - expected).abs().max() > 1e-2 * expected.std()


def test_the_table_has_every_family_once() -> None:
    text = DOCS.read_text(encoding="utf-8")
    listed = re.findall(r"^\| (\S+) \| `\w+` \| (\w+) \|", text, re.MULTILINE)
    assert [family for family, _ in listed] == FAMILIES
    # Models with code of their own, loaded by other tests, register themselves besides.
    known = {
        config
        for config in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.keys()  # noqa: SIM118
        if config.__module__.startswith("transformers.")
    }
    assert {CONFIG_MAPPING[family] for family, _ in listed} == known
    for path in (*PATHS, "refused"):
        count = sum(taken == path for _, taken in listed)
        assert f"\n| {path} | {count} |" in text
    assert f"with transformers {transformers.__version__}." in text


# ---------------------------------------------------------------- settings that change a family


BOTH = ["sliding_attention", "full_attention"]
WINDOWED: dict[str, dict[str, Any]] = {
    "mixtral": {},
    "phi3": {},
    "phimoe": {},
    "qwen2": {"use_sliding_window": True, "layer_types": BOTH[::-1]},
    "qwen2_moe": {"use_sliding_window": True, "layer_types": BOTH},
    "qwen3": {"use_sliding_window": True, "layer_types": BOTH},
    "qwen3_moe": {"use_sliding_window": True},
    "smollm3": {"use_sliding_window": True, "layer_types": BOTH},
    "starcoder2": {},
}
"""Families whose window is off by default, and what turns it on."""


@pytest.mark.parametrize("name", WINDOWED)
def test_a_window_that_is_turned_on_is_exact(name: str) -> None:
    settings = {"sliding_window": WINDOW, **WINDOWED[name]}
    model = settled(name, **settings)
    assert model.path == "packed"
    for case in (NEAR, FAR):
        expected = alone(name, case, **settings)
        for path in PATHS:
            assert_exact(model, path, case, expected)
    without = alone(name, FAR)[0]
    assert (expected[0] - without).abs().max() > 1e-2, "the window cuts nothing"


@pytest.mark.parametrize("window", [8, 40, 75, 76])
def test_a_window_of_any_width_is_exact(window: int) -> None:
    """Shorter than the probe, as long as its longest sequence, and about the longest of `NEAR`."""
    model = settled("mistral", sliding_window=window)
    expected = alone("mistral", NEAR, sliding_window=window)
    for path in PATHS:
        assert_exact(model, path, NEAR, expected)


ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": WINDOW,
    },
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0] * 4,
            "long_factor": [4.0] * 4, "original_max_position_embeddings": WINDOW,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPES)
def test_where_a_long_sequence_would_turn_its_neighbours_it_is_refused(kind: str) -> None:
    model = settled("llama", **ROPES[kind])
    assert model.max_tokens == WINDOW
    assert_exact(model, "packed", NEAR, alone("llama", NEAR, **ROPES[kind]))
    with pytest.raises(ModelError, match="depends on what else is in its batch"):
        model(FAR.row)
    model.max_tokens = float("inf")
    model.use("padded")
    off = (model(FAR.row) - alone("llama", FAR, **ROPES[kind])[0]).abs().max()
    assert off > 1e-2, "it need not be refused"


DEBERTA = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm",
    "position_buckets": 16, "share_att_key": True, "position_biased_input": False,
}  # fmt: skip
AS_PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "deberta-v3": ("deberta-v2", {**DEBERTA, "type_vocab_size": 0}),
    "deberta-v2-xlarge": ("deberta-v2", {**DEBERTA, "conv_kernel_size": 3, "conv_act": "gelu"}),
    "deberta": ("deberta", {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "esm2": ("esm", {"token_dropout": True, "position_embedding_type": "rotary"}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "santacoder": ("gpt_bigcode", {"multi_query": True}),
    "starcoderbase-mha": ("gpt_bigcode", {"multi_query": False}),
    "stablelm-2": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "gpt2-scaled": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "opt-350m": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    "qwen3-moe-dense": ("qwen3_moe", {"mlp_only_layers": [0]}),
    "deepseek-v2-lite": ("deepseek_v2", {"q_lora_rank": None, "first_k_dense_replace": 1}),
}  # fmt: skip
"""Settings of published checkpoints that are not their family's defaults."""


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", AS_PUBLISHED)
def test_settings_of_published_checkpoints_are_exact(checkpoint: str) -> None:
    name, settings = AS_PUBLISHED[checkpoint]
    model = settled(name, **settings)
    for case in (NEAR, FAR):
        expected = alone(name, case, **settings)
        for path in PATHS[PATHS.index(model.path) :]:
            assert_exact(model, path, case, expected)


def test_falcon_with_alibi_is_padded_and_exact() -> None:
    """As by its default attention: transformers' eager one adds ALiBi twice."""
    model = settled("falcon", alibi=True)
    assert model.path == "padded"
    assert_exact(model, "padded", NEAR, alone("falcon", NEAR, attention="sdpa", alibi=True))


def test_experts_with_jitter_train_padded() -> None:
    model = settled("mixtral", router_jitter_noise=0.1)
    assert model._path_of(NEAR.row) == "packed"
    assert model.train()._path_of(NEAR.row) == "padded"


def test_big_bird_with_full_attention_is_exact() -> None:
    model = settled("big_bird", attention_type="original_full")
    assert_exact(model, "padded", FAR, alone("big_bird", FAR, attention_type="original_full"))


# ---------------------------------------------------------------- the probe


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_what_our_attention_does_not_compute_would_be_seen(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards every comparison above: with these weights a soft cap and a sink matter."""
    monkeypatch.setattr(attention, "_refuse_what_is_not_computed", lambda *args: None)
    expected = alone(name, NEAR)[0]
    model = RewardModel(tiny_model(name)).eval()
    model.use("packed")
    assert (model(NEAR.row) - expected).abs().max() > 1e-2 * expected.std()
    settle_path(model)
    assert model.path == "masked"


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_last_layer_computes_pooled_positions_alone(name: str) -> None:
    model = settled(name)
    computed: list[int] = []
    last = model.inner.model.layers[-1].mlp
    last.act_fn.register_forward_hook(lambda _, args, output: computed.append(output.shape[1]))
    model(NEAR.row)
    assert computed[-1] == len(set(NEAR.row.pooled.tolist())) == len(NEAR.sequences) - 1


def test_a_config_with_several_eos_ids_or_without_bos_is_probed() -> None:
    assert settled("llama", eos_token_id=[2, 5, 6]).path == "packed"
    assert settled("roc_bert").path == "padded"


def test_a_model_that_averages_over_padding_is_refused_by_the_probe_alone() -> None:
    inner = tiny_model("bert")
    pool = inner.bert.pooler
    pool.forward = lambda hidden: pool.activation(pool.dense(hidden.mean(dim=1)))
    with pytest.raises(ModelError, match="beside other sequences, its rewards are up to"):
        settle_path(RewardModel(inner))


def test_a_model_that_wants_more_than_ids_is_refused() -> None:
    inner = tiny_model("bert")
    inner.forward = lambda input_ids, attention_mask, image: None
    with pytest.raises(ModelError, match=r"it cannot be run \(TypeError: .*image"):
        settle_path(RewardModel(inner))
