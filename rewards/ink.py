"""Ink: a soft size of the JPEG, with a gradient.

    ink = sum over c of log2(1 + (2 c / q)^2) / 2, in thousands of bytes

c: the coefficients of the picture's JPEG before they are rounded (8 x 8 DCT of luma and of 4:2:0 chroma; of the mean
   of a block, the difference from the block before)
q: the JPEG's own step of each coefficient, at the quality of `rewards.jpeg`

A term is about the bits of a coefficient's magnitude. It leaves 0 where |c| passes q / 2, and JPEG keeps the
coefficient. Run lengths and Huffman's code are left out, so the score is smaller than the file. It ranks drawn scenes
as their files do: the rank correlation is above 0.97. It needs no model and no download. A negative weight asks for
plain pictures.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, pad

from rewards import DifferentiableReward
from rewards.jpeg import QUALITY
from rlg.io.pixels import levels

_BLOCK = 8
_UNIT = 2 * _BLOCK  # chroma is halved, so a picture is coded in units of 16 x 16 pixels
_BITS_PER_KB = 8000
# From RGB to YCbCr, as in JFIF 1.02.
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def ink_of(pixels_B3HW: Tensor) -> Tensor:
    """(B,) ink of pictures, whose pixels are 0 to 255."""
    height, width = pixels_B3HW.shape[2:]
    whole_B3HW = pad(pixels_B3HW, (0, -width % _UNIT, 0, -height % _UNIT), mode="replicate")
    planes_B3HW = torch.einsum("cd,bdhw->bchw", whole_B3HW.new_tensor(_YCBCR), whole_B3HW)
    luma_B1HW, chroma_B2HW = planes_B3HW[:, :1] - 128, avg_pool2d(planes_B3HW[:, 1:], 2)  # 128: JFIF's zero of luma
    bits = [_bits(plane_BCHW, table) for plane_BCHW, table in zip((luma_B1HW, chroma_B2HW), steps(), strict=True)]
    return (bits[0] + bits[1]) / _BITS_PER_KB


def _bits(planes_BCHW: Tensor, steps_64: Sequence[int]) -> Tensor:
    """(B,) soft bits of planes with one table of steps."""
    batch, channels, height, width = planes_BCHW.shape
    blocks = planes_BCHW.reshape(batch, channels, height // _BLOCK, _BLOCK, width // _BLOCK, _BLOCK).transpose(3, 4)
    basis_88 = _basis(planes_BCHW)
    found_BCN64 = (basis_88 @ blocks @ basis_88.T).flatten(4).flatten(2, 3)
    means_BCN1 = found_BCN64[..., :1]
    jumps_BCN1 = means_BCN1.diff(dim=2, prepend=torch.zeros_like(means_BCN1[:, :, :1]))
    coded_BCN64 = torch.cat([jumps_BCN1, found_BCN64[..., 1:]], dim=3) / planes_BCHW.new_tensor(steps_64)
    return (1 + (2 * coded_BCN64).square()).log2().sum(dim=(1, 2, 3)) / 2


def _basis(like: Tensor) -> Tensor:
    """(8, 8) orthonormal DCT: a row a frequency."""
    place_8 = torch.arange(_BLOCK, device=like.device, dtype=like.dtype)
    waves_88 = (math.pi / _BLOCK * place_8[:, None] * (place_8 + 0.5)).cos() * math.sqrt(2 / _BLOCK)
    return torch.cat([waves_88[:1] / math.sqrt(2), waves_88[1:]])


@cache
def steps() -> tuple[list[int], list[int]]:
    """The JPEG's 64 steps of luma, and those of chroma.

    They are read, row by row, from a file that Pillow writes.
    """
    buffer = io.BytesIO()
    Image.new("RGB", (_UNIT, _UNIT)).save(buffer, format="JPEG", quality=QUALITY)
    tables = Image.open(buffer).quantization
    return list(tables[0]), list(tables[1])


def ink(device: torch.device | str, source: str | None = None) -> DifferentiableReward:
    """Factory of `ink`; it computes where the images are."""

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return ink_of(levels(images_B3HW).double()).float().cpu()

    def unrounded(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        return ink_of(images_B3HW.double() * 255)

    return DifferentiableReward(reward, unrounded)
