"""Rerankers of Cohere, Jina, vLLM and infinity: one query, several documents, best first.

The query is the prompt and each document a response to it. `relevance_score` is the sigmoid of the
reward, or the reward with infinity's `raw_scores: true` or vLLM's `use_activation: false`; the
order is that of the rewards. `/v2/rerank` answers as Cohere's second version does; `/rerank` and
`/v1/rerank` have the fields of all the others at once. TEI's bodies, known by `texts`, are answered
by `tei.py`.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from raywards.schemas import Rendered as RenderedText
from raywards.schemas import ReplyModel, Some, Strict, Text
from raywards.serve.dialects import (
    Call,
    Core,
    Reply,
    Response,
    Route,
    errors,
    sigmoid,
)
from raywards.serve.dialects.bodies import read, refuse_query
from raywards.serve.dialects.tei import best_first
from raywards.serve.dialects.vllm import PoolingOptions, modern, scoring

# `user` does nothing at vLLM either; nothing is kept between requests, and no row padded.
IGNORED = frozenset({"user", "cache_salt", "padding"})
NOT_BUILT = {
    "max_tokens_per_doc": "texts are not cut one by one",
    "max_chunks_per_doc": "documents are not cut into pieces",
    "rank_fields": "documents are texts",
    "instruct": "put the instruction into the query",
    "max_tokens_per_query": "texts are not cut one by one",
    "instruction": "put it into the query",
    "relevant_spans": "a reward is one of the whole document",
    "mm_processor_kwargs": "text alone is scored",
}


class TextDocument(Strict):
    """A document as an object."""

    text: Text
    """The response."""


def _kind(value: Any) -> str:
    return "|object" if isinstance(value, dict) else "|text"


Document = Annotated[
    Annotated[Text, Tag("|text")] | Annotated[TextDocument, Tag("|object")],
    Discriminator(_kind),
]


class RerankQuery(PoolingOptions):
    """Body of `POST /rerank`, `POST /v1/rerank` and `POST /v2/rerank`."""

    query: RenderedText
    """The prompt."""
    documents: Some[Document]
    """The responses, texts or `{"text": ...}`."""
    top_n: Annotated[int, Field(ge=0)] | None = None
    """How many to return, the best; default, and 0: all."""
    return_documents: bool | None = None
    """Repeat the documents. Default: yes; `/v2/rerank`: no."""
    raw_scores: bool = False
    """The reward itself, and no sigmoid."""


class RepeatedDocument(ReplyModel):
    """A document, as Jina and vLLM repeat it."""

    text: str
    """The response."""
    multi_modal: None = None
    """Always null."""


class RankedDocument(ReplyModel):
    """One document."""

    index: int
    """Position in the request."""
    relevance_score: float
    """The sigmoid of the reward, or the reward."""
    document: RepeatedDocument | None = None
    """The document."""


class RerankUsage(ReplyModel):
    """Tokens of the request."""

    prompt_tokens: int
    """Tokens scored."""
    total_tokens: int
    """The same."""


class RerankResponse(ReplyModel):
    """Reply of `POST /rerank` and `POST /v1/rerank`."""

    id: str
    """Name of this reply."""
    object: Literal["rerank"] = "rerank"
    """Always `rerank`."""
    created: int
    """Unix time in seconds."""
    model: str
    """Name of the served model."""
    results: list[RankedDocument]
    """The best first."""
    usage: RerankUsage
    """Tokens of the request."""
    meta: dict[str, Any]
    """Version and units, as Cohere counts them."""


class RerankV2Response(ReplyModel):
    """Reply of `POST /v2/rerank`."""

    id: str
    """Name of this reply."""
    results: list[RankedDocument]
    """The best first."""
    meta: dict[str, Any]
    """Version and units, as Cohere counts them."""


async def rerank(call: Call, core: Core) -> Reply:
    """The documents, best first, with all that one of the peers would say."""
    request = _read(call)
    result, results = await _ranked(request, core, repeat=request.return_documents is not False)
    tokens = result.num_tokens
    return Reply(
        {
            "id": f"rerank-{call.given_id or request.request_id or call.request_id}",
            "object": "rerank",
            "created": int(time.time()),
            "model": result.model,
            "results": results,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            "meta": _meta("1"),
        }
    )


async def rerank_v2(call: Call, core: Core) -> Reply:
    """The documents, best first, as Cohere's second version."""
    request = _read(call)
    _, results = await _ranked(request, core, repeat=request.return_documents is True)
    return Reply({"id": call.request_id, "results": results, "meta": _meta("2")})


_jina = errors.busy_is_429(errors.native)

ROUTES = (
    Route("/rerank", RerankQuery, RerankResponse, rerank, _jina),
    Route("/v1/rerank", RerankQuery, RerankResponse, rerank, _jina),
    Route("/v2/rerank", RerankQuery, RerankV2Response, rerank_v2, errors.cohere),
)


def _read(call: Call) -> RerankQuery:
    refuse_query(call)
    return read(RerankQuery, modern(call.body), ignored=IGNORED, not_built=NOT_BUILT)


async def _ranked(request: RerankQuery, core: Core, *, repeat: bool) -> tuple[Any, list[Any]]:
    texts = [one if isinstance(one, str) else one.text for one in request.documents]
    items = [Response(f"documents[{i}]", request.query, text) for i, text in enumerate(texts)]
    result = await core.score(scoring(request, items))
    rewards = result.rewards
    raw = request.raw_scores or not request.use_activation
    scores = rewards if raw else [sigmoid(reward) for reward in rewards]
    ranked = [
        {
            "index": index,
            "relevance_score": scores[index],
            **({"document": {"text": texts[index], "multi_modal": None}} if repeat else {}),
        }
        for index in best_first(rewards)
    ]
    return result, ranked[: request.top_n or None]


def _meta(version: str) -> dict[str, Any]:
    return {
        "api_version": {"version": version, "is_experimental": False},
        "billed_units": {"search_units": 1},
    }
