"""Images as bytes: the one place where pixels in [0, 1] become 256 levels.

It needs no torch of its own, so that rewards and their servers can take it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def levels(images_B3HW: Tensor) -> Tensor:
    """Images, float in [0, 1] of any layout, rounded to the nearest of 256 levels; uint8."""
    return (images_B3HW.float() * 255).round().clamp(0, 255).byte()


def to_pil(image_3HW: Tensor) -> Image.Image:
    """An image of 256 levels."""
    return Image.fromarray(levels(image_3HW).permute(1, 2, 0).cpu().numpy())
