"""Clients from PyPI, pointed at us with a key: cohere, huggingface_hub and openai."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from typing import Any

import cohere
import huggingface_hub
import openai
import pytest
from cohere.errors import NotFoundError, TooManyRequestsError, UnauthorizedError
from cohere.errors import UnprocessableEntityError as CohereUnprocessable
from contract import RENDERED
from gates import KEY, Gate, filled
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from served import Served
from talks import ANSWERS, QUESTION, TALKS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


@pytest.fixture
def order(rewards: list[float]) -> list[int]:
    return sorted(range(3), key=lambda index: -rewards[index])


# ---------------------------------------------------------------- cohere


def test_cohere_v2_ranks(guarded: Served, rewards: list[float], order: list[int]) -> None:
    client = cohere.ClientV2(api_key=KEY, base_url=guarded.url)
    reply = client.rerank(model="rm", query=QUESTION, documents=ANSWERS)
    assert [result.index for result in reply.results] == order
    for result in reply.results:
        assert result.relevance_score == pytest.approx(sigmoid(rewards[result.index]), abs=1e-5)
    assert reply.id
    assert reply.meta is not None
    assert reply.meta.api_version is not None
    assert reply.meta.api_version.version == "2"
    best = client.rerank(model="rm", query=QUESTION, documents=ANSWERS, top_n=1)
    assert [result.index for result in best.results] == order[:1]


def test_cohere_v1_ranks(guarded: Served, order: list[int]) -> None:
    client = cohere.Client(api_key=KEY, base_url=guarded.url)
    reply = client.rerank(query=QUESTION, documents=ANSWERS, return_documents=True, model="rm")
    assert [result.index for result in reply.results] == order
    for result in reply.results:
        assert result.document is not None
        assert result.document.text == ANSWERS[result.index]
    objects = client.rerank(query=QUESTION, documents=[{"text": text} for text in ANSWERS])
    assert [result.index for result in objects.results] == order


def test_cohere_for_asyncio_ranks(guarded: Served, order: list[int]) -> None:
    async def ask() -> list[int]:
        async with cohere.AsyncClientV2(api_key=KEY, base_url=guarded.url) as client:
            reply = await client.rerank(model="rm", query=QUESTION, documents=ANSWERS)
            return [result.index for result in reply.results]

    assert asyncio.run(ask()) == order


def test_cohere_raises_errors_of_its_own(guarded: Served) -> None:
    body: dict[str, Any] = {"model": "rm", "query": QUESTION, "documents": ANSWERS}
    client = cohere.ClientV2(api_key=KEY, base_url=guarded.url)
    with pytest.raises(NotFoundError) as lost:
        client.rerank(**body | {"model": "rerank-v3.5"})
    assert "'rm' is" in lost.value.body["message"]
    with pytest.raises(CohereUnprocessable) as refused:
        client.rerank(**body, max_tokens_per_doc=4096)
    assert "max_tokens_per_doc" in refused.value.body["message"]
    with pytest.raises(UnauthorizedError):
        cohere.ClientV2(api_key="wrong-key", base_url=guarded.url).rerank(**body)


def test_cohere_waits_for_a_server_that_is_full(small: Gate, order: list[int]) -> None:
    client = cohere.ClientV2(api_key="any", base_url=small.server.url)
    body: dict[str, Any] = {"model": "rm", "query": QUESTION, "documents": ANSWERS}
    with filled(small):
        with pytest.raises(TooManyRequestsError) as full:
            client.rerank(**body, request_options={"max_retries": 0})
        assert "the queue is full" in full.value.body["message"]
        threading.Timer(0.1, small.open).start()
        reply = client.rerank(**body)
    assert [result.index for result in reply.results] == order


# ---------------------------------------------------------------- huggingface_hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests run with the hub switched off, and this client takes that for every address."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("online")
def test_huggingface_classifies(guarded: Served, rewards: list[float]) -> None:
    client = InferenceClient(guarded.url, token=KEY)
    [element] = client.text_classification(RENDERED)
    assert element.label == "LABEL_0"
    assert element.score == pytest.approx(sigmoid(rewards[0]), abs=1e-5)
    [raw] = client.text_classification(RENDERED, function_to_apply="none", top_k=1)
    assert raw.score == pytest.approx(rewards[0], abs=1e-5)
    [named] = client.text_classification(RENDERED, model=f"{guarded.url}/predict")
    assert named == element


@pytest.mark.usefixtures("online")
def test_huggingface_for_asyncio_classifies(guarded: Served, rewards: list[float]) -> None:
    async def ask() -> list[float]:
        async with AsyncInferenceClient(guarded.url, token=KEY) as client:
            found = await asyncio.gather(
                *(client.text_classification(RENDERED, function_to_apply="none") for _ in range(9))
            )
        return [element.score for [element] in found]

    assert asyncio.run(ask()) == pytest.approx(rewards[:1] * 9, abs=1e-5)


@pytest.mark.parametrize(
    ("token", "text", "options", "status"),
    [
        ("wrong-key", RENDERED, {}, 401),
        (KEY, "  ", {}, 422),
        (KEY, RENDERED, {"function_to_apply": "softmax"}, 422),
    ],
)
@pytest.mark.usefixtures("online")
def test_huggingface_raises_errors_of_its_own(
    token: str, text: str, options: dict[str, Any], status: int, guarded: Served
) -> None:
    with pytest.raises(HfHubHTTPError) as refused:
        InferenceClient(guarded.url, token=token).text_classification(text, **options)
    assert refused.value.response.status_code == status
    if status == 422:
        assert refused.value.response.json()["error"] in str(refused.value)


# ---------------------------------------------------------------- openai


@pytest.mark.parametrize("options", [{}, {"encoding_format": "float"}])
def test_openai_gets_embeddings_of_one(
    options: dict[str, Any], guarded: Served, rendered: list[str], rewards: list[float]
) -> None:
    """It asks for base64 unless it is told otherwise."""
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY)
    reply = client.embeddings.create(model="rm", input=rendered, user="someone", **options)
    assert [entry.embedding[0] for entry in reply.data] == pytest.approx(rewards, abs=1e-5)
    assert {len(entry.embedding) for entry in reply.data} == {1}
    ids = guarded.scorer.encode(TALKS[0])
    [entry] = client.embeddings.create(model="rm", input=ids, **options).data
    assert entry.embedding == pytest.approx(rewards[:1], abs=1e-5)
    assert [model.id for model in client.models.list()] == ["rm"]


def test_openai_asks_for_a_reward_as_nims_documents_say(
    guarded: Served, rewards: list[float]
) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY)
    reply = client.chat.completions.create(
        model="rm", messages=TALKS[0], stream=False, temperature=0.0, max_tokens=1
    )
    [choice] = reply.choices
    assert choice.message.content is not None
    assert float(choice.message.content.removeprefix("reward:")) == pytest.approx(
        rewards[0], abs=1e-5
    )
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    [token] = choice.logprobs.content
    assert (token.token, token.logprob) == ("reward", pytest.approx(rewards[0], abs=1e-5))


def test_openai_raises_errors_of_its_own(guarded: Served) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=KEY, max_retries=0)
    ask = client.chat.completions.create
    with pytest.raises(openai.NotFoundError) as lost:
        ask(model="gpt", messages=TALKS[0])
    assert lost.value.param == "model"
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        ask(model="rm", messages=TALKS[0], tools=[])
    assert refused.value.code == "unsupported_field"
    with pytest.raises(openai.BadRequestError) as blank:
        client.embeddings.create(model="rm", input=" ")
    assert blank.value.param == "input"
    stranger = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong-key")
    with pytest.raises(openai.AuthenticationError):
        stranger.chat.completions.create(model="rm", messages=TALKS[0])


def test_openai_waits_for_a_server_that_is_full(small: Gate, rewards: list[float]) -> None:
    client = openai.OpenAI(base_url=f"{small.server.url}/v1", api_key="any")
    with filled(small):
        with pytest.raises(openai.RateLimitError) as full:
            client.with_options(max_retries=0).chat.completions.create(
                model="rm", messages=TALKS[0]
            )
        wait_s = int(full.value.response.headers["retry-after"])
        threading.Timer(0.1, small.open).start()
        asked = time.monotonic()
        reply = client.chat.completions.create(model="rm", messages=TALKS[0])
    assert time.monotonic() - asked >= wait_s
    assert reply.choices[0].message.content is not None
    assert float(reply.choices[0].message.content[7:]) == pytest.approx(rewards[0], abs=1e-5)
