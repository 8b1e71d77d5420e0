"""A hub for tests: an HTTP server on this machine that takes a repository and a commit, and remembers both."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeHub:
    """What was asked of the server."""

    url: str = ""
    created: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)  # of the commit
    message: str = ""
    cards: list[str] = field(default_factory=list)  # that were sent to be checked
    tokens: set[str | None] = field(default_factory=set)
    paths: list[str] = field(default_factory=list)
    refusal: int | None = None  # status with which creation is refused


def _reply(hub: FakeHub, path: str, body: bytes) -> dict[str, Any]:
    if path.endswith("/repos/create"):
        hub.created.append(json.loads(body))
        wanted = hub.created[-1]
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        return {"url": f"{hub.url}/{name}", "name": name, "id": name}
    if path.endswith("/validate-yaml"):
        hub.cards.append(json.loads(body)["content"])
        return {"errors": [], "warnings": []}
    if "/preupload/" in path:
        files = json.loads(body)["files"]
        return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
    for line in map(json.loads, body.splitlines()):
        if line["key"] == "header":
            hub.message = line["value"]["summary"]
        elif line["key"] == "file":
            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
    repo = path.removeprefix("/api/models/").partition("/commit/")[0]
    return {
        "commitUrl": f"{hub.url}/{repo}/commit/{'0' * 40}",
        "commitOid": "0" * 40,
        "hookOutput": "",
        "pullRequestUrl": None,
    }


@contextmanager
def serve() -> Iterator[FakeHub]:
    """Within, the server answers at `url`."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            hub.paths.append(self.path)
            hub.tokens.add(self.headers.get("Authorization"))
            refused = hub.refusal if self.path.endswith("/repos/create") else None
            content = json.dumps({"error": "no"} if refused else _reply(hub, self.path, body)).encode()
            self.send_response(refused or 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
