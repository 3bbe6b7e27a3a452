"""Error replies as the clients of each dialect read them, made from one `ServiceError`.

Statuses are the core's (400, 404, 413, 415, 422, 500, 503, 504), but for two things that clients
decide by: some dialects know no 422, and clients of rerankers wait on 429 where those of RLHF
trainers give up on any 4xx, and wait on 503.
"""

from __future__ import annotations

from typing import Any

from raywards.errors import ServiceError
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

    return described


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


def tei(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """The words of text-embeddings-inference: 429 where it is full, 424 where the model failed."""
    status = error.status or 500
    if error.__dict__.get("code") == "empty":
        return 400, {"error": str(error), "error_type": "Empty"}
    status = {503: 429, 500: 424}.get(status, status)
    kind = {424: "Backend", 429: "Overloaded", 504: "Backend"}.get(status, "Validation")
    return status, {"error": str(error), "error_type": kind}


def cohere(error: ServiceError) -> tuple[int, dict[str, Any]]:
    """Cohere's: a message, and 429 where to try again."""
    status = error.status or 500
    return (429 if status == 503 else status), {"message": str(error)}
