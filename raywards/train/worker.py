"""A worker's engine and data: built, brought back from a checkpoint, saved, exported.

What is done with them, step by step, is in `loop`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import numpy
import torch
import transformers
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from transformers import AutoModelForSequenceClassification, get_scheduler
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.trainer_pt_utils import get_parameter_names

import raywards
from raywards.checkpoint import export_model, list_files, read_manifest, write_manifest
from raywards.config import RewardConfig, RunPaths, attribute_weights
from raywards.errors import CheckpointError, ConfigError, NonFiniteError
from raywards.heads import FILE, describe_heads, fold_heads, widen_head
from raywards.loader import check_reward_model, create_model_from_path, grow_vocabulary
from raywards.metrics import Metrics
from raywards.model import RewardModel, disable_dropout
from raywards.objectives import build_objective
from raywards.packing import TrainPlan
from raywards.rendering import Rendering
from raywards.settle import settle_path
from raywards.train.adapters import Adapters, attach, is_adapted, load_adapter
from raywards.train.reshard import load_resharded, resharded
from raywards.train.rows import Rows, fit_rows, free_bytes, most_tokens
from raywards.train.runfolder import checkpoint_settings, refuse_other_run
from raywards.train.session import Session
from raywards.train.storage import checkpoint_name, writing
from raywards.train.table import PairTable
from raywards.train.tuning import (
    apply_liger,
    freeze,
    load_trained,
    load_untrained,
    prepare_quantised,
    with_trained,
)
from raywards.train.zero import build_ops, fill_model_sizes, stage_of, zero_config

logger = logging.getLogger(__name__)

_TAG = "engine"
_LOG = "metrics.jsonl"


@dataclass(frozen=True)
class Job:
    """All that a worker is told. Made by `RewardTrainer`; plain values, so it can be pickled."""

    config: RewardConfig = field(repr=False)
    paths: RunPaths
    model: Any
    """A folder or hub id; with `num_workers=0` it may be the model itself."""
    model_kwargs: dict[str, Any] = field(repr=False)  # may hold a token; Ray keeps a job's repr
    rendering: Rendering
    train: Path
    """Prepared folder."""
    evals: dict[str, Path]
    """Prepared folders by the prefix of their metrics."""
    settings: dict[str, Any]
    """What must not change while the run is continued (`runfolder.fixed_settings`)."""
    about: dict[str, Any]
    """What the export's manifest says of the run."""
    last_ids: list[int]
    may_stop: bool = False
    """Whether a callback may ask the run to stop; the ranks then agree on it after each step."""
    mixture: tuple[tuple[int, float], ...] = ()
    """Pairs and weight of each source, where some weigh other than 1."""
    peft: Any = None
    """A `peft.LoraConfig`: adapters to put into the model."""
    adapter: Path | None = None
    """A peft folder: the adapter that the model came with."""
    untrained: str | None = None
    """Folder or hub id of the model without adapters, where some of its weights are not trained:
    these are not in checkpoints, and the export takes them from there."""


@dataclass
class State:
    """Where a run stands: all of it is in a checkpoint."""

    step: int = 0
    num_pairs: int = 0
    num_tokens: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    evaluations_without_improvement: int = 0


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

    def log(self, record: dict[str, Any]) -> None:
        """Keep a record and hand it to the driver; rank 0 alone calls it."""
        self.history.append(record)
        self.session.send("log", record)

    losses: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)
    """Indices of each row of this step on this rank, and the losses of its pairs."""
    saved_step: int | None = None
    """Step of the last checkpoint."""

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
    try:
        worker = build_worker(job, session)
        try:
            yield worker
        finally:
            worker.engine.module.unwrap()  # it may be the caller's own model
            if worker.adapters is not None:
                worker.adapters.close()
    finally:
        unset_hf_deepspeed_config()  # else ZeRO-3 would partition what this process loads next


