"""Rankings, regression and attributes, from rows to export, in this process, without Ray."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from test_train_here import losses, run, same_weights, settings
from tiny import tiny_qwen2

from raywards import RewardConfig, RewardTrainer, Scorer
from raywards.checkpoint import complete_checkpoints, read_manifest
from raywards.errors import ConfigError, ModelError
from raywards.heads import FILE, fold_heads, restore_heads, widen_head
from raywards.model import RewardModel
from raywards.objectives import build_objective
from raywards.packing import pack_groups

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
    """Scores for one answer; a third of the rows lack one of the two attributes."""
    dice = random.Random(seed)
    rows = []
    for number in range(count):
        level, text = dice.randint(0, 4), ""
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


@pytest.mark.parametrize("case", CASES)
def test_every_objective_is_learned(case: str, model: Path, tmp_path: Path) -> None:
    make, changes = CASES[case]
    trainer = RewardTrainer(
        str(model),
        RewardConfig(
            **settings(
                tmp_path / "run",
                **changes,
                learning_rate=1e-2,
                num_train_epochs=6,
                eval_strategy="epoch",
                eval_on_start=True,
                logging_steps=6,
            )
        ),
        train_dataset=datasets.Dataset.from_list(make(64)),
        eval_dataset=datasets.Dataset.from_list(make(24, seed=1)),
    )
    result = trainer.train()
    for r in trainer.state.log_history: print(r)
    print(trainer.evaluate())
