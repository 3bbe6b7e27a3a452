"""How the clients carry requests: time limits, event loops, what is under way, processes, proxies.

Against real sockets: the app that replicas run, and servers that misbehave as that one never does.
"""

from __future__ import annotations

import asyncio
import gzip
import inspect
import json
import math
import multiprocessing
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from test_client import Served, reward_of, talk

from raywards.client import AsyncRewardClient, RewardClient
from raywards.config import ServeConfig
from raywards.errors import (
    DeadlineError,
    OverloadedError,
    RequestRefusedError,
    ServiceError,
    UnreachableError,
)
from raywards.serve.app import _check_endpoint, endpoint

Handler = Callable[[socket.socket, bytes], None]
KINDS = [RewardClient, AsyncRewardClient]


@contextmanager
def listening(handle: Handler) -> Iterator[str]:
    """A server in threads: `handle` gets each connection with the request that came over it."""

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):  # where the client is gone
            handle(connection, read_request(connection))

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


def read_request(connection: socket.socket) -> bytes:
    """The body of the next request."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += receive(connection)
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
    size = int(lengths[0].partition(b":")[2]) if lengths else 0
    while len(body) < size:
        body += receive(connection)
    return body


def receive(connection: socket.socket) -> bytes:
    received = connection.recv(65_536)
    if not received:
        raise OSError("closed")
    return received


def answer(connection: socket.socket, status: int, body: bytes, *headers: str) -> None:
    lines = [f"HTTP/1.1 {status} said", f"content-length: {len(body)}", "connection: close"]
    connection.sendall("\r\n".join([*lines, *headers, "", ""]).encode() + body)


def rewards_for(request: bytes) -> bytes:
    """A reply with a reward for each sequence: its first token."""
    rows = [
        {"index": index, "reward": ids[0], "score": ids[0], "num_tokens": 1}
        for index, ids in enumerate(json.loads(request)["input_ids"])
    ]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    timing = {"queue_ms": 0, "tokenize_ms": 0, "forward_ms": 0, "batch_size": 1}
    reply = {"id": "x", "created": 1, "model": "rm", "revision": None, "data": rows}
    return json.dumps({**reply, "usage": usage, "timing": timing}).encode()


def refusal(code: str) -> bytes:
    error = {"message": "refused", "type": "invalid_request_error", "code": code}
    return json.dumps({"error": error}).encode()


def call(kind: Any, url: str, work: Callable[[Any], Any], **settings: Any) -> Any:
    """What `work` gives, done with a client of that kind, awaited where it is to be."""
    if kind is RewardClient:
        with RewardClient(url, **settings) as client:
            return work(client)

    async def main() -> Any:
        async with AsyncRewardClient(url, **settings) as client:
            found = work(client)
            return await found if inspect.isawaitable(found) else found

    return asyncio.run(main())


def drips(piece: bytes, before: bytes) -> Handler:
    """`before`, then a piece every 0.2 s for 6 s."""

    def handle(connection: socket.socket, request: bytes) -> None:
        connection.sendall(before)
        for _ in range(30):
            time.sleep(0.2)
            connection.sendall(piece)

    return handle


# ---- time


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "handle",
    [
        drips(b" ", b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"),
        drips(b"x-more: 1\r\n", b"HTTP/1.1 200 OK\r\n"),
        drips(b"", b""),
    ],
    ids=["body", "headers", "nothing"],
)
def test_the_time_limit_holds_however_slowly_a_reply_comes(kind: Any, handle: Handler) -> None:
    with listening(handle) as url:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="raise timeout_s"):
            call(kind, url, lambda client: client.score_ids([[1]]), timeout_s=0.7)
        assert 0.6 < time.monotonic() - started < 1.5
        started = time.monotonic()
        assert call(kind, url, lambda client: client.ready(), timeout_s=0.7) is False
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_time_limit_counts_the_wait_for_a_connection(kind: Any) -> None:
    """Three requests share one connection to a server that takes a second for each."""

    def handle(connection: socket.socket, request: bytes) -> None:
        time.sleep(1)
        answer(connection, 200, rewards_for(request))

    def in_threads(client: RewardClient) -> list[Any]:
        with ThreadPoolExecutor(3) as pool:
            running = [pool.submit(client.score_ids, [[n]]) for n in range(3)]
            return [one.exception() or one.result() for one in running]

    async def in_tasks(client: AsyncRewardClient) -> list[Any]:
        running = [client.score_ids([[n]]) for n in range(3)]
        return await asyncio.gather(*running, return_exceptions=True)

    work: Any = in_threads if kind is RewardClient else in_tasks
    with listening(handle) as url:
        started = time.monotonic()
        found = call(kind, url, work, timeout_s=1.6, max_connections=1)
        assert time.monotonic() - started < 1.9
    assert sum(isinstance(one, DeadlineError) for one in found) == 2
    assert sum(one in ([0.0], [1.0], [2.0]) for one in found) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_does_not_take_connections_is_unreachable_and_not_slow(kind: Any) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        address = full.getsockname()
        queued = []
        for _ in range(8):  # beyond its backlog, the kernel drops what asks to connect
            queued.append(socket.socket())
            queued[-1].setblocking(False)
            queued[-1].connect_ex(address)
        url = f"http://127.0.0.1:{address[1]}"
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="ConnectTimeout"):
            call(kind, url, lambda c: c.score_ids([[1]]), timeout_s=0.6, max_retries=0)
        assert time.monotonic() - started < 1.2
        for one in queued:
            one.close()


@pytest.mark.parametrize("kind", KINDS)
def test_no_time_limit_is_too_long(kind: Any) -> None:
    with Served() as server:
        found = call(kind, server.url, lambda c: c.score_ids([[1]]), timeout_s=math.inf)
    assert found == [reward_of([1])]


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_part_is_refused_for_ends_the_call_at_once(kind: Any) -> None:
    """The second part is told to come back in 4 seconds, the third is being computed."""
    seen: list[int] = []

    def handle(connection: socket.socket, request: bytes) -> None:
        first = json.loads(request)["input_ids"][0][0]
        seen.append(first)
        if first == 1:
            while len(seen) < 3:
                time.sleep(0.01)
            answer(connection, 422, refusal("too_long"))
        elif first == 2:
            answer(connection, 503, b"", "retry-after: 4")
        else:
            time.sleep(4)

    with listening(handle) as url:
        started = time.monotonic()
        ids = [[1], [2], [3]]
        with pytest.raises(RequestRefusedError):
            call(kind, url, lambda client: client.score_ids(ids), max_items_per_request=1)
        assert time.monotonic() - started < 2
    assert sorted(seen) == [1, 2, 3]


@pytest.mark.parametrize("kind", KINDS)
def test_a_date_in_retry_after_is_waited_for(kind: Any) -> None:
    asked: list[float] = []
    due = datetime.now(UTC) + timedelta(seconds=2)

    def handle(connection: socket.socket, request: bytes) -> None:
        asked.append(time.time())
        if len(asked) == 1:
            answer(connection, 503, b"", f"retry-after: {format_datetime(due, usegmt=True)}")
        else:
            answer(connection, 200, rewards_for(request))

    with listening(handle) as url:
        assert call(kind, url, lambda client: client.score_ids([[7]])) == [7.0]
    assert int(due.timestamp()) <= asked[1] < due.timestamp() + 1.5


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sun, 06 Nov 1994 08:49:37 -0000", 0.0),
        ("7.5", 7.5),
        ("-3", None),
        ("nan", None),
        ("tomorrow", None),
        ("Sun, 99 Nov 1994 08:49:37 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    def handle(connection: socket.socket, request: bytes) -> None:
        answer(connection, 503, b"", f"retry-after: {value}")

    with listening(handle) as url, pytest.raises(OverloadedError) as caught:
        call(RewardClient, url, lambda client: client.score_ids([[1]]), max_retries=0)
    assert caught.value.retry_after_s == seconds


@pytest.mark.parametrize(("told", "width"), [(1, 0.25), (20, 5.0), (0, 0.25)])
def test_clients_that_are_told_one_time_come_back_over_a_quarter_of_it(
    told: int, width: float
) -> None:
    from raywards.client.faults import Reply, fault_of

    random.seed(0)
    fault = fault_of("POST", Reply(503, {"retry-after": str(told)}, b""), "id")
    pauses = [fault.pause(0) for _ in range(1000)]
    assert min(pauses) >= told
    assert max(pauses) <= told + width
    assert max(pauses) - min(pauses) > 0.9 * width


# ---- what is under way


def test_many_small_requests_are_under_way_at_once() -> None:
    """As many as there are connections, or as four large requests have characters."""
    under_way, most = 0, 0
    lock = threading.Lock()

    def handle(connection: socket.socket, request: bytes) -> None:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.3)
        with lock:
            under_way -= 1
        answer(connection, 200, rewards_for(request))

    with listening(handle) as url:
        for kind in KINDS:
            most = 0
            ids = [[n] for n in range(24)]
            settings: dict[str, Any] = {"max_items_per_request": 1, "max_connections": 12}
            found = call(kind, url, lambda c, ids=ids: c.score_ids(ids), **settings)
            assert found == [float(n) for n in range(24)]
            assert most == 12
            most = 0
            ids = [[n] * 16_384 for n in range(8)]  # 65,536 characters each
            found = call(kind, url, lambda c, ids=ids: c.score_ids(ids), max_connections=12)
            assert found == [float(n) for n in range(8)]
            assert most == 4


def test_pairs_of_different_prompts_share_batches() -> None:
    """One request each: the batcher gets many of them at once."""
    with Served() as server, server.client() as client:
        server.scorer.gate.clear()
        found: list[list[float]] = []
        pairs = [(f"prompt {n}", "answer") for n in range(32)]
        server.proxy.seen.clear()
        thread = threading.Thread(target=lambda: found.append(client.score_pairs(iter(pairs))))
        thread.start()
        deadline = time.monotonic() + 10
        while len(server.proxy.seen) < 32:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        server.scorer.gate.set()
        thread.join(10)
        assert found == [[reward_of(server.scorer.encode_response(*pair)) for pair in pairs]]


def test_no_thread_stays_behind() -> None:
    def threads() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name == "raywards-client"}

    before = threads()  # of tests whose servers never answer
    with Served() as server, server.client(max_items_per_request=1) as client:
        client.score_ids([[n] for n in range(9)])
        with pytest.raises(RequestRefusedError):
            client.score_ids([[300], *([n] for n in range(9))])
        deadline = time.monotonic() + 10
        while threads() - before:
            assert time.monotonic() < deadline
            time.sleep(0.01)


# ---- loops, threads and processes


def test_one_async_client_serves_one_loop_after_the_other() -> None:
    with Served() as server:
        client = AsyncRewardClient(server.url)
        for token in (1, 2, 3):
            assert asyncio.run(client.score_ids([[token], [9]])) == [
                reward_of([token]),
                reward_of([9]),
            ]
        assert len(client._transport._https) == 1
        asyncio.run(client.close())
        assert not client._transport._https


def test_one_async_client_serves_loops_side_by_side() -> None:
    with Served() as server:
        client = AsyncRewardClient(server.url)
        found: dict[int, list[float]] = {}
        both_have_asked = threading.Barrier(2)

        async def main(token: int) -> None:
            found[token] = await client.score_ids([[token]])
            await asyncio.to_thread(both_have_asked.wait, 10)
            found[token] += await client.score_ids([[token + 1]])

        threads = [threading.Thread(target=asyncio.run, args=(main(t),)) for t in (10, 20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert found == {t: [reward_of([t]), reward_of([t + 1])] for t in (10, 20)}
        asyncio.run(client.close())


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_client_says_so(kind: Any) -> None:
    async def close_and_ask(client: AsyncRewardClient) -> None:
        await client.close()
        await client.score_ids([[1]])

    def close_and_ask_here(client: RewardClient) -> None:
        client.close()
        client.score_ids([[1]])

    work: Any = close_and_ask_here if kind is RewardClient else close_and_ask
    with Served() as server, pytest.raises(ServiceError, match="closed"):
        call(kind, server.url, work)


def test_a_forked_process_has_connections_of_its_own() -> None:
    """On those of its parent, each could read the rewards of the other."""
    with Served() as server, server.client() as client:
        assert client.score_ids([[1]]) == [reward_of([1])]
        fork = multiprocessing.get_context("fork")
        replies = fork.SimpleQueue()

        def child(token: int) -> None:
            try:
                replies.put((token, client.score_ids([[token]] * 40)))
            finally:
                os._exit(0)

        children = [fork.Process(target=child, args=(token,)) for token in (5, 6, 7)]
        for one in children:
            one.start()
        assert client.score_ids([[8]] * 40) == [reward_of([8])] * 40
        for one in children:
            one.join(30)
            assert one.exitcode == 0
        found = dict(replies.get() for _ in children)
        assert found == {token: [reward_of([token])] * 40 for token in (5, 6, 7)}


# ---- what stands between


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_reply_is_tried_again_and_then_told(kind: Any) -> None:
    whole = gzip.compress(b"x" * 5000)

    def handle(connection: socket.socket, request: bytes) -> None:
        seen.append(1)
        if len(seen) == 3:
            answer(connection, 200, rewards_for(request))
        else:
            answer(connection, 200, whole[:9] + b"damage" + whole[20:], "content-encoding: gzip")

    seen: list[int] = []
    with listening(handle) as url:
        assert call(kind, url, lambda client: client.score_ids([[7]])) == [7.0]
        seen.clear()
        with pytest.raises(ServiceError, match="damaged"):
            call(kind, url, lambda client: client.score_ids([[7]]), max_retries=1)
        assert len(seen) == 2


@pytest.fixture
def behind_a_proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The environment names one that lets nothing through."""

    def proxy(connection: socket.socket, request: bytes) -> None:
        answer(connection, 403, b"no way")

    with listening(proxy) as address:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, address)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("behind_a_proxy")
def test_proxies_of_the_environment_may_be_ignored(kind: Any) -> None:
    with Served() as server:
        with pytest.raises(RequestRefusedError, match="403"):
            call(kind, server.url, lambda client: client.score([talk("a")]))
        found = call(kind, server.url, lambda client: client.score([talk("a")]), trust_env=False)
    assert found == [reward_of(server.scorer.encode(talk("a")))]


@pytest.mark.usefixtures("behind_a_proxy")
def test_a_job_finds_its_own_endpoint_behind_a_proxy() -> None:
    with Served() as server:
        port = int(server.url.rpartition(":")[2])
        with pytest.raises(RequestRefusedError):
            call(RewardClient, server.url, lambda client: client.wait_until_ready(0.1))
        _check_endpoint(ServeConfig(model="fake", host="127.0.0.1", port=port))


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://127.0.0.1:8000"),
        ("::1", "http://[::1]:8000"),
        ("rm.local", "http://rm.local:8000"),
    ],
)
def test_the_endpoint_is_an_address_that_clients_take(host: str, url: str) -> None:
    assert endpoint(ServeConfig(model="fake", host=host, port=8000)) == url
    assert RewardClient(url).base_url == url
