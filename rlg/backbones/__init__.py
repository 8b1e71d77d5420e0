"""Model families: the one place that knows how each diffusers pipeline calls its network."""

from __future__ import annotations

from typing import Any

from rlg.backbones import sd, sd3, sdxl
from rlg.backbones.base import Backbone, Conditioning

BACKBONES: dict[str, Backbone] = {
    "StableDiffusionPipeline": sd.BACKBONE,
    "StableDiffusionXLPipeline": sdxl.BACKBONE,
    "StableDiffusion3Pipeline": sd3.BACKBONE,
}

__all__ = ["BACKBONES", "Backbone", "Conditioning", "backbone_of"]


def backbone_of(pipe: Any) -> Backbone:
    """The backbone of a diffusers pipeline, or of a pipeline's class name. Raises ValueError for an unknown family."""
    name = pipe if isinstance(pipe, str) else type(pipe).__name__
    if name not in BACKBONES:
        raise ValueError(f"no backbone for {name}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]
