"""The wire format of rewards: images as base64 PNGs, and the token.

A PNG holds 8 bits a channel: images are rounded to the nearest of 256 levels, as every reward that was trained on
files presumes. An image that is already rounded so arrives bit for bit. No pickle is ever written or read.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from rlg.io.pixels import to_pil

if TYPE_CHECKING:
    from torch import Tensor

TOKEN = "RLG_REWARD_TOKEN"  # environment variable of the bearer token, on both sides
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"  # PNG specification, sections 5.2 and 11.2.2 (ISO/IEC 15948)
_RGB8 = b"\x08\x02"  # bit depth, colour type


def to_png(image_3HW: Tensor, side: int | None = None) -> str:
    """An image in [0, 1] as a base64 PNG.

    side: resize it (bicubic) to a square of as many pixels.
    """
    image = to_pil(image_3HW)
    if side is not None and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    # fast, because sampling needs the CPU more than the network needs small files
    image.save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode()


def from_pngs(texts: Sequence[str], max_pixels: int, all_pixels: int | None = None) -> Tensor:
    """(B, 3, H, W) bytes of base64 PNGs, 8-bit RGB of one size; see `as_floats`.

    Raises ValueError, with the image's index, for anything else, and before anything is decoded for more than
    `max_pixels` an image or `all_pixels` together.
    """
    import torch

    files = [_checked(text, f"image {index}", max_pixels) for index, text in enumerate(texts)]
    sizes = sorted({size for _, size in files})
    if len(sizes) > 1:
        raise ValueError(f"the images of a request must be of one size, got {' and '.join(map(_size, sizes))}")
    if all_pixels is not None and (found := sum(width * height for _, (width, height) in files)) > all_pixels:
        raise ValueError(f"{len(files)} images have {found} pixels together, over the limit of {all_pixels}")
    if not files:
        return torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    images_BHW3 = np.empty((len(files), sizes[0][1], sizes[0][0], 3), dtype=np.uint8)
    for index, (data, size) in enumerate(files):
        images_BHW3[index] = _decoded(data, size, f"image {index}")
    return torch.from_numpy(images_BHW3).permute(0, 3, 1, 2)


def as_floats(images_B3HW: Tensor) -> Tensor:
    """Images in bytes as fp32 in [0, 1]."""
    return images_B3HW.float().div_(255)


def _checked(text: str, place: str, max_pixels: int) -> tuple[bytes, tuple[int, int]]:
    """(bytes, width and height by the header) of a PNG."""
    try:
        data = base64.b64decode(text, validate=True)
        start, size, kind = data[:16], struct.unpack(">II", data[16:24]), data[24:26]
    except (ValueError, struct.error) as error:
        raise ValueError(f"{place} is not a base64 PNG") from error
    if start != _PNG_START:
        raise ValueError(f"{place} is not a base64 PNG")
    if size[0] * size[1] > max_pixels:  # refuse it before Pillow sees it: a bomb of a few kB decodes to gigabytes
        raise ValueError(f"{place} is {_size(size)}, over the limit of {max_pixels} pixels")
    if kind != _RGB8:
        raise ValueError(f"{place} must be 8-bit RGB")
    return data, size


def _decoded(data: bytes, size: tuple[int, int], place: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data), formats=["PNG"])
        if image.size != size:
            raise ValueError("a second header")
        return np.asarray(image)
    except Exception as error:  # Pillow raises many types for damaged files
        raise ValueError(f"{place} is a damaged PNG") from error


def _size(size: Sequence[int]) -> str:
    return f"{size[0]}x{size[1]}"


def check_token(text: str, origin: str) -> str:
    """The token without surrounding blanks.

    Raises ValueError if it is unfit; the message names its origin and not its value.
    """
    token = text.strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"the token in {origin} must be printable ASCII without blanks, and not empty")
    return token


def is_loopback(host: str) -> bool:
    """Tell whether a host, a name or address, is this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
