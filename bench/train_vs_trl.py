"""The whole training step of raywards beside TRL's RewardTrainer: speed, memory and losses.

    python bench/train_vs_trl.py --model M --data PAIRS.jsonl --dtype float32|bfloat16
        [--max-length 1024] [--batch 8] [--steps 12] [--warmup-steps 2] [--rounds 3]
        [--against default,tuned] [--losses 50] [--threads N] [--zero 0] [--out RESULT.json]

A step is forward, backward, clipping, AdamW and loading. Both sides have the same model, rows,
global batch, dtype, `max_length` filter, threads, seed, learning rate and schedule, and log every
step; the rest is each side's default. raywards trains without Ray (`num_workers=0`). Each
run is a fresh process; the sides alternate, and begin in turn.

default: TRL as it comes (checkpointing, random order). raywards' own order is the same permutation,
so both train the very same batches: their losses are compared too, in runs of their own.

tuned: TRL without checkpointing, its batches of like length (`group_by_length` by the longer side
of a pair; that takes `remove_unused_columns=False`, or TRL drops the column of lengths and stops).
Such batches differ much in cost and come longest first, so the first ones are no fair sample.
Therefore the batches that transformers' LengthGroupedSampler makes of a whole epoch are sorted, and
every n-th is measured, in random order; the longest one is the first warm-up step, for the peak of
memory. raywards trains the same pairs: the same warm-up, then the measured pairs in random batches.

The script stops where TRL's batches have other shapes than planned. Tokens *needed* count the
common prefix of chosen and rejected once. MFU is 6 x parameters without embeddings x tokens needed
per second / peak of the machine. Memory is the process's (on CUDA: what torch allocated) up to the
end of the last step: the checkpoint and the export that follow are not in it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import machine

SEED = 42
Plan = list[list[int]]  # indices of the pairs of each step


def main() -> None:
    args = parse()
    if args.side:
        job = json.loads(args.side.read_text())
        result = (run_raywards if job["side"] == "raywards" else run_trl)(job)
        Path(job["result"]).write_text(json.dumps(result))
        return
    import torch

    torch.set_num_threads(args.threads)
    about = machine.describe(args.threads)
    print(machine.in_words(about), flush=True)
    peaks = [machine.peak_flops(args.dtype)]
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        speed = {against: compare(bench, against) for against in args.against}
        losses = compare_losses(bench) if args.losses else None
    peaks.append(machine.peak_flops(args.dtype))  # again: others may have disturbed the first
    peak, source = max(peaks)
    print(f"\npeak in {args.dtype}: {peak / 1e12:.3g} TFLOP/s ({source})")
    for against, found in speed.items():
        show(against, found, 6 * bench.num_parameters / peak)
    if losses:
        show_losses(losses)
    if args.out:
        settings = {k: v for k, v in vars(args).items() if k not in ("out", "side")}
        settings |= {"model": Path(args.model).name, "data": Path(args.data).name, "seed": SEED}
        result = {"machine": {**about, "peak_flops": peak, "peak_source": source}}
        result |= {"settings": settings, "num_parameters": bench.num_parameters}
        result |= {"speed": speed, "losses": losses}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--data", help="JSONL file of preference rows")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=12, help="of a run, warm-up included")
    parser.add_argument("--warmup-steps", type=int, default=2, help="first steps, left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=lambda text: text.split(","), default="default,tuned")
    parser.add_argument("--losses", type=int, default=50, help="steps of both curves; 0: none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--zero", default="0", help="raywards' ZeRO stage; one process: no shards")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--side", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.side and not (args.model and args.data):
        parser.error("--model and --data are required")
    if not 1 <= args.warmup_steps < args.steps:
        parser.error("--warmup-steps must be at least 1 and under --steps")
    if 0 < args.losses <= args.warmup_steps:
        parser.error("--losses must be 0, or over --warmup-steps")
    if not set(args.against) <= {"default", "tuned"}:
        parser.error("--against takes default, tuned, or both with a comma between them")
    return args


# ---------------------------------------------------------------- the comparison


class Pair(NamedTuple):
    row: int
    longer: int
    """Tokens of the longer side."""
    needed: int
    """Tokens of both sides, their common prefix counted once."""


class Bench:
    """What all runs share: the pairs, and the way to run one side."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        from raywards.loader import load_tokenizer
        from raywards.rendering import Rendering
        from raywards.train.prepare import EncodeSettings, prepare
        from raywards.train.storage import SharedFolder
        from raywards.train.table import PairTable

        rendering = Rendering(load_tokenizer(args.model))
        settings = EncodeSettings(args.max_length, "drop", "error")
        run = SharedFolder(folder)
        table = PairTable(prepare(args.data, rendering, settings, run, name="pairs").folder)
        columns = table.take(list(range(len(table))))
        sides = zip(columns["row"], columns["sequences"], strict=True)
        self.pairs = [
            Pair(row, max(len(a), len(b)), len(a) + len(b) - num_common(a, b))
            for row, (a, b) in sides
        ]
        self.args, self.folder = args, folder
        self.num_parameters = count_parameters(args.model)

    def default_plan(self, steps: int | None = None) -> Plan:
        """Batches in the order of both sides' defaults; without `steps`, those of an epoch."""
        from raywards.packing import TrainPlan

        plan = TrainPlan(num_pairs=len(self.pairs), global_batch=self.args.batch, seed=SEED)
        return [indices for _, indices in plan.steps(0, steps or plan.steps_per_epoch)]

    def run(self, side: str, plan: Plan, **extra: Any) -> dict[str, Any]:
        """One side in a process of its own; figures of the steps after the warm-up."""
        shared = ("model", "data", "dtype", "max_length", "batch", "threads", "zero")
        job = {name: getattr(self.args, name) for name in shared}
        job |= {"side": side, "sizes": list(map(len, plan)), "warmup": self.args.warmup_steps}
        others = machine.Others()
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            result = in_subprocess({**job, **extra}, Path(folder))
        result["others_cores"] = busy = others.cores()
        shapes = [[2 * len(batch), max(self.pairs[i].longer for i in batch)] for batch in plan]
        if result.pop("shapes", shapes) != shapes:
            raise SystemExit(f"{side}: TRL's batches have other shapes than planned")
        counts = self.count(plan[self.args.warmup_steps :])
        seconds = sum(result["seconds"][self.args.warmup_steps :])
        result["pairs_per_second"] = counts["pairs"] / seconds
        result["needed_tokens_per_second"] = counts["needed_tokens"] / seconds
        note = f"{counts['pairs'] / seconds:8.2f} pairs/s, others used {busy:.1f} cores"
        print(f"  {side:<10}{note}", flush=True)
        return result

    def count(self, plan: Plan) -> dict[str, int]:
        members = [self.pairs[i] for batch in plan for i in batch]
        padded = sum(2 * len(batch) * max(self.pairs[i].longer for i in batch) for batch in plan)
        needed = sum(pair.needed for pair in members)
        return {"pairs": len(members), "needed_tokens": needed, "padded_tokens": padded}


