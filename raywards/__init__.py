"""raywards: train reward models on Ray Train with DeepSpeed, serve them on Ray Serve.

Names are resolved when they are first used, so `from raywards import RewardClient` imports
neither torch nor ray.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raywards.client import AsyncRewardClient, RewardClient
    from raywards.config import RewardConfig, ServeConfig
    from raywards.errors import RaywardsError
    from raywards.loader import create_model_from_path
    from raywards.scorer import Scorer
    from raywards.train.trainer import RewardTrainer

__version__ = "0.1.0"

__all__ = [
    "AsyncRewardClient",
    "RaywardsError",
    "RewardClient",
    "RewardConfig",
    "RewardTrainer",
    "Scorer",
    "ServeConfig",
    "create_model_from_path",
]

# Name: its module, and the extra whose packages that module needs.
_HOMES = {
    "AsyncRewardClient": ("raywards.client", None),
    "RaywardsError": ("raywards.errors", None),
    "RewardClient": ("raywards.client", None),
    "RewardConfig": ("raywards.config", None),
    "RewardTrainer": ("raywards.train.trainer", "train"),
    "Scorer": ("raywards.scorer", "score"),
    "ServeConfig": ("raywards.config", None),
    "create_model_from_path": ("raywards.loader", "score"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'raywards' has no attribute {name!r}")
    module, extra = _HOMES[name]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if extra is None:
            raise
        raise ModuleNotFoundError(
            f"{name} needs {error.name or error}: pip install 'raywards[{extra}]'", name=error.name
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
