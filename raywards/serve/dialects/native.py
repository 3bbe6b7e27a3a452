"""The native dialect: `POST /v1/reward`, strict, one `RewardRequest` in and one reply out.

The Serve handle speaks it too, without HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from raywards.errors import ServiceError
from raywards.schemas import Message, RewardRequest, RewardResponse
from raywards.serve.dialects import (
    Conversation,
    Core,
    Ids,
    Item,
    Rendered,
    Response,
    Route,
    ScoredItem,
    ScoringRequest,
    ScoringResult,
    sigmoid,
)

_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
    503: "overloaded_error",
    504: "timeout_error",
}


async def answer(body: object, core: Core) -> dict[str, Any]:
    """The reply to a parsed body. Raises `ServiceError`."""
    request = RewardRequest.parse(body)
    result = await core(
        ScoringRequest(
            items=_items(request),
            model=request.model,
            truncation=request.truncation,
            max_length=request.max_length,
            timeout_s=request.timeout_s,
            fails_as_a_whole=request.on_error == "request",
        )
    )
    return _reply(request, result)


def describe(error: ServiceError) -> dict[str, Any]:
    """The error as OpenAI's clients know it."""
    status = error.status or 500
    details = error.__dict__
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": str(error),
            "type": kind,
            "param": details.get("field"),
            "code": details.get("code", kind),
            "request_id": error.request_id,
        }
    }


ROUTES = (Route("/v1/reward", RewardRequest, RewardResponse, answer, describe),)


def _items(request: RewardRequest) -> list[Item]:
    variables = dict(request.chat_template_kwargs or {})
    if request.tools is not None:
        variables["tools"] = request.tools
    given: list[Item]
    if request.responses is not None:
        prompt = request.prompt if isinstance(request.prompt, str) else _plain(request.prompt or [])
        given = [
            Response(f"responses[{i}]", prompt, response, variables or None)
            for i, response in enumerate(request.responses)
        ]
    elif request.messages is not None:
        given = [
            Conversation(field, _plain(messages), variables or None)
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
    tokens = sum(item.num_tokens or 0 for item in result.items)
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
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "cached_tokens": 0},
        "timing": {
            "queue_ms": round(result.queue_s * 1e3, 3),
            "tokenize_ms": round(result.tokenize_s * 1e3, 3),
            "forward_ms": round(result.forward_s * 1e3, 3),
            "batch_size": result.batch_size,
        },
    }


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
        "error": describe(item.error)["error"] if item.error else None,
    }
