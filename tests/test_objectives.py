"""Rankings, regression and attributes, from rows to export, in this process, without Ray."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from test_train_here import ROWS, losses, run, same_weights, settings
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer, create_model_from_path
from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.errors import CheckpointError, ConfigError, ModelError, RowError
from raywards.heads import FILE, fold_heads, restore_heads, widen_head
from raywards.model import RewardModel
from raywards.objectives import build_objective
from raywards.packing import pack_groups
from raywards.train import loop

pytestmark = pytest.mark.trains

ATTRIBUTES = {"verbosity": -0.25, "helpfulness": 0.75}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("model"), num_labels=None)


def answer(goodness: int, dice: random.Random) -> str:
    """Of four words, `goodness` are "good"; how many follow says nothing."""
    words = ["good"] * goodness + ["bad"] * (4 - goodness)
    dice.shuffle(words)
    return " ".join(words) + " so" * dice.randint(0, 5)


def ranking_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Two to four responses to a question, in any order; the more "good", the better."""
    dice = random.Random(seed)
    rows = []
    for number in range(count):
        levels = dice.sample(range(5), dice.randint(2, 4))
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"say {number}"}],
                "responses": [
                    [{"role": "assistant", "content": answer(level, dice)}] for level in levels
                ],
                "ranks": [1 + sum(other > level for other in levels) for level in levels],
            }
        )
    return rows


