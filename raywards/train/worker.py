"""A worker's engine and data, built: what is done with them, step by step, is in `loop`."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
import transformers
from torch import Tensor
from transformers import get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_parameter_names

from raywards.config import RewardConfig
from raywards.errors import ConfigError, NonFiniteError
from raywards.metrics import Metrics
from raywards.model import RewardModel
from raywards.objectives import build_objective
from raywards.packing import TrainPlan
from raywards.settle import settle_path
from raywards.train.adapters import Adapters
from raywards.train.job import Job, State
from raywards.train.rows import Rows, fit_rows, free_bytes, most_tokens
from raywards.train.session import Session
from raywards.train.start import (
    asked_dtype,
    hidden_size,
    load_model,
    prepare_model,
    refuse_without_master_weights,
)
from raywards.train.table import PairTable
from raywards.train.tuning import (
    apply_liger,
)
from raywards.train.zero import build_ops, fill_model_sizes, stage_of, zero_config

logger = logging.getLogger(__name__)


@dataclass
class Worker:
    """One rank's engine and data."""

    job: Job
    session: Session
    engine: Any
    pairs: PairTable
    plan: TrainPlan
    rows: Rows
    metrics: Metrics
    total_steps: int
    export_dtype: torch.dtype
    clipper: Clipper | None = None
    adapters: Adapters | None = None
    state: State = field(default_factory=State)
    history: list[dict[str, Any]] = field(default_factory=list)
    """On rank 0: every record of the lineage of the weights."""
    losses: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)
    """Indices of each row of this step on this rank, and the losses of its pairs."""
    saved_step: int | None = None
    """Step of the last checkpoint."""

    def log(self, record: dict[str, Any]) -> None:
        """Keep a record and hand it to the driver; rank 0 alone calls it."""
        self.history.append(record)
        self.session.send("log", record)

    def grad_norm(self) -> float | None:
        """Norm of the last step's gradient before clipping."""
        if self.clipper is not None:
            return self.clipper.norm
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)


class Clipper:
    """Clips at stage 0, where DeepSpeed clips but keeps the norm to itself.

    Called by the optimizer at the start of its step, when the gradients are those of all ranks.
    Raises `NonFiniteError` before the update.
    """

    def __init__(self, model: torch.nn.Module, max_norm: float) -> None:
        self.norm: float | None = None
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._max_norm = max_norm if max_norm > 0 else math.inf

    def __call__(self, *_: Any) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self._parameters, self._max_norm)
        self.norm = float(norm)
        if not math.isfinite(self.norm):
            raise NonFiniteError("the norm of the gradient is not finite")


@contextlib.contextmanager
def open_worker(job: Job, session: Session) -> Iterator[Worker]:
    """A worker for the time of the block; afterwards the model is as transformers made it."""
    with contextlib.ExitStack() as undo:
        # Else ZeRO-3 would partition what this process loads next.
        undo.callback(unset_hf_deepspeed_config)
        yield build_worker(job, session, undo)


def build_worker(job: Job, session: Session, undo: contextlib.ExitStack) -> Worker:
    """Model, engine, pairs and plan of this rank.

    What is done to the model, which may be the caller's own, is put onto `undo` as it is done.
    """
    config = job.config
    on_gpu = session.device.type == "cuda"
    bf16 = config.bf16 if config.bf16 is not None else True
    settings = zero_config(
        config,
        job.settings["deepspeed"],
        num_ranks=session.world_size,
        global_batch=job.settings["global_batch"],
        bf16=bf16,
    )
    if not on_gpu:  # on GPUs DeepSpeed does without this op
        build_ops(say=lambda text: note(session, text))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)

    transformers.set_seed(config.seed)
    fill_model_sizes(settings, hidden_size(job))
    # transformers sees ZeRO-3 through this object, for as long as it lives.
    keeps_zero3_visible = HfDeepSpeedConfig(settings) if stage_of(settings) == 3 else None
    inner, adapters = load_model(job, stage_of(settings))
    if adapters is not None:
        undo.callback(adapters.close)
        note(session, adapters.in_words())
    refuse_without_master_weights(inner, bf16, stage_of(settings))
    prepare_model(inner, config)
    if config.use_liger_kernel:
        apply_liger(inner, session.device)
    model = RewardModel(inner)
    undo.callback(model.unwrap)

    pairs = PairTable(job.train)
    plan = plan_steps(job, len(pairs))
    total_steps = count_steps(config, plan)
    engine, clipper = build_engine(model, config, settings, total_steps)
    engine.keeps_zero3_visible = keeps_zero3_visible
    if session.world_size == 1 and stage_of(settings) == 0:
        # Else it copies all gradients into one tensor and back, to sum them over one process.
        engine.enable_backward_allreduce = False
    return Worker(
        job,
        session,
        engine,
        pairs,
        plan,
        plan_rows(engine, job, pairs, session),
        build_objective(config).metrics(session.device, pairs.sources),
        total_steps,
        asked_dtype(job, inner),
        clipper,
        adapters,
    )


