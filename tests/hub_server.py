"""A hub on this machine: the few routes of huggingface.co by which a folder is uploaded."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest


@dataclass
class Hub:
    """What it was sent. `refuses` names a route that answers 403."""

    token: str
    repos: dict[str, str | None] = field(default_factory=dict)
    """Repository to visibility."""
    branches: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """`repo@branch` to the files of the last commit."""
    messages: list[str] = field(default_factory=list)
    refuses: str = ""
    url: str = ""

    def answer(self, path: str, token: str | None, body: bytes) -> tuple[int, Any]:
        route, _, branch = path.partition("?")[0].rpartition("/")
        repo = "/".join(route.split("/")[3:5])
        kind = "create" if path == "/api/repos/create" else route.rpartition("/")[2]
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if token != f"Bearer {self.token}":
            return 401, {"error": "Invalid username or password."}
        if kind == self.refuses:
            return 403, {"error": "You may not."}
        if kind == "create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            known = repo in self.repos
            self.repos.setdefault(repo, asked.get("visibility"))
            return 409 if known else 200, {"url": f"{self.url}/{repo}"}
        if kind == "branch":
            known = f"{repo}@{branch}" in self.branches
            self.branches.setdefault(f"{repo}@{branch}", {})
            return 409 if known else 200, {}
        if kind == "preupload":
            files = [{"path": file["path"]} for file in json.loads(body)["files"]]
            ways = {"uploadMode": "regular", "shouldIgnore": False}
            return 200, {"files": [{**file, **ways} for file in files]}
        if kind == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            self.messages += [line["value"]["summary"] for line in lines if line["key"] == "header"]
            self.branches[f"{repo}@{branch}"] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            return 200, {"commitUrl": f"{self.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 404, {"error": path}


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The hub of this process, until the block ends."""
    hub = Hub("hf_secret")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, answer = hub.answer(self.path, self.headers.get("authorization"), body)
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
