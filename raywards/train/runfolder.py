"""Whose a run folder is: `run.json` says what must not change while a run is continued.

The same settings stand in every checkpoint, so that one is not taken for another run's.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.config import RewardConfig, RunPaths, as_dict
from raywards.errors import CheckpointError, ConfigError
from raywards.train.storage import remove_cut_off

logger = logging.getLogger(__name__)

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


@contextlib.contextmanager
def hold(paths: RunPaths) -> Iterator[None]:
    """Keep the run folder to this process, and free of checkpoints that were never finished.

    By a lock of the operating system, which ends with the process however that ends.

    Raises `ConfigError` where another process trains into it, or where it cannot be made.
    """
    try:
        paths.run.mkdir(parents=True, exist_ok=True)
        lock = (paths.run / "run.lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"output_dir: {paths.run} cannot be made a folder ({error.strerror}). Give a path that "
            "this user may write to."
        ) from None
    with lock:
        _lock(lock, paths.run)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.ctime()}")
        lock.flush()
        remove_cut_off(paths.run)
        try:
            yield
        finally:
            remove_cut_off(paths.run)


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


def settings_to_continue(paths: RunPaths, explicit: Path | None) -> dict[str, Any] | None:
    """The fixed settings of the run in this folder, or of the checkpoint to start from, if any."""
    file = paths.run / "run.json"
    if file.is_file() and complete_checkpoints(paths.run):
        return _read_settings(file)
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
    raise CheckpointError(
        "\n".join([f"{where} of another run:", *lines])
        + "\nGo back to those settings to continue it, or give this run another output_dir or "
        "run_name."
    )


def claim(paths: RunPaths, config: RewardConfig, settings: Mapping[str, Any]) -> None:
    """Write `run.json` with the fixed `settings`, or refuse the folder of another run."""
    file = paths.run / "run.json"
    if file.is_file() and complete_checkpoints(paths.run):
        refuse_other_run(f"{paths.run}: holds checkpoints", _read_settings(file), settings)
    paths.run.mkdir(parents=True, exist_ok=True)
    content = {"settings": settings, "all": as_dict(config)}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(file)


def that_decide(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the settings that decide the weights."""
    return {name: value for name, value in settings.items() if name not in _MAY_CHANGE}


def refuse_folder_of_a_job(paths: RunPaths) -> None:
    """Raise `ConfigError` for a folder that will be gone when the job is."""
    if "working_dir_files" in paths.run.parts:
        raise ConfigError(
            f"output_dir: {paths.run} lies in the copy of the working directory that Ray made for "
            "this job and will delete. Give an absolute path that every node sees."
        )


def _lock(file: TextIO, run: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise ConfigError(
            f"{run}: another run trains into this folder now ({file.read()}). Wait for its end, "
            "stop it, or give this run another output_dir or run_name."
        ) from None
    except OSError as error:
        logger.warning(
            "%s: this file system has no locks (%s): see to it that no two runs share the folder",
            run,
            error.strerror,
        )


def _read_settings(file: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{file}: is damaged ({error!r}), so it cannot be told whether the checkpoints beside "
            "it are of this run. Restore it, or give this run another output_dir."
        ) from None
    return settings
