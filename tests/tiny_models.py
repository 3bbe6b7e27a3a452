"""Tiny random classifiers of any family, and ids to score with them."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 64


def tiny_classifier(family: str, *, scale: float = 1.0, **config: Any) -> Any:
    """In eval mode; 2-D weights are `scale` times as large as fresh ones."""
    settings: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 200,
        "max_position_embeddings": 1024, "num_labels": 1, "pad_token_id": 1, "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = getattr(transformers, f"{family}ForSequenceClassification")(
            getattr(transformers, f"{family}Config")(**{**settings, **config})
        ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter *= scale
    return model


def draw_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (n,), generator=generator).tolist() for n in lengths]
