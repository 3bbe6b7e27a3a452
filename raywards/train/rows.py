"""How a global batch becomes rows, whether activations are kept, and how long a row may be.

What a token's activations take is measured on the model itself: a short and a longer row are put
through it, and the difference of what autograd keeps is divided by that of their lengths.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from torch import Tensor

from raywards.model import RewardModel
from raywards.packing import PackedRow, deal, deal_batches, pack_alone
from raywards.train.table import PairTable

EVALUATION_TOKENS = 8192
"""Tokens of a row where no activations are kept."""

# A CPU is no faster on longer rows, and a GPU no more at work (bench/kernels.py).
_MOST_TOKENS = {"cpu": 4096, "cuda": 65_536}
# Of the memory that is free: the rest is for gradients in flight, buckets, fragments.
_SHARE_OF_FREE = 0.6
_PROBE_TOKENS = 192


@dataclass(frozen=True)
class Rows:
    """The plan of a run's rows."""

    padded: bool
    """Whether the model takes pairs of like length instead of packed rows."""
    max_tokens: int
    """Tokens of one row; a longer pair goes alone."""
    window: float = math.inf
    """Tokens above which the model pads a sequence: its pair goes alone, too."""

    def plan(
        self, table: PairTable, indices: Sequence[int], num_ranks: int, per_forward: int
    ) -> list[list[list[int]]]:
        """Pairs by rank and row; `per_forward` counts where the model pads."""
        places = list(indices)
        lengths = dict(zip(places, table.lengths[places].tolist(), strict=True))
        if self.padded:
            return deal_batches(indices, lengths, num_ranks=num_ranks, per_forward=per_forward)
        costs = dict(zip(places, table.tokens[places].tolist(), strict=True))
        if math.isfinite(self.window):
            alone = self.max_tokens + 1
            costs = {i: max(c, alone) if lengths[i] > self.window else c for i, c in costs.items()}
        return deal(indices, costs, num_ranks=num_ranks, max_tokens=self.max_tokens)


@dataclass(frozen=True)
class Fit:
    """What fits into memory."""

    keeps_activations: bool
    max_tokens: int
    bytes_per_token: int

    def in_words(self) -> str:
        kept = (
            "activations are kept (no gradient checkpointing)"
            if self.keeps_activations
            else "activations are recomputed (gradient checkpointing)"
        )
        return (
            f"Rows of up to {self.max_tokens:,} tokens; {kept}: "
            f"{self.bytes_per_token / 2**20:.2f} MiB a token."
        )


def fit_rows(
    model: RewardModel,
    run: Callable[[PackedRow], Tensor],
    *,
    free_bytes: int,
    most_tokens: int,
    longest: int,
    checkpointing: bool | None,
    max_tokens: int | None,
) -> Fit:
    """Longest row, and whether activations are kept: both as asked, or what fits.

    Args:
        model: For its size; in eval mode, so that nothing is checkpointed while it is measured.
        run: What calls it.
        free_bytes: For activations.
        most_tokens: Row length above which a row is no faster.
        longest: Tokens of the longest pair: its row must fit.
        checkpointing: As the settings say; None: only where activations would not fit.
        max_tokens: As the settings say; None: what fits, as a power of two.
    """
    config = model.inner.config.get_text_config()
    kept = measure_bytes_per_token(
        run,
        next(model.parameters()).device,
        getattr(config, "max_position_embeddings", None) or _PROBE_TOKENS,
    )
    layers = max(1, config.num_hidden_layers)
    # The states between the layers, and one layer's activations while it is recomputed.
    recomputed = kept // layers + 4 * config.hidden_size * layers
    needed = max_tokens or longest
    if checkpointing is None:
        checkpointing = kept * max(needed, longest) > free_bytes
    per_token = recomputed if checkpointing else kept
    if max_tokens is None:
        affordable = max(1, free_bytes // per_token)
        # Powers of two: a few bytes more or less free at the next start change nothing.
        max_tokens = min(most_tokens, 1 << (affordable.bit_length() - 1))
    return Fit(not checkpointing, max_tokens, per_token)


def measure_bytes_per_token(
    run: Callable[[PackedRow], Tensor], device: torch.device, most_positions: int
) -> int:
    """Bytes that autograd keeps for each token of a row. A collective under ZeRO-3."""
    longer = min(_PROBE_TOKENS, most_positions)
    lengths = (longer // 3, longer)
    short, long = (_kept_bytes(run, pack_alone([[0] * n]).to(device)) for n in lengths)
    return max(1, (long - short) // (lengths[1] - lengths[0]))


def _kept_bytes(run: Callable[[PackedRow], Tensor], row: PackedRow) -> int:
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes again
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(row)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def free_bytes(device: torch.device, *, ranks_on_node: int, num_parameters: int) -> int:
    """Memory for activations: what is free, less what the first step will allocate."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    else:
        free = _free_on_node() // ranks_on_node
    # Gradients and Adam's two moments in fp32, where they are not there yet.
    return max(0, int(_SHARE_OF_FREE * free) - 12 * num_parameters)


def most_tokens(device: torch.device) -> int:
    """Length above which a row is no faster on this kind of device."""
    return _MOST_TOKENS.get(device.type, _MOST_TOKENS["cpu"])


def _free_on_node() -> int:
    """Available memory, or what the container's limit leaves where that is less."""
    free = int(psutil.virtual_memory().available)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    try:
        return min(free, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):  # no cgroup, or "max"
        return free
