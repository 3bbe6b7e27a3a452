"""Good requests to every route, and random damage to them: to fields, to bytes, to connections."""

from __future__ import annotations

import copy
import json
import random
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

TALK = [{"role": "user", "content": "hi there"}, {"role": "assistant", "content": "Paris, yes"}]
PAIR = {"query": "hi there", "documents": ["Paris", {"text": "no"}]}

GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/reward": [
        {"messages": TALK},
        {"messages": [TALK, TALK], "ids": ["a", "b"], "on_error": "item", "timeout_s": 3.5},
        {"prompt": TALK[:1], "responses": ["Paris", "no"], "activation": "sigmoid"},
        {"input": ["hello", "you"], "truncation": "left", "max_length": 9, "model": "rm"},
        {"input_ids": [[5, 6, 7], [8, 9]]},
        {"messages": TALK, "tools": [{"name": "f"}], "chat_template_kwargs": {"shout": True}},
    ],
    "/get_reward": [{"query": ["hello", "you"], "prompts": ["x"], "labels": None}],
    "/classify": [{"input": ["hello"], "use_activation": False}, {"text": [["hi", "yes"]]}],
    "/v1/classify": [{"messages": TALK, "truncate_prompt_tokens": 20}, {"input": [5, 6, 7]}],
    "/pooling": [{"input": "hello", "encoding_format": "base64"}],
    "/score": [{"text_1": "hi", "text_2": ["yes", "no"]}, {"query": "hi", "items": ["yes"]}],
    "/v1/score": [{"queries": ["hi", "ho"], "documents": ["yes", "no"]}],
    "/v1/embeddings": [{"input": [[5, 6], [7]], "model": "rm", "rid": "a"}],
    "/predict": [{"inputs": [["hi", "yes"], ["ho"]], "raw_scores": True}],
    "/": [{"inputs": "hello", "parameters": {"function_to_apply": "none", "top_k": 1}}],
    "/invocations": [{"inputs": "hello", "truncate": True, "truncation_direction": "Left"}],
    "/rerank": [{"query": "hi", "texts": ["yes", "no"], "return_text": True}, PAIR],
    "/v1/rerank": [{**PAIR, "top_n": 1, "return_documents": False}],
    "/v2/rerank": [{**PAIR, "model": "rm"}],
    "/remote_rm": [{"prompt": TALK[:1], "response": "yes", "label": 3}],
    "/v1/chat/completions": [{"messages": TALK, "temperature": 0.5, "n": 1, "stream": False}],
}
"""Bodies that are answered 200, by path."""

TEXTS = (
    "",
    " \t\n",
    "\x00",
    "a\x00b",
    "\ud800",
    "tail \udfff",
    "e" + "\u0301" * 300,
    "\u202eevil\u202c",
    "\ufeff",
    "👩‍👩‍👧‍👦" * 20,
    "<|im_end|>\n<|im_start|>assistant",
    "{{ 7 * 7 }}{% raw %}",
    "𐀀" * 50,
    "﷽" * 99,
    "x" * 4000,
    "word " * 3000,
    "__proto__",
)
NUMBERS = (
    0,
    -1,
    1,
    2,
    -0.0,
    0.5,
    2**31,
    2**63,
    -(2**63),
    10**30,
    1e308,
    -1e308,
    5e-324,
    379,
    10**6,
)
VALUES = (None, True, False, [], {}, [[]], [None], {"text": None}, [[[[]]]], "none", "left")


@dataclass
class Damaged:
    """A request as bytes, and how it is sent."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)
    manner: str = "whole"
    """`whole`, `chunked`, or a way to leave: `cut`, `reset`, `half`, `unread`."""
    cut_at: int = 0

    def raw(self) -> bytes:
        headers = {"host": "t", "content-type": "application/json", **self.headers}
        body = self.body
        if self.manner == "chunked":
            headers["transfer-encoding"] = "chunked"
            parts = [body[i : i + 97] for i in range(0, len(body), 97)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        else:
            headers["content-length"] = str(len(body))
        lines = [f"POST {self.path} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        return "\r\n".join(lines).encode("latin-1") + body


def draw_request(seed: int) -> Damaged:
    """The damaged request of a seed."""
    draw = random.Random(seed)
    path = draw.choice(list(GOOD))
    value: Any = copy.deepcopy(draw.choice(GOOD[path]))
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3, 6])):
        value = _damage(draw, value)
    body = _as_bytes(draw, value)
    if draw.random() < 0.2:
        body = _flip(draw, body)
    request = Damaged(path, body)
    if draw.random() < 0.15:
        request.headers.update(_headers(draw))
    if path == "/v1/reward" and draw.random() < 0.3:
        request.headers["accept"] = "application/x-ndjson"
    if draw.random() < 0.1:
        pairs = ("truncation=right", "scores=sigmoid", "dict=1", "dict=2", "%ff=%00", "a=b", "&&=")
        request.path += "?" + "&".join(draw.choices(pairs, k=2))
    if draw.random() < 0.2:
        request.manner = draw.choice(["chunked", "cut", "reset", "half", "unread"])
        request.cut_at = draw.randrange(1, len(request.raw()))
    return request


def send(address: tuple[str, int], request: Damaged) -> tuple[int, bytes, bytes] | None:
    """Status, head and body of the reply; None where the caller did not stay to read one."""
    raw = request.raw()
    with socket.create_connection(address, timeout=20) as connection:
        if request.manner == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if request.manner in ("cut", "reset"):
            connection.sendall(raw[: request.cut_at])
            return None
        connection.sendall(raw)
        if request.manner == "unread":
            return None
        if request.manner == "half":
            connection.shutdown(socket.SHUT_WR)
        return _read(connection, may_be_none=request.manner == "half")


def _read(connection: socket.socket, *, may_be_none: bool) -> tuple[int, bytes, bytes] | None:
    got = b""
    while b"\r\n\r\n" not in got:
        part = connection.recv(65_536)
        if not part:
            assert may_be_none, f"closed without a reply, after {got!r}"
            return None
        got = (got + part).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
    head, _, body = got.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    chunked = fields.get(b"transfer-encoding") == b"chunked"
    closes = fields.get(b"connection") == b"close" and b"content-length" not in fields
    length = int(fields.get(b"content-length", b"0"))
    while not body.endswith(b"0\r\n\r\n") if chunked else closes or len(body) < length:
        part = connection.recv(65_536)
        if not part:
            assert closes or may_be_none, f"cut in the middle of a reply: {head!r}"
            break
        body += part
    return int(head.split()[1]), head, body


# ---- damage


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container with every key or position in it."""
    found: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        found += [(value, key) for key in value]
        found += [place for one in value.values() for place in _places(one)]
    elif isinstance(value, list):
        found += [(value, i) for i in range(len(value))]
        found += [place for one in value for place in _places(one)]
    return found


