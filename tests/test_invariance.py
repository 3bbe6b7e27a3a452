"""Rewards with the same bits alone and among others, on models where that takes some doing."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CORPUS, chatml_tokenizer, tiny_qwen2
from tiny_models import draw_ids, tiny_classifier
from torch import Tensor, nn

from raywards import Scorer, invariance
from raywards.errors import ConfigError, ConversationError
from raywards.invariance import (
    InvariantGELUTanh,
    InvariantSiLU,
    TiledLinear,
    is_invariant,
    make_invariant,
)
from raywards.model import RewardModel
from raywards.packing import Group, pack
from raywards.settle import settle_path

pytestmark = pytest.mark.trains

WIDE = {
    "hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "intermediate_size": 1536,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "silu, 80": ("Qwen2", {}),
    "silu, 576": ("Qwen2", WIDE),
    "tanh gelu, 80": ("Gemma", {}),
    "tanh gelu, 576": ("Gemma", WIDE),
}
DTYPES = [torch.float32, torch.bfloat16]
each_model = pytest.mark.parametrize("name", MODELS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(getattr(request, "param", 1))
    yield torch.get_num_threads()
    torch.set_num_threads(before)


def wrap(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> RewardModel:
    model = RewardModel(tiny_classifier(family, scale=3.0, **config).to(dtype)).eval()
    settle_path(model)
    return model


def wrap_named(name: str, dtype: torch.dtype) -> RewardModel:
    family, config = MODELS[name]
    return wrap(family, dtype, **config)


def many() -> tuple[list[list[int]], list[Group]]:
    """Sequences in groups, other ones than the probe's; the last ones share nothing."""
    dice = random.Random(4)
    sequences: list[list[int]] = []
    groups = []
    for prompt in draw_ids(1, 20, 77, 256, 131, seed=1):
        first = len(sequences)
        own = draw_ids(*(dice.randint(1, 140) for _ in range(dice.randint(2, 5))), seed=len(prompt))
        sequences += [prompt + ids for ids in own]
        groups.append(Group(len(prompt), tuple(range(first, len(sequences)))))
    for ids in draw_ids(1, 33, 257, seed=2):
        groups.append(Group(0, (len(sequences),)))
        sequences.append(ids)
    return sequences, groups


SEQUENCES, GROUPS = many()


@torch.inference_mode()
def rewards(model: RewardModel, groups: list[Group]) -> Tensor:
    """Of one row of `groups`, in the order of SEQUENCES."""
    found = model(pack(SEQUENCES, groups))
    members = [member for group in groups for member in group.members]
    return torch.stack([reward for _, reward in sorted(zip(members, found, strict=True))])


def alone(model: RewardModel) -> Tensor:
    return torch.cat(
        [rewards(model, [Group(split, (i,))]) for split, members in GROUPS for i in members]
    )


def shuffled(seed: int) -> list[Group]:
    dice = random.Random(seed)
    groups = [Group(split, tuple(dice.sample(members, len(members)))) for split, members in GROUPS]
    return dice.sample(groups, len(groups))


# ---------------------------------------------------------------- the same bits


def test_a_plain_forward_would_not_do() -> None:
    """In which of these it differs is up to the CPU's kernels; that none does would be news."""
    models = [wrap_named(name, torch.float32) for name in MODELS]
    assert not all(torch.equal(alone(model), rewards(model, GROUPS)) for model in models)


@each_model
@each_dtype
def test_a_reward_has_the_same_bits_alone_together_and_in_any_order(
    name: str, dtype: torch.dtype
) -> None:
    model = wrap_named(name, dtype)
    make_invariant(model)
    expected = alone(model)
    assert expected.std() > 0.1, "all rewards are alike: nothing is compared"
    assert torch.equal(rewards(model, GROUPS), expected)
    for seed in range(3):
        assert torch.equal(rewards(model, shuffled(seed)), expected)
    halves = [rewards(model, part) for part in (GROUPS[:3], GROUPS[3:])]
    assert torch.equal(torch.cat(halves), expected)
    # A prefix that one sequence has is a prefix that many have.
    split, members = GROUPS[2]
    apart = rewards(model, [Group(split, (member,)) for member in members])
    assert torch.equal(apart, expected[list(members)])


