"""Two rewards that are smooth in the pixels: an error of rounding in an image stays one in its scores.

A JPEG's size comes in bytes, which is why golden files do not hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rewards import DifferentiableReward, Reward, RewardSpec

_HERE = "tests.support.smooth_rewards"
SMOOTH = {
    "brightness": RewardSpec(f"{_HERE}:build_brightness", "mean of the pixels", "[0, 1]", "-", gradient=True),
    "contrast": RewardSpec(f"{_HERE}:build_contrast", "standard deviation of the pixels", "[0, 0.5]", "-"),
}


def brightness(images_B3HW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Mean of the pixels; quickly learnt by a random model."""
    return images_B3HW.mean(dim=(1, 2, 3))


def contrast(images_B3HW: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Standard deviation of the pixels."""
    return images_B3HW.flatten(1).std(dim=1)


def build_brightness(device: torch.device | str, source: str | None) -> DifferentiableReward:
    """A factory, as the table of rewards names them."""
    return DifferentiableReward(brightness, brightness)


def build_contrast(device: torch.device | str, source: str | None) -> Reward:
    """A factory, as the table of rewards names them."""
    return contrast
