"""Attention over a row: a naive masked softmax, forward and backward, and what must be refused."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import example, given, settings
from packed_rows import EDGES, Grouped, grouped, seen_by
from torch import Tensor

from raywards import attention
from raywards.attention import LAYOUT, NAME, UnsupportedAttention, attend
from raywards.model import RewardModel
from raywards.packing import Group, Layout, PackedRow, pack, pack_alone, pack_groups

pytestmark = pytest.mark.trains

torch.set_num_threads(1)  # tensors this small: two threads would wait for each other

QKV = tuple[Tensor, Tensor, Tensor]


def row_of(*groups: tuple[int, list[int]]) -> PackedRow:
    """A row of groups, each the length of its prefix and those of its branches; tokens differ."""
    sequences: list[list[int]] = []
    planned = []
    for number, (split, branches) in enumerate(groups):
        members = range(len(sequences), len(sequences) + len(branches))
        for i, own in enumerate(branches):
            sequences.append([number] * split + [100 + i] * own)
        planned.append(Group(split, tuple(members)))
    return pack(sequences, planned)


ROWS = {
    "one sequence": row_of((0, [7])),
    "one token": row_of((0, [1])),
    "nothing shared": row_of((0, [5]), (0, [1]), (0, [40])),
    "a pair": row_of((6, [5, 9])),
    "one-token branches": row_of((6, [1, 1, 1])),
    "one-token prefix": row_of((1, [5, 1])),
    "an empty branch": row_of((6, [0, 4]), (3, [0])),
    "an identical pair": row_of((6, [0, 0])),
    "many branches": row_of((11, [1 + i % 5 for i in range(24)])),
    "longer than a block": row_of((70, [33, 150]), (0, [90]), (200, [1, 64])),
    "everything": row_of((6, [5, 9]), (0, [4]), (1, [1, 0, 30]), (9, [1])),
}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))


def draw(tokens: int, *, heads: int = 4, kv_heads: int = 2, size: int = 8, seed: int = 0) -> QKV:
    """Queries, keys and values whose softmax is neither flat nor a single one."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, n, tokens, size) for n in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return (2 * query).requires_grad_(), key.requires_grad_(), value.requires_grad_()


def naive(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """[1, T, H, D]: softmax over the keys that each place sees, one mask of T x T; in fp64."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    tokens, repeats = query.shape[2], query.shape[1] // key.shape[1]
    sees = torch.zeros(tokens, tokens, dtype=torch.bool)
    for place in range(tokens):
        sees[place, seen_by(layout, place) or []] = True
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(2, 3) * scale).masked_fill(~sees, -torch.inf)
    asked = sees.any(1)[:, None]
    weights = torch.where(asked, scores, 0.0).softmax(-1) * asked
    return (weights @ value).transpose(1, 2)


def call(query: Tensor, key: Tensor, value: Tensor, layout: Layout, **kwargs: Any) -> Tensor:
    output, weights = attend(None, query, key, value, None, **{LAYOUT: layout}, **kwargs)
    assert weights is None
    return output


def gradients(output: Tensor, inputs: QKV, seed: int = 1) -> list[Tensor]:
    """Of a loss that weighs every number of the output differently."""
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed))
    return list(torch.autograd.grad((output.double() * weight).sum(), inputs))


def off(ours: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest number there is."""
    assert ours.shape == right.shape
    scale = right.abs().max().item()
    return (ours.double() - right.double()).abs().max().item() / (scale or 1.0)


def check(layout: Layout, inputs: QKV, *, bound: float = 1e-5) -> None:
    scale = inputs[0].shape[-1] ** -0.5
    ours, right = call(*inputs, layout), naive(*inputs, layout, scale)
    assert off(ours, right) <= bound
    pairs = zip(gradients(ours, inputs), gradients(right, inputs), strict=True)
    for name, (our, their) in zip(("query", "key", "value"), pairs, strict=True):
        assert off(our, their) <= bound, name


# ---------------------------------------------------------------- on CPUs


@each_row
def test_outputs_and_gradients_are_those_of_a_masked_softmax(row: PackedRow) -> None:
    check(row.layout, draw(len(row.input_ids)))


@each_row
def test_where_only_pooled_places_ask_the_rest_is_zero(row: PackedRow) -> None:
    pooled = row.layout.pooled
    assert pooled is not None
    inputs = draw(len(row.input_ids))
    check(pooled, inputs)
    output = call(*inputs, pooled)
    asked = sorted(set(row.pooled.tolist()))
    assert all(output[0, place].abs().min() > 0 for place in asked)
    rest = [place for place in range(len(row.input_ids)) if place not in asked]
    assert output[0, rest].abs().sum() == 0
    torch.testing.assert_close(output[0, asked], call(*inputs, row.layout)[0, asked])


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1), (6, 2), (1, 1), (14, 2)])
def test_heads_share_keys_as_grouped_queries_do(heads: int, kv_heads: int) -> None:
    row = ROWS["everything"]
    check(row.layout, draw(len(row.input_ids), heads=heads, kv_heads=kv_heads))


