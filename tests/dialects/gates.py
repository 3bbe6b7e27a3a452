"""Servers that are made to wait, and the key of the one that asks for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from served import Served

KEY = "the-key-of-all-clients"


class Gate:
    """Holds up the forward of a running server, until it is opened."""

    def __init__(self, server: Served) -> None:
        self.server = server
        self._open = threading.Event()
        score_encoded = server.scorer.score_encoded

        def held(sequences: Any, **options: Any) -> list[float]:
            assert self._open.wait(60)
            return score_encoded(sequences, **options)

        server.scorer.score_encoded = held  # type: ignore[method-assign]

    def close(self) -> None:
        self._open.clear()

    def open(self) -> None:
        self._open.set()


@contextmanager
def filled(gate: Gate) -> Iterator[None]:
    """The queue of a server with room for 200 tokens is full, until the gate is opened."""
    gate.close()
    with ThreadPoolExecutor(2) as others:
        asked = []
        for tokens in (150, 190):  # one in the forward, one that waits
            body = {"input_ids": [5 + len(asked)] * tokens}
            asked.append(others.submit(gate.server.http.post, "/v1/reward", json=body))
            while gate.server.http.get("/info").json()["batcher"]["queued_tokens"] < tokens:
                assert not asked[-1].done(), asked[-1].result().text
                if tokens == 150:  # it has been taken from the queue
                    time.sleep(0.2)
                    break
                time.sleep(0.01)
        try:
            yield
        finally:
            gate.open()
        assert [one.result().status_code for one in asked] == [200, 200]
