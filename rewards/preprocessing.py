"""Images as published rewards take them: resized and normalised.

An image has 8 bits a channel. Resizing is bicubic and antialiased. PIL's, before the crop, gives 8-bit images again;
torchvision's, before the padding, gives floats that may be a little outside [0, 1]. With `rounded=False` the same is
done in floats alone, and has a gradient: PIL's resizing is torch's, one direction after the other, each clamped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate, pad

from rlg.io.pixels import levels

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in fp32, or as it is in fp64."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def floor_half(excess: int) -> int:
    """Half of an excess, rounded down, as in transformers' centre crop."""
    return excess // 2


def round_half(excess: int) -> int:
    """Half of an excess, rounded to even, as in torchvision's centre crop."""
    return round(excess / 2)


def pil_images(images_B3HW: Tensor) -> list[Image.Image]:
    """B images of 256 levels."""
    return [Image.fromarray(pixels) for pixels in levels(images_B3HW).permute(0, 2, 3, 1).cpu().numpy()]


def centre_crop(
    images_B3HW: Tensor, side: int, half: Callable[[int], int] = floor_half, *, rounded: bool = True
) -> Tensor:
    """(B, 3, side, side), normalised: a centre crop of each image.

    The shorter side becomes `side`, and the middle of the longer one is kept. rounded: to 256 levels, before and after
    resizing.
    """
    if not rounded:
        return _normalised(_cropped_with_grad(images_B3HW, side, half))
    return _normalised(_tensor([_cropped(image, side, half) for image in pil_images(images_B3HW)]))


def pad_to_square(images_B3HW: Tensor, side: int, *, rounded: bool = True) -> Tensor:
    """(B, 3, side, side), normalised: each image, padded with black.

    The longer side becomes `side`, and the shorter one is padded. rounded: to 256 levels, before resizing.
    """
    scale = side / max(images_B3HW.shape[2:])
    height, width = (round(length * scale) for length in images_B3HW.shape[2:])
    pixels_B3HW = levels(images_B3HW) / 255 if rounded else images_B3HW
    resized_B3HW = interpolate(pixels_B3HW, (height, width), mode="bicubic", antialias=True)
    top, left = (side - height) // 2, (side - width) // 2
    return _normalised(pad(resized_B3HW, (left, side - width - left, top, side - height - top)))


def bounded(images_B3HW: Tensor, shorter: int, longer: int) -> Tensor:
    """(B, 3, h, w), normalised by ImageNet's mean and std.

    The shorter side becomes `shorter`, by PIL's bilinear. If the longer side would then exceed `longer` pixels, it
    becomes `longer`, and the shorter side follows in proportion.
    """
    sides = images_B3HW.shape[2:]
    scale = min(shorter / min(sides), longer / max(sides))
    height, width = (int(side * scale + 0.5) for side in sides)
    images = [image.resize((width, height), Image.Resampling.BILINEAR) for image in pil_images(images_B3HW)]
    return _normalised(_tensor(images), IMAGENET_MEAN, IMAGENET_STD)


def _cropped(image: Image.Image, side: int, half: Callable[[int], int]) -> Image.Image:
    width, height = _resized(image.size, side)
    left, top = half(width - side), half(height - side)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + side, top + side))


def _cropped_with_grad(images_B3HW: Tensor, side: int, half: Callable[[int], int]) -> Tensor:
    height, width = _resized(images_B3HW.shape[2:], side)
    top, left = half(height - side), half(width - side)
    resized_B3HW = images_B3HW
    for size in ((images_B3HW.shape[2], width), (height, width)):  # PIL's order: rows first
        resized_B3HW = interpolate(resized_B3HW, size, mode="bicubic", antialias=True).clamp(0, 1)
    return resized_B3HW[:, :, top : top + side, left : left + side]


def _resized(lengths: Sequence[int], side: int) -> tuple[int, int]:
    """Two lengths, of which the shorter becomes `side`."""
    first, second = (int(side * length / min(lengths)) for length in lengths)
    return first, second


def _tensor(images: Sequence[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2) / 255


def _normalised(images_B3HW: Tensor, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD) -> Tensor:
    mean_311, std_311 = (torch.tensor(row, device=images_B3HW.device).view(3, 1, 1) for row in (mean, std))
    return (images_B3HW - mean_311) / std_311
