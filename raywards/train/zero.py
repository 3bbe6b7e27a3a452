"""The DeepSpeed dict of a run, and its native op: the only place that spells DeepSpeed's keys."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from raywards.config import RewardConfig
from raywards.errors import ConfigError, TrainingError


def default_stage(*, most_ranks: int, half_weights: bool) -> str:
    """ZeRO stage where `deepspeed` is not set.

    One process has nothing to shard, and ZeRO's copies cost it a third of its speed. Weights that
    are loaded in half precision need ZeRO for their fp32 masters.
    """
    return "2" if most_ranks > 1 or half_weights else "0"


def zero_config(
    config: RewardConfig, given: Any, *, num_ranks: int, global_batch: int, bf16: bool
) -> dict[str, Any]:
    """The dict for `deepspeed.initialize`, from `given`: a stage number, a dict, or a JSON file.

    `"auto"` becomes the value of the matching setting of `config`; a value that contradicts its
    setting is a `ConfigError` that names both, as in transformers.
    """
    settings = copy.deepcopy(read_zero(given))
    if "scheduler" in settings:
        raise ConfigError(
            "deepspeed.scheduler: the schedule is set by `lr_scheduler_type` and `warmup_steps`; "
            "take the section out."
        )
    _check_optimizer(settings.pop("optimizer", None), config)
    if settings.pop("fp16", {}).get("enabled") is True:
        raise ConfigError("deepspeed.fp16.enabled=true: use bf16; raywards does not train in fp16.")
    per_rank = config.per_device_train_batch_size
    expected = {
        "train_micro_batch_size_per_gpu": per_rank,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "train_batch_size": global_batch,
        "gradient_clipping": config.max_grad_norm,
        "bf16.enabled": bf16,
    }
    for path, value in expected.items():
        _fill(settings, path, value)
    # With fewer workers than at the first start, each takes more of the global batch: DeepSpeed,
    # which insists on a product, does not have to know.
    settings["train_batch_size"] = per_rank * config.gradient_accumulation_steps * num_ranks
    zero = settings.setdefault("zero_optimization", {})
    _keep_checks(settings)
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization.stage={stage!r}: expected 0, 1, 2 or 3.")
    if bf16 and stage == 0:
        # DeepSpeed's bf16 engine keeps its masters to itself at stage 0; under autocast the weights
        # are the masters, as in TRL.
        settings["bf16"] = {"enabled": False}
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    if zero.get("overlap_comm") is True and stage < 2:
        raise ConfigError(
            f"deepspeed.zero_optimization.overlap_comm=true is not possible at stage {stage}: "
            "gradients are reduced once a step. Take it out, or use stage 2."
        )
    if zero.get("overlap_comm") in (None, "auto"):
        zero["overlap_comm"] = False
    # We count pairs ourselves, so DeepSpeed must not count micro-batches (DESIGN: steps).
    settings["managed_gradient_accumulation"] = False
    # The optimizer is torch's fused AdamW: as fast as DeepSpeed's own, and needs no compiler.
    settings.setdefault("zero_allow_untested_optimizer", True)
    settings.setdefault("zero_force_ds_cpu_optimizer", False)
    settings.setdefault("steps_per_print", 2**31 - 1)
    _refuse_auto_left(settings)
    return settings


def read_zero(given: Any) -> dict[str, Any]:
    """The `deepspeed` setting as a dict with `"auto"` values still in it. Reads a JSON file."""
    if isinstance(given, str) and given.isdigit():
        stage = int(given)
        if stage > 3:
            raise ConfigError(f"deepspeed={given}: a ZeRO stage is 0, 1, 2 or 3.")
        return {"zero_optimization": {"stage": stage}}
    if isinstance(given, str) and given.lstrip().startswith("{"):
        return _parse(given, "deepspeed")
    if isinstance(given, str):
        path = Path(given).expanduser()
        if not path.is_file():
            raise ConfigError(
                f"deepspeed={given!r}: expected a ZeRO stage (0 to 3), a dict, or a JSON file; "
                "there is no such file."
            )
        return _parse(path.read_text(encoding="utf-8"), f"deepspeed={given!r}")
    return dict(given)


def stage_of(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage in a DeepSpeed dict."""
    return int(settings["zero_optimization"]["stage"])