def build_worker(job: Job, session: Session) -> Worker:
    """Model, engine, pairs and plan of this rank."""
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
        build_ops(say=lambda text: _note(session, text))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False)

    transformers.set_seed(config.seed)
    fill_model_sizes(settings, hidden_size(job))
    # transformers sees ZeRO-3 through this object, for as long as it lives.
    keeps_zero3_visible = HfDeepSpeedConfig(settings) if stage_of(settings) == 3 else None
    inner, adapters = load_model(job, stage_of(settings))
    if adapters is not None:
        _note(session, adapters.in_words())
    refuse_without_master_weights(inner, bf16, stage_of(settings))
    prepare_model(inner, config)
    if config.use_liger_kernel:
        apply_liger(inner, session.device)
    model = RewardModel(inner)

    pairs = PairTable(job.train)
    plan = TrainPlan(
        num_pairs=len(pairs),
        global_batch=job.settings["global_batch"],
        seed=config.seed if config.data_seed is None else config.data_seed,
        shuffle=config.train_sampling_strategy == "random",
        drop_last=config.dataloader_drop_last,
        mixture=job.mixture,
    )
    total_steps = count_steps(config, plan)
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
    engine.keeps_zero3_visible = keeps_zero3_visible
    if session.world_size == 1 and stage_of(settings) == 0:
        # Else it copies all gradients into one tensor and back, to sum them over one process.
        engine.enable_backward_allreduce = False
    if clipper is not None:
        optimizer.register_step_pre_hook(clipper)
    return Worker(
        job,
        session,
        engine,
        pairs,
        plan,
        plan_rows(engine, pairs, config, session),
        build_objective(config).metrics(session.device),
        total_steps,
        asked_dtype(job, inner),
        clipper,
        adapters,
    )


def _note(session: Session, text: str) -> None:
    if session.rank == 0:
        session.send("note", {"text": text})
    logger.info("%s", text)


def load_model(job: Job, stage: int) -> tuple[Any, Adapters | None]:
    """The transformers classifier, whole on every rank or partitioned under ZeRO-3, and the
    adapters in it."""
    model = job.model
    if isinstance(model, str):
        model = create_model_from_path(
            model,
            AutoModelForSequenceClassification,
            num_labels=1,
            device_map=None,
            **job.model_kwargs,
        )
    fit_vocabulary(model, job)
    if attributes := attribute_weights(job.config):
        widen_head(model, attributes, job.config.seed)
    if "quantization_config" in job.model_kwargs:
        prepare_quantised(model)
    if job.config.freeze:
        freeze(model, job.config.freeze)
    if job.adapter is not None:
        model = load_adapter(model, job.adapter, cast_adapters=stage < 3)
    elif job.peft is not None:
        model = attach(model, job.peft, seed=job.config.seed, cast_adapters=stage < 3)
    if not is_adapted(model):
        return model, None
    adapters = Adapters(model)
    if stage == 0:  # there the weights are their own masters
        for parameter in adapters.inner.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return adapters.inner, adapters


def fit_vocabulary(model: Any, job: Job) -> None:
    """Give the model the closing token, and tokens, that the settings bring with them."""
    if job.config.chat_template_path is None and job.config.eos_token is None:
        return
    size = model.get_input_embeddings().num_embeddings
    grow_vocabulary(model, job.rendering.tokenizer)
    if job.untrained is not None and model.get_input_embeddings().num_embeddings > size:
        raise ConfigError(
            "chat_template_path: its tokenizer has tokens that the model lacks, and their new "
            "embeddings would not be trained beside adapters or under freeze. Train all weights, "
            "or give a .jinja file."
        )


def hidden_size(job: Job) -> int:
    """Known before the model is there: ZeRO-3's sizes follow from it."""
    if isinstance(job.model, str):
        config = check_reward_model(job.model, job.model_kwargs)
    else:
        config = job.model.config
    return int(config.get_text_config().hidden_size)


def may_be_half(model: Any, model_kwargs: Mapping[str, Any]) -> bool:
    """Whether a model is, or may be, loaded in another type than fp32."""
    if not isinstance(model, str):
        return bool(model.dtype != torch.float32)
    asked = model_kwargs.get("torch_dtype") or model_kwargs.get("dtype", "float32")
    return asked not in ("float32", torch.float32)


def asked_dtype(job: Job, inner: Any) -> torch.dtype:
    """The type the weights were asked for in, which is the export's. DeepSpeed casts them itself:
    ZeRO-3 already while they are loaded."""
    asked = job.model_kwargs.get("torch_dtype") or job.model_kwargs.get("dtype", "float32")
    if asked in (None, "auto"):
        asked = inner.config.dtype or inner.dtype
    return asked if isinstance(asked, torch.dtype) else getattr(torch, str(asked))


