"""The commands of the README on a Ray cluster: `ray job submit`, from a checkout to rewards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from ports import free_ports
from preferences_data import conversation_rows
from tiny import tiny_qwen2

from raywards import RewardClient, Scorer
from raywards.checkpoint import read_manifest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).parents[2]
RAY = f"{sys.prefix}/bin/ray"
ROWS = conversation_rows(45)


@pytest.fixture(scope="module")
def ports() -> list[int]:
    """Seven for the head, the last one for Serve."""
    return free_ports(8)


@pytest.fixture(scope="module")
def head(ports: list[int]) -> Iterator[str]:
    """The address of a Ray head that was started from the command line, for this module alone."""
    gcs, dashboard, client, agent, agent_grpc, environments, metrics, _ = ports
    temporary = tempfile.mkdtemp(prefix="rw")  # short: Ray's sockets lie below it
    address = f"http://127.0.0.1:{dashboard}"
    command = [
        *(RAY, "start", "--head", "--block", "--port", str(gcs), "--num-cpus", "4"),
        *("--dashboard-port", str(dashboard), "--ray-client-server-port", str(client)),
        *("--dashboard-agent-listen-port", str(agent)),
        *("--dashboard-agent-grpc-port", str(agent_grpc)),
        *("--runtime-env-agent-port", str(environments), "--metrics-export-port", str(metrics)),
        *("--object-store-memory", str(200 * 1024**2), "--temp-dir", temporary),
        "--disable-usage-stats",
    ]
    log = Path(temporary) / "head.log"
    # By default SIGTERM waits 30 s for what the node still runs: here, Serve's controller.
    environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + 180
        while not answers(f"{address}/api/version"):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.25)
        yield address
    finally:
        below = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        process.wait(60)
        _, alive = psutil.wait_procs(below, timeout=20)
        for child in alive:
            child.kill()
        shutil.rmtree(temporary, ignore_errors=True)
    assert below, "there was no head to stop"
    assert not alive, f"the head left {[child.name() for child in alive]}"


def answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git knows of, and nothing else: the working directory of the jobs."""
    folder = tmp_path_factory.mktemp("checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    assert (folder / "jobs/train.py").is_file()
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "lm", num_labels=None)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def ray_job(head: str, checkout: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    """`ray job COMMAND --address HEAD ...` from the checkout, its two outputs in one."""
    command, *rest = map(str, words)
    return subprocess.run(
        [RAY, "job", command, "--address", head, *rest],
        cwd=checkout, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240,
    )  # fmt: skip


def train(head: str, checkout: Path, *flags: str | Path) -> subprocess.CompletedProcess[str]:
    """The README's command, with other flags after the configuration."""
    words = ("--working-dir", ".", "--", "python", "jobs/train.py")
    configuration = ("--config", "jobs/configs/tiny_cpu.yaml")
    return ray_job(head, checkout, "submit", *words, *configuration, *flags)


@pytest.fixture(scope="module")
def trained(
    head: str, checkout: Path, model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """The run folder of a submitted training job, and what it printed."""
    run = tmp_path_factory.mktemp("storage") / "reward-output"
    data = ("--model_name_or_path", model, "--dataset_name", pairs)
    job = train(head, checkout, *data, "--output_dir", run)
    assert job.returncode == 0, job.stdout
    return run, job.stdout


def test_a_submitted_job_trains_and_leaves_a_complete_export(trained: tuple[Path, str]) -> None:
    run, screen = trained
    manifest = read_manifest(run / "export", kind="export")
    steps = manifest["training"]["step"]
    assert manifest["training"]["num_pairs"] >= len(ROWS)
    Scorer.from_pretrained(run / "export").verify()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records
    assert {"step", "loss", "accuracy"} <= records[-1].keys()
    # Progress as it came, and the result at the end.
    assert "2 workers on CPU" in screen
    assert any("loss" in line and f"/{steps}" in line for line in screen.splitlines()), screen
    assert f"export: {run / 'export'}" in screen
    assert "succeeded" in screen


def test_a_typo_in_a_flag_fails_the_job_with_the_nearest_name(
    head: str, checkout: Path, model: Path, pairs: Path, tmp_path: Path
) -> None:
    data = ("--model_name_or_path", model, "--dataset_name", pairs)
    output = ("--output_dir", tmp_path / "run")
    job = train(head, checkout, *data, *output, "--learning_rat", "1e-3")
    assert job.returncode != 0
    assert "learning_rat: no such setting. Did you mean 'learning_rate'?" in job.stdout
    assert "Traceback" not in job.stdout
    assert not (tmp_path / "run").exists()


def test_a_submitted_job_serves_until_it_is_stopped(
    head: str, ports: list[int], checkout: Path, trained: tuple[Path, str]
) -> None:
    export, port = trained[0] / "export", ports[-1]
    name = f"serve-{os.getpid()}"
    job = ray_job(
        head, checkout, "submit", "--submission-id", name, "--working-dir", ".", "--no-wait", "--",
        *("python", "jobs/serve.py", "--model", export, "--host", "0.0.0.0", "--port", str(port)),
    )  # fmt: skip
    assert job.returncode == 0, job.stdout
    talks = [row[side] for row in ROWS[:6] for side in ("chosen", "rejected")]
    with RewardClient(f"http://127.0.0.1:{port}") as client:
        client.wait_until_ready(90)
        served = client.score(talks)
    scorer = Scorer.from_pretrained(export)
    assert served == pytest.approx(scorer.score(talks), abs=scorer.info["bound"])
    assert len(set(served)) == len(served)

    stopped = ray_job(head, checkout, "stop", name)
    assert stopped.returncode == 0, stopped.stdout
    status = ray_job(head, checkout, "status", name)
    assert f"Job '{name}' was stopped" in status.stdout, status.stdout
    deadline = time.monotonic() + 30
    while answers(f"http://127.0.0.1:{port}/ready"):
        assert time.monotonic() < deadline, "the stopped job still serves"
        time.sleep(0.25)
