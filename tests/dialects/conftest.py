"""Servers for all dialects: raw, with an activation, guarded by a key, full, late and broken."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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


class Gate:
    """Holds up the forward of a running server, until it is opened."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self._open = threading.Event()
        score_ids = server.scorer.score_ids

        def held(sequences: Any, **options: Any) -> list[float]:
            assert self._open.wait(60)
            return score_ids(sequences, **options)

        server.scorer.score_ids = held  # type: ignore[method-assign]

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@contextmanager
def filled(gate: Gate) -> Iterator[None]:
    """The queue of a server with room for 200 tokens is full, until the gate is opened."""
    gate.close()
    with ThreadPoolExecutor(2) as others:
        asked = []
        for tokens in (150, 190):  # one in the forward, one that waits
            body = {"input_ids": [5 + len(asked)] * tokens}
            asked.append(others.submit(gate.server.http.post, "/v1/reward", json=body))
            while gate.server.http.get("/info").json()["batcher"]["queued_tokens"] < tokens:
                assert not asked[-1].done(), asked[-1].result().text
                if tokens == 150:  # it has been taken from the queue
                    time.sleep(0.2)
                    break
                time.sleep(0.01)
        try:
            yield
        finally:
            gate.open()
        assert [one.result().status_code for one in asked] == [200, 200]


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

        running.scorer.score_ids = fails  # type: ignore[method-assign]
        yield running


KEY = "the-key-of-all-clients"


@pytest.fixture(scope="session")
def guarded(folder: Path) -> Iterator[Served]:
    """A server with a key, and few items a request."""
    with served(folder, api_key=KEY, max_items_per_request=8) as running:
        yield running
