"""Model families, and how a pipeline of each calls its network.

No other package asks for the family.
"""

from __future__ import annotations

from typing import Any

from rlg.models.backbones import sd, sd3, sdxl
from rlg.models.backbones.base import Backbone

BACKBONES: dict[str, Backbone] = {
    "StableDiffusionPipeline": sd.BACKBONE,
    "StableDiffusionXLPipeline": sdxl.BACKBONE,
    "StableDiffusion3Pipeline": sd3.BACKBONE,
}

__all__ = ["BACKBONES", "Backbone", "backbone_of", "pipeline_cfg"]


def backbone_of(pipe: Any) -> Backbone:
    """The backbone of a diffusers pipeline, or of a pipeline's class name.

    Raises ValueError for an unknown family.
    """
    name = pipe if isinstance(pipe, str) else type(pipe).__name__
    if name not in BACKBONES:
        raise ValueError(f"no backbone for {name}; known: {', '.join(BACKBONES)}")
    return BACKBONES[name]


def pipeline_cfg(pipe: Any, scale: float) -> dict[str, Any]:
    """Options of a pipeline's call for a scale of classifier-free guidance.

    They fit a pipeline of any family. A scale of 1 turns it off.
    """
    known = BACKBONES.get(type(pipe).__name__)
    return known.pipeline_cfg(scale) if known else {"guidance_scale": scale}
