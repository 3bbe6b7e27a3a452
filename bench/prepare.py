"""Preparation and planning of many pairs: speed, and memory that must not grow with their number.

    python bench/prepare.py --tokenizer FOLDER [--pairs 100000,1000000] [--tasks 1,2]
        [--out RESULT.json]

The pairs are short conversations of common words, in one JSONL file. Each figure is a
fresh process's:

    prepare   rows to shards, in the driver (tasks 1) or as so many Ray tasks at once; the shards
              must be the same bytes. More pairs than the fewest: only the last of `--tasks`
    found     the same call again, as a run that is started again makes it: the file is hashed
    plan      what a worker does: the table is opened, the first step of an epoch and one in the
              middle of a later epoch are planned and dealt to 8 ranks, and pairs are read at random

    forty     the same as plan, of a table that has the largest one's files forty times, as links

Memory is the peak over the process's life, sampled: `anonymous` is what it holds for itself,
`mapped` are pages of files, which the kernel takes back when it needs them. `others_cores` is the
mean number of cores that were busy with something else: figures with much of that are worth little.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import machine
import numpy
import psutil

ROOT = Path(__file__).parent.parent
RANKS, BATCH, STEPS_READ = 8, 256, 200
MIB = 2**20
_TEXT = """the of and a to in is you that it he was for on are as with his they I at be this have
from or one had by word but not what all were we when your can said there use an each which she do
how their if will up other about out many then them these so some her would make like him into time
has look two more write go see number no way could people my than first water been call who oil its
now find long down day did get come made may part"""
WORDS = _TEXT.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--pairs", default="100000,1000000")
    parser.add_argument("--tasks", default="1,2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help="for its own use")
    args = parser.parse_args()
    if args.child:
        job = json.loads(args.child)
        print(json.dumps(SIDES[job.pop("side")](**job)))
        return
    result = {
        "machine": machine.describe(threads=1),
        "settings": {"tasks": args.tasks, "global_batch": BATCH},
    }
    with tempfile.TemporaryDirectory(dir=args.out.parent if args.out else None) as folder:
        tasks, result["by_pairs"] = args.tasks.split(","), {}
        for count in args.pairs.split(","):
            result["by_pairs"][count] = measure(Path(folder), int(count), tasks, args.tokenizer)
            tasks = tasks[-1:]
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")


def measure(folder: Path, pairs: int, asked: list[str], tokenizer: Path) -> dict[str, Any]:
    """All sides for one number of pairs; its files are removed."""
    source = folder / f"{pairs}.jsonl"
    write_rows(source, pairs)
    found: dict[str, Any] = {"source_bytes": source.stat().st_size}
    digests = set()
    for tasks in asked:
        out = folder / f"prepared-{pairs}-{tasks}"
        job = {"source": str(source), "out": str(out), "tokenizer": str(tokenizer.resolve())}
        name = f"prepare_{tasks}"
        found[name] = run("prepare", tasks=int(tasks), **job)
        found[f"found_{tasks}"] = run("prepare", tasks=int(tasks), **job)
        digests.add(digest(out))
        found["disk_bytes"] = sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    if len(digests) > 1:
        raise SystemExit("the shards depend on how they were made")
    [prepared] = (out / "prepared").iterdir()
    found["plan"] = run("plan", prepared=str(prepared))
    if len(asked) == 1:
        forty = folder / "forty"
        multiply(prepared, forty, 40)
        found["forty"] = run("plan", prepared=str(forty))
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    return found


def multiply(prepared: Path, to: Path, times: int) -> None:
    """A prepared folder with the pairs of another, so many times. Its shards are hard links."""
    about = json.loads((prepared / "prepared.json").read_text())
    files = {name: size for name, size in about["files"].items() if name.startswith("pairs-")}
    to.mkdir()
    linked = {}
    for place, name in enumerate(list(files) * times):
        os.link(prepared / name, to / f"pairs-{place:05d}.arrow")
        linked[f"pairs-{place:05d}.arrow"] = files[name]
    numpy.save(to / "lengths.npy", numpy.tile(numpy.load(prepared / "lengths.npy"), times))
    linked["lengths.npy"] = (to / "lengths.npy").stat().st_size
    (to / "prepared.json").write_text(json.dumps({**about, "files": linked}))


def write_rows(file: Path, count: int) -> None:
    """Conversations of one or two turns, 8 to 30 common words an answer."""
    draw = random.Random(0)

    def text(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    with file.open("w", encoding="utf-8") as out:
        for _ in range(count):
            prompt = [{"role": "user", "content": text(5, 20)}]
            if draw.random() < 0.3:
                prompt += [
                    {"role": "assistant", "content": text(8, 30)},
                    {"role": "user", "content": text(5, 20)},
                ]
            answers = ([{"role": "assistant", "content": text(8, 30)}] for _ in range(2))
            row = dict(zip(("prompt", "chosen", "rejected"), (prompt, *answers), strict=True))
            out.write(json.dumps(row) + "\n")


def run(side: str, **job: Any) -> dict[str, Any]:
    """One side in a fresh process."""
    command = [sys.executable, __file__, "--tokenizer", ".", "--child"]
    command.append(json.dumps({"side": side, **job}))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(side, job, found, file=sys.stderr)
    return found


def digest(folder: Path) -> str:
    files = sorted(folder.glob("prepared/*/*"))
    return hashlib.sha256(
        b"".join(hashlib.sha256(f.read_bytes()).digest() for f in files)
    ).hexdigest()


# ---------------------------------------------------------------- the sides


def prepare_side(source: str, out: str, tokenizer: str, tasks: int) -> dict[str, Any]:
    from raywards.loader import load_tokenizer
    from raywards.ray_cluster import connect
    from raywards.rendering import Rendering
    from raywards.train.prepare import EncodeSettings, prepare
    from raywards.train.storage import SharedFolder

    if tasks > 1:
        import ray

        ray.init(num_cpus=tasks, include_dashboard=False, object_store_memory=512 * MIB)
    watch = Watch()
    found = prepare(
        source,
        Rendering(load_tokenizer(tokenizer)),
        EncodeSettings(1024, "drop", "error"),
        SharedFolder(Path(out)),
        name="train",
        connect=connect if tasks > 1 else None,
        tasks_at_once=tasks,
    )
    seconds, measured = watch.stop()
    return {
        "seconds": seconds,
        "pairs": found.num_pairs,
        "pairs_per_second": found.num_pairs / seconds,
        **measured,
    }


def plan_side(prepared: str) -> dict[str, Any]:
    from raywards.packing import TrainPlan
    from raywards.train.rows import Rows
    from raywards.train.table import PairTable

    watch = Watch()
    times = {}
    start = time.perf_counter()
    table = PairTable(Path(prepared))
    times["open_s"] = time.perf_counter() - start
    plan = TrainPlan(len(table), BATCH, seed=42)
    rows = Rows(padded=False, max_tokens=4096)
    middle = 2 * plan.steps_per_epoch + plan.steps_per_epoch // 2
    for name, first in (("first_step_s", 0), ("resume_s", middle)):
        start = time.perf_counter()
        steps = plan.steps(first, first + STEPS_READ + 1)
        _, indices = next(steps)
        rows.plan(table, indices, RANKS, 8)
        times[name] = time.perf_counter() - start
    start = time.perf_counter()
    read = tokens = 0
    for _, indices in steps:
        dealt = rows.plan(table, indices, RANKS, 8)
        for row in dealt[0]:  # what one of the ranks reads
            pairs = table.take(row)
            read += len(row)
            tokens += sum(len(ids) for pair in pairs["sequences"] for ids in pair)
    times["step_s"] = (time.perf_counter() - start) / STEPS_READ
    _, measured = watch.stop()
    return {
        "pairs": len(table),
        **times,
        "pairs_read": read,
        "tokens_a_pair": tokens / read,
        **measured,
    }


SIDES = {"prepare": prepare_side, "plan": plan_side}


class Watch:
    """Peak memory of this process and of its Ray tasks, and what else was busy meanwhile."""

    def __init__(self) -> None:
        self._peaks: dict[str, dict[str, float]] = {}
        self._done = threading.Event()
        self._start, self._busy = time.monotonic(), busy_s()
        self._own = self._cpu_s()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> tuple[float, dict[str, Any]]:
        """Seconds since it was made; memory in MiB by kind of process, and `others_cores`."""
        seconds = time.monotonic() - self._start
        others = max(0.0, busy_s() - self._busy - self._cpu_s() + self._own) / seconds
        self._done.set()
        self._thread.join()
        return seconds, {"peak_mib": self._peaks, "others_cores": others}

    def _sample(self) -> None:
        done = False
        while not done:
            done = self._done.wait(0.2)  # a last look at the end, however soon that comes
            for process in self._processes():
                try:
                    kind = "driver" if process.pid == os.getpid() else process.name()
                    memory = process.memory_info()
                except psutil.NoSuchProcess:
                    continue
                if kind.startswith("ray::_encode"):  # Linux may cut the rest off
                    kind = "task"
                if kind in ("driver", "task"):
                    peak = self._peaks.setdefault(kind, {"anonymous": 0.0, "mapped": 0.0})
                    own = (memory.rss - memory.shared) / MIB
                    peak["anonymous"] = round(max(peak["anonymous"], own), 1)
                    peak["mapped"] = round(max(peak["mapped"], memory.shared / MIB), 1)

    def _cpu_s(self) -> float:
        total = 0.0
        for process in self._processes():
            try:
                used = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += used.user + used.system
        return total

    @staticmethod
    def _processes() -> list[psutil.Process]:
        here = psutil.Process()
        return [here, *here.children(recursive=True)]


def busy_s() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)


if __name__ == "__main__":
    main()
