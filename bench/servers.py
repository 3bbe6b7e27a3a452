"""The servers of `bench/serve.py`, each in a process group of its own, and how they are asked.

python bench/servers.py SIDE JOB.json     run one of ours or of the plain ones until it is killed

raywards            Ray Serve behind its own proxy: a replica for each thread, with one
raywards_haproxy    the same behind HAProxy
raywards_bare       the same app under uvicorn, without Ray: one process with all threads
vllm                vLLM's OpenAI-compatible server, as it comes
serve_rm            OpenRLHF's loop, rebuilt: a forward per request, in the event loop
fastapi             FastAPI and transformers as one would write it first: a forward per request
                    in a thread
scorer              no server: `Scorer` in the process that asks, in waves of as many as there
                    would be clients
"""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

SIDES = {
    "raywards_haproxy": "/classify",
    "raywards": "/classify",
    "raywards_bare": "/classify",
    "vllm": "/classify",
    "serve_rm": "/get_reward",
    "fastapi": "/get_reward",
}
_START_S = 300


def body_of(side: str, text: str) -> dict[str, Any]:
    """What a client posts for one rendered conversation."""
    if SIDES[side] == "/get_reward":
        return {"query": [text]}
    return {"input": text, "use_activation": False, "add_special_tokens": False}


def reward_in(side: str, reply: Any) -> float:
    """Where it stands in the reply."""
    found = reply["rewards"][0] if SIDES[side] == "/get_reward" else reply["data"][0]["probs"][0]
    return float(found)


@contextmanager
def server(side: str, job: dict[str, Any]) -> Iterator[str]:
    """Its base URL, once it answers. `job`: model, dtype, threads, vllm_python."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    # The system's own choice may lie among Ray's.
    port = 21_000 + port % 900
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "THP_MEM_ALLOC_ENABLE": "1",
        "OMP_NUM_THREADS": str(job["threads"]),
        "RAY_AUTH_MODE": "disabled",
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if side == "raywards_haproxy":
        environment |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        }
    with tempfile.TemporaryDirectory(prefix="rw") as folder, open(f"{folder}/log", "w+") as log:
        environment["RAY_TMPDIR"] = folder
        job_file = Path(folder, "job.json")
        job_file.write_text(json.dumps({**job, "port": port}))
        command = [sys.executable, __file__, side, str(job_file)]
        if side == "vllm":
            command = [job["vllm_python"], "-m", "vllm.entrypoints.openai.api_server"]
            command += [
                "--model",
                job["model"],
                "--runner",
                "pooling",
                "--dtype",
                job["dtype"],
                "--port",
                str(port),
            ]
            command += ["--host", "127.0.0.1", "--disable-uvicorn-access-log"]
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process, log)
            yield url
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _wait(url: str, process: subprocess.Popen[bytes], log: Any) -> None:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    log.seek(0)
    raise RuntimeError(f"the server did not start: {log.read()[-3000:]}")


# ---------------------------------------------------------------- ours, and the plain ones


def run(side: str, job: dict[str, Any]) -> None:
    if side in ("raywards", "raywards_haproxy"):
        _on_serve(job)
        return
    import uvicorn

    settings = {"host": "127.0.0.1", "port": job["port"], "log_level": "warning"}
    if side == "raywards_bare":
        asyncio.run(_app_alone(job, settings))
    else:
        uvicorn.run(_plain(job, in_thread=side == "fastapi"), access_log=False, **settings)


def _config(job: dict[str, Any], replicas: int) -> Any:
    from raywards.config import ServeConfig

    return ServeConfig(
        model=job["model"], dtype=job["dtype"], port=job["port"],
        num_cpus=job["threads"] / replicas, min_replicas=replicas, max_replicas=replicas,
    )  # fmt: skip


def _on_serve(job: dict[str, Any]) -> None:
    import ray

    from raywards.serve import run

    # Logical CPUs: the replica's, and one for whatever else there is.
    ray.init(address="local", num_cpus=job["threads"] + 1, include_dashboard=False)
    run(_config(job, replicas=job["threads"]))


async def _app_alone(job: dict[str, Any], settings: dict[str, Any]) -> None:
    import uvicorn

    from raywards.serve.http import create_app
    from raywards.serve.replica import load

    service = load(_config(job, replicas=1))
    service.start()
    app = create_app(lambda: service)
    await uvicorn.Server(uvicorn.Config(app, access_log=False, **settings)).serve()


def _plain(job: dict[str, Any], *, in_thread: bool) -> Any:
    import torch
    from fastapi import FastAPI
    from pydantic import BaseModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.set_num_threads(job["threads"])
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    tokenizer.padding_side = "right"
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=job["dtype"])
    model.eval()
    app = FastAPI()

    class Query(BaseModel):
        query: list[str]

    def score(texts: list[str]) -> dict[str, list[float]]:
        batch = tokenizer(
            texts, add_special_tokens=False, padding=True, truncation=True, max_length=2048,
            return_tensors="pt",
        )  # fmt: skip
        with torch.inference_mode():
            return {"rewards": model(**batch).logits[:, 0].float().tolist()}

    if in_thread:

        @app.post("/get_reward")
        def in_a_thread(body: Query) -> dict[str, list[float]]:
            return score(body.query)
    else:

        @app.post("/get_reward")
        async def in_the_loop(body: Query) -> dict[str, list[float]]:
            return score(body.query)

    @app.get("/health")
    @app.get("/ping")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    return app


if __name__ == "__main__":
    run(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
