"""Carries plans out for callers with an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx

from raywards.client.faults import Outcome, Reply
from raywards.client.plans import Part, Pause, Plan, Send, T, has_room, in_order
from raywards.errors import ServiceError


class Loops:
    """HTTP for any number of event loops, one after the other or side by side.

    A connection belongs to the loop that opened it, so that each loop has its own.
    """

    def __init__(self, max_connections: int, trust_env: bool) -> None:
        self._max_connections = max_connections
        self._trust_env = trust_env
        self._tls = httpx.create_ssl_context(trust_env=trust_env)  # takes 20 ms, so only once
        self._https: dict[asyncio.AbstractEventLoop, httpx.AsyncClient] = {}
        self._is_closed = False

    async def carry_out(self, plan: Plan[T]) -> T:
        """What the plan returns, or raises."""
        outcome: Outcome = None
        while True:
            try:
                step = plan.send(outcome)
            except StopIteration as stop:
                found: T = stop.value
                return found
            if isinstance(step, Pause):
                await asyncio.sleep(step.seconds)
                outcome = None
            else:
                outcome = await self._outcome(step)

    async def gather(self, parts: Sequence[Part]) -> list[Any]:
        """The rewards of all parts in order. What the first raises ends the call at once."""
        return in_order([pair async for pair in self._run(parts)])

    async def close(self) -> None:
        """Close the connections, of all loops that run."""
        self._is_closed = True
        here = asyncio.get_running_loop()
        while self._https:
            loop, http = self._https.popitem()
            if loop is here:
                await http.aclose()
            elif loop.is_running():
                asyncio.run_coroutine_threadsafe(http.aclose(), loop)

    async def _run(self, parts: Sequence[Part]) -> AsyncIterator[tuple[Part, list[Any]]]:
        """Each part with its rewards, as they end."""
        waiting = deque(parts)
        under_way: dict[Part, asyncio.Task[list[Any]]] = {}
        try:
            while waiting or under_way:
                while waiting and has_room(under_way, waiting[0], self._max_connections):
                    part = waiting.popleft()
                    under_way[part] = asyncio.ensure_future(self.carry_out(part.plan))
                await asyncio.wait(under_way.values(), return_when=asyncio.FIRST_COMPLETED)
                for part in [part for part, task in under_way.items() if task.done()]:
                    yield part, under_way.pop(part).result()
        finally:
            for task in under_way.values():
                task.cancel()
            await asyncio.gather(*under_way.values(), return_exceptions=True)

    async def _outcome(self, step: Send) -> Outcome:
        try:
            async with asyncio.timeout(step.timeout_s):
                response = await self._http().request(
                    step.method,
                    step.url,
                    content=step.body,
                    headers=step.headers,
                    timeout=httpx.Timeout(None, connect=step.connect_timeout_s),
                )
        except TimeoutError:
            return httpx.ReadTimeout("too late")
        except httpx.RequestError as error:
            return error
        return Reply(response.status_code, dict(response.headers), response.content)

    def _http(self) -> httpx.AsyncClient:
        """The running loop's own."""
        if self._is_closed:
            raise ServiceError("the client is closed; make another, or close it later")
        loop = asyncio.get_running_loop()
        if loop not in self._https:
            for other in [other for other in self._https if other.is_closed()]:
                del self._https[other]
            most = self._max_connections
            limits = httpx.Limits(max_connections=most, max_keepalive_connections=most)
            self._https[loop] = httpx.AsyncClient(
                limits=limits, verify=self._tls, trust_env=self._trust_env
            )
        return self._https[loop]
