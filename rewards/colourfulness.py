"""Colourfulness as a reward (Hasler and Suesstrunk, SPIE 5007, 2003).

    rg = R - G,   yb = (R + G) / 2 - B
    M = sqrt(var rg + var yb) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2)

The paper is "Measuring colourfulness in natural images". Mean and variance are over an image's pixels, whose values
are 0 to 255, as in the paper. Its viewers called 15 slightly, 33 moderately, 45 averagely, 59 quite, 82 highly and 109
extremely colourful. It needs no model and no download.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards import Reward
from rlg.io.pixels import levels

MEAN_WEIGHT = 0.3  # fitted by the paper to its viewers


def colourfulness_of(images_B3HW: Tensor) -> Tensor:
    """M of each image, (B,) fp32.

    Images: float in [0, 1], rounded to 256 levels.
    """
    # float64, for the sum over a large image
    red_BN, green_BN, blue_BN = levels(images_B3HW).flatten(2).double().unbind(1)
    opponent_2BN = torch.stack([red_BN - green_BN, (red_BN + green_BN) / 2 - blue_BN])
    mean_2B1 = opponent_2BN.mean(dim=2, keepdim=True)
    spread_B = (opponent_2BN - mean_2B1).square().mean(dim=2).sum(dim=0).sqrt()
    return (spread_B + MEAN_WEIGHT * mean_2B1[..., 0].square().sum(dim=0).sqrt()).float()


def colourfulness(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `colourfulness`; it computes where the images are."""

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return colourfulness_of(images_B3HW).cpu()

    return reward
