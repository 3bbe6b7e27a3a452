"""Error replies as the clients of each dialect read them, made from one `ServiceError`.

Statuses are the core's (400, 404, 413, 415, 422, 500, 503, 504), but for two things that clients
decide by: some dialects know no 422, and clients of rerankers wait on 429 where those of RLHF
trainers give up on any 4xx, and wait on 503.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel

from raywards.errors import ServiceError
from raywards.schemas import ErrorBody, ReplyModel
from raywards.serve.dialects import Describe

_OPENAI_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "overloaded_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_VLLM_TYPES = {
    401: "Unauthorized",
    404: "NotFoundError",
    408: "RequestTimeout",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    504: "GatewayTimeoutError",
}


class VllmErrorInfo(ReplyModel):
    """What went wrong."""

    message: str
    """What was seen, what is expected, and the next move."""
    type: str
    """Kind of error: `BadRequestError`, `NotFoundError`, ..."""
    param: str | None = None
    """Field that is at fault."""
    code: int
    """The HTTP status."""


class VllmErrorBody(ReplyModel):
    """vLLM's and SGLang's body of a reply that is not a success."""

    error: VllmErrorInfo
    """What went wrong."""


class TeiErrorBody(ReplyModel):
    """Body of text-embeddings-inference of a reply that is not a success."""

    error: str
    """What was seen, what is expected, and the next move."""
    error_type: Literal["Backend", "Empty", "Overloaded", "Validation"]
    """Kind of error."""


class CohereErrorBody(ReplyModel):
    """Cohere's body of a reply that is not a success."""

    message: str
    """What was seen, what is expected, and the next move."""


def _with(body: type[BaseModel]) -> Callable[[Callable[[ServiceError], Any]], Describe]:
    return lambda function: Describe(function, body)


@_with(ErrorBody)
def native(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """OpenAI's envelope, with our codes for programs."""
    status = error.status or 500
    kind = _OPENAI_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return status, {
        "error": {
            "message": str(error),
            "type": kind,
            "param": error.field,
            "code": error.__dict__.get("code", kind),
            "request_id": error.request_id,
        }
    }


def busy_is_429(describe: Describe) -> Describe:
    """The same, for clients that wait where they read 429."""

    def described(error: ServiceError) -> tuple[int, Any]:
        status, body = describe(error)
        return (429 if status == 503 else status), body

    return Describe(described, describe.body)


@_with(VllmErrorBody)
def vllm(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """vLLM's envelope: the code is the status, and what is not valid is 400."""
    status = error.status or 500
    status = 400 if status == 422 else status
    return status, {
        "error": {
            "message": str(error),
            "type": _VLLM_TYPES.get(status, "BadRequestError"),
            "param": error.field,
            "code": status,
        }
    }


@_with(TeiErrorBody)
def tei(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """The words of text-embeddings-inference: 429 where it is full, 424 where the model failed."""
    status = error.status or 500
    if error.__dict__.get("code") == "empty":
        return 400, {"error": str(error), "error_type": "Empty"}
    status = {503: 429, 500: 424}.get(status, status)
    kind = {424: "Backend", 429: "Overloaded", 504: "Backend"}.get(status, "Validation")
    return status, {"error": str(error), "error_type": kind}


@_with(CohereErrorBody)
def cohere(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """Cohere's: a message, and 429 where to try again."""
    status = error.status or 500
    return (429 if status == 503 else status), {"message": str(error)}
