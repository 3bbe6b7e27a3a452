"""The environment of every test, set before anything is imported, and one Ray for those that ask.

No test reaches a hub or a network; no Ray process outlives the session.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
RAY_PROCESSES = {"raylet", "gcs_server"}

os.environ.update(
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",  # tiny models on shared cores: several threads cost five times the time
    RAY_AUTH_MODE="disabled",  # by default a local Ray writes ~/.ray/auth_token
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    # Short: sockets lie below it. Its own: the default may name a cluster that was killed.
    RAY_TMPDIR=f"{tempfile.gettempdir()}/rw{os.getpid()}",
    RAY_USAGE_STATS_ENABLED="0",
    TOKENIZERS_PARALLELISM="false",
    TRACKIO_DIR=str(Path(tempfile.gettempdir()) / "raywards-tests-trackio"),
)
os.environ.pop("RAY_ADDRESS", None)  # never somebody's cluster
# DeepSpeed runs `ninja` from PATH, also where pytest was started without activating .venv.
os.environ["PATH"] = os.pathsep.join([f"{sys.prefix}/bin", os.environ["PATH"]])
# Workers of Ray import the package and the modules of the tests from here, installed or not.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
)
sys.path.insert(0, str(ROOT))


def ray_children() -> list[psutil.Process]:
    """Ray's node processes below this one."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if child.name() in RAY_PROCESSES and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture(scope="session", autouse=True)
def no_ray_process_is_left() -> Iterator[None]:
    """Set up first, hence checked last: after `ray_cluster` and every module's own clusters."""
    yield
    _, alive = psutil.wait_procs(ray_children(), timeout=10)
    left = [f"{process.name()} ({process.pid})" for process in alive]
    for process in alive:
        process.kill()
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)
    assert not left, f"the tests left Ray running: {', '.join(left)}"


@pytest.fixture(scope="session")
def ray_cluster(no_ray_process_is_left: None) -> Iterator[None]:
    """One Ray node with four logical CPUs, on free ports, for the whole session."""
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=200 * 1024**2,
        )
        yield
    finally:
        ray.shutdown()
