"""Advantages: rewards relative to those of other images."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(
    reward_B: Tensor, group_B: Tensor, scale: str = "batch", clip: float = 5.0, epsilon: float = 1e-4
) -> Tensor:
    """(B,) advantages: rewards relative to their group's mean, scaled and clipped.

    scale: "group" divides by the group's std, and "batch" by the std of all rewards (Flow-GRPO's default). "none"
    divides by 1, so that beta stays the KL coefficient of the unscaled reward. epsilon is added to the std
    (Flow-GRPO).
    """
    _, index_B = torch.unique(group_B, return_inverse=True)
    count_G = torch.bincount(index_B).to(reward_B.dtype)
    mean_G = torch.zeros_like(count_G).index_add_(0, index_B, reward_B) / count_G
    low_G, high_G = (
        reward_B.new_zeros(len(count_G)).scatter_reduce_(0, index_B, reward_B, kind, include_self=False)
        for kind in ("amin", "amax")
    )
    # A group without spread gets exactly 0: its mean may differ from its rewards by rounding.
    centred_B = torch.where((low_G == high_G)[index_B], 0.0, reward_B - mean_G[index_B])
    if scale == "group":
        variance_G = torch.zeros_like(count_G).index_add_(0, index_B, centred_B**2) / count_G
        centred_B = centred_B / (variance_G.sqrt()[index_B] + epsilon)
    elif scale == "batch":
        centred_B = centred_B / (reward_B.std(unbiased=False) + epsilon)
    return centred_B.clamp(-clip, clip)
