"""Where TRL 1.16 gives a wrong value: each test states it, and the right one beside it.

When TRL mends one of them, its half of the test fails: then the case belongs with the equal ones.
What is left without its head under LoRA is in `test_peft.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from both import (
    ROWS,
    build_ours,
    build_theirs,
    standard_rows,
    table,
    tiny_model,
    train_both,
)
from preferences_data import conversation_rows
from tiny import llama_like_tokenizer, tiny_qwen2
from transformers import AutoModelForSequenceClassification, pipeline

from raywards import RewardTrainer, Scorer
from raywards.checkpoint import complete_checkpoints
from raywards.errors import ConfigError

pytestmark = pytest.mark.trains


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model") / "rm")


@pytest.fixture(scope="module")
def scorer(model: Path) -> Scorer:
    return Scorer.from_pretrained(model)


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def logged(trainer: Any, key: str = "loss") -> list[dict[str, Any]]:
    return [record for record in trainer.state.log_history if key in record]


# ---------------------------------------------------------------- accuracy and its kin


def test_ties_are_half_right_and_trl_calls_them_wrong(model: Path, tmp_path: Path) -> None:
    def without_opinion() -> Any:
        blank = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
        torch.nn.init.zeros_(blank.score.weight)
        return blank

    both = train_both(
        without_opinion, tmp_path, max_steps=1, eval_dataset=table(ROWS[:8]), eval_on_start=True
    )
    [(their, our)] = both.records()
    assert our["loss"] == pytest.approx(their["loss"]) == pytest.approx(0.693147, abs=1e-5)
    assert (their["accuracy"], our["accuracy"], our["tie_rate"]) == (0.0, 0.5, 1.0)
    [(their, our)] = both.records("eval_loss")
    assert (their["eval_accuracy"], our["eval_accuracy"], our["eval_tie_rate"]) == (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def one_right_of_five(scorer: Scorer) -> list[dict[str, Any]]:
    """Four pairs that the model judges wrongly, then one that it judges rightly."""
    rows = conversation_rows(5, seed=1)
    for number, row in enumerate(rows):
        chosen, rejected = scorer.score([row["chosen"], row["rejected"]])
        if (chosen > rejected) != (number == 4):
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    return rows


def test_every_held_out_pair_weighs_the_same_and_in_trl_every_batch(
    model: Path, scorer: Scorer, one_right_of_five: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Five pairs in batches of four and one: TRL averages the figures of the two batches."""
    theirs, ours = build_theirs(model, tmp_path), build_ours(model, tmp_path)
    their, our = (trainer.evaluate(table(one_right_of_five)) for trainer in (theirs, ours))
    assert our["eval_loss"] == pytest.approx(their["eval_loss"], abs=1e-5)  # this TRL weighs
    assert (their["eval_accuracy"], our["eval_accuracy"]) == (0.5, 0.2)

    pairs = [scorer.score([row["chosen"], row["rejected"]]) for row in one_right_of_five]
    gaps = [chosen - rejected for chosen, rejected in pairs]
    assert our["eval_margin"] == pytest.approx(sum(gaps) / 5, abs=1e-6)
    assert their["eval_margin"] == pytest.approx((sum(gaps[:4]) / 4 + gaps[4]) / 2, abs=1e-6)
    assert their["eval_margin"] != pytest.approx(our["eval_margin"], abs=1e-4)

    rewards = [reward for pair in pairs for reward in pair]
    assert our["eval_min_reward"] == pytest.approx(min(rewards), abs=1e-6)
    assert our["eval_max_reward"] == pytest.approx(max(rewards), abs=1e-6)
    mean_of_minima = (min(rewards[:8]) + min(rewards[8:])) / 2
    assert their["eval_min_reward"] == pytest.approx(mean_of_minima, abs=1e-6)
    assert their["eval_min_reward"] > min(rewards) + 1e-4


