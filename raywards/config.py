"""What a person may set: training, serving, scoring; from Python, YAML or flags.

Every field has one docstring, which is its only documentation: `--help` and the reference in
`docs/` are made from it. Names are TRL's and transformers' wherever the thing is theirs. Nothing
here imports torch, ray or transformers, so a typo is answered at once. `settings.py` reads YAML and
flags into these classes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from raywards.errors import ConfigError
from raywards.settings import check_names, describe, field_names, read_mapping
from raywards.trl_fields import REFUSED, Refused

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Interval = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
# HfArgumentParser hands a `dict | str | None` over as text: JSON is accepted there.
Mapped = dict[str, Any] | str | None
Objective = Literal["bradley_terry", "plackett_luce", "all_pairs", "regression"]

_COLUMNS_OF_TEXTS = ("text", "prompt", "response", "tools", "chat_template_kwargs")

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
"""What `report_to` may name."""

# Torch reads it at a process's first tensor and then asks Linux for pages of 2 MiB for large ones.
# With the usual 4 KiB, a forward on a CPU spends up to a fifth of its time on page faults.
HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
API_KEY = "[!-~]{8,512}"
"""What a key must look like: a pattern."""


@dataclass(
    kw_only=True,
    config=ConfigDict(extra="forbid", validate_assignment=True, use_attribute_docstrings=True),
)
class RewardConfig:
    """Settings of one training run, named as in TRL's `RewardConfig` where the thing is TRL's."""

    refused: ClassVar[Mapping[str, Refused]] = REFUSED

    output_dir: str | None = None
    """Run folder: checkpoints, prepared data, `metrics.jsonl`, TensorBoard files and `export/`.
    Default: the model's last path part followed by `-Reward`, in the current directory."""

    # ---- batches and schedule (TRL, transformers)
    per_device_train_batch_size: Positive = 8
    """Pairs of one worker and accumulation. It decides which pairs make a step, as in TRL, and not
    how many share a forward: `max_tokens_per_row` does."""
    per_device_eval_batch_size: Positive = 8
    """Pairs of one forward of an evaluation, for a model that pads; packed rows count tokens."""
    gradient_accumulation_steps: Positive = 1
    """Accumulations per worker and optimizer step. The global batch is this, times
    `per_device_train_batch_size`, times the (most) workers; it is fixed at the first start."""
    max_tokens_per_row: Positive | None = None
    """Tokens of one packed row, the common prefix of a pair counted once. A step takes as many rows
    as it needs; a longer pair goes alone. Default: what fits into memory, which is measured."""
    num_train_epochs: Interval = 3.0
    """Passes over the training pairs. A fraction stops inside the last one."""
    max_steps: int = -1
    """Optimizer steps; a positive number overrides `num_train_epochs`."""
    train_sampling_strategy: Literal["random", "sequential"] = "random"
    """Order of the pairs: `random` is TRL's own permutation for the seed and epoch."""
    dataloader_drop_last: bool = False
    """Leave out the last global batch of an epoch when it is not full."""
    seed: NotNegative = 42
    """Seeds the fresh head and the order of the pairs."""
    data_seed: int | None = None
    """Seeds the order of the pairs. Default: `seed`."""

    # ---- optimizer (TRL, transformers)
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal[
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "cosine_with_min_lr",
        "warmup_stable_decay",
    ] = "linear"
    """Schedule of the learning rate, made by `transformers.get_scheduler`."""
    lr_scheduler_kwargs: Mapped = None
    """Extra arguments of the schedule."""
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    """Steps of warm-up; below 1 it is a share of all steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay, on matrices only: not on biases and norms, as in transformers."""
    adam_beta1: Share = 0.9
    """AdamW's first beta."""
    adam_beta2: Share = 0.999
    """AdamW's second beta."""
    adam_epsilon: Interval = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the gradient of a step to this norm; 0 does not clip."""

    # ---- model and precision (TRL)
    model_init_kwargs: Mapped = None
    """Arguments of `from_pretrained`: `dtype`, `revision`, `attn_implementation`, ..."""
    trust_remote_code: bool = False
    """Run code that comes with a model or tokenizer."""
    bf16: bool | None = None
    """Compute in bfloat16 with fp32 master weights. Default: on, as in TRL."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a third more compute. Default:
    only where the activations of the longest pair would not fit, which is measured."""
    gradient_checkpointing_kwargs: Mapped = None
    """Arguments of `torch.utils.checkpoint`; default `{"use_reentrant": false}`."""
    activation_offloading: bool = False
    """Keep what `gradient_checkpointing` keeps, the states between the layers, in CPU memory until
    the backward pass. Turns `gradient_checkpointing` on. Without effect on a CPU."""
    use_liger_kernel: bool = False
    """RMSNorm and SwiGLU by Liger's Triton kernels; needs a GPU and `pip install liger-kernel`."""
    freeze: list[str] | None = None
    """Weights that are not trained: patterns (`*`, `[0-7]`) of the names of parameters, or of
    modules that hold them, such as `model.embed_tokens` or `model.layers.[0-7]`. The head is always
    trained. Default: none."""
    disable_dropout: bool = True
    """Set every dropout probability to zero before training. The dropout of LoRA is its own setting
    (`lora_dropout`)."""
    objective: Objective = "bradley_terry"
    """What is trained: `bradley_terry` on pairs, `plackett_luce` or `all_pairs` on rankings of two
    or more responses (and on pairs among them), `regression` on texts with a score
    (docs/objectives.md)."""
    attributes: Mapped = None
    """Columns of scores for `regression`, each with its weight in the exported reward, for instance
    `{"helpfulness": 0.8, "verbosity": -0.2}`. Each is trained as a head of its own. Default: the
    one column `score`."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] | None = None
    """Weight of `mean((r_chosen + r_rejected)^2)`, which keeps rewards near zero; 0.01 is usual. Of
    a ranking it is the square of twice its mean reward."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the labels taken to be the wrong way round, as in TRL's DPOConfig; 0.1 is usual."""

    # ---- data (TRL, and what TRL lacks)
    max_length: Positive | None = 1024
    """Longest sequence in tokens; `truncation` says what becomes of longer ones. None: no limit."""
    truncation: Literal["drop", "left", "right"] = "drop"
    """A pair with a side over `max_length` is dropped and counted (TRL), or each long side is cut
    on the left (the end is kept) or on the right."""
    on_bad_row: Literal["error", "drop"] = "error"
    """A row that cannot become a pair stops the run before it starts, or is dropped and counted."""
    control_tokens: Literal["as_text", "refuse"] = "as_text"
    """A control token such as `<|im_end|>` inside a message is encoded as text, or refused."""
    chat_template_path: str | None = None
    """A `.jinja` file, or the folder or hub id of a tokenizer whose template is to be used. A
    tokenizer's added tokens and its closing token come with it, and the model grows by them."""
    eos_token: str | None = None
    """Token that closes plain text, if not the tokenizer's own; the export is told, too."""
    dataset_weights: dict[str, Annotated[float, Field(gt=0)]] | str | None = None
    """How often an epoch trains the pairs of a source, by its name: 2 twice, 0.5 half of them, and
    the other half in the next epoch. Default, also for a source that is not named: once."""
    dataset_num_proc: Positive | None = None
    """Ray tasks that encode rows at the same time. 1: in the driver's process. Default: as many as
    the cluster has CPUs, or 1 without workers. Up to 20,000 rows never take more than one."""

    # ---- log, evaluate, save (TRL, transformers)
    logging_steps: Positive = 10
    """Optimizer steps between two records in the log."""
    logging_first_step: bool = False
    """Log the first step too."""
    eval_strategy: Literal["no", "steps", "epoch"] = "no"
    """When to evaluate."""
    eval_steps: Positive | None = None
    """Steps between two evaluations. Default: `logging_steps`."""
    eval_on_start: bool = False
    """Evaluate once before the first step."""
    save_strategy: Literal["no", "steps", "epoch", "best"] = "steps"
    """When to write a checkpoint; `best`: at each evaluation that is the best so far. The end of a
    run always writes one."""
    save_steps: Positive = 500
    """Steps between two checkpoints."""
    save_total_limit: Positive | None = None
    """Checkpoints to keep. The newest and the best are always among them, so with 1 there may be
    two. Default: all."""
    load_best_model_at_end: bool = False
    """Export the weights of the best evaluation, not of the last step. Each evaluation that is the
    best so far writes a checkpoint, whatever `save_strategy` says."""
    metric_for_best_model: str | None = None
    """Held-out figure (docs/metrics.md) that says which checkpoint is the best, with or without
    `eval_`: `accuracy`, `helpful_log_loss` of the set `helpful`. Default: `loss`."""
    greater_is_better: bool | None = None
    """Whether more of `metric_for_best_model` is better. Default: as the figure has it; to be given
    for rewards and `length_bias`, where neither is obvious."""
    early_stopping_patience: Positive | None = None
    """Stop after so many evaluations in a row that did not improve `metric_for_best_model`."""
    early_stopping_threshold: Annotated[float, Field(ge=0)] = 0.0
    """What `metric_for_best_model` has to be better by, to count as an improvement."""
    resume_from_checkpoint: str | None = None
    """A checkpoint folder to start from. A run that is started again under the same `output_dir`
    continues without being asked."""
    disable_tqdm: bool = False
    """No progress bar."""
    # HfArgumentParser takes the first type, if the second is None.
    report_to: str | None | list[str] = "none"  # noqa: RUF036
    """Trackers to report to: `wandb`, `mlflow`, `trackio`, a list of them, or `all` that are
    installed. `metrics.jsonl` and TensorBoard files are always written."""
    project: str = "huggingface"
    """Project in Trackio. W&B and MLflow read `WANDB_PROJECT` and `MLFLOW_EXPERIMENT_NAME`."""
    trackio_space_id: str | None = None
    """Space on the hub to which Trackio sends what it logs. Default: none, it stays on this
    machine."""
    trackio_bucket_id: str | None = None
    """Bucket on the hub for Trackio's Space."""
    trackio_static_space_id: str | None | Literal[False] = None  # noqa: RUF036
    """Static Space that Trackio makes of a run, at its end if `trackio_space_id` is set, else when
    the export is uploaded. Default: one named after `project`; false: none."""
    push_to_hub: bool = False
    """Upload the export when training ends."""
    hub_model_id: str | None = None
    """Repository to upload to. Default: the last part of `output_dir`."""
    hub_token: str | None = dataclasses.field(default=None, repr=False)
    """Token for the upload."""
    hub_private_repo: bool | None = None
    """Make the repository private."""
    hub_revision: str | None = None
    """Branch to upload to; made if there is none of its name. Default: the main branch."""

    # ---- where it runs (raywards)
    # HfArgumentParser hands it over as an int; other flags and YAML, also as text or a list.
    num_workers: list[int] | int | str = 1
    """Ray Train workers. 0 trains in this process, without Ray: a notebook, or one GPU. `[1, 4]`
    takes what the cluster has: with a node fewer it goes on with fewer workers, and takes more when
    they come. It may change from start to start: the global batch stays that of the first one."""
    elastic_resize_monitor_interval_s: Interval = 60.0
    """With a range of workers: seconds between two looks whether the cluster has room for more. A
    resize starts the workers again from the newest checkpoint."""
    use_gpu: bool | None = None
    """One GPU a worker. Default: where the cluster has any; say it where GPU nodes come on demand.
    `use_cpu=True`, TRL's name, says no."""
    use_cpu: bool = False
    """Stay on the CPU even where there is a GPU."""
    resources_per_worker: Mapped = None
    """Ray resources of one worker, for instance `{"CPU": 4, "GPU": 1}`."""
    storage_path: str | None = None
    """Folder that every node sees, or object storage (`s3://bucket/rewards`, `gs://...`); the run
    folder is `storage_path/run_name`. Default: the parent of `output_dir`."""
    run_name: str | None = None
    """Name of the run. Started again under the same name, it continues. Default: the last part of
    `output_dir`."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Failed attempts after which the run gives up; each starts again from the last checkpoint.
    -1: never gives up."""
    deepspeed: dict[str, Any] | str | int | None = None
    """ZeRO stage (0 to 3), a DeepSpeed dict, or a JSON file. `"auto"` values are filled in.
    Default: stage 2, or 0 with a single worker, which has nothing to shard; it is fixed at the
    first start."""
    ddp_timeout: Positive = 1800
    """Seconds after which a collective operation is taken to hang."""

    @field_validator("dataset_weights", mode="before")
    @classmethod
    def _weights_from_json(cls, value: Any) -> Any:
        return read_mapping(value) if isinstance(value, str) else value

    @field_validator("deepspeed", mode="before")
    @classmethod
    def _stage_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("freeze", mode="before")
    @classmethod
    def _split_patterns(cls, value: Any) -> Any:
        return _split_commas(value)

    @field_validator("eval_strategy", "save_strategy", mode="before")
    @classmethod
    def _plain_strategy(cls, value: Any) -> Any:
        # YAML reads a bare `no` as False; transformers' enums carry the text in `.value`.
        return "no" if value is False else getattr(value, "value", value)

    @field_validator("lr_scheduler_type", mode="before")
    @classmethod
    def _plain_scheduler(cls, value: Any) -> Any:
        return getattr(value, "value", value)

    @field_validator(
        "model_init_kwargs",
        "lr_scheduler_kwargs",
        "gradient_checkpointing_kwargs",
        "resources_per_worker",
        "attributes",
    )
    @classmethod
    def _json_mapping(cls, value: Any) -> Any:
        return read_mapping(value) if isinstance(value, str) else value

    @field_validator("num_workers", mode="before")
    @classmethod
    def _number_or_range(cls, value: Any) -> Any:
        given = value
        if isinstance(given, str):
            given = [part.strip() for part in given.strip("[] ").split(",")]
            given = [int(part) if part.isdigit() else part for part in given]
            given = given[0] if len(given) == 1 else given
        if isinstance(given, (list, tuple)) and len(given) == 2:
            fewest, most = given
            if type(fewest) is type(most) is int and 1 <= fewest <= most:
                return most if fewest == most else [fewest, most]
        elif type(given) is int and given >= 0:
            return given
        raise ValueError(
            "expected a number of workers, or the fewest and the most of them as in `[1, 4]`"
        )

    @field_validator("attributes")
    @classmethod
    def _weights_by_column(cls, value: Any) -> Any:
        if value is None:
            return None
        expected = 'expected columns with a weight each, such as {"helpfulness": 0.8}'
        numbers = (int, float)
        for name, weight in value.items():
            if not isinstance(name, str) or name in ("", *_COLUMNS_OF_TEXTS):
                raise ValueError(f"{name!r} is no column of scores; {expected}")
            if isinstance(weight, bool) or not isinstance(weight, numbers):
                raise ValueError(f"the weight of {name!r} is {weight!r}; {expected}")
            if not math.isfinite(weight):
                raise ValueError(f"the weight of {name!r} is {weight!r}; expected a finite number")
        if not any(value.values()):
            raise ValueError(f"no weight but 0: every reward would be 0; {expected}")
        # One order, so that a resumed run has the rows of its head in the same places.
        return {name: float(value[name]) for name in sorted(value)}

    @field_validator("report_to")
    @classmethod
    def _known_trackers(cls, value: Any) -> Any:
        for name in [value] if isinstance(value, str) else value or []:
            if name not in (*TRACKERS, "all", "none"):
                raise ValueError(
                    f"expected {', '.join(TRACKERS)}, all or none, got {name!r}; another tracker "
                    "can be handed over as a callback"
                )
        return value

    @field_validator("trackio_static_space_id", mode="before")
    @classmethod
    def _false_is_no_name(cls, value: Any) -> Any:
        return False if isinstance(value, str) and value.lower() == "false" else value

    @field_validator("max_steps")
    @classmethod
    def _steps_positive_or_unset(cls, value: int) -> int:
        if value == 0 or value < -1:
            raise ValueError("expected a positive number of steps, or -1 for `num_train_epochs`")
        return value

    @field_validator("output_dir")
    @classmethod
    def _output_is_a_folder(cls, value: str | None) -> str | None:
        if value is not None and is_address(value):
            raise ValueError(
                "expected a folder. Object storage is given as storage_path; output_dir is then "
                "where this machine keeps its copy of the run folder"
            )
        return value


