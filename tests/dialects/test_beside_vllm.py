"""The same bodies get the same replies from vLLM's own server: the contract, from its other side.

Runs where RAYWARDS_VLLM_PYTHON names an interpreter that has vLLM:

    RAYWARDS_VLLM_PYTHON=/path/to/python python -m pytest -s tests/dialects/test_beside_vllm.py
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from contract import shape
from exports import exported
from ports import free_port
from served import Served, served
from talks import ANSWERS, QUESTION, TALKS

PYTHON = os.environ.get("RAYWARDS_VLLM_PYTHON")
BOS = "<|begin_of_text|>"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="RAYWARDS_VLLM_PYTHON names no interpreter"),
]


@contextmanager
def vllm_serving(folder: Path, log: Path) -> Iterator[httpx.Client]:
    port = free_port()
    command = [
        *(str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--served-model-name", "rm", "--runner", "pooling", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env = kept | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (
        log.open("w") as out,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http,
    ):
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 240
            while True:
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                try:
                    if http.get("/health").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.5)
            yield http
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


class Beside:
    """vLLM's server and ours on the same folder."""

    def __init__(self, vllm: httpx.Client, ours: Served, family: str) -> None:
        self.vllm, self.ours, self.family = vllm, ours, family
        self.tokenizer = ours.scorer._rendering.tokenizer
        self.farthest = 0.0

    def ask(self, path: str, body: Any) -> tuple[httpx.Response, httpx.Response]:
        return self.vllm.post(path, json=body), self.ours.http.post(path, json=body)


@pytest.fixture(scope="module", params=["llama", "qwen-classifier"])
def beside(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Beside]:
    base = tmp_path_factory.mktemp("vllm")
    family = request.param.partition("-")[0]
    folder = exported(base / "export", family)
    if request.param != family:  # a folder that says nothing of regression
        config = json.loads((folder / "config.json").read_text())
        del config["problem_type"]
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "raywards.json").unlink()
    with vllm_serving(folder, base / "vllm.log") as vllm, served(folder) as ours:
        found = Beside(vllm, ours, request.param)
        yield found
        print(f"\n{request.param}: farthest score from vLLM's {found.farthest:.2g}")


def bodies(beside: Beside) -> list[tuple[str, dict[str, Any]]]:
    texts = [beside.tokenizer.apply_chat_template(talk, tokenize=False) for talk in TALKS]
    # As verl sends it: vLLM puts the BOS.
    bare = [text.removeprefix(BOS) for text in texts]
    ids = [beside.ours.scorer.encode(talk) for talk in TALKS]
    cut = {"input": ids[0], "truncate_prompt_tokens": 7}
    given: list[dict[str, Any]] = [
        {"model": "rm", "input": bare},
        {"input": bare[0], "user": "u", "cache_salt": "s", "priority": 0},
        {"input": texts, "add_special_tokens": False},
        {"input": bare[1], "use_activation": False},
        {"input": bare[1], "use_activation": True},
        {"input": bare[1], "use_activation": None},
        {"input": ids},
        {"input": ids[2]},
        {"input": bare[0], "truncate_prompt_tokens": -1},
        cut,
        cut | {"truncation_side": "left"},
        cut | {"truncation_side": "right"},
        *({"messages": talk} for talk in TALKS),
        {"messages": TALKS[0], "add_generation_prompt": False, "add_special_tokens": False},
    ]
    return [(path, body) for path in ("/classify", "/pooling") for body in given]


def scores_of(reply: Any) -> list[float]:
    return [float((entry.get("probs") or entry["data"])[0]) for entry in reply["data"]]


