"""One server for all dialects: a model that says regression, and the same one that does not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served, served
from talks import TALKS
from tiny import tiny_qwen2


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tiny_qwen2(tmp_path_factory.mktemp("dialects") / "rm")
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | {"problem_type": "regression"}))
    return made


@pytest.fixture(scope="session")
def rm(folder: Path) -> Iterator[Served]:
    """A raw reward is its score: as our exports say, `problem_type` is regression."""
    with served(folder) as running:
        yield running


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Iterator[Served]:
    """The same weights, without a word of regression: engines take the sigmoid."""
    copy = tmp_path_factory.mktemp("classifier") / "rm"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    config = json.loads((copy / "config.json").read_text())
    del config["problem_type"]
    (copy / "config.json").write_text(json.dumps(config | {"id2label": {"0": "GOOD"}}))
    with served(copy) as running:
        yield running


@pytest.fixture(scope="session")
def rendered(rm: Served) -> list[str]:
    """The conversations, rendered as a trainer would."""
    tokenizer = rm.scorer._rendering.tokenizer
    return [tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]


@pytest.fixture(scope="session")
def rewards(rm: Served) -> list[float]:
    """What every route must give."""
    found = rm.scorer.score(TALKS)
    assert len({round(reward, 4) for reward in found}) == len(found), "all the same: proves nothing"
    return found
