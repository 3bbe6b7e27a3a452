"""RewardTrainer: TRL's trainer by name and arguments, on Ray Train and DeepSpeed.

It runs in the driver: prepares the pairs, starts the workers, keeps the log, hands over the export.
What a run is to be is decided in `planned`; what happens on a worker is in `loop`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import trainer_pt_utils
from transformers.trainer_utils import TrainOutput

from raywards.adapters import check_peft_config
from raywards.config import (
    RewardConfig,
    RunPaths,
    attribute_weights,
    check_objective,
    freeze,
    worker_range,
)
from raywards.errors import ConfigError, TrainingError
from raywards.heads import restore_heads, widen_head
from raywards.loader import (
    change_tokenizer,
    check_reward_model,
    create_model_from_path,
    describe_files,
    grow_vocabulary,
    load_tokenizer,
)
from raywards.ray_cluster import connect
from raywards.rendering import Rendering
from raywards.train.adapters import (
    adopt,
    attach,
    classifier_in,
    is_adapted,
)
from raywards.train.best import Goal
from raywards.train.callbacks import Callbacks
from raywards.train.cluster import run_on_ray
from raywards.train.finished import FinishedRun
from raywards.train.job import Job
from raywards.train.loop import evaluate_alone, train
from raywards.train.object_storage import storage_of
from raywards.train.planned import PlannedRun, loading_kwargs, refuse_no_sets
from raywards.train.runfolder import (
    refuse_folder_of_a_job,
    sweep,
)
from raywards.train.runlog import RunLog
from raywards.train.session import LocalSession
from raywards.train.storage import checkpoint_of
from raywards.train.zero import stage_of, zero_config
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


class RewardTrainer(PlannedRun, FinishedRun):
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
        self._model_kwargs = loading_kwargs(self.args, model, quantization_config)
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
            refuse_no_sets(self.eval_dataset)
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

    # ------------------------------------------------------------ before and in the workers

    def _use_gpu(self) -> bool:
        if self.args.use_cpu:
            return False
        if self.args.use_gpu is not None:
            return self.args.use_gpu
        if self.args.num_workers == 0:
            return torch.cuda.is_available()
        return bool(connect().cluster_resources().get("GPU", 0) >= 1)

    def _read_config(self) -> Any:
        if isinstance(self._model, str):
            return check_reward_model(self._model, self._model_kwargs)
        return self._model.config

    def _plan_in_words(self, job: Job, use_gpu: bool) -> str:
        fewest, most = worker_range(self.args)
        workers = f"{most} workers" if fewest == most else f"{fewest} to {most} workers"
        workers = workers if most else "one process"
        device = "GPU" if use_gpu else "CPU"
        pairs = job.about["num_pairs"]
        return f"{pairs} pairs, {workers} on {device}, run folder {self.storage.where()}"

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


def _in_lines(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Counts by set and by reason as a line of JSON each."""
    return {k: json.dumps(v) if isinstance(v, dict) else v for k, v in metrics.items()}


def _absolute_if_folder(model: Any) -> Any:
    """Workers run in a folder of their own: a relative path would not be found there."""
    if isinstance(model, (str, Path)):
        folder = Path(model).expanduser()
        return str(folder.absolute()) if folder.is_dir() else str(model)
    return model
