"""The model card: what it says is so, its examples run, and it tells nothing that is private."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from preferences_data import conversation_rows
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import add_files, read_manifest
from raywards.errors import CheckpointError
from raywards.preferences import REASONS
from raywards.train.card import draw_curves, hub_id, last_evaluation, write_card

pytestmark = pytest.mark.trains

SECRET = "hf_thisisasecret"


def as_text(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {side: row[side][0]["content"] + row[side][1]["content"] for side in row} for row in rows
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("somebody")
    tiny_qwen2(folder / "start", num_labels=None)
    template = json.loads((folder / "start" / "tokenizer_config.json").read_text())
    template = template.get("chat_template") or (folder / "start/chat_template.jinja").read_text()
    (folder / "my.jinja").write_text(template)
    return folder


def run(folder: Path, name: str, rows: list[dict[str, Any]], **changes: Any) -> RewardTrainer:
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "output_dir": str(folder / name),
        "num_workers": 0,
        "use_cpu": True,
        "bf16": False,
        "deepspeed": 0,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "on_bad_row": "drop",
        "disable_tqdm": True,
        "hub_token": SECRET,
        **changes,
    }
    held_out = {
        "near": datasets.Dataset.from_list(conversation_rows(9, seed=1)),
        "far": [datasets.Dataset.from_list(conversation_rows(5, seed=seed)) for seed in (2, 3)],
    }
    trainer = RewardTrainer(
        str(folder / "start"),
        RewardConfig(**settings),
        train_dataset=[str(file), datasets.Dataset.from_list(conversation_rows(8, seed=4))],
        eval_dataset=held_out if "eval_strategy" in changes else None,
    )
    trainer.train()
    return trainer


BAD = [{"chosen": "the same", "rejected": "the same"}, {"chosen": "alone"}]


@pytest.fixture(scope="module")
def chat(folder: Path) -> RewardTrainer:
    return run(
        folder,
        "chat-rm",
        [*conversation_rows(20), *BAD],
        eval_strategy="epoch",
        chat_template_path=str(folder / "my.jinja"),
        max_length=500,
    )


@pytest.fixture(scope="module")
def plain(folder: Path) -> RewardTrainer:
    return run(folder, "plain-rm", as_text(conversation_rows(30)), max_steps=2)


def card_of(trainer: RewardTrainer) -> str:
    return (trainer.paths.export / "README.md").read_text(encoding="utf-8")


def rows_of(card: str, section: str) -> list[list[str]]:
    """The rows of the tables of a section, heads and rules left out."""
    text = re.split(r"^#+ ", card.split(f"# {section}\n", 1)[1], flags=re.MULTILINE)[0]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    tables = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [
        row for row, after in zip(tables, [*tables, [""]][1:], strict=True)
        if not row[0].startswith("---") and not after[0].startswith("---")
    ]  # fmt: skip


def test_the_card_is_part_of_the_export(chat: RewardTrainer) -> None:
    manifest = read_manifest(chat.paths.export, kind="export")
    assert {"README.md", "curves.png"} <= manifest["files"].keys()
    Scorer.from_pretrained(chat.paths.export).verify()
    data = ModelCard.load(chat.paths.export / "README.md").data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["generated_from_trainer", "raywards", "reward-trainer"],
    }


def test_what_the_card_says_is_so(chat: RewardTrainer) -> None:
    card = card_of(chat)
    last = [record for record in chat.state.log_history if "eval_near_loss" in record][-1]
    held_out = {row[0]: row[1:] for row in rows_of(card, "Held-out results") if len(row) > 4}
    assert held_out.keys() == {"near", "far"}
    for name, row in held_out.items():
        assert float(row[0]) == last[f"eval_{name}_num_pairs"]
        for cell, metric in zip(row[1:4], ("accuracy", "loss", "log_loss"), strict=True):
            assert float(cell) == pytest.approx(last[f"eval_{name}_{metric}"], rel=1e-3)
    by_source = [row for row in rows_of(card, "Held-out results") if len(row) == 4]
    assert [row[:3] for row in by_source] == [
        ["far", f"`dataset[{i}]`, handed over in Python", "accuracy"] for i in (0, 1)
    ]
    scale = {row[0]: row[1:] for row in rows_of(card, "Rewards")}
    rewards = Scorer.from_pretrained(chat.paths.export).score(
        [row[side] for row in conversation_rows(9, seed=1) for side in ("chosen", "rejected")]
    )
    assert float(scale["near"][2]) == pytest.approx(min(rewards), rel=1e-3)
    assert float(scale["near"][3]) == pytest.approx(max(rewards), rel=1e-3)
    mean = sum(rewards) / len(rewards)
    spread = (sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) ** 0.5
    assert float(scale["near"][1]) == pytest.approx(spread, rel=1e-3)

    assert rows_of(card, "Data") == [
        ["`chat-rm.jsonl`", "20"],
        ["`dataset[1]`, handed over in Python", "8"],
        [REASONS["identical"], "1"],
        [REASONS["missing_field"], "1"],
    ]
    assert "30 rows gave 28 preference pairs. Left out:" in card
    settings = dict(rows_of(card, "Recipe"))
    assert settings["`learning_rate`"] == "`0.001`"
    assert settings["`max_length`"] == "`500`"
    assert settings["`chat_template_path`"] == "`my.jinja`"
    assert not {"`output_dir`", "`logging_steps`", "`seed`", "`hub_token`"} & settings.keys()
    assert f"{chat.state.global_step} optimizer steps" in card


def test_the_card_tells_nothing_private(chat: RewardTrainer, plain: RewardTrainer) -> None:
    for trainer in (chat, plain):
        card = card_of(trainer)
        assert SECRET not in card
        assert str(trainer.paths.storage) not in card
        assert "somebody" not in card
        assert not re.search(r"(?<![\w.:/])/(?!v1/)\w+/", card), "an absolute path"
        for row in conversation_rows(20):
            assert row["chosen"][0]["content"] not in card


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_the_examples_run_and_agree(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer: RewardTrainer = request.getfixturevalue(kind)
    monkeypatch.chdir(trainer.paths.storage)
    values = []
    blocks = re.findall(r"^```python\n(.*?)^```$", card_of(trainer), re.MULTILINE | re.DOTALL)
    for block in blocks:
        *lines, last = block.strip().splitlines()
        names: dict[str, Any] = {}
        exec("\n".join(lines), names)
        found = eval(last, names)
        values.append(found[0] if isinstance(found, list) else found)
    assert len(values) == 2
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    [request_body] = re.findall(r"-d '(.*)'", card_of(trainer))
    asked = json.loads(request_body)
    conversation = asked.get("messages") or asked["input"]
    assert Scorer.from_pretrained(trainer.paths.export).score([conversation]) == pytest.approx(
        values[:1], abs=1e-6
    )


def test_a_run_without_held_out_pairs_says_so(plain: RewardTrainer) -> None:
    assert "None: the run was not evaluated on held-out rows." in card_of(plain)
    assert rows_of(card_of(plain), "Rewards") == []


def test_a_card_of_a_regression_speaks_of_scores(folder: Path) -> None:
    rows = [
        {"text": row[side], "a": score, "b": -score}
        for row in conversation_rows(12)
        for side, score in (("chosen", 1.0), ("rejected", -1.0))
    ]
    trainer = RewardTrainer(
        str(folder / "start"),
        RewardConfig(
            output_dir=str(folder / "rated"),
            num_workers=0,
            use_cpu=True,
            bf16=False,
            deepspeed=0,
            objective="regression",
            attributes={"a": 0.75, "b": -0.25},
            freeze=["model.embed_tokens"],
            max_steps=2,
            logging_steps=1,
            eval_strategy="steps",
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(rows[:8]),
    )
    trainer.train()
    card = card_of(trainer)
    assert "on 24 rated texts, with" in card
    assert "estimates the score that people gave, summed over 0.75 x a, -0.25 x b." in card
    assert "sigmoid" not in card
    assert "Accuracy" not in card
    assert (
        "All weights but those that `freeze` names were trained with AdamW on the squared" in card
    )
    last = next(r for r in reversed(trainer.state.log_history) if "eval_mae" in r)
    parts = {tuple(row[1:3]): float(row[3]) for row in rows_of(card, "Held-out results")
             if len(row) == 4}  # fmt: skip
    for name in ("a", "b"):
        assert parts[name, "mean absolute error"] == pytest.approx(last[f"eval_mae/{name}"], 1e-3)
    [[_, _, spread, *_]] = rows_of(card, "Rewards")
    assert float(spread) == pytest.approx(last["eval_sd_reward"], rel=1e-3)


def test_the_figures_are_those_of_the_exported_weights(chat: RewardTrainer, tmp_path: Path) -> None:
    """As where the best of two evaluations was the first."""
    export = shutil.copytree(chat.paths.export, tmp_path / "export")
    manifest = json.loads((export / "raywards.json").read_text())
    first, last = (r for r in chat.state.log_history if "eval_near_loss" in r)
    assert manifest["training"]["last_step"] == last["step"]
    manifest["training"] |= {"step": first["step"], "peft_config": {}}
    manifest["training"]["settings"]["objective"] = "all_pairs"
    (export / "raywards.json").write_text(json.dumps(manifest))
    write_card(export, chat.state.log_history, name="rm", where="me/rm")
    card = (export / "README.md").read_text()
    assert f"After step {first['step']} (epoch 1):" in card
    row = next(row for row in rows_of(card, "Held-out results") if row[0] == "near")
    assert float(row[3]) == pytest.approx(first["eval_near_loss"], rel=1e-3)
    assert f"{first['step']} optimizer steps of up to 8 rankings" in card
    assert f"The run went on to step {last['step']}; the weights of its best evaluation" in card
    assert "Adapters (`peft_config` in `raywards.json`) and the head were trained" in card


def test_the_curves_are_a_picture_of_the_log(chat: RewardTrainer) -> None:
    stored = (chat.paths.export / "curves.png").read_bytes()
    history = chat.state.log_history
    with Image.open(io.BytesIO(stored)) as image:
        assert image.format == "PNG"
        assert image.width > 2 * image.height > 400
    assert stored == draw_curves(history)
    assert stored != draw_curves(history[:-2])  # without the last evaluation
    draw_curves([])


def test_names_of_the_hub_are_linked_and_paths_are_not(chat: RewardTrainer, tmp_path: Path) -> None:
    export = shutil.copytree(chat.paths.export, tmp_path / "export")
    manifest = json.loads((export / "raywards.json").read_text())
    training = manifest["training"]
    training["base_model"] = "Qwen/Qwen2.5-0.5B-Instruct"
    training["sources"] = {"trl-lib/ultrafeedback_binarized": 7, "/home/me/a.jsonl": 2}
    (export / "raywards.json").write_text(json.dumps(manifest))
    write_card(export, [], name="rm", where="me/rm", tags=["mine"])
    data = ModelCard.load(export / "README.md").data
    assert data.base_model == "Qwen/Qwen2.5-0.5B-Instruct"
    assert data.datasets == ["trl-lib/ultrafeedback_binarized"]
    assert "mine" in data.tags
    text = (export / "README.md").read_text()
    link = "(https://huggingface.co/datasets/trl-lib/ultrafeedback_binarized)"
    assert ["[trl-lib/ultrafeedback_binarized]" + link, "7"] in rows_of(text, "Data")
    assert ["`a.jsonl`", "2"] in rows_of(text, "Data")
    assert "trained from [Qwen/Qwen2.5-0.5B-Instruct](https://huggingface.co/Qwen/" in text
    names = ("gpt2", "a/b", "/a/b", "a/b/c", "b.jsonl", str(tmp_path))
    assert [hub_id(name) for name in names] == ["gpt2", "a/b", None, None, None, None]


def test_sets_whose_names_begin_alike_are_told_apart() -> None:
    record = {"step": 3, "eval_a_num_pairs": 1, "eval_a_loss": 2, "eval_a_b_num_pairs": 3,
              "eval_a_b_loss": 4}  # fmt: skip
    sets = {"eval_a": {"num_pairs": 1, "loss": 2}, "eval_a_b": {"num_pairs": 3, "loss": 4}}
    assert last_evaluation([record, {"step": 4, "loss": 1}], up_to=4) == (record, sets)
    later = {"step": 5, "eval_num_pairs": 3, "eval_loss": 1}
    assert last_evaluation([record, later], up_to=4) == (record, sets)


def test_the_methods_that_scripts_call_write_it_again(
    folder: Path, plain: RewardTrainer, tmp_path: Path
) -> None:
    plain.save_model()
    plain.create_model_card(model_name="Mine", dataset_name="org/pairs", tags="a-tag")
    for copy in (plain.paths.export, plain.paths.run):
        read_manifest(copy, kind="export")
        card = ModelCard.load(copy / "README.md")
        assert card.data.datasets == ["org/pairs"]
        assert "a-tag" in card.data.tags
        assert "\n# Mine\n" in card.content
    assert 'from_pretrained("plain-rm")' in (plain.paths.run / "README.md").read_text()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    write = Path.write_bytes

    def failing(path: Path, content: bytes) -> int:
        if path.name == "curves.png":
            write(path, content[:10])
            raise OSError(28, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", failing)
    yield
    monkeypatch.undo()


@pytest.mark.usefixtures("full_disk")
def test_a_card_that_cannot_be_written_costs_neither_run_nor_export(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = run(folder, "full", conversation_rows(8), max_steps=1)
    assert "no model card" in caplog.text
    read_manifest(trainer.paths.export, kind="export")
    Scorer.from_pretrained(trainer.paths.export).verify()
    with pytest.raises(OSError, match="No space"):
        add_files(trainer.paths.export, {"curves.png": b"x" * 20})
    read_manifest(trainer.paths.export, kind="export")


def test_a_card_needs_an_export(folder: Path) -> None:
    trainer = RewardTrainer(
        str(folder / "start"),
        RewardConfig(output_dir=str(folder / "never")),
        train_dataset=datasets.Dataset.from_list(conversation_rows(8)),
    )
    with pytest.raises(CheckpointError, match="no export yet"):
        trainer.create_model_card()
