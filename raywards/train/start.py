"""The model that training starts from, loaded: with new tokens, heads or adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from raywards.config import RewardConfig, attribute_weights
from raywards.errors import ConfigError
from raywards.heads import widen_head
from raywards.loader import check_reward_model, create_model_from_path, grow_vocabulary
from raywards.model import disable_dropout
from raywards.train.adapters import Adapters, attach, is_adapted, load_adapter
from raywards.train.job import Job
from raywards.train.tuning import (
    freeze,
    prepare_quantised,
)


def load_model(job: Job, stage: int) -> tuple[Any, Adapters | None]:
    """The transformers classifier, whole on every rank or partitioned under ZeRO-3, and the
    adapters in it."""
    model = job.model
    if isinstance(model, str):
        model = create_model_from_path(
            model,
            AutoModelForSequenceClassification,
            num_labels=1,
            device_map=None,
            **job.model_kwargs,
        )
    fit_vocabulary(model, job)
    if attributes := attribute_weights(job.config):
        widen_head(model, attributes, job.config.seed)
    if "quantization_config" in job.model_kwargs:
        prepare_quantised(model)
    if job.config.freeze:
        freeze(model, job.config.freeze)
    if job.adapter is not None:
        model = load_adapter(model, job.adapter, cast_adapters=stage < 3)
    elif job.peft is not None:
        model = attach(model, job.peft, seed=None, cast_adapters=stage < 3)
    if not is_adapted(model):
        return model, None
    adapters = Adapters(model)
    if stage == 0:  # there the weights are their own masters
        for parameter in adapters.inner.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return adapters.inner, adapters


def fit_vocabulary(model: Any, job: Job) -> None:
    """Give the model the closing token, and tokens, that the settings bring with them."""
    if job.config.chat_template_path is None and job.config.eos_token is None:
        return
    size = model.get_input_embeddings().num_embeddings
    grow_vocabulary(model, job.rendering.tokenizer)
    if job.untrained is not None and model.get_input_embeddings().num_embeddings > size:
        raise ConfigError(
            "chat_template_path: its tokenizer has tokens that the model lacks, and their new "
            "embeddings would not be trained beside adapters or under freeze. Train all weights, "
            "or give a .jinja file."
        )


def hidden_size(job: Job) -> int:
    """Known before the model is there: ZeRO-3's sizes follow from it."""
    if isinstance(job.model, str):
        config = check_reward_model(job.model, job.model_kwargs)
    else:
        config = job.model.config
    return int(config.get_text_config().hidden_size)


def may_be_half(model: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a model is, or may be, loaded in another type than fp32."""
    if not isinstance(model, str):
        return bool(model.dtype != torch.float32)
    asked = model_kwargs.get("torch_dtype") or model_kwargs.get("dtype", "float32")
    return asked not in ("float32", torch.float32)


def asked_dtype(job: Job, inner: Any) -> torch.dtype:
    """The type the weights were asked for in, which is the export's. DeepSpeed casts them itself:
    ZeRO-3 already while they are loaded."""
    asked = job.model_kwargs.get("torch_dtype") or job.model_kwargs.get("dtype", "float32")
    if asked in (None, "auto"):
        asked = inner.config.dtype or inner.dtype
    return asked if isinstance(asked, torch.dtype) else getattr(torch, str(asked))


def refuse_without_master_weights(inner: Any, bf16: bool, stage: int) -> None:
    """Weights of 8 or 11 significant bits do not move under small updates."""
    trained = {p.dtype for p in inner.parameters() if p.requires_grad}
    if trained != {torch.float32} and bf16 and stage == 0:
        raise ConfigError(
            f"ZeRO stage 0 trains the weights as they are loaded, in "
            f"{str(inner.dtype).removeprefix('torch.')}: there would be no fp32 masters. Load them "
            "in float32, or use stage 1 to 3."
        )
    if inner.dtype != torch.float32 and not bf16:
        raise ConfigError(
            f"bf16=False with weights loaded in {str(inner.dtype).removeprefix('torch.')}: they "
            "would be updated without fp32 masters. Set bf16=True, or load them in float32."
        )


def prepare_model(inner: Any, config: RewardConfig) -> None:
    """Dropout, checkpointing and cache as the settings say."""
    inner.config.use_cache = False
    if config.disable_dropout:
        disable_dropout(inner)
    inner.train()