def test_every_trained_pair_weighs_the_same_in_the_log_and_in_trl_every_step(
    model: Path, tmp_path: Path
) -> None:
    """Steps of 8, 8 and 5 pairs in one record."""
    each = train_both(model, tmp_path / "each", num_train_epochs=1)
    three = train_both(model, tmp_path / "three", num_train_epochs=1, logging_steps=3)
    [(their, our)] = three.records()
    for name in ("loss", "margin", "mean_reward"):
        steps = [record[name] for record in logged(each.ours)]
        by_pair = (8 * steps[0] + 8 * steps[1] + 5 * steps[2]) / 21
        assert our[name] == pytest.approx(by_pair, abs=1e-6), name
        assert their[name] == pytest.approx(sum(steps) / 3, abs=1e-5), name
        assert abs(their[name] - by_pair) > 1e-4, name
    lowest = [record["min_reward"] for record in logged(each.ours)]
    assert our["min_reward"] == min(lowest)
    assert their["min_reward"] == pytest.approx(sum(lowest) / 3, abs=1e-5)


def test_several_held_out_sets_keep_their_figures_and_in_trl_they_lose_the_name(
    model: Path, one_right_of_five: list[dict[str, Any]], tmp_path: Path
) -> None:
    """In TRL `eval_accuracy` is that of whichever set came last, in the result of `evaluate`."""
    right = one_right_of_five[4:]
    wrong = one_right_of_five[:4]
    sets = {"good": table(right), "poor": table(wrong)}
    their = build_theirs(model, tmp_path).evaluate(sets)
    our = build_ours(model, tmp_path).evaluate(sets)
    assert "eval_good_accuracy" not in their
    assert their["eval_accuracy"] == 0.0
    assert (our["eval_good_accuracy"], our["eval_poor_accuracy"]) == (1.0, 0.0)


def test_compute_metrics_is_refused_and_in_trl_it_sees_part_of_the_rewards(
    model: Path, tmp_path: Path
) -> None:
    """For five pairs it gets nine rewards, and nothing that says which are chosen."""
    seen: list[tuple[int, ...]] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions.shape)
        return {"mine": 1.0}

    rows = table(conversation_rows(5))
    theirs = build_theirs(model, tmp_path)
    theirs.compute_metrics = compute_metrics
    assert theirs.evaluate(rows)["eval_mine"] == 1.0
    assert seen == [(9, 1)]
    with pytest.raises(ConfigError, match="compute_metrics"):
        RewardTrainer(str(model), train_dataset=rows, compute_metrics=compute_metrics)


# ---------------------------------------------------------------- counting tokens


