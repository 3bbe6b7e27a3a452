"""Heads of several attributes: one row of the last layer for each in training, one in the export.

A reward model that is trained on attributes (helpfulness, verbosity, ...) has one output for each.
The export has the weighted sum of their rows, so every engine sees an ordinary reward model; the
rows themselves lie beside it in `attribute_heads.json`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from raywards.errors import CheckpointError, ModelError

logger = logging.getLogger(__name__)

FILE = "attribute_heads.json"


def widen_head(inner: Any, attributes: Mapping[str, float], seed: int) -> None:
    """Give a classifier with one label a new head with one output for each attribute.

    It is drawn as transformers draws one, from `seed`, also where the model had a trained one: its
    single row means none of the attributes. The config keeps its one label, which the export has.

    Raises `ModelError` where the head is not a linear layer named `score`.
    """
    head = getattr(inner, "score", None)
    if not isinstance(head, nn.Linear):
        raise ModelError(
            f"attributes: {type(inner).__name__} has no linear head named `score`, and the rows of "
            "another kind cannot be folded into one. Take a decoder, or train on a single `score`."
        )
    weight = torch.empty(len(attributes), head.in_features)
    deviation = getattr(inner.config.get_text_config(), "initializer_range", 0.02)
    weight.normal_(0.0, deviation, generator=torch.Generator().manual_seed(seed))
    _put_head(inner, weight, None if head.bias is None else torch.zeros(len(attributes)))
    logger.warning(
        "The head is new: drawn at random under seed %d, a row each for %s.",
        seed,
        ", ".join(attributes),
    )


def fold_heads(weights: Mapping[str, Tensor], attributes: Mapping[str, float]) -> dict[str, Tensor]:
    """A state dict whose head is the weighted sum of the attributes' rows, in fp32."""
    by_weight = torch.tensor(list(attributes.values()), dtype=torch.float32)
    folded = dict(weights)
    for name in ("score.weight", "score.bias"):
        if name in folded:
            rows = folded[name].float()
            folded[name] = (by_weight @ rows).reshape(1, *rows.shape[1:])
    return folded


def describe_heads(weights: Mapping[str, Tensor], attributes: Mapping[str, float]) -> str:
    """Content of `attribute_heads.json`: what `fold_heads` sums."""
    bias = weights.get("score.bias")
    heads = {
        name: {
            "weight": weight,
            "row": weights["score.weight"][index].float().tolist(),
            "bias": 0.0 if bias is None else bias[index].item(),
        }
        for index, (name, weight) in enumerate(attributes.items())
    }
    return json.dumps(heads, indent=1, ensure_ascii=False) + "\n"


def restore_heads(inner: Any, export: Path, attributes: Mapping[str, float]) -> None:
    """Give an export the heads that it was made of.

    Raises `CheckpointError` where they are not there, or are of other attributes.
    """
    try:
        heads = json.loads((export / FILE).read_text(encoding="utf-8"))
        rows = torch.tensor([heads[name]["row"] for name in attributes])
        bias = torch.tensor([heads[name]["bias"] for name in attributes])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{export / FILE}: does not hold the heads of {', '.join(attributes)} ({error!r})."
        ) from None
    _put_head(inner, rows, None if inner.score.bias is None else bias)


def _put_head(inner: Any, weight: Tensor, bias: Tensor | None) -> None:
    old = inner.score
    head = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    with torch.no_grad():
        head.weight.copy_(weight)
        if bias is not None:
            head.bias.copy_(bias)
    inner.score = head.to(device=old.weight.device, dtype=old.weight.dtype)
