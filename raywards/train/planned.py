"""What `RewardTrainer` decides before anything starts: the model, the fixed settings, the job."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

import raywards
from raywards.checkpoint import read_manifest
from raywards.config import RewardConfig, RunPaths, as_dict, is_address, worker_range
from raywards.errors import CheckpointError, ConfigError
from raywards.loader import describe_files, digest_of_weights
from raywards.packing import TrainPlan
from raywards.rendering import Rendering
from raywards.sources import names_sources
from raywards.train.adapters import as_facts, is_adapted, save_base
from raywards.train.best import Goal
from raywards.train.callbacks import Callbacks
from raywards.train.cluster import ray_for_tasks
from raywards.train.job import Job
from raywards.train.prepare import EncodeSettings, Prepared, prepare, weigh
from raywards.train.runfolder import claim, fixed_settings, settings_to_continue
from raywards.train.start import may_be_half
from raywards.train.storage import Storage, newest_checkpoint
from raywards.train.tuning import check_cheaper, check_quantised, frozen_names
from raywards.train.zero import default_stage, read_zero


class PlannedRun:
    """The part of `RewardTrainer` that turns its arguments into a `Job`, or refuses them."""

    args: RewardConfig
    paths: RunPaths
    storage: Storage
    model_id: str
    processing_class: Any
    callback_handler: Callbacks
    train_dataset: Any
    eval_dataset: Any
    dropped: dict[str, dict[str, int]]
    _model: Any
    _model_kwargs: dict[str, Any]
    _described: str | None
    _rendering: Rendering
    _peft: Any

    @property
    def _bf16(self) -> bool:
        return True if self.args.bf16 is None else self.args.bf16

    @property
    def _evaluates(self) -> bool:
        return self.args.eval_strategy != "no" or self.args.eval_on_start

    @property
    def _most_ranks(self) -> int:
        return max(1, worker_range(self.args)[1])

    def _fixed_settings(self, explicit: Path | None) -> dict[str, Any]:
        """What must not change while the run is continued, but for the pairs, not known yet."""
        half = may_be_half(self._model, self._model_kwargs)
        stage = default_stage(most_ranks=self._most_ranks, half_weights=half)
        facts = {
            "model": self.model_id,
            "model_files": self._described or describe_files(self._model, self._model_kwargs),
            "rendering": self._rendering.fingerprint(),
            "bf16": self._bf16,  # unset means True
            "model_init_kwargs": {
                name: str(value) for name, value in self._model_kwargs.items() if name != "token"
            },
            "global_batch": self.args.per_device_train_batch_size
            * self.args.gradient_accumulation_steps
            * self._most_ranks,
            # A file is read once, here: workers run elsewhere, and its content is what counts.
            "deepspeed": read_zero(self.args.deepspeed or stage),
            **({"peft_config": as_facts(self._lora)} if self._lora is not None else {}),
            **({"untrained_weights": self._untrained_weights} if self._trains_a_part else {}),
        }
        return fixed_settings(self.args, facts, settings_to_continue(self.storage, explicit))

    @property
    def _trains_a_part(self) -> bool:
        return self._lora is not None or bool(self.args.freeze)

    @functools.cached_property
    def _untrained_weights(self) -> str:
        """Digest of the weights that are no part of checkpoints: the export takes them from the
        model, which must be the same then."""
        untrained: list[str] = []
        if not isinstance(self._model, str):
            named = self._model.named_parameters()
            # The head that peft keeps beside the trained one is drawn at random, and unused.
            untrained = [n for n, p in named if not p.requires_grad and "original_module" not in n]
            untrained += frozen_names(self._model, self.args.freeze or [])
        return digest_of_weights(self._model, self._model_kwargs, untrained)

    @property
    def _lora(self) -> Any:
        """The `peft.LoraConfig` of the adapters that are trained, or None."""
        if is_adapted(self._model):
            [config] = self._model.peft_config.values()
            return config
        return self._peft

    def _check_tuning(self, stage: int) -> None:
        lora = self._lora
        check_cheaper(self.args)
        if stage == 3 and not isinstance(self._model, str) and self.args.num_workers == 0:
            raise ConfigError(
                "deepspeed: ZeRO stage 3 would partition the weights of the model that was passed, "
                "and leave it without any. Pass its path, set num_workers to 1 or more, or "
                "deepspeed to 0, 1 or 2."
            )
        if lora is not None and self.args.freeze:
            raise ConfigError(
                "freeze: all weights but the adapters' and the head's are frozen anyway. Leave "
                "freeze or the adapters out."
            )
        if lora is not None and self.args.attributes:
            raise ConfigError(
                "attributes: several heads beside adapters are not supported: the adapter that is "
                "kept would have another head than the export. Leave one of the two out."
            )
        quantised = "quantization_config" in self._model_kwargs
        if quantised:
            check_quantised("quantization_config", adapted=lora is not None)
        if quantised and stage == 3:
            raise ConfigError(
                "deepspeed: ZeRO stage 3 cannot partition a quantised base: its scales are no "
                "parameters. Set deepspeed to 0, 1 or 2."
            )

    def _encode_settings(self) -> EncodeSettings:
        return EncodeSettings(
            self.args.max_length,
            self.args.truncation,
            self.args.on_bad_row,
            self.args.objective,
            tuple(self.args.attributes or ()),
        )

    def _resume_point(self, asked: str | os.PathLike[str] | bool | None) -> Path | None:
        asked = asked if asked is not None else self.args.resume_from_checkpoint
        if isinstance(asked, os.PathLike):
            asked = os.fspath(asked)
        if not isinstance(asked, str | bool | None):
            raise ConfigError(
                f"resume_from_checkpoint={asked!r}: expected the folder of a checkpoint, or True "
                "to demand that there is one to go on from."
            )
        newest = newest_checkpoint(self.storage)
        if isinstance(asked, str):
            if is_address(asked):
                raise ConfigError(
                    f"resume_from_checkpoint={asked!r}: expected a folder. A run that is in object "
                    "storage goes on by itself; copy a checkpoint of another one here first."
                )
            folder = Path(asked).expanduser().absolute()
            read_manifest(folder, kind="checkpoint")
            if newest is not None and str(folder) != self.storage.where(newest):
                raise CheckpointError(
                    f"resume_from_checkpoint={asked!r}: {self.storage.where()} has a newer "
                    f"checkpoint, {newest}, from which the run would go on. Give the run that "
                    "starts from the older one another output_dir."
                )
            return folder
        if asked is False and newest is not None:
            raise ConfigError(
                f"resume_from_checkpoint=False: {self.storage.where()} holds checkpoints, and a "
                "run goes on from the newest. To begin anew, give it another output_dir or "
                "run_name, or remove them."
            )
        if asked is True and newest is None:
            raise CheckpointError(
                "resume_from_checkpoint=True: there is no complete checkpoint in "
                f"{self.storage.where()}."
            )
        return None

    def _prepare_job(self, settings: dict[str, Any]) -> Job:
        batch = settings["global_batch"]
        with ray_for_tasks(self.args) as connect_for_tasks:
            pairs = prepare(
                self.train_dataset,
                self._rendering,
                self._encode_settings(),
                self.storage,
                name="train",
                most_of_stream=self.args.max_steps * batch if self.args.max_steps > 0 else None,
                connect=connect_for_tasks,
                tasks_at_once=self.args.dataset_num_proc,
            )
        self.dropped["train"] = pairs.dropped
        evals = self._prepare_evals(self.eval_dataset, "eval") if self._evaluates else {}
        Goal.of(self.args).refuse_unknown_metric(
            self.args, {prefix: held_out.folder for prefix, held_out in evals.items()}
        )
        mixture = weigh(pairs.sources, self.args.dataset_weights)  # type: ignore[arg-type]
        self._refuse_empty_epoch(TrainPlan(pairs.num_pairs, batch, seed=0, mixture=mixture))
        settings["pairs"] = pairs.fingerprint
        claim(self.storage, self.args, settings)
        model, adapter, untrained = self._model_for_workers()
        return Job(
            config=self.args,
            paths=self.paths,
            model=model,
            peft=self._peft,
            adapter=adapter,
            untrained=untrained,
            model_kwargs=self._model_kwargs,
            rendering=self._rendering,
            train=pairs.folder,
            evals={prefix: held_out.folder for prefix, held_out in evals.items()},
            settings=settings,
            about=self._about(pairs, settings),
            last_ids=pairs.last_ids,
            mixture=mixture,
            may_stop=self.callback_handler.may_stop,
        )

    def _model_for_workers(self) -> tuple[Any, Path | None, str | None]:
        """`model`, `adapter` and `untrained` of a `Job`: one that was given as an object is saved
        where it is needed as a folder."""
        model, adapter = self._model, None
        partly = self._trains_a_part
        if isinstance(model, str):
            return model, None, model if partly else None
        if not partly and self.args.num_workers == 0:
            return model, None, None
        folder = self.paths.run / "initial-model"
        save_base(model, folder)
        self.storage.push(folder.name)
        untrained = str(folder) if partly else None
        if self.args.num_workers == 0:
            return model, None, untrained
        # Workers are other processes: they load the given model from a folder.
        if is_adapted(model):
            adapter = self.paths.run / "initial-adapter"
            model.save_pretrained(adapter)
            self.storage.push(adapter.name)
        return str(folder), adapter, untrained

    def _about(self, pairs: Prepared, settings: dict[str, Any]) -> dict[str, Any]:
        """What the export's manifest says of the run."""
        return {
            "base_model": self.model_id,
            "revision": self._model_kwargs.get("revision"),
            "raywards": raywards.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "deepspeed": version("deepspeed"),
            "pairs": pairs.fingerprint,
            "num_rows": pairs.num_rows,
            "num_pairs": pairs.num_pairs,
            "sources": pairs.pairs_by_source,
            "global_batch": settings["global_batch"],
            "dropped": pairs.dropped,
            "conversational": pairs.conversational,
            "settings": json.loads(json.dumps(as_dict(self.args), default=str)),
            **({"peft_config": as_facts(self._lora)} if self._lora is not None else {}),
        }

    def _refuse_empty_epoch(self, plan: TrainPlan) -> None:
        if self.args.dataloader_drop_last and plan.pairs_per_epoch < plan.global_batch:
            raise ConfigError(
                "dataloader_drop_last=True leaves nothing to train: an epoch has "
                f"{plan.pairs_per_epoch} pairs, and a global batch takes {plan.global_batch}. Set "
                "it to False, or lower per_device_train_batch_size."
            )

    def _prepare_evals(self, source: Any, prefix: str) -> dict[str, Prepared]:
        refuse_no_sets(source)
        settings = self._encode_settings()
        # As in TRL, each split of a DatasetDict is a set of its own here.
        named = names_sources(source, splits_too=True)
        sources = {f"{prefix}_{n}": s for n, s in source.items()} if named else {prefix: source}
        prepared = {}
        for name, rows in sources.items():
            prepared[name] = prepare(
                rows, self._rendering, settings, self.storage, name=name, split="test"
            )
            self.dropped[name] = prepared[name].dropped
        return prepared