def test_tokens_are_counted_on_after_a_resume_and_in_trl_from_zero(
    model: Path, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    both = train_both(model, tmp_path, **saving)
    whole = logged(both.theirs)[-1]["num_tokens"]
    assert logged(both.ours)[-1]["num_tokens"] == whole

    theirs = build_theirs(model, tmp_path / "again", **saving)
    theirs.train(resume_from_checkpoint=str(tmp_path / "trl" / "checkpoint-3"))
    ours = build_ours(model, tmp_path / "again", **saving)
    ours.train(resume_from_checkpoint=str(complete_checkpoints(both.ours.paths.run)[0]))
    at_three = logged(both.theirs)[2]["num_tokens"]
    assert logged(theirs)[-1]["num_tokens"] == whole - at_three
    assert logged(ours)[-1]["num_tokens"] == whole
    # All else goes on alike.
    resumed = [[record["loss"] for record in logged(each)][-3:] for each in (theirs, ours)]
    assert resumed[0] == pytest.approx(resumed[1], abs=1e-5)
    assert resumed[1] == [record["loss"] for record in logged(both.ours)][-3:]


def test_held_out_tokens_are_those_held_out_and_in_trl_those_trained(
    model: Path, tmp_path: Path
) -> None:
    rows = table(conversation_rows(5))
    both = train_both(model, tmp_path, eval_dataset=rows, eval_strategy="epoch", num_train_epochs=1)
    [(their, our)] = both.records("eval_loss")
    assert their["eval_num_tokens"] == logged(both.theirs)[-1]["num_tokens"]
    tokenizer = both.ours.processing_class
    held_out = sum(
        len(tokenizer.apply_chat_template(row[side])["input_ids"])
        for row in rows
        for side in ("chosen", "rejected")
    )
    assert our["eval_num_tokens"] == held_out


# ---------------------------------------------------------------- the loss


def test_pairs_of_a_short_accumulation_weigh_the_same_and_in_trl_up_to_four_times_as_much(
    model: Path, tmp_path: Path
) -> None:
    """The last step of 21 pairs has micro-batches of four and one: TRL takes the mean of means."""
    parts = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    whole = train_both(model, tmp_path / "whole", num_train_epochs=1)
    split = train_both(model, tmp_path / "split", num_train_epochs=1, **parts)
    theirs, ours = whole.losses()
    assert ours == pytest.approx(theirs, abs=1e-5)
    their_split, our_split = split.losses()
    assert our_split == pytest.approx(ours, abs=1e-6)
    assert their_split[:2] == pytest.approx(theirs[:2], abs=1e-5)
    assert abs(their_split[2] - theirs[2]) > 1e-4
    assert furthest(split.weights[1], whole.weights[1]) < 1e-6
    assert furthest(split.weights[0], whole.weights[0]) > 1e-4


def test_a_reward_is_read_at_the_last_token_and_in_trl_before_it_where_eos_pads(
    tmp_path: Path,
) -> None:
    """Without a pad token TRL pads with EOS, and transformers pools the last token that is none."""
    tokenizer = llama_like_tokenizer()
    assert tokenizer.pad_token is None
    folder = tiny_model(tmp_path / "llama", "Llama", "SequenceClassification", tokenizer=tokenizer,
                        num_labels=1)  # fmt: skip
    rows = standard_rows(ROWS[:8])
    both = train_both(folder, tmp_path, rows, max_steps=1, learning_rate=0.0)
    [(their, our)] = both.records()

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    at: dict[int, list[float]] = {-1: [], -2: []}
    for row in rows:
        for side in ("chosen", "rejected"):
            ids = tokenizer(row[side] + tokenizer.eos_token)["input_ids"]
            assert ids[-1] == tokenizer.eos_token_id
            with torch.no_grad():
                hidden = model.model(torch.tensor([ids])).last_hidden_state
                for place in at:
                    at[place].append(model.score(hidden[:, place]).item())
    means = {place: sum(rewards) / 16 for place, rewards in at.items()}
    assert abs(means[-1] - means[-2]) > 1e-3
    assert our["mean_reward"] == pytest.approx(means[-1], abs=1e-5)
    assert their["mean_reward"] == pytest.approx(means[-2], abs=1e-5)
    for left, right in zip(*(weights.values() for weights in both.weights), strict=True):
        assert left.shape == right.shape  # a pad token was found, none was added
    # The export's own pad token never ends a sequence: plain transformers agree with the training.
    exported = Scorer.from_pretrained(both.ours.paths.export)
    reward = exported.score([rows[0]["chosen"]])
    assert reward == pytest.approx(at[-1][:1], abs=1e-5)


# ---------------------------------------------------------------- what is saved


def test_a_pipeline_returns_the_reward_and_with_trls_folder_its_sigmoid(
    model: Path, tmp_path: Path
) -> None:
    both = train_both(model, tmp_path, learning_rate=1e-2)
    sides = [ROWS[0]["chosen"], ROWS[0]["rejected"]]
    rewards = Scorer.from_pretrained(both.ours.paths.export).score(sides)
    assert rewards[1] < -0.5
    found = {}
    for name, folder in (("trl", both.theirs.args.output_dir), ("ours", both.ours.paths.export)):
        score = pipeline("text-classification", model=str(folder), device="cpu")
        texts = score.tokenizer.apply_chat_template(sides, tokenize=False)
        found[name] = [result["score"] for result in score(texts)]
    assert found["ours"] == pytest.approx(rewards, abs=1e-4)
    assert found["trl"] == pytest.approx(torch.tensor(rewards).sigmoid().tolist(), abs=1e-4)