def rated_rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Scores for an answer; a third of the rows lack one of the two attributes."""
    dice = random.Random(seed)
    rows = []
    for number in range(count):
        level = dice.randint(0, 4)
        text = answer(level, dice)
        row: dict[str, Any] = {
            "prompt": f"say {number}: ",
            "response": text,
            "score": float(level),
            "helpfulness": float(level),
            "verbosity": text.count("so") / 2,
        }
        if number % 3 == 2:
            row[dice.choice(list(ATTRIBUTES))] = None
        rows.append(row)
    return rows


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "plackett_luce": (ranking_rows, {"objective": "plackett_luce"}),
    "all_pairs": (ranking_rows, {"objective": "all_pairs", "center_rewards_coefficient": 0.01}),
    "regression": (rated_rows, {"objective": "regression"}),
    "attributes": (rated_rows, {"objective": "regression", "attributes": ATTRIBUTES}),
}


def train(model: Path, output: Path, case: str, **changes: Any) -> RewardTrainer:
    make, setting = CASES[case]
    return run(model, output, make(45), **{**setting, **changes})


# ---------------------------------------------------------------- learned


@pytest.mark.parametrize("case", CASES)
def test_every_objective_is_learned_and_evaluated_alike_in_and_after_the_run(
    case: str, model: Path, tmp_path: Path
) -> None:
    make, changes = CASES[case]
    schedule = {"learning_rate": 1e-2, "num_train_epochs": 6, "logging_steps": 100}
    evaluation = {"eval_strategy": "steps", "eval_steps": 48, "eval_on_start": True}
    held_out = datasets.Dataset.from_list(make(24, seed=1))
    trainer = RewardTrainer(
        str(model),
        RewardConfig(**settings(tmp_path / "run", **changes, **schedule, **evaluation)),
        train_dataset=datasets.Dataset.from_list(make(64)),
        eval_dataset=held_out,
    )
    fresh = trainer.evaluate()
    trainer.train()
    before, after = (r for r in trainer.state.log_history if "eval_loss" in r)
    [trained] = [r for r in trainer.state.log_history if "loss" in r]
    assert fresh["eval_loss"] == pytest.approx(before["eval_loss"], abs=1e-6)
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    if changes["objective"] == "regression":
        assert after["eval_pearson"] > 0.9
        assert not {name for name in (*after, *trained) if "accuracy" in name or "margin" in name}
        assert {"mse", "mae", "pearson"} <= trained.keys()
    else:
        assert before["eval_accuracy"] < 0.7 < 0.95 < after["eval_accuracy"]
        assert after["eval_num_comparisons"] > after["eval_num_pairs"] == 24
    again = trainer.evaluate()
    for name in ("eval_loss", "eval_min_reward", "eval_mean_reward", "eval_max_reward"):
        assert again[name] == pytest.approx(after[name], abs=1e-5)
    Scorer.from_pretrained(tmp_path / "run" / "export").verify()


def test_held_out_figures_are_those_of_the_scorer(model: Path, tmp_path: Path) -> None:
    held_out = ranking_rows(11, seed=1)
    held_out[3]["ranks"] = [1] * len(held_out[3]["ranks"])
    trainer = RewardTrainer(
        str(model),
        RewardConfig(
            **settings(tmp_path / "run", objective="all_pairs", learning_rate=1e-6, max_steps=1)
        ),
        train_dataset=datasets.Dataset.from_list(ranking_rows(45)),
        eval_dataset=datasets.Dataset.from_list(held_out),
    )
    trainer.train()
    found = trainer.evaluate()
    scorer = Scorer.from_pretrained(tmp_path / "run" / "export")
    right, wrong, group_losses = 0, 0, []
    for row in held_out:
        rewards = scorer.score([row["prompt"] + answer for answer in row["responses"]])
        terms = []
        for i, j in itertools.combinations(range(len(rewards)), 2):
            (a, b), tied = (rewards[i], rewards[j]), row["ranks"][i] == row["ranks"][j]
            a, b = (a, b) if row["ranks"][i] <= row["ranks"][j] else (b, a)
            right, wrong = right + (not tied and a > b), wrong + (not tied and a < b)
            there, back = math.log1p(math.exp(b - a)), math.log1p(math.exp(a - b))
            terms.append((there + back) / 2 if tied else there)
        group_losses.append(sum(terms) / len(terms))
    assert wrong > 0, "the model is right everywhere: half of this shows nothing"
    assert found["eval_num_comparisons"] == right + wrong
    assert found["eval_accuracy"] == pytest.approx(right / (right + wrong))
    assert found["eval_loss"] == pytest.approx(sum(group_losses) / 11, abs=1e-5)


@pytest.mark.parametrize(
    ("case", "metric", "best_of"),
    [
        ("plackett_luce", "accuracy", max),
        ("all_pairs", "log_loss", min),
        ("regression", "pearson", max),
        ("regression", "mse", min),
        ("regression", "loss/b", min),
        ("attributes", "mae/helpfulness", min),
    ],
)
def test_the_best_checkpoint_goes_by_a_figure_of_the_objective(
    case: str, metric: str, best_of: Any, model: Path, tmp_path: Path
) -> None:
    make, changes = CASES[case]
    sets = {name: datasets.Dataset.from_list(make(24, seed=i)) for i, name in enumerate("ab")}

    def trainer(metric: str) -> RewardTrainer:
        schedule = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 1}
        wanted = {"metric_for_best_model": metric, "load_best_model_at_end": True}
        rate = {"learning_rate": 0.03, "lr_scheduler_type": "constant"}  # it swings
        return RewardTrainer(
            str(model),
            RewardConfig(**settings(tmp_path / "run", **changes, **schedule, **wanted, **rate)),
            train_dataset=datasets.Dataset.from_list(make(32)),
            eval_dataset={"one": sets},
        )

    wrong = "accuracy" if changes["objective"] == "regression" else "mse"
    with pytest.raises(ConfigError, match=f"no evaluation gives 'eval_one_{wrong}'"):
        trainer(f"one_{wrong}").train()
    assert not (tmp_path / "run" / "run.json").exists()

    trained = trainer(f"one_{metric}")
    trained.train()
    name = f"eval_one_{metric}"
    values = {e["step"]: e[name] for e in trained.state.log_history if name in e}
    assert len(values) == 4
    assert len(set(values.values())) > 1
    assert trained.state.best_metric == best_of(values.values())
    assert values[trained.state.best_global_step] == trained.state.best_metric


# ---------------------------------------------------------------- equalities


def pair_rows_as_rankings(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    dice = random.Random(3)
    turned = [dice.random() < 0.5 for _ in rows]
    assert len(set(turned)) == 2
    return [
        {"responses": [row["rejected"], row["chosen"]], "ranks": [2, 1]}
        if turn
        else {"responses": [row["chosen"], row["rejected"]], "ranks": [1, 2]}
        for row, turn in zip(rows, turned, strict=True)
    ]


@pytest.mark.parametrize(
    "objective", ["plackett_luce", pytest.param("all_pairs", marks=pytest.mark.slow)]
)
def test_rankings_of_two_and_pairs_among_them_train_as_bradley_terry_does(
    objective: str, model: Path, tmp_path: Path
) -> None:
    centred = {"center_rewards_coefficient": 0.01}
    pairs = run(model, tmp_path / "pairs", **centred)
    ranked = pair_rows_as_rankings(ROWS)
    # The first row has every column: `from_list` drops those that it lacks.
    filled = dict.fromkeys(["responses", "ranks", "chosen", "rejected"])
    both = enumerate(zip(ROWS, ranked, strict=True))
    mixed = [{**filled, **(pair if i % 2 else ranking)} for i, (pair, ranking) in both]
    rankings = run(model, tmp_path / "rankings", mixed, objective=objective, **centred)
    assert losses(pairs)[0] - losses(pairs)[-1] > 0.05
    for name in ("loss", "accuracy", "margin", "mean_reward", "grad_norm"):
        assert losses(rankings, name) == pytest.approx(losses(pairs, name), abs=1e-5), name
    assert same_weights(tmp_path / "pairs", tmp_path / "rankings") < 1e-5


@pytest.mark.slow
def test_pairs_among_rankings_keep_margin_and_probability(model: Path, tmp_path: Path) -> None:
    rows = [{**row, "margin": 0.1 * i, "probability": 0.9 - 0.01 * i} for i, row in enumerate(ROWS)]
    pairs = run(model, tmp_path / "pairs", rows, num_train_epochs=1)
    ranked = run(model, tmp_path / "ranked", rows, num_train_epochs=1, objective="plackett_luce")
    plain = run(model, tmp_path / "plain", ROWS, num_train_epochs=1)
    assert losses(ranked) == pytest.approx(losses(pairs), abs=1e-6)
    assert losses(ranked, "accuracy") == pytest.approx(losses(pairs, "accuracy"))
    assert losses(ranked) != pytest.approx(losses(plain), abs=1e-2)


EQUIVALENT: dict[str, dict[str, Any]] = {
    "padded": {},
    "groups alone": {"max_tokens_per_row": 1},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
    "ZeRO-3": {"deepspeed": 3},
}


@pytest.mark.parametrize(
    ("case", "how"),
    [
        ("plackett_luce", "padded"),
        ("attributes", "padded"),
        ("plackett_luce", "accumulation"),
        *(
            pytest.param(case, how, marks=pytest.mark.slow)
            for case, how in (
                ("all_pairs", "groups alone"),
                ("attributes", "groups alone"),
                ("attributes", "ZeRO-3"),
            )
        ),
    ],
)
def test_how_groups_are_computed_does_not_change_their_losses(
    case: str, how: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = train(model, tmp_path / "packed", case, num_train_epochs=1)
    settled: list[str] = []

    def settle(model: Any, **_: Any) -> None:
        settled.append(model.path)
        model.use("padded")

    if how == "padded":
        monkeypatch.setattr("raywards.train.worker.settle_path", settle)
    other = train(model, tmp_path / "other", case, num_train_epochs=1, **EQUIVALENT[how])
    assert settled == (["packed"] if how == "padded" else [])
    assert len(losses(packed)) == 6
    assert losses(other) == pytest.approx(losses(packed), rel=1e-5)
    assert same_weights(tmp_path / "packed", tmp_path / "other") < 1e-5


def test_the_first_loss_is_the_mean_over_groups_of_the_loss_of_each(
    model: Path, tmp_path: Path
) -> None:
    """Each group alone, through transformers' own forward, with the formula written out."""
    rows = ranking_rows(9)
    trainer = run(
        model, tmp_path / "run", rows, objective="plackett_luce", num_train_epochs=1,
        per_device_train_batch_size=9, learning_rate=0.0,
    )  # fmt: skip
    scorer = Scorer.from_pretrained(tmp_path / "run" / "export")
    expected = []
    for row in rows:
        rewards = scorer.score([row["prompt"] + answer for answer in row["responses"]])
        left = [r for _, r in sorted(zip(row["ranks"], rewards, strict=True))]
        steps = len(left) - 1
        terms = []
        while len(left) > 1:
            terms.append(math.log(sum(map(math.exp, left))) - left.pop(0))
        expected.append(sum(terms) / steps)
    assert {len(row["ranks"]) for row in rows} == {2, 3, 4}
    assert losses(trainer) == pytest.approx([sum(expected) / 9], abs=1e-6)


