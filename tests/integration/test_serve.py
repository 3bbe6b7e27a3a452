"""A real model on a real Ray Serve: HTTP, handle and Scorer agree; a killed replica costs time."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from ports import free_port
from tiny import tiny_qwen2

from raywards.client import AsyncRewardClient, RewardClient
from raywards.config import ServeConfig
from raywards.errors import ConfigError, ModelError, RequestRefusedError
from raywards.scorer import Scorer
from raywards.serve import build, deploy, endpoint

pytestmark = pytest.mark.ray

KEY = "integration-key"
TALKS = [
    [
        {"role": "user", "content": "What is the capital of France?" * (n % 3 + 1)},
        {"role": "assistant", "content": f"Paris, I am sure of it {n} times."},
    ]
    for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "rm")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Scorer:
    return Scorer.from_pretrained(folder)


@pytest.fixture(scope="module")
def config(folder: Path) -> ServeConfig:
    return ServeConfig(
        model=str(folder),
        port=free_port(),
        route_prefix="/models/rm",
        api_key=KEY,
        max_batch_tokens=512,
        max_queued_tokens=4096,
        min_replicas=1,
        max_replicas=2,
        upscale_delay_s=600,
    )


@pytest.fixture(scope="module")
def handle(config: ServeConfig, ray_cluster: None) -> Iterator[Any]:
    from ray import serve

    try:
        yield deploy(config)
    finally:
        serve.shutdown()


@pytest.fixture
def client(config: ServeConfig, handle: Any) -> Iterator[RewardClient]:
    with RewardClient(endpoint(config), api_key=KEY) as client:
        yield client


def test_http_handle_and_scorer_give_one_reward(
    client: RewardClient, handle: Any, scorer: Scorer
) -> None:
    expected = scorer.score(TALKS)
    assert len(set(expected)) == len(expected)
    assert client.score(TALKS) == pytest.approx(expected, abs=1e-5)
    assert [client.score([talk])[0] for talk in TALKS] == pytest.approx(expected, abs=1e-5)
    reply = handle.reward.remote({"messages": TALKS}).result(timeout_s=60)
    assert [row["reward"] for row in reply["data"]] == pytest.approx(expected, abs=1e-5)

    prompt, answers = TALKS[0][:1], [talk[1]["content"] for talk in TALKS]
    expected = scorer.score_responses(prompt, answers)
    assert client.score_responses(prompt, answers) == pytest.approx(expected, abs=1e-5)
    ids = [scorer.encode(talk) for talk in TALKS]
    assert client.score_ids(ids) == pytest.approx(scorer.score(TALKS), abs=1e-5)


def test_the_endpoint_tells_what_it_serves(
    client: RewardClient, config: ServeConfig, scorer: Scorer
) -> None:
    assert client.ready()
    info = client.info()
    assert info["revision"] == scorer.info["revision"]
    assert info["limits"]["max_length"] == scorer.max_length == 512
    key = {"authorization": f"Bearer {KEY}"}
    schema = httpx.get(f"{endpoint(config)}/openapi.json", headers=key).json()
    assert "RewardRequest" in schema["components"]["schemas"]


def test_the_request_id_comes_back_once(config: ServeConfig, handle: Any) -> None:
    response = httpx.post(
        f"{endpoint(config)}/v1/reward",
        json={"messages": TALKS[0]},
        headers={"x-request-id": "mine", "authorization": f"Bearer {KEY}"},
    )
    assert response.status_code == 200
    assert response.headers.get_list("x-request-id") == ["mine"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"{", 400, None),
        (b'{"message": []}', 422, "message"),
        (b'{"messages": [{"role": "user", "content": 3}]}', 422, "messages[0].content"),
        (b'{"input_ids": [[1, 99999]]}', 422, "input_ids[0]"),
        (b'{"input": "' + b"a " * 600 + b'"}', 422, "input"),
        (b'{"input": "a", "model": "other"}', 404, "model"),
    ],
)
def test_a_bad_body_is_refused_by_field(
    config: ServeConfig, handle: Any, body: bytes, status: int, param: str | None
) -> None:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{endpoint(config)}/v1/reward", content=body, headers=headers)
    assert response.status_code == status
    assert response.json()["error"]["param"] == param


def test_a_wrong_key_is_refused(config: ServeConfig, handle: Any) -> None:
    with RewardClient(endpoint(config), api_key="wrong") as client:
        with pytest.raises(RequestRefusedError) as caught:
            client.score(TALKS)
        assert caught.value.status == 401


def test_errors_reach_the_callers_of_the_handle(handle: Any) -> None:
    with pytest.raises(RequestRefusedError, match="Did you mean 'messages'") as caught:
        handle.reward.remote({"message": TALKS}).result(timeout_s=60)
    original = caught.value.__dict__["cause"]
    assert (original.field, original.status) == ("message", 422)


def test_a_full_replica_answers_503_and_a_client_that_waits_gets_all(
    config: ServeConfig, handle: Any, scorer: Scorer
) -> None:
    ids = [[n % 300 + 5] * 500 for n in range(64)]
    expected = scorer.score_ids(ids)

    async def one(http: httpx.AsyncClient, sequence: list[int]) -> httpx.Response:
        headers = {"authorization": f"Bearer {KEY}"}
        body = {"input_ids": sequence}
        return await http.post(f"{endpoint(config)}/v1/reward", json=body, headers=headers)

    async def main() -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(timeout=60, limits=limits) as http:
            responses = await asyncio.gather(*(one(http, sequence) for sequence in ids))
        statuses = [response.status_code for response in responses]
        assert set(statuses) == {200, 503}, statuses
        for response, reward in zip(responses, expected, strict=True):
            if response.status_code == 503:
                assert int(response.headers["retry-after"]) >= 1
            else:
                [row] = response.json()["data"]
                assert row["reward"] == pytest.approx(reward, abs=1e-5)
        async with AsyncRewardClient(endpoint(config), api_key=KEY) as client:
            found = await asyncio.gather(*(client.score_ids([sequence]) for sequence in ids))
            assert [one[0] for one in found] == pytest.approx(expected, abs=1e-5)

    asyncio.run(main())


def replica() -> psutil.Process:
    [process] = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::ServeRepl") and "RewardModel" in process.cmdline()[0]
    ]
    return process


def assert_gone(process: psutil.Process) -> None:
    _, alive = psutil.wait_procs([process], timeout=10)
    assert not alive, "the replica was not killed: nothing was tested"


def test_a_killed_replica_loses_and_changes_no_answer(client: RewardClient, scorer: Scorer) -> None:
    expected = scorer.score(TALKS)
    assert client.score(TALKS) == pytest.approx(expected, abs=1e-5)
    killed = replica()
    killed.kill()
    assert client.score(TALKS) == pytest.approx(expected, abs=1e-5)
    assert_gone(killed)
    second = replica()
    assert second.pid != killed.pid

    # And once more, while requests are under way.
    timer = threading.Timer(0.3, second.kill)
    timer.start()
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:
        assert client.score(TALKS) == pytest.approx(expected, abs=1e-5)
    timer.join()
    assert_gone(second)
    assert client.score(TALKS) == pytest.approx(expected, abs=1e-5)
    assert replica().pid != second.pid


def test_what_a_call_of_the_handle_raises_is_logged_without_its_text(handle: Any) -> None:
    import ray

    with pytest.raises(RequestRefusedError, match="PRIVATE_TEXT"):
        handle.reward.remote({"PRIVATE_TEXT": 1}).result(timeout_s=60)
    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"
    deadline = time.monotonic() + 20
    while True:
        told = "".join(file.read_text() for file in logs.rglob("*RewardModel*"))
        if "RequestRefusedError at" in told or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert "RequestRefusedError at" in told
    assert "PRIVATE_TEXT" not in told


# ---------------------------------------------------------------- the command, with its own Ray


@contextmanager
def command(*words: str) -> Iterator[subprocess.Popen[str]]:
    """`raywards serve` on a local Ray of its own, of which nothing stays."""
    program = "import sys; from raywards.cli import main; sys.exit(main(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "serve", *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    below: list[psutil.Process] = []
    try:
        yield process
    finally:
        if process.poll() is None:
            below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(30)
        _, alive = psutil.wait_procs(below, timeout=20)
        for child in alive:
            child.kill()


def test_a_taken_port_is_one_error_that_names_it(folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with command("--model", str(folder), "--port", port) as process:
            output, _ = process.communicate(timeout=120)
    assert process.returncode == 2, output
    [told] = [line for line in output.splitlines() if line.startswith("ConfigError: ")]
    assert f"host='127.0.0.1', port={port}" in told
    assert "\nTraceback" not in output


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_deployment_that_waits_for_a_gpu_can_be_interrupted(folder: Path, number: int) -> None:
    port = str(free_port())
    with command("--model", str(folder), "--port", port, "--num_gpus", "1") as process:
        assert process.stdout is not None
        seen = ""
        while "Adding 1 replica" not in seen:
            line = process.stdout.readline()
            assert line, seen
            seen += line
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Interrupted." in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_model_that_cannot_be_served_is_an_error_with_the_reason(
    config: ServeConfig, handle: Any, tmp_path: Path
) -> None:
    from ray import serve

    missing = str(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"nowhere: there is no such folder\.$"):
        deploy(config.model_copy(update={"model": missing, "name": "bad", "route_prefix": "/bad"}))
    serve.delete("bad")


def test_the_application_builder_takes_what_the_command_line_gives() -> None:
    assert build({"model": "folder", "max_length": "64", "num_cpus": "0.5"})
    with pytest.raises(ConfigError, match="Did you mean 'max_length'"):
        build({"model": "folder", "max_lenght": "64"})
