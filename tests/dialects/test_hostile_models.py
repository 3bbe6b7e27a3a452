"""Model folders that would serve wrong rewards: refused when a replica loads them, with the fix."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import exported
from safetensors.torch import load_file, save_file
from served import Served, served
from talks import TALKS
from tiny import chatml_tokenizer, tiny_qwen2

from raywards.config import ServeConfig
from raywards.errors import CheckpointError, ModelError, RaywardsError
from raywards.serve.replica import load

Poison = Callable[[Path], None]


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Poison:
    def poison(folder: Path) -> None:
        file = folder / "model.safetensors"
        held = load_file(file)
        change(held)
        save_file(held, file, metadata={"format": "pt"})

    return poison


def fill(name: str, value: float) -> Poison:
    def change(held: dict[str, torch.Tensor]) -> None:
        held[name].view(-1)[:1] = value

    return weights(change)


def in_json(file: str, **values: Any) -> Poison:
    def poison(folder: Path) -> None:
        about = json.loads((folder / file).read_text())
        about.update(values)
        (folder / file).write_text(json.dumps(about))

    return poison


def cut(file: str) -> Poison:
    def poison(folder: Path) -> None:
        whole = (folder / file).read_bytes()
        (folder / file).write_bytes(whole[: len(whole) // 2])

    return poison


def drop(*files: str) -> Poison:
    def poison(folder: Path) -> None:
        for file in files:
            (folder / file).unlink(missing_ok=True)

    return poison


def add_tokens(folder: Path) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.add_tokens([f"<extra{n}>" for n in range(200)])
    tokenizer.save_pretrained(folder)


# Of a folder that somebody else made: there is no manifest that would tell.
FOREIGN: dict[str, tuple[Poison, str]] = {
    "a head with NaN": (fill("score.weight", float("nan")), "is nan"),
    "a head with infinity": (fill("score.weight", float("inf")), "is inf"),
    "a layer with NaN": (fill("model.layers.0.mlp.up_proj.weight", float("nan")), "is nan"),
    "no head": (weights(lambda held: held.pop("score.weight")), "score.weight"),
    "two labels": (in_json("config.json", num_labels=2, id2label={"0": "A", "1": "B"}), "label"),
    "no config": (drop("config.json"), "config.json"),
    "half a config": (cut("config.json"), "config.json"),
    "no weights": (drop("model.safetensors"), "model.safetensors"),
    "half the weights": (cut("model.safetensors"), "cannot be loaded"),
    "no tokenizer": (drop("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "code of its own": (
        in_json(
            "config.json",
            model_type="mine",
            auto_map={"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.M"},
        ),
        "trust_remote_code",
    ),
    "a language model": (in_json("config.json", architectures=["Qwen2ForCausalLM"]), "head"),
}
EXPORTED: dict[str, tuple[Poison, str]] = {
    "another head": (fill("score.weight", 3.0), "not what was exported"),
    "a head with NaN": (fill("score.weight", float("nan")), "is nan"),
    "another template": (
        in_json("tokenizer_config.json", chat_template="{{ 1 }}"),
        "tokenizer_config.json",
    ),
    "half a manifest": (cut("raywards.json"), "raywards.json"),
    "a manifest of tomorrow": (in_json("raywards.json", format=99), "newer"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("sound")
    folders = {"foreign": tiny_qwen2(base / "foreign"), "exported": exported(base / "e", "qwen")}
    for folder in folders.values():
        load(ServeConfig(model=str(folder)))
    return folders


@pytest.mark.parametrize("name", FOREIGN)
def test_a_poisoned_model_is_refused(name: str, sound: dict[str, Path], tmp_path: Path) -> None:
    poison, word = FOREIGN[name]
    is_refused(poison, word, shutil.copytree(sound["foreign"], tmp_path / "rm"))


@pytest.mark.parametrize("name", EXPORTED)
def test_a_poisoned_export_is_refused(name: str, sound: dict[str, Path], tmp_path: Path) -> None:
    poison, word = EXPORTED[name]
    is_refused(poison, word, shutil.copytree(sound["exported"], tmp_path / "rm"))


def is_refused(poison: Poison, word: str, folder: Path) -> None:
    poison(folder)
    with pytest.raises((ModelError, CheckpointError)) as refused:
        load(ServeConfig(model=str(folder)))
    told = str(refused.value)
    assert word in told, told
    assert str(folder) in told, told
    assert len(told) < 1000


def test_a_model_without_a_template_scores_what_is_rendered(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    """And says so where it is asked for more."""
    folder = shutil.copytree(sound["foreign"], tmp_path / "rm")
    drop("chat_template.jinja")(folder)
    about = json.loads((folder / "tokenizer_config.json").read_text())
    about.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    with served(folder) as server:
        assert isinstance(server.post("/v1/reward", {"input": "a"})["data"][0]["reward"], float)
        for path in ("/v1/reward", "/classify", "/v1/chat/completions"):
            status, reply = server.refused(path, {"messages": TALKS[0]})
            assert status in (400, 422)
            assert "template" in reply["error"]["message"]


def test_what_the_template_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    """One that wants user and assistant in turns, and no system message."""
    user, assistant = TALKS[0]
    with served(exported(tmp_path / "llama", "llama")) as server:
        before = rewards_of(server)
        for talk in (
            [user, assistant, assistant],
            [assistant],
            [{"role": "system", "content": "Be kind."}, user, assistant],
            [user, {"role": "tool", "content": "3"}, assistant],
        ):
            for path in ("/v1/reward", "/classify", "/pooling", "/v1/chat/completions"):
                status, reply = server.refused(path, {"messages": talk})
                assert status in (400, 422)
                assert "must alternate" in reply["error"]["message"]
        assert rewards_of(server) == pytest.approx(before, abs=1e-5)


def test_words_that_the_model_has_no_embedding_for_are_refused(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    """A tokenizer may have more than the model, as long as nobody says them."""
    folder = shutil.copytree(sound["foreign"], tmp_path / "rm")
    add_tokens(folder)
    with served(folder) as server, served(sound["foreign"]) as before:
        assert rewards_of(server) == pytest.approx(rewards_of(before), abs=1e-5)
        for body in ({"input": "a <extra5>"}, {"messages": [*TALKS[0][:1], say("<extra5>")]}):
            status, reply = server.refused("/v1/reward", body)
            assert (status, reply["error"]["code"]) == (422, "not_in_vocabulary")
        assert rewards_of(server) == pytest.approx(rewards_of(before), abs=1e-5)


def say(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_a_model_without_a_pad_token_scores_many_at_once(
    sound: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(sound["foreign"], tmp_path / "rm")
    in_json("config.json", pad_token_id=None)(folder)
    with served(folder) as server, served(sound["foreign"]) as padded:
        found = [rewards_of(one) for one in (server, padded)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def rewards_of(server: Served) -> list[float]:
    return [row["reward"] for row in server.post("/v1/reward", {"messages": TALKS})["data"]]


def test_whatever_it_is_the_error_is_ours(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for model in (str(tmp_path), str(loop), "/dev/null", "", "..", "no/such/model", "\x00"):
        with pytest.raises(RaywardsError):
            load(ServeConfig(model=model))
