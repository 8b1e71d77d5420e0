"""Prompts with the metadata that rewards need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt with the metadata that a reward needs."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)  # GenEval format; empty for plain text prompts


def columns(prompts: Sequence[Prompt]) -> tuple[list[str], list[dict[str, Any]]]:
    """`(texts, metadata)`, as rewards take them."""
    return [prompt.text for prompt in prompts], [prompt.metadata for prompt in prompts]


def spread(prompts: Sequence[Prompt], count: int | None) -> list[int]:
    """Indices of `count` prompts, spread evenly over a set.

    None means all of them. An even spread keeps the share of every tag.
    """
    if count is None or count >= len(prompts):
        return list(range(len(prompts)))
    return [i * len(prompts) // count for i in range(count)]
