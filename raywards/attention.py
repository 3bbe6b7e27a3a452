"""Attention over a row of groups: a branch sees its prefix and itself, and nobody else.

Registered with transformers under `NAME`; the row's `Layout` travels as the keyword argument
`LAYOUT` through the decoder. No mask is registered, so no T x T tensor is ever made.

On CPUs each segment takes a flash call (a long branch several), on GPUs all take one
variable-length call together. In both, the keys of a branch's prefix stand in front of its own.

What a family does to its attention scores that is not done here (soft caps, sinks, biases, windows)
raises `UnsupportedAttention`: a wrong reward looks like any other.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raywards.errors import ModelError
from raywards.packing import Layout, Segment

NAME = "raywards"
LAYOUT = "raywards_layout"


@dataclass(frozen=True)
class Stock:
    """In a layout's place: this call is for transformers' own attention of that name."""

    name: str


class UnsupportedAttention(ModelError):
    """The model asks its attention for something that is not computed here."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers' decoders call.

    Args:
        module: The attention module, unused.
        query: [1, H, T, D], rotated by the positions of `PackedRow`.
        key, value: [1, Hkv, T, D].
        attention_mask: None: the layout says who sees whom.
        scaling: Of the scores; default: `D**-0.5`.
        dropout: Must be 0: a shared prefix would get one mask instead of one per branch.
        **kwargs: What the family passes, and the layout.

    Returns:
        The output [1, T, H, D], zero where nothing was asked, and None for the weights.
    """
    layout = kwargs.pop(LAYOUT, None)
    if isinstance(layout, Stock):
        found: tuple[Tensor, None] = _stock_function(module, layout.name)(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
        return found
    if not isinstance(layout, Layout):
        raise UnsupportedAttention(
            "this model's attention is set up for raywards' packed rows, and it was called without "
            "one. Call it through RewardModel, or undo that with RewardModel.unwrap()."
        )
    _refuse_what_is_not_computed(layout, query, value, attention_mask, dropout, kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # as it does for torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.device.type == "cpu":
        return cast(Any, _BySegment).apply(query, key, value, layout, scale), None
    return _varlen(query, key, value, layout, scale), None


AttentionInterface.register(NAME, attend)


def _stock_function(module: Any, name: str) -> Any:
    # Each family has an eager attention of its own, beside its attention module.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)


def _refuse_what_is_not_computed(
    layout: Layout,
    query: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> None:
    for name in ("softcap", "s_aux", "position_bias", "alibi", "head_mask", "past_key_values"):
        if kwargs.get(name) is not None:
            raise UnsupportedAttention(f"its attention has {name}")
    if dropout:
        raise UnsupportedAttention(f"its attention drops out weights (p={dropout:g})")
    if attention_mask is not None:
        raise UnsupportedAttention("it makes an attention mask of its own")
    window = kwargs.get("sliding_window")
    if window is not None and layout.longest_path > window:
        raise UnsupportedAttention(
            f"its attention window of {window} tokens is shorter than a sequence of "
            f"{layout.longest_path}"
        )
    if kwargs.get("is_causal") is False:
        raise UnsupportedAttention("its attention is not causal")
    if query.shape[0] != 1 or query.shape[-1] != value.shape[-1]:
        raise UnsupportedAttention("its queries and values have different sizes")


# ---------------------------------------------------------------- CPU

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
# Most queries of a call with a mask. The kernel computes what the mask hides, too: fewer of it in
# smaller calls, which are slower below this (one branch of 150 to 2000 tokens, measured).
_MASKED_QUERIES = 256


class _BySegment(torch.autograd.Function):
    """A flash call for each segment, on its prefix and itself.

    The backward is written out, so that gradients are summed in one tensor and in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float
    ) -> Tensor:
        _, heads, tokens, size = query.shape
        sparse = sum(s.query_end - s.query_start for s in layout.segments) < tokens
        out = query.new_zeros if sparse else query.new_empty
        output = out(1, tokens, heads, size).transpose(1, 2)
        lse = query.new_empty(1, heads, tokens, dtype=torch.float32)
        triangle = _triangle(layout, query.dtype)
        for segment in layout.segments:
            keys, values = _seen(key, segment), _seen(value, segment)
            for call in _calls(segment):
                asked = slice(call.query_start, call.query_end)
                output[:, :, asked], lse[:, :, asked] = _flash(
                    query[:, :, asked],
                    keys[:, :, : call.num_keys],
                    values[:, :, : call.num_keys],
                    0.0,
                    _is_causal(call),
                    attn_mask=_mask(triangle, call),
                    scale=scale,
                )
        ctx.save_for_backward(query, key, value, output, lse)
        ctx.layout, ctx.scale = layout, scale
        return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # In fp32 also for bf16: up to some 250 queries the kernel's bf16 backward takes up to four
        # times as long, and the sums over branches lose nothing.
        saved = ctx.saved_tensors  # once: under checkpointing a second look is an error
        query, key, value, output, lse = (tensor.float() for tensor in saved)
        grad_output = grads[0].float().transpose(1, 2)
        by_query, by_key, by_value = map(_zeros_by_token, (query, key, value))
        triangle = _triangle(ctx.layout, torch.float32)
        for segment in ctx.layout.segments:
            keys, values = _seen(key, segment), _seen(value, segment)
            of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
            for call in _calls(segment):
                asked = slice(call.query_start, call.query_end)
                by_query[:, :, asked], of_seen_keys, of_seen_values = _flash_backward(
                    grad_output[:, :, asked],
                    query[:, :, asked],
                    keys[:, :, : call.num_keys],
                    values[:, :, : call.num_keys],
                    output[:, :, asked],
                    lse[:, :, asked],
                    0.0,
                    _is_causal(call),
                    attn_mask=_mask(triangle, call),
                    scale=ctx.scale,
                )
                of_keys[:, :, : call.num_keys] += of_seen_keys
                of_values[:, :, : call.num_keys] += of_seen_values
            shared = segment.prefix_end - segment.prefix_start
            prefix = slice(segment.prefix_start, segment.prefix_end)
            own = slice(segment.own_start, segment.own_end)
            for total, part in ((by_key, of_keys), (by_value, of_values)):
                total[:, :, prefix] += part[:, :, :shared]
                total[:, :, own] += part[:, :, shared:]
        dtype = saved[0].dtype
        return by_query.to(dtype), by_key.to(dtype), by_value.to(dtype), None, None