@pytest.mark.parametrize("size", [8, 16, 40, 64, 128])
def test_any_head_size(size: int) -> None:
    row = ROWS["everything"]
    check(row.layout, draw(len(row.input_ids), size=size))


@settings(max_examples=30, deadline=None)
@given(grouped())
@example(EDGES[0])
@example(EDGES[-1])
def test_any_row(case: Grouped) -> None:
    row = pack(*case)
    inputs = draw(len(row.input_ids))
    assert row.layout.pooled is not None
    check(row.layout, inputs)
    check(row.layout.pooled, inputs)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_apart_neither_overflow_nor_vanish(sign: int) -> None:
    """The prefix holds all of the weight, or none that fp32 could tell."""
    row = row_of((6, [5, 9]))
    query, key, value = (tensor.detach().clone() for tensor in draw(len(row.input_ids)))
    query[..., 0], key[:, :, :6, 0] = 30.0, 30.0 * sign  # 318 more, or less, than other scores
    inputs = (query.requires_grad_(), key.requires_grad_(), value.requires_grad_())
    scale = 8**-0.5
    ours, right = call(*inputs, row.layout), naive(*inputs, row.layout, scale)
    torch.testing.assert_close(ours.double(), right, rtol=0, atol=1e-4)
    for our, their in zip(gradients(ours, inputs), gradients(right, inputs), strict=True):
        assert our.isfinite().all()
        torch.testing.assert_close(our.double(), their.double(), rtol=0, atol=5e-3)


def test_the_scaling_of_the_family_is_used() -> None:
    row = ROWS["a pair"]
    inputs = draw(len(row.input_ids))
    ours = call(*inputs, row.layout, scaling=0.9)
    assert off(ours, naive(*inputs, row.layout, 0.9)) <= 2e-6
    assert off(ours, call(*inputs, row.layout)) > 0.05
    for our, their in zip(
        gradients(ours, inputs), gradients(naive(*inputs, row.layout, 0.9), inputs), strict=True
    ):
        assert off(our, their) <= 2e-6


