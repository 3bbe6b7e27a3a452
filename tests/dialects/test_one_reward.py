"""One conversation, one reward: through every route, as its dialect writes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
from served import Served
from talks import ANSWERS, QUESTION, TALKS

from raywards.client import RewardClient
from raywards.serve.http import ROUTES


class Way(NamedTuple):
    """How a route is asked for rewards of rendered texts, and where they stand in its reply."""

    path: str
    body: Callable[[list[str]], Any]
    rewards: Callable[[Any], list[float]]


def ranked(field: str) -> Callable[[Any], list[float]]:
    """Scores by position, from a list that is sorted by them."""

    def found(rows: Any) -> list[float]:
        values = [row[field] for row in rows]
        assert values == sorted(values, reverse=True)
        return [row[field] for row in sorted(rows, key=lambda row: row["index"])]

    return found


def of_data(field: str) -> Callable[[Any], list[float]]:
    def found(reply: Any) -> list[float]:
        assert [row["index"] for row in reply["data"]] == [0, 1, 2]
        values = [row[field] for row in reply["data"]]
        return [value[0] if isinstance(value, list) else value for value in values]

    return found


MANY = [
    Way("/v1/reward", lambda texts: {"messages": TALKS}, of_data("reward")),
    Way("/v1/reward", lambda texts: {"prompt": QUESTION, "responses": ANSWERS}, of_data("score")),
    Way("/v1/reward", lambda texts: {"input": texts}, of_data("reward")),
    Way("/get_reward", lambda texts: {"query": texts, "prompts": texts, "labels": [None] * 3},
        lambda reply: reply["rewards"]),
    Way("/classify", lambda texts: {"input": texts}, of_data("probs")),
    Way("/classify", lambda texts: {"input": texts, "use_activation": False}, of_data("probs")),
    Way("/classify", lambda texts: {"input": texts, "activation": False}, of_data("probs")),
    Way("/v1/classify", lambda texts: {"input": texts}, of_data("probs")),
    Way("/pooling", lambda texts: {"input": texts, "task": "classify"}, of_data("data")),
    *(
        Way(path, lambda texts, l=left, r=right: {l: QUESTION, r: ANSWERS}, of_data("score"))  # noqa: E741
        for path in ("/score", "/v1/score")
        for left, right in (
            ("text_1", "text_2"), ("queries", "documents"), ("queries", "items"),
            ("data_1", "data_2"),
        )
    ),
    Way("/score", lambda texts: {"text_1": [QUESTION] * 3, "text_2": ANSWERS}, of_data("score")),
    Way("/v1/score", lambda texts: {"query": QUESTION, "items": ANSWERS},
        lambda reply: [score for [score] in reply["scores"]]),
    Way("/classify", lambda texts: {"text": texts},
        lambda reply: [one["embedding"][0] for one in reply]),
    Way("/classify", lambda texts: {"text": [[QUESTION, answer] for answer in ANSWERS]},
        lambda reply: [one["embedding"][0] for one in reply]),
    Way("/v1/embeddings", lambda texts: {"model": "rm", "input": texts}, of_data("embedding")),
    *(
        Way(path, lambda texts: {"inputs": [[text] for text in texts], "raw_scores": True},
            lambda reply: [one["score"] for [one] in reply])
        for path in ("/predict", "/", "/invocations")
    ),
    Way("/predict", lambda texts: {"inputs": [[QUESTION, a] for a in ANSWERS], "raw_scores": True},
        lambda reply: [one["score"] for [one] in reply]),
    Way("/rerank", lambda texts: {"query": QUESTION, "texts": ANSWERS, "raw_scores": True},
        ranked("score")),
    *(
        Way(path, lambda texts: {"query": QUESTION, "documents": ANSWERS, "raw_scores": True},
            lambda reply: ranked("relevance_score")(reply["results"]))
        for path in ("/rerank", "/v1/rerank", "/v2/rerank")
    ),
]  # fmt: skip


@pytest.mark.parametrize("way", MANY, ids=[f"{n}-{way.path}" for n, way in enumerate(MANY)])
def test_a_batch_has_the_rewards_of_the_scorer(
    way: Way, rm: Served, rendered: list[str], rewards: list[float]
) -> None:
    found = way.rewards(rm.post(way.path, way.body(rendered)))
    assert found == pytest.approx(rewards, abs=rm.scorer.info["bound"] or 1e-5)


ONE = [
    Way("/v1/reward", lambda text: {"messages": TALKS[0]}, lambda r: [r["data"][0]["reward"]]),
    Way("/get_reward", lambda text: {"query": text}, lambda r: r["rewards"]),
    Way("/classify", lambda text: {"messages": TALKS[0]}, lambda r: r["data"][0]["probs"]),
    Way("/classify", lambda text: {"model": "rm", "input": text, "use_activation": False},
        lambda r: [r["data"][-1]["probs"][-1]]),
    Way("/pooling", lambda text: {"messages": TALKS[0]}, lambda r: r["data"][0]["data"]),
    Way("/classify", lambda text: {"text": text}, lambda r: r["embedding"]),
    Way("/v1/embeddings", lambda text: {"model": "rm", "input": text},
        lambda r: [r["data"][-1]["embedding"][-1]]),
    Way("/predict", lambda text: {"inputs": text, "raw_scores": True}, lambda r: [r[0]["score"]]),
    Way("/predict", lambda text: {"inputs": [QUESTION, ANSWERS[0]], "raw_scores": True},
        lambda r: [r[0]["score"]]),
    Way("/remote_rm", lambda text: {"prompt": TALKS[0][:1], "response": ANSWERS[0], "label": 7},
        lambda r: [r]),
    Way("/remote_rm", lambda text: {"prompt": text[:20], "response": text[20:], "label": None},
        lambda r: [r]),
    Way("/remote_rm?dict=1", lambda text: {"prompt": text[:20], "response": text[20:]},
        lambda r: [r["reward"]]),
    Way("/v1/chat/completions", lambda text: {"model": "rm", "messages": TALKS[0]},
        lambda r: [r["choices"][0]["logprobs"]["content"][0]["logprob"]]),
    Way("/v1/chat/completions", lambda text: {"model": "rm", "messages": TALKS[0]},
        lambda r: [float(r["choices"][0]["message"]["content"].removeprefix("reward:"))]),
]  # fmt: skip


@pytest.mark.parametrize("way", ONE, ids=[f"{n}-{way.path}" for n, way in enumerate(ONE)])
def test_a_single_conversation_has_the_reward_of_the_scorer(
    way: Way, rm: Served, rendered: list[str], rewards: list[float]
) -> None:
    [found] = way.rewards(rm.post(way.path, way.body(rendered[0])))  # type: ignore[arg-type]
    assert found == pytest.approx(rewards[0], abs=rm.scorer.info["bound"] or 1e-5)


def test_every_route_was_asked() -> None:
    asked = {way.path.partition("?")[0] for way in (*MANY, *ONE)}
    assert asked == {route.path for route in ROUTES}


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.mark.parametrize(
    ("path", "body", "found"),
    [
        ("/classify", {"messages": TALKS[0]}, lambda r: r["data"][0]["probs"][0]),
        ("/pooling", {"messages": TALKS[0]}, lambda r: r["data"][0]["data"][0]),
        ("/score", {"text_1": QUESTION, "text_2": ANSWERS[0]}, lambda r: r["data"][0]["score"]),
        ("/predict", {"inputs": [QUESTION, ANSWERS[0]]}, lambda r: r[0]["score"]),
        ("/rerank", {"query": QUESTION, "texts": ANSWERS[:1]}, lambda r: r[0]["score"]),
        (
            "/rerank",
            {"query": QUESTION, "documents": ANSWERS[:1]},
            lambda r: r["results"][0]["relevance_score"],
        ),
        (
            "/get_reward?scores=sigmoid",
            {"query": "<|im_start|>"},
            lambda r: r["scores"][0] - sigmoid(r["rewards"][0]) + 0.5,
        ),
    ],
)
def test_where_a_dialect_has_an_activation_it_is_the_sigmoid(
    path: str, body: Any, found: Callable[[Any], float], classifier: Served, rewards: list[float]
) -> None:
    expected = 0.5 if "get_reward" in path else sigmoid(rewards[0])
    assert found(classifier.post(path, body)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("old", ["activation", "softmax", "use_activation"])
def test_the_raw_reward_can_be_asked_for_under_every_name(
    old: str, classifier: Served, rewards: list[float]
) -> None:
    reply = classifier.post("/classify", {"messages": TALKS[0], old: False})
    assert reply["data"][0]["probs"][0] == pytest.approx(rewards[0], abs=1e-5)
    assert reply["data"][0]["label"] == "GOOD"


def test_the_client_has_the_same_rewards_in_each_of_its_ways(
    rm: Served, rendered: list[str], rewards: list[float]
) -> None:
    pairs = [(QUESTION, answer) for answer in ANSWERS]
    with RewardClient(rm.url) as client:
        ids = [rm.scorer.encode(talk) for talk in TALKS]
        for found in (
            client.score(TALKS),
            client.score_responses(QUESTION, ANSWERS),
            client.score_texts(rendered),
            client.score_ids(ids),
            client.score_pairs([pairs[2], ("Good?", "Good."), *pairs])[2:],
        ):
            assert found == pytest.approx(rewards, abs=1e-5)
