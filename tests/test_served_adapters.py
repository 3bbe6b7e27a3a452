"""LoRA adapters over one base: each has the rewards that peft gives, and the base keeps its own."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dialects.talks import TALKS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from served import Served, served
from tiny import chatml_tokenizer, tiny_qwen2
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from raywards import Scorer
from raywards.config import ServeConfig
from raywards.errors import CheckpointError, ConfigError, ModelError

BOUND = 1e-5
# Of several lengths, two of them answers to one question.
MORE = [*TALKS, [*TALKS[0], {"role": "user", "content": "And of Spain? " * 20}, *TALKS[1][1:]]]


def made(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter that does something, with a head of its own, as `save_pretrained` writes it."""
    set_seed(seed)
    inner = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    config = LoraConfig(
        **{
            "r": 4,
            "target_modules": "all-linear",
            "task_type": "SEQ_CLS",
            "modules_to_save": ["score"],
            **settings,
        }
    )
    model = get_peft_model(inner, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@torch.inference_mode()
def of_peft(base: Path, adapter: Path) -> list[float]:
    """What a script gives that knows transformers and peft alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    inner = AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=1, dtype=torch.float32
    )
    model = PeftModel.from_pretrained(inner, adapter).eval()
    rewards = []
    for talk in MORE:
        text = tokenizer.apply_chat_template(talk, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        rewards.append(model(**ids).logits[0, 0].item())
    return rewards


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("base") / "rm")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_qwen2(tmp_path_factory.mktemp("lm") / "lm", num_labels=None)


ADAPTERS: dict[str, dict[str, Any]] = {
    "kind": {},
    "short": {"target_modules": ["q_proj", "down_proj"], "r": 2},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: made(base, folder / name, seed, **settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="module")
def expected(base: Path, adapters: dict[str, Path]) -> dict[str, list[float]]:
    found = {name: of_peft(base, folder) for name, folder in adapters.items()}
    found["rm"] = Scorer.from_pretrained(base).score(MORE)
    rounded = [tuple(round(reward, 3) for reward in rewards) for rewards in found.values()]
    assert len(set(rounded)) == len(rounded), "alike: proves nothing"
    return found


def test_each_scorer_has_its_rewards_and_the_base_its_bits(
    base: Path, adapters: dict[str, Path], expected: dict[str, list[float]]
) -> None:
    alone = Scorer.from_pretrained(base)
    scorer = Scorer.from_pretrained(base)
    with_each = {name: scorer.with_adapter(folder) for name, folder in adapters.items()}
    assert scorer.info["path"] == "packed"
    for _ in range(2):
        for name, one in with_each.items():
            assert one.score(MORE) == pytest.approx(expected[name], abs=BOUND)
            assert scorer.score(MORE) == alone.score(MORE)
    for name, one in with_each.items():
        one.verify()
        assert one.info["model"] == str(adapters[name])
        assert one.info["base_model"] == str(base)
    revisions = {one.info["revision"] for one in (scorer, *with_each.values())}
    assert len(revisions) == 4


def test_threads_get_their_own_adapters(
    base: Path, adapters: dict[str, Path], expected: dict[str, list[float]]
) -> None:
    scorer = Scorer.from_pretrained(base)
    scorers = {name: scorer.with_adapter(folder) for name, folder in adapters.items()}
    scorers["rm"] = scorer
    found: dict[str, list[list[float]]] = {name: [] for name in scorers}

    def ask(name: str) -> None:
        for _ in range(10):
            found[name].append(scorers[name].score(MORE))

    threads = [threading.Thread(target=ask, args=(name,)) for name in scorers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name, times in found.items():
        assert len(times) == 10
        for rewards in times:
            assert rewards == pytest.approx(expected[name], abs=BOUND)


def test_an_adapter_folder_brings_its_base(
    language_model: Path, tmp_path: Path
) -> None:
    """The usual case: the base is a language model, and the head is the adapter's."""
    one = made(language_model, tmp_path / "one", 1)
    two = made(language_model, tmp_path / "two", 2)
    scorer = Scorer.from_pretrained(one)
    other = scorer.with_adapter(two)
    for found, folder in ((scorer, one), (other, two), (scorer, one)):
        assert found.score(MORE) == pytest.approx(of_peft(language_model, folder), abs=BOUND)
