"""Colourfulness as a reward (Hasler and Suesstrunk, SPIE 5007, 2003).

    rg = R - G,   yb = (R + G) / 2 - B
    M = sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

The paper is "Measuring colourfulness in natural images". Mean and variance are over an image's pixels, whose values
are 0 to 255, as in the paper. Its viewers called 15 slightly, 33 moderately, 45 averagely, 59 quite, 82 highly and 109
extremely colourful. It needs no model and no download. Where a root is 0, as in a grey picture, its gradient is taken
as 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards import DifferentiableReward
from rlg.io.pixels import levels

MEAN_WEIGHT = 0.3  # fitted by the paper to its viewers


def colourfulness_of(pixels_B3HW: Tensor) -> Tensor:
    """M of each image, (B,), of pixels from 0 to 255."""
    red_BN, green_BN, blue_BN = pixels_B3HW.flatten(2).unbind(1)
    opponent_2BN = torch.stack([red_BN - green_BN, (red_BN + green_BN) / 2 - blue_BN])
    mean_2B1 = opponent_2BN.mean(dim=2, keepdim=True)
    spread_B = _root((opponent_2BN - mean_2B1).square().mean(dim=2).sum(dim=0))
    return spread_B + MEAN_WEIGHT * _root(mean_2B1[..., 0].square().sum(dim=0))


def _root(square_B: Tensor) -> Tensor:
    """The square root, with a gradient of 0 at 0."""
    positive_B = square_B > 0
    # The inner `where` keeps the infinite slope of 0 out of the backward pass, where 0 times it is NaN.
    return torch.where(positive_B, torch.where(positive_B, square_B, 1.0).sqrt(), 0.0)


def colourfulness(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `colourfulness`; it computes where the images are."""

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return colourfulness_of(levels(images_B3HW).double()).float().cpu()

    def unrounded(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return colourfulness_of(images_B3HW.double() * 255)

    return DifferentiableReward(reward, unrounded)
