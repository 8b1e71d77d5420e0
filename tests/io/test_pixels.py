"""Pixels to bytes: rounded, not cut, and kept within 256 levels."""

from __future__ import annotations

import numpy as np
import torch

from rlg.io.pixels import levels, to_pil


def test_pixels_are_rounded_and_stay_within_the_levels() -> None:
    """126.6 / 255 is 127; a value a little outside of [0, 1], as resizing gives, is the end and not its wrap."""
    pixels = torch.tensor([0.0, 0.4 / 255, 126.6 / 255, 1.0, -0.01, 1.01])
    assert levels(pixels).tolist() == [0, 0, 127, 255, 0, 255]
    assert levels(pixels).dtype == torch.uint8


def test_half_precision_is_rounded_in_fp32() -> None:
    """bf16 holds 161 / 2^14: times 255 it is 2.506, so 3; in bf16 that product is 2.5, which rounds to 2."""
    assert levels(torch.tensor([161 / 2**14], dtype=torch.bfloat16)).tolist() == [3]


def test_an_image_has_its_channels_last() -> None:
    red = torch.zeros(3, 2, 4)
    red[0] = 1.0
    assert (np.asarray(to_pil(red)) == np.broadcast_to([255, 0, 0], (2, 4, 3))).all()
