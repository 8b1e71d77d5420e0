"""Conversion of pixels in [0, 1] to bytes.

No other module does it. Torch is not imported, so that rewards and their servers can use this module.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def levels(images_B3HW: Tensor) -> Tensor:
    """Images rounded to the nearest of 256 levels, as uint8.

    images_B3HW: floats in [0, 1]. Other layouts work as well.
    """
    return (images_B3HW.float() * 255).round().clamp(0, 255).byte()


def to_pil(image_3HW: Tensor) -> Image.Image:
    """An image of 256 levels."""
    return Image.fromarray(levels(image_3HW).permute(1, 2, 0).cpu().numpy())
