"""What the clients send, how they read a reply, and when they try again: written once, as plans.

A plan is a generator that yields what is to be done, a `Send` or a `Pause`, takes back what came of
it, and returns what the caller asked for. The two clients only carry plans out. Knows nothing of
models or Ray, and imports neither torch, ray nor transformers.
"""

from __future__ import annotations

import itertools
import math
import re
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Collection, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from raywards.client import rlhf
from raywards.client.faults import Outcome, Reply, fault_of
from raywards.client.inputs import (
    Conversation,
    as_json,
    as_list,
    as_messages,
    as_pair,
    as_prompt,
    as_text,
    as_token_ids,
    characters,
)
from raywards.errors import ConfigError, ConversationError, RequestRefusedError, ServiceError
from raywards.schemas import RewardRequest, RewardResponse

# One request is about one batch of the server's default budget (16,384 tokens of four characters).
_REQUEST_CHARACTERS = 65_536
_CHARACTERS_PER_TOKEN = 4
# Of one call. A replica batches across requests, so that many small ones keep it as busy as a few
# large ones; and this is too little to fill its queue.
_CHARACTERS_UNDER_WAY = 4 * _REQUEST_CHARACTERS
# httpcore looks at every open connection for every request: 64 take three times the CPU of 32.
_REQUESTS_UNDER_WAY = 32

_CONNECT_TIMEOUT_S = 10.0
_READY_PAUSE_S = 0.25
_READY_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Send:
    """To do: this request. Comes back as a reply, or as the error that kept it from coming.

    timeout_s: for all of it: waiting for a connection, making one, sending, and the whole reply.
    """

    method: str
    url: str
    headers: Mapping[str, str]
    body: bytes | None
    timeout_s: float

    @property
    def connect_timeout_s(self) -> float:
        """Less than all, so that a host that is not there is told from a server that is slow."""
        return min(0.9 * self.timeout_s, _CONNECT_TIMEOUT_S)


@dataclass(frozen=True)
class Pause:
    """To do: nothing, for a while. Comes back as `None`."""

    seconds: float


T = TypeVar("T")
Plan = Generator[Send | Pause, Outcome, T]

_INFO = TypeAdapter(dict[str, Any])


@dataclass(frozen=True)
class Chunk:
    """Sequences that travel in one request: some of what the caller gave.

    positions: of the items, in the caller's list.
    others: the request's other fields.
    """

    field: str
    items: Sequence[Any]
    positions: Sequence[int]
    others: Mapping[str, Any]

    def halves(self) -> tuple[Chunk, Chunk]:
        middle = len(self.items) // 2
        first = replace(self, items=self.items[:middle], positions=self.positions[:middle])
        return first, replace(self, items=self.items[middle:], positions=self.positions[middle:])


@dataclass(frozen=True, eq=False)
class Part:
    """One of the plans that a call is split into, and where the rewards that it gives belong."""

    plan: Plan[Any]
    positions: Sequence[int]
    characters: int


def has_room(under_way: Collection[Part], part: Part, max_connections: int) -> bool:
    """Whether `part` may begin while those are under way."""
    load = sum(one.characters for one in under_way) + part.characters
    most = min(max_connections, _REQUESTS_UNDER_WAY)
    return not under_way or (load <= _CHARACTERS_UNDER_WAY and len(under_way) < most)