def _calls(segment: Segment) -> Iterator[Segment]:
    """A segment in as many calls as the size of a mask allows."""
    count = segment.query_end - segment.query_start
    step = count if _is_causal(segment) else _MASKED_QUERIES
    for start in range(0, count, step):
        end = min(start + step, count)
        yield segment._replace(
            query_start=segment.query_start + start,
            query_end=segment.query_start + end,
            own_end=segment.own_end - (count - end),
        )


def _is_causal(segment: Segment) -> bool:
    """Whether the kernel's own triangle says what the queries see: it has no keys before it."""
    return segment.query_end - segment.query_start == segment.num_keys


def _seen(source: Tensor, segment: Segment) -> Tensor:
    """Keys or values [1, Hkv, K, D] of a segment."""
    _, _, prefix_start, prefix_end, own_start, own_end = segment
    if prefix_start == prefix_end:
        return source[:, :, own_start:own_end]
    if prefix_end == own_start:
        return source[:, :, prefix_start:own_end]
    return torch.cat([source[:, :, prefix_start:prefix_end], source[:, :, own_start:own_end]], 2)


@lru_cache(maxsize=4)
def _triangle(layout: Layout, dtype: torch.dtype) -> Tensor:
    """What the masks of a layout's calls are cut from: 0 where a key is seen, -inf above that."""
    sizes = [
        (call.query_end - call.query_start, call.num_keys)
        for segment in layout.segments
        for call in _calls(segment)
        if not _is_causal(call)
    ]
    rows = max((count for count, _ in sizes), default=0)
    before = max((keys - count for count, keys in sizes), default=0)
    return torch.full((rows, before + rows), float("-inf"), dtype=dtype).triu_(before + 1)


def _mask(triangle: Tensor, segment: Segment) -> Tensor | None:
    """[Q, K], causal and aligned at the end; None where the kernel does without: a last query sees
    everything."""
    count = segment.query_end - segment.query_start
    if count == 1 or _is_causal(segment):
        return None
    before = triangle.shape[1] - triangle.shape[0]  # columns that all rows see
    return triangle[:count, before + count - segment.num_keys : before + count]


