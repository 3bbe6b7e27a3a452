"""Under load, on a real Ray Serve: what an operator does to a model, and what happens to it.

Clients ask all the while, and compare each answer with the rewards of the models that may give it.
In front stands Serve's own proxy, but for the last test: there HAProxy does.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ports import free_port
from tiny import tiny_qwen2

from raywards.client import RewardClient
from raywards.config import ServeConfig
from raywards.errors import ModelError
from raywards.scorer import Scorer
from raywards.serve import deploy, endpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TALKS = [
    [
        {"role": "user", "content": f"What is the capital of country {n}? " * (n % 4 + 1)},
        {"role": "assistant", "content": f"It is city {n}, I am sure."},
    ]
    for n in range(24)
]
CLIENTS = 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models that agree on nothing."""
    base = tmp_path_factory.mktemp("models")
    return {"old": tiny_qwen2(base / "old"), "new": tiny_qwen2(base / "new", seed=7)}


@pytest.fixture(scope="module")
def rewards(folders: dict[str, Path]) -> dict[str, list[float]]:
    found = {name: Scorer.from_pretrained(path).score(TALKS) for name, path in folders.items()}
    assert all(abs(a - b) > 1e-3 for a, b in zip(*found.values(), strict=True))
    return found


@pytest.fixture(scope="module")
def config(folders: dict[str, Path]) -> ServeConfig:
    return ServeConfig(
        model=str(folders["old"]),
        port=free_port(),
        max_batch_tokens=512,
        upscale_delay_s=1,
        downscale_delay_s=3,
        num_cpus=0.5,
    )


@pytest.fixture(scope="module", autouse=True)
def serve_is_shut_down(ray_cluster: None) -> Iterator[None]:
    from ray import serve

    try:
        yield
    finally:
        serve.shutdown()


class Load:
    """Clients that ask one conversation after the other, and know what may come back."""

    def __init__(self, config: ServeConfig, rewards: dict[str, list[float]]) -> None:
        self.url, self.rewards = endpoint(config), rewards
        self.answers: Counter[str] = Counter()
        self.wrong: list[Any] = []
        self.slowest_s = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def phase(self) -> Counter[str]:
        """The answers since the last look, by the model that gave them."""
        with self._lock:
            seen, self.answers = self.answers, Counter()
        return seen

    def ask_on(self, first: int) -> None:
        with RewardClient(self.url, timeout_s=60) as client:
            for n in itertools.count(first):
                if self._stop.is_set():
                    return
                self.ask(client, n % len(TALKS))

    def ask(self, client: RewardClient, n: int) -> None:
        started = time.monotonic()
        try:
            [reward] = client.score([TALKS[n]])
        except Exception as error:
            self.wrong.append(error)
            return
        giver = [name for name, known in self.rewards.items() if abs(known[n] - reward) < 1e-5]
        with self._lock:
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            self.answers[giver[0] if giver else "nobody"] += 1

    @contextmanager
    def running(self, clients: int = CLIENTS) -> Iterator[Load]:
        """Nothing is lost, and nothing is wrong, while the block runs."""
        with ThreadPoolExecutor(clients) as pool:
            asking = [pool.submit(self.ask_on, 5 * one) for one in range(clients)]
            try:
                yield self
            finally:
                self._stop.set()
        for one in asking:
            one.result()
        assert not self.wrong
        assert "nobody" not in self.answers


def wait_for(holds: Callable[[], bool], within_s: float = 60) -> float:
    """Seconds until it holds."""
    started = time.monotonic()
    while not holds():
        assert time.monotonic() - started < within_s
        time.sleep(0.1)
    return time.monotonic() - started


def replicas(name: str = "rm", parent: int | None = None) -> list[psutil.Process]:
    """Below this process, or another one that has started Ray."""

    def is_one(process: psutil.Process) -> bool:
        try:
            return f"ray::ServeReplica:{name}:" in "".join(process.cmdline()[:1])
        except psutil.Error:  # it has just ended
            return False

    below = psutil.Process(parent).children(recursive=True)
    return [process for process in below if is_one(process)]


def running_replicas(name: str = "rm") -> int:
    from ray import serve

    application = serve.status().applications[name]
    return application.deployments["RewardModel"].replica_states.get("RUNNING", 0)


def test_an_update_loses_nothing_and_a_bad_one_changes_nothing(
    config: ServeConfig, folders: dict[str, Path], rewards: dict[str, list[float]]
) -> None:
    deploy(config)
    [first] = replicas()
    with Load(config, rewards).running() as load:
        wait_for(lambda: load.answers["old"] > 20)
        deploy(config)
        assert replicas() == [first], "the same settings restart nothing"

        with pytest.raises(ModelError, match=r"nowhere: there is no such folder"):
            deploy(config.model_copy(update={"model": str(folders["old"].parent / "nowhere")}))
        time.sleep(1)
        assert set(load.phase()) == {"old"}

        deploy(config.model_copy(update={"model": str(folders["new"])}))
        wait_for(lambda: not first.is_running())
        load.phase()
        wait_for(lambda: load.answers["new"] > 20)
        assert set(load.phase()) == {"new"}
    deploy(config)  # for the next test


