"""A reward with the same bits alone and among a thousand, on a CPU.

Three things make a token's bits depend on its neighbours in a row. A GEMM sums over its inner
dimension in another order for another number of rows (oneDNN in bf16, MKL in fp32), so here each
one has the same number: `_TILE`. SiLU, sigmoid and the tanh GELU round otherwise in the last, not
full vector of a thread's share, so here they are made of operations that do not. And attention
depends on where a sequence is split, which follows from the sequence alone (`Rendering.split`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import GELUTanh, SiLUActivation

from raywards.errors import ConfigError
from raywards.model import Float32Linear, RewardModel
from raywards.packing import Group, PackedRow, pack

# Larger tiles waste more on a short row, smaller ones more on every row (bench/kernels.py).
_TILE = 256


class TiledLinear(nn.Linear):
    """A linear layer that multiplies `_TILE` rows at a time, the last filled up with zeros."""

    def forward(self, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, hidden.shape[-1])
        output = rows.new_empty(len(rows), self.out_features)
        for start in range(0, len(rows), _TILE):
            tile = rows[start : start + _TILE]
            missing = _TILE - len(tile)
            if missing:
                tile = functional.pad(tile, (0, 0, 0, missing))
            output[start : start + _TILE] = functional.linear(tile, self.weight, self.bias)[
                : _TILE - missing
            ]
        return output.view(*hidden.shape[:-1], self.out_features)


class InvariantSiLU(nn.Module):
    """`x / (1 + exp(-x))`."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden / (1 + torch.exp(-hidden))


class InvariantGELUTanh(nn.Module):
    """The tanh approximation of Hendrycks and Gimpel (arXiv 1606.08415)."""

    def forward(self, hidden: Tensor) -> Tensor:
        inner = math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)
        return 0.5 * hidden * (1 + torch.tanh(inner))


_INVARIANT: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TiledLinear,
    nn.SiLU: InvariantSiLU,
    SiLUActivation: InvariantSiLU,
    GELUTanh: InvariantGELUTanh,
}


# What holds weights of two and more dimensions, and gives a token the same bits in any row.
_HOLDERS = (TiledLinear, Float32Linear, nn.Embedding)


def make_invariant(model: RewardModel) -> None:
    """Compute `model` so that a reward has the same bits whatever else is in its row.

    Same parameters and names; for scoring, not for training, and for sequences of at most
    `most_tokens(model)`. Raises `ConfigError`, and leaves the model as it was, where it has parts
    that this does not reach, pads, or is not on a CPU.
    """
    device = next(model.parameters()).device.type
    if device != "cpu":
        raise _refusal(model, f"on {device} has no bit-exact forward")
    if model.path != "packed":
        raise _refusal(model, f"takes {model.path} rows, which have no bit-exact forward")
    replaced = [(module, type(module)) for module in model.modules() if type(module) in _INVARIANT]
    for module, kind in replaced:
        module.__class__ = _INVARIANT[kind]
    problem = _not_reached(model)
    if problem is None and not is_invariant(model):
        problem = "still gives other bits beside other sequences"
    if problem is not None:
        for module, kind in replaced:
            module.__class__ = kind
        raise _refusal(model, problem)


def most_tokens(model: RewardModel) -> float:
    """Tokens of the longest sequence whose reward is invariant: a longer one is padded."""
    return min(model.window, model.max_tokens)


def _not_reached(model: RewardModel) -> str | None:
    for name, module in model.named_modules():
        matrices = [
            parameter for parameter in module.parameters(recurse=False) if parameter.ndim > 1
        ]
        if matrices and not isinstance(module, _HOLDERS):
            return f"multiplies in {name} ({type(module).__name__}), which is not known to be exact"
    return None


def _refusal(model: RewardModel, problem: str) -> ConfigError:
    return ConfigError(
        f"deterministic=True: {type(model.inner).__name__} {problem}. Leave it out: "
        "`info['bound']` says how far a reward may move."
    )


@torch.inference_mode()
def is_invariant(model: RewardModel) -> bool:
    """Whether sequences of a probe have the same reward, to the bit, alone and together."""
    sequences, groups = _probe(model)
    together = model(pack(sequences, groups))
    alone = [model(row) for row in _rows_of_one(sequences, groups)]
    return torch.equal(together, torch.cat(alone))


def _rows_of_one(sequences: list[list[int]], groups: list[Group]) -> list[PackedRow]:
    return [
        pack(sequences, [Group(group.split, (member,))])
        for group in groups
        for member in group.members
    ]


def _probe(model: RewardModel) -> tuple[list[list[int]], list[Group]]:
    """Lengths on both sides of a tile and of a vector, from ids that are nobody's text."""
    config: Any = model.inner.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    positions = getattr(config, "max_position_embeddings", None) or math.inf
    longest = min(most_tokens(model), positions)

    def ids(count: int) -> list[int]:
        return torch.randint(config.vocab_size, (count,), generator=generator).tolist()

    sequences: list[list[int]] = []
    groups: list[Group] = []
    prompts = [ids(37), ids(150), []]
    for prompt, lengths in zip(prompts, ([1, 5, 31, 64], [17, 130, 3], [1, 9, 200]), strict=True):
        some = [prompt + ids(length) for length in lengths if len(prompt) + length <= longest]
        members = range(len(sequences), len(sequences) + len(some))
        sequences += some
        if prompt and some:
            groups.append(Group(len(prompt), tuple(members)))
        else:
            groups += [Group(0, (member,)) for member in members]
    return sequences, groups
