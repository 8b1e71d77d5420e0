"""Smoothness: minus the total variation of a picture, with a gradient.

    smoothness = - (sum |right - pixel| + sum |below - pixel|) / (3 H W)

Pixels are 0 to 255, and the sums are over neighbours in each of the three channels. A blank picture has 0. Where two
neighbours are equal, their term has a gradient of 0. It needs no model and no download.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards import DifferentiableReward
from rlg.io.pixels import levels


def smoothness_of(pixels_B3HW: Tensor) -> Tensor:
    """(B,) minus the total variation; pixels are 0 to 255."""
    steps = [pixels_B3HW.diff(dim=side).abs().sum(dim=(1, 2, 3)) for side in (2, 3)]
    return -(steps[0] + steps[1]) / pixels_B3HW.shape[1:].numel()


def smoothness(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `smoothness`; it computes where the images are."""

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return smoothness_of(levels(images_B3HW).double()).float().cpu()

    def unrounded(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return smoothness_of(images_B3HW.double() * 255)

    return DifferentiableReward(reward, unrounded)