def compare(bench: Bench, against: str) -> dict[str, Any]:
    """Rounds of both sides against TRL as it comes, or tuned."""
    args = bench.args
    print(f"{against}:", flush=True)
    epoch = bench.default_plan()
    plan = bench.default_plan(args.steps)
    sides: dict[str, Any] = {"raywards": {"plan": plan}, "trl": {"plan": plan}}
    if against == "tuned":
        epoch, plan = grouped([pair.longer for pair in bench.pairs], args)
        mixed = mix(plan, args.warmup_steps)
        with open(args.data, encoding="utf-8") as file:
            rows = [line.strip() for line in file if line.strip()]
        laid_out = bench.folder / "laid_out.jsonl"
        lines = [rows[bench.pairs[i].row] for batch in mixed for i in batch]
        laid_out.write_text("\n".join(lines) + "\n", encoding="utf-8")
        sides["raywards"] = {"plan": mixed, "data": str(laid_out), "order": "sequential"}
        sides["trl"] = {"plan": plan, "order": [i for batch in plan for i in batch]}
    rounds = []
    for number in range(args.rounds):
        names = list(sides) if number % 2 == 0 else list(sides)[::-1]
        results = {name: bench.run(name, **sides[name]) for name in names}
        ratio = results["raywards"]["pairs_per_second"] / results["trl"]["pairs_per_second"]
        rounds.append({"order": names, "ratio": ratio, **results})
    measured = bench.count(plan[args.warmup_steps :])
    return {"measured": measured, "epoch": bench.count(epoch), "rounds": rounds}


