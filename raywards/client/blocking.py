"""Carries plans out for callers that block: in their own thread, with requests in others."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any

import httpx

from raywards.client.faults import Outcome, Reply
from raywards.client.plans import Part, Pause, Plan, Send, T, has_room, in_order
from raywards.errors import ServiceError


class Blocking:
    """HTTP for any number of threads, and for processes that are forked from this one."""

    def __init__(self, max_connections: int, trust_env: bool) -> None:
        self._max_connections = max_connections
        self._trust_env = trust_env
        self._http, self._process = self._open(), os.getpid()

    def carry_out(self, plan: Plan[T]) -> T:
        """What the plan returns, or raises."""
        [(_, value)] = self._begin().run([Part(plan, (), 0)])
        found: T = value
        return found

    def gather(self, parts: Sequence[Part]) -> list[Any]:
        """The rewards of all parts in order. What the first raises ends the call at once."""
        return in_order(self._begin().run(parts))

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _begin(self) -> _Call:
        if self._process != os.getpid():
            # Two processes on one connection would read each other's rewards.
            self._http, self._process = self._open(), os.getpid()
        return _Call(self._http, self._max_connections)

    def _open(self) -> httpx.Client:
        most = self._max_connections
        limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
        return httpx.Client(limits=limits, trust_env=self._trust_env)


class _Call:
    """The plans of one call, all run by the caller's thread, which waits for what comes first.

    A read from a socket cannot be interrupted, and a server that sends a byte a second never lets
    it time out. So requests have threads of their own, and one that is late is left behind: it ends
    with its connection, and nobody waits for it, at the end of the program neither.
    """

    def __init__(self, http: httpx.Client, max_connections: int) -> None:
        self._http = http
        self._max_connections = max_connections
        self._under_way: dict[Part, tuple[Send | Pause, float]] = {}
        """What each part does now, and when that is over at the latest."""
        self._todo: SimpleQueue[tuple[Part, Send] | None] = SimpleQueue()
        self._done: SimpleQueue[tuple[Part, Send, Outcome | Exception]] = SimpleQueue()
        self._threads = 0
        self._idle = 0

    def run(self, parts: Sequence[Part]) -> Iterator[tuple[Part, Any]]:
        """Each part with what its plan returned, as they end."""
        waiting = deque(parts)
        try:
            while waiting or self._under_way:
                if waiting and has_room(self._under_way, waiting[0], self._max_connections):
                    part, outcome = waiting.popleft(), None
                else:
                    part, outcome = self._next()
                try:
                    self._begin(part, part.plan.send(outcome))
                except StopIteration as stop:
                    self._under_way.pop(part, None)
                    yield part, stop.value
        finally:
            for _ in range(self._threads):
                self._todo.put(None)

    def _begin(self, part: Part, step: Send | Pause) -> None:
        seconds = step.seconds if isinstance(step, Pause) else step.timeout_s
        self._under_way[part] = step, time.monotonic() + seconds
        if isinstance(step, Pause):
            return
        if self._idle:
            self._idle -= 1
        else:
            self._threads += 1
            threading.Thread(target=self._work, name="raywards-client", daemon=True).start()
        self._todo.put((part, step))

    def _next(self) -> tuple[Part, Outcome]:
        """The part that can go on first, and what came of its step."""
        while True:
            part, (step, due) = min(self._under_way.items(), key=lambda item: item[1][1])
            patience = min(max(due - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
            try:
                other, sent, outcome = self._done.get(timeout=patience)
            except Empty:
                if time.monotonic() < due:
                    continue
                return part, None if isinstance(step, Pause) else httpx.ReadTimeout("too late")
            self._idle += 1
            if self._under_way.get(other, (None,))[0] is not sent:
                continue  # it was late, and is not waited for any more
            if isinstance(outcome, Exception) and not isinstance(outcome, httpx.RequestError):
                raise outcome
            return other, outcome

    def _work(self) -> None:
        while (todo := self._todo.get()) is not None:
            part, step = todo
            try:
                self._done.put((part, step, _reply(self._http, step)))
            except Exception as error:
                self._done.put((part, step, error))


def _reply(http: httpx.Client, step: Send) -> Reply:
    """Raises `httpx.RequestError`; `ServiceError` where the client is closed."""
    if http.is_closed:
        raise ServiceError("the client is closed; make another, or close it later")
    deadline = time.monotonic() + step.timeout_s
    longest = min(step.timeout_s, threading.TIMEOUT_MAX)
    limit = httpx.Timeout(longest, connect=step.connect_timeout_s)
    with http.stream(
        step.method, step.url, content=step.body, headers=step.headers, timeout=limit
    ) as response:
        pieces = []
        for piece in response.iter_bytes():
            pieces.append(piece)
            if time.monotonic() >= deadline:
                raise httpx.ReadTimeout("too late")
        return Reply(response.status_code, dict(response.headers), b"".join(pieces))