# ---------------------------------------------------------------- attributes


def test_the_export_is_the_weighted_sum_of_the_heads(model: Path, tmp_path: Path) -> None:
    trainer = train(model, tmp_path / "run", "attributes", learning_rate=1e-2)
    export = tmp_path / "run" / "export"
    stored = load_file(export / "model.safetensors")
    assert stored["score.weight"].shape == (1, 32)
    config = json.loads((export / "config.json").read_text())
    assert config.get("num_labels", 1) == 1
    assert list(config.get("id2label", {"0": "LABEL_0"})) == ["0"]
    heads = json.loads((export / FILE).read_text())
    assert {name: head["weight"] for name, head in heads.items()} == ATTRIBUTES
    assert list(heads) == sorted(ATTRIBUTES)
    manifest = read_manifest(export, kind="export")
    assert manifest["training"]["settings"]["attributes"] == ATTRIBUTES
    assert FILE in manifest["files"]

    sequences = [entry["input_ids"] for entry in manifest["rewards"]]
    folded = torch.tensor([entry["reward"] for entry in manifest["rewards"]])
    inner = trainer.model
    restore_heads(inner, export, dict(sorted(ATTRIBUTES.items())))
    with torch.no_grad():
        outputs = RewardModel(inner.eval())(pack_groups([[ids] for ids in sequences]))
    assert outputs.shape == (8, 2)
    weights = torch.tensor([ATTRIBUTES[name] for name in sorted(ATTRIBUTES)])
    torch.testing.assert_close(outputs @ weights, folded, rtol=0, atol=1e-5)
    assert (outputs[:, 0] - outputs[:, 1]).abs().max() > 0.1, "two heads that are one"


