"""Clients that lie, stall, leave or come in thousands: the server's own socket, without Serve.

uvicorn as in a replica; behind Serve, its proxy or HAProxy stands in front of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from contract import EXAMPLES
from gates import KEY, Gate
from served import Served, served
from talks import TALKS

from raywards.serve.http import ROUTES

BOUND = 1e-5
GOOD = json.dumps({"messages": TALKS}).encode()
# What tells nothing about the model: a load balancer asks, or a person's browser.
OPEN = {"/health", "/ping", "/ready", "/"}


@pytest.fixture(scope="module")
def impatient(folder: Path) -> Iterator[Served]:
    """Gives a request two seconds, and 20,000 bytes."""
    with served(folder, request_timeout_s=2.0, max_body_bytes=20_000) as running:
        yield running


@pytest.fixture(autouse=True)
def next_request_is_right(rm: Served, impatient: Served, rewards: list[float]) -> Iterator[None]:
    yield
    for server in (rm, impatient):
        with httpx.Client(base_url=server.url, timeout=30, verify=False) as later:
            rows = later.post("/v1/reward", json={"messages": TALKS}).json()["data"]
        assert [row["reward"] for row in rows] == pytest.approx(rewards, abs=BOUND)


@contextlib.contextmanager
def connected(server: Served) -> Iterator[socket.socket]:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port or 80), timeout=20) as connection:
        yield connection


def head(path: str = "/v1/reward", *lines: str, method: str = "POST") -> bytes:
    fields = ["host: rm", "content-type: application/json", *lines]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *fields, "", ""]).encode("latin-1")


def read(connection: socket.socket, count: int = 1) -> list[tuple[int, dict[str, str], bytes]]:
    """Replies off a connection: status, headers, body; fewer where the server closes it."""
    left, replies = b"", []
    while len(replies) < count:
        found = re.search(rb"\r\n\r\n", left)
        headers: dict[str, str] = {}
        if found:
            first, *lines = left[: found.start()].decode("latin-1").split("\r\n")
            headers = dict(line.lower().split(": ", 1) for line in lines)
            size = int(headers.get("content-length", 0))
            if len(left) >= found.end() + size:
                body = left[found.end() : found.end() + size]
                replies.append((int(first.split()[1]), headers, body))
                left = left[found.end() + size :]
                continue
        try:
            more = connection.recv(65536)
        except ConnectionResetError:
            more = b""
        if not more:
            break
        left += more
    return replies


def exchange(server: Served, *parts: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """The first reply to bytes; none where the server only closes the connection."""
    with connected(server) as connection:
        for part in parts:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(part)
        return read(connection)


def rewards_in(body: bytes) -> list[float]:
    return [row["reward"] for row in json.loads(body)["data"]]


def length(body: bytes) -> str:
    return f"content-length: {len(body)}"


# ---- bodies that lie about themselves


def test_a_body_that_never_ends_is_cut_off(impatient: Served) -> None:
    with connected(impatient) as connection:
        connection.sendall(head("/v1/reward", "transfer-encoding: chunked") + b"1\r\n{\r\n")
        [(status, _, body)] = read(connection)
    assert (status, json.loads(body)["error"]["code"]) == (408, "timeout")
    with connected(impatient) as connection:
        connection.sendall(head("/v1/reward", "content-length: 100") + b'{"messages"')
        [(status, _, _)] = read(connection)
    assert status == 408


def test_a_body_that_trickles_is_cut_off(impatient: Served) -> None:
    with connected(impatient) as connection:
        connection.sendall(head("/v1/reward", "transfer-encoding: chunked"))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(60):
                connection.sendall(b"1\r\n \r\n")
                time.sleep(0.05)
        [(status, _, _)] = read(connection)
    assert status == 408


def test_a_body_that_is_too_large_is_refused_by_its_length_alone(impatient: Served) -> None:
    for size in (20_001, 10**9, 10**18):
        [(status, _, body)] = exchange(impatient, head("/v1/reward", f"content-length: {size}"))
        assert (status, json.loads(body)["error"]["code"]) == (413, "body_too_large")
    [(status, _, _)] = exchange(
        impatient,
        head("/v1/reward", "transfer-encoding: chunked"),
        *[b"1000\r\n" + b" " * 0x1000 + b"\r\n"] * 50,
    )
    assert status == 413


def test_what_follows_a_refused_body_is_not_taken_for_a_request(
    impatient: Served, rewards: list[float]
) -> None:
    """The rest of a body that nobody reads could look like one."""
    smuggled = head("/v1/reward", length(GOOD)) + GOOD
    rest = smuggled + b" " * (30_000 - len(smuggled))
    with connected(impatient) as connection:
        connection.sendall(head("/v1/reward", length(rest)))
        connection.sendall(rest)
        connection.sendall(smuggled.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        replies = read(connection, 3)
    assert replies[0][0] == 413
    assert len(replies) <= 2
    for status, _, body in replies[1:]:
        assert status == 200
        assert rewards_in(body) == pytest.approx(rewards, abs=BOUND)


@pytest.mark.parametrize(
    "lines",
    [
        ["content-length: -1"],
        ["content-length: 5, 6"],
        ["content-length: +5"],
        ["content-length: 0x5"],
        ["content-length: " + "9" * 40],
        ["content-length: 5", "content-length: 6"],
        ["content-length: 5", "transfer-encoding: chunked"],
        ["transfer-encoding: xchunked"],
        ["transfer-encoding: chunked", "transfer-encoding: identity"],
        ["content-length : 5"],
        ["con\x00tent: 5"],
        ["x: a\rb"],
    ],
)
def test_headers_that_two_servers_read_in_two_ways(lines: list[str], impatient: Served) -> None:
    """A refusal or a closed connection; never a reward."""
    for status, _, _ in exchange(impatient, head("/v1/reward", *lines) + GOOD):
        assert 400 <= status < 500


@pytest.mark.parametrize(
    "garbage",
    [
        b"\r\n\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
        b"GET /v1/reward\r\n\r\n",
        b"POST /v1/reward HTTP/9.9\r\nhost: rm\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x00" * 5000,
        b"A" * 200_000,
        b"POST " + b"/" * 200_000 + b" HTTP/1.1\r\nhost: rm\r\n\r\n",
        b"POST /v1/reward HTTP/1.1\r\n" + b"a: b\r\n" * 100_000 + b"\r\n",
        b"POST /v1/reward HTTP/1.1\r\nx: " + b"b" * 2_000_000 + b"\r\n\r\n",
    ],
    ids=range(10),
)
def test_bytes_that_are_no_request(garbage: bytes, rm: Served) -> None:
    with connected(rm) as connection:
        with contextlib.suppress(OSError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(OSError):
            for status, _, _ in read(connection):
                assert 400 <= status < 500


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "X" * 50])
def test_other_methods_are_refused(method: str, rm: Served) -> None:
    for status, _, _ in exchange(rm, head("/v1/reward", "content-length: 0", method=method)):
        assert status in (400, 404, 405)


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/v1/../v1/models/../../info/x", "/%2e%2e/%2e%2e/etc/passwd",
        "//evil/v1/reward", "/v1/reward%00", "/v1/reward/%0d%0aset-cookie:x", "/docs/../../x",
        "/v1/reward;a=b", "/" + "a" * 30_000, "/%ff%fe", "/static/../../x",
    ],
)  # fmt: skip
def test_other_paths_are_404(path: str, rm: Served) -> None:
    for status, headers, body in exchange(rm, head(path, length(GOOD)) + GOOD):
        assert status in (404, 400, 414)
        assert "set-cookie" not in headers
        assert b"root:" not in body
        assert len(body) < 2000


@pytest.mark.parametrize(
    "given", ["a\x01b", "a\tb", "é", "r" * 129, "", " ", "\u00ff" * 20, "a\x7fb"]
)
def test_a_request_id_that_is_no_word_is_replaced(given: str, rm: Served) -> None:
    for status, headers, _ in exchange(
        rm, head("/v1/reward", f"x-request-id: {given}", length(GOOD)) + GOOD
    ):
        if status == 200:  # otherwise, no header at all
            assert re.fullmatch(r"[0-9a-f]{32}", headers["x-request-id"])


# ---- who may ask


def test_every_path_asks_for_the_key(guarded: Served) -> None:
    schema = guarded.http.get("/openapi.json", headers={"authorization": f"Bearer {KEY}"}).json()
    known = {(path, verb) for path, verbs in schema["paths"].items() for verb in verbs}
    assert {path for path, verb in known if verb == "post"} == {route.path for route in ROUTES}
    known |= {("/docs", "get"), ("/openapi.json", "get"), ("/", "get")}
    for path, verb in known:
        for query in ("", f"?api_key={KEY}", f"?key={KEY}&token={KEY}"):
            response = guarded.http.request(verb, path + query, json={} if verb == "post" else None)
            expected = 200 if verb == "get" and path in OPEN else 401
            assert response.status_code == expected, (verb, path)


@pytest.mark.parametrize(
    "lines",
    [
        ["authorization:"],
        ["authorization: Bearer"],
        ["authorization: Bearer "],
        [f"authorization: Bearer {KEY}x"],
        [f"authorization: Bearer {KEY[:-1]}"],
        [f"authorization: Bearer {KEY}, Bearer {KEY}"],
        [f"authorization: Bearer {KEY}", "authorization: Bearer x"],
        [f"authorization: Bearer {KEY}", f"authorization: Bearer {KEY}"],
        ["authorization: Bearer sch\u00fcssel"],
        [f"authorization: Basic {KEY}"],
        ["authorization: Bearer " + "k" * 10_000],
        [f"x-api-key: {KEY}"],
        [f"cookie: authorization=Bearer {KEY}"],
    ],
)
def test_what_is_not_the_key_is_401(lines: list[str], guarded: Served) -> None:
    for example in {example.path: example for example in EXAMPLES}.values():
        body = json.dumps(example.body).encode()
        [(status, _, reply)] = exchange(guarded, head(example.path, *lines, length(body)) + body)
        assert status == 401
        assert KEY.encode() not in reply


# ---- many at once, and some that leave


def test_requests_on_one_connection_are_answered_in_order(rm: Served, rewards: list[float]) -> None:
    bodies = [json.dumps({"messages": TALKS[n % 3]}).encode() for n in range(12)]
    with connected(rm) as connection:
        connection.sendall(b"".join(head("/v1/reward", length(body)) + body for body in bodies))
        replies = read(connection, len(bodies))
    assert [status for status, _, _ in replies] == [200] * 12
    found = [rewards_in(body)[0] for _, _, body in replies]
    assert found == pytest.approx(rewards * 4, abs=BOUND)


def test_slow_and_idle_connections_hold_up_nobody(rm: Served, rewards: list[float]) -> None:
    with contextlib.ExitStack() as idle:
        for n in range(1000):
            connection = idle.enter_context(connected(rm))
            if n % 2:
                connection.sendall(b"POST /v1/reward HTTP/1.1\r\nhost:")
        for _ in range(3):
            found = rm.post("/v1/reward", {"messages": TALKS})["data"]
            assert [row["reward"] for row in found] == pytest.approx(rewards, abs=BOUND)


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
@pytest.mark.parametrize("leaves", ["in the queue", "in the forward"])
def test_who_leaves_is_not_computed_and_disturbs_nobody(
    leaves: str, accept: str, folder: Path, rewards: list[float]
) -> None:
    with served(folder) as server:
        gate = Gate(server)
        gate.close()
        stayed: list[Any] = []

        def stay() -> None:
            stayed.append(server.post("/v1/reward", {"messages": TALKS}))

        def stats() -> dict[str, Any]:
            found: dict[str, Any] = server.http.get("/stats").json()
            return found

        staying = threading.Thread(target=stay)
        if leaves == "in the queue":
            staying.start()
            wait_for(lambda: server.service._batcher.computing_tokens > 0)
        with contextlib.ExitStack() as leaving:
            for n in range(20):
                connection = leaving.enter_context(connected(server))
                body = json.dumps({"input_ids": [5 + n] * 30}).encode()
                lines = (length(body), f"accept: {accept}")
                connection.sendall(head("/v1/reward", *lines) + body)
            waiting = 20 if leaves == "in the queue" else 0
            wait_for(lambda: stats()["queued_sequences"] >= waiting)
        if leaves == "in the queue":
            wait_for(lambda: stats()["dropped_sequences"] == 20)
        else:
            staying.start()
        gate.open()
        staying.join(20)
        [reply] = stayed
        found = [row["reward"] for row in reply["data"]]
        assert found == pytest.approx(rewards, abs=BOUND)
        wait_for(lambda: stats()["queued_sequences"] == 0)
        if leaves == "in the queue":
            assert stats()["computed_sequences"] == 3


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came to it")


def test_a_storm_of_equal_requests_is_answered(rm: Served, rewards: list[float]) -> None:
    """The same request id, the same body, at once; every second client gives up and asks again."""

    async def ask(http: httpx.AsyncClient, n: int) -> list[float]:
        headers = {"x-request-id": "the-same"}
        if n % 2:
            with contextlib.suppress(httpx.TimeoutException):
                await http.post("/v1/reward", json={"messages": TALKS}, timeout=0.01)
        reply = await http.post("/v1/reward", json={"messages": TALKS}, headers=headers)
        return rewards_in(reply.content)

    async def main() -> list[list[float]]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=rm.url, timeout=60, limits=limits) as http:
            return await asyncio.gather(*(ask(http, n) for n in range(200)))

    for found in asyncio.run(main()):
        assert found == pytest.approx(rewards, abs=BOUND)


def test_bodies_that_arrive_together_do_not_fill_the_memory(impatient: Served) -> None:
    """At most 16 of the largest at once; who comes later is told to wait."""
    large = b'{"input": "' + b"a" * 18_000
    with contextlib.ExitStack() as stalled:
        connections = [stalled.enter_context(connected(impatient)) for _ in range(40)]
        for connection in connections:
            connection.sendall(head("/v1/reward", "transfer-encoding: chunked"))
            connection.sendall(f"{len(large):x}\r\n".encode() + large + b"\r\n")
        statuses = [status for connection in connections for status, _, _ in read(connection)]
    assert set(statuses) == {408, 503}
    assert statuses.count(408) <= 17


def test_expectations_are_met(rm: Served, rewards: list[float]) -> None:
    """curl asks first where a body is large."""
    with connected(rm) as connection:
        connection.sendall(head("/v1/reward", "expect: 100-continue", length(GOOD)))
        assert connection.recv(100).startswith(b"HTTP/1.1 100")
        connection.sendall(GOOD)
        [(status, _, body)] = read(connection)
    assert status == 200
    assert rewards_in(body) == pytest.approx(rewards, abs=BOUND)
