"""The Hugging Face folder to score with, written from the weights that the engine holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from raywards.checkpoint import export_model
from raywards.config import attribute_weights
from raywards.heads import FILE, describe_heads, fold_heads
from raywards.train.job import State
from raywards.train.start import fit_vocabulary
from raywards.train.storage import writing
from raywards.train.tuning import (
    load_untrained,
    with_trained,
)
from raywards.train.worker import Worker


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
        if not isinstance(job.model, str):
            give_back(worker, weights)
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
        storage = worker.session.storage
        for folder in (job.paths.adapter, job.paths.export):
            if folder.is_dir():
                storage.push(folder.name)
        worker.session.send(
            "finish",
            {
                **dataclasses.asdict(worker.state),
                "export": storage.where(job.paths.export.name),
                "exported_step": held.step,
                "bounds": manifest["bounds"],
            },
        )
    torch.distributed.barrier()


def give_back(worker: Worker, trained: Mapping[str, Tensor]) -> None:
    """Put what was trained into the model that the caller gave, in the type that it had.

    DeepSpeed may have cast all of it to train it, also what it left as it was.
    """
    dtype = worker.export_dtype
    parameters = dict(worker.engine.module.inner.named_parameters())
    cast = [
        name
        for name, parameter in parameters.items()
        if name not in trained and parameter.is_floating_point() and parameter.dtype != dtype
    ]
    values = dict(trained)
    if cast:
        job = worker.job
        assert job.untrained is not None
        before = load_untrained(job.untrained, job.model_kwargs).state_dict()
        values |= {name: before[name.replace(".base_layer.", ".")] for name in cast}
    for name in parameters.keys() & values.keys():
        parameter = parameters[name]
        parameter.data = values[name].to(parameter.device, dtype)


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
