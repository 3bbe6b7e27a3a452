"""Which path a model's rows take, found by trying it: `settle_path`.

A wrong reward looks like any other, so nothing is taken on trust: each path of `RewardModel` is run
on a few sequences and compared with the model's own forward on each of them alone.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from raywards import families
from raywards.attention import UnsupportedAttention
from raywards.errors import ModelError
from raywards.model import PATHS, Path, RewardModel
from raywards.packing import Group, PackedRow, pack, pack_alone

logger = logging.getLogger(__name__)

_CANNOT_RUN = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)


def settle_path(
    model: RewardModel,
    run: Callable[[PackedRow], Tensor] | None = None,
    *,
    autocast: bool = False,
) -> None:
    """Take the first path whose rewards are those of the model's own forward on a probe.

    The model's own forward is on each sequence of the probe alone, unpadded. `run` is what calls
    the model, if not the model itself (DeepSpeed's engine; a collective under ZeRO-3), and
    `autocast` whether that computes in half precision from fp32 weights. A path that is not taken
    is told of in the log.

    Costs up to nine forwards, six of them on one short sequence.

    Raises:
        ModelError: Padding changes the rewards, or this is no model of token ids alone: there is no
            path on which a reward is what transformers gives for the sequence.
    """
    run = run or model
    kind = type(model.inner).__name__
    reason = families.why_refused(model.inner.config)
    if reason is not None:
        raise ModelError(_refusal(kind, reason))
    training = model.training
    model.eval()
    first = model.path
    device = next(model.parameters()).device
    sequences, groups = _probe(model.inner)
    row = pack(sequences, groups).to(device)
    with torch.no_grad():
        try:
            alone = _alone(model, run, [pack_alone([ids]).to(device) for ids in sequences])
        except torch.OutOfMemoryError:
            raise
        except _CANNOT_RUN as error:
            raise ModelError(_refusal(kind, _could_not(error))) from error
        expected = alone[[index for group in groups for index in group.members]]
        spread = (expected.max() - expected.min()).item()
        exact = not autocast and next(model.parameters()).dtype == torch.float32
        exact = exact and torch.get_float32_matmul_precision() == "highest"  # no TF32
        allowed = (1e-3 if exact else 0.2) * spread + 1e-6
        # Windows and dropout send rows there, so it has to be right. To refuse is final: in half
        # precision only what rounding cannot explain. What is not finite is told of elsewhere.
        problem = _try_path(model, run, "padded", row, expected, allowed if exact else spread)
        if problem is not None and expected.isfinite().all():
            raise ModelError(_refusal(kind, f"beside other sequences, {problem}"))
        for path in PATHS[PATHS.index(first) : -1]:
            problem = _try_path(model, run, path, row, expected, allowed)
            if problem is None:
                break
            logger.warning("%s: not on the %s path: %s", kind, path, problem)
        else:
            model.use("padded")
    model.train(training)


def _refusal(kind: str, reason: str) -> str:
    return (
        f"{kind} cannot be a reward model here: {reason}. A reward has to be that of its sequence "
        "alone, whatever the batch. Take a family that docs/families.md lists as packed, masked or "
        "padded."
    )


def _could_not(error: Exception) -> str:
    return f"it cannot be run ({type(error).__name__}: {str(error)[:200]})"


def _alone(model: RewardModel, run: Callable[[PackedRow], Tensor], rows: list[PackedRow]) -> Tensor:
    """Rewards of rows of one sequence each, by transformers' own pooling."""
    model.use("padded")
    pools_by_position, model.pools_by_position = model.pools_by_position, False
    try:
        return torch.cat([run(row) for row in rows]).double()
    finally:
        model.pools_by_position = pools_by_position


def _try_path(
    model: RewardModel,
    run: Callable[[PackedRow], Tensor],
    path: Path,
    row: PackedRow,
    expected: Tensor,
    allowed: float,
) -> str | None:
    """What is wrong with a path, or None."""
    try:
        model.use(path)
        found = run(row).double()
    except UnsupportedAttention as error:
        return str(error)
    except _CANNOT_RUN as error:
        return _could_not(error)
    off = (found - expected).abs().max().item()
    if off <= allowed:
        return None
    return f"its rewards are up to {off:.2g} off the model's own forward ({allowed:.2g} allowed)"


def _probe(inner: Any) -> tuple[list[list[int]], list[Group]]:
    """Sequences for every case: shared, empty, equal, alone; ids that are nobody's text."""
    draw = random.Random(0)
    config = inner.config.get_text_config()
    special = _special_ids(config)
    usual = [i for i in range(getattr(config, "vocab_size", 256)) if i not in special][:4096] or [0]

    def ids(count: int) -> list[int]:
        return draw.choices(usual, k=count)

    prompt, other = ids(23), ids(9)
    sequences = [
        prompt + ids(11),
        prompt + ids(17),
        prompt,
        other + ids(4),
        other + ids(1),
        ids(40),
    ]
    groups = [Group(23, (0, 1, 2)), Group(9, (3, 4, 3)), Group(0, (5,))]
    return sequences, groups


def _special_ids(config: Any) -> set[int]:
    """Ids that a model may treat otherwise than as a word."""
    named = [getattr(config, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    return {i for ids in named for i in (ids if isinstance(ids, list) else [ids]) if i is not None}