@pytest.mark.parametrize("path", ["packed", "masked", "padded"])
@torch.inference_mode()
def test_every_path_carries_several_outputs(path: Any, tmp_path: Path) -> None:
    inner = create_model_from_path(str(tiny_qwen2(tmp_path / "model")), device_map=None)
    widen_head(inner, ATTRIBUTES, seed=0)
    groups = [[[5, 6, 7], [5, 6, 8, 9], [5, 6]], [[9, 8]]]
    expected = torch.cat([inner(torch.tensor([ids])).logits for group in groups for ids in group])
    model = RewardModel(inner.eval())
    model.use(path)
    found = model(pack_groups(groups))
    assert found.shape == (4, 2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_attribute_of_weight_one_is_the_score(model: Path, tmp_path: Path) -> None:
    """But for the head it begins with, which is drawn anew."""
    one = train(model, tmp_path / "one", "attributes", attributes={"score": 1.0})
    two = train(model, tmp_path / "two", "attributes", attributes={"score": 2.0})
    assert losses(one) == losses(two)
    rewards = [
        torch.tensor([e["reward"] for e in read_manifest(folder, kind="export")["rewards"]])
        for folder in (tmp_path / "one" / "export", tmp_path / "two" / "export")
    ]
    torch.testing.assert_close(2 * rewards[0], rewards[1], rtol=1e-5, atol=1e-6)


def test_folding_sums_rows_and_biases_in_fp32() -> None:
    rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.bfloat16)
    weights = {"score.weight": rows, "score.bias": torch.tensor([0.5, 1.0]), "x": torch.ones(1)}
    folded = fold_heads(weights, {"a": 0.3, "b": -2.0})
    expected = torch.tensor([[0.3 * 1 - 2 * 3, 0.3 * 2 + 2]])
    torch.testing.assert_close(folded["score.weight"], expected)
    torch.testing.assert_close(folded["score.bias"], torch.tensor([0.15 - 2.0]))
    assert folded["x"] is weights["x"]
    assert weights["score.weight"] is rows


def test_new_heads_are_drawn_from_the_seed_also_on_a_trained_model(tmp_path: Path) -> None:
    folder = tiny_qwen2(tmp_path / "trained")

    def drawn(seed: int) -> torch.Tensor:
        inner = create_model_from_path(str(folder), device_map=None)
        widen_head(inner, ATTRIBUTES, seed)
        assert inner.config.num_labels == 1
        weight: torch.Tensor = inner.score.weight
        return weight

    one, again, other = drawn(1), drawn(1), drawn(2)
    assert one.shape == (2, 32)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0.01 < one.std().item() < 0.03


# ---------------------------------------------------------------- resumed, refused


