"""Images as published models were given them: PIL's resize, to a square for CLIP, then the mean and std.

Published scores are of 8-bit images that PIL resized, antialiased; resizing the tensor would give others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def floor_half(excess: int) -> int:
    """Half of an excess, rounded down: how far transformers' centre crop moves in."""
    return excess // 2


def round_half(excess: int) -> int:
    """Half of an excess, rounded to even: how far torchvision's centre crop moves in."""
    return round(excess / 2)


def pil_images(images_B3HW: Tensor) -> list[Image.Image]:
    """B images, float in [0, 1], rounded to the nearest of 256 levels."""
    levels_B3HW = (images_B3HW.float() * 255).round().clamp(0, 255).byte()
    return [Image.fromarray(pixels) for pixels in levels_B3HW.permute(0, 2, 3, 1).cpu().numpy()]


def centre_crop(images_B3HW: Tensor, side: int, half: Callable[[int], int] = floor_half) -> Tensor:
    """(B, 3, side, side), normalised: the shorter side becomes `side`, and the middle of the longer one is kept."""
    return _normalised([_cropped(image, side, half) for image in pil_images(images_B3HW)])


def pad_to_square(images_B3HW: Tensor, side: int) -> Tensor:
    """(B, 3, side, side), normalised: the longer side becomes `side`, and the shorter one is padded with black."""
    return _normalised([_padded(image, side) for image in pil_images(images_B3HW)])


def bounded(images_B3HW: Tensor, shorter: int, longer: int) -> Tensor:
    """(B, 3, h, w), normalised by ImageNet's mean and std: the shorter side becomes `shorter` by PIL's bilinear.

    Less, in proportion, where the longer side would have more than `longer` pixels.
    """
    sides = images_B3HW.shape[2:]
    scale = min(shorter / min(sides), longer / max(sides))
    height, width = (int(side * scale + 0.5) for side in sides)
    images = [image.resize((width, height), Image.Resampling.BILINEAR) for image in pil_images(images_B3HW)]
    return _normalised(images, IMAGENET_MEAN, IMAGENET_STD)


def _cropped(image: Image.Image, side: int, half: Callable[[int], int]) -> Image.Image:
    width, height = (int(side * length / min(image.size)) for length in image.size)
    left, top = half(width - side), half(height - side)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


def _padded(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    width, height = (round(length * scale) for length in image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


def _normalised(
    images: Sequence[Image.Image], mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    pixels_B3HW = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    mean_311, std_311 = (torch.tensor(row).view(3, 1, 1) for row in (mean, std))
    return (pixels_B3HW.float() / 255 - mean_311) / std_311
