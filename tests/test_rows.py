"""How rows are planned, and how much of a row fits into memory, measured on tiny real models."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from tiny_models import draw_ids, tiny_classifier

from raywards.model import RewardModel
from raywards.packing import pack_alone
from raywards.train import rows
from raywards.train.rows import Fit, Rows, fit_rows, free_bytes, measure_bytes_per_token

pytestmark = pytest.mark.trains

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wrap(family: str = "Qwen2", **config: Any) -> RewardModel:
    return RewardModel(tiny_classifier(family, **config)).eval()


def per_token(model: RewardModel, most_positions: int = 1024) -> int:
    return measure_bytes_per_token(model, CPU, most_positions)


def fit(model: RewardModel, **changes: Any) -> Fit:
    settings: dict[str, Any] = {
        "free_bytes": 1 << 40, "most_tokens": 4096, "longest": 300,
        "checkpointing": None, "max_tokens": None,
    }  # fmt: skip
    return fit_rows(model, model, **{**settings, **changes})


# ---------------------------------------------------------------- bytes of a token


def test_every_layer_adds_what_a_layer_keeps() -> None:
    two, four, six = (per_token(wrap(num_hidden_layers=n)) for n in (2, 4, 6))
    # The last layer keeps less: most of it is computed for the pooled tokens alone.
    assert four - two == pytest.approx(six - four, rel=0.02)
    assert 1.8 < four / two < 3.2


def test_the_measure_is_what_a_longer_row_keeps() -> None:
    """Extrapolated from 192 tokens to 1,000, whose kept tensors are counted here by storage."""
    model = wrap()
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reward = model(pack_alone(draw_ids(1000)))
    of_weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = sum(storage.nbytes() for at, storage in kept.items() if at not in of_weights)
    assert reward.requires_grad
    assert per_token(model) == pytest.approx(found / 1000, rel=0.02)


def test_a_wider_model_keeps_more_and_half_precision_half() -> None:
    one, two, three = (per_token(wrap(intermediate_size=1024 * n)) for n in (1, 2, 3))
    assert three - two == pytest.approx(two - one, rel=0.02)
    assert two - one >= 1024 * 4
    ratio = per_token(wrap()) / per_token(RewardModel(tiny_classifier("Qwen2").bfloat16()).eval())
    assert 1.3 < ratio < 2.1  # norms are computed in fp32


@pytest.mark.parametrize("positions", [3, 64])
def test_a_model_of_few_positions_is_measured_within_them(positions: int) -> None:
    model = wrap("GPT2", max_position_embeddings=positions)
    with pytest.raises(IndexError):
        per_token(model)
    assert per_token(model, positions) > 4 * 32
    assert fit(model, longest=positions).bytes_per_token == per_token(model, positions)


def test_measuring_leaves_no_gradients_and_works_where_they_are_off() -> None:
    model = wrap()
    expected = per_token(model)
    with torch.no_grad():
        assert per_token(model) == expected
    assert all(parameter.grad is None for parameter in model.parameters())


# ---------------------------------------------------------------- what fits


@pytest.mark.parametrize("most_tokens", [4096, 65_536])
def test_with_plenty_of_memory_activations_are_kept_and_rows_are_as_long_as_is_fast(
    most_tokens: int,
) -> None:
    model = wrap()
    assert fit(model, most_tokens=most_tokens) == Fit(True, most_tokens, per_token(model))


def test_activations_are_kept_exactly_as_long_as_the_longest_pair_fits() -> None:
    model = wrap()
    needed = per_token(model) * 300
    assert fit(model, free_bytes=needed).keeps_activations
    assert fit(model, free_bytes=needed).max_tokens == 256  # 300, as a power of two
    assert not fit(model, free_bytes=needed - 1).keeps_activations


def test_with_little_memory_activations_are_recomputed_in_shorter_rows() -> None:
    model = wrap(num_hidden_layers=8)
    free = per_token(model) * 299
    found = fit(model, free_bytes=free)
    assert not found.keeps_activations
    assert found.bytes_per_token < per_token(model) / 2
    assert 256 < found.max_tokens < 4096
    assert found.max_tokens.bit_count() == 1
    assert found.max_tokens * found.bytes_per_token <= free
    assert 2 * found.max_tokens * found.bytes_per_token > free
    less = fit(model, free_bytes=free // 2)
    assert less.max_tokens == found.max_tokens // 2


def test_with_no_memory_at_all_a_row_holds_a_token_and_a_pair_goes_alone() -> None:
    found = fit(wrap(), free_bytes=0)
    assert (found.keeps_activations, found.max_tokens) == (False, 1)


@pytest.mark.parametrize("free", [0, 1 << 40])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_settings_that_are_given_win(free: int, checkpointing: bool) -> None:
    found = fit(wrap(), free_bytes=free, checkpointing=checkpointing, max_tokens=777)
    assert found.keeps_activations == (not checkpointing)
    assert found.max_tokens == 777


def test_rows_that_were_asked_for_decide_whether_activations_are_kept() -> None:
    model = wrap()
    free = per_token(model) * 1000
    assert fit(model, free_bytes=free, max_tokens=1000).keeps_activations
    assert not fit(model, free_bytes=free, max_tokens=1001).keeps_activations
    assert not fit(model, free_bytes=free, max_tokens=10, longest=1001).keeps_activations


def test_the_fit_is_told_in_words() -> None:
    assert Fit(True, 4096, 3 << 20).in_words() == (
        "Rows of up to 4,096 tokens; activations are kept (no gradient checkpointing): "
        "3.00 MiB a token."
    )
    assert "recomputed (gradient checkpointing)" in Fit(False, 8, 1).in_words()


# ---------------------------------------------------------------- plans


def table(lengths: list[int], tokens: list[int]) -> Any:
    """What a plan reads of a `PairTable`."""
    return SimpleNamespace(lengths=numpy.array(lengths), tokens=numpy.array(tokens))


LENGTHS = [10, 60, 8, 51, 9, 50, 7, 10]
TOKENS = [14, 70, 12, 55, 12, 52, 11, 15]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 60, 1000])
def test_a_pair_beyond_the_window_is_alone_in_its_row(num_ranks: int, max_tokens: int) -> None:
    plan = Rows(False, max_tokens, 50).plan(table(LENGTHS, TOKENS), range(8), num_ranks, 4)
    dealt = [row for rank in plan for row in rank]
    assert sorted(i for row in dealt for i in row) == list(range(8))
    assert [1] in dealt
    assert [3] in dealt  # of 51 tokens
    assert len({len(rank) for rank in plan}) == 1


def test_a_pair_of_the_windows_length_shares_its_row() -> None:
    [dealt] = Rows(False, 1000, 50).plan(table(LENGTHS, TOKENS), range(8), 1, 4)
    assert sorted(map(sorted, dealt)) == [[0, 2, 4, 5, 6, 7], [1], [3]]
    [together] = Rows(False, 1000).plan(table(LENGTHS, TOKENS), range(8), 1, 4)
    assert len(together) == 1, "without the window all share a row"


def test_only_the_pairs_of_the_batch_are_planned() -> None:
    [dealt] = Rows(False, 1000, 50).plan(table(LENGTHS, TOKENS), [7, 1, 0], 1, 4)
    assert sorted(map(sorted, dealt)) == [[0, 7], [1]]


def test_packed_rows_keep_the_budget_of_tokens() -> None:
    [dealt] = Rows(False, 60).plan(table(LENGTHS, TOKENS), range(8), 1, 1)
    assert all(sum(TOKENS[i] for i in row) <= 60 or row == [1] for row in dealt)
    assert len(dealt) < 8


@pytest.mark.parametrize("window", [50, math.inf])
def test_a_model_that_pads_takes_as_many_pairs_as_were_asked_for(window: float) -> None:
    plan = Rows(True, 1, window).plan(table(LENGTHS, TOKENS), range(8), 2, 2)
    assert [[len(forward) for forward in rank] for rank in plan] == [[2, 2], [2, 2]]
    assert sorted(i for rank in plan for i in rank[0]) == [0, 1, 3, 5]  # the longest, together


# ---------------------------------------------------------------- free memory


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_free_on_node", lambda: 8_000_000)


@pytest.mark.usefixtures("node")
def test_ranks_share_a_nodes_memory_and_leave_room_for_the_first_step() -> None:
    assert free_bytes(CPU, ranks_on_node=1, num_parameters=0) == 4_800_000
    assert free_bytes(CPU, ranks_on_node=4, num_parameters=0) == 1_200_000
    assert free_bytes(CPU, ranks_on_node=4, num_parameters=1000) == 1_188_000


@pytest.mark.usefixtures("node")
def test_free_memory_is_never_negative() -> None:
    assert free_bytes(CPU, ranks_on_node=1, num_parameters=10**9) == 0


def test_this_machines_memory_is_read() -> None:
    one, many = (free_bytes(CPU, ranks_on_node=n, num_parameters=0) for n in (1, 64))
    assert 0 < many < one < 1 << 45


def test_a_containers_limit_counts_where_it_is_lower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(rows, "Path", lambda path: tmp_path / path.rpartition("/")[2])
    whole = rows._free_on_node()
    (tmp_path / "memory.current").write_text("400\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert rows._free_on_node() == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert rows._free_on_node() == pytest.approx(whole, rel=0.5)


def test_other_devices_are_taken_for_a_cpu() -> None:
    assert rows.most_tokens(CPU) == rows.most_tokens(torch.device("mps")) == 4096
    assert rows.most_tokens(torch.device("cuda")) == 65_536
