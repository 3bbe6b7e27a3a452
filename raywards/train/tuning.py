"""What of a model is trained, from where the rest is taken, and what makes training it cheaper.

Weights that are not trained are in no checkpoint, and the export takes them from where the model
came from: DeepSpeed rounds the copies that it computes with to bfloat16.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from raywards.adapters import head_names, import_peft
from raywards.config import RewardConfig, TrainJob
from raywards.errors import CheckpointError, ConfigError, did_you_mean
from raywards.loader import create_model_from_path


def freeze(inner: Any, patterns: Sequence[str]) -> None:
    """Leave the parameters that a pattern names as they are. Raises what `frozen_names` does."""
    named = dict(inner.named_parameters())
    for name in frozen_names(inner, patterns):
        named[name].requires_grad_(False)


def frozen_names(inner: Any, patterns: Sequence[str]) -> list[str]:
    """The parameters that patterns name: each is of a parameter, or of a module above it.

    Raises `ConfigError` for a pattern that names nothing, or a part of the head.
    """
    heads = head_names(inner)
    named = dict(inner.named_parameters())
    frozen = []
    for pattern in patterns:
        found = [n for n in named if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}.*")]
        if not found:
            modules = [name for name, _ in inner.named_modules() if name]
            raise ConfigError(
                f"freeze: {pattern!r} names no parameter of {type(inner).__name__}, nor a module "
                f"with any; they are called like {', '.join(list(named)[:2])}."
                f"{did_you_mean(pattern, [*modules, *named])}"
            )
        for name in found:
            if any(part in heads for part in name.split(".")):
                raise ConfigError(
                    f"freeze: {pattern!r} names {name}, which is of the reward head. The head is "
                    "always trained: write patterns that leave it out."
                )
        frozen += found
    return frozen


# ---------------------------------------------------------------- where the rest comes from


def load_untrained(source: str, model_kwargs: Mapping[str, Any]) -> Any:
    """The model as it was before training, on the CPU, its weights dense."""
    logger = logging.getLogger("raywards.loader")
    level = logger.level
    logger.setLevel(logging.ERROR)  # that the head is new was said when training began
    try:
        model = create_model_from_path(
            source,
            AutoModelForSequenceClassification,
            num_labels=1,
            device_map=None,
            **model_kwargs,
        )
    finally:
        logger.setLevel(level)
    if model_kwargs.get("quantization_config") is not None:
        model = model.dequantize()
    return model.to("cpu")


def load_trained(src: Mapping[str, Tensor], dst: torch.nn.Module) -> None:
    """Give `dst` the weights of a checkpoint that are trained. DeepSpeed names the arguments.

    Nothing else: bitsandbytes keeps scales in the state dict, and refuses to load them.
    """
    trained = [name for name, parameter in dst.named_parameters() if parameter.requires_grad]
    missing = [name for name in trained if name not in src]
    if missing:
        raise CheckpointError(f"The checkpoint lacks weights that are trained: {missing[:4]}.")
    dst.load_state_dict({name: src[name] for name in trained}, strict=False)


def with_trained(base: Any, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of `base` with the weights that were trained in the place of its own."""
    weights = dict(base.state_dict())
    assert trained.keys() <= weights.keys(), sorted(trained.keys() - weights.keys())
    return {**weights, **trained}


# ---------------------------------------------------------------- flags of TRL's ModelConfig


def lora_config(job: TrainJob) -> Any | None:
    """The `peft.LoraConfig` that the flags describe, or None without `use_peft`."""
    if not job.use_peft:
        return None
    given = job.lora_target_modules
    return import_peft().LoraConfig(
        task_type=job.lora_task_type,
        r=job.lora_r,
        lora_alpha=job.lora_alpha,
        lora_dropout=job.lora_dropout,
        target_modules="all-linear" if given == ["all-linear"] else given,
        target_parameters=job.lora_target_parameters,
        modules_to_save=job.lora_modules_to_save,
        use_rslora=job.use_rslora,
        use_dora=job.use_dora,
    )


def quantization_config(job: TrainJob, *, bf16: bool) -> Any | None:
    """The `BitsAndBytesConfig` that the flags describe, or None if none is asked for."""
    if not (job.load_in_4bit or job.load_in_8bit):
        return None
    from transformers import BitsAndBytesConfig

    check_quantised("load_in_4bit" if job.load_in_4bit else "load_in_8bit", adapted=job.use_peft)
    return BitsAndBytesConfig(
        load_in_4bit=job.load_in_4bit,
        load_in_8bit=job.load_in_8bit,
        bnb_4bit_quant_type=job.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=job.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
    )


def check_quantised(name: str, *, adapted: bool) -> None:
    """Raise `ConfigError` where a quantised base (setting `name`) cannot be trained on."""
    if not adapted:
        raise ConfigError(
            f"{name}: quantised weights cannot be trained themselves. Train adapters beside them: "
            "peft_config=LoraConfig(...), or use_peft."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{name}: needs bitsandbytes: pip install bitsandbytes.")


def prepare_quantised(inner: Any) -> None:
    """Make a quantised base fit for training. Raises `ConfigError` for a quantised head."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    heads = head_names(inner)
    for name, module in inner.named_modules():
        if isinstance(module, Linear4bit):
            # On some CPUs it packs its weights anew in eval mode, and then passes no gradient.
            module.support_avx512bf16_for_cpu = False
        if isinstance(module, (Linear4bit, Linear8bitLt)) and set(name.split(".")) & set(heads):
            raise ConfigError(
                f"quantization_config: {name} was quantised, and the head is trained in full. Name "
                f"{', '.join(heads)} in llm_int8_skip_modules."
            )


# ---------------------------------------------------------------- cheaper


def apply_liger(inner: Any, device: torch.device) -> None:
    """Compute RMSNorm and SwiGLU of `inner` by Liger's kernels.

    Liger also replaces classes and functions of transformers for the whole process. That is taken
    back: the export is loaded and measured on the CPU, where its kernels do not run. So its rotary
    embedding is left out, which is such a function.

    The kernels themselves have not been run with raywards on a GPU yet. Raises `ConfigError`
    without a GPU, and for a family that Liger does not know.
    """
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    if device.type != "cuda":
        raise ConfigError("use_liger_kernel: Liger's kernels need a GPU. Leave it out.")
    if inner.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ConfigError(
            f"use_liger_kernel: Liger has no kernels for {inner.config.model_type}. Leave it out."
        )
    modeling = vars(sys.modules[type(inner).__module__])
    before = dict(modeling)
    leave = ("rope", "cross_entropy", "fused_linear_cross_entropy")
    try:
        apply_liger_kernel(inner, dict.fromkeys(leave, False))
    finally:
        modeling.update(before)


def check_cheaper(config: RewardConfig) -> None:
    """Raise `ConfigError` for settings that contradict each other or need what is not there."""
    if config.activation_offloading and config.gradient_checkpointing is False:
        raise ConfigError(
            "activation_offloading=True with gradient_checkpointing=False: what checkpointing "
            "keeps is what is offloaded. Leave gradient_checkpointing out."
        )
    if config.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise ConfigError("use_liger_kernel: needs liger-kernel: pip install liger-kernel.")


def offloading(config: RewardConfig, device: torch.device) -> AbstractContextManager[Any]:
    """Around a forward pass: what is kept for the backward lies in CPU memory.

    Within a checkpointed layer nothing is kept, so these are the states between the layers. Not run
    on a GPU yet.
    """
    if not config.activation_offloading:
        return nullcontext()
    return torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
