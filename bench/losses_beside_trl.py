"""TRL's RewardTrainer on the model, rows, order and settings of a finished raywards run.

    python bench/losses_beside_trl.py RUN_FOLDER --model M --data TRAIN.jsonl --eval EVAL.jsonl

Prints the losses of both side by side, their largest difference, and the held-out metrics of both
before and after. It is a comparison of results; `--steps N` stops TRL early where only the first
losses matter.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
import trl
from datasets import load_dataset
from transformers import TrainerCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--eval", required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    settings = json.loads((args.run / "run.json").read_text())["all"]
    records = [json.loads(line) for line in (args.run / "metrics.jsonl").open()]
    total = max(record["step"] for record in records)
    trainer = trl.RewardTrainer(
        model=args.model,
        args=trl.RewardConfig(
            output_dir=tempfile.mkdtemp(),
            # TRL trains in one process here: its batch is our global batch.
            per_device_train_batch_size=settings["per_device_train_batch_size"]
            * settings["gradient_accumulation_steps"]
            * max(1, settings["num_workers"]),
            max_steps=total,
            learning_rate=settings["learning_rate"],
            max_length=settings["max_length"],
            gradient_checkpointing=settings["gradient_checkpointing"],
            seed=settings["seed"],
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        eval_dataset=load_dataset("json", data_files=args.eval, split="train"),
    )
    before = trainer.evaluate()
    if args.steps is not None:
        trainer.add_callback(_StopAt(args.steps))
    trainer.train()
    after = trainer.evaluate()

    theirs = {r["step"]: r["loss"] for r in trainer.state.log_history if "loss" in r}
    ours = {r["step"]: r["loss"] for r in records if "loss" in r}
    print(f"{'step':>5} {'raywards':>10} {'TRL':>10} {'difference':>11}")
    for step in sorted(theirs.keys() & ours.keys()):
        gap = abs(ours[step] - theirs[step])
        print(f"{step:>5} {ours[step]:>10.6f} {theirs[step]:>10.6f} {gap:>11.1e}")
    first = max(abs(ours[step] - theirs[step]) for step in range(1, 11))
    print(f"largest difference over the first 10 losses: {first:.1e}")
    held_out = [r for r in records if "eval_loss" in r]
    for name, our, their in (("before", held_out[0], before), ("after", held_out[-1], after)):
        print(
            f"held out {name}: raywards loss {our['eval_loss']:.4f} accuracy "
            f"{our['eval_accuracy']:.4f}; TRL loss {their['eval_loss']:.4f} accuracy "
            f"{their['eval_accuracy']:.4f}"
        )


class _StopAt(TrainerCallback):
    """Ends training after so many steps, with the schedule of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


if __name__ == "__main__":
    main()
