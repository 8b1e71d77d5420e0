"""W&B's server for tests: HTTP on this machine that lets in a run and a report, and remembers what was sent."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeWandb:
    """What was sent."""

    url: str = ""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)  # by id: the variables it was made with
    reports: list[dict[str, Any]] = field(default_factory=list)  # variables of the mutation; `spec` decoded
    projects: list[dict[str, Any]] = field(default_factory=list)  # that were created
    files: dict[str, bytes] = field(default_factory=dict)
    refuse: str = ""  # a mutation that ends in an error

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL reply."""
        if self.refuse and self.refuse in query:
            return {"errors": [{"message": "permission denied", "path": [self.refuse]}], "data": None}
        if "mutation upsertView" in query:
            self.reports.append(variables | {"spec": json.loads(variables["spec"])})
            project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            view = {"id": "Vmlldzox", "type": "runs", "name": "n", "displayName": variables["displayName"]}
            view |= {"description": "", "project": project, "spec": variables["spec"]}
            return {"upsertView": {"view": view | {"updatedAt": "2026-01-01T00:00:00Z"}, "inserted": True}}
        if "mutation UpsertBucket" in query:
            self.runs[variables["name"]] = self.runs.get(variables["name"], {}) | {
                name: value for name, value in variables.items() if value is not None
            }
            entity = {"id": "e", "name": variables["entity"]}
            project = {"id": "p", "name": variables["project"], "entity": entity}
            bucket = {
                "id": "b",
                "name": variables["name"],
                "displayName": variables.get("displayName"),
                "config": "{}",
            }
            return {"upsertBucket": {"bucket": bucket | {"historyLineCount": 0, "project": project}, "inserted": True}}
        if "CreateRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/up/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        if "CreateProject" in query:
            self.projects.append(variables["input"])
            return {"result": {"project": {"id": "p", "name": "p", "entityName": "e"}, "inserted": True}}
        if "ProjectInternalId" in query:
            return {"project": {"id": "p", "internalId": "UHJvamVjdEludGVybmFsSWQ6MQ=="}}
        if "GetProjects" in query:
            return {"models": {"edges": [], "pageInfo": {"endCursor": None, "hasNextPage": False}}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "username": "someone", "entity": "e", "flags": "{}", "teams": {"edges": []}}}
        return {}


@contextmanager
def serve() -> Iterator[FakeWandb]:
    """Within, the server answers at `url`."""
    fake = FakeWandb()

    class Handler(BaseHTTPRequestHandler):
        def _take(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            body = self._take()
            if not self.path.endswith("/graphql"):
                self._reply({})
                return
            asked = json.loads(body)
            data = fake.answer(asked["query"], asked.get("variables") or {})
            self._reply(data if "errors" in data else {"data": data})

        def do_PUT(self) -> None:
            fake.files[self.path.removeprefix("/up/")] = self._take()
            self._reply({})

        def do_GET(self) -> None:
            self._reply({})

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    fake.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