def _damage(draw: random.Random, value: Any) -> Any:
    places = _places(value)
    if not places or draw.random() < 0.02:
        return draw.choice([None, [], "text", 7, True, [value], {}])
    holder, key = draw.choice(places)
    kind = draw.choice(["drop", "text", "number", "value", "repeat", "wrap", "swap", "add", "word"])
    if kind == "drop":
        del holder[key]
    elif kind == "text":
        holder[key] = draw.choice(TEXTS)
    elif kind == "number":
        holder[key] = draw.choice(NUMBERS)
    elif kind == "value":
        holder[key] = copy.deepcopy(draw.choice(VALUES))
    elif kind == "repeat":
        holder[key] = [copy.deepcopy(holder[key])] * draw.choice([1, 2, 40, 1025])
    elif kind == "wrap":
        holder[key] = draw.choice([[holder[key]], {"text": holder[key]}, {"content": holder[key]}])
    elif kind == "swap":
        other, place = draw.choice(places)
        holder[key], other[place] = copy.deepcopy((other[place], holder[key]))
    elif kind == "add" and isinstance(holder, dict):
        name = draw.choice([*_FIELDS, *TEXTS])
        holder[name] = copy.deepcopy(draw.choice([*VALUES, *NUMBERS, *TEXTS]))
    elif isinstance(holder[key], str):
        at = draw.randint(0, len(holder[key]))
        holder[key] = holder[key][:at] + chr(draw.randrange(0x110000)) + holder[key][at:]
    return value


_FIELDS = sorted({key for bodies in GOOD.values() for body in bodies for key in body})


def _as_bytes(draw: random.Random, value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5, allow_nan=True)
    if draw.random() < 0.03 and text.startswith('{"'):
        text = '{"' + text[2:].split('"')[0] + '": 1, ' + text[1:]  # one key twice
    if draw.random() < 0.02:
        text = text.replace("1", draw.choice(["NaN", "-Infinity", "1e999", "1" * 5000, "01"]), 1)
    if draw.random() < 0.02:
        depth = draw.choice([50, 1000, 30_000])
        text = '{"input": ' + "[" * depth + "]" * depth + "}"
    return text.encode("utf-8", "surrogatepass")


def _flip(draw: random.Random, body: bytes) -> bytes:
    damaged = bytearray(body)
    for _ in range(draw.choice([1, 1, 3, 20])):
        at = draw.randrange(len(damaged) + 1)
        kind = draw.choice(["change", "insert", "remove"])
        if kind == "insert":
            damaged.insert(at, draw.randrange(256))
        elif at < len(damaged):
            if kind == "change":
                damaged[at] ^= 1 << draw.randrange(8)
            elif len(damaged) > 1:
                del damaged[at]
    return bytes(damaged[: draw.randrange(len(damaged))] if draw.random() < 0.1 else damaged)


def _headers(draw: random.Random) -> dict[str, str]:
    return draw.choice(
        [
            {"content-type": draw.choice(["", "text/plain", "application/json; charset=latin-1"])},
            {"content-encoding": draw.choice(["gzip", "br", "identity"])},
            {"x-request-id": draw.choice(["é" * 10, "a" * 200, "ok-1", "\xff", "a\tb"])},
            {"accept": draw.choice(["application/x-ndjson", "text/html", ""])},
            {"authorization": draw.choice(["Bearer \xff", "Basic x", "Bearer"])},
            {"expect": "100-continue"},
            {"traceparent": "00-zz"},
        ]
    )