@pytest.mark.parametrize(
    "case", [pytest.param("plackett_luce", marks=pytest.mark.slow), "attributes"]
)
def test_a_run_that_was_cut_off_goes_on_as_if_it_had_not_been(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = train(model, tmp_path / "undisturbed", case)
    changes = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
    step = loop.accumulate_gradients

    def stopping(worker: Any, indices: Any) -> None:
        if worker.state.step == 6:
            raise InterruptedError
        step(worker, indices)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "accumulate_gradients", stopping)
        with pytest.raises(InterruptedError):
            train(model, tmp_path / "cut", case, **changes)
    assert [c.name[:17] for c in complete_checkpoints(tmp_path / "cut")] == ["checkpoint-000004"]
    resumed = train(model, tmp_path / "cut", case, **changes)
    # Bit for bit; the window that the checkpoint cut in two is whole again.
    assert same_weights(tmp_path / "undisturbed", tmp_path / "cut") == 0.0
    whole = losses(undisturbed)
    assert losses(resumed) == pytest.approx(
        [sum(whole[start : start + 3]) / 3 for start in (0, 3, 6, 9)], rel=0.05
    )
    other = (
        {"attributes": {**ATTRIBUTES, "helpfulness": 1.0}}
        if case == "attributes"
        else {"objective": "all_pairs"}
    )
    with pytest.raises(CheckpointError, match=next(iter(other))):
        train(model, tmp_path / "cut", case, **changes, **other)


def test_attributes_need_a_path_and_a_linear_head(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig
    from transformers import BertForSequenceClassification as Bert

    rows = datasets.Dataset.from_list(rated_rows(4))
    loaded = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1)
    args = RewardConfig(**settings(tmp_path, **CASES["attributes"][1]))
    with pytest.raises(ConfigError, match=r"attributes: .* Pass its path"):
        RewardTrainer(loaded, args, train_dataset=rows)
    encoder = Bert(BertConfig(num_labels=1, hidden_size=8, num_attention_heads=1, vocab_size=9))
    with pytest.raises(ModelError, match=r"Bert.* has no linear head named `score`"):
        widen_head(encoder, ATTRIBUTES, 0)


def test_settings_are_checked_again_when_training_starts(model: Path, tmp_path: Path) -> None:
    args = RewardConfig(**settings(tmp_path / "run"))
    args.label_smoothing = 0.1
    args.objective = "plackett_luce"
    trainer = RewardTrainer(
        str(model), args, train_dataset=datasets.Dataset.from_list(ranking_rows(4))
    )
    with pytest.raises(ConfigError, match=r"label_smoothing=0\.1"):
        trainer.train()
    args.label_smoothing = 0.0
    trainer.train()


def test_rows_of_another_objective_stop_the_run(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RowError, match="objective='regression' does not take"):
        run(model, tmp_path / "run", ROWS, objective="regression")
    with pytest.raises(RowError, match="set objective to plackett_luce or all_pairs"):
        run(model, tmp_path / "run", ranking_rows(3))


# ---------------------------------------------------------------- figures


def judge(case: str, outputs: list[Any], **groups: Any) -> tuple[Any, dict[str, float]]:
    """What is judged of outputs at hand: the losses, and the metrics of training."""
    objective = build_objective(RewardConfig(**CASES[case][1]))
    judged = objective.judge(torch.tensor(outputs), groups)
    metrics, held_out = objective.metrics(torch.device("cpu")), objective.held_out()
    metrics.add(*judged.counted)
    held_out.add(*judged.held_out)
    while_training, after = metrics.compute(), held_out.compute()
    for name in while_training:
        assert after[name] == pytest.approx(while_training[name]), name
    return judged, after