def test_tensors_as_the_projections_lay_them_out_give_the_same() -> None:
    """[1, T, H, D] transposed, as transformers' decoders do: not contiguous."""
    row = ROWS["everything"]
    inputs = draw(len(row.input_ids))
    strided = tuple(
        tensor.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for tensor in inputs
    )
    assert not strided[0].is_contiguous()
    ours, same = call(*strided, row.layout), call(*inputs, row.layout)
    torch.testing.assert_close(ours, same, rtol=1e-6, atol=1e-6)
    for one, other in zip(gradients(ours, strided), gradients(same, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@each_row
def test_in_bf16_it_is_as_close_as_the_rounding_of_bf16(row: PackedRow) -> None:
    """Against the exact result of the same rounded inputs; the yardstick is torch's own kernel."""
    exact_inputs = tuple(tensor.detach().bfloat16() for tensor in draw(len(row.input_ids)))
    inputs = tuple(tensor.clone().requires_grad_() for tensor in exact_inputs)
    layout = row.layout
    ours, right = call(*inputs, layout), naive(*inputs, layout, 8**-0.5)
    assert ours.dtype == torch.bfloat16
    # One rounding of the output, and of the weights inside the kernel: 2**-8 each, of the largest.
    assert off(ours, right) <= 3 * 2**-8
    pairs = zip(gradients(ours, inputs), gradients(right, inputs), strict=True)
    for our, their in pairs:
        assert our.dtype == torch.bfloat16
        assert off(our, their) <= 4 * 2**-8


@pytest.mark.parametrize("most", [1, 4, 7, 128])
def test_a_branch_of_more_queries_than_a_mask_may_have_is_cut(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_MASKED_QUERIES", most)
    attention._triangle.cache_clear()
    masks: list[Tensor | None] = []
    flash = attention._flash

    def spy(*args: Any, attn_mask: Tensor | None, **kwargs: Any) -> Any:
        masks.append(attn_mask)
        return flash(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(attention, "_flash", spy)
    row = row_of((6, [5, 9]), (0, [20]))
    check(row.layout, draw(len(row.input_ids)))
    assert max((mask.shape[0] for mask in masks if mask is not None), default=1) <= most
    # A prefix and a lone sequence are causal to the kernel: one call each, whatever their length.
    assert len(masks) == 2 + -(-5 // most) + -(-9 // most)
    attention._triangle.cache_clear()


def test_an_identical_pair_counts_twice_in_the_gradient() -> None:
    row = ROWS["an identical pair"]
    assert row.pooled.tolist() == [5, 5]
    inputs = draw(6)

    def of(pooled: list[int]) -> list[Tensor]:
        rewards = call(*inputs, row.layout)[0, pooled].sum((1, 2))
        return list(torch.autograd.grad(rewards.sum(), inputs))

    for twice, once in zip(of([5, 5]), of([5]), strict=True):
        torch.testing.assert_close(twice, 2 * once)
        assert once.abs().max() > 0


# ---------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "softcap": ({"softcap": 50.0}, "softcap"),
    "sinks": ({"s_aux": torch.zeros(4)}, "s_aux"),
    "position bias": ({"position_bias": torch.zeros(1)}, "position_bias"),
    "a cache": ({"past_key_values": object()}, "past_key_values"),
    "dropout": ({"dropout": 0.1}, r"p=0\.1"),
    "a window": ({"sliding_window": 14}, "window of 14 tokens is shorter than a sequence of 15"),
    "both ways": ({"is_causal": False}, "not causal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused(case: str) -> None:
    kwargs, words = REFUSED[case]
    row = ROWS["a pair"]
    assert row.layout.longest_path == 15
    with pytest.raises(UnsupportedAttention, match=words):
        call(*draw(len(row.input_ids)), row.layout, **kwargs)


def test_what_changes_nothing_is_taken() -> None:
    row = ROWS["a pair"]
    inputs = draw(len(row.input_ids))
    expected = call(*inputs, row.layout)
    for kwargs in (
        {"sliding_window": 15}, {"sliding_window": None}, {"softcap": None, "s_aux": None},
        {"dropout": 0.0}, {"is_causal": True, "position_ids": row.positions[None]},
    ):  # fmt: skip
        assert torch.equal(call(*inputs, row.layout, **kwargs), expected)


def test_a_mask_or_a_second_row_or_values_of_another_size_are_refused() -> None:
    row = ROWS["a pair"]
    query, key, value = draw(len(row.input_ids))
    with pytest.raises(UnsupportedAttention, match="mask of its own"):
        attend(None, query, key, value, torch.ones(1, 1, 20, 20), **{LAYOUT: row.layout})
    with pytest.raises(UnsupportedAttention, match="different sizes"):
        call(query, key, value[..., :4], row.layout)
    with pytest.raises(UnsupportedAttention):
        call(*(tensor.expand(2, -1, -1, -1) for tensor in (query, key, value)), row.layout)


def test_without_a_layout_it_says_who_must_call_it() -> None:
    query, key, value = draw(4)
    with pytest.raises(UnsupportedAttention, match=r"RewardModel\.unwrap\(\)"):
        attend(None, query, key, value, None)


# ---------------------------------------------------------------- the traps, in whole models

VOCAB, PAD = 64, 1
TINY: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "num_labels": 1, "pad_token_id": PAD, "head_dim": 8,
}  # fmt: skip

_drawn = torch.Generator().manual_seed(5)
PROMPT, CHOSEN, REJECTED = (
    torch.randint(2, VOCAB, (n,), generator=_drawn).tolist() for n in (12, 5, 9)
)
PAIR = [PROMPT + CHOSEN, PROMPT + REJECTED]


def make(family: str, **config: Any) -> Any:
    """A tiny random classifier with weights so large that its rewards and scores are far apart."""
    torch.manual_seed(3)
    settings = {**TINY, **config}
    model = getattr(transformers, f"{family}ForSequenceClassification")(
        getattr(transformers, f"{family}Config")(**settings)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 6.0
    return model


@torch.inference_mode()
def alone(inner: Any, sequences: list[list[int]]) -> Tensor:
    """Rewards by plain transformers, one sequence at a time."""
    return torch.cat([inner(input_ids=torch.tensor([ids])).logits[:, 0] for ids in sequences])


@pytest.fixture
def no_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is refused: what the guard is there for."""
    monkeypatch.setattr(attention, "_refuse_what_is_not_computed", lambda *_: None)


def packed_rewards(inner: Any, row: PackedRow) -> Tensor:
    """By our attention, whatever a RewardModel would have chosen."""
    inner.set_attn_implementation(NAME)
    hidden = inner.model(
        input_ids=row.input_ids[None], position_ids=row.positions[None], use_cache=False,
        **{LAYOUT: row.layout},
    ).last_hidden_state  # fmt: skip
    rewards: Tensor = inner.score(hidden[0, row.pooled])[:, 0].detach()
    return rewards


@torch.inference_mode()
def test_positions_that_start_again_are_not_enough_for_stock_transformers() -> None:
    """[prompt | chosen | rejected] with the right positions, and no mask and no layout."""
    inner = make("Qwen2")
    right = alone(inner, PAIR)
    row = pack_groups([PAIR])
    hidden = inner.model(
        input_ids=row.input_ids[None], position_ids=row.positions[None], use_cache=False
    ).last_hidden_state
    wrong = inner.score(hidden[0, row.pooled])[:, 0]
    assert abs(wrong[0] - right[0]) < 1e-4  # chosen stands behind its prompt
    assert abs(wrong[1] - right[1]) > 0.1  # rejected does not, and nobody says so
    assert off(RewardModel(inner)(row), right) < 1e-5


@pytest.mark.parametrize("window", [12, 20])
@torch.inference_mode()
def test_a_window_shorter_than_a_sequence_takes_the_padded_path(
    window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = make("Mistral", sliding_window=window)
    right = alone(inner, PAIR)
    model = RewardModel(inner)
    row = pack_groups([PAIR])
    assert row.layout.longest_path == 21
    assert off(model(row), right) < 1e-5
    # The guard of the model taken away, that of attention speaks; both away, rewards are wrong.
    monkeypatch.setattr(model, "window", math.inf)
    with pytest.raises(UnsupportedAttention, match=f"window of {window}"):
        model(row)
    monkeypatch.setattr(attention, "_refuse_what_is_not_computed", lambda *_: None)
    assert off(model(row), right) > 1e-3


@torch.inference_mode()
def test_a_window_as_long_as_the_longest_sequence_cuts_nothing() -> None:
    inner = make("Mistral", sliding_window=21)
    right = alone(inner, PAIR)
    model = RewardModel(inner)
    row = pack_groups([PAIR])
    assert model._path_of(row) == "packed"
    assert off(model(row), right) < 1e-5
    assert len(row.input_ids) > 21  # the row is longer than the window, and may be


@torch.inference_mode()
def test_capped_scores_are_refused_and_would_be_wrong(no_guard: None) -> None:
    inner = make("Gemma2", attn_logit_softcapping=1.0)
    right = alone(inner, PAIR)
    wrong = packed_rewards(inner, pack_groups([PAIR]))
    assert off(wrong, right) > 1e-3


@torch.inference_mode()
def test_sinks_are_refused_and_would_be_wrong(no_guard: None) -> None:
    inner = make("GptOss", num_local_experts=2, num_experts_per_tok=1)
    with torch.no_grad():
        for layer in inner.model.layers:
            layer.self_attn.sinks.fill_(2.0)
    right = alone(inner, PAIR)
    wrong = packed_rewards(inner, pack_groups([PAIR]))
    assert off(wrong, right) > 1e-3


def test_dropout_of_attention_takes_the_padded_path_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = RewardModel(make("Qwen2", attention_dropout=0.5)).eval()
    row = pack_groups([PAIR])
    with torch.no_grad():
        evaluated = model(row)
        assert model._path_of(row) == "packed"
        model.train()
        torch.manual_seed(0)
        dropped = model(row)
        torch.manual_seed(0)
        model.use("padded")
        assert torch.equal(model(row), dropped)
        assert (dropped - evaluated).abs().min() > 1e-3
        model.use("packed")
        # Guards gone: attention refuses; that gone too, nothing is dropped out and nobody says so.
        monkeypatch.setattr("raywards.model._drops_out", lambda _: False)
        with pytest.raises(UnsupportedAttention, match=r"p=0\.5"):
            model(row)
        monkeypatch.setattr(attention, "_refuse_what_is_not_computed", lambda *_: None)
        torch.testing.assert_close(model(row), evaluated)


@torch.inference_mode()
def test_a_response_that_begins_the_other_and_two_equal_ones_have_their_rewards() -> None:
    inner = make("Qwen2")
    sequences = [PROMPT, PROMPT + CHOSEN, PROMPT + CHOSEN, PROMPT + CHOSEN]
    right = alone(inner, sequences)
    model = RewardModel(inner)
    begins = pack_groups([sequences[:2], sequences[2:]])
    assert len(begins.input_ids) == 17 + 17  # the second pair is stored once
    assert off(model(begins), right) < 1e-5
    assert off(model(pack(sequences, [Group(12, (0, 1, 2, 3))])), right) < 1e-5


@torch.inference_mode()
def test_a_response_that_ends_in_the_pad_token_is_pooled_there_unless_it_is_skipped() -> None:
    """Where pad is EOS, transformers pools the token before it: here in the shared prefix."""
    inner = make("Qwen2")
    pair = [[*PROMPT, PAD], PROMPT + CHOSEN]
    theirs = alone(inner, pair)
    with torch.no_grad():
        hidden = inner.model(input_ids=torch.tensor([pair[0]])).last_hidden_state
        last = inner.score(hidden[:, -1])[0, 0]
    assert abs(last - theirs[0]) > 0.01
    model = RewardModel(inner)
    groups = [Group(12, (0, 1))]
    row = pack(pair, groups)
    skipping = pack(pair, groups, skip_id=PAD)
    assert skipping.pooled[0] == 11
    assert off(model(skipping), theirs) < 1e-5
    assert abs(model(row)[0] - last) < 1e-4


# ---------------------------------------------------------------- the GPU's gather, on a CPU


def varlen_reference(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor,
    most_queries: int, most_keys: int, *,
    scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> Tensor:  # fmt: skip
    """What `varlen_attn` is documented to compute, with the causal mask aligned at the end."""
    assert window_size == (-1, 0)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert query_ends.dtype == key_ends.dtype == torch.int32
    ends = zip(query_ends.tolist(), key_ends.tolist(), strict=True)
    output, lengths = [], []
    before = next(ends)
    assert before == (0, 0)
    for end in ends:
        asked, seen = (slice(a, b) for a, b in zip(before, end, strict=True))
        lengths.append((end[0] - before[0], end[1] - before[1]))
        before = end
        count, total = lengths[-1]
        mask = torch.ones(count, total, dtype=torch.bool).tril(total - count)
        parts = (query[asked], key[seen], value[seen])
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(part.transpose(0, 1) for part in parts), mask, scale=scale, enable_gqa=enable_gqa
        )
        output.append(attended.transpose(0, 1))
    assert before == (len(query), len(key))
    assert (most_queries, most_keys) == tuple(max(column) for column in zip(*lengths, strict=True))
    return torch.cat(output)


@pytest.fixture
def plain_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's code with a kernel of plain PyTorch."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_reference)


def places_of(layout: Layout) -> attention._Places:
    return attention._Places(layout, torch.device("cpu"))


def one_call(inputs: QKV, layout: Layout) -> Tensor:
    return attention._one_call(*inputs, places_of(layout), inputs[0].shape[-1] ** -0.5)


@each_row
@pytest.mark.parametrize("pooled", [False, True])
def test_one_variable_length_call_gives_outputs_and_gradients_of_a_masked_softmax(
    row: PackedRow, pooled: bool, plain_kernel: None
) -> None:
    layout = row.layout.pooled if pooled else row.layout
    assert layout is not None
    inputs = draw(len(row.input_ids))
    ours, right = one_call(inputs, layout), naive(*inputs, layout, 8**-0.5)
    assert off(ours, right) <= 2e-6
    for our, their in zip(gradients(ours, inputs), gradients(right, inputs), strict=True):
        assert off(our, their) <= 2e-6


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1)])
def test_one_variable_length_call_shares_keys_as_grouped_queries_do(
    heads: int, kv_heads: int, plain_kernel: None
) -> None:
    row = ROWS["everything"]
    inputs = draw(len(row.input_ids), heads=heads, kv_heads=kv_heads)
    assert off(one_call(inputs, row.layout), naive(*inputs, row.layout, 8**-0.5)) <= 2e-6


def layout_and_places(row: PackedRow, pooled: bool) -> tuple[Layout, Any]:
    layout = row.layout.pooled if pooled else row.layout
    assert layout is not None
    return layout, places_of(layout)


@each_row
@pytest.mark.parametrize("pooled", [False, True])
def test_places_hold_what_each_segment_sees(row: PackedRow, pooled: bool) -> None:
    layout, places = layout_and_places(row, pooled)
    queries = list(range(len(row.input_ids))) if places.asked is None else places.asked.tolist()
    assert (places.asked is None) == (not pooled)  # a whole row need not be gathered
    query_ends, key_ends = places.query_ends.tolist(), places.key_ends.tolist()
    for index, segment in enumerate(layout.segments):
        last = queries[query_ends[index] : query_ends[index + 1]][-1]
        assert places.seen[key_ends[index] : key_ends[index + 1]].tolist() == seen_by(layout, last)
        assert last == segment.query_end - 1
    assert len(places.seen) == key_ends[-1]


@each_row
@pytest.mark.parametrize("pooled", [False, True])
def test_the_gather_is_an_index_select_forward_and_backward(row: PackedRow, pooled: bool) -> None:
    _layout, places = layout_and_places(row, pooled)
    generator = torch.Generator().manual_seed(2)
    source = torch.randn(len(row.input_ids), 2, 3, generator=generator).requires_grad_()
    ours = attention._Gather.apply(source, places)
    theirs = source.index_select(0, places.seen)
    assert torch.equal(ours, theirs)
    weight = torch.randn(theirs.shape, generator=generator)
    [our] = torch.autograd.grad((ours * weight).sum(), source)
    [their] = torch.autograd.grad((theirs * weight).sum(), source)
    torch.testing.assert_close(our, their)


@each_row
@pytest.mark.parametrize("pooled", [False, True])
def test_copies_list_every_place_of_every_token(row: PackedRow, pooled: bool) -> None:
    _layout, places = layout_and_places(row, pooled)
    seen = places.seen.tolist()
    expected = [[p for p, token in enumerate(seen) if token == t] for t in range(max(seen) + 1)]
    most = max(map(len, expected))
    filled = [of_token + [len(seen)] * (most - len(of_token)) for of_token in expected]
    assert places.copies.tolist() == filled


def test_a_token_that_is_passed_over_has_no_copies() -> None:
    places = places_of(ROWS["a pair"].layout)
    places.seen = torch.tensor([0, 1, 0, 1, 3, 0])
    assert places.copies.tolist() == [[0, 2, 5], [1, 3, 6], [6, 6, 6], [4, 6, 6]]


def test_copies_are_listed_for_a_backward_alone(plain_kernel: None) -> None:
    row = ROWS["a pair"]
    inputs, places = draw(len(row.input_ids)), places_of(row.layout)
    output = attention._one_call(*inputs, places, 1.0)
    assert "copies" not in vars(places)
    output.sum().backward()
    assert "copies" in vars(places)


def test_tokens_that_nobody_sees_get_no_gradient() -> None:
    """Behind the last pooled place of a row, where the last id was skipped."""
    row = pack_alone([[5, 6, PAD, PAD]], skip_id=PAD)
    assert row.layout.pooled is not None
    places = places_of(row.layout.pooled)
    assert len(places.copies) == 2
    source = torch.ones(4, 2, 3, requires_grad=True)
    attention._Gather.apply(source, places).sum().backward()
    assert source.grad is not None
    assert source.grad[:, 0, 0].tolist() == [1, 1, 0, 0]


def test_sums_over_copies_are_in_fp32_also_for_bf16() -> None:
    """Adding ones in bf16 stops at 256."""
    row = row_of((1, [1] * 299))
    places = places_of(row.layout)
    source = torch.ones(len(row.input_ids), 1, 1, dtype=torch.bfloat16, requires_grad=True)
    attention._Gather.apply(source, places).sum().backward()
    assert source.grad is not None
    assert source.grad[0, 0, 0].item() == 300


@pytest.mark.parametrize(
    ("device", "dtype"),
    [("cuda", torch.float32), ("cuda", torch.float64), ("mps", torch.bfloat16)],
)
def test_a_device_or_a_type_without_a_kernel_is_refused(device: str, dtype: torch.dtype) -> None:
    query: Any = SimpleNamespace(device=SimpleNamespace(type=device), dtype=dtype)
    with pytest.raises(UnsupportedAttention, match=rf"{dtype} on {device}"):
        attention._varlen(query, query, query, ROWS["a pair"].layout, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@each_row
def test_on_a_gpu_outputs_and_gradients_are_those_of_a_masked_softmax(row: PackedRow) -> None:
    rounded = [tensor.detach().bfloat16() for tensor in draw(len(row.input_ids), size=64)]
    inputs = tuple(tensor.cuda().requires_grad_() for tensor in rounded)
    for layout in (row.layout, row.layout.pooled):
        assert layout is not None
        ours = call(*inputs, layout)
        exact = tuple(tensor.clone().requires_grad_() for tensor in rounded)
        right = naive(*exact, layout, 64**-0.5)
        assert off(ours.cpu(), right) <= 3 * 2**-8
        weight = torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad((ours.double() * weight.cuda()).sum(), inputs)
        for our, their in zip(found, gradients(right, exact), strict=True):
            assert off(our.cpu(), their) <= 4 * 2**-8
        again = torch.autograd.grad((call(*inputs, layout).double() * weight.cuda()).sum(), inputs)
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