def test_a_canary_gets_its_share_and_is_taken_out_at_once(
    config: ServeConfig, folders: dict[str, Path], rewards: dict[str, list[float]]
) -> None:
    from ray import serve

    deploy(config)
    [first] = replicas()
    candidate = {"model": str(folders["new"]), "name": "candidate", "route_prefix": "/candidate"}
    deploy(config.model_copy(update=candidate))
    share = {"canary": "candidate", "canary_share": 0.5, "other_models": ["candidate"]}
    with Load(config, rewards).running() as load:
        wait_for(lambda: load.answers["old"] > 20)
        assert set(load.phase()) == {"old"}
        deploy(config.model_copy(update=share))
        wait_for(lambda: load.answers["new"] > 20)
        load.phase()
        time.sleep(2)
        seen = load.phase()
        assert seen["new"] > 0
        assert seen["old"] > 0

        started = time.monotonic()
        deploy(config.model_copy(update={**share, "canary_share": 0.0}))
        load.phase()
        time.sleep(1.5)
        load.phase()
        wait_for(lambda: load.answers["old"] > 20)
        assert set(load.phase()) == {"old"}
        print(f"rolled back and seen so after {time.monotonic() - started:.1f} s")

        # By its name it is there still; and what it cannot answer any more, the model here does.
        reply = httpx.post(
            f"{endpoint(config)}/v1/reward", json={"messages": TALKS[0], "model": "candidate"}
        ).json()
        assert reply["model"] == "candidate"
        assert reply["data"][0]["reward"] == pytest.approx(rewards["new"][0], abs=1e-5)
        deploy(config.model_copy(update={**share, "canary_share": 1.0}))
        wait_for(lambda: load.answers["new"] > 20)
        serve.delete("candidate")
        load.phase()
        wait_for(lambda: load.answers["old"] > 20)
        assert set(load.phase()) <= {"old", "new"}
        assert replicas() == [first], "traffic restarts nothing"
    deploy(config)


def test_replicas_come_with_the_tokens_and_go_and_one_that_is_killed_is_replaced(
    config: ServeConfig, rewards: dict[str, list[float]]
) -> None:
    deploy(config)
    [first] = replicas()
    # Clients on the same two cores keep few tokens waiting.
    deploy(config.model_copy(update={"max_replicas": 3, "target_replica_tokens": 5}))
    assert replicas() == [first], "what Serve does itself restarts nothing"
    with Load(config, rewards).running(clients=8) as load:
        up_s = wait_for(lambda: running_replicas() == 3, within_s=90)
        wait_for(lambda: load.answers["old"] > 100)
        victim = replicas()[0]
        victim.kill()
        back_s = wait_for(lambda: len(replicas()) == 3 and victim not in replicas())
        answers = load.phase()
    with Load(config, rewards).running(clients=1) as load:
        started = time.monotonic()
        deploy(config.model_copy(update={"max_replicas": 3, "target_replica_tokens": 10**6}))
        wait_for(lambda: running_replicas() == 1, within_s=90)
        down_s = time.monotonic() - started
        assert load.phase()["old"] > 0
    print(f"3 replicas after {up_s:.1f} s, {answers['old']} answers", end="; ")
    print(
        f"a killed one replaced after {back_s:.1f} s, 1 replica {down_s:.1f} s after one was enough"
    )


def test_from_zero_replicas_the_first_request_is_answered(
    config: ServeConfig, rewards: dict[str, list[float]]
) -> None:
    from ray import serve

    sleeping = {"min_replicas": 0, "max_replicas": 1, "name": "sleeping", "route_prefix": "/zero"}
    asleep = config.model_copy(update=sleeping)
    deploy(asleep)
    wait_for(lambda: not replicas("sleeping"))
    with RewardClient(endpoint(asleep), timeout_s=60) as client:
        assert client.score(TALKS[:1]) == pytest.approx(rewards["old"][:1], abs=1e-5)
    serve.delete("sleeping")


