"""The JSON bodies of requests, bounded in bytes, time and values before anyone validates them.

    bytes ─counted─► JSON ─parsed─► Python values ─counted again, by what they are─► the dialect

Both counts are there for everyone else on the loop: Python's parser lets no other thread run until
it is through, and pydantic neither. What a replica holds of bodies that are arriving or wait to be
parsed is bounded as well, however many clients send them, and however slowly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from raywards.config import ServeConfig
from raywards.errors import DeadlineError, OverloadedError, RequestRefusedError
from raywards.schemas import MAX_NESTING, parse_body, too_deep

# Parsing more than this at once would hold up everyone else on the loop.
_PARSE_IN_THREAD_BYTES = 262_144
# Texts, messages, fields: to look at more than these would hold up everyone else as well. Token ids
# are parsed and validated ten times as fast.
_MOST_VALUES, _VALUES_PER_ITEM = 100_000, 64
_MOST_IDS = 1_048_576
# Of one object: pydantic tells of every unknown field, and nobody reads so many findings.
_MOST_FIELDS = 4096
# Where token ids may stand, in any dialect, and where a list has an entry for each sequence.
_FIELDS_OF_IDS = frozenset({"input", "input_ids"})
_FIELDS_OF_ITEMS = frozenset(
    {
        *("messages", "responses", "input", "input_ids", "ids"),
        *("query", "text", "rid", "inputs", "texts", "documents", "items"),
        *("queries", "data_1", "data_2", "text_1", "text_2"),
    }
)
# The core refuses one sequence too many, in the words of the dialect; here nobody knows it yet.
_TIMES_TOO_MANY = 8
# Bodies of the largest size that may be arriving or wait to be parsed at once.
_MOST_BODIES = 16
_COUNT_AT_ONCE_BYTES = 262_144


class Bodies:
    """Of one replica."""

    def __init__(self) -> None:
        self._held_bytes = 0

    async def read_json(self, request: Request, config: ServeConfig) -> object:
        """The body as Python values, refused by its headers or its size before it is parsed.

        Raises `RequestRefusedError`; `DeadlineError` where it does not arrive in time;
        `OverloadedError` where too much arrives at once; `ClientDisconnect`.
        """
        _check_headers(request, config)
        with self._hold() as held:
            body = await self._read(request, config, held)
            if len(body) > _PARSE_IN_THREAD_BYTES:
                return await asyncio.to_thread(_parse, body, config)
            return _parse(body, config)

    @contextmanager
    def _hold(self) -> Iterator[list[int]]:
        """The sizes that are put into the list count as held until it is left."""
        held: list[int] = []
        try:
            yield held
        finally:
            self._held_bytes -= sum(held)

    async def _read(self, request: Request, config: ServeConfig, held: list[int]) -> bytes:
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(config.request_timeout_s):
                async for chunk in request.stream():
                    chunks.append(chunk)
                    size += len(chunk)
                    held.append(len(chunk))
                    self._held_bytes += len(chunk)
                    if size > config.max_body_bytes:
                        raise _too_large(config)
                    if self._held_bytes > _MOST_BODIES * config.max_body_bytes:
                        raise OverloadedError(
                            "too many large bodies arrive at once; try again after the time in "
                            "Retry-After",
                            status=503,
                            retry_after_s=1.0,
                        )
        except TimeoutError:
            message = "the body did not arrive in time"
            raise DeadlineError(message, status=408, code="timeout") from None
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


def _parse(body: bytes, config: ServeConfig) -> object:
    """`parse_body`, with no more than can be looked at on the loop."""
    most = max(_MOST_VALUES, _VALUES_PER_ITEM * config.max_items_per_request)
    most_ids = max(_MOST_IDS, config.max_queued_tokens)
    if len(body) > _PARSE_IN_THREAD_BYTES:
        _check_commas(body, most, most_ids)
    parsed = parse_body(body)
    _check_values(parsed, most, most_ids)
    _check_items(parsed, _TIMES_TOO_MANY * config.max_items_per_request)
    return parsed


def _check_commas(body: bytes, most: int, most_ids: int) -> None:
    """Refuse what must be too much, by the commas and brackets outside of its strings.

    A piece at a time: like `json.loads`, each of these calls lets nobody else run.
    """
    commas = containers = 0
    in_string = escaped = False
    for start in range(0, len(body), _COUNT_AT_ONCE_BYTES):
        piece = body[start + escaped : start + _COUNT_AT_ONCE_BYTES]
        piece = piece.replace(b"\\\\", b"")
        escaped = piece.endswith(b"\\")
        parts = piece.replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[in_string::2])
        in_string ^= len(parts) % 2 == 0
        commas += outside.count(b",")
        containers += outside.count(b"[") + outside.count(b"{")
        if containers > most + 1:  # each but the first is an entry of another
            raise _too_many(f"{most} texts, messages and fields")
        if commas > most + most_ids:
            raise _too_many(f"{most + most_ids} values")


def _check_values(parsed: object, most: int, most_ids: int) -> None:
    """Refuse what is too much, or nested too deeply, whatever it means."""
    rest, ids = _without_ids(parsed)
    if ids > most_ids:
        raise _too_many(f"{most_ids} token ids")
    level, depth, values = [rest], 0, 0
    while level:
        depth += 1
        below: list[object] = []
        for value in level:
            if isinstance(value, dict):
                if len(value) > _MOST_FIELDS:
                    raise _too_many(f"{_MOST_FIELDS} fields in one object")
                values += len(value)
                below += value.values()
            elif isinstance(value, list):
                values += len(value)
                below += value
            else:
                continue
            if values > most:
                raise _too_many(f"{most} texts, messages and fields")
            if depth > MAX_NESTING:
                raise too_deep()
        level = below


def _without_ids(parsed: object) -> tuple[object, int]:
    """The body without its token ids, and their number."""
    if not isinstance(parsed, dict):
        return parsed, 0
    rest, ids = dict(parsed), 0
    for name in _FIELDS_OF_IDS & parsed.keys():
        given = parsed[name]
        if _begins_with_an_id(given):
            ids += len(given)
            rest[name] = None
        elif isinstance(given, list):
            ids += sum(len(one) for one in given if _begins_with_an_id(one))
            rest[name] = [None if _begins_with_an_id(one) else one for one in given]
    return rest, ids


def _begins_with_an_id(value: object) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], int)


def _check_items(parsed: object, most: int) -> None:
    """Refuse far more sequences than the core will take, before anyone looks at each."""
    if not isinstance(parsed, dict):
        return
    for name in _FIELDS_OF_ITEMS & parsed.keys():
        given = parsed[name]
        if isinstance(given, list) and len(given) > most and not _is_one(name, given[0]):
            raise RequestRefusedError(
                f"{name}: has {len(given)} sequences, far more than are accepted; send fewer per "
                "request",
                status=413,
                field=name,
                code="too_many_items",
            )


def _is_one(name: str, first: object) -> bool:
    """Whether a list is one sequence, of ids or of messages, by its first entry."""
    return isinstance(first, int) or (name == "messages" and isinstance(first, dict))


def _too_many(most: str) -> RequestRefusedError:
    return RequestRefusedError(
        f"the body holds more than {most}; send fewer sequences per request",
        status=413,
        code="too_many_items",
    )


def _too_large(config: ServeConfig) -> RequestRefusedError:
    return RequestRefusedError(
        f"the body is larger than {config.max_body_bytes} bytes; send fewer sequences per request",
        status=413,
        code="body_too_large",
    )
