"""The HTTP app of `python -m rewards.serve`, with /score and /health.

The protocol is in docs/remote.md.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import textwrap
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import ClientDisconnect
from torch import Tensor

from rewards import RewardError, RewardMix, RewardScores
from rewards.server.callers import SameSite
from rewards.server.wire import as_floats, from_pngs
from rlg import __version__

MAX_PIXELS = 2048 * 2048  # pixels of one image: more than any model here makes
PIXELS_A_CALL = 16 * 1024 * 1024  # pixels that a reward sees at once, and that are floats at a time: 200 MB
BODY_SECONDS, STALL_SECONDS = 120.0, 20.0  # seconds for a whole body, and between two parts of it
_LOG = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """Limits of one request."""

    megabytes: float = 128.0  # size of its body
    images: int = 64
    pixels: int = MAX_PIXELS  # pixels of each image
    all_pixels: int = 16 * MAX_PIXELS  # pixels of all images: 200 MB, at 3 bytes each
    waiting: float = 4.0  # most requests in memory at a time, in units of the largest one


class ScoreRequest(BaseModel):
    """The body of /score."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str]  # base64 PNGs
    prompts: list[str]
    metadata: list[dict[str, Any]]


def create(mix: RewardMix, token: str | None = None, limits: Limits | None = None, local: bool = True) -> Any:
    """The app that serves a mix, one request at a time.

    With a token it serves those alone who send it. local: it listens on loopback alone; see
    `rewards.server.callers.SameSite`. A request is not scored if its client has gone before its turn.
    """
    app = FastAPI(title="rewards", docs_url=None, redoc_url=None, openapi_url=None)
    bounds, turn = limits or Limits(), asyncio.Lock()
    held = _Held(int(bounds.waiting * bounds.megabytes * 1e6))

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "rewards": list(mix.names), "weights": list(mix.weights), "version": __version__}

    @app.post("/score")
    async def score(request: Request) -> dict[str, Any]:
        _authorise(request, token)
        with held.part() as part:
            body = await _read(request, int(bounds.megabytes * 1e6), part)
            async with turn:  # a reward's model is not made for two threads, nor the memory for two batches
                if await request.is_disconnected():
                    raise HTTPException(499, "the client has gone")
                return await run_in_threadpool(_score, mix, body, bounds)

    return SameSite(app, local)


class _Held:
    """Counter of the bytes of all bodies in memory."""

    def __init__(self, limit: int):
        self.limit, self.total = limit, 0

    @contextmanager
    def part(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts one request's bytes, for the block.

        It answers 503 where the sum is over the limit.
        """
        mine = 0

        def add(count: int) -> None:
            nonlocal mine
            if self.total + count > self.limit:
                raise HTTPException(503, "too many requests are waiting", {"Connection": "close"})
            mine += count
            self.total += count

        try:
            yield add
        finally:
            self.total -= mine


def _authorise(request: Request, token: str | None) -> None:
    """Refuse callers without the token, and forms of web pages.

    A page can send text/plain and forms without asking the server first.
    """
    sent = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f"the body must be application/json, got {textwrap.shorten(kind, 80) or 'no type'}")


async def _read(request: Request, limit: int, count: Callable[[int], None]) -> bytes:
    """Read the body.

    It holds at most `limit` bytes, and waits for a limited time.
    """
    refusal = HTTPException(413, f"the request is over the limit of {limit / 1e6:g} MB (--max_mb)")
    if int(request.headers.get("content-length", 0)) > limit:
        raise refusal
    body, chunks = bytearray(), request.stream()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while chunk := await _next_part(chunks):
                if len(body) + len(chunk) > limit:  # its length may not be stated, or not be true
                    raise refusal
                count(len(chunk))
                body += chunk
    except TimeoutError:
        raise HTTPException(408, "the body took too long", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(499, "the client has gone") from None
    return bytes(body)


async def _next_part(chunks: AsyncIterator[bytes]) -> bytes | None:
    """The next part of a body, None after the last.

    It does not use `asyncio.wait_for`. Before Python 3.12 this function drops a cancellation that comes together with
    a part, here that of the whole body's limit.
    """
    async with asyncio.timeout(STALL_SECONDS):
        return await anext(chunks, None)


def _score(mix: RewardMix, body: bytes, limits: Limits) -> dict[str, Any]:
    try:
        request = ScoreRequest.model_validate_json(body)
        _check_counts(request, limits)
        images = from_pngs(request.images, limits.pixels, limits.all_pixels)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise HTTPException(422, f"{place}: {first['msg']}") from None
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    try:
        scores = _in_parts(mix, images, request)
    except RewardError as error:
        _LOG.warning("%s", error)
        # a ValueError means unfit metadata, by contract
        fault = 400 if isinstance(error.__cause__, ValueError) else 500
        raise HTTPException(fault, str(error)) from None
    return {"total": scores.total_B.tolist(), "parts": {name: part.tolist() for name, part in scores.parts.items()}}


def _in_parts(mix: RewardMix, images_B3HW: Tensor, request: ScoreRequest) -> RewardScores:
    """The mix's scores of images in bytes.

    Only a part of the images is in floats at a time.
    """
    size = max(1, PIXELS_A_CALL // (images_B3HW.shape[2] * images_B3HW.shape[3]))
    starts = range(0, max(1, len(images_B3HW)), size)
    parts = [slice(start, start + size) for start in starts]
    found = [mix(as_floats(images_B3HW[p]), request.prompts[p], request.metadata[p]) for p in parts]
    by_name = {name: torch.cat([scores.parts[name] for scores in found]) for name in mix.names}
    return RewardScores(torch.cat([scores.total_B for scores in found]), by_name)


def _check_counts(request: ScoreRequest, limits: Limits) -> None:
    images, prompts, metadata = len(request.images), len(request.prompts), len(request.metadata)
    if images > limits.images:
        raise ValueError(f"{images} images are over the limit of {limits.images} (--max_images)")
    if not images == prompts == metadata:
        raise ValueError(f"{images} images, but {prompts} prompts and {metadata} metadata")
