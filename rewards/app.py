"""The HTTP side of `python -m rewards.serve`: an app with /score and /health. The protocol is in docs/remote.md."""

from __future__ import annotations

import asyncio
import hmac
import importlib.metadata
import logging
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, ValidationError

from rewards import RewardError, RewardMix
from rewards.wire import from_pngs

MAX_PIXELS = 2048 * 2048  # of one image: larger than any model here makes
_LOG = logging.getLogger("uvicorn.error")


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    megabytes: float = 128.0  # of its body
    images: int = 64
    pixels: int = MAX_PIXELS  # of each image


class ScoreRequest(BaseModel):
    """The body of /score."""

    model_config = ConfigDict(extra="forbid", strict=True)

    images: list[str]  # base64 PNGs
    prompts: list[str]
    metadata: list[dict[str, Any]]


def create(mix: RewardMix, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """The app that serves a mix, one request at a time; with a token, to those alone who send it."""
    app = FastAPI(title="rewards", docs_url=None, redoc_url=None, openapi_url=None)
    bounds, turn = limits or Limits(), asyncio.Lock()

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "rewards": list(mix.names), "weights": list(mix.weights), "version": _version()}

    @app.post("/score")
    async def score(request: Request) -> dict[str, Any]:
        _authorise(request, token)
        body = await _read(request, int(bounds.megabytes * 1e6))
        async with turn:  # a reward's model is not made for two threads, nor the memory for two batches
            return await run_in_threadpool(_score, mix, body, bounds)

    return app


def _version() -> str:
    try:
        return importlib.metadata.version("rlg")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _authorise(request: Request, token: str | None) -> None:
    sent = request.headers.get("authorization", "")
    if token is not None and not hmac.compare_digest(sent.encode(), f"Bearer {token}".encode()):
        raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})


async def _read(request: Request, limit: int) -> bytes:
    """The body, of which no more than `limit` bytes are ever held."""
    refusal = HTTPException(413, f"the request is over the limit of {limit / 1e6:g} MB (--max_mb)")
    if int(request.headers.get("content-length", 0)) > limit:
        raise refusal
    body = bytearray()
    async for chunk in request.stream():  # its length may not be stated, or not be true
        if len(body) + len(chunk) > limit:
            raise refusal
        body += chunk
    return bytes(body)


def _score(mix: RewardMix, body: bytes, limits: Limits) -> dict[str, Any]:
    try:
        request = ScoreRequest.model_validate_json(body)
        _check_counts(request, limits)
        images = from_pngs(request.images, limits.pixels)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"])) or "the body"
        raise HTTPException(422, f"{place}: {first['msg']}") from None
    except ValueError as error:
        raise HTTPException(422, str(error)) from None
    try:
        scores = mix(images, request.prompts, request.metadata)
    except RewardError as error:
        _LOG.warning("%s", error)
        fault = 400 if isinstance(error.__cause__, ValueError) else 500  # by contract: unfit metadata
        raise HTTPException(fault, str(error)) from None
    return {"total": scores.total_B.tolist(), "parts": {name: part.tolist() for name, part in scores.parts.items()}}


def _check_counts(request: ScoreRequest, limits: Limits) -> None:
    images, prompts, metadata = len(request.images), len(request.prompts), len(request.metadata)
    if images > limits.images:
        raise ValueError(f"{images} images are over the limit of {limits.images} (--max_images)")
    if not images == prompts == metadata:
        raise ValueError(f"{images} images, but {prompts} prompts and {metadata} metadata")
