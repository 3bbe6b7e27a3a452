"""What the packed forward's choices rest on: attention kernels, tiles of a GEMM, lengths of a row.

    python bench/kernels.py [--threads N] [--repeat 5] [--out RESULT.json]

attention: one layer over G groups of a prefix of P tokens and n branches of R, forward and forward
with backward, as ours (one flash call a segment), as the sequences one by one in a padded
batch, and as one row with a [T, T] mask. On a GPU the device's own forms of the three.

tiles: a linear layer over 2048 rows at once, and in tiles of a fixed number of rows, which is what
bit-exact scoring takes (CPU only).

Each figure is the best of `--repeat` runs in milliseconds, everything in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine

HEADS, KEY_HEADS, SIZE = 9, 3, 64  # SmolLM2-135M's
CASES = [(125, 46, 2, 8), (300, 250, 2, 4), (350, 150, 16, 1)]  # P, R, n, G
LINEARS = [(576, 1536), (1536, 576)]
TILES = [64, 128, 256, 512]
ROWS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the results")
    args = parser.parse_args()

    import torch

    torch.set_num_threads(args.threads)
    about = machine.describe(args.threads)
    print(machine.in_words(about))
    dtypes = ["bfloat16"] if torch.cuda.is_available() else ["float32", "bfloat16"]
    attention = [attend(case, dtype, args.repeat) for dtype in dtypes for case in CASES]
    show(attention)
    tiles = []
    if not torch.cuda.is_available():
        tiles = [tile(shape, dtype, args.repeat) for dtype in dtypes for shape in LINEARS]
        show(tiles)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": about, "attention_ms": attention, "tiles_ms": tiles}
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def attend(case: tuple[int, int, int, int], dtype: str, repeat: int) -> dict[str, Any]:
    """Milliseconds of one layer's attention in its three forms."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as stock

    from raywards.attention import LAYOUT, attend
    from raywards.packing import Group, pack

    prefix, branch, count, groups = case
    sequences = [
        [g] * prefix + [1000 + g * count + n] * branch for g in range(groups) for n in range(count)
    ]
    row = pack(
        sequences, [Group(prefix, tuple(range(g * count, (g + 1) * count))) for g in range(groups)]
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = len(row.input_ids)

    def states(batch: int, length: int) -> list[Any]:
        kind = getattr(torch, dtype)
        return [
            torch.randn(batch, length, heads, SIZE, device=device, dtype=kind)
            .transpose(1, 2)
            .requires_grad_()
            for heads in (HEADS, KEY_HEADS, KEY_HEADS)
        ]

    sees = torch.zeros(tokens, tokens, dtype=torch.bool, device=device)
    for segment in row.layout.segments:
        asked = slice(segment.query_start, segment.query_end)
        sees[asked, segment.prefix_start : segment.prefix_end] = True
        size = segment.query_end - segment.query_start
        sees[asked, asked] = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    ours, padded = states(1, tokens), states(groups * count, prefix + branch)
    forms: dict[str, tuple[list[Any], Callable[..., Any]]] = {
        "ours": (ours, lambda q, k, v: attend(None, q, k, v, None, **{LAYOUT: row.layout})[0]),
        "padded": (padded, lambda q, k, v: stock(q, k, v, is_causal=True, enable_gqa=True)),
        "masked": (ours, lambda q, k, v: stock(q, k, v, attn_mask=sees, enable_gqa=True)),
    }
    found: dict[str, Any] = {"dtype": dtype, "prefix": prefix, "branch": branch}
    found |= {"branches": count, "groups": groups}
    for name, (given, form) in forms.items():
        with torch.no_grad():
            found[name] = best(repeat, lambda form=form, given=given: form(*given))
        found[f"{name}_with_backward"] = best(
            repeat, lambda form=form, given=given: form(*given).float().sum().backward()
        )
    return found


def tile(shape: tuple[int, int], dtype: str, repeat: int) -> dict[str, Any]:
    """Milliseconds of a linear layer at once and in tiles."""
    import torch
    from torch.nn.functional import linear

    hidden = torch.randn(ROWS, shape[0]).to(getattr(torch, dtype))
    weight = torch.randn(shape[1], shape[0]).to(getattr(torch, dtype))
    found = {"dtype": dtype, "linear": f"{shape[0]} to {shape[1]}"}
    found["at once"] = best(repeat, lambda: linear(hidden, weight))
    for size in TILES:
        found[f"tiles of {size}"] = best(
            repeat, lambda size=size: [linear(part, weight) for part in hidden.split(size)]
        )
    return found


def best(repeat: int, run: Callable[[], Any]) -> float:
    """Milliseconds of the fastest of `repeat` runs, after one that does not count."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    run()
    seconds = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        run()
        wait()
        seconds.append(time.perf_counter() - start)
    return round(1e3 * min(seconds), 3)


def show(rows: list[dict[str, Any]]) -> None:
    print()
    print("  ".join(rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>{len(name)}}" for name, value in row.items()))


if __name__ == "__main__":
    main()
