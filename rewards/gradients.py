"""Scores of images together with their gradient in the pixels.

    gradient = d total / d pixels,    total = sum over rewards of weight * score

The scores are those of the pixels as they are. The scores of a `RewardMix` are those of images of 256 levels, as
files hold them; rounding has no gradient. Between the two is that rounding alone: resizing, cropping and the model's
own steps are the same. A reward offers its gradient as a `DifferentiableReward`, and its line in the table says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards import mix as mixes
from rewards.calls import DifferentiableReward, RewardError, place
from rewards.mix import RewardMix
from rewards.preprocessing import at_least_fp32
from rewards.table import no_gradient, require_gradients

# Images whose graph is held together. In a ViT-H/14 of fp32 an image keeps 2.8 GiB of activations.
AT_ONCE = 4


@dataclass(frozen=True)
class Scored:
    """Scores of B images, and the gradient of their total."""

    total_B: Tensor  # fp32 on CPU, as `RewardScores`
    gradient_B3HW: Tensor  # d total / d pixels, detached, on the images' device; fp32, or fp64 for images of fp64
    parts: dict[str, Tensor]  # name -> (B,) scores before the weight, fp32 on CPU


@dataclass(frozen=True)
class GradientReward:
    """A mix of rewards that have a gradient.

    A reward of weight 0 is only logged: it may lack a gradient, and its scores are the mix's own. Raises ValueError
    for any other reward without one.
    """

    mix: RewardMix

    def __post_init__(self) -> None:
        for name, reward in self.weighted.items():
            if not isinstance(reward, DifferentiableReward):
                raise ValueError(no_gradient(name))

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Scored:
        """Scores and gradient for B images in [0, 1].

        It works under `no_grad`, too, and keeps no graph. Raises as the mix does, and RewardError for a gradient that
        is not finite. A lenient mix makes such an image's total NaN and its gradient 0.
        """
        mixes.check_batch(images_B3HW, prompts, metadata)
        logged = [name for name in self.mix.names if name not in self.weighted]
        parts = self.mix.parts(logged, images_B3HW, prompts, metadata)
        images_B3HW = at_least_fp32(images_B3HW.detach())
        gradient_B3HW = torch.zeros_like(images_B3HW)
        for name, weight in zip(self.mix.names, self.mix.weights, strict=True):
            if weight:
                parts[name], slope_B3HW = self._part(name, images_B3HW, prompts, metadata)
                gradient_B3HW += weight * slope_B3HW
        scores = self.mix.weigh(parts)
        missing_B = scores.total_B.isnan().to(images_B3HW.device)
        return Scored(scores.total_B, gradient_B3HW.masked_fill(missing_B[:, None, None, None], 0), scores.parts)

    @property
    def weighted(self) -> dict[str, Any]:
        """The rewards whose weight is not 0, by name."""
        pairs = zip(self.mix.rewards.items(), self.mix.weights, strict=True)
        return {name: reward for (name, reward), weight in pairs if weight}

    def _part(
        self, name: str, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> tuple[Tensor, Tensor]:
        """(B,) scores by one reward, and their gradient in the pixels.

        Scores are fp32 on the CPU. One is NaN where it or its gradient is not finite and the mix is lenient.
        """
        reward = self.mix.rewards[name]
        scores, slopes = [torch.zeros(0)], [images_B3HW[:0]]
        for start in range(0, len(prompts), AT_ONCE):
            chunk = slice(start, start + AT_ONCE)
            score_B, slope_B3HW = _differentiate(name, reward, images_B3HW[chunk], prompts[chunk], metadata[chunk])
            scores.append(score_B.float().cpu())
            slopes.append(slope_B3HW)
        scores_B, slopes_B3HW = torch.cat(scores), torch.cat(slopes)
        finite_B = scores_B.isfinite() & slopes_B3HW.isfinite().flatten(1).all(dim=1).cpu()
        if not finite_B.all() and not self.mix.lenient:
            index = int((~finite_B).nonzero()[0])
            raise RewardError(
                f"reward {name!r} has a score or a gradient that is not finite (score {scores_B[index].item()}) for "
                f"{place(index, prompts)}"
            )
        return scores_B.where(finite_B, torch.nan), slopes_B3HW


def _differentiate(
    name: str, reward: Any, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> tuple[Tensor, Tensor]:
    """(B,) scores and (B, 3, H, W) gradients of images that are held together."""
    exact = torch.autocast(images_B3HW.device.type, enabled=False)  # a trainer's autocast is not for its reward
    with torch.inference_mode(False), torch.enable_grad(), exact:
        pixels = images_B3HW.clone().detach().requires_grad_()
        score_B = reward.unrounded(pixels, list(prompts), list(metadata))
        if score_B.shape != (len(prompts),) or not score_B.requires_grad:
            graph = "with" if score_B.requires_grad else "without"
            got = f"shape {tuple(score_B.shape)} {graph} a graph"
            raise RewardError(f"reward {name!r} returned {got} for {len(prompts)} images")
        # A score depends on its own image alone, so the gradient of the sum holds each image's own.
        (slope_B3HW,) = torch.autograd.grad(score_B.sum(), pixels)
    return score_B.detach(), slope_B3HW


def of(mix: RewardMix) -> GradientReward:
    """The gradients of a mix that is loaded.

    Networks of rewards with a weight are set to fp32, since gradients vanish in fp16. From then on the mix scores with
    them, too. Raises ValueError as `GradientReward`.
    """
    found = GradientReward(mix)
    for reward in found.weighted.values():
        for network in reward.networks:
            network.float()
    return found


def build(
    names: Sequence[str], weights: Sequence[float] | None = None, device: torch.device | str = "cpu"
) -> GradientReward:
    """Load rewards with a gradient, as `rewards.build` does.

    Raises ValueError as it does. A reward without a gradient is refused before anything is loaded.
    """
    if not isinstance(names, str):
        require_gradients([name for i, name in enumerate(names) if weights is None or i >= len(weights) or weights[i]])
    return of(mixes.build(names, weights, device))
