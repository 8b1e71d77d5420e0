"""LAION's aesthetic predictor: beauty of an image from 1 to 10.

The prompt has no part in it.

    score = head( image features of CLIP ViT-L/14, of length 1 )    head: linear layers 768-1024-128-64-16-1

The head is sac+logos+ava1-l14-linearMSE.pth of github.com/christophschuhmann/improved-aesthetic-predictor; by default
trl's copy of it on the hub is downloaded. SOURCE is the file (.pth or .safetensors), or a folder with it. If the
folder has a config.json, openai/clip-vit-large-patch14 is read from there, too. Images are prepared as in
`rewards.clip`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from rewards import DifferentiableReward
from rewards.clip import CLIP_L, Clip, read
from rewards.preprocessing import at_least_fp32
from rewards.weights import Origin, batched, difference, half_on_gpu

HUB = "trl-lib/ddpo-aesthetic-predictor"
PUBLISHED = "sac+logos+ava1-l14-linearMSE"
FILES = ("aesthetic-model.pth", f"{PUBLISHED}.pth", f"{PUBLISHED}.safetensors")  # the name on the hub comes first


class LinearHead(nn.Module):
    """(B, D) features to (B,) scores, in fp32.

    It has five linear layers, named as published. ImageReward's is the same.
    """

    def __init__(self, width: int):
        super().__init__()
        first, second, third, *rest = (nn.Linear(*pair) for pair in pairwise((width, 1024, 128, 64, 16, 1)))
        # Training has dropout in the place of the identities.
        self.layers = nn.Sequential(first, nn.Identity(), second, nn.Identity(), third, nn.Identity(), *rest)

    def forward(self, features_BD: Tensor) -> Tensor:
        """(B,) scores of features."""
        return self.layers(at_least_fp32(features_BD))[:, 0]

    def fill(self, tensors: Mapping[str, Tensor]) -> LinearHead:
        """Fill in these tensors, and freeze; return the head.

        Raises ValueError for other names or shapes.
        """
        if found := difference(self.state_dict(), tensors):
            raise ValueError(found)
        self.load_state_dict(tensors)
        return self.requires_grad_(False)


def aesthetic(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `aesthetic`; source: the head's file, or a folder. Raises ValueError if something is not there."""
    origin = Origin.of("aesthetic", source, HUB)
    file = origin.find(*FILES)
    has_clip = origin.folder is not None and (origin.folder / "config.json").is_file()
    clip = Clip(read(Origin("aesthetic", str(origin.folder) if has_clip else CLIP_L), device, half_on_gpu(device)))
    try:
        head = LinearHead(clip.model.config.projection_dim).fill(origin.tensors(file)).to(device)
    except ValueError as error:
        raise origin.unreadable(str(file), error) from error

    def score(images_B3HW: Tensor, prompts: Sequence[str], *, rounded: bool) -> Tensor:
        return head(clip.image_features(images_B3HW, rounded=rounded))

    return batched(score, clip.model, head)
