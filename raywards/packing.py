"""Which sequences share a row, and the tensors of one. Pure: no model, no Ray.

    sequences ─group─► prefix + branches ─plan─► rows of bounded cost ─pack─► PackedRow

A row holds groups end to end; a group is a common prefix, stored once, and its branches. Training
shares what the sides of a pair have in common, or all responses of a ranking. Scoring splits a
sequence at a place that depends on that sequence alone, so that who else is in the row changes
nothing but the speed.

The unit of training is the global batch: the pairs of one optimizer step over all workers. Its
members follow from (seed, epoch, step) alone; how they are dealt to workers and rows changes
nothing but the speed.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = Sequence[int]


# ---------------------------------------------------------------- rows


class Segment(NamedTuple):
    """Queries of a row, and the keys that they see: a prefix, and a stretch of their own.

    The last query sees all of both; one before it sees one key less, and so on ("causal, aligned
    at the end"). All are places in the row, the end excluded.
    """

    query_start: int
    query_end: int
    prefix_start: int
    prefix_end: int
    own_start: int
    own_end: int

    @property
    def num_keys(self) -> int:
        return self.prefix_end - self.prefix_start + self.own_end - self.own_start


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a row. Plain integers: it can be compared, hashed and pickled."""

    segments: tuple[Segment, ...]
    pooled: Layout | None = None
    """The same for the last layer, where only pooled positions ask."""

    @property
    def longest_path(self) -> int:
        """Tokens of the longest sequence in the row."""
        return max(segment.num_keys for segment in self.segments)


@dataclass(frozen=True)
class PackedRow:
    """Sequences of one forward. Made by `pack`, taken by `RewardModel`.

    S sequences in T tokens, of which each common prefix is stored once.
    """

    input_ids: Tensor
    """[T] int64."""
    positions: Tensor
    """[T] int64: the place of each token in its sequence."""
    pooled: Tensor
    """[S] int64: the place in the row whose hidden state becomes the reward."""
    owners: tuple[int, ...]
    """[S]: the segment in which each sequence ends."""
    layout: Layout

    def to(self, device: torch.device) -> PackedRow:
        return replace(
            self,
            input_ids=self.input_ids.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
            pooled=self.pooled.to(device, non_blocking=True),
        )

    def padded(self, pad_id: int) -> Batch:
        """The same sequences laid under each other, filled up with `pad_id` on the right."""
        sequences, pooled = [], []
        for owner, place in zip(self.owners, self.pooled.tolist(), strict=True):
            _, _, start, end, own_start, own_end = self.layout.segments[owner]
            sequences.append([*range(start, end), *range(own_start, own_end)])
            inside = own_start <= place < own_end
            pooled.append(place - own_start + end - start if inside else place - start)
        longest = max(map(len, sequences))
        device = self.input_ids.device
        places = torch.tensor([s + [-1] * (longest - len(s)) for s in sequences], device=device)
        mask = places >= 0
        ids = torch.where(mask, self.input_ids[places.clamp(min=0)], pad_id)
        return Batch(ids, mask.long(), torch.tensor(pooled, device=device))


@dataclass(frozen=True)
class Batch:
    """Sequences of one forward, padded on the right: the reference, and what encoders take.

    S sequences, T tokens of the longest.
    """

    input_ids: Tensor
    """[S, T] int64."""
    attention_mask: Tensor
    """[S, T] int64, 1 on tokens."""
    pooled: Tensor
    """[S] int64: the position whose hidden state becomes the reward."""


class Group(NamedTuple):
    """Sequences that begin alike."""

    split: int
    """Tokens of the common prefix."""
    members: tuple[int, ...]
    """Indices of the sequences."""


def pack(
    sequences: Sequence[Ids], groups: Sequence[Group], *, skip_id: int | None = None
) -> PackedRow:
    """Groups end to end in one row. Equal members of a group are stored once.

    Rewards come group by group, in the order of the members. The pooled position is the last token,
    or, with `skip_id`, the last token that is not `skip_id`: the rule of transformers' own
    classifiers, which foreign reward models keep.
    """
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    owners: list[int] = []
    pooled: list[int] = []
    for split, members in groups:
        start, end = len(ids), len(ids) + split
        home = len(segments)
        if split:
            ids.extend(sequences[members[0]][:split])
            positions.extend(range(split))
            segments.append(Segment(start, end, start, start, start, end))
        placed: dict[tuple[int, ...], int] = {}
        for member in members:
            sequence = sequences[member]
            branch = tuple(sequence[split:])
            owner = home if not branch else placed.setdefault(branch, len(segments))
            if owner == len(segments):
                own = len(ids)
                ids.extend(branch)
                positions.extend(range(split, len(sequence)))
                segments.append(Segment(own, len(ids), start, end, own, len(ids)))
            owners.append(owner)
            place = pooled_position(sequence, skip_id)
            own_start = segments[owner].own_start
            pooled.append(start + place if place < split else own_start + place - split)
    return PackedRow(
        torch.tensor(ids, dtype=torch.int64),
        torch.tensor(positions, dtype=torch.int64),
        torch.tensor(pooled, dtype=torch.int64),
        tuple(owners),
        Layout(tuple(segments), _pooled_layout(segments, pooled)),
    )


def pack_groups(groups: Sequence[Sequence[Ids]]) -> PackedRow:
    """Groups of sequences in one row, each with its longest common prefix stored once.

    Rewards come group by group: for pairs chosen, rejected, chosen, ...
    """
    sequences = [ids for group in groups for ids in group]
    members = iter(range(len(sequences)))
    return pack(
        sequences,
        [Group(shared_prefix(group), tuple(itertools.islice(members, len(group))))
         for group in groups],
    )  # fmt: skip


def pack_alone(sequences: Sequence[Ids], *, skip_id: int | None = None) -> PackedRow:
    """A row in which nothing is shared: each sequence is a group of its own."""
    return pack(sequences, [Group(0, (i,)) for i in range(len(sequences))], skip_id=skip_id)


def pooled_position(ids: Ids, skip_id: int | None = None) -> int:
    """Index of the token whose hidden state becomes the reward of `ids`."""
    last = len(ids) - 1
    while skip_id is not None and last > 0 and ids[last] == skip_id:
        last -= 1
    return last


def common_prefix(one: Ids, other: Ids) -> int:
    """How many tokens two sequences begin with in common."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    low, high = 0, shorter  # one[:low] agrees; one[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low


def shared_prefix(group: Sequence[Ids]) -> int:
    """How many tokens all sequences of a group begin with in common; 0 for a sequence alone."""
    return min((common_prefix(group[0], other) for other in group[1:]), default=0)


def _pooled_layout(segments: Sequence[Segment], pooled: Sequence[int]) -> Layout:
    """The segments of the pooled positions alone, each position once, in the row's order."""
    ends = sorted(set(pooled))
    asked, index = [], 0
    for place in ends:
        while segments[index].query_end <= place:
            index += 1
        whole = segments[index]
        asked.append(whole._replace(query_start=place, query_end=place + 1, own_end=place + 1))
    return Layout(tuple(asked))


# ---------------------------------------------------------------- scoring


def group_by_prefix(sequences: Sequence[Ids], splits: Mapping[int, int]) -> list[Group]:
    """Those of `sequences` that `splits` names, together where they are equal up to their split.

    `splits[i]` must follow from sequence `i` alone (`Rendering.split`).
    """
    groups: dict[tuple[int, ...] | int, list[int]] = {}
    alike: dict[tuple[int, ...], int] = {}
    for index, split in splits.items():
        ids = sequences[index]
        if split:
            key: tuple[int, ...] | int = tuple(ids[:split])
        else:  # equal sequences are still computed once
            key = alike.setdefault(tuple(ids), index)
        groups.setdefault(key, []).append(index)
    return [Group(splits[members[0]], tuple(members)) for members in groups.values()]


def fill_rows(
    groups: Sequence[Group], lengths: Sequence[int], *, max_tokens: int, max_sequences: int
) -> list[list[Group]]:
    """Groups in rows of at most `max_tokens` tokens, prefixes counted once.

    Best fit, longest first. A group over a limit is cut, and its prefix stands in each part; a
    sequence over the budget goes alone.
    """
    parts = [part for group in groups for part in _cut(group, lengths, max_tokens, max_sequences)]
    costs = [_tokens_of(part, lengths) for part in parts]
    rows: list[list[Group]] = []
    room: list[tuple[int, int]] = []  # tokens and sequences that still fit
    for index in sorted(range(len(parts)), key=lambda i: (-costs[i], i)):
        part, cost = parts[index], costs[index]
        count = len(part.members)
        fits = [r for r, (tokens, seats) in enumerate(room) if tokens >= cost and seats >= count]
        if fits:
            row = min(fits, key=lambda r: room[r])
        else:
            row = len(rows)
            rows.append([])
            room.append((max_tokens, max_sequences))
        rows[row].append(part)
        room[row] = (room[row][0] - cost, room[row][1] - count)
    return rows


def fill_batches(
    lengths: Mapping[int, int], *, max_tokens: int, max_sequences: int
) -> list[list[Group]]:
    """The same for a model that pads: sequences of like length, padding counted.

    `lengths` is by index.
    """
    batches: list[list[Group]] = []
    current: list[Group] = []
    longest = 0
    for index in sorted(lengths, key=lambda i: (-lengths[i], i)):
        longest = longest if current else lengths[index]
        full = longest * (len(current) + 1) > max_tokens or len(current) == max_sequences
        if current and full:
            batches.append(current)
            current, longest = [], lengths[index]
        current.append(Group(0, (index,)))
    return [*batches, current] if current else batches


def _tokens_of(group: Group, lengths: Sequence[int]) -> int:
    """Tokens of a group in a row; equal members are counted each, for they are not known here."""
    return group.split + sum(lengths[i] - group.split for i in group.members)


def _cut(
    group: Group, lengths: Sequence[int], max_tokens: int, max_sequences: int
) -> Iterator[Group]:
    part: list[int] = []
    tokens = group.split
    for member in group.members:
        own = lengths[member] - group.split
        if part and (tokens + own > max_tokens or len(part) == max_sequences):
            yield Group(group.split, tuple(part))
            part, tokens = [], group.split
        part.append(member)
        tokens += own
    yield Group(group.split, tuple(part))


# ---------------------------------------------------------------- training


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
    mixture: tuple[tuple[int, float], ...] = ()
    """Pairs and weight of each source, in the order of the pairs; empty: all weigh 1.

    An epoch trains each pair of a source `weight` times: with 0.5 half of them, and the others in
    the next epoch. After any number of epochs no pair of a source is more than one time ahead.
    """

    @property
    def pairs_per_epoch(self) -> int:
        if not self.mixture:
            return self.num_pairs
        return sum(_rounds(count, weight) for count, weight in self.mixture)

    @property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.pairs_per_epoch, self.global_batch)
        return whole if self.drop_last or not rest else whole + 1

    def order(self, epoch: int) -> NDArray[numpy.int64]:
        """Indices of the pairs in the order in which `epoch` trains them. [pairs_per_epoch]"""
        pairs = self._mixed(epoch) if self.mixture else None
        if not self.shuffle:
            return numpy.arange(self.num_pairs) if pairs is None else pairs
        order = _permutation(self.pairs_per_epoch, self.seed + epoch)
        return order if pairs is None else pairs[order]

    def steps(self, first: int, total: int) -> Iterator[tuple[int, list[int]]]:
        """(step, indices of its global batch) for every step from `first` up to `total`.

        To begin in the middle costs no more than to begin an epoch.
        """
        order = None
        for step in range(first, total):
            epoch, inside = divmod(step, self.steps_per_epoch)
            if order is None or inside == 0:
                order = self.order(epoch)
            start = inside * self.global_batch
            yield step, order[start : start + self.global_batch].tolist()

    def _mixed(self, epoch: int) -> NDArray[numpy.int64]:
        """The pairs of an epoch, source by source, each as often as its weight says."""
        parts = []
        start = 0
        for count, weight in self.mixture:
            times, rest = divmod(_rounds(count, weight), count)
            parts += times * [numpy.arange(start, start + count)]
            if rest:  # a window that moves over a fixed permutation, epoch by epoch
                window = (epoch * rest + numpy.arange(rest)) % count
                parts.append(start + numpy.sort(_permutation(count, self.seed)[window]))
            start += count
        return numpy.concatenate(parts)


