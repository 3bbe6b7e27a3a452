"""Which pairs go through which forward, and the tensors of one forward. Pure: no model, no Ray.

The unit is the global batch: the pairs of one optimizer step over all workers. Its members follow
from (seed, epoch, step) alone; how they are dealt to workers changes nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward, padded on the right. Made by `pad`, taken by `RewardModel`.

    S sequences, T tokens of the longest.
    """

    input_ids: Tensor
    """[S, T] int64."""
    attention_mask: Tensor
    """[S, T] int64, 1 on tokens."""
    pooled: Tensor
    """[S] int64: the position whose hidden state becomes the reward."""

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.attention_mask.to(device, non_blocking=True),
            self.pooled.to(device, non_blocking=True),
        )


def pad(sequences: Sequence[Sequence[int]], pad_id: int, *, skip_id: int | None = None) -> Batch:
    """Sequences laid under each other, filled up with `pad_id` on the right.

    The pooled position is the last token, or, with `skip_id`, the last token that is not `skip_id`:
    the rule of transformers' own classifiers, which foreign reward models keep.
    """
    longest = max(map(len, sequences))
    input_ids = torch.full((len(sequences), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(sequences), longest), dtype=torch.int64)
    for i, ids in enumerate(sequences):
        input_ids[i, : len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
        attention_mask[i, : len(ids)] = 1
    pooled = torch.tensor([pooled_position(ids, skip_id) for ids in sequences])
    return Batch(input_ids, attention_mask, pooled)


def pooled_position(ids: Sequence[int], skip_id: int | None = None) -> int:
    """Index of the token whose hidden state becomes the reward of `ids`."""
    last = len(ids) - 1
    while skip_id is not None and last > 0 and ids[last] == skip_id:
        last -= 1
    return last


@dataclass(frozen=True)
class TrainPlan:
    """The order of the pairs of a run: a pure function of its fields, so a position is an integer.

    With `shuffle`, an epoch's order is the permutation that TRL (accelerate's seedable sampler)
    draws for the same seed and epoch.
    """

    num_pairs: int
    global_batch: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.num_pairs, self.global_batch)
        return whole if self.drop_last or not rest else whole + 1

    def order(self, epoch: int) -> list[int]:
        """Indices of the pairs in the order in which `epoch` trains them."""
        if not self.shuffle:
            return list(range(self.num_pairs))
        generator = torch.Generator().manual_seed(self.seed + epoch)
        return torch.randperm(self.num_pairs, generator=generator).tolist()

    def steps(self, first: int, total: int) -> Iterator[tuple[int, list[int]]]:
        """(step, indices of its global batch) for every step from `first` up to `total`."""
        order: list[int] = []
        for step in range(first, total):
            epoch, inside = divmod(step, self.steps_per_epoch)
            if not order or inside == 0:
                order = self.order(epoch)
            yield step, order[inside * self.global_batch : (inside + 1) * self.global_batch]


def deal(
    indices: Sequence[int], lengths: Sequence[int], *, num_ranks: int, per_forward: int
) -> list[list[list[int]]]:
    """Deal a global batch to ranks and forwards: `result[rank][forward]` lists indices.

    `lengths[i]` is the longer side of pair `i` in tokens. Pairs of like length share a forward, and
    the ranks' forwards at one position are alike. Every rank gets the same number of forwards:
    unequal counts abort ZeRO-2 and 3, or hang them. A forward may be empty at the end of an epoch.
    """
    by_length = sorted(indices, key=lambda i: (-lengths[i], i))
    width = num_ranks * per_forward
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(by_length), width):
        forwards: list[list[int]] = [[] for _ in range(num_ranks)]
        for place, index in enumerate(by_length[start : start + width]):
            lap, turn = divmod(place, num_ranks)
            # Boustrophedon: the rank that got the longest of one lap gets the shortest of the next.
            forwards[turn if lap % 2 == 0 else num_ranks - 1 - turn].append(index)
        for rank, forward in enumerate(forwards):
            plan[rank].append(forward)
    return plan


def fill(lengths: Sequence[int], *, max_tokens: int, max_sequences: int) -> list[list[int]]:
    """Indices of sequences, in forwards of at most `max_tokens` tokens, padding included.

    Longest first, so that neighbours pad little. A sequence over the budget goes alone.
    """
    forwards: list[list[int]] = []
    current: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        longest = lengths[current[0]] if current else lengths[index]
        full = longest * (len(current) + 1) > max_tokens or len(current) == max_sequences
        if current and full:
            forwards.append(current)
            current = []
        current.append(index)
    return [*forwards, current] if current else forwards
