"""One run through all that a cluster does to it: a killed worker, a lost node, a new one, a killed
driver. Every pair is trained once, and the weights are those of a run that nothing happened to.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from ports import free_ports
from preferences_data import conversation_rows
from safetensors.torch import load_file
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import complete_checkpoints, read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
ROWS = conversation_rows(370)  # a step takes some tenths of a second, the run about a minute
EPOCHS = 60
STEPS = 6 * EPOCHS
TIMES: dict[str, float] = {}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs and two nodes with one each, whose raylets are real processes."""
    from ray.cluster_utils import Cluster
    from ray.experimental import internal_kv

    own = internal_kv.internal_kv_get_gcs_client()
    gcs, dashboard, agent = free_ports(3)
    store = 100 * 2**20
    started = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 0,
            "gcs_server_port": gcs,
            "include_dashboard": True,
            "dashboard_port": dashboard,
            "dashboard_agent_listen_port": agent,
            "object_store_memory": store,
        },
    )
    started.dashboard = f"http://127.0.0.1:{dashboard}"
    started.object_store_bytes = store
    try:
        yield started
    finally:
        started.shutdown()
        if own is not None:  # of this process's Ray; the shutdown has taken it away
            internal_kv._initialize_internal_kv(own)


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=cluster.object_store_bytes)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("chaos")
    tiny_qwen2(folder / "model", num_labels=None)
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    (folder / "pairs.jsonl").write_text(rows)
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "run"),
        "num_workers": [1, 2],
        "elastic_resize_monitor_interval_s": 3,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 2,
        "learning_rate": 1e-4,
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 32,
        "logging_steps": 1,
        "save_steps": 10,
        "max_failures": 10,
        "disable_tqdm": True,
    }


def newest(run: Path) -> dict[str, Any]:
    found = complete_checkpoints(run)
    return read_manifest(found[-1], kind="checkpoint") if found else {"step": 0, "num_ranks": 0}


def wait_for(what: str, holds: Callable[[], Any], timeout_s: float = 600) -> Any:
    started = time.monotonic()
    while not (found := holds()):
        assert time.monotonic() - started < timeout_s, f"{what}: not within {timeout_s} s"
        time.sleep(0.1)
    TIMES[what] = time.monotonic() - started
    print(f"{what}: {TIMES[what]:.1f} s", flush=True)
    return found


def wait_for_progress(what: str, run: Path, ranks: int) -> None:
    """Until a checkpoint of so many ranks is there that is newer than all there are."""
    before = newest(run)["step"]

    def is_there() -> bool:
        now = newest(run)
        assert now["step"] < STEPS, f"{what}: the run was over before, so nothing is proved"
        return now["step"] > before and now["num_ranks"] == ranks

    wait_for(what, is_there)


def processes(*words: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or ())
        if all(word in line for word in words):
            found.append(process)
    return found


def test_a_run_survives_what_a_cluster_does_to_it(
    cluster: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    run = Path(settings["output_dir"])
    config = tmp_path / "chaos.yaml"
    config.write_text(yaml.safe_dump(settings))
    client = JobSubmissionClient(cluster.dashboard)
    entrypoint = f"{sys.executable} {ROOT / 'jobs' / 'train.py'} --config {config}"
    variables = {name: os.environ[name] for name in ("PYTHONPATH", "RAY_AUTH_MODE", "PATH")}

    def submit() -> str | None:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"env_vars": variables})
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            return None  # the head is not up yet

    nodes = [add_node(cluster), add_node(cluster)]

    job = wait_for("the head takes a job", submit, 120)
    wait_for_progress("start to the first checkpoint of two", run, ranks=2)

    workers = processes("RayTrainWorker")
    assert len(workers) == 2
    os.kill(workers[0].pid, signal.SIGKILL)
    wait_for_progress("worker killed to the next checkpoint of two", run, ranks=2)

    cluster.remove_node(nodes[0], allow_graceful=False)
    wait_for_progress("node lost to the next checkpoint of one", run, ranks=1)

    add_node(cluster)
    wait_for_progress("node added to the next checkpoint of two", run, ranks=2)

    for driver in processes(sys.executable, "train.py", str(config)):
        driver.kill()  # the job's shell, too
    wait_for("driver killed to the job's end", lambda: client.get_job_status(job).is_terminal())
    assert client.get_job_status(job) == JobStatus.FAILED
    assert newest(run)["step"] < STEPS, "all was trained before the driver died: proves nothing"
    job = wait_for("it takes another", submit)
    wait_for_progress("submitted again to the next checkpoint of two", run, ranks=2)
    wait_for("to the end", lambda: client.get_job_status(job).is_terminal())
    assert client.get_job_status(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)[-3000:]

    reference = undisturbed(settings, tmp_path / "reference")
    log = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [record for record in log if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    expected = [record for record in reference.state.log_history if "loss" in record]
    assert expected[0]["loss"] - expected[-1]["loss"] > 0.3, "nothing was learned"
    # The same pairs in the same step: another pair would give another loss and other tokens.
    for ours, theirs in zip(steps, expected, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
        assert ours["num_tokens"] == theirs["num_tokens"]
    scorer = Scorer.from_pretrained(run / "export")
    scorer.verify()
    assert scorer.info["training"]["num_pairs"] == EPOCHS * len(ROWS)
    off = largest_difference(run / "export", reference.paths.export)
    assert off < 1e-5, f"the weights are {off} from those of an undisturbed run"
    attempts = {re.sub(r".*-", "", folder.name) for folder in complete_checkpoints(run)}
    assert len(attempts) >= 5


def undisturbed(settings: dict[str, Any], output: Path) -> RewardTrainer:
    """The same pairs and global batches in one process."""
    names = ("model_name_or_path", "dataset_name", "num_workers", "per_device_train_batch_size")
    same = {name: value for name, value in settings.items() if name not in names}
    changes = {"output_dir": str(output), "num_workers": 0, "per_device_train_batch_size": 64}
    trainer = RewardTrainer(
        settings["model_name_or_path"],
        RewardConfig(**{**same, **changes, "deepspeed": 0, "save_strategy": "no"}),
        train_dataset=settings["dataset_name"],
    )
    trainer.train()
    return trainer


def largest_difference(one: Path, other: Path) -> float:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    differences: list[torch.Tensor] = [(a[name] - b[name]).abs().max() for name in a]
    return max(difference.item() for difference in differences)
