"""The client of every reward behind HTTP.

It keeps the token out of URLs, bounds its retries, and names the server in errors. It tries again, with exponential
backoff, after connections that fail, break or time out, and after the answers 408, 429 and 5xx. Any other answer but a
success would be the same the next time.
"""

from __future__ import annotations

import asyncio
import os
import textwrap
import time
from collections.abc import Callable
from typing import Any

import httpx

from rewards import ServerError
from rewards.background import DaemonExecutor
from rewards.server import wire

TRIES = 6
BACKOFF = 1.0  # seconds before the second try, doubled before each later one: 31 s in all
CONNECT_SECONDS = 10.0
ANSWER_SECONDS = 300.0  # seconds for a whole answer: that of a large batch on a busy server
MAX_ANSWER = 16 * 10**6  # bytes: a few numbers and sentences an image


class BadRequestError(ValueError):
    """Refusal of these images, prompts or metadata by the server.

    Another batch may be fine.
    """


class Server:
    """A server that speaks JSON, at one URL.

    Any number of threads may use it at a time. The bearer token, if there is one, comes from the environment variable
    RLG_REWARD_TOKEN. Raises ValueError for a URL that is not of the form http(s)://HOST[:PORT][/PATH], or a token that
    no header can hold.
    """

    def __init__(
        self,
        url: str,
        sleep: Callable[[float], None] = time.sleep,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        parts = _checked(url)
        self.url, self._sleep = str(parts).rstrip("/"), sleep
        token = os.environ.get(wire.TOKEN)
        headers = {"Authorization": f"Bearer {wire.check_token(token, wire.TOKEN)}"} if token else {}
        # A proxy of the environment is for the world outside. Redirects are not followed: the token goes nowhere else.
        outside = not wire.is_loopback(parts.host)
        self._options: dict[str, Any] = {"headers": headers, "transport": transport, "trust_env": outside}

    def get(self, path: str) -> Any:
        """The JSON at a path. Raises as `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a JSON body.

        Raises BadRequestError for the answers 400 and 422, ServerError for any other failure, after all tries.
        """
        return self._request("POST", path, body)

    def error(self, what: str) -> ServerError:
        """The error that names the server."""
        return ServerError(f"{self.url} {what}")

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        for trial in range(TRIES):
            if trial:
                self._sleep(BACKOFF * 2 ** (trial - 1))
            try:
                answer = self._send(method, path, body)
            except httpx.RequestError as error:
                failure = f"cannot be reached ({type(error).__name__}: {error})"
                continue
            if answer.status_code in (408, 429) or answer.status_code >= 500:
                failure = f"answered {answer.status_code}: {_said(answer)}"
                continue
            return self._read(answer)
        raise self.error(f"{failure}; gave up after {TRIES} tries")

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Make one try, in a thread with its own event loop.

        The caller's thread may have one that runs already.
        """
        with DaemonExecutor(1) as thread:
            return thread.submit(asyncio.run, self._within_the_limit(method, path, body)).result()

    async def _within_the_limit(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        try:
            # httpx limits each read; an answer may come in many small ones
            async with asyncio.timeout(ANSWER_SECONDS):
                return await self._answer(method, path, body)
        except TimeoutError:
            raise httpx.ReadTimeout(f"no whole answer in {ANSWER_SECONDS:g} s") from None

    async def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        """Read the answer.

        It holds at most MAX_ANSWER bytes, however the answer was compressed.
        """
        timeout = httpx.Timeout(ANSWER_SECONDS, connect=CONNECT_SECONDS)
        async with (
            httpx.AsyncClient(timeout=timeout, **self._options) as client,
            client.stream(method, self.url + path, json=body) as answer,
        ):
            content = bytearray()
            async for chunk in answer.aiter_bytes():
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise self.error(f"answered more than {MAX_ANSWER / 1e6:g} MB")
        return httpx.Response(answer.status_code, content=bytes(content))

    def _read(self, answer: httpx.Response) -> Any:
        if answer.status_code in (400, 422):
            raise BadRequestError(f"{self.url} answered {answer.status_code}: {_said(answer)}")
        if answer.status_code == 401:
            raise self.error(f"answered 401: {_said(answer)}; the token is read from {wire.TOKEN}")
        if not answer.is_success:
            raise self.error(f"answered {answer.status_code}: {_said(answer)}")
        try:
            return answer.json()
        except (ValueError, RecursionError):
            raise self.error(f"answered something that is not JSON: {_said(answer)}") from None


def _checked(url: str) -> httpx.URL:
    form = "a reward's server must be given as http://HOST:PORT"
    try:
        parts = httpx.URL(url)
    except httpx.InvalidURL:
        parts = httpx.URL("")
    if parts.userinfo:  # the URL is not shown, because it may hold a password
        raise ValueError(f"{form}, without a user; put a token into {wire.TOKEN}")
    if parts.scheme not in ("http", "https") or not parts.host or parts.query or parts.fragment:
        raise ValueError(f"{form}, got {url!r}")
    return parts


def _said(answer: httpx.Response) -> str:
    """The message in an answer, on one line.

    It is in the form of rewards.serve and FastAPI, or in OpenAI's, or plain text.
    """
    try:
        body = answer.json()
        str(body)
    except (ValueError, RecursionError):
        body = answer.text
    for key in ("detail", "error", "message"):
        if isinstance(body, dict) and body.get(key):
            body = body[key]
    said = "".join(sign if sign.isprintable() else " " for sign in str(body)[:4000])  # it must not steer a terminal
    return textwrap.shorten(said, 400) or answer.reason_phrase
