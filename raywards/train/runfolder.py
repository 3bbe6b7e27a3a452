"""Whose a run folder is: `run.json` says what must not change while a run is continued.

The same settings stand in every checkpoint, so that one is not taken for another run's.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raywards.checkpoint import read_manifest
from raywards.config import RewardConfig, RunPaths, as_dict
from raywards.errors import CheckpointError, ConfigError
from raywards.train.storage import Storage

_FILE = "run.json"

# Settings that may differ when a run is started again: they change neither weights nor their order.
_MAY_CHANGE = {
    "output_dir", "storage_path", "run_name", "disable_tqdm", "logging_steps", "logging_first_step",
    "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size", "save_strategy",
    "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
    "hub_private_repo", "num_workers", "elastic_resize_monitor_interval_s", "max_failures",
    "ddp_timeout", "dataset_num_proc", "resources_per_worker", "use_gpu", "use_cpu",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "max_tokens_per_row",
    "early_stopping_patience", "early_stopping_threshold", "report_to", "project",
    "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_revision",
    "activation_offloading",
}  # fmt: skip

# Settings that the first start decides where they are not set: later ones keep its value.
_DECIDED_FIRST = ("global_batch", "deepspeed")


def fixed_settings(
    config: RewardConfig, facts: Mapping[str, Any], continued: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What must not change while a run is continued, ready for JSON.

    `facts` are what settings alone do not tell: the pairs, the model, what a default came to.
    `continued` are the fixed settings of the run that is continued, if one is.
    """
    settings = {k: v for k, v in as_dict(config).items() if k not in _MAY_CHANGE}
    batch = ("per_device_train_batch_size", "gradient_accumulation_steps")
    given = {"global_batch": False, "deepspeed": config.deepspeed is not None}
    if continued is not None:
        # Another number of workers leaves the global batch as it is; another share of it does not.
        given["global_batch"] = any(settings[name] != continued.get(name) for name in batch)
    settings |= facts
    for name in _DECIDED_FIRST:
        if continued is not None and name in continued and not given[name]:
            settings[name] = continued[name]
    return json.loads(json.dumps(settings, default=str))  # type: ignore[no-any-return]


def settings_to_continue(storage: Storage, explicit: Path | None) -> dict[str, Any] | None:
    """The fixed settings of the run in this folder, or of the checkpoint to start from, if any."""
    if (settings := _settings_in_use(storage)) is not None:
        return settings
    if explicit is not None:
        return checkpoint_settings(explicit, read_manifest(explicit, kind="checkpoint"))
    return None


def checkpoint_settings(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The fixed settings of the run that wrote a checkpoint."""
    if "settings" not in manifest:
        raise CheckpointError(
            f"{folder}: was written by raywards {manifest.get('raywards', 'before 0.1')}, whose "
            "checkpoints do not say of which run they are: this version cannot continue from it. "
            "Finish that run with the version that began it."
        )
    settings: dict[str, Any] = manifest["settings"]
    return settings


def refuse_other_run(where: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where the fixed settings of two runs differ; it says in what."""
    differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
    if not differing:
        return
    lines = [
        f"  {k}: was {theirs.get(k, 'not there')!r}, is {ours.get(k, 'not there')!r}"
        for k in differing[:12]
    ]
    if "pairs" in differing:
        lines.append("  (`pairs` covers the rows, their source, the rendering, the version)")
    if "untrained_weights" in differing:
        lines.append(
            "  (what is not trained is in no checkpoint: it is taken from the model again)"
        )
    raise CheckpointError(
        "\n".join([f"{where} of another run:", *lines])
        + "\nGo back to those settings to continue it, or give this run another output_dir or "
        "run_name."
    )


def claim(storage: Storage, config: RewardConfig, settings: Mapping[str, Any]) -> None:
    """Write `run.json` with the fixed `settings`, or refuse the folder of another run."""
    if (theirs := _settings_in_use(storage)) is not None:
        refuse_other_run(f"{storage.where()}: holds checkpoints", theirs, settings)
    content = {"settings": settings, "all": as_dict(config)}
    storage.write(_FILE, json.dumps(content, indent=1, default=str) + "\n")


def sweep(paths: RunPaths) -> None:
    """Remove what a killed start has left half-made. Only while this process holds the folder."""
    partial = [*paths.run.glob(".*.partial"), *paths.prepared.glob(".*.partial")]
    for left in (*partial, *paths.run.glob(".resharded-*")):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def that_decide(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that decide the weights."""
    return {name: value for name, value in settings.items() if name not in _MAY_CHANGE}


def refuse_folder_of_a_job(paths: RunPaths) -> None:
    """Raise `ConfigError` for a folder that will be gone when the job is."""
    if "working_dir_files" in paths.run.parts:
        raise ConfigError(
            f"output_dir: {paths.run} lies in the copy of the working directory that Ray made for "
            "this job and will delete. Give an absolute path that every node sees, or a "
            "storage_path."
        )


def _settings_in_use(storage: Storage) -> dict[str, Any] | None:
    """The fixed settings in `run.json`, where there are checkpoints that they hold for."""
    content = storage.read(_FILE)
    if content is None or not storage.checkpoints():
        return None
    try:
        settings: dict[str, Any] = json.loads(content)["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{storage.where(_FILE)}: is damaged ({error!r}), so it cannot be told whether the "
            "checkpoints beside it are of this run. Restore it, or give this run another "
            "output_dir."
        ) from None
    return settings
