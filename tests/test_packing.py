"""Rows and plans: what is packed is found again, every pair once, the order TRL's."""

from __future__ import annotations

import itertools
import math
import pickle
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from packed_rows import EDGES, Grouped, grouped, members_in_order, path_of, seen_by

from raywards.packing import (
    Group,
    PackedRow,
    TrainPlan,
    common_prefix,
    deal,
    deal_batches,
    fill_batches,
    fill_rows,
    group_by_prefix,
    pack,
    pack_alone,
    pack_groups,
    pooled_position,
    shared_prefix,
)

PAD = 3

sequences = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)
quick = settings(max_examples=60, deadline=None)


def with_edges(test):  # type: ignore[no-untyped-def]
    """Any sequences and groups, and by name the ones on which packing could go wrong."""
    for edge in EDGES:
        test = example(edge)(test)
    return quick(given(grouped())(test))


def ids_at(row: PackedRow, places: Sequence[int]) -> list[int]:
    ids: list[int] = row.input_ids[list(places)].tolist()
    return ids


# ---------------------------------------------------------------- rows


@with_edges
def test_unpacking_a_row_gives_back_exactly_its_sequences(case: Grouped) -> None:
    given_ids, groups = case
    row = pack(given_ids, groups)
    order = members_in_order(groups)
    assert len(row.owners) == len(row.pooled) == len(order)
    for index, member in enumerate(order):
        assert ids_at(row, path_of(row, index)) == given_ids[member]
        seen = seen_by(row.layout, int(row.pooled[index]))
        assert seen == path_of(row, index)


@with_edges
def test_a_token_sees_what_stands_before_it_in_its_sequence_and_nothing_else(case: Grouped) -> None:
    given_ids, groups = case
    row = pack(given_ids, groups)
    met = set()
    for index in range(len(row.owners)):
        path = path_of(row, index)
        assert row.positions[path].tolist() == list(range(len(path)))
        for length, place in enumerate(path, start=1):
            assert seen_by(row.layout, place) == path[:length]
        met.update(path)
    # A prefix that no member ends in is still on somebody's path: every token was looked at.
    assert met == set(range(len(row.input_ids)))


@with_edges
def test_segments_are_disjoint_in_the_rows_order_and_cover_it(case: Grouped) -> None:
    row = pack(*case)
    end = 0
    for segment in row.layout.segments:
        assert segment.query_start == end
        assert segment.query_end > end, "an empty segment"
        assert segment.own_start == segment.query_start
        assert segment.own_end == segment.query_end
        assert segment.prefix_end <= segment.query_start
        end = segment.query_end
    assert end == len(row.input_ids) == len(row.positions)
    assert row.layout.longest_path == max(map(len, case[0]))


@with_edges
def test_a_prefix_and_each_distinct_branch_are_stored_once(case: Grouped) -> None:
    given_ids, groups = case
    expected = sum(
        split + sum(map(len, {tuple(given_ids[i][split:]) for i in members}))
        for split, members in groups
    )
    assert len(pack(given_ids, groups).input_ids) == expected


@with_edges
def test_the_pooled_layout_is_the_whole_one_at_pooled_places(case: Grouped) -> None:
    row = pack(*case)
    pooled = row.layout.pooled
    assert pooled is not None
    assert pooled.pooled is None
    asked = [segment.query_start for segment in pooled.segments]
    assert asked == sorted(set(row.pooled.tolist()))
    for place in range(len(row.input_ids)):
        expected = seen_by(row.layout, place) if place in asked else None
        assert seen_by(pooled, place) == expected


@with_edges
def test_with_a_skipped_id_the_pooled_place_is_that_of_the_sequence(case: Grouped) -> None:
    given_ids, groups = case
    row = pack(given_ids, groups, skip_id=PAD)
    for index, member in enumerate(members_in_order(groups)):
        place = pooled_position(given_ids[member], PAD)
        path = path_of(row, index)
        assert ids_at(row, path) == given_ids[member]  # skipping pools elsewhere and drops nothing
        assert row.pooled[index] == path[place]
        for layout in (row.layout, row.layout.pooled):
            assert layout is not None
            assert seen_by(layout, path[place]) == path[: place + 1]