@pytest.mark.parametrize("threads", [2], indirect=True)
@pytest.mark.parametrize("family", ["Qwen2", "Gemma"])
@each_dtype
def test_two_threads_give_the_same_bits_too(family: str, dtype: torch.dtype, threads: int) -> None:
    """Few forwards: on busy cores two threads wait for each other."""
    assert torch.get_num_threads() == threads == 2
    model = wrap(family, dtype, intermediate_size=203)
    make_invariant(model)
    together = rewards(model, GROUPS)
    for split, members in GROUPS[::2]:
        assert torch.equal(rewards(model, [Group(split, members[-1:])])[0], together[members[-1]])


@each_model
@each_dtype
def test_it_differs_from_the_plain_forward_by_rounding_alone(name: str, dtype: torch.dtype) -> None:
    model, exact = wrap_named(name, dtype), wrap_named(name, dtype)
    exact.inner.double()
    plain, right = rewards(model, GROUPS), rewards(exact, GROUPS)
    make_invariant(model)
    ours = rewards(model, GROUPS)
    off_plain, off_ours = ((found - right).square().mean().sqrt() for found in (plain, ours))
    # Of one size: a dozen rewards, whose rounding in two orders of summation is drawn twice.
    assert 0 < off_ours <= 2 * off_plain
    assert off_ours < (1e-5 if dtype == torch.float32 else 0.1) * right.std()


@each_dtype
def test_parameters_keep_their_names_types_and_values(dtype: torch.dtype) -> None:
    model = wrap("Gemma", dtype)
    before = {name: value.clone() for name, value in model.inner.state_dict().items()}
    objects = dict(model.named_parameters())
    make_invariant(model)
    kinds = {type(module) for module in model.modules()}
    assert {TiledLinear, InvariantGELUTanh} <= kinds
    assert nn.Linear not in kinds
    after = model.inner.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(value is objects[name] for name, value in model.named_parameters())


def test_doing_it_twice_changes_nothing() -> None:
    model = wrap("Qwen2")
    make_invariant(model)
    expected = rewards(model, GROUPS)
    make_invariant(model)
    assert torch.equal(rewards(model, GROUPS), expected)


def test_the_check_tells_plain_models_from_invariant_ones() -> None:
    model = wrap("Qwen2", **WIDE)
    assert not is_invariant(model)
    make_invariant(model)
    assert is_invariant(model)


@pytest.mark.parametrize("left_out", [TiledLinear, InvariantSiLU])
def test_each_part_is_needed(left_out: type, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {old: new for old, new in invariance._INVARIANT.items() if new is not left_out}
    assert len(kept) < len(invariance._INVARIANT)
    monkeypatch.setattr(invariance, "_INVARIANT", kept)
    with pytest.raises(ConfigError, match=r"still gives other bits|multiplies in"):
        make_invariant(wrap("Qwen2", intermediate_size=203))  # no whole number of vectors


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 255, 256, 257, 600])
@each_dtype
def test_a_tiled_linear_is_a_linear(dtype: torch.dtype, rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(80, 33, bias=bias).to(dtype)
    hidden = torch.randn(1, rows, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = plain(hidden)
    plain.__class__ = TiledLinear
    with torch.inference_mode():
        found = plain(hidden)
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        # Sums of 80 terms near 1 that cancel: what is left of them may be off by their last bit.
        tolerance = {"atol": 1e-3, "rtol": 1.6e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(found, expected, **tolerance)
        for row in range(0, rows, 50):
            assert torch.equal(plain(hidden[:, row : row + 1]), found[:, row : row + 1])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(InvariantSiLU(), nn.SiLU()), (InvariantGELUTanh(), nn.GELU("tanh"))],
    ids=["silu", "gelu"],
)
@each_dtype
def test_an_activation_is_what_it_stands_for_also_far_out(
    ours: nn.Module, theirs: nn.Module, dtype: torch.dtype
) -> None:
    near = torch.linspace(-12, 12, 1001)
    far = torch.tensor([-1e4, -200.0, -88.0, 0.0, 88.0, 200.0, 1e4])
    hidden = torch.cat([near, far]).to(dtype)
    found, expected = ours(hidden), theirs(hidden)
    assert found.isfinite().all()
    bound = {torch.float32: 2e-6, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("family", "config", "path"),
    [("Gemma2", {"attn_logit_softcapping": 1.0}, "masked"), ("Bert", {}, "padded")],
)
def test_the_other_paths_are_refused(family: str, config: dict[str, Any], path: str) -> None:
    model = wrap(family, **config)
    assert model.path == path
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=rf"{family}\w+ takes {path} rows.*Leave it out"):
        make_invariant(model)
    assert [type(module) for module in model.modules()] == kinds


