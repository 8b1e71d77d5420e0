"""JPEG size as a reward (DDPO, arXiv 2305.13301).

    jpeg_compressibility = -kB    jpeg_incompressibility = +kB    (1 kB = 1000 bytes, quality 95, 4:2:0, Pillow)

The formula is ddpo-pytorch's. Flow-GRPO divides the compressibility by 500 kB; a weight of 0.002 gives that scale. It
needs no model and no download, and shows the effect of RL to the eye.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rewards import Reward
from rewards.preprocessing import pil_images

QUALITY = 95


def size_kb(images_B3HW: Tensor) -> Tensor:
    """JPEG size in kB of each image, (B,) fp32 on CPU.

    Images: float in [0, 1]. 1 kB is 1000 bytes; the quality is 95.
    """
    return torch.tensor([_encoded_bytes(image) / 1000 for image in pil_images(images_B3HW)], dtype=torch.float32)


def _encoded_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


def compressibility(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `jpeg_compressibility`; always on the CPU."""

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return -size_kb(images_B3HW)

    return reward


def incompressibility(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `jpeg_incompressibility`; always on the CPU."""

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return size_kb(images_B3HW)

    return reward
