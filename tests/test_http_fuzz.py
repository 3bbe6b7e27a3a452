"""The real server under damaged requests, beside a client whose requests are good.

`RAYWARDS_FUZZ_S=600 pytest -m slow -s tests/test_http_fuzz.py` runs for ten minutes;
`RAYWARDS_FUZZ_SEED` is where the seeds begin. A finding names the seed of its request.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from http_mutations import GOOD, TALK, Damaged, draw_request, send
from tiny import tiny_qwen2

from raywards.scorer import Scorer
from raywards.serve.http import ROUTES

LENGTH_S = float(os.environ.get("RAYWARDS_FUZZ_S", "90"))
FIRST_SEED = int(os.environ.get("RAYWARDS_FUZZ_SEED", "0"))
MAY_BE = {200, 400, 404, 408, 413, 415, 422, 429, 503, 504}
# The tokenizer's cache of words fills up, and the allocator keeps what it had once.
SLACK_MIB = 32
CONNECTIONS = 4
WORDS_OF_FAILURE = ("Traceback", "internal", "never retrieved", "failed:", "died", "Unclosed")


class Alone:
    """A server in a process of its own, and what it takes."""

    def __init__(self, url: str, process: subprocess.Popen[bytes], log: Path, folder: Path) -> None:
        self.url, self.log, self.folder = url, log, folder
        self.process = psutil.Process(process.pid)
        host, _, port = url.removeprefix("http://").partition(":")
        self.address = (host, int(port))

    def takes(self) -> dict[str, int]:
        """Tasks, threads, open files, and MiB of memory, once it has come to rest."""
        time.sleep(0.5)
        return {
            "tasks": int(httpx.get(f"{self.url}/_tasks").text),
            "threads": self.process.num_threads(),
            "files": self.process.num_fds(),
            "mib": self.process.memory_info().rss // 2**20,
        }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alone]:
    folder = tiny_qwen2(tmp_path_factory.mktemp("model"))
    told, log = folder.parent / "url", folder.parent / "log"
    command = [sys.executable, str(Path(__file__).parent / "served_alone.py")]
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*command, str(folder), str(told)], stdin=subprocess.PIPE, stdout=out, stderr=out
        )
    try:
        for _ in range(600):
            if told.is_file() and told.read_text():
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield Alone(told.read_text(), process, log, folder)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0, log.read_text()


class Control(threading.Thread):
    """Sends good requests all the while; each is right, or refused as documented."""

    def __init__(self, alone: Alone) -> None:
        super().__init__(daemon=True)
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self._alone = alone
        self._over = threading.Event()
        self._expected = Scorer.from_pretrained(alone.folder, max_length=256).score([TALK])[0]

    def run(self) -> None:
        with httpx.Client(base_url=self._alone.url, timeout=20) as client:
            answered = time.monotonic()
            while not self._over.wait(0.01):
                idle_s = time.monotonic() - answered
                try:
                    self._ask(client)
                except Exception as error:  # it would be lost with the thread
                    self.wrong.append(f"{error!r}, {idle_s:.2f} s after the last answer")
                answered = time.monotonic()

    def _ask(self, client: httpx.Client) -> None:
        response = client.post("/v1/reward", json={"messages": TALK})
        self.statuses[response.status_code] += 1
        if response.status_code == 200:
            reward = response.json()["data"][0]["reward"]
            if abs(reward - self._expected) > 1e-5:
                self.wrong.append(f"{reward}, and not {self._expected}")
        elif response.status_code != 503 or "retry-after" not in response.headers:
            self.wrong.append(f"{response.status_code}: {response.text}")

    def stop(self) -> None:
        self._over.set()
        self.join(30)
        assert not self.is_alive(), "a good request hangs"


def expect_in_order(request: Damaged, reply: tuple[int, bytes, bytes] | None) -> int:
    """The status; of a documented kind, with finite numbers in a body of JSON."""
    if reply is None:
        return 0
    status, head, body = reply
    assert status in MAY_BE, f"{status}: {body!r}"
    if b"content-type: application/json" in head.lower():
        parsed = json.loads(body, parse_constant=lambda name: pytest.fail(f"{name} in {body!r}"))
        expect_finite(parsed)
        assert status == 200 or isinstance(parsed, dict), body
    elif b"ndjson" not in head:
        # Not HTTP any more: the server under the app says so.
        assert (status, body) == (400, b"Invalid HTTP request received."), (head, body)
    return status


def expect_finite(value: Any) -> None:
    if isinstance(value, float):
        assert math.isfinite(value)
    elif isinstance(value, dict):
        expect_finite(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            expect_finite(one)


def fuzz(alone: Alone, seconds: float, first: int) -> Counter[int]:
    """Damaged requests for so long, on a few connections at once; how often each status came."""
    end = time.monotonic() + seconds

    def some(seed: int) -> Counter[int]:
        statuses: Counter[int] = Counter()
        while time.monotonic() < end:
            request = draw_request(seed)
            try:
                statuses[expect_in_order(request, send(alone.address, request))] += 1
            except (AssertionError, OSError, ValueError) as error:
                error.add_note(f"seed {seed}: {request.manner} {request.raw()[:2000]!r}")
                raise
            seed += CONNECTIONS
        return statuses

    with ThreadPoolExecutor(CONNECTIONS) as threads:
        return sum(threads.map(some, range(first, first + CONNECTIONS)), Counter())


def run(alone: Alone, seconds: float, *, warm_up_s: float, first: int) -> tuple[Counter[int], str]:
    """Fuzz beside the control; then it must be as it was."""
    control = Control(alone)
    control.start()
    try:
        fuzz(alone, warm_up_s, first)
        before = alone.takes()
        statuses = fuzz(alone, seconds, first + 10**6)
        after = alone.takes()
    finally:
        control.stop()
    assert not control.wrong, control.wrong[:5]
    assert control.statuses[200] > 10 * seconds
    told = f"{statuses} control {control.statuses} before {before} after {after}"
    assert after["mib"] <= before["mib"] + SLACK_MIB, told
    for what in ("tasks", "threads", "files"):
        # A request of the control may be under way; a thread of a pool may be new.
        assert after[what] <= before[what] + 4, f"{what}: {told}"
    log = alone.log.read_text(errors="replace")
    found = [line for line in log.splitlines() if any(word in line for word in WORDS_OF_FAILURE)]
    assert not found, found[:5]
    return statuses, told


def test_every_route_has_good_bodies_that_are_answered(alone: Alone) -> None:
    assert set(GOOD) == {route.path for route in ROUTES}
    for path, bodies in GOOD.items():
        for body in bodies:
            response = httpx.post(alone.url + path, json=body)
            assert response.status_code == 200, f"{path} {body}: {response.text}"


def test_damaged_requests_disturb_nobody(alone: Alone) -> None:
    statuses, told = run(alone, 4, warm_up_s=1, first=0)
    assert statuses[200] > 20, told
    assert statuses[400] > 10, told
    assert statuses[422] > 20, told


@pytest.mark.slow
def test_many_damaged_requests_disturb_nobody_and_leave_nothing(alone: Alone) -> None:
    statuses, told = run(alone, LENGTH_S * 0.85, warm_up_s=LENGTH_S * 0.15, first=FIRST_SEED + 10)
    print(f"\n{statuses.total()} requests: {told}")
    assert {200, 400, 413, 415, 422} <= set(statuses)
