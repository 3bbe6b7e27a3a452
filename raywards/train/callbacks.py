"""Callbacks in the shape of transformers' `TrainerCallback`, and the trackers that are such.

They run in the driver, where the log is kept, and never on a worker: with `num_workers=0` in the
caller's thread, on Ray in the thread that reads the messages of rank 0.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable
from typing import Any

from transformers import DefaultFlowCallback, EarlyStoppingCallback, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import CallbackHandler, TrainerControl, TrainerState

from raywards.config import TRACKERS, RewardConfig, as_dict
from raywards.errors import ConfigError

logger = logging.getLogger(__name__)

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_epoch_begin",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
    "on_push_begin",
)
# They would have to run on a worker, within a step. (`on_predict` belongs to `predict`, which
# RewardTrainer does not have; trackers define it, so it is let be.)
_NEVER_CALLED = (
    "on_step_begin",
    "on_substep_end",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_step_end",
    "on_prediction_step",
)
_FLAGS_WITHOUT_EFFECT = {
    "should_epoch_stop": "an epoch cannot be left out",
    "should_log": "use logging_steps",
    "should_evaluate": "use eval_strategy and eval_steps",
    "should_save": "use save_strategy and save_steps",
}
# What a tracker would need the weights for, which are with the workers.
_WEIGHTS_TO_TRACKERS = ("WANDB_LOG_MODEL", "WANDB_WATCH", "HF_MLFLOW_LOG_ARTIFACTS")


class Callbacks(CallbackHandler):  # type: ignore[misc]
    """The trackers of `report_to`, then the callbacks of one trainer, called in this order.

    Args:
        callbacks: Instances or classes, as transformers' Trainer takes them.
        config: The settings; callbacks see them as `args`.
        name: Name of the run, for the trackers.
        state: The trainer's; kept up to date here.
        read_config: Reads the model's config, which is all that callbacks see of the model.
        processing_class: The tokenizer.

    Raises `ConfigError` for a callback or tracker that cannot work here.
    """

    def __init__(
        self,
        callbacks: Any,
        config: RewardConfig,
        *,
        name: str,
        state: TrainerState,
        read_config: Callable[[], Any],
        processing_class: Any,
    ) -> None:
        if not isinstance(callbacks or [], (list, tuple)):
            raise ConfigError(
                f"callbacks: expected a list of callbacks, got {type(callbacks).__name__}."
            )
        self.args = _Arguments(config, name)
        self.state = state
        self.control = TrainerControl()
        self._steps_per_epoch = 1
        self._begun = self._between_epochs = False
        every = [_Flow, *tracker_callbacks(config), *(callbacks or [])]
        super().__init__(every, _Model(read_config), processing_class, None, None)
        self.on_init_end(self.args, self.state, self.control)

    def add_callback(self, callback: Any) -> None:
        """Add an instance or a class. Raises `ConfigError` for one that cannot work here."""
        _check(callback)
        super().add_callback(callback)

    @property
    def may_stop(self) -> bool:
        """Whether there is anyone who could ask the run to stop, or raise."""
        return any(not isinstance(callback, _Flow) for callback in self.callbacks)

    @property
    def stopping(self) -> bool:
        """Whether a callback has asked the run to stop."""
        return bool(self.control.should_training_stop)

    def new_run(self) -> None:
        """`train()` was called: the next "start" is that of a run, and not of another attempt."""
        self._begun = False
        self.control = TrainerControl()  # what ended the last run does not end this one

    def take(self, kind: str, record: dict[str, Any], history: list[dict[str, Any]]) -> None:
        """One message of rank 0, as events. What a callback raises is passed on."""
        about = self.args, self.state, self.control
        self.state.log_history = history
        if kind == "start":
            self._steps_per_epoch = record["steps_per_epoch"]
            self.state.max_steps = record["total"]
            self.state.num_train_epochs = math.ceil(record["total"] / self._steps_per_epoch)
        elif self._between_epochs and record.get("step", 0) > self.state.global_step:
            self._between_epochs = False
            self.on_epoch_begin(*about)
        if "step" in record:
            self.state.global_step = record["step"]
            self.state.epoch = record["step"] / self._steps_per_epoch
        if kind == "start":
            if not self._begun:
                self.on_train_begin(*about)
            self._begun, self._between_epochs = True, False
            self.on_epoch_begin(*about)
        elif kind == "log":
            self.state.num_input_tokens_seen = record.get(
                "num_tokens", self.state.num_input_tokens_seen
            )
            self.report({name: value for name, value in record.items() if name != "step"})
        elif kind == "save":
            self.on_save(*about)
        elif kind == "epoch":
            self.on_epoch_end(*about)
            self._between_epochs = True
        elif kind == "finish":
            self.on_train_end(*about)

    def report(self, logs: dict[str, Any], prefix: str = "eval") -> None:
        """`on_log`, and `on_evaluate` where there are held-out metrics among the `logs`."""
        # Copies: callbacks of transformers take entries out.
        self.on_log(self.args, self.state, self.control, logs=dict(logs))
        if any(name.startswith(f"{prefix}_") for name in logs):
            self.on_evaluate(self.args, self.state, self.control, metrics=dict(logs))

    def call_event(self, event: str, *args: Any, **kwargs: Any) -> Any:
        control = super().call_event(event, *args, **kwargs)
        self.control = control
        for flag, instead in _FLAGS_WITHOUT_EFFECT.items():
            if getattr(control, flag):
                setattr(control, flag, False)
                logger.warning(
                    "a callback set control.%s in %s, which has no effect: %s", flag, event, instead
                )
        return control


def tracker_callbacks(config: RewardConfig) -> list[type]:
    """transformers' callbacks for `report_to`. TensorBoard files are written without being asked.

    Raises `ConfigError` for a tracker that is not installed.
    """
    asked = [config.report_to] if isinstance(config.report_to, str) else config.report_to or []
    if not {*asked} - {"none", "tensorboard"}:
        return []
    installed = get_available_reporting_integrations()
    wanted = installed if "all" in asked else asked
    names = [name for name in TRACKERS if name in wanted and name != "tensorboard"]
    for name in names:
        if name not in installed:
            raise ConfigError(
                f"report_to: {name} is not installed, or disabled by its environment variable: "
                f"pip install {name}, or leave it out."
            )
    for variable in _WEIGHTS_TO_TRACKERS:
        if names and os.environ.get(variable, "false").lower() not in ("false", "0", ""):
            raise ConfigError(
                f"{variable}={os.environ[variable]}: the weights are with the workers, so a "
                "tracker cannot watch or upload them. Unset it; the export can be uploaded when "
                "the run is over."
            )
    found: list[type] = get_reporting_integration_callbacks(names)
    return found


class _Flow(DefaultFlowCallback):  # type: ignore[misc]
    """CallbackHandler wants one; when to log, evaluate and save is decided on the workers."""

    def on_step_end(self, *_: Any, **__: Any) -> None: ...

    def on_epoch_end(self, *_: Any, **__: Any) -> None: ...


class _Arguments:
    """`RewardConfig` as callbacks expect a `TrainingArguments`."""

    def __init__(self, config: RewardConfig, name: str) -> None:
        self._config = config
        self.run_name = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_config":  # what copy and pickle ask for
            raise AttributeError(name)
        return getattr(self._config, name)

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values, without the hub token."""
        settings = {**as_dict(self._config), "run_name": self.run_name}
        plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
        return plain

    def to_sanitized_dict(self) -> dict[str, Any]:
        return {
            name: value if isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in self.to_dict().items()
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


class _Model:
    """What callbacks see of the model."""

    def __init__(self, read_config: Callable[[], Any]) -> None:
        self._read_config = read_config
        self.model_tags: list[str] = []

    @property
    def config(self) -> Any:
        config = self._read_config()
        config.num_labels = 1  # a language model's says 2
        return config


def _check(callback: Any) -> None:
    cls = callback if isinstance(callback, type) else type(callback)
    if not issubclass(cls, TrainerCallback):
        raise ConfigError(
            f"callbacks: {cls.__name__} is not a transformers.TrainerCallback. Derive it from that."
        )
    if issubclass(cls, EarlyStoppingCallback):
        raise ConfigError(
            f"callbacks: {cls.__name__} is not needed: set early_stopping_patience and "
            "early_stopping_threshold, by which all workers stop at the same step."
        )
    own = [
        event
        for event in _NEVER_CALLED
        if getattr(cls, event) is not getattr(TrainerCallback, event) and not issubclass(cls, _Flow)
    ]
    if own:
        raise ConfigError(
            f"callbacks: {cls.__name__} defines {', '.join(own)}, which would never be called: "
            "steps run on the workers, and callbacks where train() was called. Events are "
            f"{', '.join(EVENTS)}."
        )
