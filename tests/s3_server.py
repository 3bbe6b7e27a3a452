"""An S3-compatible object store on this machine: moto's server, a process of its own."""

from __future__ import annotations

import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ports import free_port
from pyarrow import fs

BUCKET, KEY, SECRET = "bucket", "key", "very-secret"
# pyarrow asks for the region of Amazon's own buckets where none is named.
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass
class ObjectStore:
    """A server with one empty bucket."""

    port: int
    process: Any = field(repr=False)

    @property
    def address(self) -> str:
        """A `storage_path` in it, with its keys: Ray's workers may have another environment."""
        query = f"scheme=http&endpoint_override=127.0.0.1:{self.port}&region=us-east-1"
        return f"s3://{KEY}:{SECRET}@{BUCKET}/rewards?{query}"

    def files(self) -> dict[str, int]:
        """Every object below `address`, as name to size."""
        system, path = fs.FileSystem.from_uri(self.address)
        infos = system.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        return {i.path.removeprefix(f"{path}/"): i.size for i in infos if i.is_file}

    def read(self, name: str) -> bytes:
        system, path = fs.FileSystem.from_uri(self.address)
        with system.open_input_stream(f"{path}/{name}") as stream:
            content: bytes = stream.read()
        return content

    def delete(self, name: str) -> None:
        system, path = fs.FileSystem.from_uri(self.address)
        system.delete_file(f"{path}/{name}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def object_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    """A server for the time of the block, and the environment to reach it with."""
    for name, value in _ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("moto_server")),
        "-H",
        "127.0.0.1",
        "-p",
        str(port),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _make_bucket(port, process)
        yield ObjectStore(port, process)
    finally:
        process.kill()
        process.wait()


def _make_bucket(port: int, process: Any) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")
    deadline = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None, "the object store ended"
            assert time.monotonic() < deadline, "the object store does not start"
            time.sleep(0.1)