def test_a_skipped_id_may_send_the_pooled_place_into_the_shared_prefix() -> None:
    both = [[5, 6, PAD, PAD], [5, 6, PAD, 7]]
    row = pack(both, [Group(3, (0, 1))], skip_id=PAD)
    assert row.input_ids.tolist() == [5, 6, PAD, PAD, 7]
    assert row.pooled.tolist() == [1, 4]
    assert row.owners == (1, 2)
    assert pack(both, [Group(3, (0, 1))]).pooled.tolist() == [3, 4]
    assert row.padded(0).pooled.tolist() == [1, 3]


@quick
@given(grouped(), st.sampled_from([None, PAD]))
def test_a_row_can_be_padded_into_plain_sequences(case: Grouped, skip_id: int | None) -> None:
    given_ids, groups = case
    batch = pack(given_ids, groups, skip_id=skip_id).padded(9)
    rows = [given_ids[i] for i in members_in_order(groups)]
    width = max(map(len, rows))
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.pooled.dtype == torch.int64
    assert batch.input_ids.tolist() == [ids + [9] * (width - len(ids)) for ids in rows]
    assert batch.attention_mask.tolist() == [
        [1] * len(ids) + [0] * (width - len(ids)) for ids in rows
    ]
    assert batch.pooled.tolist() == [pooled_position(ids, skip_id) for ids in rows]


def test_the_drawn_cases_hold_what_the_tests_above_are_about() -> None:
    """Guards the generator: prefixes, none, equal branches, empty ones, several groups."""
    met: set[str] = set()

    @settings(max_examples=200, deadline=None, derandomize=True, database=None)
    @given(grouped())
    def look(case: Grouped) -> None:
        given_ids, groups = case
        for split, members in groups:
            branches = [tuple(given_ids[i][split:]) for i in members]
            met.add("prefix" if split else "no prefix")
            met.update(["equal"] if len(set(branches)) < len(branches) else [])
            met.update(["empty"] if () in branches else [])
            met.update(["n-way"] if len(set(branches)) > 2 else [])
        met.update(["several"] if len(groups) > 1 else [])

    look()
    assert met == {"prefix", "no prefix", "equal", "empty", "n-way", "several"}


@quick
@given(st.lists(st.tuples(*[st.lists(st.integers(0, 2), min_size=1, max_size=9)] * 2), min_size=1))
def test_pairs_share_their_longest_common_prefix(pairs: list[tuple[list[int], list[int]]]) -> None:
    row = pack_groups(pairs)
    assert [ids_at(row, path_of(row, i)) for i in range(len(row.owners))] == [
        side for pair in pairs for side in pair
    ]
    assert len(row.input_ids) == sum(
        len(one) + len(other) - naive_common_prefix(one, other) for one, other in pairs
    )


@quick
@given(
    st.lists(
        st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=4),
        min_size=1,
        max_size=4,
    )
)
def test_groups_share_what_all_of_their_sequences_have_in_common(
    groups: list[list[list[int]]],
) -> None:
    row = pack_groups(groups)
    flat = [ids for group in groups for ids in group]
    assert [ids_at(row, path_of(row, i)) for i in range(len(row.owners))] == flat
    shared = [
        0 if len(group) == 1 else min(naive_common_prefix(a, b) for a in group for b in group)
        for group in groups
    ]
    assert [shared_prefix(group) for group in groups] == shared
    different = [len(set(map(tuple, group))) == len(group) for group in groups]
    for group, prefix, counted in zip(groups, shared, different, strict=True):
        tokens = sum(map(len, group)) - (len(group) - 1) * prefix
        if counted:  # equal sequences, which no row has, are stored once
            assert len(pack_groups([group]).input_ids) == tokens


@quick
@given(sequences)
def test_alone_nothing_is_shared(rows: list[list[int]]) -> None:
    row = pack_alone(rows)
    assert row.input_ids.tolist() == list(itertools.chain.from_iterable(rows))
    assert row.pooled.tolist() == [end - 1 for end in itertools.accumulate(map(len, rows))]
    assert all(segment.prefix_start == segment.prefix_end for segment in row.layout.segments)


