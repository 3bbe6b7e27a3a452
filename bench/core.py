"""The packed forward beside the padded one, with torch and transformers alone: no data, no hub.

    python bench/core.py [--geometry qwen2.5-0.5b] [--dtype bfloat16] [--pairs 256] [--batch 8]
        [--repeat 3] [--out RESULT.json]

Random weights of a known geometry, random ids of HH-like lengths (lognormal: prompts of mean 125
and median 98 tokens, responses of mean 46 and median 31), on a GPU where there is one.

train: whole steps (forward, backward, clipping, fused AdamW over fp32 weights, autocast) of packed
rows without checkpointing; of the padded batches that TRL makes at its defaults (random order,
gradient checkpointing); and of those made with like lengths and no checkpointing. TRL itself is not
run, only its computation. score: packed rows; padded batches of 16 in random order, and by length.

MFU is on the tokens needed, each common prefix counted once: 6 FLOP a parameter and token in
training, 2 in scoring, over the device's peak. Sides alternate; figures are medians.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # runs from a checkout that is not installed
import machine

GEOMETRIES = {
    "qwen2.5-0.5b": {
        **{"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
        **{"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
    },
    "qwen2.5-1.5b": {
        **{"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
        **{"num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151_936},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1000},
    },
}
ROW_TOKENS = 16_384
Pair = tuple[list[int], list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="qwen2.5-0.5b")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="pairs of a step")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file for the results")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    about = machine.describe(args.threads)
    print(machine.in_words(about))
    peak, source = machine.peak_flops(args.dtype)
    core = Core(args)
    print(
        f"packed rows go on the {core.model.path} path; peak {peak / 1e12:.3g} TFLOP/s ({source})"
    )
    core.check()
    sides = core.sides()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():  # warm up
        run(core.pairs[: 4 * args.batch])
    for turn in range(args.repeat):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            sides[name](core.pairs)
            core.wait()
            seconds[name].append(time.perf_counter() - start)
    figures = report(seconds, core, peak)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        result = {"machine": {**about, "peak_flops": peak}, "settings": settings}
        args.out.write_text(json.dumps(result | {"figures": figures}, indent=1) + "\n")


class Core:
    """A model of random weights, pairs of random ids, and the ways through one with the other."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch
        from transformers import Qwen2Config, Qwen2ForSequenceClassification

        from raywards.model import RewardModel
        from raywards.settle import settle_path

        torch.manual_seed(0)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.bf16 = args.dtype == "bfloat16"
        self.batch = args.batch
        config = Qwen2Config(**GEOMETRIES[args.geometry], num_labels=1, pad_token_id=0)
        self.inner = Qwen2ForSequenceClassification(config).to(self.device)
        embeddings = self.inner.get_input_embeddings().weight.numel()
        self.num_parameters = sum(p.numel() for p in self.inner.parameters()) - embeddings
        self.model = RewardModel(self.inner)
        settle_path(self.model, self.forward, autocast=self.bf16)
        self.path = self.model.path
        self.optimizer = torch.optim.AdamW(self.inner.parameters(), lr=1e-6, fused=True)
        draw = random.Random(0)
        self.pairs = [draw_pair(draw, config.vocab_size) for _ in range(args.pairs)]
        self.needed = sum(tokens_of(pair) for pair in self.pairs)

    def sides(self) -> dict[str, Callable[[list[Pair]], None]]:
        return {
            "train packed": lambda pairs: self.train(pairs, packed=True),
            "train padded, TRL's defaults": lambda pairs: self.train(pairs, checkpoint=True),
            "train padded, by length": lambda pairs: self.train(by_length(pairs)),
            "score packed": lambda pairs: self.score(pairs, packed=True),
            "score padded, random 16": self.score,
            "score padded, by length": lambda pairs: self.score(by_length(pairs)),
        }

    def check(self) -> None:
        """Stop where the packed gradient is not the padded one, as far as the dtype can tell."""
        import torch

        gradients = []
        for packed in (True, False):
            self.backward(self.pairs[: self.batch], packed=packed)
            parts = [p.grad.flatten().double().cpu() for p in self.inner.parameters()]
            gradients.append(torch.cat(parts))
            self.optimizer.zero_grad()
        ours, theirs = gradients
        off = ((ours - theirs).norm() / theirs.norm()).item()
        print(f"gradient of the first batch, packed against padded: {off:.1e} of its norm apart")
        if not off < (0.05 if self.bf16 else 1e-4):
            raise SystemExit("the packed gradient is wrong on this device; nothing was timed")

    def forward(self, row: Any) -> Any:
        import torch

        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.bf16):
            return self.model(row)

    def train(self, pairs: list[Pair], *, packed: bool = False, checkpoint: bool = False) -> None:
        """One step after the other over all pairs."""
        import torch

        if checkpoint:
            self.inner.activation_checkpointing_enable({"use_reentrant": False})
        for start in range(0, len(pairs), self.batch):
            self.backward(pairs[start : start + self.batch], packed=packed)
            torch.nn.utils.clip_grad_norm_(self.inner.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if checkpoint:
            self.inner.activation_checkpointing_disable()

    def backward(self, pairs: list[Pair], *, packed: bool) -> None:
        from raywards.loss import bradley_terry
        from raywards.packing import pack_groups

        self.model.use(self.path if packed else "padded")
        self.model.train()
        row = pack_groups(pairs)
        rewards = self.forward(row.to(self.device))
        bradley_terry(*rewards.view(-1, 2).unbind(1)).mean().backward()

    def score(self, pairs: list[Pair], *, packed: bool = False) -> None:
        """Every sequence once."""
        import torch

        from raywards.packing import Group, common_prefix, fill_rows, pack, pack_alone

        self.model.use(self.path if packed else "padded")
        self.model.eval()
        sequences = [side for pair in pairs for side in pair]
        rows = [pack_alone(sequences[start : start + 16]) for start in range(0, len(sequences), 16)]
        if packed:
            groups = [
                Group(common_prefix(*pair), (2 * i, 2 * i + 1)) for i, pair in enumerate(pairs)
            ]
            lengths = [len(ids) for ids in sequences]
            plan = fill_rows(groups, lengths, max_tokens=ROW_TOKENS, max_sequences=1024)
            rows = [pack(sequences, part) for part in plan]
        with torch.inference_mode():
            for row in rows:
                self.forward(row.to(self.device))

    def wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


def draw_pair(draw: random.Random, vocab_size: int) -> Pair:
    def ids(median: float, mean: float) -> list[int]:
        length = draw.lognormvariate(math.log(median), math.sqrt(2 * math.log(mean / median)))
        return [draw.randrange(1, vocab_size) for _ in range(max(1, min(512, round(length))))]

    prompt = ids(98, 125)
    return prompt + ids(31, 46), prompt + ids(31, 46)


def by_length(pairs: list[Pair]) -> list[Pair]:
    return sorted(pairs, key=lambda pair: max(map(len, pair)))


def tokens_of(pair: Pair) -> int:
    from raywards.packing import common_prefix

    return sum(map(len, pair)) - common_prefix(*pair)


def report(seconds: dict[str, list[float]], core: Core, peak: float) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    print(f"\n{'':32}{'pairs/s':>10}{'packed is':>11}{'MFU':>8}")
    for name, found in seconds.items():
        middle = statistics.median(found)
        task = name.split()[0]
        flops = (6 if task == "train" else 2) * core.num_parameters * core.needed / middle
        figures[name] = {
            "pairs_per_second": len(core.pairs) / middle,
            "spread_s": [min(found), max(found)],
            "packed_is_times": middle / statistics.median(seconds[f"{task} packed"]),
            "mfu_on_needed_tokens": flops / peak,
        }
        row = figures[name]
        print(
            f"{name:32}{row['pairs_per_second']:>10.1f}{row['packed_is_times']:>10.2f}x"
            f"{row['mfu_on_needed_tokens']:>8.1%}"
        )
    return figures


if __name__ == "__main__":
    main()
