"""LoRA and DoRA through peft: asked for, laid into a classifier, merged and kept beside.

peft wraps a model in a `PeftModel` and keeps two heads: the one it found and the one it trains.
Here the wrapper stays aside, and the trained head stands in the head's place while training lasts.
So the classifier is to everyone else the transformers model that it was, with other layers inside.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raywards.adapters import check_peft_config, head_names, import_peft
from raywards.checkpoint import replace_folder
from raywards.errors import ConfigError

_NOT_FACTS = ("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version")


def as_facts(config: Any) -> dict[str, Any]:
    """A `peft.LoraConfig` as plain values, without what differs between equal runs."""
    facts = {k: v for k, v in config.to_dict().items() if k not in _NOT_FACTS}
    plain: dict[str, Any] = json.loads(
        json.dumps(facts, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    )
    return plain


def is_adapted(model: Any) -> bool:
    """Whether `model` is a `PeftModel`. Whoever has one has imported peft."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def attach(inner: Any, config: Any, *, seed: int | None, cast_adapters: bool = True) -> Any:
    """Put adapters into the classifier `inner`; returns the `PeftModel`.

    Args:
        inner: The classifier, which is changed in place.
        config: As `check_peft_config` gives it. The head is added to its `modules_to_save`, which
            also keeps LoRA off the head.
        seed: Draws the adapters; None draws them where the generator stands, as TRL does when it
            has loaded the model, so that both begin with the same.
        cast_adapters: Make adapters of a half-precision model fp32. Not under ZeRO-3, where all
            parameters are of one type (https://github.com/deepspeedai/DeepSpeed/issues/8072).
    """
    peft = import_peft()
    config = copy.deepcopy(config)
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *head_names(inner)})
    with torch.random.fork_rng(devices=[]):
        if seed is not None:
            torch.manual_seed(seed)
        try:
            model = peft.get_peft_model(inner, config, autocast_adapter_dtype=cast_adapters)
        except ValueError as error:
            asked = {n: getattr(config, n, None) for n in ("target_modules", "target_parameters")}
            told = ", ".join(f"{name}={value!r}" for name, value in asked.items() if value)
            raise ConfigError(
                f"peft_config{f' with {told}' if told else ''}: {error} The layers of "
                f"{type(inner).__name__} are {', '.join(_linear_names(inner))}."
            ) from error
    _tidy_heads(model)
    return model