def _zeros_by_token(like: Tensor) -> Tensor:
    """Zeros [1, H, T, D] that lie in memory token by token, as the projections want them."""
    _, heads, tokens, size = like.shape
    return like.new_zeros(1, tokens, heads, size).transpose(1, 2)


# ---------------------------------------------------------------- GPU (not run on one yet)


def _varlen(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """One variable-length flash call. Needs half precision, as flash attention does."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        raise UnsupportedAttention(
            f"there is no packed attention for {query.dtype} on {query.device.type}"
        )
    return _one_call(query, key, value, _places_on(layout, query.device), scale)


def _one_call(query: Tensor, key: Tensor, value: Tensor, places: _Places, scale: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    queries, keys, values = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    asked = queries if places.asked is None else queries.index_select(0, places.asked)
    gather = cast(Any, _Gather).apply
    found = varlen_attn(
        asked,
        gather(keys, places),
        gather(values, places),
        places.query_ends,
        places.key_ends,
        places.most_queries,
        places.most_keys,
        scale=scale,
        window_size=(-1, 0),  # causal, aligned at the end
        enable_gqa=keys.shape[1] != queries.shape[1],
    )
    output = cast(Tensor, found)
    if places.asked is not None:
        # Each place once, so the sum in the backward of this has one term: deterministic.
        output = torch.zeros_like(queries).index_copy(0, places.asked, output)
    return output[None]


class _Places:
    """A layout as index tensors on a device."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        table = torch.tensor(layout.segments)
        query_start, query_end, prefix_start, prefix_end, own_start, own_end = table.unbind(1)
        num_queries = query_end - query_start
        num_keys = prefix_end - prefix_start + own_end - own_start
        pieces = torch.stack([prefix_start, prefix_end, own_start, own_end], 1).view(-1, 2)
        self.seen = _ranges(pieces[:, 0], pieces[:, 1]).to(device)
        """[K]: places of the keys, segment after segment."""
        asked = _ranges(query_start, query_end).to(device)
        self.asked = None if layout.pooled is not None else asked
        """[Q]: places of the queries; None: all of the row."""
        self.query_ends = _ends(num_queries).to(device)
        self.key_ends = _ends(num_keys).to(device)
        self.most_queries = int(num_queries.max())
        self.most_keys = int(num_keys.max())

    @cached_property
    def copies(self) -> Tensor:
        """[places seen, most copies]: where in `seen` each place went, filled up with K."""
        order = torch.argsort(self.seen, stable=True)
        counts = torch.bincount(self.seen)
        starts = counts.cumsum(0) - counts
        place = self.seen[order]
        turn = torch.arange(len(order), device=order.device) - starts[place]
        filled = order.new_full((len(counts), int(counts.max())), len(order))
        return filled.index_put((place, turn), order)


@lru_cache(maxsize=4)
def _places_on(layout: Layout, device: torch.device) -> _Places:
    return _Places(layout, device)


def _ranges(starts: Tensor, ends: Tensor) -> Tensor:
    """`range(start, end)` of each pair, end to end."""
    lengths = ends - starts
    before = lengths.cumsum(0) - lengths
    offsets = torch.repeat_interleave(starts - before, lengths)
    return offsets + torch.arange(len(offsets))


def _ends(lengths: Tensor) -> Tensor:
    """0 and the running sums, as flash attention takes them."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


class _Gather(torch.autograd.Function):
    """`source[places.seen]`, whose backward adds the copies of a token in a fixed order.

    The backward of `index_select` adds them as they come on a GPU: other bits in every run.
    """

    @staticmethod
    def forward(ctx: Any, source: Tensor, places: _Places) -> Tensor:
        ctx.places, ctx.num_tokens = places, len(source)
        return source.index_select(0, places.seen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.cat([grads[0], torch.zeros_like(grads[0][:1])])
        summed = grad[ctx.places.copies].float().sum(1).to(grad.dtype)
        if len(summed) < ctx.num_tokens:  # the row's last tokens, which nobody sees
            rest = summed.new_zeros(ctx.num_tokens - len(summed), *summed.shape[1:])
            summed = torch.cat([summed, rest])
        return summed, None
