"""LoRA and DoRA adapters of reward models: which are fit for one, and several over one base.

peft does the work. An adapter of a reward model is a linear map beside some layers, with a head of
its own: so the base can stay in memory once, and be itself again between two adapters.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from raywards.errors import ConfigError, ModelError
from raywards.model import Float32Linear, RewardModel

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

# Kinds of LoRA that would need more than a linear map beside a layer, and why they are refused.
_REFUSED = {
    "alora_invocation_tokens": "an adapter that starts at a token has no merged form",
    "arrow_config": "routing between adapters has no merged form",
    "kasa_config": "it cuts the weights of the base",
    "layer_replication": "it makes another architecture, which the export's config cannot say",
    "monteclora_config": "it adds a term to the loss",
    "velora_config": "it changes what the backward pass keeps",
}
_INITS = (True, False, "gaussian", "orthogonal")


def is_adapter(folder: str | Path) -> bool:
    """Whether this is a peft folder, and no model of its own."""
    path = Path(folder).expanduser()
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def base_of(folder: str | Path) -> str:
    """The model that the adapter in `folder` was trained on, as its config names it.

    Raises `ModelError` where the config names none.
    """
    name = _read_config(Path(folder).expanduser()).base_model_name_or_path
    if not name:
        raise ModelError(
            f"{folder}: its {CONFIG} names no base model. Give the base as the model, and this "
            "folder among its adapters."
        )
    return str(name)


class AdapterSet:
    """Adapters over one model. Threads may share it."""

    def __init__(self, model: RewardModel) -> None:
        self._model = model
        self._peft: Any = None
        self._count = 0
        self._active: str | None = None

    def add(self, folder: Path, *, needs_head: bool) -> str:
        """Load the adapter in `folder`, and name it. `needs_head`: the base has no trained one.

        Raises `ModelError`, and leaves the model as it was, where it is none or does not fit.
        """
        config = _read_config(folder)
        _check_weights(folder, self._model.inner, needs_head)
        with self._model.alone():
            self._count += 1
            name = f"adapter{self._count}"
            self._activate(None)
            try:
                self._inject(name, config)
                self._head_in_fp32(name)
                loaded = self._peft.load_adapter(str(folder), name, autocast_adapter_dtype=True)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                self._remove(name)
                raise _misfit(folder, self._model, str(error).strip().splitlines()[-1]) from None
            missing = [*loaded.missing_keys, *loaded.unexpected_keys]
            if missing:
                self._remove(name)
                raise _misfit(folder, self._model, f"it lacks, or has beside, {missing[0]}")
            self._peft.eval()
            self._model.hook_last_layer()
            self._switch_off()
        return name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, the model computes with this adapter, or as the base; others wait."""
        with self._model.alone():
            self._activate(name)
            yield

    def _activate(self, name: str | None) -> None:
        if name == self._active or self._peft is None:
            return
        if name is None:
            self._switch_off()
            return
        self._peft.base_model.enable_adapter_layers()
        self._peft.set_adapter(name, inference_mode=True)
        self._active = name

    def _switch_off(self) -> None:
        """peft then calls the layers beneath, and the head that it found."""
        self._peft.base_model.disable_adapter_layers()
        self._active = None

    def _inject(self, name: str, config: Any) -> None:
        if self._peft is None:
            peft = import_peft()
            self._peft = peft.get_peft_model(self._model.inner, config, adapter_name=name)
        else:
            self._peft.add_adapter(name, config)

    def _head_in_fp32(self, name: str) -> None:
        """As it was trained, whatever the base is loaded in."""
        from peft.utils import ModulesToSaveWrapper

        for module in self._model.inner.modules():
            if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
                head = module.modules_to_save[name]
                if isinstance(head, Float32Linear):
                    head.float()

    def _remove(self, name: str) -> None:
        if self._peft is None:
            return
        if name in self._peft.peft_config:
            self._peft.delete_adapter(name)
        self._switch_off()


