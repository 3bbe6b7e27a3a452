"""The record that a killed head leaves on its machine is refused, not waited for."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

from raywards.errors import ConfigError
from raywards.ray_cluster import check_recorded_address


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where Ray would read the address of this machine's cluster."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray" / "ray_current_cluster"


@pytest.fixture
def listening() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_the_record_lies_where_ray_reads_it(record: Path) -> None:
    from ray._common.utils import get_ray_address_file

    assert Path(get_ray_address_file(None)) == record


def test_no_record_and_a_cluster_that_listens_pass(record: Path, listening: str) -> None:
    check_recorded_address()
    record.write_text(listening)
    check_recorded_address()


def test_a_cluster_that_is_gone_is_refused(record: Path) -> None:
    record.write_text(f"127.0.0.1:{free_port()}")
    with pytest.raises(ConfigError, match="nothing listens there: its head was killed") as refused:
        check_recorded_address()
    assert str(record) in str(refused.value)


def test_ray_address_comes_first(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record.write_text(f"127.0.0.1:{free_port()}")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    check_recorded_address()


@pytest.mark.parametrize("text", ["", "nonsense", "host:port", "no.such.host.invalid:6379"])
def test_what_is_no_address_is_left_to_ray(record: Path, text: str) -> None:
    record.write_text(text)
    check_recorded_address()


@pytest.mark.parametrize("module", ["raywards.ray_cluster", "raywards.serve.app"])
def test_training_and_serving_ask_before_they_connect(record: Path, module: str) -> None:
    record.write_text(f"127.0.0.1:{free_port()}")
    start = {
        "raywards.ray_cluster": "connect()",
        "raywards.serve.app": "deploy(__import__('raywards').ServeConfig(model='m'))",
    }[module]
    ran = subprocess.run(
        [sys.executable, "-c", f"from {module} import *; {start}"],
        env=dict(os.environ), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ran.returncode == 1
    assert "its head was killed" in ran.stderr.splitlines()[-1]
