"""Drawings of the emoji world: 48 nouns from Noto Emoji.

They come at any size, and some nouns in several colours.

They are in noto/sprites.png, 64 x 64 pixels each, in the order of `DRAWINGS`; `python -m rlg.pretraining.sprites`
made the file. noto/ATTRIBUTION.md says whose they are. The detector matches with them (`rewards.detectors.matching`),
and `rlg.tinyworld.emoji` draws with them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

WORLD = "emoji"  # as metadata names it
SIZES = (25, 30)  # pixels, the smallest and the largest side of a drawing in a scene
SHEET = Path(__file__).parent / "noto" / "sprites.png"
CELL = 64  # pixels, side of a drawing in the sheet
COLUMNS = 9  # of the sheet
COLORS = ("red", "orange", "yellow", "green", "blue", "purple")
COLORED = {  # nouns that are drawn in several colours
    "apple": ("red", "green"),
    "car": ("red", "blue"),
    "book": ("red", "orange", "green", "blue"),
    "heart": ("red", "yellow", "green", "blue", "purple"),
    "ball": ("red", "yellow", "green", "blue", "purple"),
}
# fmt: off
NOUNS = (
    "apple", "pear", "lemon", "banana", "strawberry", "pineapple", "carrot", "mushroom", "doughnut", "cupcake",
    "cat", "dog", "fox", "rabbit", "panda", "tiger", "pig", "frog", "mouse", "penguin", "owl", "unicorn", "octopus",
    "crab", "fish", "turtle", "butterfly", "whale", "sunflower", "cactus", "tree", "leaf",
    "car", "rocket", "airplane", "boat", "train", "house", "guitar", "key", "crown", "gift", "umbrella", "star",
    "robot", "book", "heart", "ball",
)
# fmt: on
DRAWINGS = tuple((noun, color) for noun in NOUNS for color in COLORED.get(noun, ("",)))  # noun, colour or ""


@cache
def _sheet() -> Tensor:
    """Read the sheet as (drawings, 4, CELL, CELL) in [0, 1].

    Red, green and blue are multiplied by alpha.
    """
    with Image.open(SHEET) as image:
        pixels_HW4 = torch.from_numpy(np.array(image.convert("RGBA"))).float() / 255
    rows = pixels_HW4.shape[0] // CELL
    cells = pixels_HW4.reshape(rows, CELL, COLUMNS, CELL, 4).permute(0, 2, 4, 1, 3).reshape(-1, 4, CELL, CELL)
    cells = cells[: len(DRAWINGS)]
    return torch.cat([cells[:, :3] * cells[:, 3:], cells[:, 3:]], dim=1)


@cache
def drawings(size: int) -> Tensor:
    """Resize all drawings to (len(DRAWINGS), 4, size, size), in [0, 1].

    The channels are red, green and blue, multiplied by alpha, and alpha. All callers share the tensor: do not write
    to it.
    """
    return functional.interpolate(_sheet(), (size, size), mode="bilinear", antialias=True, align_corners=False)