def plan_steps(job: Job, num_pairs: int) -> TrainPlan:
    """Which pairs are in which step."""
    config = job.config
    return TrainPlan(
        num_pairs=num_pairs,
        global_batch=job.settings["global_batch"],
        seed=config.seed if config.data_seed is None else config.data_seed,
        shuffle=config.train_sampling_strategy == "random",
        drop_last=config.dataloader_drop_last,
        mixture=job.mixture,
    )


def build_engine(
    model: RewardModel, config: RewardConfig, settings: dict[str, Any], total_steps: int
) -> tuple[Any, Clipper | None]:
    """DeepSpeed's engine with AdamW and its schedule; at stage 0 what clips for it.

    `settings` is DeepSpeed's dict, whose clipping is switched off where another clips.
    """
    optimizer = build_optimizer(model, config)
    schedule = get_scheduler(
        config.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_steps(config, total_steps),
        num_training_steps=total_steps,
        scheduler_specific_kwargs=config.lr_scheduler_kwargs,
    )
    clipper = None
    if stage_of(settings) == 0:
        clipper = Clipper(model, settings["gradient_clipping"])
        settings["gradient_clipping"] = 0.0
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=schedule, config=settings
    )
    if clipper is not None:
        optimizer.register_step_pre_hook(clipper)
    return engine, clipper


def note(session: Session, text: str) -> None:
    """Say something to the person who watches the run."""
    if session.rank == 0:
        session.send("note", {"text": text})
    logger.info("%s", text)


def plan_rows(engine: Any, job: Job, pairs: PairTable, session: Session) -> Rows:
    """Settle the model's path, the length of rows and checkpointing, alike on all ranks."""
    config = job.config
    model: RewardModel = engine.module
    bf16 = config.bf16 if config.bf16 is not None else True
    settle_path(model, run=engine, autocast=bf16)
    longest = int(pairs.lengths.max())
    # Also the held-out ones: max_length cannot be mended once there are checkpoints.
    held_out = {name: int(PairTable(f).lengths.max()) for name, f in job.evals.items()}
    found, name = max((tokens, name) for name, tokens in {"train": longest, **held_out}.items())
    if found > model.max_tokens:
        raise ConfigError(
            f"max_length={config.max_length}: there are sequences of {found} tokens in {name!r}, "
            f"and beyond {model.max_tokens} a reward of {type(model.inner).__name__} depends on "
            f"what else is in its batch (docs/families.md). Set max_length={model.max_tokens}."
        )
    per_forward = config.per_device_train_batch_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    engine.train()
    padded = model.pads
    engine.eval()
    fit = fit_rows(
        model,
        engine,
        free_bytes=free_bytes(
            session.device,
            ranks_on_node=session.ranks_on_node,
            num_parameters=sum(getattr(p, "ds_numel", p.numel()) for p in parameters),
        ),
        most_tokens=int(min(most_tokens(session.device), model.most_tokens)),
        longest=pairs.most_sequences * per_forward * longest if padded else int(pairs.tokens.max()),
        checkpointing=config.activation_offloading or config.gradient_checkpointing,
        max_tokens=config.max_tokens_per_row,
    )
    engine.train()
    agreed = torch.tensor([fit.keeps_activations, fit.max_tokens], device=session.device)
    torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
    fit = replace(fit, keeps_activations=bool(agreed[0]), max_tokens=int(agreed[1]))
    if not fit.keeps_activations:
        checkpointing: dict[str, Any] = dict(
            config.gradient_checkpointing_kwargs or {"use_reentrant": False}  # type: ignore[arg-type]
        )
        model.inner.activation_checkpointing_enable(activation_checkpointing_kwargs=checkpointing)
        if checkpointing.get("use_reentrant") and not _embeddings_trained(model.inner):
            model.inner.enable_input_require_grads()  # else no gradient leaves a reentrant layer
    path = "padded" if padded else model.path
    note(session, f"The model takes {path} rows. {fit.in_words()}")
    return Rows(padded, fit.max_tokens, model.window)


def _embeddings_trained(inner: Any) -> bool:
    return all(p.requires_grad for p in inner.get_input_embeddings().parameters())


def build_optimizer(model: torch.nn.Module, config: RewardConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on what transformers' Trainer decays: no biases, no norms."""
    no_decay = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [torch.nn.LayerNorm], no_decay))
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if n in decayed], "weight_decay": config.weight_decay},
        {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def count_steps(config: RewardConfig, plan: TrainPlan) -> int:
    """Optimizer steps of the whole run."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * plan.steps_per_epoch)


def warmup_steps(config: RewardConfig, total_steps: int) -> int:
    """Steps of warm-up: a number, or a share of all steps below 1."""
    given = config.warmup_steps
    return math.ceil(given * total_steps) if given < 1 else int(given)
