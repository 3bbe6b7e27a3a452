"""Whose a run folder is: `run.json` says what must not change while a run is continued."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raywards.checkpoint import complete_checkpoints
from raywards.config import RewardConfig, RunPaths, as_dict
from raywards.errors import CheckpointError, ConfigError

# Settings that may differ when a run is started again: they change neither weights nor their order.
_MAY_CHANGE = {
    "output_dir", "storage_path", "run_name", "disable_tqdm", "logging_steps", "logging_first_step",
    "eval_strategy", "eval_steps", "eval_on_start", "per_device_eval_batch_size", "save_strategy",
    "save_steps", "save_total_limit", "resume_from_checkpoint", "push_to_hub", "hub_model_id",
    "hub_private_repo", "max_failures", "ddp_timeout", "dataset_num_proc", "resources_per_worker",
    "use_gpu", "use_cpu", "gradient_checkpointing", "gradient_checkpointing_kwargs",
    "max_tokens_per_row", "activation_offloading",
}  # fmt: skip


def claim(paths: RunPaths, config: RewardConfig, facts: Mapping[str, Any]) -> str:
    """Write `run.json`, and return the digest of what must not change: the run's identity.

    `facts` are what settings alone do not tell (the pairs, the model); they replace settings of
    their names. Raises `CheckpointError` for a folder whose checkpoints belong to another run.
    """
    ours = {k: v for k, v in as_dict(config).items() if k not in _MAY_CHANGE} | dict(facts)
    file = paths.run / "run.json"
    if file.is_file() and complete_checkpoints(paths.run):
        theirs = _read_settings(file)
        differing = sorted(k for k in {*ours, *theirs} if ours.get(k) != theirs.get(k))
        if differing:
            lines = [f"  {k}: was {theirs.get(k)!r}, is {ours.get(k)!r}" for k in differing[:12]]
            if "pairs" in differing:
                lines.append(
                    "  (`pairs` covers the rows, their source, the rendering, the version)"
                )
            raise CheckpointError(
                "\n".join([f"{paths.run}: holds checkpoints of another run:", *lines])
                + "\nGo back to those settings to continue it, or give this run another "
                "output_dir or run_name."
            )
    identity = hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()
    paths.run.mkdir(parents=True, exist_ok=True)
    content = {"identity": identity, "settings": ours, "all": as_dict(config)}
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
    partial.replace(file)
    return identity


def refuse_folder_of_a_job(paths: RunPaths) -> None:
    """Raise `ConfigError` for a folder that will be gone when the job is."""
    if "working_dir_files" in paths.run.parts:
        raise ConfigError(
            f"output_dir: {paths.run} lies in the copy of the working directory that Ray made for "
            "this job and will delete. Give an absolute path that every node sees."
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