def test_a_thousand_at_once_are_answered_or_told_when_to_come_back(
    config: ServeConfig, rewards: dict[str, list[float]]
) -> None:
    deploy(config.model_copy(update={"max_queued_tokens": 4096}))

    async def one(http: httpx.AsyncClient, n: int) -> int:
        body = {"messages": TALKS[n % len(TALKS)]}
        reply = await http.post(f"{endpoint(config)}/v1/reward", json=body)
        if reply.status_code == 200:
            [row] = reply.json()["data"]
            assert row["reward"] == pytest.approx(rewards["old"][n % len(TALKS)], abs=1e-5)
        else:
            assert reply.status_code == 503, reply.text
            assert int(reply.headers["retry-after"]) >= 1
        return reply.status_code

    async def main() -> Counter[int]:
        limits = httpx.Limits(max_connections=1000)
        async with httpx.AsyncClient(timeout=90, limits=limits) as http:
            return Counter(await asyncio.gather(*(one(http, n) for n in range(1000))))

    statuses = asyncio.run(main())
    assert statuses[200] > 0
    assert sum(statuses.values()) == 1000
    print(statuses)
    with RewardClient(endpoint(config)) as client:
        assert client.score(TALKS) == pytest.approx(rewards["old"], abs=1e-5)


JOB = """
import json, sys, ray
from raywards.config import ServeConfig
from raywards.serve import run

ray.init(address=sys.argv[1], log_to_driver=False)
run(ServeConfig(**json.loads(sys.argv[2])))
"""


def test_a_job_takes_over_from_another_and_deletes_what_it_deployed_alone(
    config: ServeConfig, folders: dict[str, Path], rewards: dict[str, list[float]]
) -> None:
    import ray
    from ray import serve

    here = config.model_copy(update={"name": "job", "route_prefix": "/job"})
    jobs: list[subprocess.Popen[bytes]] = []

    def job(model: Path) -> subprocess.Popen[bytes]:
        asked = {"model", "name", "route_prefix", "port", "max_batch_tokens", "num_cpus"}
        settings = here.model_copy(update={"model": str(model)}).model_dump_json(include=asked)
        address = ray.get_runtime_context().gcs_address
        jobs.append(subprocess.Popen([sys.executable, "-c", JOB, address, settings]))
        return jobs[-1]

    def given_by() -> str:
        with RewardClient(endpoint(here), timeout_s=30) as client:
            reward = client.score(TALKS[:1])[0]
        return next(name for name, known in rewards.items() if abs(known[0] - reward) < 1e-5)

    try:
        first = job(folders["old"])
        with RewardClient(endpoint(here)) as client:
            client.wait_until_ready(90)
        assert given_by() == "old"
        assert job(folders["old"].parent / "nowhere").wait(90) != 0
        assert given_by() == "old"
        second = job(folders["new"])
        assert first.wait(90) == 0, "it has been replaced"
        wait_for(lambda: given_by() == "new")
        second.send_signal(signal.SIGINT)
        assert second.wait(60) == 0
        assert "job" not in serve.status().applications
    finally:
        for one in jobs:
            one.kill()


HAPROXY = """
import json, sys, ray
from ray import serve
from raywards.config import ServeConfig
from raywards.serve import deploy

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
try:
    for line in sys.stdin:
        deploy(ServeConfig(**json.loads(line)))
        print("ready", flush=True)
finally:
    serve.shutdown()
    ray.shutdown()
"""


def test_behind_haproxy_a_killed_replica_and_an_update_lose_nothing(
    config: ServeConfig, folders: dict[str, Path], rewards: dict[str, list[float]]
) -> None:
    given = {"port": free_port(), "min_replicas": 2, "max_replicas": 2}
    here = config.model_copy(update=given)
    asked = {"model", "max_batch_tokens", "num_cpus", *given}
    ray_folder = tempfile.mkdtemp(prefix="rw")  # the path of a socket in it must be short
    environment = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_TMPDIR": ray_folder,
    }
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HAPROXY)],
        env={**os.environ, **environment}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None

    def deployed(model: str) -> None:
        settings = here.model_copy(update={"model": str(folders[model])})
        process.stdin.write(settings.model_dump_json(include=asked) + "\n")
        process.stdin.flush()
        assert "ready\n" in process.stdout  # between lines of Ray

    try:
        deployed("old")
        with Load(here, rewards).running(clients=8) as load:
            wait_for(lambda: load.answers["old"] > 300)
            below = psutil.Process(process.pid).children(recursive=True)
            assert any("haproxy" in child.name() for child in below), "something else was tested"
            victim = replicas(parent=process.pid)[0]
            victim.kill()
            load.phase()
            back_s = wait_for(
                lambda: victim not in (now := replicas(parent=process.pid)) and len(now) == 2
            )
            wait_for(lambda: load.answers["old"] > 300)
            deployed("new")
            wait_for(lambda: load.answers["new"] > 100)  # and those that were under way are there
            load.phase()
            wait_for(lambda: load.answers["new"] > 300)
            assert set(load.phase()) == {"new"}
        print(f"a killed one replaced after {back_s:.1f} s, slowest {load.slowest_s:.1f} s")
    finally:
        process.communicate(timeout=90)
        shutil.rmtree(ray_folder)
