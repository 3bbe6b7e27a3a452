"""Does the faster trainer give as good a reward model? The same run through TRL and raywards.

    python bench/quality_vs_trl.py --model M --data TRAIN.jsonl --eval HELD_OUT.jsonl
        [--steps 100] [--dtype bfloat16] [--batch 8] [--learning-rate 1e-4] [--out RESULT.json]

Both start from one folder: M with a head drawn once. They train the same batches in the same order
at each side's defaults (raywards with `num_workers=0`). Each side is a process of its own. The two
models that they save are then scored by plain transformers in fp32, one sequence at a time, so that
neither side judges itself. Held-out pairs on which exactly one of the two is right are counted, and
McNemar's exact test says how probable so uneven a count is if both are equally good.

The time is that of `train()`, evaluation left out; `others_cores` is what other processes took of
the machine meanwhile: a ratio of seconds counts only where it is near zero for both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

SEED = 42


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file for the results")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run_side(args)
        return
    about = machine.describe(args.threads)
    print(machine.in_words(about), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        start_from(args, Path(folder) / "start")
        found = {side: launch(side, args, Path(folder)) for side in ("raywards", "trl")}
        for side, result in found.items():
            rewards = score_plainly(Path(folder) / side / "model", args)
            result["right"] = [chosen > rejected for chosen, rejected in rewards]
            result["accuracy"] = sum(result["right"]) / len(rewards)
    result = {"machine": about, "settings": settings_of(args), "sides": found, **compare(found)}
    show(result)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    kept = {k: v for k, v in vars(args).items() if k not in ("out", "side", "folder", "threads")}
    return {k: Path(v).name if k in ("model", "data", "eval") else v for k, v in kept.items()}


def start_from(args: argparse.Namespace, folder: Path) -> None:
    """The model with a head, once: both sides load these very weights."""
    from transformers import AutoModelForSequenceClassification, set_seed

    from raywards import create_model_from_path
    from raywards.loader import load_tokenizer

    set_seed(SEED)
    model = create_model_from_path(args.model, AutoModelForSequenceClassification)
    model.save_pretrained(folder)
    load_tokenizer(args.model).save_pretrained(folder)


def launch(side: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train one side in a process of its own."""
    print(f"{side} trains {args.steps} steps ...", flush=True)
    others = machine.Others()
    command = [*sys.orig_argv, "--side", side, "--folder", str(folder)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((folder / side / "result.json").read_text())
    return {**result, "others_cores": others.cores()}


def run_side(args: argparse.Namespace) -> None:
    import torch

    torch.set_num_threads(args.threads)
    folder = Path(args.folder)
    out = folder / args.side
    shared = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "learning_rate": args.learning_rate,
        "bf16": args.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "seed": SEED,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = (trl_trainer if args.side == "trl" else our_trainer)(args, folder, shared)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.save_model(str(out / "model"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (out / "result.json").write_text(json.dumps({"seconds": seconds, "losses": losses}))


def our_trainer(args: argparse.Namespace, folder: Path, shared: dict[str, Any]) -> Any:
    from raywards import RewardConfig, RewardTrainer

    config = RewardConfig(output_dir=str(folder / "raywards" / "run"), num_workers=0, **shared)
    return RewardTrainer(str(folder / "start"), config, train_dataset=args.data)


def trl_trainer(args: argparse.Namespace, folder: Path, shared: dict[str, Any]) -> Any:
    import trl
    from datasets import load_dataset

    config = trl.RewardConfig(output_dir=str(folder / "trl" / "run"), report_to="none", **shared)
    rows = load_dataset("json", data_files=args.data, split="train")
    return trl.RewardTrainer(str(folder / "start"), config, train_dataset=rows)


def score_plainly(model_folder: Path, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Rewards of both sides of every held-out pair: no padding, so no pooling rule either."""
    import torch
    from transformers import AutoModelForSequenceClassification

    from raywards.loader import load_tokenizer
    from raywards.preferences import encode_row
    from raywards.rendering import Rendering
    from raywards.sources import read_rows

    torch.set_num_threads(args.threads)
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, dtype="float32").eval()
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    rendering = Rendering(load_tokenizer(args.model))
    found = []
    for rows in read_rows(args.eval):
        for place, row in enumerate(rows.rows):
            pair = encode_row(row, rows.where(place), rendering, max_length=None, truncation="drop")
            with torch.inference_mode():
                chosen, rejected = (
                    model.score(
                        getattr(model, model.base_model_prefix)(
                            torch.tensor([ids], device=model.device), use_cache=False
                        ).last_hidden_state[0, -1]
                    ).item()
                    for ids in (pair.chosen_ids, pair.rejected_ids)
                )
            found.append((chosen, rejected))
    return found


def compare(found: dict[str, Any]) -> dict[str, Any]:
    ours, theirs = found["raywards"], found["trl"]
    pairs = list(zip(ours["right"], theirs["right"], strict=True))
    only_ours = sum(a and not b for a, b in pairs)
    only_theirs = sum(b and not a for a, b in pairs)
    steps = zip(ours["losses"], theirs["losses"], strict=True)
    return {
        "only_raywards_right": only_ours,
        "only_trl_right": only_theirs,
        "mcnemar_p": mcnemar(only_ours, only_theirs),
        "largest_loss_difference": max(abs(a - b) for a, b in steps),
        "times_faster": theirs["seconds"] / ours["seconds"],
    }


def mcnemar(only_one: int, only_other: int) -> float:
    """Two-sided exact p: how probable a split at least as uneven is between equals (McNemar, 1947;
    the exact form is a binomial test of a half)."""
    n, fewer = only_one + only_other, min(only_one, only_other)
    tail = sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n
    return min(1.0, 2 * tail)


def show(result: dict[str, Any]) -> None:
    sides = result["sides"]
    for step in range(0, len(sides["trl"]["losses"]), 10):
        means = [
            sum(sides[side]["losses"][step : step + 10])
            / len(sides[side]["losses"][step : step + 10])
            for side in ("raywards", "trl")
        ]
        print(f"steps from {step + 1:3}: mean loss {means[0]:.4f} raywards, {means[1]:.4f} TRL")
    for side, one in sides.items():
        print(
            f"{side:9} held-out accuracy {one['accuracy']:.4f}, {one['seconds']:.0f} s "
            f"({one['others_cores']:.2f} cores busy with something else)"
        )
    print(
        f"right alone: raywards {result['only_raywards_right']}, TRL {result['only_trl_right']} "
        f"of {len(sides['trl']['right'])} pairs; McNemar p = {result['mcnemar_p']:.3f}; "
        f"{result['times_faster']:.2f} times faster"
    )


if __name__ == "__main__":
    main()
