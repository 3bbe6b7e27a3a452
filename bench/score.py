"""Scoring speed of `Scorer` beside plain transformers, sentence-transformers and vLLM.

    python bench/score.py --make-model BASE_LM FOLDER
    python bench/score.py --model FOLDER --data PAIRS.jsonl --dtype float32|bfloat16
        [--workload conversations,pairs,best_of_16] [--count 200] [--rounds 3] [--threads N]
        [--sides scorer,scorer_deterministic,plain_random,plain_sorted,cross_encoder,vllm]
        [--vllm-python PYTHON] [--cross-encoder-python PYTHON] [--out RESULT.json]

FOLDER is a raywards export, or another classifier with one label and `"problem_type": "regression"`
(without that, vLLM applies a sigmoid). `--make-model` exports a language model with a seeded random
head: as good as a trained one for speed, but its rewards are close together for their rounding.

Workloads, of about `--count` sequences each, made of the file's rows by a fixed seed:

    conversations   one side of a pair each: next to nothing to share
    pairs           both sides of each pair, one after the other
    best_of_16      16 responses to each prompt: a prompt is one row's or several joined, of 300 to
                    450 tokens; the responses are those of other rows

Every side gets the same token ids, a workload in one call, and the call alone is timed: what
tokenisation takes is the same for all and in no figure. Only the CrossEncoder gets messages, which
it renders itself; the table says how long that takes. (It takes no ids; a text that is rendered
already cannot be given alone, and as half of a pair it is rendered once more.)

    scorer          Scorer.score_ids
    scorer_deterministic   the same with deterministic=True (on a CPU)
    plain_random    transformers, right padding, batches of 16 in shuffled order
    plain_sorted    the same, sorted by length
    cross_encoder   CrossEncoder.predict as it comes (sorted by length, batches of 32), no sigmoid
    vllm            LLM.classify as it comes, prefix caching included, bound to `--threads` cores
                    (its own choice keeps one core free) with 2 GiB of cache on the CPU

Each measurement is a fresh process that loads once and warms up on other rows; the sides alternate
and begin in turn. vLLM's prefix cache is emptied before every timing, so what it has of it comes
from within the workload; the table says how many tokens that were. A GPU is used where there is
one. Tokens *needed* count every common prefix once. Memory is the peak RSS, loading included, of
the process and its children. "others": mean number of cores that were busy with something else
during the timing, in the worst round: figures with much of that are worth little.

The exit status is 1 where rewards disagree: further from Scorer's than AGREE x their spread.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import machine
from sides import SEED, SIDES, Workload

# In bf16 each side is up to 0.18 from fp32 by itself: SmolLM2's first 6 layers with a random head.
AGREE = {"float32": 1e-4, "bfloat16": 0.3}
NUM_RESPONSES = 16
PROMPT_TOKENS = range(300, 451)
WARMUP_SEQUENCES = 32

Messages = list[dict[str, str]]


def main() -> None:
    args = parse()
    if args.make_model:
        make_model(*args.make_model)
    else:
        compare(args)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    split = operator.methodcaller("split", ",")
    parser.add_argument("--model", help="folder of a classifier with one label")
    parser.add_argument("--data", help="JSONL file of preference rows, as conversations")
    parser.add_argument("--dtype", choices=list(AGREE), default="float32")
    parser.add_argument("--workload", type=split, default=list(WORKLOADS))
    parser.add_argument("--count", type=int, default=200, help="sequences of a workload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--sides", type=split, default=list(SIDES))
    parser.add_argument("--vllm-python", help="interpreter that has vllm; default: this one")
    parser.add_argument("--cross-encoder-python", help="one that has sentence-transformers")
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--make-model", nargs=2, metavar=("BASE_LM", "FOLDER"))
    args = parser.parse_args()
    if not (args.make_model or (args.model and args.data)):
        parser.error("--model and --data are required")
    if args.count < NUM_RESPONSES:
        parser.error(f"--count must be at least {NUM_RESPONSES}")
    for what, known in ((args.sides, SIDES), (args.workload, WORKLOADS)):
        if unknown := set(what) - set(known):
            parser.error(f"{', '.join(sorted(unknown))}: expected some of {', '.join(known)}")
    if "scorer" not in args.sides:
        parser.error("--sides must have scorer: the others are compared with it")
    return args


# ---------------------------------------------------------------- the comparison


def compare(args: argparse.Namespace) -> None:
    config = json.loads(Path(args.model, "config.json").read_text())
    if len(config.get("id2label", "01")) != 1 or config.get("problem_type") != "regression":
        raise SystemExit(
            "--model: expected one label and problem_type 'regression', or vLLM returns no raw "
            "reward; --make-model makes such a folder"
        )
    about = machine.describe(args.threads)
    print(machine.in_words(about), flush=True)
    workloads, counts = build_workloads(args)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "workloads.json").write_text(json.dumps(workloads))
        runs = measure(args, Path(folder))
    report = {name: summarise(name, runs, counts[name], args.dtype) for name in args.workload}
    processes = {side: describe_processes(measured) for side, measured in runs.items()}
    for name, sides in report.items():
        show(name, counts[name], sides)
    show_processes(processes)
    if args.out:
        settings = {name: getattr(args, name) for name in ("dtype", "count", "rounds", "threads")}
        settings |= {"model": Path(args.model).name, "data": Path(args.data).name, "seed": SEED}
        left_out = [side for side in args.sides if side not in runs]
        result = {"machine": about, "settings": settings, "left_out": left_out}
        result |= {"workloads": {n: {**counts[n], "sides": sides} for n, sides in report.items()}}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**result, "processes": processes}, indent=1) + "\n")
    wrong = [f"{s} ({n})" for n, sides in report.items() for s in sides if not sides[s]["agrees"]]
    if wrong:
        raise SystemExit(f"rewards are too far from Scorer's: {', '.join(wrong)}")


def measure(args: argparse.Namespace, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each side found in each round; a side that failed is left out."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in args.sides}
    for number in range(args.rounds):
        turn = number % len(args.sides)
        for side in args.sides[turn:] + args.sides[:turn]:
            if side in runs:
                found = in_subprocess(args, side, folder)
                if found is None:
                    del runs[side]
                else:
                    runs[side].append(found)
    if "scorer" not in runs:
        raise SystemExit("scorer failed, and the others are compared with it")
    return runs


def in_subprocess(args: argparse.Namespace, side: str, folder: Path) -> dict[str, Any] | None:
    """One measurement of all workloads, or None where it failed, after printing why."""
    pythons = {"vllm": args.vllm_python, "cross_encoder": args.cross_encoder_python}
    job = {name: getattr(args, name) for name in ("model", "dtype", "threads")}
    job |= {"side": side, "folder": str(folder)}
    job_file, result = folder / "job.json", folder / "result.json"
    job_file.write_text(json.dumps(job))
    result.unlink(missing_ok=True)
    cores = sorted(os.sched_getaffinity(0))[: args.threads]
    env = {
        "HF_HUB_OFFLINE": "1",
        "THP_MEM_ALLOC_ENABLE": "1",  # to all sides: large tensors in large pages
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_NO_USAGE_STATS": "1",
        **os.environ,
        "OMP_NUM_THREADS": str(args.threads),
    }
    command = [
        pythons.get(side) or sys.executable,
        str(Path(__file__).with_name("sides.py")),
        str(job_file),
    ]
    with tempfile.TemporaryFile("w+") as output:
        subprocess.run(command, env=env, stdout=output, stderr=output, check=False)
        output.seek(0)
        # Not its exit status: now and then vLLM aborts when it is done and shuts down.
        if not result.exists():
            print(f"  {side} failed: {output.read()[-2000:].strip()}", flush=True)
            return None
    found = json.loads(result.read_text())
    speeds = [f"{len(w['rewards']) / w['seconds']:.1f}" for w in found["workloads"].values()]
    print(f"  {side:<22}{'  '.join(speeds)} sequences/s", flush=True)
    return found


# ---------------------------------------------------------------- workloads


def build_workloads(args: argparse.Namespace) -> tuple[dict[str, Workload], dict[str, Any]]:
    """Workloads by name, "warmup" among them, and what is in each."""
    from raywards.loader import load_tokenizer
    from raywards.rendering import Rendering

    render = Rendering(load_tokenizer(args.model)).encode_conversation
    with open(args.data, encoding="utf-8") as file:
        rows = [as_pair(json.loads(line)) for line in file if line.strip()]
    random.Random(SEED).shuffle(rows)
    warmup, rows = rows[:WARMUP_SEQUENCES], rows[WARMUP_SEQUENCES:]
    made: dict[str, list[Messages]] = {"warmup": [chosen for chosen, _ in warmup]}
    made |= {name: WORKLOADS[name](rows, args.count, render) for name in args.workload}
    workloads, counts = {}, {}
    for name, conversations in made.items():
        start = time.perf_counter()
        ids = [render(messages) for messages in conversations]
        seconds = time.perf_counter() - start
        workloads[name] = {"ids": ids, "messages": conversations}
        counts[name] = {"sequences": len(ids), "tokens": sum(map(len, ids))}
        counts[name] |= {"needed_tokens": num_needed(ids), "render_s": seconds}
    return workloads, counts


def as_pair(row: dict[str, Any]) -> tuple[Messages, Messages]:
    """Both conversations of a row, whole."""
    prompt = row.get("prompt") or []
    if not all(isinstance(row[side], list) for side in ("chosen", "rejected")):
        raise SystemExit("--data: rows must hold `chosen` and `rejected` as lists of messages")
    return prompt + row["chosen"], prompt + row["rejected"]


def conversations(rows: list[Any], count: int, render: Any) -> list[Messages]:
    draw = random.Random(SEED)
    return [draw.choice(pair) for pair in rows[:count]]


def pairs(rows: list[Any], count: int, render: Any) -> list[Messages]:
    return [side for pair in rows[: count // 2] for side in pair]


def best_of_16(rows: list[Any], count: int, render: Any) -> list[Messages]:
    draw = random.Random(SEED)
    answers = {side[-1]["content"]: number for number, pair in enumerate(rows) for side in pair}
    groups = []
    for prompt, used in long_prompts(rows, render):
        others = [text for text, number in answers.items() if number not in used]
        texts = draw.sample(others, NUM_RESPONSES)
        groups += [[*prompt, {"role": "assistant", "content": text}] for text in texts]
        if len(groups) + NUM_RESPONSES > count:
            return groups
    raise SystemExit(f"--data has rows for {len(groups)} sequences of best_of_16: lower --count")


def long_prompts(rows: list[Any], render: Any) -> Iterator[tuple[Messages, set[int]]]:
    """Prompts with PROMPT_TOKENS tokens, and the numbers of the rows that they are made of."""
    turns: Messages = []
    used: set[int] = set()
    for number, (chosen, _) in enumerate(rows):
        length = len(render(turns + chosen[:-1]))
        if length in PROMPT_TOKENS:
            yield turns + chosen[:-1], {*used, number}
        if length < PROMPT_TOKENS.start:
            turns, used = turns + chosen, {*used, number}
        else:
            turns, used = [], set()


WORKLOADS = {"conversations": conversations, "pairs": pairs, "best_of_16": best_of_16}


def num_needed(sequences: list[list[int]]) -> int:
    """Tokens when every common prefix is counted once: the nodes of the trie."""
    needed = 0
    for before, ids in pairwise([[], *sorted(sequences)]):
        equal = takewhile(lambda both: both[0] == both[1], zip(before, ids, strict=False))
        needed += len(ids) - len(list(equal))
    return needed


def make_model(base: str, folder: str) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    from raywards.checkpoint import export_model
    from raywards.loader import create_model_from_path, load_tokenizer
    from raywards.rendering import Rendering

    torch.manual_seed(SEED)
    model = create_model_from_path(base, AutoModelForSequenceClassification, device_map=None)
    rendering = Rendering(load_tokenizer(base))
    about = {"conversational": True, "head": f"random, seed {SEED}"}
    weights = model.state_dict()
    export_model(model, weights, rendering, Path(folder), dtype=model.dtype, training=about)


# ---------------------------------------------------------------- the report


def summarise(
    name: str, runs: dict[str, list[dict[str, Any]]], counts: dict[str, Any], dtype: str
) -> dict[str, Any]:
    """Figures of each side for one workload, a list of one value a round where they vary."""
    reference = runs["scorer"][0]["workloads"][name]["rewards"]
    sd = statistics.pstdev(reference)
    needed_of_each = counts["needed_tokens"] / counts["sequences"]
    ours = [run["workloads"][name]["seconds"] for run in runs["scorer"]]
    found = {}
    for side, measured in runs.items():
        results = [run["workloads"][name] for run in measured]
        seconds = [result["seconds"] for result in results]
        gaps = [
            abs(a - b)
            for result in results
            for a, b in zip(result["rewards"], reference, strict=True)
        ]
        speeds = [counts["sequences"] / s for s in seconds]
        found[side] = {
            "sequences_per_second": speeds,
            "scorer_is_times_faster": [s / our for s, our in zip(seconds, ours, strict=True)],
            "needed_tokens_per_second": statistics.median(speeds) * needed_of_each,
            "largest_difference": max(gaps),
            "largest_difference_in_sd": max(gaps) / sd,
            "agrees": max(gaps) <= AGREE[dtype] * sd,
            "others_cores": [result["others_cores"] for result in results],
            **results[-1]["notes"],
        }
    return found


def describe_processes(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "peak_rss_gib": max(run["peak_rss"] for run in runs) / 2**30,
        "load_and_warm_up_s": [run["load_s"] for run in runs],
        "versions": runs[0]["versions"],
    }


def show(name: str, counts: dict[str, Any], sides: dict[str, Any]) -> None:
    print(
        "\n{}: {sequences} sequences, {tokens:,} tokens, {needed_tokens:,} needed; "
        "rendering them takes {render_s:.2f} s".format(name, **counts)
    )
    columns = ("sequences/s", 24), ("Scorer is faster by", 22), ("needed tokens/s", 17)
    columns += ("rewards differ by", 24), ("others", 8)
    print(" " * 22 + "".join(f"{title:>{width}}" for title, width in columns))
    for side, found in sides.items():
        ratio = "" if side == "scorer" else spread(found["scorer_is_times_faster"])
        gap = f"{found['largest_difference']:.1e} ({found['largest_difference_in_sd']:.1e} sd)"
        print(
            f"{side:<22}{spread(found['sequences_per_second']):>24}{ratio:>22}"
            f"{found['needed_tokens_per_second']:>17,.0f}{gap:>24}"
            f"{max(found['others_cores']):>8.1f}{'' if found['agrees'] else '  DISAGREES'}"
        )
        if "tokens_from_prefix_cache" in found:
            print(f"{'':<22}{found['tokens_from_prefix_cache']:,} tokens came from its cache")


def show_processes(processes: dict[str, Any]) -> None:
    print(f"\n{'':<22}{'peak GiB':>9}{'load and warm up':>18}")
    for side, found in processes.items():
        names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
        load = f"{statistics.median(found['load_and_warm_up_s']):.0f} s"
        print(f"{side:<22}{found['peak_rss_gib']:>9.2f}{load:>18}  {names}")


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
