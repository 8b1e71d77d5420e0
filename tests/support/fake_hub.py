"""A hub for tests: an HTTP server on this machine.

It takes a repository and a commit, and remembers both. It hands out the files of `published`, and counts who asks.
"""

from __future__ import annotations

import base64
import hashlib
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
    published: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files to hand out, by repository
    listed: list[str] = field(default_factory=list)  # repositories whose files were listed, once a request


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


def _answer(hub: FakeHub, path: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of what a GET asks for: the names in a repository, or a file of it. KeyError: there is none."""
    place = path.partition("?")[0]
    if place.startswith("/api/models/"):
        repo = place.removeprefix("/api/models/").removesuffix("/tree/main")
        rows = [
            {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}
            for name, data in hub.published[repo].items()
        ]
        hub.listed.append(repo)
        return json.dumps(rows).encode(), {"Content-Type": "application/json"}
    repo, _, name = place.removeprefix("/").partition("/resolve/main/")
    data = hub.published[repo][name]
    return data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": "0" * 40}


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

        def do_GET(self) -> None:
            try:
                status, (body, headers) = 200, _answer(hub, self.path)
            except KeyError:
                status, body, headers = 404, b"", {}
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

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