def digest_of(folder: Path) -> str:
    """A hash of an adapter's config and weights."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def check_peft_config(config: Any) -> Any:
    """`config` as a `peft.LoraConfig` for a reward model, as a copy: the caller's stays as it is.

    Raises `ConfigError` for what is no LoRA or DoRA, for the task type of another kind of model,
    and for a kind of LoRA that changes the base or cannot be merged.
    """
    peft = import_peft()
    if not isinstance(config, peft.LoraConfig) or config.peft_type != peft.PeftType.LORA:
        raise ConfigError(
            f"peft_config: expected a peft.LoraConfig (LoRA, or DoRA with use_dora=True), got "
            f"{type(config).__name__}."
        )
    if config.task_type not in (None, peft.TaskType.SEQ_CLS):
        raise ConfigError(
            f"peft_config.task_type={str(config.task_type)!r}: a reward model is a sequence "
            'classifier. Give task_type="SEQ_CLS" (TRL\'s flag: --lora_task_type SEQ_CLS), or '
            "leave it out."
        )
    for name, reason in _REFUSED.items():
        if getattr(config, name, None):
            raise ConfigError(f"peft_config.{name}: is not supported: {reason}. Leave it out.")
    if config.init_lora_weights not in _INITS:
        raise ConfigError(
            f"peft_config.init_lora_weights={config.init_lora_weights!r}: changes the weights "
            "beneath, so the adapter would not fit the model that it is loaded onto. Expected one "
            f"of {', '.join(map(repr, _INITS))}."
        )
    config = copy.deepcopy(config)
    config.task_type = peft.TaskType.SEQ_CLS
    config.inference_mode = False
    return config


def import_peft() -> Any:
    """peft, or a `ConfigError` that says how to install it."""
    try:
        import peft
    except ImportError:
        raise ConfigError("LoRA needs peft: pip install 'raywards[train]'.") from None
    return peft


def head_names(inner: Any) -> list[str]:
    """Modules that turn hidden states into the reward: all beside the backbone, and its pooler."""
    backbone = getattr(inner, inner.base_model_prefix)
    names = [n for n, child in inner.named_children() if child is not backbone and _weighs(child)]
    if not names:
        raise ModelError(f"{type(inner).__name__}: has no head beside its backbone.")
    pooler = getattr(backbone, "pooler", None)
    return [*names, "pooler"] if isinstance(pooler, torch.nn.Module) and _weighs(pooler) else names


def _weighs(module: torch.nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _read_config(folder: Path) -> Any:
    """Raises `ModelError`."""
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: is no adapter: expected a folder with {CONFIG} and {WEIGHTS}, as "
            "`save_pretrained` of peft and the training write it."
        )
    peft = import_peft()
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: its {CONFIG} cannot be read: {error!s:.200}") from None
    try:
        check_peft_config(config)
    except ConfigError as error:
        raise ModelError(f"{folder}: {error}") from None
    if config.bias != "none":
        raise ModelError(
            f"{folder}: was trained with bias={config.bias!r}, which changes the base itself. "
            "Serve its merged export as a model of its own."
        )
    config.inference_mode = True
    return config


def _check_weights(folder: Path, inner: Any, needs_head: bool) -> None:
    """What peft would load without a word: no head, or numbers that are none."""
    heads = set(head_names(inner))
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            names = list(file.keys())
            broken = [name for name in names if not file.get_tensor(name).isfinite().all()]
    except SafetensorError as error:
        raise ModelError(f"{folder}: {WEIGHTS} is damaged: {error}") from None
    if broken:
        raise ModelError(f"{folder}: {broken[0]} holds values that are not finite.")
    if needs_head and not any(heads & set(name.split(".")) for name in names):
        raise ModelError(
            f"{folder}: has no trained head ({', '.join(sorted(heads))}), and its base has none: "
            "rewards would come from random weights. Train it with the head in modules_to_save."
        )


def _misfit(folder: Path, model: RewardModel, told: str) -> ModelError:
    return ModelError(
        f"{folder}: does not fit this {type(model.inner).__name__}: {told[:300]}. It was trained "
        "on another base."
    )
