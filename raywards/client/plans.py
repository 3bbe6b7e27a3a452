"""What the clients send, how they read a reply, and when they try again: written once, as plans.

A plan is a generator that yields what is to be done, a `Send` or a `Pause`, takes back what came of
it, and returns what the caller asked for. The two clients only carry plans out. Knows nothing of
models or Ray, and imports neither torch, ray nor transformers.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import random
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from raywards.errors import (
    ConfigError,
    ConversationError,
    DeadlineError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
    UnreachableError,
)
from raywards.schemas import ErrorBody, ErrorInfo, RewardRequest, RewardResponse

Message = Mapping[str, Any]
Conversation = Sequence[Message]

# One request is about one batch of the server's default budget (16,384 tokens of four characters),
# and a few are in flight: enough to keep a replica busy, too little to fill its queue.
_REQUEST_CHARACTERS = 65_536
_CHARACTERS_PER_TOKEN = 4
PARALLEL_REQUESTS = 4

_CONNECT_TIMEOUT_S = 10.0
_FIRST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 8.0
_READY_PAUSE_S = 0.25
_READY_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Send:
    """To do: this request. Comes back as a response, or as the transport's error."""

    method: str
    path: str
    body: bytes | None
    request_id: str
    timeout_s: float


@dataclass(frozen=True)
class Pause:
    """To do: nothing, for a while. Comes back as `None`."""

    seconds: float


_INFO = TypeAdapter(dict[str, Any])

T = TypeVar("T")
Outcome = httpx.Response | httpx.TransportError | None
Plan = Generator[Send | Pause, Outcome, T]


@dataclass(frozen=True)
class Chunk:
    """Sequences that travel in one request: a slice of what the caller gave."""

    field: str
    items: Sequence[Any]
    start: int
    rest: Mapping[str, Any]

    def halves(self) -> tuple[Chunk, Chunk]:
        middle = len(self.items) // 2
        return (
            replace(self, items=self.items[:middle]),
            replace(self, items=self.items[middle:], start=self.start + middle),
        )