def loading_kwargs(args: RewardConfig, model: Any, quantization_config: Any) -> dict[str, Any]:
    """What a model is loaded with. Raises `ConfigError` for what makes no sense here."""
    kwargs = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise ConfigError(
                "quantization_config: is given to RewardTrainer and in model_init_kwargs; take one "
                "of them out."
            )
        kwargs["quantization_config"] = quantization_config
    if not isinstance(model, str):
        if kwargs:
            raise ConfigError(
                "model_init_kwargs: has no effect on a model that is loaded already; pass its path."
            )
        return {"dtype": str(model.dtype).removeprefix("torch.")}
    if kwargs.get("device_map") is not None:
        raise ConfigError(
            "model_init_kwargs.device_map: each worker holds the model on its own device, and "
            "DeepSpeed places it; leave it out."
        )
    kwargs.pop("device_map", None)
    if kwargs.pop("num_labels", 1) != 1:
        raise ConfigError("model_init_kwargs.num_labels: a reward model has one label.")
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    return kwargs


def refuse_no_sets(held_out: Any) -> None:
    if isinstance(held_out, Mapping) and not held_out:
        raise ConfigError(
            "eval_dataset: is an empty mapping, so there is nothing to evaluate. Name at least one "
            "set of held-out rows in it, or leave evaluation out (eval_strategy='no')."
        )