def refuse_without_master_weights(inner: Any, bf16: bool, stage: int) -> None:
    """Weights of 8 or 11 significant bits do not move under small updates."""
    trained = {p.dtype for p in inner.parameters() if p.requires_grad}
    if trained != {torch.float32} and bf16 and stage == 0:
        raise ConfigError(
            f"ZeRO stage 0 trains the weights as they are loaded, in "
            f"{str(inner.dtype).removeprefix('torch.')}: there would be no fp32 masters. Load them "
            "in float32, or use stage 1 to 3."
        )
    if inner.dtype != torch.float32 and not bf16:
        raise ConfigError(
            f"bf16=False with weights loaded in {str(inner.dtype).removeprefix('torch.')}: they "
            "would be updated without fp32 masters. Set bf16=True, or load them in float32."
        )


def prepare_model(inner: Any, config: RewardConfig) -> None:
    """Dropout, checkpointing and cache as the settings say."""
    inner.config.use_cache = False
    if config.disable_dropout:
        disable_dropout(inner)
    inner.train()


def plan_rows(engine: Any, pairs: PairTable, config: RewardConfig, session: Session) -> Rows:
    """Settle the model's path, the length of rows and checkpointing, alike on all ranks."""
    model: RewardModel = engine.module
    bf16 = config.bf16 if config.bf16 is not None else True
    settle_path(model, run=engine, autocast=bf16)
    longest = int(pairs.lengths.max())
    if longest > model.max_tokens:
        raise ConfigError(
            f"max_length={config.max_length}: there are sequences of {longest} tokens, "
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
    _note(session, f"The model takes {path} rows. {fit.in_words()}")
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


# ---------------------------------------------------------------- checkpoint, export


def save(worker: Worker) -> None:
    """Write this rank's part of a checkpoint and hand it over. A collective."""
    session, state = worker.session, worker.state
    name = checkpoint_name(state.step, session.attempt)
    folder = session.scratch(name)
    try:
        with writing(folder):
            _write_part(worker, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    session.commit(folder, name, best_step=state.best_step)
    worker.saved_step = state.step
    if session.rank == 0:
        session.send("save", {"step": state.step, "checkpoint": name})


def _write_part(worker: Worker, folder: Path) -> None:
    session, state = worker.session, worker.state
    window = worker.metrics.gather_on_first_rank(session.rank)
    client_state = {"raywards": {**dataclasses.asdict(state), "window": window}}
    worker.engine.save_checkpoint(
        str(folder),
        tag=_TAG,
        client_state=client_state,
        exclude_frozen_parameters=worker.job.untrained is not None,
    )
    torch.save(random_state(session.device), folder / f"random-{session.rank}.pt")

    if session.rank == 0:
        # The driver may die before it has fetched the last ones.
        lines = (json.dumps(record) + "\n" for record in worker.history)
        (folder / _LOG).write_text("".join(lines), encoding="utf-8")
    parts: list[Any] = [None] * session.world_size
    torch.distributed.all_gather_object(parts, list_files(folder))
    files = {file: size for part in parts for file, size in part.items()}
    if session.rank == 0:
        content = {
            "kind": "checkpoint",
            "raywards": raywards.__version__,
            "settings": worker.job.settings,
            "num_ranks": session.world_size,
            **dataclasses.asdict(state),
        }
        write_manifest(folder, content, files)


def resume(worker: Worker) -> State:
    """Bring engine, counters and random state to the newest checkpoint, if there is one."""
    with worker.session.resume_from() as folder:
        if folder is None:
            return worker.state
        manifest = read_manifest(folder, kind="checkpoint")
        check_fits(folder, manifest, worker)
        saved = dict(load_engine(worker, folder, manifest)["raywards"])
        worker.metrics.restore(saved.pop("window"), worker.session.rank)
        worker.state = State(**saved)
        worker.saved_step = worker.state.step
        if worker.session.rank == 0:
            lines = (folder / _LOG).read_text(encoding="utf-8").splitlines()
            worker.history = [json.loads(line) for line in lines]
        file = folder / f"random-{worker.session.rank}.pt"
        if file.is_file():
            set_random_state(torch.load(file, weights_only=False), worker.session.device)
        else:  # of a rank that was not there: its dropout starts from a seed of its own
            own = 7919 * worker.state.step + worker.session.rank
            transformers.set_seed((worker.job.config.seed + own) % 2**32)
    return worker.state


def load_engine(worker: Worker, folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Weights, optimizer and schedule of a checkpoint, written by any number of ranks.

    A collective. Returns what `save` handed DeepSpeed besides.
    """
    engine, session = worker.engine, worker.session
    stage = engine.zero_optimization_stage()
    if stage == 0 or manifest["num_ranks"] == session.world_size:
        path, client_state = engine.load_checkpoint(
            str(folder),
            tag=_TAG,
            custom_load_fn=None if worker.job.untrained is None else load_trained,
        )
    else:
        _note(
            session,
            f"{folder.name} is of {manifest['num_ranks']} workers and there are "
            f"{session.world_size} now: its ZeRO-{stage} shards are converted.",
        )
        with resharded(folder / _TAG, worker.job.paths.run, session.rank) as converted:
            path, client_state = load_resharded(engine, converted)
    if path is None:
        raise CheckpointError(f"{folder}: DeepSpeed found nothing to load in it.")
    return dict(client_state)


def check_fits(folder: Path, manifest: dict[str, Any], worker: Worker) -> None:
    """Refuse a checkpoint of another run: to go on would train something nobody asked for."""
    theirs = checkpoint_settings(folder, manifest)
    refuse_other_run(f"{folder}: is", theirs, worker.job.settings)


def export(worker: Worker, held: State) -> None:
    """Write the Hugging Face folder to score with, from full-precision weights. A collective.

    `held` is where the run stood with the weights that the engine holds: at its end or its best.
    """
    job, rank = worker.job, worker.session.rank
    inner = worker.engine.module.inner
    partly = job.untrained is not None
    weights = dict(full_weights(inner, keep=rank == 0, trained_only=partly))
    # Rank 0 loads the export alone, to measure it: without this, ZeRO-3 would partition that too.
    unset_hf_deepspeed_config()
    if rank == 0:
        about = {**job.about, **dataclasses.asdict(held), "last_step": worker.state.step}
        beside = {}
        if attributes := attribute_weights(job.config):
            beside = {FILE: describe_heads(weights, attributes)}
            weights = fold_heads(weights, attributes)
        if partly:
            inner, weights = complete(worker, weights)
        with writing(job.paths.export):
            manifest = export_model(
                inner,
                weights,
                job.rendering,
                job.paths.export,
                dtype=worker.export_dtype,
                training=about,
                last_ids=job.last_ids,
                beside=beside,
            )
        worker.session.send(
            "finish",
            {
                **dataclasses.asdict(worker.state),
                "export": str(job.paths.export),
                "exported_step": held.step,
                "bounds": manifest["bounds"],
            },
        )
    torch.distributed.barrier()


def complete(worker: Worker, trained: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    """The whole model and its state dict, where some weights alone were trained. On rank 0."""
    job = worker.job
    assert job.untrained is not None
    base = load_untrained(job.untrained, job.model_kwargs)
    fit_vocabulary(base, job)
    if worker.adapters is None:
        return base, with_trained(base, trained)
    merged = worker.adapters.merge(
        base.float(), trained, job.paths.adapter, base_name=job.about["base_model"]
    )
    return merged, merged.state_dict()


def full_weights(
    inner: Any, *, keep: bool, trained_only: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The state dict with master weights, one tensor at a time. A collective; `keep` on rank 0."""
    by_name = dict(inner.named_parameters(remove_duplicate=False))
    for name, value in inner.state_dict(keep_vars=True).items():
        if trained_only and not value.requires_grad:
            continue
        full = value.detach()
        if name in by_name:
            master = safe_get_full_fp32_param(by_name[name]) if value.requires_grad else None
            if master is not None:
                full = master
            else:
                with deepspeed.zero.GatheredParameters([by_name[name]]):
                    full = by_name[name].detach().clone()
        if keep:
            yield name, full.to("cpu", copy=True)


def random_state(device: torch.device) -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