def in_order(rewards: Iterable[tuple[Part, list[Any]]]) -> list[Any]:
    """The rewards of all parts, at their positions in the caller's list."""
    placed: dict[int, Any] = {}
    for part, values in rewards:
        placed.update(zip(part.positions, values, strict=True))
    return [placed[position] for position in sorted(placed)]


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
        trust_env: bool = True,
    ) -> None:
        """
        base_url: where the model is served, route prefix included.
        api_key: what the server was started with, if it was.
        model: name of the served model; default is whichever is served there.
        timeout_s: longest time for one request, all attempts and pauses together.
        max_retries: attempts after the first.
        max_connections: connections that are open at once.
        max_items_per_request: longer lists are split, and the rewards put together again.
        trust_env: whether the environment names proxies (HTTP_PROXY, ...) and certificates.
        """
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
        self.base_url = _checked_url(base_url)
        self.model = model
        self.timeout_s = timeout_s
        self.max_retries = max_retries
        self.max_items_per_request = max_items_per_request
        self._api_key = api_key
        self._open(max_connections, trust_env)

    @abstractmethod
    def _open(self, max_connections: int, trust_env: bool) -> None:
        """Make the transport."""

    def __repr__(self) -> str:
        key = "'***'" if self._api_key else "None"
        return f"{type(self).__name__}({self.base_url!r}, api_key={key}, model={self.model!r})"

    # ---- what the caller asked for, in requests

    def _of_conversations(
        self, conversations: Iterable[Conversation], others: Mapping[str, Any]
    ) -> list[Part]:
        expected = "[[{'role': ...}, ...], ...]"
        given = as_list("conversations", conversations, expected, part=Mapping)
        talks = [as_messages(f"conversations[{i}]", one) for i, one in enumerate(given)]
        return self._split("messages", talks, others, range(len(talks)))

    def _of_responses(
        self,
        prompt: str | Conversation,
        responses: Iterable[str],
        others: Mapping[str, Any],
    ) -> list[Part]:
        given = as_list("responses", responses, "['first answer', 'second answer']")
        texts = [as_text(f"responses[{i}]", one) for i, one in enumerate(given)]
        others = {"prompt": as_prompt("prompt", prompt), **others}
        return self._split("responses", texts, others, range(len(texts)))

    def _of_pairs(
        self, pairs: Iterable[tuple[str | Conversation, str]], others: Mapping[str, Any]
    ) -> list[Part]:
        given = as_list("pairs", pairs, "[('prompt', 'answer'), ...]")
        known = [as_pair(f"pairs[{i}]", one) for i, one in enumerate(given)]
        together: dict[str, list[int]] = {}
        for index, (prompt, _) in enumerate(known):
            together.setdefault(as_json(f"pairs[{index}][0]", prompt), []).append(index)
        parts: list[Part] = []
        for positions in together.values():
            texts = [known[index][1] for index in positions]
            shared = {"prompt": known[positions[0]][0], **others}
            parts += self._split("responses", texts, shared, positions)
        return parts

    def _of_texts(self, texts: Iterable[str], others: Mapping[str, Any]) -> list[Part]:
        given = as_list("texts", texts, "['<rendered text>', ...]")
        known = [as_text(f"texts[{i}]", one) for i, one in enumerate(given)]
        return self._split("input", known, others, range(len(known)))

    def _of_ids(self, sequences: Iterable[Iterable[int]], others: Mapping[str, Any]) -> list[Part]:
        given = as_list("sequences", sequences, "[[1, 2, 3], ...]")
        rows = [as_token_ids(f"sequences[{i}]", one) for i, one in enumerate(given)]
        return self._split("input_ids", rows, others, range(len(rows)))

    def _of_trl(
        self, prompts: Sequence[Any], completions: Sequence[Any], others: Mapping[str, Any]
    ) -> list[Part]:
        given = rlhf.of_trl(prompts, completions)
        if given and isinstance(given[0], tuple):
            return self._of_pairs(given, others)
        return self._of_conversations(given, others)  # type: ignore[arg-type]

    def _split(
        self,
        field: str,
        items: Sequence[Any],
        others: Mapping[str, Any],
        positions: Sequence[int],
    ) -> list[Part]:
        """Requests of a size that is worth one, in the order of the items."""
        shared = characters(others.get("prompt", ""))
        parts: list[Part] = []
        start, load = 0, 0
        sizes = [shared + _size(field, item) for item in items]
        for end, size in enumerate([*sizes, 0]):
            full = end - start >= self.max_items_per_request or load + size > _REQUEST_CHARACTERS
            if end > start and (full or end == len(items)):
                chunk = Chunk(field, items[start:end], positions[start:end], others)
                parts.append(Part(self._rewards(chunk), chunk.positions, load))
                start, load = end, 0
            load += size
        return parts

    def _rewards(self, chunk: Chunk) -> Plan[list[Any]]:
        """The rewards of a chunk; where `on_error="item"` was asked for, None for what has none."""
        try:
            reply = yield from self._reward({**chunk.others, chunk.field: list(chunk.items)})
        except RequestRefusedError as error:
            tolerant = chunk.others.get("on_error") == "item"
            # The server refuses a body that breaks its schema as a whole, whatever `on_error`.
            at_fault = re.split(r"[.\[]", error.field or "")[0] if tolerant else None
            of_items = error.status == 413 or at_fault == chunk.field
            if of_items and len(chunk.items) > 1:
                first, second = chunk.halves()
                before = yield from self._rewards(first)
                after = yield from self._rewards(second)
                return before + after
            if tolerant and (of_items or at_fault == "prompt"):
                return [None] * len(chunk.items)
            raise _with_callers_index(error, chunk) from error.__cause__
        rewards = [item.reward for item in reply.data]
        if len(rewards) != len(chunk.items):
            raise ServiceError(
                f"the reply has {len(rewards)} rewards for {len(chunk.items)} sequences"
            )
        return rewards

    # ---- requests

    def _reward(self, request: RewardRequest | Mapping[str, Any]) -> Plan[RewardResponse]:
        if isinstance(request, RewardRequest):
            request = request.model_dump(exclude_unset=True)
        if not isinstance(request, Mapping):
            raise ConversationError(
                f"request: expected a RewardRequest or a dict, got a {type(request).__name__}",
                reason="malformed",
            )
        if self.model is not None:
            request = {"model": self.model, **request}
        body = as_json("the request", {**request}).encode()
        response = yield from self._call("POST", "/v1/reward", body)
        reply = _read(response)
        tolerant = request.get("on_error") == "item"
        for position, item in enumerate(reply.data):
            lacking = item.reward is None and not (tolerant and item.error is not None)
            if item.index != position or lacking or not math.isfinite(item.reward or 0.0):
                raise ServiceError(
                    f"the reply has no usable reward at position {position}",
                    status=response.status,
                    request_id=response.headers.get("x-request-id"),
                )
        return reply

    def _info(self) -> Plan[dict[str, Any]]:
        reply = yield from self._call("GET", "/info", None)
        try:
            return _INFO.validate_json(reply.content)
        except ValidationError:
            raise ServiceError(f"{self.base_url}/info did not answer with a JSON object") from None

    def _ready(self) -> Plan[bool]:
        timeout_s = min(_READY_TIMEOUT_S, self.timeout_s)
        outcome = yield self._send("GET", "/ready", None, uuid.uuid4().hex, timeout_s)
        return isinstance(outcome, Reply) and outcome.status == 200

    def _until_ready(self, timeout_s: float) -> Plan[None]:
        deadline = time.monotonic() + timeout_s
        while True:
            remaining = deadline - time.monotonic()
            patience = min(_READY_TIMEOUT_S, max(remaining, _READY_PAUSE_S))
            request_id = uuid.uuid4().hex
            request = self._send("GET", "/ready", None, request_id, patience)
            outcome = yield request
            if isinstance(outcome, Reply) and outcome.status == 200:
                return
            if deadline - time.monotonic() <= _READY_PAUSE_S:
                raise fault_of(f"GET {request.url}", outcome, request_id).error
            yield Pause(_READY_PAUSE_S)

    def _call(self, method: str, path: str, body: bytes | None) -> Plan[Reply]:
        """One request, sent until it is answered for good."""
        request_id = uuid.uuid4().hex
        deadline = time.monotonic() + self.timeout_s
        for attempt in itertools.count():
            remaining = max(deadline - time.monotonic(), 1e-3)
            request = self._send(method, path, body, request_id, remaining)
            outcome = yield request
            if isinstance(outcome, Reply) and outcome.status == 200:
                return outcome
            fault = fault_of(f"{method} {request.url}", outcome, request_id)
            pause = fault.pause(attempt)
            late = time.monotonic() + pause >= deadline
            if not fault.passing or late or attempt >= self.max_retries:
                raise fault.error from (outcome if isinstance(outcome, Exception) else None)
            yield Pause(pause)
        raise AssertionError("the loop ends by return or raise")

    def _send(
        self, method: str, path: str, body: bytes | None, request_id: str, timeout_s: float
    ) -> Send:
        headers = {"x-request-id": request_id}
        if body is not None:
            headers["content-type"] = "application/json"
        if self._api_key is not None:
            headers["authorization"] = f"Bearer {self._api_key}"
        return Send(method, self.base_url + path, headers, body, timeout_s)


