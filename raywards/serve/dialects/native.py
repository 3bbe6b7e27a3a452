"""The native dialect: `POST /v1/reward`, strict, one `RewardRequest` in and one reply out.

The Serve handle speaks it too, without HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from raywards.schemas import Message, RewardRequest, RewardResponse
from raywards.serve.dialects import (
    Call,
    Conversation,
    Core,
    Ids,
    Item,
    Rendered,
    Reply,
    Response,
    Route,
    ScoredItem,
    ScoringRequest,
    ScoringResult,
    characters_in,
    errors,
    sigmoid,
)
from raywards.serve.dialects.bodies import refuse_query


async def answer(call: Call, core: Core) -> Reply:
    """One reward for each sequence. Raises `ServiceError`."""
    refuse_query(call)
    return Reply(await reward(call.body, core))


async def reward(body: object, core: Core) -> dict[str, Any]:
    """The reply to a parsed body, without HTTP. Raises `ServiceError`."""
    request = RewardRequest.parse(body)
    result = await core.score(_scoring(request))
    return _reply(request, result)


async def lines(call: Call, core: Core) -> AsyncGenerator[dict[str, Any], None]:
    """An entry of `data` for each sequence, in the order in which they are scored, then the usage.

    A sequence that cannot be scored gets an entry with its `error`.
    """
    refuse_query(call)
    request = RewardRequest.parse(call.body)
    tokens = 0
    async with aclosing(core.stream(_scoring(request))) as scored:
        async for index, item in scored:
            tokens += item.num_tokens or 0
            name = request.ids[index] if request.ids else None
            yield _row(index, name, item, request.activation)
    yield {"done": True, "usage": _usage(tokens)}


ROUTES = (
    Route(
        "/v1/reward",
        RewardRequest,
        RewardResponse,
        answer,
        errors.native,
        lines=lines,
        null_is_absent=False,
    ),
)


def _scoring(request: RewardRequest) -> ScoringRequest:
    return ScoringRequest(
        items=_items(request),
        model=request.model,
        truncation=request.truncation,
        max_length=request.max_length,
        timeout_s=request.timeout_s,
        fails_as_a_whole=request.on_error == "request",
    )


def _items(request: RewardRequest) -> list[Item]:
    variables = dict(request.chat_template_kwargs or {})
    if request.tools is not None:
        variables["tools"] = request.tools
    shared = characters_in(variables or None)
    given: list[Item]
    if request.responses is not None:
        prompt = request.prompt if isinstance(request.prompt, str) else _plain(request.prompt or [])
        shared += characters_in(prompt)
        given = [
            Response(f"responses[{i}]", prompt, response, variables or None, shared)
            for i, response in enumerate(request.responses)
        ]
    elif request.messages is not None:
        given = [
            Conversation(field, _plain(messages), variables or None, shared)
            for field, messages in _each("messages", request.messages, Message)
        ]
    elif request.input_ids is not None:
        given = [Ids(field, ids) for field, ids in _each("input_ids", request.input_ids, int)]
    else:
        assert request.input is not None
        texts = request.input
        given = (
            [Rendered("input", texts)]
            if isinstance(texts, str)
            else [Rendered(f"input[{i}]", text) for i, text in enumerate(texts)]
        )
    return given


def _each(name: str, value: Sequence[Any], part: type) -> list[tuple[str, Any]]:
    """One sequence under its own name, or each of a list of them under its position."""
    if isinstance(value[0], part):
        return [(name, value)]
    return [(f"{name}[{i}]", one) for i, one in enumerate(value)]


def _plain(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    return [message.model_dump(exclude_none=True) for message in messages]


def _reply(request: RewardRequest, result: ScoringResult) -> dict[str, Any]:
    names: Sequence[str | None] = request.ids or [None] * len(result.items)
    return {
        "id": f"reward-{uuid.uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": result.model,
        "revision": result.revision,
        "data": [
            _row(index, name, item, request.activation)
            for index, (name, item) in enumerate(zip(names, result.items, strict=True))
        ],
        "usage": _usage(result.num_tokens),
        "timing": {
            "queue_ms": round(result.queue_s * 1e3, 3),
            "tokenize_ms": round(result.tokenize_s * 1e3, 3),
            "forward_ms": round(result.forward_s * 1e3, 3),
            "batch_size": result.batch_size,
        },
    }


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens, "cached_tokens": 0}


def _row(index: int, name: str | None, item: ScoredItem, activation: str) -> dict[str, Any]:
    score = item.reward
    if score is not None and activation == "sigmoid":
        score = sigmoid(score)
    return {
        "index": index,
        "id": name,
        "reward": item.reward,
        "score": score,
        "num_tokens": item.num_tokens,
        "truncated": item.truncated,
        "error": errors.native(item.error)[1]["error"] if item.error else None,
    }
