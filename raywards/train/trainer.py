"""RewardTrainer: TRL's trainer by name and arguments, on Ray Train and DeepSpeed.

It runs in the driver: prepares the pairs, starts the workers, keeps the log, hands over the export.
What happens on a worker is in `loop`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import trainer_pt_utils
from transformers.trainer_utils import TrainOutput

import raywards
from raywards.checkpoint import read_manifest
from raywards.config import (
    RewardConfig,
    RunPaths,
    as_dict,
    attribute_weights,
    check_objective,
    freeze,
    is_address,
    worker_range,
)
from raywards.errors import CheckpointError, ConfigError, TrainingError
from raywards.heads import restore_heads, widen_head
from raywards.loader import (
    change_tokenizer,
    check_reward_model,
    create_model_from_path,
    describe_files,
    digest_of_weights,
    grow_vocabulary,
    load_tokenizer,
)
from raywards.packing import TrainPlan
from raywards.rendering import Rendering
from raywards.sources import names_sources
from raywards.train.adapters import (
    adopt,
    as_facts,
    attach,
    check_peft_config,
    classifier_in,
    is_adapted,
    save_base,
)
from raywards.train.best import Goal
from raywards.train.callbacks import Callbacks
from raywards.train.cluster import connect, ray_for_tasks, run_on_ray
from raywards.train.finished import FinishedRun
from raywards.train.job import Job
from raywards.train.loop import evaluate_alone, train
from raywards.train.object_storage import storage_of
from raywards.train.prepare import EncodeSettings, Prepared, prepare, weigh
from raywards.train.runfolder import (
    claim,
    fixed_settings,
    refuse_folder_of_a_job,
    settings_to_continue,
    sweep,
)
from raywards.train.runlog import RunLog
from raywards.train.session import LocalSession
from raywards.train.start import may_be_half
from raywards.train.storage import checkpoint_of, newest_checkpoint
from raywards.train.tuning import check_cheaper, check_quantised, frozen_names
from raywards.train.zero import default_stage, read_zero, stage_of, zero_config
from raywards.trl_fields import REFUSED_METHODS

logger = logging.getLogger(__name__)

_NOT_SUPPORTED = {
    "data_collator": "raywards batches pairs itself",
    "compute_metrics": "accuracy, loss, margin and rewards are computed on the workers",
    "optimizers": "AdamW and its schedule are set by the fields of RewardConfig",
    "optimizer_cls_and_kwargs": "AdamW is set by the fields of RewardConfig",
    "preprocess_logits_for_metrics": "metrics are sums over pairs, not over gathered predictions",
}

_SUMMARY = (
    "train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch",
)  # fmt: skip


class RewardTrainer(FinishedRun):
    """Train a reward model on preference pairs.

        trainer = RewardTrainer(
            model="Qwen/Qwen2.5-0.5B-Instruct",
            args=RewardConfig(output_dir="reward-output", num_workers=2),
            train_dataset=dataset,
        )
        trainer.train()

    Args:
        model: A hub id, a folder, or a transformers classifier with one label; or such a classifier
            with adapters in it, a `peft.PeftModel`, whose adapters and head are trained.
        args: Settings; default: `RewardConfig()`.
        train_dataset: Rows in any of TRL's preference formats: a `datasets.Dataset` or
            `IterableDataset`, a hub id, a JSONL, JSON or Parquet file, a saved dataset folder, a
            list of these, or a mapping of names to them.
        eval_dataset: Held-out rows of the same kinds, or a mapping of names to them, such as the
            splits of a `DatasetDict`.
        processing_class: Tokenizer, if not the model's own.
        callbacks: transformers' `TrainerCallback`s; docs/tracking.md says what they may do.
        quantization_config: Load the base quantised (`transformers.BitsAndBytesConfig`).
        peft_config: Train adapters and the head (`peft.LoraConfig`): see docs/fine_tuning.md.

    The other arguments are TRL's; they are refused by name.
    """

    # As transformers' Trainer has them, for scripts that save what `train` and `evaluate` return.
    from transformers.trainer_pt_utils import save_metrics, save_state

    def __init__(
        self,
        model: Any = None,
        args: RewardConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        optimizer_cls_and_kwargs: Any = None,
        preprocess_logits_for_metrics: Any = None,
        quantization_config: Any = None,
        peft_config: Any = None,
    ) -> None:
        given = {
            "data_collator": data_collator,
            "compute_metrics": compute_metrics,
            "optimizers": None if tuple(optimizers) == (None, None) else optimizers,
            "optimizer_cls_and_kwargs": optimizer_cls_and_kwargs,
            "preprocess_logits_for_metrics": preprocess_logits_for_metrics,
        }
        for name, value in given.items():
            if value is not None:
                raise ConfigError(
                    f"{name}: is not supported: {_NOT_SUPPORTED[name]}. Leave it out."
                )
        if model is None:
            raise ConfigError("model: is required: a hub id, a folder, or a classifier.")
        if train_dataset is None:
            raise ConfigError("train_dataset: is required: a dataset, a file or a hub id.")
        model = _absolute_if_folder(model)
        self.model_id = model if isinstance(model, str) else str(model.config._name_or_path)
        self.args = _with_output_dir(args or RewardConfig(), self.model_id)
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        self.paths = RunPaths.of(self.args)
        self.storage = storage_of(self.args, self.paths)
        if self.storage.shared:
            refuse_folder_of_a_job(self.paths)
        self.state = transformers.TrainerState()
        self.accelerator = _Console()
        self.hub_model_id = self.args.hub_model_id or self.paths.name
        self.dropped: dict[str, dict[str, int]] = {}
        """Rows left out of each set, by reason."""
        self._model_kwargs = _model_kwargs(self.args, model, quantization_config)
        self._model = model
        self._described = None if isinstance(model, str) else describe_files(model, {})
        """Of an object: training may give it a larger vocabulary."""
        self.processing_class = change_tokenizer(
            processing_class
            or load_tokenizer(
                self.model_id,
                revision=self._model_kwargs.get("revision"),
                trust_remote_code=self.args.trust_remote_code,
            ),
            eos_token=self.args.eos_token,
            chat_template_path=self.args.chat_template_path,
            trust_remote_code=self.args.trust_remote_code,
        )
        self._rendering = Rendering(self.processing_class, control_tokens=self.args.control_tokens)
        if not isinstance(model, str) and self.args.attributes:
            raise ConfigError(
                "attributes: a model that is loaded already has a head with one output. Pass its "
                "path, and it gets one for each attribute."
            )
        if not isinstance(model, str) and model.config.num_labels != 1:
            raise ConfigError(
                f"model: has num_labels={model.config.num_labels}; reward models require "
                "`num_labels=1`. Load it with create_model_from_path(..., num_labels=1)."
            )
        self._trained = False
        self.callback_handler = Callbacks(
            callbacks,
            self.args,
            name=self.paths.name,
            state=self.state,
            read_config=self._read_config,
            processing_class=self.processing_class,
        )
        self._peft = None if peft_config is None else check_peft_config(peft_config)
        """A `peft.LoraConfig` for workers, which load the model themselves."""
        if is_adapted(model):
            if self._peft is not None:
                raise ConfigError(
                    "peft_config: the model is a PeftModel, with adapters of its own. Leave "
                    "peft_config out, or merge them first (`merge_and_unload`)."
                )
            self._model = adopt(model)
        elif self._peft is not None and not isinstance(model, str):
            self._model, self._peft = attach(model, self._peft, seed=self.args.seed), None
        self._check_tuning(stage=0)

    # ------------------------------------------------------------ public

    def train(
        self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None
    ) -> TrainOutput:
        """Train, or go on training, and write the export.

        Args:
            resume_from_checkpoint: A checkpoint folder to start from. A run whose folder holds
                checkpoints already goes on from the newest one without being asked; `True`
                demands that there is one.

        Returns:
            `global_step`, `training_loss`, and `metrics`: time, rows left out, held-out metrics.

        Raises:
            RowError, ConfigError, ModelError: Before any worker starts.
            CheckpointError: The run folder holds another run.
            TrainingError: The run failed for good.
            HubError: The export was not uploaded (`push_to_hub`). It is whole in the run folder.

        What a callback raises is passed on, and ends the run.
        """
        started = time.monotonic()
        if self.args.use_cpu and self.args.use_gpu:
            raise ConfigError("use_gpu=True and use_cpu=True contradict each other.")
        check_objective(self.args)
        self.storage.check()
        explicit = self._resume_point(resume_from_checkpoint)
        settings = self._fixed_settings(explicit)
        # What a worker would refuse is refused here, before anything is written or started.
        zero = zero_config(
            self.args,
            settings["deepspeed"],
            num_ranks=self._most_ranks,
            global_batch=settings["global_batch"],
            bf16=self._bf16,
        )
        self._check_tuning(stage_of(zero))
        if self._evaluates and self.eval_dataset is None:
            raise ConfigError(
                f"eval_strategy={self.args.eval_strategy!r} needs an eval_dataset, and "
                "RewardTrainer was given none."
            )
        if self._evaluates:
            _refuse_no_sets(self.eval_dataset)
        Goal.of(self.args)
        if self.args.push_to_hub:
            self._open_repo()
        with self.storage.hold():
            self.storage.remove_cut_off()
            sweep(self.paths)
            try:
                return self._train(settings, explicit, started)
            finally:
                with contextlib.suppress(OSError):  # it would hide what went wrong
                    self.storage.remove_cut_off()

    def _train(
        self, settings: dict[str, Any], explicit: Path | None, started: float
    ) -> TrainOutput:
        job = self._prepare_job(settings)
        freeze(self.args)
        use_gpu = self._use_gpu()  # may start Ray: not before the rows are known to be good
        self.callback_handler.new_run()
        log = RunLog(
            self.paths.metrics,
            self.callback_handler,
            self.storage,
            show_progress=not self.args.disable_tqdm,
        )
        try:
            log.take("note", {"text": self._plan_in_words(job, use_gpu)})
            if self.args.num_workers == 0:
                self._train_here(job, log, explicit, use_gpu)
            else:
                run_on_ray(job, log, self.storage, explicit=explicit, use_gpu=use_gpu)
        finally:
            log.close()
        if log.finished is None:
            raise TrainingError(f"The run ended without an export; see {self.storage.where()}.")
        for folder in (self.paths.export, self.paths.adapter):
            if self.args.num_workers != 0:  # written elsewhere
                self.storage.pull(folder.name, again=True)
        self._note_best(log.finished)
        self._trained = True
        output = self._output(log, time.monotonic() - started)
        # As in transformers, the last record of the history sums the run up.
        summed_up = {name: output.metrics[name] for name in _SUMMARY}
        self.state.log_history = [*log.history, {"step": output.global_step, **summed_up}]
        self.state.global_step, self.state.epoch = output.global_step, summed_up["epoch"]
        try:
            self.create_model_card()
        except OSError as error:  # a full disk: the export is whole without a card
            logger.warning("no model card (%s); create_model_card() writes it later", error)
        if self.args.push_to_hub:
            self.push_to_hub()
        return output

    def evaluate(
        self, eval_dataset: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Metrics of the trained model (before training: of the model it starts from).

        Runs in this process. The keys are TRL's: `eval_loss`, `eval_accuracy`, ...
        """
        source = self.eval_dataset if eval_dataset is None else eval_dataset
        if source is None:
            raise ConfigError("eval_dataset: is required: none was given here or to RewardTrainer.")
        prepared = self._prepare_evals(source, metric_key_prefix)
        model = self.model
        if attributes := attribute_weights(self.args):
            if self._trained:
                restore_heads(model, self.paths.export, attributes)
            else:
                widen_head(model, attributes, self.args.seed)
        if self._use_gpu() and torch.cuda.is_available():
            model = model.to("cuda")
        metrics: dict[str, float] = {}
        with classifier_in(model) as inner:
            for prefix, held_out in prepared.items():
                values = evaluate_alone(inner, held_out.folder, self.args)
                metrics.update({f"{prefix}_{name}": value for name, value in values.items()})
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        self.callback_handler.report(metrics, metric_key_prefix)
        return metrics

    @property
    def model(self) -> Any:
        """The transformers model: the export once there is one, else what training starts from.

        With `num_workers=0`, a model that was given as an object is trained in place, and is this
        one; with adapters, a `PeftModel`.
        """
        if not isinstance(self._model, str) and self.args.num_workers == 0:
            return self._model
        if self._trained:
            return create_model_from_path(
                str(self.paths.export),
                transformers.AutoModelForSequenceClassification,
                dtype="auto",
                device_map=None,
                trust_remote_code=self._model_kwargs.get("trust_remote_code", False),
            )
        if not isinstance(self._model, str):
            return self._model
        transformers.set_seed(self.args.seed)
        model = create_model_from_path(
            self._model,
            transformers.AutoModelForSequenceClassification,
            device_map=None,
            **self._model_kwargs,
        )
        if self.args.chat_template_path is not None:
            grow_vocabulary(model, self.processing_class)
        return model

    def end(self) -> None:
        """Nothing is left to end: TRL's scripts call it."""

    def is_world_process_zero(self) -> bool:
        """The script runs once, in the driver."""
        return True

    is_local_process_zero = is_world_process_zero

    def metrics_format(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics as transformers prints them."""
        formatted: dict[str, Any] = trainer_pt_utils.metrics_format(_in_lines(metrics))
        return formatted

    def log_metrics(self, split: str, metrics: Mapping[str, Any]) -> None:
        """Print metrics of a split, one a line."""
        trainer_pt_utils.log_metrics(self, split, _in_lines(metrics))

    if not TYPE_CHECKING:  # else no missing attribute would be found

        def __getattr__(self, name: str) -> Any:
            advice = REFUSED_METHODS.get(name)
            told = (
                f"raywards does not have this method of TRL. {advice}"
                if advice
                else "no such name."
            )
            raise AttributeError(f"RewardTrainer.{name}: {told}")

    # ------------------------------------------------------------ before the workers

    @property
    def _bf16(self) -> bool:
        return True if self.args.bf16 is None else self.args.bf16

    @property
    def _evaluates(self) -> bool:
        return self.args.eval_strategy != "no" or self.args.eval_on_start

    def _use_gpu(self) -> bool:
        if self.args.use_cpu:
            return False
        if self.args.use_gpu is not None:
            return self.args.use_gpu
        if self.args.num_workers == 0:
            return torch.cuda.is_available()
        return bool(connect().cluster_resources().get("GPU", 0) >= 1)

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

    def _read_config(self) -> Any:
        if isinstance(self._model, str):
            return check_reward_model(self._model, self._model_kwargs)
        return self._model.config

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
        model, adapter = self._model, None
        partly = self._trains_a_part
        untrained = model if partly and isinstance(model, str) else None
        if not isinstance(model, str) and (partly or self.args.num_workers != 0):
            folder = self.paths.run / "initial-model"
            save_base(model, folder)
            self.storage.push(folder.name)
            untrained = str(folder) if partly else None
            if self.args.num_workers != 0:
                # Workers are other processes: they load the given model from a folder.
                if is_adapted(model):
                    adapter = self.paths.run / "initial-adapter"
                    model.save_pretrained(adapter)
                    self.storage.push(adapter.name)
                model = str(folder)
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
            about={
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
            },
            last_ids=pairs.last_ids,
            mixture=mixture,
            may_stop=self.callback_handler.may_stop,
        )

    def _refuse_empty_epoch(self, plan: TrainPlan) -> None:
        if self.args.dataloader_drop_last and plan.pairs_per_epoch < plan.global_batch:
            raise ConfigError(
                "dataloader_drop_last=True leaves nothing to train: an epoch has "
                f"{plan.pairs_per_epoch} pairs, and a global batch takes {plan.global_batch}. Set "
                "it to False, or lower per_device_train_batch_size."
            )

    def _plan_in_words(self, job: Job, use_gpu: bool) -> str:
        fewest, most = worker_range(self.args)
        workers = f"{most} workers" if fewest == most else f"{fewest} to {most} workers"
        workers = workers if most else "one process"
        device = "GPU" if use_gpu else "CPU"
        pairs = job.about["num_pairs"]
        return f"{pairs} pairs, {workers} on {device}, run folder {self.storage.where()}"

    def _prepare_evals(self, source: Any, prefix: str) -> dict[str, Prepared]:
        _refuse_no_sets(source)
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

    # ------------------------------------------------------------ the workers

    def _train_here(self, job: Job, log: RunLog, explicit: Path | None, use_gpu: bool) -> None:
        if not use_gpu and torch.cuda.is_available():
            raise ConfigError(
                "num_workers=0 without a GPU: DeepSpeed has chosen the GPU that this process sees. "
                "Start Python with CUDA_VISIBLE_DEVICES='' set, or set num_workers=1."
            )
        session = LocalSession(
            log.take,
            self.storage,
            should_stop=lambda: self.callback_handler.stopping,
            explicit=explicit,
            keep=self.args.save_total_limit,
            use_gpu=use_gpu,
        )
        with session.process_group(self.args.ddp_timeout):
            train(job, session)

    # ------------------------------------------------------------ after the workers

    def _note_best(self, finished: dict[str, Any]) -> None:
        """transformers' fields of the state that say which checkpoint is the best."""
        self.state.best_metric = finished["best_metric"]
        self.state.best_global_step = finished["best_step"]
        name = finished["best_step"] and checkpoint_of(self.storage, finished["best_step"])
        self.state.best_model_checkpoint = self.storage.where(name) if name else None

    def _output(self, log: RunLog, seconds: float) -> TrainOutput:
        records = [entry for entry in log.history if "loss" in entry]
        starts = [0, *(entry["step"] for entry in records)]
        weighted = [
            entry["loss"] * (entry["step"] - start)
            for entry, start in zip(records, starts, strict=False)
        ]
        assert log.finished is not None
        held_out = [
            entry
            for entry in log.history
            if entry["step"] <= log.finished["exported_step"]
            and any(k.startswith("eval") for k in entry)
        ]
        steps = log.finished["step"]
        share = 1 - log.first_step / max(1, steps)  # what this call trained
        metrics = {
            "train_runtime": seconds,
            "train_samples_per_second": share * log.finished["num_pairs"] / seconds,
            "train_steps_per_second": share * steps / seconds,
            "epoch": max((entry["epoch"] for entry in log.history), default=0.0),
            "num_pairs": log.finished["num_pairs"],
            "num_dropped": {name: sum(counts.values()) for name, counts in self.dropped.items()},
            "dropped": self.dropped,
            "export": log.finished["export"],
            **{k: v for k, v in (held_out[-1] if held_out else {}).items() if k.startswith("eval")},
        }
        mean = sum(weighted) / starts[-1] if starts[-1] else float("nan")
        metrics["train_loss"] = mean
        return TrainOutput(steps, mean, metrics)


class _Console:
    """The part of accelerate's `Accelerator` that TRL's scripts use: to print once."""

    is_main_process = True

    def print(self, *values: Any) -> None:
        import sys

        sys.stderr.write(" ".join(map(str, values)) + "\n")
        sys.stderr.flush()


def _with_output_dir(args: RewardConfig, model_id: str) -> RewardConfig:
    if args.output_dir is None:
        args = dataclasses.replace(args, output_dir=f"{Path(model_id).name}-Reward")
    return args


def _refuse_no_sets(held_out: Any) -> None:
    if isinstance(held_out, Mapping) and not held_out:
        raise ConfigError(
            "eval_dataset: is an empty mapping, so there is nothing to evaluate. Name at least one "
            "set of held-out rows in it, or leave evaluation out (eval_strategy='no')."
        )


def _in_lines(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Counts by set and by reason as a line of JSON each."""
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in metrics.items()}


def _absolute_if_folder(model: Any) -> Any:
    """Workers run in a folder of their own: a relative path would not be found there."""
    if isinstance(model, (str, Path)):
        folder = Path(model).expanduser()
        return str(folder.absolute()) if folder.is_dir() else str(model)
    return model


def _model_kwargs(args: RewardConfig, model: Any, quantization_config: Any) -> dict[str, Any]:
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
