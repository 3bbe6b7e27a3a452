"""`python tests/served_alone.py FOLDER FILE`: the app of `served.py` in a process of its own.

Writes its address into FILE, and stays until its standard input is closed. `GET /_tasks` tells how
many tasks its loop has.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from pathlib import Path
from typing import Any

from served import served


def with_tasks(app: Any) -> Any:
    """The app, and `GET /_tasks` beside it."""

    async def both(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != "/_tasks":
            await app(scope, receive, send)
            return
        gc.collect()
        tasks = str(len(asyncio.all_tasks())).encode()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": tasks})

    return both


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    with served(
        Path(sys.argv[1]),
        wrap=with_tasks,
        max_length=256,
        max_body_bytes=262_144,
        max_queued_tokens=4096,
        request_timeout_s=5,
    ) as server:
        Path(sys.argv[2]).write_text(server.url)
        sys.stdin.read()
