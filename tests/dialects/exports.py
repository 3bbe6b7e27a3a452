"""Exported folders whose rewards are far apart, with heads large enough for vLLM on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny import chatml_tokenizer, llama_like_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen2Config,
    Qwen2ForSequenceClassification,
)

from raywards.checkpoint import export_model
from raywards.rendering import Rendering


def exported(folder: Path, family: str) -> Path:
    """`qwen`: no BOS. `llama`: its tokenizer puts one, and so does its template."""
    tokenizer = llama_like_tokenizer() if family == "llama" else chatml_tokenizer()
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer), "hidden_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256,
        "max_position_embeddings": 512, "num_labels": 1, "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = (
            LlamaForSequenceClassification(LlamaConfig(**settings))
            if family == "llama"
            else Qwen2ForSequenceClassification(Qwen2Config(**settings))
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter *= 20 if name == "score.weight" else 2
    model.eval()
    export_model(
        model, model.state_dict(), Rendering(tokenizer), folder, dtype=torch.float32, training={}
    )
    return folder
