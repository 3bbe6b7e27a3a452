"""RewardModel: rewards and gradients of plain transformers, with a head that computes in fp32."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from raywards.model import Float32Linear, RewardModel, disable_dropout, stock_head
from raywards.packing import pad, pooled_position

torch.set_num_threads(1)  # tensors this small: two threads would wait for each other

VOCAB, PAD = 64, 1
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "num_labels": 1,
    "pad_token_id": PAD,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", GROUPED),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", GROUPED),
    "gemma": ("Gemma", {**GROUPED, "head_dim": 8}),
    "gpt_neox": ("GPTNeoX", SIZES),
    "opt": ("OPT", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "gpt2": (
        "GPT2",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
         "num_labels": 1, "pad_token_id": PAD},
    ),
    "bert": ("Bert", SIZES),
}  # fmt: skip
DECODERS = [name for name in FAMILIES if name != "bert"]

_drawn = torch.Generator().manual_seed(5)
ROWS = [torch.randint(2, VOCAB, (n,), generator=_drawn).tolist() for n in (3, 17, 9, 1, 30)]


def make(family: str, *, scale: float = 6.0) -> Any:
    """A tiny random classifier whose rewards are far apart."""
    name, settings = FAMILIES[family]
    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= scale
    return model


def plain(model: Any, rows: list[list[int]]) -> Tensor:
    batch = pad(rows, PAD)
    logits: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits[:, 0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_rewards_equal_plain_transformers_on_a_padded_batch(family: str) -> None:
    inner = make(family)
    theirs = plain(inner, ROWS)
    ours = RewardModel(inner)(pad(ROWS, PAD))
    assert ours.shape == (len(ROWS),)
    assert ours.dtype == torch.float32
    assert theirs.std() > 0.1, "all rewards are alike: nothing is compared"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, theirs.std().item()))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_a_sequence_alone_has_the_reward_it_has_in_a_batch(family: str) -> None:
    model = RewardModel(make(family))
    together = model(pad(ROWS, PAD))
    alone = torch.cat([model(pad([ids], PAD)) for ids in ROWS])
    atol = 1e-5 * max(1.0, together.std().item())
    torch.testing.assert_close(alone, together, rtol=0, atol=atol)


@pytest.mark.parametrize("family", DECODERS)
@torch.inference_mode()
def test_the_pad_id_at_the_end_counts_unless_it_is_skipped(family: str) -> None:
    inner = make(family)
    ends_in_pad = [[5, 9, 11, PAD], [7, 8, 9, 10, 12]]
    theirs = plain(inner, ends_in_pad)
    model = RewardModel(inner)
    skipping = model(pad(ends_in_pad, PAD, skip_id=PAD))
    torch.testing.assert_close(skipping, theirs, rtol=0, atol=2e-5)
    assert abs(model(pad(ends_in_pad, PAD))[0] - theirs[0]) > 1e-3
    assert pooled_position(ends_in_pad[0], PAD) == 2


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "bert"])
def test_gradients_equal_the_plain_model(family: str) -> None:
    reference = make(family, scale=2.0)
    inner = copy.deepcopy(reference)
    plain(reference, ROWS).square().sum().backward()
    RewardModel(inner)(pad(ROWS, PAD)).square().sum().backward()
    compared = 0
    for (name, ours), (_, theirs) in zip(
        inner.named_parameters(), reference.named_parameters(), strict=True
    ):
        assert (ours.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            scale = theirs.grad.norm().item()
            assert (ours.grad - theirs.grad).norm().item() <= 1e-5 * scale + 1e-7, name
            compared += scale > 0
    assert compared > 10


def test_wrapping_changes_no_parameter_and_no_name() -> None:
    inner = make("llama")
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    model = RewardModel(inner)
    after = inner.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.pools_by_position
    assert isinstance(inner.score, Float32Linear)
    assert not RewardModel(make("bert")).pools_by_position


@torch.inference_mode()
def test_a_bf16_head_would_tie_where_ours_tells_apart() -> None:
    inner = make("qwen2").bfloat16()
    with torch.no_grad():
        inner.score.weight.copy_(torch.ones_like(inner.score.weight))
    rows = [torch.randint(2, VOCAB, (12,), generator=_drawn).tolist() for _ in range(64)]
    theirs = plain(inner, rows)
    ours = RewardModel(inner)(pad(rows, PAD))
    assert ours.dtype == torch.float32
    assert theirs.dtype == torch.bfloat16
    assert inner.score.weight.dtype == torch.bfloat16
    assert theirs.unique().numel() < len(rows)
    assert ours.unique().numel() == len(rows)
    torch.testing.assert_close(ours, theirs.float(), rtol=2**-7, atol=2**-5)


@torch.inference_mode()
def test_autocast_does_not_reach_the_head() -> None:
    model = RewardModel(make("qwen2"))
    hidden = torch.randn(8, 32, generator=_drawn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model.inner.score(hidden)
        coarse = torch.nn.functional.linear(hidden, model.inner.score.weight)
    exact = torch.nn.functional.linear(hidden, model.inner.score.weight)
    assert torch.equal(ours, exact)
    assert not torch.equal(coarse.float(), exact)


@torch.inference_mode()
def test_the_stock_head_is_back_inside_its_context_only() -> None:
    inner = make("qwen2").bfloat16()
    theirs = plain(inner, ROWS)
    RewardModel(inner)
    with stock_head(inner):
        assert torch.equal(plain(inner, ROWS), theirs)
    assert isinstance(inner.score, Float32Linear)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "bert", "qwen2"])
def test_without_dropout_a_model_in_training_gives_the_rewards_of_evaluation(family: str) -> None:
    name, settings = FAMILIES[family]
    rates = {
        "gpt2": {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5},
        "gpt_neox": {"attention_dropout": 0.5, "hidden_dropout": 0.5, "classifier_dropout": 0.5},
        "opt": {"attention_dropout": 0.5, "dropout": 0.5},
        "bert": {"attention_probs_dropout_prob": 0.5, "hidden_dropout_prob": 0.5},
        "qwen2": {"attention_dropout": 0.5},
    }[family]  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**settings, **rates)
    inner = getattr(transformers, f"{name}ForSequenceClassification")(config)
    model = RewardModel(inner)
    batch = pad(ROWS, PAD)
    with torch.no_grad():
        evaluated = model.eval()(batch)
        model.train()
        assert (model(batch) - evaluated).abs().max() > 1e-3, "there is no dropout to disable"
        disable_dropout(model)
        torch.testing.assert_close(model(batch), evaluated)