def test_another_device_is_refused() -> None:
    model = RewardModel(tiny_classifier("Qwen2")).to("meta")
    with pytest.raises(ConfigError, match=r"on meta has no bit-exact forward.*Leave it out"):
        make_invariant(model)


@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_experts_are_refused(family: str) -> None:
    """Their fused weights are in no `nn.Linear`."""
    with pytest.raises(ConfigError, match=rf"{family}\w+ multiplies in .*Leave it out"):
        make_invariant(wrap(family))


def test_experts_are_refused_in_bf16_too() -> None:
    model = RewardModel(tiny_classifier("Qwen3Moe", scale=4.0).bfloat16()).eval()
    with pytest.raises(ConfigError, match="multiplies in"):
        make_invariant(model)
    assert not any(isinstance(module, TiledLinear) for module in model.modules())


def test_a_deterministic_scorer_takes_no_sequence_beyond_the_window(tmp_path: Path) -> None:
    """Such a sequence is padded, and a padded batch has other bits."""
    inner = tiny_classifier("Mistral", sliding_window=100)
    chatml_tokenizer().save_pretrained(tmp_path)
    inner.save_pretrained(tmp_path)
    assert Scorer.from_pretrained(tmp_path).max_length > 100
    scorer = Scorer.from_pretrained(tmp_path, deterministic=True)
    assert scorer.max_length == 100
    with pytest.raises(ConversationError, match="max_length=100"):
        scorer.score_ids([[1] * 101])


def test_a_model_of_few_positions_is_checked_within_them() -> None:
    make_invariant(wrap("OPT", max_position_embeddings=128, ffn_dim=96, word_embed_proj_dim=80))


# ---------------------------------------------------------------- Scorer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "rm"
    return tiny_qwen2(path, **WIDE, initializer_range=0.1)


def conversations() -> list[list[dict[str, str]]]:
    dice = random.Random(0)
    words = " ".join(CORPUS).split()

    def say(role: str) -> dict[str, str]:
        return {"role": role, "content": " ".join(dice.choices(words, k=dice.randint(1, 30)))}

    questions = [say("user") for _ in range(4)]
    return [[question, say("assistant")] for question in questions for _ in range(4)]


def alone_and_together(scorer: Scorer) -> tuple[list[float], list[float]]:
    asked = conversations()
    return [scorer.score([one])[0] for one in asked], scorer.score(asked)


def test_a_deterministic_scorer_gives_a_conversation_its_bits_whatever_is_beside_it(
    folder: Path,
) -> None:
    scorer = Scorer.from_pretrained(folder, device="cpu", deterministic=True)
    assert scorer.info["deterministic"] is True
    one_by_one, together = alone_and_together(scorer)
    assert one_by_one == together
    assert scorer.score(conversations()[::-1]) == together[::-1]
    plain = Scorer.from_pretrained(folder, device="cpu")
    assert plain.info["deterministic"] is False
    plain_one_by_one, plain_together = alone_and_together(plain)
    assert plain_one_by_one != plain_together, "a plain scorer would do"
    assert together == pytest.approx(plain_together, rel=1e-4, abs=1e-4)
    assert torch.tensor(together).std() > 0.1
    scorer.verify()


def test_a_deterministic_scorer_of_another_path_is_refused(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path / "rm")

    tiny_classifier("Gemma2", vocab_size=600, attn_logit_softcapping=1.0).save_pretrained(folder)
    assert Scorer.from_pretrained(folder, device="cpu").info["path"] == "masked"
    with pytest.raises(ConfigError, match=r"deterministic=True: Gemma2.*Leave it out"):
        Scorer.from_pretrained(folder, device="cpu", deterministic=True)