def adopt(model: Any) -> Any:
    """A `PeftModel` of the caller's, made fit for training a reward model in place.

    A head that it would not train is added to its `modules_to_save`. Raises `ConfigError` for what
    `check_peft_config` refuses, several adapters, or adapters that are loaded for inference.
    """
    from peft.utils.other import set_additional_trainable_modules

    if len(model.peft_config) != 1:
        raise ConfigError(
            f"model: has the adapters {', '.join(model.peft_config)}; one is trained. Delete the "
            "others (`delete_adapter`)."
        )
    [(name, config)] = model.peft_config.items()
    checked = check_peft_config(config)
    if not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n):
        raise ConfigError(
            "model: its adapters are frozen. Load them with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    inner = model.get_base_model()
    _refuse_adapted_head(inner)
    config.task_type, config.inference_mode = checked.task_type, False
    config.modules_to_save = sorted({*(config.modules_to_save or ()), *head_names(inner)})
    set_additional_trainable_modules(inner, config, inner.config.to_dict(), name)
    return model


def load_adapter(inner: Any, folder: Path, *, cast_adapters: bool = True) -> Any:
    """`inner` as a `PeftModel` with the adapter in `folder`, to be trained further."""
    model = import_peft().PeftModel.from_pretrained(
        inner, str(folder), is_trainable=True, autocast_adapter_dtype=cast_adapters
    )
    _tidy_heads(model)
    return model


def save_base(model: Any, folder: Path) -> None:
    """Write the classifier beneath the adapters as an ordinary folder, with its first head."""
    inner = model.get_base_model() if is_adapted(model) else model
    weights = {}
    for name, value in inner.state_dict().items():
        parts = name.split(".")
        if not any(part in _ADDED or part.startswith("lora_") for part in parts):
            weights[".".join(part for part in parts if part not in _COVERS)] = value
    inner.save_pretrained(folder, state_dict=weights)


class Adapters:
    """A `PeftModel` while it is trained: `inner` is the classifier, with the trained head in place.

    `close` gives the model back as peft made it.
    """

    def __init__(self, model: Any) -> None:
        from peft.utils import ModulesToSaveWrapper

        self.model = model
        self.inner = model.get_base_model()
        [self.name] = model.peft_config
        self._covers = {
            name: child
            for name, child in self.inner.named_children()
            if isinstance(child, ModulesToSaveWrapper)
        }
        for name, cover in self._covers.items():
            setattr(self.inner, name, cover.modules_to_save[self.name])

    @property
    def config(self) -> Any:
        return self.model.peft_config[self.name]

    def close(self) -> None:
        for name, cover in self._covers.items():
            setattr(self.inner, name, cover)

    def in_words(self) -> str:
        """What is trained, for the log."""
        sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in self.parameters()]
        trained = sum(size for size, requires_grad in sizes if requires_grad)
        kind = "DoRA" if self.config.use_dora else "LoRA"
        return (
            f"{kind} of rank {self.config.r}: {trained:,} of {sum(s for s, _ in sizes):,} "
            f"parameters are trained. Trained in full: {', '.join(self.config.modules_to_save)}."
        )

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return iter(self.inner.parameters())

    def merge(
        self, base: Any, trained: Mapping[str, Tensor], folder: Path, *, base_name: str
    ) -> Any:
        """The classifier with the adapters added to its weights; the adapter itself into `folder`.

        Args:
            base: The classifier without adapters, in fp32, on the CPU. It becomes the merged one.
            trained: What was trained, by its name in `inner`.
            folder: Where; an adapter that is there is replaced once the new one is whole.
            base_name: What the adapter's config says it belongs to.
        """
        config = copy.deepcopy(self.config)
        config.base_model_name_or_path = None  # peft warns where it is not the folder just loaded
        model = import_peft().get_peft_model(base, config, adapter_name=self.name)
        model.peft_config[self.name].base_model_name_or_path = base_name
        _tidy_heads(model)
        fresh = Adapters(model)
        ours = {n: p for n, p in fresh.inner.named_parameters() if p.requires_grad}
        assert ours.keys() == trained.keys(), sorted(ours.keys() ^ trained.keys())
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(trained[name])
        fresh.close()
        partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.partial"
        try:
            model.save_pretrained(partial)
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return model.merge_and_unload()


@contextmanager
def classifier_in(model: Any) -> Iterator[Any]:
    """Inside, the classifier in a `PeftModel` with its trained head; another model as it is."""
    if not is_adapted(model):
        yield model
        return
    adapters = Adapters(model)
    try:
        yield adapters.inner
    finally:
        adapters.close()


_COVERS = ("base_layer", "original_module")
_ADDED = ("modules_to_save", "token_adapter")


def _linear_names(inner: Any) -> list[str]:
    linear = [name for name, m in inner.named_modules() if isinstance(m, torch.nn.Linear)]
    return sorted({name.rsplit(".", 1)[-1] for name in linear} - set(head_names(inner)))


def _tidy_heads(model: Any) -> None:
    """peft adds its own names of heads, `classifier` and `score`, to those that the model has."""
    modules = [name for name, _ in model.get_base_model().named_modules()]
    for config in model.peft_config.values():
        config.modules_to_save = sorted(
            name for name in set(config.modules_to_save) if any(m.endswith(name) for m in modules)
        )


def _refuse_adapted_head(inner: Any) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    backbone = getattr(inner, inner.base_model_prefix)
    for name, child in inner.named_children():
        if child is not backbone and any(isinstance(m, BaseTunerLayer) for m in child.modules()):
            raise ConfigError(
                f"model: has LoRA on its head, {name}, which is trained in full. Take it out of "
                "target_modules, or pass the model without adapters, and `peft_config`."
            )
