"""A small random pipeline of each model family, with text encoders: every test that takes `family` runs on it.

A new family is an entry here, beside its backbone and the backbone's line in `BACKBONES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from rlg.tinyworld import networks


def _as_they_are(latents_BCHW: Tensor) -> Tensor:
    return latents_BCHW


@dataclass(frozen=True)
class TinyFamily:
    """How to make a family's pipeline, for images of 64 x 64, and the form in which it keeps latents."""

    build: Callable[[], DiffusionPipeline]  # seed torch first
    pack: Callable[[Tensor], Tensor] = _as_they_are  # ours (B, C, H, W) -> the pipeline's
    options: Mapping[str, Any] = field(default_factory=dict)  # of its calls


FAMILIES = {name: TinyFamily(partial(networks.build, name)) for name in networks.FAMILIES}