def test_the_same_bodies_give_the_same_replies(beside: Beside) -> None:
    asked = bodies(beside)
    assert len(asked) > 30
    seen = set()
    for path, body in asked:
        theirs, ours = beside.ask(path, body)
        assert theirs.status_code == ours.status_code == 200, (body, theirs.text, ours.text)
        one, other = theirs.json(), ours.json()
        assert shape(one) == shape(other)
        assert re.sub(r"-.*", "", one["id"]) == re.sub(r"-.*", "", other["id"])
        for reply in (one, other):
            reply.pop("id")
            reply.pop("created")
        found, expected = scores_of(other), scores_of(one)
        beside.farthest = max(
            beside.farthest, *(abs(a - b) for a, b in zip(found, expected, strict=True))
        )
        assert found == pytest.approx(expected, abs=1e-5), body
        seen.update(round(score, 3) for score in expected)
        for reply in (one, other):
            for entry in reply["data"]:
                entry.pop("probs", None)
                entry.pop("data", None)
        assert one == other, body
    assert len(seen) >= len(TALKS) + 2, "all the same: proves nothing"


def test_what_it_refuses_we_refuse_with_the_same_status_and_shape(beside: Beside) -> None:
    good = {"input": "Good."}
    for path, body in (
        ("/classify", {}),
        ("/classify", {"input": []}),
        ("/classify", good | {"model": "another"}),
        ("/classify", good | {"normalize": True}),
        ("/classify", good | {"truncate_prompt_tokens": 0}),
        ("/classify", good | {"truncate_prompt_tokens": -2}),
        ("/classify", good | {"truncate_prompt_tokens": 99_999}),
        ("/classify", {"input": "Good. " * 5000}),
        ("/classify", {"messages": TALKS[0], "chat_template": "{{ messages }}"}),
        (
            "/classify",
            {
                "messages": TALKS[0],
                "add_generation_prompt": True,
                "continue_final_message": True,
            },
        ),
        ("/pooling", good | {"task": "embed"}),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}),
        ("/score", {"text_1": "a"}),
    ):
        theirs, ours = beside.ask(path, body)
        assert theirs.status_code == ours.status_code, (body, theirs.text, ours.text)
        assert set(theirs.json()["error"]) == set(ours.json()["error"])
        assert theirs.json()["error"]["code"] == ours.json()["error"]["code"]
        assert theirs.headers["content-type"] == ours.headers["content-type"]


def test_scores_and_ranks_have_the_same_shape(beside: Beside) -> None:
    """Not the same numbers: without a chat template, vLLM puts one text behind the other."""
    for body in (
        {"text_1": QUESTION, "text_2": ANSWERS},
        {"queries": [QUESTION] * 3, "documents": ANSWERS},
        {"data_1": QUESTION, "data_2": ANSWERS[0]},
        {"queries": QUESTION, "items": ANSWERS, "request_id": "mine"},
    ):
        theirs, ours = (reply.json() for reply in beside.ask("/score", body))
        assert shape(theirs) == shape(ours)
        if "request_id" in body:
            assert theirs["id"] == ours["id"]
    for path in ("/rerank", "/v1/rerank"):
        theirs, ours = (
            reply.json() for reply in beside.ask(path, {"query": QUESTION, "documents": ANSWERS})
        )
        wanted = shape(theirs)
        assert {name: shape(ours)[name] for name in wanted} == wanted


def test_what_differs_is_what_the_documents_say(beside: Beside) -> None:
    """docs/dialects.md: it lets unknown fields pass, and gives a rendered text a second BOS."""
    theirs, ours = beside.ask("/classify", {"input": "Good.", "use_activaton": False})
    assert (theirs.status_code, ours.status_code) == (200, 400)
    theirs, ours = beside.ask("/classify", {"input": ""})
    assert (theirs.status_code, ours.status_code) == (200 if beside.family == "llama" else 400, 400)
    if beside.family == "llama":
        text = beside.tokenizer.apply_chat_template(TALKS[0], tokenize=False)
        theirs, ours = beside.ask("/classify", {"input": text})
        tokens = [reply.json()["usage"]["prompt_tokens"] for reply in (theirs, ours)]
        assert tokens[0] == tokens[1] + 1
        plain = beside.ours.scorer.score(TALKS[:1])
        assert scores_of(ours.json()) == pytest.approx(plain, abs=1e-5)