def test_a_layout_can_be_compared_hashed_and_pickled() -> None:
    row, again = (pack_groups([[[1, 2, 3], [1, 4]]]) for _ in range(2))
    assert row.layout == again.layout
    assert hash(row.layout) == hash(again.layout)
    assert pickle.loads(pickle.dumps(row.layout)) == row.layout
    assert row.layout != pack_groups([[[1, 2, 3], [1, 2]]]).layout
    assert row.layout != replace(row.layout, pooled=None)


def test_a_row_moves_to_a_device_with_its_tensors_and_keeps_its_layout() -> None:
    row = pack_groups([[[1, 2, 3], [1, 4]]])
    moved = row.to(torch.device("meta"))
    for tensor in (moved.input_ids, moved.positions, moved.pooled):
        assert tensor.device.type == "meta"
    assert moved.layout is row.layout
    assert row.input_ids.device.type == "cpu"


# ---------------------------------------------------------------- pooling


@quick
@given(sequences)
def test_with_a_skipped_id_the_pooled_token_is_that_of_transformers(rows: list[list[int]]) -> None:
    batch = pack_alone(rows, skip_id=PAD).padded(PAD)
    # transformers/modeling_layers.py, GenericForSequenceClassification.forward
    non_pad = (batch.input_ids != PAD).to(torch.int32)
    theirs = (torch.arange(batch.input_ids.shape[-1], dtype=torch.int32) * non_pad).argmax(-1)
    assert batch.pooled.tolist() == theirs.tolist()


def test_the_copied_rule_is_what_transformers_does() -> None:
    from transformers import Qwen2Config, Qwen2ForSequenceClassification

    config = Qwen2Config(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, intermediate_size=8, num_labels=1, pad_token_id=PAD,
    )  # fmt: skip
    model = Qwen2ForSequenceClassification(config).eval()
    rows = [[1, 2, PAD, PAD], [4, PAD, 5], [6], [PAD, PAD, PAD]]
    batch = pack_alone(rows, skip_id=PAD).padded(PAD)
    with torch.inference_mode():
        theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        hidden = model.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        every_position = model.score(hidden)[:, :, 0]
    assert batch.pooled.tolist() == [1, 2, 0, 0]
    ours = every_position[torch.arange(len(rows)), batch.pooled]
    torch.testing.assert_close(ours, theirs)
    assert every_position[0].unique().numel() > 1  # another position would show


def test_a_sequence_of_pad_tokens_alone_pools_its_first() -> None:
    assert pooled_position([PAD, PAD], PAD) == 0
    assert pooled_position([PAD, PAD]) == 1


# ---------------------------------------------------------------- common_prefix, group_by_prefix


def naive_common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


@quick
@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.lists(st.integers(0, 1), max_size=9),
    st.lists(st.integers(0, 1), max_size=9),
)
@example([], [], [])
@example([1] * 40, [0], [1])
@example([1] * 40, [], [1])
def test_the_common_prefix_is_the_one_found_token_by_token(
    prefix: list[int], one: list[int], other: list[int]
) -> None:
    found = common_prefix(prefix + one, prefix + other)
    assert found == naive_common_prefix(prefix + one, prefix + other) >= len(prefix)
    assert found == common_prefix(prefix + other, prefix + one)


prefixed = st.lists(
    st.lists(st.integers(0, 1), min_size=1, max_size=5).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))
    ),
    max_size=12,
)


def partition(parted: list[tuple[list[int], int]]) -> list[Group]:
    splits = {index: split for index, (_, split) in enumerate(parted)}
    return group_by_prefix([ids for ids, _ in parted], splits)


@quick
@given(prefixed)
@example([([1, 0], 0), ([1, 0], 1), ([1, 1], 1), ([1, 0], 0), ([1], 0), ([1], 1)])
def test_sequences_are_grouped_by_their_split_and_what_stands_before_it(
    parted: list[tuple[list[int], int]],
) -> None:
    groups = partition(parted)
    order = members_in_order(groups)
    assert sorted(order) == list(range(len(parted)))
    assert [group.members[0] for group in groups] == sorted(group.members[0] for group in groups)
    home = {member: at for at, group in enumerate(groups) for member in group.members}
    for group in groups:
        assert {parted[i][1] for i in group.members} == {group.split}
    for i, j in itertools.combinations(range(len(parted)), 2):
        (one, split), (other, other_split) = parted[i], parted[j]
        # Without a split nothing is shared, but equal sequences are still computed once.
        alike = one[:split] == other[:other_split] if split else one == other
        assert (home[i] == home[j]) == (split == other_split and alike)


