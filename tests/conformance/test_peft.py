"""LoRA through TRL and through raywards, from the same adapters.

TRL trains and saves the head only where `modules_to_save=["score"]` is asked for; raywards always
does. Adapters are drawn behind the head, after the same `set_seed`, so that they come out alike.
TRL's quantised case is in `tests/test_tuning.py`, beside plain peft.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from both import (
    METRICS,
    ROWS,
    TOLERANCE,
    Both,
    assert_same_summary,
    build_ours,
    build_theirs,
    saved,
    table,
    tiny_model,
    train_both,
)
from preferences_data import conversation_rows
from tiny import tiny_qwen2
from transformers import AutoModelForSequenceClassification, set_seed

from raywards import Scorer
from raywards.errors import ConfigError

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.trains

LEARNING_RATE = 1e-2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "qwen2", num_labels=None)


def lora(**settings: Any) -> Any:
    return peft.LoraConfig(r=4, lora_alpha=16, **settings)


def train_adapters(
    model: Any, folder: Path, settings: dict[str, Any] | None = None, **changes: Any
) -> Both:
    """Through TRL with the head asked for, and through raywards without a word of it."""
    settings = settings or {}
    return train_both(
        model,
        folder,
        theirs={"peft_config": lora(**settings, modules_to_save=["score"])},
        ours={"peft_config": lora(**settings)},
        learning_rate=LEARNING_RATE,
        **changes,
    )


def assert_same_adapters(both: Both) -> None:
    """The same metrics at every step, and the same weights once the adapters are merged."""
    theirs, ours = both.losses()
    assert theirs[0] - min(theirs) > 0.05, "nothing was learned: it proves nothing"
    for their, our in both.records():
        for name in METRICS:
            close = pytest.approx(their[name], abs=TOLERANCE, rel=TOLERANCE)
            assert our[name] == close, (name, their["step"])
    assert len(ours) == 6
    assert_same_summary(both)
    folder = both.ours.paths.run / "merged by peft"
    both.theirs.model.merge_and_unload().save_pretrained(folder)  # under the names of files
    merged, exported = saved(folder), saved(both.ours.paths.export)
    assert exported.keys() == merged.keys()
    for name, weight in merged.items():
        assert (exported[name] - weight).abs().max() <= TOLERANCE, name
    Scorer.from_pretrained(both.ours.paths.export).verify()


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, {"use_dora": True}],
    ids=str,
)
def test_adapters_of_a_dense_model_are_trained_as_trl_trains_them(
    settings: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    assert_same_adapters(train_adapters(model, tmp_path, settings))


@pytest.mark.parametrize(
    "targets", [["q_proj", "v_proj"], ["gate_proj", "up_proj", "down_proj"]], ids=["all", "experts"]
)
def test_adapters_of_a_mixture_of_experts_are_trained_as_trl_trains_them(
    targets: list[str], tmp_path: Path
) -> None:
    folder = tiny_model(
        tmp_path / "moe", "Qwen3Moe", num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, head_dim=8,
    )  # fmt: skip
    assert_same_adapters(train_adapters(folder, tmp_path, {"target_modules": targets}))


def wrapped(folder: Path, **settings: Any) -> Callable[[], Any]:
    def load() -> Any:
        set_seed(42)
        inner = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32
        )
        return peft.get_peft_model(inner, lora(**settings))

    return load


def test_a_peft_model_is_trained_as_trl_trains_it(model: Path, tmp_path: Path) -> None:
    both = train_both(
        wrapped(model, modules_to_save=["score"]), tmp_path, learning_rate=LEARNING_RATE
    )
    assert_same_adapters(both)
    by_config = train_adapters(model, tmp_path / "config")
    assert by_config.losses() == both.losses()


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [None, True, False], ids=str)
def test_adapters_are_trained_with_recomputed_activations_as_in_trl(
    reentrant: bool | None, model: Path, tmp_path: Path
) -> None:
    how = None if reentrant is None else {"use_reentrant": reentrant}
    both = train_adapters(
        model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=how
    )
    assert_same_adapters(both)


def test_seq_cls_is_the_task_that_trains_the_head_in_both(model: Path, tmp_path: Path) -> None:
    both = train_both(
        model, tmp_path, learning_rate=LEARNING_RATE, peft_config=lora(task_type="SEQ_CLS")
    )
    assert_same_adapters(both)


def test_the_head_is_trained_and_kept_and_in_trl_lost_unless_asked_for(
    model: Path, tmp_path: Path
) -> None:
    """TRL's own tests use a plain LoraConfig: the head is frozen as drawn, and left out."""
    held_out = table(conversation_rows(8, seed=1))
    both = train_both(model, tmp_path, learning_rate=LEARNING_RATE, peft_config=lora())
    theirs = peft.load_peft_weights(both.theirs.args.output_dir)
    assert theirs
    assert not [name for name in theirs if "score" in name]
    head = "base_model.model.score.weight"
    assert torch.equal(both.theirs.model.state_dict()[head], both.start[head])

    def loaded_again(seed: int) -> float:
        set_seed(seed)
        base = AutoModelForSequenceClassification.from_pretrained(
            model, num_labels=1, dtype=torch.float32
        )
        again = peft.PeftModel.from_pretrained(base, both.theirs.args.output_dir)
        return float(
            build_theirs(lambda: again, tmp_path / "again").evaluate(held_out)["eval_loss"]
        )

    assert abs(loaded_again(1) - loaded_again(2)) > 1e-3, "the seed of the day decides"
    exported = saved(both.ours.paths.export)
    assert not torch.equal(exported["score.weight"], both.start[head])
    our_loss = both.ours.evaluate(held_out)["eval_loss"]
    again = build_ours(both.ours.paths.export, tmp_path / "export")
    assert again.evaluate(held_out)["eval_loss"] == pytest.approx(our_loss, abs=1e-5)


def test_the_task_of_a_language_model_is_refused_and_in_trl_an_attribute_error(
    model: Path, tmp_path: Path
) -> None:
    """`trl reward --use_peft` has that task by default."""
    settings = {"peft_config": lora(task_type="CAUSAL_LM")}
    with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
        build_theirs(model, tmp_path, **settings)
    with pytest.raises(ConfigError, match="CAUSAL_LM"):
        build_ours(model, tmp_path, **settings).train()


def test_what_is_no_peft_config_is_refused_by_both(model: Path, tmp_path: Path) -> None:
    settings = {"peft_config": {"r": 4}}
    with pytest.raises(TypeError, match="PeftConfig"):
        build_theirs(model, tmp_path, **settings)
    with pytest.raises(ConfigError, match=r"peft\.LoraConfig"):
        build_ours(model, tmp_path, **settings)


def test_a_peft_model_with_a_peft_config_is_refused_by_both(model: Path, tmp_path: Path) -> None:
    for build in (build_theirs, build_ours):
        with pytest.raises(ValueError, match="PeftModel"):
            build(wrapped(model), tmp_path, peft_config=lora())


def test_lora_dropout_is_kept_and_trl_sets_it_to_zero(model: Path, tmp_path: Path) -> None:
    """TRL disables dropout once the adapters are there, so theirs goes, too."""
    with_dropout = train_adapters(model, tmp_path / "with", {"lora_dropout": 0.5})
    without = train_adapters(model, tmp_path / "without")
    assert with_dropout.losses()[0] == without.losses()[0]
    assert with_dropout.losses()[1] != pytest.approx(without.losses()[1], abs=1e-4)
    assert len(ROWS) == 21