def grouped(lengths: list[int], args: argparse.Namespace) -> tuple[Plan, Plan]:
    """An epoch of transformers' batches of like length, and a fair sample of them to train."""
    from transformers.trainer_pt_utils import LengthGroupedSampler

    epoch = batches_of(LengthGroupedSampler(args.batch, lengths=lengths), args.batch)
    by_length = sorted(epoch, key=lambda members: -max(lengths[i] for i in members))
    num_measured = args.steps - args.warmup_steps
    if num_measured > len(epoch):
        raise SystemExit(f"tuned: --steps asks for more than the {len(epoch)} batches of an epoch")
    stride = len(epoch) / num_measured
    measured = [by_length[int((k + 0.5) * stride)] for k in range(num_measured)]
    draw = random.Random(SEED)
    draw.shuffle(measured)
    warmup = [by_length[0], *draw.choices(by_length, k=args.warmup_steps - 1)]
    return epoch, warmup + measured


def batches_of(sampler: Any, size: int) -> Plan:
    """The full batches of a sampler, which are the same in every process."""
    import torch

    sampler.generator = torch.Generator().manual_seed(SEED)  # else: torch's global state
    order = list(sampler)
    return [order[i : i + size] for i in range(0, len(order) - size + 1, size)]


def mix(plan: Plan, warmup: int) -> Plan:
    """The same pairs: the warm-up as it is, the others in random batches."""
    others = [i for batch in plan[warmup:] for i in batch]
    random.Random(SEED).shuffle(others)
    size = len(plan[0])
    return plan[:warmup] + [others[i : i + size] for i in range(0, len(others), size)]


def compare_losses(bench: Bench) -> dict[str, Any]:
    """Loss curves of both sides over the same batches, with TRL as it comes."""
    print("losses:", flush=True)
    plan = bench.default_plan(bench.args.losses)
    curves = {side: bench.run(side, plan)["losses"] for side in ("raywards", "trl")}
    gaps = [abs(ours - theirs) for ours, theirs in zip(*curves.values(), strict=True)]
    return {**curves, "largest_difference": max(gaps), "largest_of_first_10": max(gaps[:10])}


def num_common(a: list[int], b: list[int]) -> int:
    """Tokens of the common prefix."""
    places = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in places if x != y), min(len(a), len(b)))


def count_parameters(model: str) -> int:
    """Parameters without embeddings."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(model, num_labels=1)
    with torch.device("meta"):
        inner = AutoModelForSequenceClassification.from_config(config)
    return int(inner.num_parameters(exclude_embeddings=True))


# ---------------------------------------------------------------- one side, in its own process


def in_subprocess(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    result = folder / "result.json"
    job_file = folder / "job.json"
    job_file.write_text(json.dumps({**job, "folder": str(folder), "result": str(result)}))
    scripts = Path(sys.executable).parent  # has the ninja that builds DeepSpeed's op
    env = {
        "CUDA_VISIBLE_DEVICES": "0",  # TRL refuses to see several
        "THP_MEM_ALLOC_ENABLE": "1",  # to all sides: large tensors in large pages
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": str(job["threads"]),
    }
    command = [sys.executable, __file__, "--side", str(job_file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{job['side']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(result.read_text())


def same_settings(job: dict[str, Any]) -> dict[str, Any]:
    """Settings that both sides share, which have the same names in both."""
    import torch

    torch.set_num_threads(job["threads"])
    return {
        "per_device_train_batch_size": job["batch"],
        "max_steps": len(job["sizes"]),
        "max_length": job["max_length"],
        "bf16": job["dtype"] == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def run_raywards(job: dict[str, Any]) -> dict[str, Any]:
    from raywards import RewardConfig, RewardTrainer

    run = Path(job["folder"], "run")
    config = RewardConfig(
        output_dir=str(run),
        num_workers=0,
        deepspeed=job["zero"],
        train_sampling_strategy=job.get("order", "random"),
        **same_settings(job),
    )
    trainer = RewardTrainer(model=job["model"], args=config, train_dataset=job["data"])
    watch = MemoryWatch(run, len(job["sizes"]))
    watch.start()
    dropped = trainer.train().metrics["num_dropped"]["train"]
    if dropped and "order" in job:
        raise SystemExit(f"raywards dropped {dropped} of the rows that were laid out for it")
    records = [record for record in trainer.state.log_history if "loss" in record]
    speeds = [record["pairs_per_second"] for record in records]
    return {
        "losses": [record["loss"] for record in records],
        "seconds": [size / speed for size, speed in zip(job["sizes"], speeds, strict=True)],
        "memory": watch.memory,
    }


class MemoryWatch(threading.Thread):
    """Reads the memory just before the first step, and its peak once the last step is logged."""

    def __init__(self, run: Path, num_steps: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.num_steps = run, num_steps
        self.memory: dict[str, int] = {}

    def run(self) -> None:
        # The last thing before the first step is that the log opens its TensorBoard file.
        while not any(self.folder.glob("tensorboard/events*")):
            time.sleep(0.01)
        self.memory["before"] = machine.memory_now()
        while (self.folder / "metrics.jsonl").read_bytes().count(b"\n") < self.num_steps:
            time.sleep(0.01)
        self.memory["peak"] = machine.memory_peak()


def run_trl(job: dict[str, Any]) -> dict[str, Any]:
    import trl
    from datasets import load_dataset
    from transformers import TrainerCallback
    from transformers.trainer_pt_utils import LengthGroupedSampler

    times: list[float] = []
    memory: dict[str, int] = {}
    shapes: list[list[int]] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not times:
                memory["before"] = machine.memory_now()
                times.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())
            memory["peak"] = machine.memory_peak()

    class Trainer(trl.RewardTrainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            """TRL's own; when tuned, the planned batches, which must be among its own."""
            own = super()._get_train_sampler(train_dataset)
            if "order" in job:
                assert type(own) is LengthGroupedSampler, type(own)
                epoch, size = batches_of(own, job["batch"]), job["batch"]
                planned = [job["order"][i : i + size] for i in range(0, len(job["order"]), size)]
                assert all(batch in epoch for batch in planned)
            return job.get("order", own)

    tuned = {
        "gradient_checkpointing": False,
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,
    }
    trainer = Trainer(
        model=job["model"],
        args=trl.RewardConfig(
            output_dir=job["folder"],
            report_to="none",
            **same_settings(job),
            **(tuned if "order" in job else {}),
        ),
        train_dataset=load_dataset(
            "json", data_files=job["data"], split="train", cache_dir=job["folder"]
        ),
        callbacks=[Watch()],
    )
    if "order" in job:
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row: {"length": max(len(row["chosen_ids"]), len(row["rejected_ids"]))}
        )
    collate = trainer.data_collator

    def collate_and_note(rows: Any) -> Any:
        batch = collate(rows)
        shapes.append(list(batch["input_ids"].shape))
        return batch

    trainer.data_collator = collate_and_note
    trainer.train()
    return {
        "losses": [record["loss"] for record in trainer.state.log_history if "loss" in record],
        "seconds": [end - start for start, end in pairwise(times)],
        "memory": memory,
        "shapes": shapes[: len(job["sizes"])],  # one more may have been fetched ahead
    }