def test_figures_of_rankings_count_pairs_of_different_rank() -> None:
    judged, found = judge(
        "all_pairs",
        [3.0, 1.0, 2.0, 0.0, 5.0, -1.0, -1.0],
        sequences=[[[1], [2, 3], [4]], [[5], [6]], [[7], [8, 9, 9]]],
        ranks=[[1.0, 2.0, 2.0], None, [1.0, 1.0]],
        margin=[None, 0.5, None],
        probability=[None, 0.75, None],
        source=["a", "b", "b"],
    )
    # 3 over 1, 3 over 2; 0 over 5, as three of four judges say; the others are ties.
    assert found["num_comparisons"] == 3
    assert found["accuracy"] == pytest.approx((1 + 1 + 0.25) / 3)
    assert found["accuracy/a"] == 1
    assert found["accuracy/b"] == 0.25
    assert found["margin"] == pytest.approx((2 + 1 - 5) / 3)
    assert found["tie_rate"] == 0
    assert (found["min_reward"], found["max_reward"]) == (-1.0, 5.0)
    assert found["mean_reward"] == pytest.approx(9 / 7)
    assert (found["num_pairs"], found["num_tokens"]) == (3, 10)
    assert found["loss"] == pytest.approx(judged.losses.mean().item())

    def surprise(difference: float) -> float:
        return math.log1p(math.exp(-difference))

    centring = [0.01 * x**2 for x in (2 * 6 / 3, 5, -2)]
    assert judged.losses.tolist() == pytest.approx(
        [
            (surprise(2) + surprise(1) + (surprise(1) + surprise(-1)) / 2) / 3 + centring[0],
            0.75 * surprise(-5.5) + 0.25 * surprise(5.5) + centring[1],
            math.log(2) + centring[2],
        ]
    )


def test_rankings_that_are_all_ties_have_no_accuracy() -> None:
    _, found = judge(
        "all_pairs", [1.0, 2.0], sequences=[[[1], [2]]], ranks=[[1.0, 1.0]],
        margin=[None], probability=[None], source=["a"],
    )  # fmt: skip
    assert "accuracy" not in found
    assert (found["num_pairs"], found["num_comparisons"]) == (1, 0)


def test_figures_of_ratings_leave_out_what_nobody_rated() -> None:
    judged, found = judge(
        "attributes",  # helpfulness, verbosity
        [[1.0, 2.0], [3.0, 0.0], [0.0, 4.0]],
        sequences=[[[1, 2]], [[3]], [[4]]],
        scores=[[2.0, 2.0], [3.0, None], [4.0, 0.0]],
        source=["a", "a", "b"],
    )
    assert judged.losses.tolist() == pytest.approx([0.5, 0.0, 16.0])
    assert found["loss"] == pytest.approx(16.5 / 3)
    assert (found["loss/a"], found["loss/b"]) == (0.25, 16.0)
    assert found["mse"] == pytest.approx((1 + 0 + 0 + 16 + 16) / 5)
    assert found["mae"] == pytest.approx((1 + 0 + 0 + 4 + 4) / 5)
    assert found["mse/helpfulness"] == pytest.approx((1 + 0 + 16) / 3)
    assert found["mae/verbosity"] == pytest.approx(2.0)
    rewards = [0.75 - 0.5, 2.25, -1.0]
    assert (found["min_reward"], found["max_reward"]) == (-1.0, 2.25)
    assert found["mean_reward"] == pytest.approx(sum(rewards) / 3)
    assert found["pearson"] == pytest.approx(-1.0)  # of two texts that have both scores
    assert found["pearson/verbosity"] == pytest.approx(-1.0)
    assert (found["num_pairs"], found["num_tokens"]) == (3, 4)
    config = RewardConfig(objective="regression", attributes=ATTRIBUTES)
    others = {"num_pairs", "num_tokens", "loss/a", "loss/b"}
    assert build_objective(config).held_out().choosable.keys() == found.keys() - others


def test_a_constant_has_no_correlation() -> None:
    _, found = judge(
        "regression", [0.1, 0.1, 0.1], sequences=[[[1]], [[2]], [[3]]],
        scores=[[1.0], [2.0], [3.0]], source=["a", "a", "a"],
    )  # fmt: skip
    assert "pearson" not in found
    assert not [name for name in found if "/" in name]


@pytest.mark.parametrize("case", CASES)
def test_a_loss_that_is_not_finite_is_counted(case: str) -> None:
    objective = build_objective(RewardConfig(**CASES[case][1]))
    nothing = objective.nothing
    count = 2 if len(nothing["sequences"][0]) == 2 else 1
    outputs = torch.full((count, 2) if case == "attributes" else (count,), math.nan)
    metrics = objective.metrics(torch.device("cpu"))
    metrics.add(*objective.judge(outputs, nothing).counted)
    assert metrics.num_not_finite().item() == 1
    zeros = torch.zeros_like(outputs).requires_grad_()
    objective.judge(zeros, nothing).losses.sum().mul(0.0).backward()
    assert zeros.grad is not None


def test_the_page_has_every_figure() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_0-9]+)(?:/[A-Z]+)?`", page))
    assert {"mse", "mae", "pearson", "num_comparisons"} <= named
