"""Servers for all dialects: raw, with an activation, guarded by a key, full, late and broken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gates import KEY, Gate
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


@pytest.fixture(scope="session")
def small(folder: Path) -> Iterator[Gate]:
    """A server with room for 200 tokens in its queue."""
    with served(folder, max_queued_tokens=200) as running:
        gate = Gate(running)
        gate.open()
        yield gate


@pytest.fixture(scope="session")
def late(folder: Path) -> Iterator[Served]:
    """A server that never scores anything in time."""
    with served(folder, request_timeout_s=0.2) as running:
        gate = Gate(running)
        yield running
        gate.open()


@pytest.fixture(scope="session")
def broken(folder: Path) -> Iterator[Served]:
    """A server whose model fails."""
    with served(folder) as running:

        def fails(sequences: Any, **options: Any) -> list[float]:
            raise RuntimeError("the model failed")

        running.scorer.score_encoded = fails  # type: ignore[method-assign]
        yield running


@pytest.fixture(scope="session")
def guarded(folder: Path) -> Iterator[Served]:
    """A server with a key, and few items a request."""
    with served(folder, api_key=KEY, max_items_per_request=8) as running:
        yield running
