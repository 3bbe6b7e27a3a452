"""Which Ray this process talks to: one answer for training, for serving, and for their errors."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from raywards.errors import ConfigError


def connect() -> Any:
    """The `ray` module, connected: to the cluster of RAY_ADDRESS, or of this machine, or a new one.

    Raises `ConfigError` where Ray is not installed, and what `check_recorded_address` raises.
    """
    ray = installed()
    if not ray.is_initialized():
        check_recorded_address()
        ray.init()
    return ray


def installed() -> Any:
    """The `ray` module. Raises `ConfigError` where it is not installed."""
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "num_workers above 0 and dataset_num_proc above 1 need Ray: pip install "
            "'raywards[train]', or leave both out."
        ) from None
    return ray


def check_recorded_address() -> None:
    """Refuse the cluster that `ray start` recorded on this machine, if nothing listens there.

    A head that was killed leaves its record behind, and Ray would try to reach it for 13 minutes
    (Ray 2.60). RAY_ADDRESS comes before the record, and may name a head that is still to come.
    """
    if os.environ.get("RAY_ADDRESS"):
        return
    record = _temporary_folder() / "ray" / "ray_current_cluster"
    try:
        address = record.read_text().strip()
    except OSError:
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except ConnectionRefusedError:
        raise ConfigError(
            f"{record} says that this machine's Ray cluster is at {address}, and nothing listens "
            "there: its head was killed. Remove that file to start a new Ray here, run `ray start` "
            "for a new cluster, or name another in RAY_ADDRESS."
        ) from None
    except (OSError, ValueError):
        return  # Ray knows better what to make of it


def _temporary_folder() -> Path:
    """As `ray` finds it."""
    names = ("RAY_TMPDIR", "TMPDIR") if sys.platform == "linux" else ("RAY_TMPDIR",)
    return Path(next((os.environ[name] for name in names if name in os.environ), "/tmp"))
