"""Plans and padding: every pair once, the order TRL's, the pooled token transformers'."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raywards.packing import TrainPlan, deal, fill, pad, pooled_position

PAD = 3

sequences = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6)
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=60)
seeds = st.integers(0, 2**32)
quick = settings(max_examples=60, deadline=None)


# ---------------------------------------------------------------- pad


@quick
@given(sequences)
def test_padding_keeps_every_token_and_marks_the_rest(rows: list[list[int]]) -> None:
    batch = pad(rows, PAD)
    width = max(map(len, rows))
    assert batch.input_ids.shape == batch.attention_mask.shape == (len(rows), width)
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.pooled.dtype == torch.int64
    for i, ids in enumerate(rows):
        assert batch.input_ids[i].tolist() == ids + [PAD] * (width - len(ids))
        assert batch.attention_mask[i].tolist() == [1] * len(ids) + [0] * (width - len(ids))
        assert batch.pooled[i] == len(ids) - 1


@quick
@given(sequences)
def test_with_a_skipped_id_the_pooled_token_is_that_of_transformers(rows: list[list[int]]) -> None:
    batch = pad(rows, PAD, skip_id=PAD)
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
    batch = pad(rows, PAD, skip_id=PAD)
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
    assert TrainPlan(num_pairs, 4, seed).order(epoch) == list(sampler)


def test_orders_of_two_seeds_and_of_two_epochs_differ() -> None:
    plan = TrainPlan(100, 8, seed=1)
    assert plan.order(0) != plan.order(1)
    assert plan.order(0) != TrainPlan(100, 8, seed=7).order(0)
    assert TrainPlan(100, 8, seed=1, shuffle=False).order(3) == list(range(100))


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
        assert seen == plan.order(epoch)[: len(seen)]
        assert all(len(batch) == plan.global_batch for batch in steps[:-1])
        left_out = plan.num_pairs - len(seen)
        if plan.drop_last:
            assert len(steps[-1]) == plan.global_batch
            assert left_out == plan.num_pairs % plan.global_batch
        else:
            assert left_out == 0


def test_dropping_the_last_batch_leaves_the_remainder_out() -> None:
    assert TrainPlan(10, 4, seed=0, drop_last=True).steps_per_epoch == 2
    assert TrainPlan(10, 4, seed=0).steps_per_epoch == 3
    assert TrainPlan(3, 4, seed=0, drop_last=True).steps_per_epoch == 0


# ---------------------------------------------------------------- deal


@quick
@given(lengths, st.integers(1, 5), st.integers(1, 6), st.data())
def test_dealing_gives_every_rank_the_same_number_of_forwards_and_every_pair_once(
    of_pairs: list[int], num_ranks: int, per_forward: int, data: st.DataObject
) -> None:
    batch = data.draw(st.lists(st.sampled_from(range(len(of_pairs))), unique=True))
    plan = deal(batch, of_pairs, num_ranks=num_ranks, per_forward=per_forward)
    assert len(plan) == num_ranks
    assert len({len(forwards) for forwards in plan}) == 1
    assert len(plan[0]) == math.ceil(len(batch) / (num_ranks * per_forward))
    dealt = [i for forwards in plan for forward in forwards for i in forward]
    assert sorted(dealt) == sorted(batch)
    assert all(len(forward) <= per_forward for forwards in plan for forward in forwards)


@quick
@given(lengths, st.integers(1, 4), st.integers(1, 6))
def test_the_order_of_a_batch_does_not_change_how_it_is_dealt(
    of_pairs: list[int], num_ranks: int, per_forward: int
) -> None:
    indices = list(range(len(of_pairs)))
    there, back = (
        deal(order, of_pairs, num_ranks=num_ranks, per_forward=per_forward)
        for order in (indices, indices[::-1])
    )
    assert there == back


def test_forwards_at_one_position_are_alike_and_ranks_carry_alike() -> None:
    of_pairs = [100, 10, 90, 20, 80, 30, 70, 40]
    plan = deal(range(8), of_pairs, num_ranks=2, per_forward=2)
    longest = [[max(of_pairs[i] for i in forward) for forward in forwards] for forwards in plan]
    assert longest == [[100, 40], [90, 30]]
    tokens = [sum(of_pairs[i] for forward in forwards for i in forward) for forwards in plan]
    assert tokens == [220, 220]


def test_a_batch_smaller_than_the_ranks_leaves_empty_forwards() -> None:
    assert deal([5, 2], [1] * 6, num_ranks=4, per_forward=3) == [[[2]], [[5]], [[]], [[]]]
    assert deal([], [1], num_ranks=2, per_forward=3) == [[], []]


# ---------------------------------------------------------------- fill


@quick
@given(lengths, st.integers(1, 100), st.integers(1, 8))
def test_filling_keeps_the_budget_and_every_sequence(
    of_sequences: list[int], max_tokens: int, max_sequences: int
) -> None:
    forwards = fill(of_sequences, max_tokens=max_tokens, max_sequences=max_sequences)
    assert sorted(itertools.chain.from_iterable(forwards)) == list(range(len(of_sequences)))
    for forward in forwards:
        padded = max(of_sequences[i] for i in forward) * len(forward)
        assert len(forward) <= max_sequences
        assert padded <= max_tokens or len(forward) == 1


def test_filling_uses_the_budget_and_leaves_an_oversized_sequence_alone() -> None:
    assert fill([4, 50, 4, 4], max_tokens=12, max_sequences=9) == [[1], [0, 2, 3]]
    assert fill([4, 4, 4, 4], max_tokens=99, max_sequences=3) == [[0, 1, 2], [3]]
    assert fill([], max_tokens=9, max_sequences=3) == []


@pytest.mark.parametrize("per_forward", [1, 3])
def test_one_rank_is_dealt_the_whole_batch_longest_first(per_forward: int) -> None:
    [forwards] = deal([0, 1, 2, 3], [5, 9, 7, 9], num_ranks=1, per_forward=per_forward)
    assert list(itertools.chain.from_iterable(forwards)) == [1, 3, 2, 0]