class Plans(ABC):
    """Everything about the client that does not depend on how bytes are carried."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = 60.0,
        max_retries: int = 8,
        max_connections: int = 64,
        max_items_per_request: int = 256,
    ) -> None:
        """
        base_url: where the model is served, route prefix included.
        api_key: what the server was started with, if it was.
        model: name of the served model; default is whichever is served there.
        timeout_s: longest time for one request, all attempts and pauses together.
        max_retries: attempts after the first.
        max_connections: connections that are open at once.
        max_items_per_request: longer lists are split, and the rewards put together again.
        """
        if not re.match(r"https?://[^/\s]", base_url):
            raise ConfigError(f"base_url={base_url!r}: expected http://host:port or https://host")
        if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key):
            raise ConfigError("api_key: expected printable ASCII characters")
        for name, value in (
            ("timeout_s", timeout_s),
            ("max_connections", max_connections),
            ("max_items_per_request", max_items_per_request),
        ):
            if not value > 0:
                raise ConfigError(f"{name}={value}: expected a positive number")
        if max_retries < 0:
            raise ConfigError(f"max_retries={max_retries}: expected 0 or more")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.max_items_per_request = max_items_per_request
        self._api_key = api_key
        self._open(
            httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        )

    @abstractmethod
    def _open(self, limits: httpx.Limits) -> None:
        """Make the transport."""

    def __repr__(self) -> str:
        key = "'***'" if self._api_key else "None"
        return f"{type(self).__name__}({self.base_url!r}, api_key={key}, model={self.model!r})"

    # ---- what the caller asked for, in requests

    def _of_conversations(
        self, conversations: Sequence[Conversation], *, on_error: str = "request"
    ) -> list[Plan[list[float]]]:
        _refuse_scalar("conversations", conversations, Mapping, "[[{'role': ...}, ...], ...]")
        for index, conversation in enumerate(conversations):
            if not _is_list(conversation):
                raise ConversationError(
                    f"conversations[{index}]: expected a list of messages. For a model of plain "
                    "text use score_responses(prompt, responses)",
                    reason="not_messages",
                )
        sizes = [sum(map(_characters, conversation)) for conversation in conversations]
        return self._split("messages", conversations, sizes, _rest(on_error))

    def _of_responses(
        self, prompt: str | Conversation, responses: Sequence[str], *, on_error: str = "request"
    ) -> list[Plan[list[float]]]:
        _refuse_scalar("responses", responses, str, "['first answer', 'second answer']")
        shared = len(prompt) if isinstance(prompt, str) else sum(map(_characters, prompt))
        sizes = [shared + len(response) for response in responses]
        rest = {"prompt": prompt, **_rest(on_error)}
        return self._split("responses", responses, sizes, rest)

    def _of_pairs(
        self, pairs: Sequence[tuple[str | Conversation, str]], *, on_error: str = "request"
    ) -> tuple[list[Plan[list[float]]], list[int]]:
        """Plans, and for each reward that they give the position of its pair."""
        together: dict[str, list[int]] = {}
        for index, (prompt, _) in enumerate(pairs):
            together.setdefault(json.dumps(prompt, sort_keys=True, default=str), []).append(index)
        plans: list[Plan[list[float]]] = []
        for positions in together.values():
            prompt = pairs[positions[0]][0]
            responses = [pairs[index][1] for index in positions]
            plans += self._of_responses(prompt, responses, on_error=on_error)
        return plans, [index for positions in together.values() for index in positions]

    def _of_texts(self, texts: Sequence[str]) -> list[Plan[list[float]]]:
        _refuse_scalar("texts", texts, str, "['<rendered text>', ...]")
        return self._split("input", texts, [len(text) for text in texts], {})

    def _of_ids(self, sequences: Iterable[Iterable[int]]) -> list[Plan[list[float]]]:
        rows = []
        for index, sequence in enumerate(sequences):
            try:
                rows.append([operator.index(token) for token in sequence])
            except TypeError:
                raise ConversationError(
                    f"sequences[{index}]: expected a list of token ids (integers)",
                    reason="not_token_ids",
                ) from None
        return self._split(
            "input_ids", rows, [len(row) * _CHARACTERS_PER_TOKEN for row in rows], {}
        )

    def _split(
        self, field: str, items: Sequence[Any], sizes: Sequence[int], rest: Mapping[str, Any]
    ) -> list[Plan[list[float]]]:
        plans = []
        start, load = 0, 0
        for end, size in enumerate(sizes):
            full = end - start >= self.max_items_per_request or load + size > _REQUEST_CHARACTERS
            if end > start and full:
                plans.append(self._rewards(Chunk(field, items[start:end], start, rest)))
                start, load = end, 0
            load += size
        if start < len(items):
            plans.append(self._rewards(Chunk(field, items[start:], start, rest)))
        return plans

    def _rewards(self, chunk: Chunk) -> Plan[list[float]]:
        try:
            request = {**chunk.rest, chunk.field: list(chunk.items)}
            reply = yield from self._reward(request)
        except RequestRefusedError as error:
            if error.status != 413 or len(chunk.items) == 1:
                raise _with_callers_index(error, chunk) from error.__cause__
            first, second = chunk.halves()
            before = yield from self._rewards(first)
            after = yield from self._rewards(second)
            return before + after
        rewards = [item.reward for item in reply.data]
        if len(rewards) != len(chunk.items):
            raise ServiceError(
                f"the reply has {len(rewards)} rewards for {len(chunk.items)} sequences"
            )
        return rewards  # type: ignore[return-value]  # None where on_error="item" was asked for

    # ---- requests

    def _reward(self, request: RewardRequest | Mapping[str, Any]) -> Plan[RewardResponse]:
        if isinstance(request, RewardRequest):
            request = request.model_dump(exclude_unset=True)
        if self.model is not None:
            request = {"model": self.model, **request}
        try:
            body = json.dumps(request, allow_nan=False, separators=(",", ":")).encode()
        except (TypeError, ValueError) as error:
            raise ConversationError(
                f"the request cannot be written as JSON: {error}", reason="not_json"
            ) from None
        response = yield from self._call("POST", "/v1/reward", body)
        reply = _read(response)
        tolerant = request.get("on_error") == "item"
        for position, item in enumerate(reply.data):
            lacking = item.reward is None and not (tolerant and item.error is not None)
            if item.index != position or lacking or not math.isfinite(item.reward or 0.0):
                raise ServiceError(
                    f"the reply has no usable reward at position {position}",
                    status=response.status_code,
                    request_id=response.headers.get("x-request-id"),
                )
        return reply

    def _info(self) -> Plan[dict[str, Any]]:
        response = yield from self._call("GET", "/info", None)
        try:
            return _INFO.validate_json(response.content)
        except ValidationError:
            raise ServiceError(f"{self.base_url}/info did not answer with a JSON object") from None

    def _ready(self) -> Plan[bool]:
        timeout_s = min(_READY_TIMEOUT_S, self.timeout_s)
        outcome = yield Send("GET", "/ready", None, _new_id(), timeout_s)
        return isinstance(outcome, httpx.Response) and outcome.status_code == 200

    def _until_ready(self, timeout_s: float) -> Plan[None]:
        deadline = time.monotonic() + timeout_s
        while True:
            remaining = deadline - time.monotonic()
            patience = min(_READY_TIMEOUT_S, max(remaining, _READY_PAUSE_S))
            request = Send("GET", "/ready", None, _new_id(), patience)
            outcome = yield request
            if isinstance(outcome, httpx.Response) and outcome.status_code == 200:
                return
            if deadline - time.monotonic() <= _READY_PAUSE_S:
                raise self._fault(request, outcome).error
            yield Pause(_READY_PAUSE_S)

    def _call(self, method: str, path: str, body: bytes | None) -> Plan[httpx.Response]:
        """One request, sent until it is answered for good."""
        request_id = _new_id()
        deadline = time.monotonic() + self.timeout_s
        for attempt in itertools.count():
            remaining = max(deadline - time.monotonic(), 1e-3)
            request = Send(method, path, body, request_id, remaining)
            outcome = yield request
            if isinstance(outcome, httpx.Response) and outcome.status_code == 200:
                return outcome
            fault = self._fault(request, outcome)
            pause = fault.pause(attempt)
            late = time.monotonic() + pause >= deadline
            if not fault.passing or late or attempt >= self.max_retries:
                raise fault.error from (outcome if isinstance(outcome, Exception) else None)
            yield Pause(pause)
        raise AssertionError("the loop ends by return or raise")

    # ---- replies

    def _fault(self, request: Send, outcome: Outcome) -> Fault:
        where = f"{request.method} {self.base_url}{request.path}"
        if not isinstance(outcome, httpx.Response):
            return _transport_fault(where, outcome, request)
        own = _own_error(outcome)
        if own is not None:
            return _served_fault(own, outcome, request)
        return _foreign_fault(where, outcome, request)

    def _headers(self, request: Send) -> dict[str, str]:
        headers = {"x-request-id": request.request_id}
        if request.body is not None:
            headers["content-type"] = "application/json"
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        return headers

    def _request(self, request: Send) -> dict[str, Any]:
        """`request` as httpx wants it."""
        connect = min(request.timeout_s, _CONNECT_TIMEOUT_S)
        return {
            "method": request.method,
            "url": self.base_url + request.path,
            "content": request.body,
            "headers": self._headers(request),
            "timeout": httpx.Timeout(request.timeout_s, connect=connect),
        }


@dataclass(frozen=True)
class Fault:
    """Why an attempt gave no answer, and whether another one may."""

    error: ServiceError
    passing: bool
    retry_after_s: float | None = None

    def pause(self, attempt: int) -> float:
        """Seconds before the next attempt: what the server asked for, else doubling; with jitter,
        so that clients that failed together do not come back together."""
        longest = min(_FIRST_PAUSE_S * 2.0 ** min(attempt, 30), _LONGEST_PAUSE_S)
        jitter = random.uniform(0.5, 1.0) * longest
        return jitter if self.retry_after_s is None else self.retry_after_s + jitter / 4


def _transport_fault(where: str, outcome: httpx.TransportError | None, request: Send) -> Fault:
    what = f"{type(outcome).__name__}: {outcome}" if outcome is not None else "no reply"
    if isinstance(outcome, httpx.TimeoutException) and not isinstance(
        outcome, httpx.ConnectTimeout
    ):
        late = DeadlineError(
            f"{where}: no answer within the time limit; raise timeout_s, or send less at once",
            request_id=request.request_id,
        )
        return Fault(late, passing=True)
    gone = UnreachableError(
        f"{where}: {what}. Is the server running there?", request_id=request.request_id
    )
    return Fault(gone, passing=True)


def _served_fault(own: ErrorInfo, response: httpx.Response, request: Send) -> Fault:
    """The server itself said what is wrong: it knows whether trying again helps."""
    status = response.status_code
    details: dict[str, Any] = {
        "status": status,
        "request_id": own.request_id or request.request_id,
        "code": own.code,
    }
    if status in (429, 503):
        wait = _retry_after_s(response)
        error = OverloadedError(own.message, retry_after_s=wait, **details)
        return Fault(error, passing=True, retry_after_s=wait)
    elif status in (408, 504):
        return Fault(DeadlineError(own.message, **details), passing=False)
    elif status < 500:
        return Fault(RequestRefusedError(own.message, field=own.param, **details), passing=False)
    return Fault(ServiceError(own.message, **details), passing=False)


def _foreign_fault(where: str, response: httpx.Response, request: Send) -> Fault:
    """Something in front of the server spoke: a proxy whose replica was just killed, mostly."""
    status = response.status_code
    details: dict[str, Any] = {"status": status, "request_id": request.request_id}
    if status in (429, 503):
        wait = _retry_after_s(response)
        full = OverloadedError(f"{where}: HTTP {status}", retry_after_s=wait, **details)
        return Fault(full, passing=True, retry_after_s=wait)
    elif status in (408, 504):
        return Fault(DeadlineError(f"{where}: HTTP {status}", **details), passing=True)
    elif status >= 500:
        return Fault(ServiceError(f"{where}: HTTP {status}", **details), passing=True)
    message = (
        f"{where}: HTTP {status} that is not from a raywards server. Check base_url and the "
        "route prefix"
    )
    return Fault(RequestRefusedError(message, **details), passing=False)


def _own_error(response: httpx.Response) -> ErrorInfo | None:
    try:
        info = ErrorBody.model_validate_json(response.content).error
    except ValidationError:
        return None
    return info if info.code is not None else None


def _read(response: httpx.Response) -> RewardResponse:
    try:
        return RewardResponse.model_validate_json(response.content)
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        raise ServiceError(
            f"the reply is not one of a raywards server: {finding['loc']}: {finding['msg']}",
            status=response.status_code,
            request_id=response.headers.get("x-request-id"),
        ) from None


def _retry_after_s(response: httpx.Response) -> float | None:
    try:
        seconds = float(response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _with_callers_index(error: RequestRefusedError, chunk: Chunk) -> RequestRefusedError:
    """The same error, with the position in the caller's list and not in the slice of it."""
    found = re.match(rf"{chunk.field}\[(\d+)\]", error.field or "")
    if found is None or chunk.start == 0:
        return error
    there = f"{chunk.field}[{int(found[1]) + chunk.start}]"
    details = error.__dict__ | {"field": there + (error.field or "")[found.end() :]}
    return RequestRefusedError(str(error).replace(found[0], there), **details)


def _refuse_scalar(name: str, value: object, one: type, expected: str) -> None:
    """One where a list of them is expected would be split into nonsense."""
    single = isinstance(value, str | Mapping)
    if not single and isinstance(value, Sequence):
        single = one is not str and len(value) > 0 and isinstance(value[0], one)
    if single:
        raise ConversationError(
            f"{name}: expected a list such as {expected}, got a single one; put it in a list",
            reason="not_a_list",
        )


def _rest(on_error: str) -> dict[str, str]:
    return {} if on_error == "request" else {"on_error": on_error}


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _characters(message: object) -> int:
    content = message.get("content") if isinstance(message, Mapping) else None
    return len(content) if isinstance(content, str) else 0


def _new_id() -> str:
    return uuid.uuid4().hex