def _checked_url(base_url: str) -> str:
    """Without a slash at its end. Raises `ConfigError`."""
    expected = "expected http://host:port or https://host, and a route prefix where there is one"
    try:
        url = httpx.URL(base_url)
        url.host.encode("idna")
    except (TypeError, UnicodeError, httpx.InvalidURL) as error:
        raise ConfigError(f"base_url={base_url!r}: {error}; {expected}") from None
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise ConfigError(f"base_url={base_url!r}: {expected}")
    if url.port is not None and not 0 < url.port < 65_536:
        raise ConfigError(f"base_url={base_url!r}: there is no port {url.port}; {expected}")
    return base_url.rstrip("/")


def _size(field: str, item: Any) -> int:
    return len(item) * _CHARACTERS_PER_TOKEN if field == "input_ids" else characters(item)


def _read(reply: Reply) -> RewardResponse:
    try:
        return RewardResponse.model_validate_json(reply.content)
    except ValidationError as error:
        finding = error.errors(include_url=False, include_input=False)[0]
        raise ServiceError(
            f"the reply is not one of a raywards server: {finding['loc']}: {finding['msg']}",
            status=reply.status,
            request_id=reply.headers.get("x-request-id"),
        ) from None


def _with_callers_index(error: RequestRefusedError, chunk: Chunk) -> RequestRefusedError:
    """The same error, with the position in the caller's list and not in the slice of it."""
    found = re.match(rf"{chunk.field}\[(\d+)\]", error.field or "")
    if found is None or int(found[1]) >= len(chunk.positions):
        return error
    there = f"{chunk.field}[{chunk.positions[int(found[1])]}]"
    details = error.__dict__ | {"field": there + (error.field or "")[found.end() :]}
    return RequestRefusedError(str(error).replace(found[0], there), **details)