@quick
@given(prefixed.filter(bool), st.data())
def test_who_else_is_there_and_in_which_order_decides_about_no_group(
    parted: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    kept = data.draw(st.permutations(range(len(parted))))[: data.draw(st.integers(1, len(parted)))]

    def together(indices: Sequence[int]) -> set[frozenset[int]]:
        groups = partition([parted[i] for i in indices])
        return {frozenset(indices[member] for member in group.members) for group in groups}

    whole = together(range(len(parted)))
    assert together(kept) == {group & set(kept) for group in whole} - {frozenset()}


@quick
@given(prefixed.filter(bool), st.data())
def test_only_the_sequences_that_have_a_split_are_grouped(
    parted: list[tuple[list[int], int]], data: st.DataObject
) -> None:
    kept = sorted(data.draw(st.sets(st.sampled_from(range(len(parted))))))
    ids = [ids for ids, _ in parted]
    groups = group_by_prefix(ids, {index: parted[index][1] for index in kept})
    assert sorted(members_in_order(groups)) == kept
    named = partition([parted[index] for index in kept])
    assert groups == [Group(split, tuple(kept[i] for i in group)) for split, group in named]


# ---------------------------------------------------------------- fill_rows


@st.composite
def groups_and_lengths(draw: st.DrawFn) -> tuple[list[Group], list[int]]:
    groups, of_sequences = [], []
    for _ in range(draw(st.integers(0, 12))):
        split = draw(st.sampled_from([0, 0, 3, 10, 30]))
        own = draw(st.lists(st.integers(0 if split else 1, 25), min_size=1, max_size=7))
        first = len(of_sequences)
        groups.append(Group(split, tuple(range(first, first + len(own)))))
        of_sequences += [split + count for count in own]
    return groups, of_sequences


def tokens_of(groups: Sequence[Group], of_sequences: Sequence[int]) -> int:
    return sum(split + sum(of_sequences[i] - split for i in members) for split, members in groups)


@quick
@given(groups_and_lengths(), st.integers(1, 90), st.integers(1, 8))
def test_rows_hold_every_sequence_once_and_keep_the_limits(
    case: tuple[list[Group], list[int]], max_tokens: int, max_sequences: int
) -> None:
    groups, of_sequences = case
    rows = fill_rows(groups, of_sequences, max_tokens=max_tokens, max_sequences=max_sequences)
    parts = [part for row in rows for part in row]
    assert sorted(members_in_order(parts)) == list(range(len(of_sequences)))
    for row in rows:
        count = sum(len(part.members) for part in row)
        assert count <= max_sequences
        assert tokens_of(row, of_sequences) <= max_tokens or count == 1
    home = {member: group for group in groups for member in group.members}
    for part in parts:
        assert {home[i] for i in part.members} == {home[part.members[0]]}
        assert part.split == home[part.members[0]].split
    for group in groups:
        if tokens_of([group], of_sequences) <= max_tokens and len(group.members) <= max_sequences:
            assert group in parts, "a group that fits was cut"


def test_a_group_over_the_budget_is_cut_and_its_prefix_stands_in_each_part() -> None:
    group = Group(10, (0, 1, 2, 3, 4))
    of_sequences = [14, 14, 14, 14, 30]
    rows = fill_rows([group], of_sequences, max_tokens=20, max_sequences=9)
    # Two branches of 4 beside a prefix of 10; the last member is over the budget and goes alone.
    assert sorted(rows) == [[Group(10, (0, 1))], [Group(10, (2, 3))], [Group(10, (4,))]]
    ids = [[*range(10), *[20 + i] * (n - 10)] for i, n in enumerate(of_sequences)]
    for row in rows:
        packed = pack(ids, row)
        assert packed.input_ids[:10].tolist() == list(range(10))
        assert len(packed.input_ids) == tokens_of(row, of_sequences)
    assert fill_rows([group], of_sequences, max_tokens=99, max_sequences=2) == [
        [Group(10, (4,))],
        [Group(10, (0, 1))],
        [Group(10, (2, 3))],
    ]
    assert fill_rows([], [], max_tokens=9, max_sequences=9) == []


def lognormal(count: int, mean: float, seed: int) -> list[int]:
    """Lengths as those of HH-RLHF: a few sequences are many times as long as the usual one."""
    dice = random.Random(seed)
    spread = 0.8
    mu = math.log(mean) - spread**2 / 2
    return [max(1, round(dice.lognormvariate(mu, spread))) for _ in range(count)]


@pytest.mark.parametrize(("count", "responses"), [(2000, 1), (500, 4), (300, 1)])
def test_rows_are_nineteen_twentieths_full_on_realistic_lengths(count: int, responses: int) -> None:
    """Lognormal lengths of mean 170 and a budget of 8,192 tokens, the last row counted."""
    of_sequences = lognormal(count * responses, 170, seed=1)
    groups = [Group(0, (i,)) for i in range(count)]
    if responses > 1:
        prompts = lognormal(count, 100, seed=2)
        of_sequences = [n + prompts[i // responses] for i, n in enumerate(of_sequences)]
        groups = [
            Group(prompts[i], tuple(range(i * responses, (i + 1) * responses)))
            for i in range(count)
        ]
    rows = fill_rows(groups, of_sequences, max_tokens=8192, max_sequences=10**9)
    total = sum(tokens_of(row, of_sequences) for row in rows)
    assert total == tokens_of(groups, of_sequences)
    full = total / (8192 * len(rows))
    # What the last row lacks is nobody's fault: of 7 rows it could be a seventh.
    assert full >= 0.95 or len(rows) == math.ceil(total / 8192)
    assert max(of_sequences) > 5 * 170, "all are alike: filling is easy"
    assert sum(tokens_of(row, of_sequences) >= 0.95 * 8192 for row in rows) >= len(rows) - 1


def test_a_group_goes_where_it_leaves_least_room() -> None:
    rows = fill_rows(
        [Group(0, (i,)) for i in range(4)], [12, 10, 9, 1], max_tokens=20, max_sequences=9
    )
    assert [members_in_order(row) for row in rows] == [[0], [1, 2, 3]]


@quick
@given(groups_and_lengths(), st.integers(30, 90))
def test_no_two_rows_could_have_been_one(
    case: tuple[list[Group], list[int]], max_tokens: int
) -> None:
    groups, of_sequences = case
    rows = fill_rows(groups, of_sequences, max_tokens=max_tokens, max_sequences=10**9)
    costs = sorted(tokens_of(row, of_sequences) for row in rows)
    assert len(costs) < 2 or costs[0] + costs[1] > max_tokens


# ---------------------------------------------------------------- fill_batches


@quick
@given(lengths, st.integers(1, 100), st.integers(1, 8))
def test_batches_keep_the_budget_with_their_padding_and_hold_every_sequence(
    of_sequences: list[int], max_tokens: int, max_sequences: int
) -> None:
    batches = fill_batches(
        dict(enumerate(of_sequences)), max_tokens=max_tokens, max_sequences=max_sequences
    )
    flat = [group for batch in batches for group in batch]
    assert sorted(members_in_order(flat)) == list(range(len(of_sequences)))
    assert all(group.split == 0 and len(group.members) == 1 for group in flat)
    for batch in batches:
        padded = max(of_sequences[i] for i in members_in_order(batch)) * len(batch)
        assert len(batch) <= max_sequences
        assert padded <= max_tokens or len(batch) == 1


def test_batches_use_the_budget_and_leave_an_oversized_sequence_alone() -> None:
    def members(of_sequences: list[int], **limits: int) -> list[list[int]]:
        return [
            members_in_order(batch)
            for batch in fill_batches(dict(enumerate(of_sequences)), **limits)
        ]

    assert members([4, 50, 4, 4], max_tokens=12, max_sequences=9) == [[1], [0, 2, 3]]
    assert members([4, 4, 4, 4], max_tokens=99, max_sequences=3) == [[0, 1, 2], [3]]
    assert members([], max_tokens=9, max_sequences=3) == []


# ---------------------------------------------------------------- TrainPlan

plans = st.builds(
    TrainPlan,
    num_pairs=st.integers(1, 50),
    global_batch=st.integers(1, 12),
    seed=st.integers(0, 2**31),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
).filter(lambda plan: plan.steps_per_epoch > 0)


@quick
@given(plans, st.integers(0, 5))
def test_an_epoch_is_a_permutation_of_the_pairs(plan: TrainPlan, epoch: int) -> None:
    assert sorted(plan.order(epoch)) == list(range(plan.num_pairs))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 200), st.integers(0, 2**31), st.integers(0, 4))
def test_the_order_is_that_of_accelerates_seedable_sampler(
    num_pairs: int, seed: int, epoch: int
) -> None:
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(
        list(range(num_pairs)), data_seed=seed, generator=torch.Generator().manual_seed(0)
    )
    sampler.set_epoch(epoch)
    assert TrainPlan(num_pairs, 4, seed).order(epoch).tolist() == list(sampler)


def test_orders_of_two_seeds_and_of_two_epochs_differ() -> None:
    plan = TrainPlan(100, 8, seed=1)
    assert plan.order(0).tolist() != plan.order(1).tolist()
    assert plan.order(0).tolist() != TrainPlan(100, 8, seed=7).order(0).tolist()
    assert TrainPlan(100, 8, seed=1, shuffle=False).order(3).tolist() == list(range(100))


@quick
@given(plans, st.data())
def test_steps_can_be_taken_up_anywhere(plan: TrainPlan, data: st.DataObject) -> None:
    total = 3 * plan.steps_per_epoch
    first = data.draw(st.integers(0, total))
    whole = list(plan.steps(0, total))
    assert [step for step, _ in whole] == list(range(total))
    assert list(plan.steps(first, total)) == whole[first:]


@quick
@given(plans)
def test_every_pair_is_trained_once_an_epoch_in_full_batches(plan: TrainPlan) -> None:
    count = plan.steps_per_epoch
    for epoch in range(2):
        steps = [batch for _, batch in plan.steps(epoch * count, (epoch + 1) * count)]
        seen = list(itertools.chain.from_iterable(steps))
        assert seen == plan.order(epoch)[: len(seen)].tolist()
        assert all(len(batch) == plan.global_batch for batch in steps[:-1])
        left_out = plan.num_pairs - len(seen)
        if plan.drop_last:
            assert len(steps[-1]) == plan.global_batch
            assert left_out == plan.num_pairs % plan.global_batch
        else:
            assert left_out == 0


@quick
@given(
    st.lists(st.tuples(st.integers(1, 30), st.floats(0.05, 4)), min_size=1, max_size=4),
    st.booleans(),
)
def test_a_mixture_trains_each_pair_as_often_as_its_weight_says(
    mixture: list[tuple[int, float]], shuffle: bool
) -> None:
    num_pairs = sum(count for count, _ in mixture)
    plan = TrainPlan(num_pairs, 4, seed=3, shuffle=shuffle, mixture=tuple(mixture))
    times = numpy.zeros(num_pairs, int)
    for epoch in range(5):
        order = plan.order(epoch)
        assert len(order) == plan.pairs_per_epoch
        times += numpy.bincount(order, minlength=num_pairs)
        start = 0
        for count, weight in mixture:
            drawn = times[start : start + count]
            assert drawn.sum() == (epoch + 1) * max(1, round(count * weight))
            assert drawn.max() - drawn.min() <= 1
            start += count
    assert plan.order(2).tolist() == TrainPlan(**vars(plan)).order(2).tolist()


def test_weights_of_one_change_nothing() -> None:
    plain = TrainPlan(10, 4, seed=1)
    weighed = TrainPlan(10, 4, seed=1, mixture=((3, 1.0), (7, 1.0)))
    assert weighed.order(2).tolist() == plain.order(2).tolist()
    assert list(weighed.steps(1, 6)) == list(plain.steps(1, 6))


def test_half_of_a_source_is_followed_by_its_other_half() -> None:
    plan = TrainPlan(10, 4, seed=1, mixture=((6, 0.5), (4, 2.0)))
    first, second = ([i for i in plan.order(epoch) if i < 6] for epoch in range(2))
    assert sorted([*first, *second]) == list(range(6))
    assert sorted(i for i in plan.order(0) if i >= 6) == [6, 6, 7, 7, 8, 8, 9, 9]


def test_dropping_the_last_batch_leaves_the_remainder_out() -> None:
    assert TrainPlan(10, 4, seed=0, drop_last=True).steps_per_epoch == 2
    assert TrainPlan(10, 4, seed=0).steps_per_epoch == 3
    assert TrainPlan(3, 4, seed=0, drop_last=True).steps_per_epoch == 0


# ---------------------------------------------------------------- deal


@quick
@given(lengths, st.integers(1, 5), st.integers(1, 120), st.data())
def test_dealing_gives_every_rank_the_same_number_of_rows_and_every_pair_once(
    of_pairs: list[int], num_ranks: int, max_tokens: int, data: st.DataObject
) -> None:
    batch = data.draw(st.lists(st.sampled_from(range(len(of_pairs))), unique=True))
    plan = deal(batch, of_pairs, num_ranks=num_ranks, max_tokens=max_tokens)
    assert len(plan) == num_ranks
    assert len({len(rows) for rows in plan}) == 1
    assert len(plan[0]) >= 1  # a step without pairs still is a step: the ranks wait for each other
    dealt = [i for rows in plan for row in rows for i in row]
    assert sorted(dealt) == sorted(batch)
    for row in itertools.chain.from_iterable(plan):
        assert sum(of_pairs[i] for i in row) <= max_tokens or len(row) == 1


@quick
@given(lengths, st.integers(1, 5), st.integers(1, 120))
def test_no_rank_and_no_row_carries_more_than_another_by_more_than_one_pair(
    of_pairs: list[int], num_ranks: int, max_tokens: int
) -> None:
    plan = deal(range(len(of_pairs)), of_pairs, num_ranks=num_ranks, max_tokens=max_tokens)
    rows = [sum(of_pairs[i] for i in row) for row in itertools.chain.from_iterable(plan)]
    ranks = [sum(of_pairs[i] for row in rank for i in row) for rank in plan]
    assert max(rows) - min(rows) <= max(of_pairs)
    assert max(ranks) - min(ranks) <= max(of_pairs)


@pytest.mark.parametrize(("num_pairs", "num_ranks"), [(64, 2), (64, 8), (512, 8)])
def test_on_realistic_lengths_ranks_carry_alike_in_nearly_as_few_rows_as_can_be(
    num_pairs: int, num_ranks: int
) -> None:
    """Pairs of 260 tokens in the mean, lognormal; rows of 4,096."""
    of_pairs = lognormal(num_pairs, 260, seed=3)
    plan = deal(range(num_pairs), of_pairs, num_ranks=num_ranks, max_tokens=4096)
    ranks = [sum(of_pairs[i] for row in rank for i in row) for rank in plan]
    assert max(ranks) <= 1.02 * min(ranks)
    assert max(of_pairs) > 4 * min(ranks) / num_pairs, "all are alike: dealing is easy"
    # One more row a rank than the sum of the tokens asks for, at most.
    assert len(plan[0]) <= math.ceil(sum(of_pairs) / (num_ranks * 4096)) + 1


@quick
@given(lengths, st.integers(1, 4), st.integers(1, 120))
def test_the_order_of_a_batch_does_not_change_how_it_is_dealt(
    of_pairs: list[int], num_ranks: int, max_tokens: int
) -> None:
    indices = list(range(len(of_pairs)))
    there, back = (
        deal(order, of_pairs, num_ranks=num_ranks, max_tokens=max_tokens)
        for order in (indices, indices[::-1])
    )
    assert there == back


def test_fewer_pairs_than_ranks_leave_empty_rows() -> None:
    assert deal([5, 2], [1] * 6, num_ranks=4, max_tokens=9) == [[[2]], [[5]], [[]], [[]]]
    assert deal([], [1], num_ranks=2, max_tokens=9) == [[[]], [[]]]


def test_a_pair_over_the_budget_goes_alone() -> None:
    [rows] = deal(range(4), [50, 3, 3, 3], num_ranks=1, max_tokens=9)
    assert rows == [[0], [1, 2, 3]]
    [rows] = deal(range(3), [500, 400, 300], num_ranks=1, max_tokens=1)
    assert rows == [[0], [1], [2]]  # a row is a forward: none that holds nothing


def test_the_rank_with_the_fullest_row_of_one_lap_gets_the_emptiest_of_the_next() -> None:
    of_pairs = [8, 7, 6, 5, 4, 3, 2, 1]
    plan = deal(range(8), of_pairs, num_ranks=2, max_tokens=1)
    carried = [[of_pairs[i] for row in rows for i in row] for rows in plan]
    assert carried == [[8, 5, 4, 1], [7, 6, 3, 2]]


@pytest.mark.parametrize("max_tokens", [10, 30, 1000])
def test_one_rank_is_dealt_the_fullest_row_first(max_tokens: int) -> None:
    of_pairs = [5, 9, 7, 9]
    [rows] = deal(range(4), of_pairs, num_ranks=1, max_tokens=max_tokens)
    costs = [sum(of_pairs[i] for i in row) for row in rows]
    assert costs == sorted(costs, reverse=True)
    assert len(rows) == {10: 4, 30: 1, 1000: 1}[max_tokens]


# ---------------------------------------------------------------- deal_batches


@quick
@given(lengths, st.integers(1, 5), st.integers(1, 6), st.data())
def test_dealing_batches_gives_every_rank_the_same_number_of_forwards_and_every_pair_once(
    of_pairs: list[int], num_ranks: int, per_forward: int, data: st.DataObject
) -> None:
    batch = data.draw(st.lists(st.sampled_from(range(len(of_pairs))), unique=True))
    plan = deal_batches(batch, of_pairs, num_ranks=num_ranks, per_forward=per_forward)
    assert len(plan) == num_ranks
    assert len({len(forwards) for forwards in plan}) == 1
    assert len(plan[0]) == math.ceil(len(batch) / (num_ranks * per_forward))
    dealt = [i for forwards in plan for forward in forwards for i in forward]
    assert sorted(dealt) == sorted(batch)
    assert all(len(forward) <= per_forward for forwards in plan for forward in forwards)


@quick
@given(lengths, st.integers(1, 4), st.integers(1, 6))
def test_the_order_of_a_batch_does_not_change_which_forwards_it_makes(
    of_pairs: list[int], num_ranks: int, per_forward: int
) -> None:
    indices = list(range(len(of_pairs)))
    there, back = (
        deal_batches(order, of_pairs, num_ranks=num_ranks, per_forward=per_forward)
        for order in (indices, indices[::-1])
    )
    assert there == back


def test_forwards_at_one_position_are_alike_and_ranks_carry_alike() -> None:
    of_pairs = [100, 10, 90, 20, 80, 30, 70, 40]
    plan = deal_batches(range(8), of_pairs, num_ranks=2, per_forward=2)
    longest = [[max(of_pairs[i] for i in forward) for forward in forwards] for forwards in plan]
    assert longest == [[100, 40], [90, 30]]
    tokens = [sum(of_pairs[i] for forward in forwards for i in forward) for forwards in plan]
    assert tokens == [220, 220]


def test_a_batch_smaller_than_the_ranks_leaves_empty_forwards() -> None:
    assert deal_batches([5, 2], [1] * 6, num_ranks=4, per_forward=3) == [[[2]], [[5]], [[]], [[]]]
    assert deal_batches([], [1], num_ranks=2, per_forward=3) == [[], []]


@pytest.mark.parametrize("per_forward", [1, 3])
def test_one_rank_is_dealt_the_whole_batch_longest_first(per_forward: int) -> None:
    [forwards] = deal_batches(range(4), [5, 9, 7, 9], num_ranks=1, per_forward=per_forward)
    assert list(itertools.chain.from_iterable(forwards)) == [1, 3, 2, 0]
