"""RewardModel: one forward for training, evaluation, Scorer and replicas.

It wraps a transformers sequence classifier with one label. Decoders are pooled by position and the
head is computed in fp32; encoders and other classes run their own forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from raywards.packing import Batch


class Float32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever the type of its weights.

    A bf16 head rounds rewards to 8 bits: near 10, one pair in twenty ties.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float(), bias)


class RewardModel(nn.Module):
    """A batch of sequences to one fp32 reward each.

    `inner` is the transformers model: save that one. Its `score` layer, where it has one, is made
    to compute in fp32; names and values of its parameters do not change.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        head = getattr(inner, "score", None)
        self.pools_by_position = isinstance(head, nn.Linear)
        if self.pools_by_position:
            # Same parameters, same name, another forward: ZeRO's hooks and `state_dict` hold.
            head.__class__ = Float32Linear

    def forward(self, batch: Batch) -> Tensor:
        """Rewards [S] in fp32."""
        if not self.pools_by_position:
            output = self.inner(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
            return cast(Tensor, output.logits[:, 0].float())
        backbone = getattr(self.inner, self.inner.base_model_prefix)
        hidden = backbone(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
        ).last_hidden_state
        pooled = hidden[torch.arange(len(batch.pooled), device=hidden.device), batch.pooled]
        return cast(Tensor, self.inner.score(pooled)[:, 0])


@contextmanager
def stock_head(inner: Any) -> Iterator[None]:
    """Inside, the head of a wrapped model computes as transformers' own does."""
    head = getattr(inner, "score", None)
    wrapped = isinstance(head, Float32Linear)
    if wrapped:
        head.__class__ = nn.Linear
    try:
        yield
    finally:
        if wrapped:
            head.__class__ = Float32Linear


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to zero: of `nn.Dropout`, and what a forward reads itself.

    TRL sets the first alone; attention reads its own (`attention_dropout`), OPT all of them.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)
