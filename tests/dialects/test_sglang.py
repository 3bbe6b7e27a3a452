"""SGLang's routes, as its documents and sources have them.

Bodies of https://docs.sglang.io/docs/supported-models/reward_models and classify_models; fields of
python/sglang/srt/entrypoints/openai/protocol.py and srt/managers/io_struct.py, as of 2026.
"""

from __future__ import annotations

import base64
import struct
from typing import Any

import pytest
from contract import RENDERED, is_ignored, is_refused, shape
from served import Served
from talks import ANSWERS, QUESTION, TALKS

from raywards.serve.dialects import sglang

USAGE = {"prompt_tokens": "int", "total_tokens": "int"}
ENTRY = {
    "embedding": ["float"],
    "meta_info": {"id": "str", "prompt_tokens": "int", "e2e_latency": "float"},
}


def test_its_own_classify_answers_with_an_embedding_of_one(
    rm: Served, rendered: list[str], rewards: list[float]
) -> None:
    # The documented request: rendered conversations under `text`.
    many = rm.post("/classify", {"text": rendered})
    assert shape(many) == [ENTRY]
    assert [one["embedding"][0] for one in many] == pytest.approx(rewards, abs=1e-5)
    one = rm.post("/classify", {"text": rendered[0]})
    assert shape(one) == ENTRY
    assert one["embedding"] == pytest.approx(rewards[:1], abs=1e-5)
    assert one["meta_info"]["prompt_tokens"] == len(rm.scorer.encode(TALKS[0]))
    assert shape(rm.post("/classify", {"text": rendered[:1]})) == [ENTRY]


def test_its_own_classify_takes_ids(rm: Served, rewards: list[float]) -> None:
    ids = [rm.scorer.encode(talk) for talk in TALKS]
    many = rm.post("/classify", {"input_ids": ids})
    assert [one["embedding"][0] for one in many] == pytest.approx(rewards, abs=1e-5)
    one = rm.post("/classify", {"input_ids": ids[0]})
    assert one["embedding"] == pytest.approx(rewards[:1], abs=1e-5)


def test_the_callers_names_come_back(rm: Served) -> None:
    one = rm.post("/classify", {"text": RENDERED, "rid": "mine"})
    assert one["meta_info"]["id"] == "mine"
    two = rm.post("/classify", {"text": ["a", "b"], "rid": ["first", "second"]})
    assert [entry["meta_info"]["id"] for entry in two] == ["first", "second"]
    is_refused(rm, "/classify", {"text": ["a", "b"]}, "rid", ["first"])
    assert rm.post("/v1/embeddings", {"input": RENDERED, "rid": "mine"})["data"]


def test_embeddings_read_as_openais(rm: Served, rendered: list[str], rewards: list[float]) -> None:
    reply = rm.post("/v1/embeddings", {"model": "rm", "input": rendered})
    entry = {"object": "str", "index": "int", "embedding": ["float"]}
    assert shape(reply) == {"object": "str", "model": "str", "data": [entry], "usage": USAGE}
    assert reply["object"] == "list"
    assert reply["data"][0]["object"] == "embedding"
    assert reply["data"][-1]["embedding"][-1] == pytest.approx(rewards[-1], abs=1e-5)  # as verl
    packed = rm.post("/v1/embeddings", {"input": rendered, "encoding_format": "base64"})
    found = [struct.unpack("<f", base64.b64decode(one["embedding"]))[0] for one in packed["data"]]
    assert found == [one["embedding"][0] for one in reply["data"]]


def test_scores_are_lists_of_one(rm: Served, rewards: list[float]) -> None:
    body = {"query": QUESTION, "items": ANSWERS, "model": "rm", "apply_softmax": False}
    reply = rm.post("/v1/score", body | {"item_first": False})
    assert shape(reply) == {
        "object": "str",
        "scores": [["float"]],
        "model": "str",
        "usage": USAGE,
    }
    assert [score for [score] in reply["scores"]] == pytest.approx(rewards, abs=1e-5)
    [[alone]] = rm.post("/score", {"query": QUESTION, "items": ANSWERS[0]})["scores"]
    assert alone == pytest.approx(rewards[0], abs=1e-5)


def test_no_route_of_it_has_an_activation(classifier: Served, rewards: list[float]) -> None:
    one = classifier.post("/classify", {"text": RENDERED})["embedding"]
    [entry] = classifier.post("/v1/embeddings", {"input": RENDERED})["data"]
    assert one == entry["embedding"] == pytest.approx(rewards[:1], abs=1e-5)
    [[score]] = classifier.post("/v1/score", {"query": QUESTION, "items": ANSWERS[:1]})["scores"]
    assert score == pytest.approx(rewards[0], abs=1e-5)


PATHS = {
    "/classify": {"text": RENDERED},
    "/v1/embeddings": {"input": RENDERED},
    "/v1/score": {"query": QUESTION, "items": ANSWERS},
}


@pytest.mark.parametrize("path", PATHS)
def test_what_is_ignored_and_what_is_refused(path: str, rm: Served) -> None:
    for name in sglang.IGNORED:
        is_ignored(rm, path, PATHS[path], name, "someone")
    for name in sglang.NOT_BUILT:
        is_refused(rm, path, PATHS[path], name, [1])
    # Fields that it has, and that have no meaning for one reward.
    for name in ("embed_overrides", "return_pooled_hidden_states", "modalities"):
        is_refused(rm, path, PATHS[path], name, True)


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("/classify", "priority", 3),
        ("/classify", "input_ids", [1, 2]),
        ("/classify", "messages", TALKS[0]),
        ("/v1/embeddings", "priority", 3),
        ("/v1/embeddings", "encoding_format", "bytes"),
        ("/v1/score", "apply_softmax", True),
        ("/v1/score", "item_first", True),
        ("/v1/score", "items", []),
        ("/v1/score", "items", [[1, 2]]),
        ("/v1/score", "query", ""),
    ],
)
def test_what_would_change_the_reward_is_refused(
    path: str, name: str, value: Any, rm: Served
) -> None:
    status, reply = rm.refused(path, {**PATHS[path], name: value})
    assert status == 400
    assert name in reply["error"]["message"]


@pytest.mark.parametrize("text", ["", "   ", [], [""], [["a"]], [["a", "b", "c"]], 3])
def test_blank_text_is_refused_as_there(text: Any, rm: Served) -> None:
    assert rm.refused("/classify", {"text": text})[0] == 400
    assert rm.refused("/v1/classify", {"input": text})[0] == 400


def test_its_v1_classify_gives_a_reward_and_not_the_softmax_of_one(
    rm: Served, rewards: list[float]
) -> None:
    """SGLang issue 19709: there it is always 1."""
    [entry] = rm.post("/v1/classify", {"model": "rm", "input": RENDERED, "user": "u"})["data"]
    assert entry["probs"] == pytest.approx(rewards[:1], abs=1e-5)


def test_a_response_may_be_empty(rm: Served) -> None:
    """A policy that ends at once has said nothing, and that has a reward."""
    [expected] = rm.scorer.score([[TALKS[0][0], {"role": "assistant", "content": ""}]])
    for items in ("", [""]):
        [[score]] = rm.post("/v1/score", {"query": QUESTION, "items": items})["scores"]
        assert score == pytest.approx(expected, abs=1e-5)
    [pair] = rm.post("/classify", {"text": [[QUESTION, ""]]})
    assert pair["embedding"] == pytest.approx([expected], abs=1e-5)
    assert rm.refused("/classify", {"text": [["", "a"]]})[0] == 400
