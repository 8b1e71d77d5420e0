"""What a reward and its server must agree on: images as base64 PNGs, and the bearer token.

A PNG holds 8 bits a channel: images are rounded to the nearest of 256 levels, as every reward that was trained on
files presumes. An image that is already rounded so arrives bit for bit. No pickle is ever written or read.
"""

from __future__ import annotations

import base64
import io
import ipaddress
import struct
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

TOKEN = "RLG_REWARD_TOKEN"  # the environment variable that holds the bearer token, on both sides
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"  # PNG specification, sections 5.2 and 11.2.2 (ISO/IEC 15948)
_RGB8 = b"\x08\x02"  # bit depth, colour type


def to_png(image_3HW: Tensor, side: int | None = None) -> str:
    """An image in [0, 1] as a base64 PNG; with `side`, resized to a square of as many pixels (bicubic)."""
    pixels_HW3 = (image_3HW.float().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels_HW3)
    if side is not None and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)  # the network is fast, and sampling needs the CPU
    return base64.b64encode(buffer.getvalue()).decode()


def from_pngs(texts: Sequence[str], max_pixels: int) -> Tensor:
    """(B, 3, H, W) fp32 in [0, 1] of base64 PNGs, 8-bit RGB of one size.

    Raises ValueError, with the image's index, for anything else, and before decoding more than `max_pixels` an image.
    """
    images = [_from_png(text, f"image {index}", max_pixels) for index, text in enumerate(texts)]
    sizes = sorted({image.shape[1::-1] for image in images})
    if len(sizes) > 1:
        raise ValueError(f"the images of a request must be of one size, got {' and '.join(map(_size, sizes))}")
    if not images:
        return torch.zeros(0, 3, 1, 1)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def _from_png(text: str, place: str, max_pixels: int) -> np.ndarray:
    try:
        data = base64.b64decode(text, validate=True)
        start, size, kind = data[:16], struct.unpack(">II", data[16:24]), data[24:26]
    except (ValueError, struct.error) as error:
        raise ValueError(f"{place} is not a base64 PNG") from error
    if start != _PNG_START:
        raise ValueError(f"{place} is not a base64 PNG")
    if size[0] * size[1] > max_pixels:  # before Pillow sees it: a bomb of a few kB decodes to gigabytes
        raise ValueError(f"{place} is {_size(size)}, over the limit of {max_pixels} pixels")
    if kind != _RGB8:
        raise ValueError(f"{place} must be 8-bit RGB")
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
    """The token without surrounding blanks. Raises ValueError, naming its origin and not its value, if it is unfit."""
    token = text.strip()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError(f"the token in {origin} must be printable ASCII without blanks, and not empty")
    return token


def is_loopback(host: str) -> bool:
    """Whether a host is this machine alone, by its name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