def fill_model_sizes(settings: dict[str, Any], hidden_size: int) -> None:
    """Replace the `"auto"` sizes of ZeRO-3 by those transformers derives from the hidden size."""
    zero = settings["zero_optimization"]
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    for name, size in sizes.items():
        if zero.get(name) == "auto":
            zero[name] = size


def build_ops(say: Callable[[str], None]) -> None:
    """Get DeepSpeed's one native op ready to build, and tell of the wait.

    DeepSpeed compiles it when it is first initialised (about a minute). A build that was killed
    leaves a lock behind on which every later start would wait for ever: such a lock is removed.

    Raises `TrainingError` where there is no compiler or no ninja.
    """
    build = _build_folder()
    lock = build / "lock"
    if lock.is_file() and not _is_being_built(build):
        say(f"Removing {lock}, which a build that was killed left behind.")
        lock.unlink(missing_ok=True)
    if any(build.glob("*.so")):
        return
    for tool, package in (("ninja", "pip install ninja"), ("g++", "your system's C++ compiler")):
        if shutil.which(tool) is None:
            raise TrainingError(
                f"DeepSpeed compiles a small op when it is first used, and {tool} is not on PATH. "
                f"Install it ({package}), and start again."
            )
    say("DeepSpeed compiles its communication op, once on this machine: about a minute.")


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}: is not valid JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{name}: expected a JSON object.")
    return parsed


def _check_optimizer(section: dict[str, Any] | None, config: RewardConfig) -> None:
    """Accept an AdamW section that says what our settings say, or `"auto"`; refuse another."""
    if section is None:
        return
    if section.get("type") not in ("AdamW", "Adam"):
        raise ConfigError(
            f"deepspeed.optimizer.type={section.get('type')!r}: raywards trains with AdamW; take "
            "the section out."
        )
    ours = {
        "lr": config.learning_rate,
        "betas": [config.adam_beta1, config.adam_beta2],
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    names = {"lr": "learning_rate", "betas": "adam_beta1/2", "eps": "adam_epsilon"}
    for name, value in section.get("params", {}).items():
        if name in ours and value != "auto" and value != ours[name]:
            raise ConfigError(
                f"deepspeed.optimizer.params.{name}={value} contradicts "
                f'{names.get(name, name)}={ours[name]}; write "auto" or take it out.'
            )


def _keep_checks(settings: Mapping[str, Any]) -> None:
    """Refuse what makes DeepSpeed apply a gradient that is not finite."""
    checks = (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm"))
    for section, name in checks:
        if settings.get(section, {}).get(name) is False:
            raise ConfigError(
                f"deepspeed.{section}.{name}=false: a gradient that is not finite would be applied "
                "unseen; take it out."
            )


def _fill(settings: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    section = settings
    for parent in parents:
        section = section.setdefault(parent, {})
    given = section.get(name, "auto")
    if given != "auto" and given != value:
        raise ConfigError(
            f"deepspeed.{path}={given!r} contradicts this run's settings, which give {value!r}; "
            'write "auto" or take it out.'
        )
    section[name] = value


def _refuse_auto_left(settings: Mapping[str, Any], path: str = "deepspeed") -> None:
    by_model = (
        "reduce_bucket_size",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
    )
    for name, value in settings.items():
        if isinstance(value, Mapping):
            _refuse_auto_left(value, f"{path}.{name}")
        elif value == "auto" and name not in by_model:
            raise ConfigError(f'{path}.{name}="auto": no setting fills this in; give a value.')


def _build_folder() -> Path:
    from torch.utils import cpp_extension

    # Private, but the one place that knows where torch builds; it follows TORCH_EXTENSIONS_DIR.
    return Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False))


def _is_being_built(build: Path) -> bool:
    """Whether a ninja works in the build folder, or its lock is so young that one may come."""
    import psutil

    try:
        if time.time() - (build / "lock").stat().st_mtime < 10:
            return True
    except FileNotFoundError:
        return False
    for process in psutil.process_iter(["name"]):
        try:
            if process.info["name"] == "ninja" and Path(process.cwd()) == build:
                return True
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
        except psutil.AccessDenied:
            return True  # somebody else's ninja: leave their lock alone
    return False
