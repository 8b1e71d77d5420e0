"""Callers that a server of this machine turns away.

A browser lets any page send requests to 127.0.0.1. A page whose name it resolves anew (DNS rebinding) can even read
the answers. The browser names the page in `Origin`, and the name by which it came in `Host`. Sockets that say nothing,
or too little for too long, are closed.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from uvicorn.protocols.http.h11_impl import H11Protocol

from rewards.server.wire import is_loopback

HEAD_SECONDS = 10.0  # seconds from a connection, or the first byte of a further request, to the end of its headers

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


def host_of(text: str) -> str:
    """The host of HOST, HOST:PORT or [ADDRESS]:PORT, else an empty text."""
    try:
        return urlsplit(f"//{text}").hostname or ""
    except ValueError:
        return ""


class SameSite:
    """An ASGI app that refuses pages of other sites.

    They get 403 for an `Origin` other than the app's own. local: the app is for this machine alone, so `Host` must be
    one of its names.
    """

    def __init__(self, app: Any, local: bool):
        self.app, self.local = app, local

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or one socket."""
        fault = None
        if scope["type"] in ("http", "websocket"):
            headers = {name.decode("latin1"): value.decode("latin1") for name, value in scope["headers"]}
            fault = self._fault(headers.get("host", ""), headers.get("origin"))
        if fault is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": fault})
        else:
            head = [(b"content-type", b"application/json"), (b"connection", b"close")]
            await send({"type": "http.response.start", "status": 403, "headers": head})
            await send({"type": "http.response.body", "body": json.dumps({"detail": fault}).encode()})

    def _fault(self, host: str, origin: str | None) -> str | None:
        if self.local and not is_loopback(host_of(host)):
            return "Host must be localhost or a loopback address: this server is for its own machine"
        if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
            return "pages of other sites may not use this server"
        return None


class ImpatientProtocol(H11Protocol):
    """uvicorn's protocol, with a limit of time for headers.

    uvicorn itself only limits the time between two requests.
    """

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by asyncio."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._wait()
        else:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by asyncio."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._waiting is None:
            self._waiting = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None
