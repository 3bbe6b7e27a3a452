"""The JSON bodies of requests, bounded in bytes, time and values before anyone validates them.

What a replica holds of bodies that are still arriving is bounded as well, however many clients send
them, and however slowly.
"""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from raywards.config import ServeConfig
from raywards.errors import DeadlineError, OverloadedError, RequestRefusedError
from raywards.schemas import parse_body

# Parsing more than this at once would hold up everyone else on the loop.
_PARSE_IN_THREAD_BYTES = 262_144
# Texts, messages, fields: to look at more than these would hold up everyone else as well. Token ids
# do not count: they are validated a hundred times as fast.
_MOST_VALUES, _VALUES_PER_ITEM = 100_000, 64
# Bodies of the largest size that may be arriving at once.
_MOST_BODIES = 16


class Bodies:
    """Of one replica."""

    def __init__(self) -> None:
        self._arriving_bytes = 0

    async def read_json(self, request: Request, config: ServeConfig) -> object:
        """The body as Python values, refused by its headers or its size before it is parsed.

        Raises `RequestRefusedError`; `DeadlineError` where it does not arrive in time;
        `OverloadedError` where too much arrives at once; `ClientDisconnect`.
        """
        _check_headers(request, config)
        body = await self._read(request, config)
        most = max(_MOST_VALUES, _VALUES_PER_ITEM * config.max_items_per_request)
        if len(body) > _PARSE_IN_THREAD_BYTES:
            return await asyncio.to_thread(_parse, body, most)
        return _parse(body, most)

    async def _read(self, request: Request, config: ServeConfig) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(config.request_timeout_s):
                async for chunk in request.stream():
                    chunks.append(chunk)
                    size += len(chunk)
                    self._arriving_bytes += len(chunk)
                    if size > config.max_body_bytes:
                        raise _too_large(config)
                    if self._arriving_bytes > _MOST_BODIES * config.max_body_bytes:
                        raise OverloadedError(
                            "too many large bodies arrive at once; try again after the time in "
                            "Retry-After",
                            status=503,
                            retry_after_s=1.0,
                        )
        except TimeoutError:
            message = "the body did not arrive in time"
            raise DeadlineError(message, status=408, code="timeout") from None
        finally:
            self._arriving_bytes -= size
        return b"".join(chunks)


def _check_headers(request: Request, config: ServeConfig) -> None:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestRefusedError(
            f"Content-Type is {kind[:80] or 'missing'}; expected application/json",
            status=415,
            code="unsupported_media_type",
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestRefusedError(
            "compressed bodies are not accepted; send it without Content-Encoding",
            status=415,
            code="unsupported_media_type",
        )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > config.max_body_bytes:
        raise _too_large(config)


def _parse(body: bytes, most_values: int) -> object:
    """`parse_body`, with as many values as can be looked at on the loop."""
    parsed = parse_body(body)
    left, values = [parsed], 0
    while left:
        value = left.pop()
        if isinstance(value, dict):
            values += len(value)
            left += value.values()
        elif isinstance(value, list) and value and not isinstance(value[0], int):
            values += len(value)
            left += value
        if values > most_values:
            raise RequestRefusedError(
                f"the body holds more than {most_values} texts, messages and fields; send fewer "
                "sequences per request",
                status=413,
                code="too_many_items",
            )
    return parsed


def _too_large(config: ServeConfig) -> RequestRefusedError:
    return RequestRefusedError(
        f"the body is larger than {config.max_body_bytes} bytes; send fewer sequences per request",
        status=413,
        code="body_too_large",
    )
