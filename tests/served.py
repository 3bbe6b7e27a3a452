"""The app of a replica around a tiny model on a real socket, without Serve."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from raywards.config import ServeConfig
from raywards.scorer import Scorer
from raywards.serve.http import create_app
from raywards.serve.replica import RewardService, service_of

# As Serve has it. uvicorn's own 5 are also httpx's, so that a request could meet the closing.
_KEEP_ALIVE_S = 90


class Served:
    """A running server, and the scorer that it asks."""

    def __init__(
        self, url: str, scorer: Scorer, config: ServeConfig, service: RewardService
    ) -> None:
        self.url, self.scorer, self.config, self.service = url, scorer, config, service
        self.http = httpx.Client(base_url=url, timeout=30)

    def post(self, path: str, body: Any, **headers: str) -> Any:
        """The parsed reply, which must be a success."""
        response = self.http.post(path, json=body, headers=headers)
        assert response.status_code == 200, response.text
        return response.json()

    def refused(self, path: str, body: Any, **headers: str) -> tuple[int, Any]:
        """Status and body of a reply that must be none."""
        response = self.http.post(path, json=body, headers=headers)
        assert response.status_code >= 400, response.text
        return response.status_code, response.json()


@contextmanager
def served(
    folder: Path, *, wrap: Callable[[Any], Any] = lambda app: app, **settings: Any
) -> Iterator[Served]:
    """Serve a model folder on a free port. `wrap` puts something around the app."""
    config = ServeConfig(model=str(folder), **settings)
    scorer = Scorer.from_pretrained(folder, max_length=config.max_length)
    service: RewardService | None = None

    def current() -> RewardService:
        assert service is not None
        return service

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(
        uvicorn.Config(
            wrap(create_app(current)),
            log_level="warning",
            lifespan="on",
            timeout_keep_alive=_KEEP_ALIVE_S,
        )
    )
    ready = threading.Event()

    async def main() -> None:
        nonlocal service
        service = service_of(scorer, config)
        service.start()
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        await serving

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert ready.wait(30)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    running = Served(url, scorer, config, current())
    try:
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive(), "the server did not stop"
