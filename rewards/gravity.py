"""Gravity as a reward: it is high where things lie low.

    score = 100 sum_p ink_p height_p / sum_p ink_p,   ink_p = max(0, max_c |x_pc - paper_c| - 0.1)

The score is the centre of what is drawn, in percent of the picture's height: 0 is the top edge, 100 the bottom. x_pc
is channel c of pixel p in [0, 1]. paper_c is the channel's median, hence the colour of a plain background. An empty
picture has 50. It needs no model and no download, and does not read the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards import Reward
from rlg.io.pixels import levels

GRAIN = 0.1  # a smaller difference from the paper is the paper's own grain


def centre_height(images_B3HW: Tensor) -> Tensor:
    """Height of the centre of what is drawn, (B,) fp32.

    It goes from 0 (top) to 100 (bottom). Images: float in [0, 1].
    """
    x_B3HW = levels(images_B3HW).float() / 255
    paper_B311 = x_B3HW.flatten(2).median(dim=2).values[:, :, None, None]
    ink_BH = ((x_B3HW - paper_B311).abs().amax(dim=1) - GRAIN).clamp(min=0).sum(dim=2)
    rows = ink_BH.shape[1]
    height_H = 100 * (torch.arange(rows, device=ink_BH.device) + 0.5) / rows
    total_B = ink_BH.sum(dim=1)
    return torch.where(total_B > 0, (ink_BH * height_H).sum(dim=1) / total_B, 50.0)


def gravity(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `gravity`; it computes where the images are."""

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return centre_height(images_B3HW).cpu()

    return reward