def _rounds(count: int, weight: float) -> int:
    """How many pairs of a source of `count` an epoch trains: at least one."""
    return max(1, round(count * weight))


def _permutation(count: int, seed: int) -> NDArray[numpy.int64]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator).numpy()


def deal(
    indices: Sequence[int],
    costs: Sequence[int] | Mapping[int, int],
    *,
    num_ranks: int,
    max_tokens: int,
) -> list[list[list[int]]]:
    """Deal a global batch to ranks and rows: `result[rank][row]` lists indices of pairs.

    `costs[i]` is the tokens of pair `i` in a row. As few rows a rank as the budget allows, all of
    like cost; a pair over the budget goes alone. Every rank gets the same number of rows: unequal
    counts abort ZeRO-2 and 3, or hang them. A row may be empty where there are fewer pairs.
    """
    by_cost = sorted(indices, key=lambda i: (-costs[i], i))
    alone = [[i] for i in by_cost if costs[i] > max_tokens]
    others = by_cost[len(alone) :]
    needed = len(alone) + -(-sum(costs[i] for i in others) // max_tokens)
    num_rows = max(1, -(-needed // num_ranks)) * num_ranks
    while True:
        rows = _spread(others, costs, num_rows - len(alone)) if others else []
        if all(sum(costs[i] for i in row) <= max_tokens for row in rows):
            break
        num_rows += num_ranks
    rows += alone
    rows += [[] for _ in range(num_rows - len(rows))]
    rows.sort(key=lambda row: -sum(costs[i] for i in row))
    # Boustrophedon: the rank that got the fullest row of one lap gets the emptiest of the next.
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for place, row in enumerate(rows):
        lap, turn = divmod(place, num_ranks)
        plan[turn if lap % 2 == 0 else num_ranks - 1 - turn].append(row)
    return plan


def deal_batches(
    indices: Sequence[int],
    lengths: Sequence[int] | Mapping[int, int],
    *,
    num_ranks: int,
    per_forward: int,
) -> list[list[list[int]]]:
    """The same for a model that pads: `per_forward` pairs of like length share a forward.

    `lengths[i]` is the longer side of pair `i` in tokens.
    """
    by_length = sorted(indices, key=lambda i: (-lengths[i], i))
    width = num_ranks * per_forward
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    for start in range(0, len(by_length), width):
        forwards: list[list[int]] = [[] for _ in range(num_ranks)]
        for place, index in enumerate(by_length[start : start + width]):
            lap, turn = divmod(place, num_ranks)
            forwards[turn if lap % 2 == 0 else num_ranks - 1 - turn].append(index)
        for rank, forward in enumerate(forwards):
            plan[rank].append(forward)
    return plan


def _spread(
    by_cost: Sequence[int], costs: Sequence[int] | Mapping[int, int], num_rows: int
) -> list[list[int]]:
    """Each index to the emptiest row so far (longest processing time first)."""
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    loads = [(0, row) for row in range(num_rows)]
    for index in by_cost:
        load, row = loads[0]
        rows[row].append(index)
        heapq.heapreplace(loads, (load + costs[index], row))
    return rows