def is_address(path: str) -> bool:
    """Whether a path is the address of object storage."""
    return "://" in path


def without_keys(address: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    return re.sub(r"(?<=://)[^/@]*@", "", address.partition("?")[0]).rstrip("/")


def worker_range(config: RewardConfig) -> tuple[int, int]:
    """The fewest and the most workers; (0, 0) is this process alone."""
    given = config.num_workers
    assert not isinstance(given, str), "the validator turns text into numbers"
    return (given, given) if isinstance(given, int) else (given[0], given[1])


def attribute_weights(config: RewardConfig) -> dict[str, float]:
    """Weight in the exported reward of each attribute; empty where there is only `score`."""
    weights = config.attributes or {}
    assert isinstance(weights, dict)
    return weights


def check_objective(config: RewardConfig) -> None:
    """Raise `ConfigError` for settings that mean nothing under the objective.

    Called when settings are made and when training starts, not at each assignment: a script may
    assign them in any order.
    """
    name = config.objective
    if config.attributes is not None and name != "regression":
        raise ConfigError(
            f"attributes: objective={name!r} has one reward to train, not several scores. Set "
            "objective='regression', or leave attributes out."
        )
    if config.label_smoothing and name in ("plackett_luce", "regression"):
        instead = " 'all_pairs' or" if name == "plackett_luce" else ""
        raise ConfigError(
            f"label_smoothing={config.label_smoothing:g}: is of pairs, and objective={name!r} has "
            f"no label that could be the wrong way round. Leave it out, or set objective to"
            f"{instead} 'bradley_terry'."
        )
    if config.center_rewards_coefficient and name == "regression":
        raise ConfigError(
            "center_rewards_coefficient: with objective='regression' the scores say where zero is. "
            "Leave it out."
        )


@dataclasses.dataclass(frozen=True)
class RunPaths:
    """Where a run keeps things. All absolute: Ray workers change their directory."""

    storage: Path
    name: str

    @property
    def run(self) -> Path:
        return self.storage / self.name

    @property
    def prepared(self) -> Path:
        return self.run / "prepared"

    @property
    def export(self) -> Path:
        return self.run / "export"

    @property
    def adapter(self) -> Path:
        return self.run / "adapter"

    @property
    def metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    @classmethod
    def of(cls, config: RewardConfig) -> RunPaths:
        output = Path(config.output_dir or "reward-output").expanduser().absolute()
        storage = output.parent
        if config.storage_path and not is_address(config.storage_path):
            storage = Path(config.storage_path).expanduser().absolute()
        return cls(storage, config.run_name or output.name)


class _Frozen(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=()
    )

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(describe(error, type(self))) from None


class ServeConfig(_Frozen):
    """Settings of one served reward model: one Serve application with one deployment."""

    model: str
    """Export folder, any sequence-classification folder with one label, a hub id, or the folder of
    a LoRA adapter, which names its base."""
    name: str = "rm"
    """Name under which clients ask for the model."""
    adapters: dict[str, str] = {}
    """LoRA adapters over the same base, each served under its name: `{"NAME": "FOLDER"}`."""
    route_prefix: str = "/"
    """Path in front of every route."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of the forward. Default: the export's own."""
    device: str | None = None
    """Torch device. Default: a GPU where the replica has one (`num_gpus`)."""
    max_length: Positive | None = None
    """Longest sequence in tokens that is accepted. Default: what the model can take."""
    max_batch_tokens: Positive = 16_384
    """Tokens of one forward: common prefixes counted once, or with padding where a model pads.
    Fewer where a GPU's memory holds no more: measured at the start, and learnt from failures."""
    deterministic: bool = False
    """Same bits for a conversation whatever is scored beside it. On CPUs; slower."""
    max_batch_sequences: Positive = 256
    """Sequences of one forward."""
    max_queued_tokens: Positive = 262_144
    """Tokens that may wait; more is answered 503 with `Retry-After`."""
    max_items_per_request: Positive = 1024
    """Conversations of one request."""
    max_body_bytes: Positive = 16_777_216
    """Size of one request's body."""
    request_timeout_s: Interval = 60.0
    """Time after which a request is given up with 504, unless the request asks for less."""
    min_replicas: NotNegative = 1
    """Replicas that always run."""
    max_replicas: Positive = 1
    """Replicas under load."""
    target_replica_tokens: Positive = 32_768
    """Tokens that wait or are computed, per replica, that autoscaling aims for."""
    max_ongoing_requests: Positive = 512
    """Requests in flight per replica above which Serve holds them back."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 1.0
    """How long the load must last before replicas are added."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
    """How long the load must be gone before replicas are removed."""
    metrics_interval_s: Interval = 1.0
    """Seconds between two reports of the load."""
    look_back_period_s: Interval = 3.0
    """Window over which the load is averaged; at least three times `metrics_interval_s`."""
    num_cpus: Annotated[float, Field(ge=0)] = 1.0
    """CPUs of one replica."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of one replica."""
    api_key: SecretStr | None = None
    """Key that clients must send as `Authorization: Bearer KEY`: 8 to 512 printable ASCII
    characters without spaces."""
    api_key_file: str | None = None
    """File of keys, a client a line: `NAME KEY`. It is read again when it changes."""
    other_models: list[str] = []
    """Names of other served models that this endpoint answers for where a request names them."""
    canary: str | None = None
    """Name of another served model that answers a share of the requests for this one."""
    canary_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The canary's share of prompts, from 0 to 1. 0 takes it out again."""
    host: str = "127.0.0.1"
    """Address that the HTTP server binds; `0.0.0.0` for other machines to reach it."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port of the HTTP server."""
    verify: bool = True
    """Reproduce the export's stored rewards before a replica says that it is ready."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""

    @field_validator("adapters", mode="before")
    @classmethod
    def _adapters_as_text(cls, value: Any) -> Any:
        return read_mapping(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fields_agree(self) -> ServeConfig:
        if self.look_back_period_s < 3 * self.metrics_interval_s:
            raise ValueError(
                f"look_back_period_s={self.look_back_period_s:g} is under three times "
                f"metrics_interval_s={self.metrics_interval_s:g}: autoscaling would miss load; "
                "raise the first or lower the second"
            )
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas={self.max_replicas} is under min_replicas={self.min_replicas}; "
                "raise the first or lower the second"
            )
        if self.max_length is not None and self.max_batch_tokens < self.max_length:
            raise ValueError(
                f"max_batch_tokens={self.max_batch_tokens} is under max_length={self.max_length}: "
                "the longest input would never fit; raise the first or lower the second"
            )
        if self.api_key is not None and not re.fullmatch(API_KEY, self.api_key.get_secret_value()):
            # An empty one is what a start script gives whose variable is not set.
            raise ValueError(
                f"api_key has {len(self.api_key.get_secret_value())} characters, or one that is "
                "not printable ASCII; expected 8 to 512 of these, without spaces. To serve "
                "without a key, leave it out"
            )
        if self.canary_share and not self.canary:
            raise ValueError(f"canary_share={self.canary_share:g} without a canary; name one")
        if self.name in (*self.adapters, *self.other_models, self.canary):
            raise ValueError(f"{self.name!r} is this model itself; name others")
        twice = self.adapters.keys() & {*self.other_models, self.canary}
        if twice:
            raise ValueError(
                f"{min(twice)!r} is an adapter and another model; name one of them anew"
            )
        if self.adapters and self.deterministic:
            raise ValueError("deterministic is not there with adapters; serve merged exports")
        if not self.route_prefix.startswith("/"):
            raise ValueError(f"route_prefix={self.route_prefix!r} must start with '/'")
        return self


class ScoreConfig(_Frozen):
    """Settings of `raywards score`: a file of conversations in, the same file with rewards out."""

    model: str
    """Export folder, any sequence-classification folder with one label, or a hub id."""
    input: str
    """JSONL file: each row has `messages`, or `prompt` and `response`, or `text`."""
    output: str
    """JSONL file to write: the same rows in the same order, each with `reward` added."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision of the forward. Default: the export's own."""
    device: str | None = None
    """Torch device. Default: a GPU where there is one."""
    max_length: Positive | None = None
    """Longest sequence in tokens that is accepted. Default: what the model can take."""
    max_batch_tokens: Positive = 16_384
    """Tokens of one forward: common prefixes counted once, or with padding where a model pads."""
    deterministic: bool = False
    """Same bits for a conversation whatever is scored beside it. On CPUs; slower."""
    on_bad_row: Literal["error", "keep"] = "error"
    """A row that cannot be scored stops the job, or is kept with `reward: null` and `error`."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


class TrainJob(_Frozen):
    """What to train on: flags of `jobs/train.py` beside `RewardConfig`'s, named as in TRL."""

    model_name_or_path: str
    """Model to start from: a folder or a hub id."""
    dataset_name: list[str]
    """Training rows: a hub id, a JSONL, JSON or Parquet file, or a saved dataset folder; or
    several, with commas between."""
    dataset_config: str | None = None
    """Configuration of a hub dataset."""
    dataset_train_split: str = "train"
    """Split to train on, where the source has splits."""
    eval_dataset_name: list[str] | None = None
    """Held-out rows, if not a split of `dataset_name`."""
    dataset_test_split: str = "test"
    """Split to evaluate on, where `eval_dataset_name` is not given."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    """Precision in which weights are loaded and exported. Default: float32."""
    model_revision: str | None = None
    """Revision of a hub model."""
    attn_implementation: str | None = None
    """Attention of transformers: `sdpa`, `eager`, `flash_attention_2`, ..."""

    # ---- adapters (docs/fine_tuning.md)
    use_peft: bool = False
    """Train LoRA adapters and the head instead of all weights."""
    lora_r: Positive = 16
    """Rank of the adapters."""
    lora_alpha: Positive = 32
    """Scale of the adapters: they are multiplied by this, divided by the rank."""
    lora_dropout: Share = 0.0
    """Dropout in front of the adapters. Above 0, rows are padded, which is slower. (TRL says 0.05,
    and its `disable_dropout`, on by default, makes 0 of it.)"""
    lora_target_modules: list[str] | None = None
    """Layers that get an adapter, by the ends of their names, with commas between; or `all-linear`.
    Default: peft's choice for the family."""
    lora_target_parameters: list[str] | None = None
    """Parameters that get an adapter, where they are no layer: the experts of a mixture."""
    lora_modules_to_save: list[str] | None = None
    """Modules that are trained in full beside the head."""
    lora_task_type: Literal["SEQ_CLS"] = "SEQ_CLS"
    """A reward model is a sequence classifier."""
    use_rslora: bool = False
    """Divide `lora_alpha` by the square root of the rank instead (rsLoRA)."""
    use_dora: bool = False
    """DoRA: adapters for the direction of a weight, and a trained magnitude."""
    load_in_4bit: bool = False
    """Load the base in 4 bits through bitsandbytes (QLoRA). Needs `use_peft`."""
    load_in_8bit: bool = False
    """Load the base in 8 bits through bitsandbytes. Needs `use_peft`."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Kind of the 4-bit numbers."""
    use_bnb_nested_quant: bool = False
    """Quantise the scales of the 4-bit blocks, too."""

    @field_validator(
        "dataset_name",
        "eval_dataset_name",
        "lora_target_modules",
        "lora_target_parameters",
        "lora_modules_to_save",
        mode="before",
    )
    @classmethod
    def _split(cls, value: Any) -> Any:
        return _split_commas(value)

    @model_validator(mode="after")
    def _adapters_agree(self) -> TrainJob:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit exclude each other; take one out")
        return self


def _split_commas(value: Any) -> Any:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


# ---------------------------------------------------------------- RewardConfig as a dataclass


def _speak_plainly() -> None:
    """Give `RewardConfig` our errors, freezing, and the help texts that HfArgumentParser shows.

    A pydantic dataclass reports an unknown keyword before any validator of ours can look at it, so
    the constructor is wrapped rather than extended.
    """
    fields = field_names(RewardConfig)
    validated_init = RewardConfig.__init__
    validated_setattr = RewardConfig.__setattr__

    def __init__(self: RewardConfig, **settings: Any) -> None:
        ours = {n: v for n, v in settings.items() if not _is_neutral(n, v)}
        check_names(ours, fields, REFUSED)
        try:
            validated_init(self, **ours)
        except ValidationError as error:
            raise ConfigError(describe(error, RewardConfig)) from None
        check_objective(self)

    def __setattr__(self: RewardConfig, name: str, value: Any) -> None:
        if self.__dict__.get("_frozen"):
            raise ConfigError(f"{name}: training has started, so settings can no longer change.")
        if not name.startswith("__pydantic"):
            if _is_neutral(name, value):
                return
            check_names({name}, fields, REFUSED)
        try:
            validated_setattr(self, name, value)
        except ValidationError as error:
            raise ConfigError(describe(error, RewardConfig)) from None

    RewardConfig.__init__ = __init__  # type: ignore[method-assign]
    RewardConfig.__setattr__ = __setattr__  # type: ignore[method-assign, assignment]
    described: Mapping[str, Any] = RewardConfig.__pydantic_fields__  # type: ignore[attr-defined]
    for field in dataclasses.fields(RewardConfig):
        text = described[field.name].description or ""
        field.metadata = types.MappingProxyType({"help": " ".join(text.split()).replace("%", "%%")})


def _is_neutral(name: str, value: Any) -> bool:
    """Whether a TRL setting that we refuse has the value that means what raywards does anyway."""
    return name in REFUSED and value in REFUSED[name].neutral


def freeze(config: RewardConfig) -> None:
    """From here on, assigning to a field of `config` raises `ConfigError`."""
    config.__dict__["_frozen"] = True


def as_dict(config: RewardConfig) -> dict[str, Any]:
    """The settings as plain values, without tokens and keys: for files and trackers."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    values.pop("hub_token")
    if config.storage_path is not None and is_address(config.storage_path):
        values["storage_path"] = without_keys(config.storage_path)
    loading = values["model_init_kwargs"] or {}
    if "token" in loading:
        values["model_init_kwargs"] = {k: v for k, v in loading.items() if k != "token"}
    return values


_speak_plainly()
