"""Model and tokenizer from a folder or hub id: `create_model_from_path`, `load_tokenizer`.

Keeps the contract of TRL's function of the same name, and closes its gaps: the distributed backend
is seen wherever it comes from, `revision` reaches the config, `torch_dtype` is honoured, a head
that is missing or has two labels is told apart from one that is new. It knows neither Ray nor data.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from raywards.errors import ConfigError, ModelError, did_you_mean

logger = logging.getLogger(__name__)

_DTYPE_NAMES = ("bfloat16", "float16", "float32")
_AUTO_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageTextToText",
    "AutoModelForCausalLM",
)
_CONFIG_OF_THE_WRITER = {
    "transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache",
    "problem_type",
}  # fmt: skip
"""What saving, loading and training write into a config."""
# What reaches AutoConfig too: the config must come from the same place as the weights.
_CONFIG_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def create_model_from_path(model_id: str, architecture: Any = None, **kwargs: Any) -> Any:
    """The pretrained model in `model_id`, a local folder or a hub id.

    `docs/loader.md` has the contract as a table.

    Args:
        model_id: Folder with a `config.json`, or a hub id.
        architecture: A transformers class with `from_pretrained`, such as
            `AutoModelForSequenceClassification`. Default: the class that the config names.
        **kwargs: Go to `from_pretrained`. `dtype` (or `torch_dtype`) is a `torch.dtype`, `"auto"`,
            `"bfloat16"`, `"float16"` or `"float32"`, the default. `device_map` is `None` under a
            distributed backend and on cpu and mps, else `"auto"`; a value given is kept.
            `num_labels` is 1 for a sequence classifier.

    Raises:
        ConfigError: `dtype` is none of the above (TRL's wording), or `device_map` under ZeRO-3.
        ModelError: There is no model here, its class is not known, it needs remote code, or its
            head is not that of a reward model.
    """
    model_id = _resolve_path(model_id)
    kwargs["dtype"] = _pop_dtype(kwargs)
    _resolve_device_map(kwargs)
    kwargs.setdefault("trust_remote_code", False)  # unset, transformers asks at the terminal
    config = kwargs.get("config") or _load_config(model_id, kwargs)
    if architecture is None:
        architecture = _infer_architecture(model_id, config)
    if not architecture.__name__.endswith("ForSequenceClassification"):
        return _from_pretrained(architecture, model_id, kwargs)[0]

    if "config" not in kwargs:  # beside a config, transformers would hand it to the model's init
        kwargs.setdefault("num_labels", 1)
    _check_labels(model_id, config, kwargs.get("num_labels", config.num_labels))
    model, missing = _from_pretrained(architecture, model_id, kwargs)
    _check_head(model_id, config, missing)
    return model


def check_reward_model(model_id: str, kwargs: dict[str, Any]) -> PretrainedConfig:
    """The config of a model to train a reward model from.

    Raises what `create_model_from_path` would raise for it, as far as the config tells.
    """
    model_id = _resolve_path(model_id)
    _pop_dtype(dict(kwargs))
    config = _load_config(model_id, kwargs)
    _check_labels(model_id, config, 1)
    return config


def describe_files(model: Any, kwargs: dict[str, Any]) -> str:
    """Digest of a model's config and of the sizes of its files: another model gives another.

    `model` is a folder, a hub id or a loaded model. Weights are not read: two models of one config
    whose files have the same sizes look alike. Raises what `check_reward_model` does.
    """
    if isinstance(model, (str, os.PathLike)):
        config = check_reward_model(os.fspath(model), kwargs)
        sizes = {
            file.name: file.stat().st_size for file in _weight_files(Path(_resolve_path(model)))
        }
    else:
        config, sizes = model.config, {}
    text = json.dumps([_told(config.to_dict()), sizes], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_weights(model: Any, kwargs: dict[str, Any], untrained: Sequence[str]) -> str:
    """Digest of weights that a run leaves as they are, hence takes from the model at its end.

    Of a folder it is that of the files, of a hub id its commit; of a loaded model that of the
    parameters named in `untrained`.
    """
    digest = hashlib.sha256()
    if isinstance(model, (str, os.PathLike)):
        folder = Path(_resolve_path(model), kwargs.get("subfolder", ""))
        if not folder.is_dir():
            digest.update(str(_load_config(str(model), kwargs)._commit_hash).encode())
        for file in _weight_files(folder):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    else:
        named = dict(model.named_parameters())
        for name in sorted(untrained):
            values = named[name].detach().cpu().contiguous()
            digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
            digest.update(values.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _weight_files(folder: Path) -> list[Path]:
    if not folder.is_dir():  # a hub id
        return []
    return sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.bin"))


def _told(config: Any) -> Any:
    """A config as plain values, without what the writer puts there."""
    if not isinstance(config, dict):
        return config
    return {k: _told(v) for k, v in config.items() if k not in _CONFIG_OF_THE_WRITER}


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether the weights that it came with have a head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or [])


def refuse_without_head(model_id: str, kwargs: dict[str, Any]) -> None:
    """Raise `ModelError` for a model that has no trained reward head, such as a language model."""
    if not is_classifier(check_reward_model(model_id, kwargs)):
        raise ModelError(
            f"{model_id}: has no reward head: it is not a sequence classifier, so its rewards "
            "would come from random weights. Give the export of a training run, or another "
            "reward model."
        )


def load_tokenizer(
    model_id: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    eos_token: str | None = None,
    chat_template_path: str | None = None,
) -> Any:
    """The tokenizer in `model_id`, with another closing token or chat template where asked for.

    Raises `ModelError` where there is no tokenizer, `ConfigError` for an `eos_token` outside the
    vocabulary or a `chat_template_path` without a template.
    """
    model_id = _resolve_path(model_id)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model_id, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_id}: no tokenizer can be loaded: {_first_line(error)}") from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.get_added_vocab()):
        # What transformers makes from a config alone, where the tokenizer's files are missing.
        raise ModelError(f"{model_id}: no tokenizer is there: its vocabulary is empty.")
    return change_tokenizer(
        tokenizer,
        eos_token=eos_token,
        chat_template_path=chat_template_path,
        trust_remote_code=trust_remote_code,
    )


def change_tokenizer(
    tokenizer: Any,
    *,
    eos_token: str | None = None,
    chat_template_path: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A copy of `tokenizer` with another chat template or closing token, or itself.

    As in TRL, a template taken from another tokenizer brings that tokenizer's added tokens along,
    and its closing token unless `eos_token` names one: `grow_vocabulary` then makes room for them.
    Raises as `load_tokenizer`.
    """
    if eos_token is None and chat_template_path is None:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    if chat_template_path is not None:
        _take_chat_template(tokenizer, chat_template_path, trust_remote_code)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(
                f"eos_token={eos_token!r} is not in the tokenizer's vocabulary."
                f"{did_you_mean(eos_token, tokenizer.all_special_tokens)}"
            )
        tokenizer.eos_token = eos_token
    return tokenizer


def grow_vocabulary(model: Any, tokenizer: Any) -> None:
    """Give `model` the closing token of `tokenizer`, and an embedding for every token of it.

    New ones are drawn as in TRL, and fill the table up to a multiple of 64; a table that is long
    enough stays as it is.
    """
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id


def is_distributed() -> bool:
    """Whether this process is one of several of a job, or has a live DeepSpeed config.

    A process group of one is not: training in a notebook leaves one behind. Read from torch and
    DeepSpeed, never from accelerate's `PartialState`, which reports a single process inside gloo
    workers on CPUs.
    """
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        return True
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        return True  # torchrun, before anyone made the process group
    return hf_deepspeed.deepspeed_config() is not None


def _resolve_path(model_id: str | os.PathLike[str]) -> str:
    """A folder that exists, `~` spelled out, or a hub id."""
    text = os.fspath(model_id)
    path = Path(text).expanduser()
    if path.is_file():
        raise ModelError(f"{text}: is a file. Give the folder that holds the model: {path.parent}")
    if path.is_dir() and text:
        return str(path)
    if not text or text.startswith((".", "/", "~")):
        siblings = path.parent.iterdir() if path.parent.is_dir() else ()
        near = did_you_mean(path.name, [sibling.name for sibling in siblings])
        raise ModelError(f"{text or repr(text)}: there is no such folder.{near}")
    return text


def _pop_dtype(kwargs: dict[str, Any]) -> Any:
    # `torch_dtype` is the older name; TRL drops it silently, which loads fp32.
    given = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
    dtypes = [_checked_dtype(value) for value in given.values()] or [torch.float32]
    if dtypes[0] != dtypes[-1]:
        raise ConfigError(
            " and ".join(f"{name}={value!r}" for name, value in given.items())
            + " disagree; give `dtype` alone."
        )
    return dtypes[0]


def _checked_dtype(dtype: Any) -> Any:
    if dtype is None or dtype == "auto" or isinstance(dtype, torch.dtype):
        return dtype
    if isinstance(dtype, str) and dtype in _DTYPE_NAMES:
        return getattr(torch, dtype)
    raise ConfigError(
        "Invalid `dtype` passed to the config. Expected either 'auto' or a string representing a "
        f"valid `torch.dtype` (one of {', '.join(_DTYPE_NAMES)}), but got {dtype!r}."
        f"{did_you_mean(str(dtype), _DTYPE_NAMES)}"
    )


def _resolve_device_map(kwargs: dict[str, Any]) -> None:
    if "device_map" in kwargs:
        if kwargs["device_map"] is not None and hf_deepspeed.is_deepspeed_zero3_enabled():
            raise ConfigError(
                f"device_map={kwargs['device_map']!r} cannot be used under ZeRO-3: DeepSpeed "
                "partitions every weight over the ranks while it is loaded, so no rank has a whole "
                "layer to place. Leave `device_map` out."
            )
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = accelerator is None or accelerator.type == "mps"
    kwargs["device_map"] = None if on_cpu or is_distributed() else "auto"


def _load_config(model_id: str, kwargs: dict[str, Any]) -> PretrainedConfig:
    folder = Path(model_id)
    if folder.is_dir() and not (folder / kwargs.get("subfolder", "") / "config.json").is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise ModelError(
            f"{model_id}: is not a model folder: it has no config.json (it has {found}). Give "
            "the folder that `save_pretrained` or raywards' export wrote."
        )
    shared = {"trust_remote_code": False}
    shared |= {name: kwargs[name] for name in _CONFIG_KWARGS if name in kwargs}
    try:
        return AutoConfig.from_pretrained(model_id, **shared)
    except (OSError, ValueError) as error:
        raise _load_error(model_id, error) from error


def _infer_architecture(model_id: str, config: PretrainedConfig) -> Any:
    names = config.architectures or []
    if not names:
        raise ModelError(
            f"{model_id}: config.json names no `architectures`, so the class to load is not known. "
            "Pass `architecture`, for instance AutoModelForSequenceClassification."
        )
    known = getattr(transformers, names[0], None)
    if known is not None:
        return known
    remote = getattr(config, "auto_map", None) or {}
    for auto_class in _AUTO_CLASSES:
        if auto_class in remote:
            return getattr(transformers, auto_class)
    raise ModelError(
        f"{model_id}: transformers {transformers.__version__} has no class {names[0]!r}, which "
        "config.json names. Update transformers, or pass `architecture`."
    )


def _check_labels(model_id: str, config: PretrainedConfig, num_labels: int) -> None:
    if num_labels != 1:
        raise ModelError(
            f"num_labels={num_labels}: a reward model has one output. Leave it out, or give 1."
        )
    if is_classifier(config) and config.num_labels != 1:
        story = ""
        if config.num_labels == 2:
            story = (
                " TRL 0.26 to 0.28 trained such heads when they were given a causal language "
                "model: train again from that language model, with TRL 0.29 or later or raywards."
            )
        raise ModelError(
            f"{model_id}: its head has {config.num_labels} labels; a reward model has one.{story}"
        )


def _from_pretrained(architecture: Any, model_id: str, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    try:
        model, info = architecture.from_pretrained(model_id, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _load_error(model_id, error) from error
    return model, sorted(info["missing_keys"])


def _check_head(model_id: str, config: PretrainedConfig, missing: list[str]) -> None:
    if not missing:
        return
    if is_classifier(config):
        raise ModelError(
            f"{model_id}: is a finished classifier whose weights lack {', '.join(missing[:4])}. A "
            "head made up now would give rewards that mean nothing. Was it saved as another class, "
            "or were LoRA weights merged without `modules_to_save=['score']`?"
        )
    logger.warning(
        "%s: the reward head (%s) is new: drawn at random under seed %d. Train it before use.",
        model_id,
        ", ".join(missing[:4]),
        torch.initial_seed(),
    )


def _load_error(model_id: str, error: Exception) -> ModelError:
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return ModelError(
            f"{model_id}: needs code that comes with the model (custom code). Read it, then pass "
            "trust_remote_code=True."
        )
    return ModelError(f"{model_id}: cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def _take_chat_template(tokenizer: Any, path: str, trust_remote_code: bool) -> None:
    if path.endswith((".jinja", ".j2")):
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigError(f"chat_template_path={path!r}: there is no such file.")
        tokenizer.chat_template = file.read_text(encoding="utf-8")
        return
    source = load_tokenizer(path, trust_remote_code=trust_remote_code)
    if not isinstance(source.chat_template, str):
        raise ConfigError(f"chat_template_path={path!r}: that tokenizer has no chat template.")
    tokenizer.chat_template = source.chat_template
    known = tokenizer.get_vocab()
    added = source.added_tokens_decoder.values()
    tokenizer.add_tokens([token for token in added if token.content not in known])
    tokenizer.eos_token = source.eos_token