# ---------------------------------------------------------------- the report


def show(against: str, found: dict[str, Any], mfu_per_token: float) -> None:
    rounds = found["rounds"]
    print(f"\n{against}: {found['measured']['pairs']} pairs a run; median (range) of {len(rounds)}")
    print(f"{'':<10}{'pairs/s':>24}{'tokens/s':>10}{'MFU':>7}{'peak GiB':>10}{'above start':>13}")
    for side in ("raywards", "trl"):
        runs = [results[side] for results in rounds]
        tokens = statistics.median(run["needed_tokens_per_second"] for run in runs)
        peaks = [run["memory"]["peak"] / 2**30 for run in runs]
        above = [(run["memory"]["peak"] - run["memory"]["before"]) / 2**30 for run in runs]
        print(
            f"{side:<10}{spread([run['pairs_per_second'] for run in runs]):>24}{tokens:>10.0f}"
            f"{tokens * mfu_per_token:>7.1%}{statistics.median(peaks):>10.2f}"
            f"{statistics.median(above):>13.2f}"
        )
    print(f"{'ratio':<10}{spread([results['ratio'] for results in rounds]):>24}")
    shares = [
        found[of]["padded_tokens"] / found[of]["needed_tokens"] for of in ("measured", "epoch")
    ]
    print("TRL computes {:.2f} tokens per token needed ({:.2f} in a whole epoch)".format(*shares))
    others = max(results[side]["others_cores"] for results in rounds for side in results["order"])
    if others > 0.2:
        print(f"DISTURBED: others used up to {others:.1f} cores; measure again on a quiet machine")


def show_losses(losses: dict[str, Any]) -> None:
    print(f"\n{'step':>5} {'raywards':>10} {'TRL':>10} {'difference':>11}")
    for step, (ours, theirs) in enumerate(zip(losses["raywards"], losses["trl"], strict=True), 1):
        print(f"{step:>5} {ours:>10.6f} {theirs:>10.6f} {abs(ours - theirs):>11.1e}")
    largest, of_first = losses["largest_difference"], losses["largest_of_first_10"]
    print(f"largest difference: {largest:.1e}, of the first 10 steps {of_first:.1e}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
