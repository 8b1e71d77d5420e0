"""Captioned 64x64 scenes of coloured shapes and of signs.

The captions have metadata in GenEval's format.

A scene holds one to four shapes (`rewards.detectors.blobs.SHAPES`, in `PALETTE` colours) on light paper, or one sign
with two to four printed characters. Captions and metadata follow GenEval (arXiv 2310.11513): the tags single_object,
two_object, counting, colors, position, color_attr and `include: [{class, count, color?, position?}]`; a sign's tag is
`text`. A fixed quarter of the captions (and a quarter of the possible signs) is the test split: neither pretraining
nor RL sees it. Shapes keep to the cells of a 2x2 grid with jitter, so they never touch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rewards.detectors.blobs import CROSS_ARM, PALETTE, SHAPES, SIGN, SIGN_FRAME
from rlg.prompts import Prompt

SIZE = 64
COUNTS = {2: "two", 3: "three", 4: "four"}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
COMPOSITION_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TEXT_TAG = "text"
ALPHABET = "ACEFHKLNPRTXY34679"  # no two that look alike at this size
SIGN_LENGTHS = (2, 3, 4)
TEST_FRACTION = 0.25
SIGN_BOX = (60, 38)  # width, height in pixels


def plural(name: str) -> str:
    """Plural of a shape's name."""
    return name + ("es" if name.endswith("ss") else "s")


def words() -> list[str]:
    """The vocabulary of the captions. In this order no merge of the tokenizer cuts another word in two."""
    relations = {word for relation in RELATIONS for word in relation.split()}
    function_words = {"a", "and", "that", "says", "photo", *relations}
    shapes = [*map(plural, SHAPES), *SHAPES, SIGN]
    return ["green", "three", *shapes, *PALETTE, *COUNTS.values(), *sorted(function_words)]


def _include(name: str, count: int = 1, **extra: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **extra}


def _metadata(tag: str, *include: dict[str, Any], exclude: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include)} | ({"exclude": list(exclude)} if exclude else {})


def _captions(tag: str) -> list[tuple[str, dict[str, Any]]]:
    pairs = list(itertools.permutations(SHAPES, 2))
    if tag == "single_object":
        return [(f"a {a}", _metadata(tag, _include(a))) for a in SHAPES]
    if tag == "colors":
        return [(f"a {c} {a}", _metadata(tag, _include(a, color=c))) for c in PALETTE for a in SHAPES]
    if tag == "two_object":
        return [(f"a {a} and a {b}", _metadata(tag, _include(a), _include(b))) for a, b in pairs]
    if tag == "counting":
        rows = []
        for (n, word), a, c in itertools.product(COUNTS.items(), SHAPES, (None, *PALETTE)):
            colour = {"color": c} if c else {}
            text = f"{word} {c} {plural(a)}" if c else f"{word} {plural(a)}"
            rows.append((text, _metadata(tag, _include(a, n, **colour), exclude=[_include(a, n + 1)])))
        return rows
    if tag == "position":
        return [
            (f"a {a} {rel} a {b}", _metadata(tag, _include(b), _include(a, position=[rel, 0])))
            for a, b in pairs
            for rel in RELATIONS
        ]
    if tag == "color_attr":
        return [
            (f"a {c} {a} and a {d} {b}", _metadata(tag, _include(a, color=c), _include(b, color=d)))
            for a, b in pairs
            for c, d in itertools.permutations(PALETTE, 2)
        ]
    raise ValueError(f"unknown tag {tag!r}; known: {', '.join((*COMPOSITION_TAGS, TEXT_TAG))}")


def rank(text: str) -> str:
    """A hash by which captions are put in an order that stays."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@cache
def composition_prompts(split: str) -> tuple[Prompt, ...]:
    """Composition prompts of a split ("train" or "test"), in a fixed order.

    Every tag is in both splits."""
    check_split(split)
    prompts: list[Prompt] = []
    for tag in COMPOSITION_TAGS:
        rows = sorted(_captions(tag), key=lambda row: rank(row[0]))
        held_out = max(1, round(TEST_FRACTION * len(rows)))
        chosen = rows[:held_out] if split == "test" else rows[held_out:]
        prompts += [Prompt(text, metadata) for text, metadata in chosen]
    return tuple(prompts)


def sign_prompt(text: str) -> Prompt:
    """The prompt of a sign with these characters."""
    return Prompt(
        f'a sign that says "{text}"', {"tag": TEXT_TAG, "include": [_include(SIGN)], "exclude": [], "text": text}
    )


def is_test_sign(text: str) -> bool:
    """Tell by a hash whether a string belongs to the test split."""
    return int(rank(text), 16) % 100 < 100 * TEST_FRACTION


def sign_prompts(split: str, count: int, generator: torch.Generator) -> list[Prompt]:
    """`count` distinct signs of a split, lengths evenly mixed."""
    check_split(split)
    texts: dict[str, None] = {}
    while len(texts) < count:
        length = SIGN_LENGTHS[int(torch.randint(len(SIGN_LENGTHS), (1,), generator=generator))]
        letters = torch.randint(len(ALPHABET), (length,), generator=generator).tolist()
        text = "".join(ALPHABET[i] for i in letters)
        if is_test_sign(text) == (split == "test"):
            texts[text] = None
    return [sign_prompt(text) for text in texts]


def check_split(split: str) -> None:
    """Raise ValueError for a split that is neither "train" nor "test"."""
    if split not in ("train", "test"):
        raise ValueError(f"unknown split {split!r}; known: train, test")


def training_prompts(count: int, generator: torch.Generator, text_fraction: float = 0.2) -> list[Prompt]:
    """Draw `count` prompts for pretraining, from the train split alone.

    Tags are equally likely, beside a share of signs."""
    by_tag = [[p for p in composition_prompts("train") if p.metadata["tag"] == tag] for tag in COMPOSITION_TAGS]
    weights = torch.tensor([0.04, 0.14, 0.22, 0.08, 0.26, 0.26])  # tags with more to learn are shown more often
    tags = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
    is_text = (torch.rand(count, generator=generator) < text_fraction).tolist()
    picks = torch.rand(count, generator=generator).tolist()
    prompts = [by_tag[tag][int(u * len(by_tag[tag]))] for tag, u in zip(tags, picks, strict=True)]
    return [sign_prompts("train", 1, generator)[0] if t else p for p, t in zip(prompts, is_text, strict=True)]


def draw(prompts: Sequence[Prompt], generator: torch.Generator) -> Tensor:
    """Ground-truth images for prompts: float (B, 3, 64, 64) in [0, 1].

    What a caption leaves open (colours, places, sizes, tint of the paper) is drawn from `generator`.
    """
    paper = 0.90 + 0.10 * torch.rand(len(prompts), 3, 1, 1, generator=generator)
    images_B3HW = paper.expand(-1, 3, SIZE, SIZE).clone()
    objects: list[tuple[int, str, str, tuple[float, float, float]]] = []
    for index, prompt in enumerate(prompts):
        if prompt.metadata["tag"] == TEXT_TAG:
            _draw_sign(images_B3HW[index], prompt.metadata["text"], generator)
        else:
            objects += [(index, *thing) for thing in _layout(prompt.metadata, generator)]
    for rank in range(max(COUNTS)):  # one vectorised pass for the first object of every image, one for the second ...
        batch = [group[rank] for group in _by_image(objects) if len(group) > rank]
        if batch:
            _paint(images_B3HW, batch)
    return images_B3HW


def _by_image(objects: Sequence[tuple]) -> list[list[tuple]]:
    return [list(group) for _, group in itertools.groupby(objects, key=lambda item: item[0])]


def _layout(metadata: dict[str, Any], generator: torch.Generator) -> list[tuple[str, str, tuple[float, float, float]]]:
    """Place every object of the metadata: (shape, colour, (x, y, radius))."""
    things: list[tuple[str, str]] = []
    for clause in metadata["include"]:
        colour = clause.get("color") or list(PALETTE)[int(torch.randint(len(PALETTE), (1,), generator=generator))]
        things += [(clause["class"], colour)] * clause["count"]
    u = torch.rand(len(things), 3, generator=generator)
    if len(things) == 1:
        radius = 9 + 5 * float(u[0, 2])
        x, y = (1 + radius + (SIZE - 2 - 2 * radius) * u[0, :2]).tolist()
        return [(*things[0], (x, y, radius))]
    placed = []
    for (name, colour), cell, (ux, uy, ur) in zip(things, cells_of(metadata, generator), u.tolist(), strict=False):
        x, y = 16 + 32 * (cell % 2) + 8 * (ux - 0.5), 16 + 32 * (cell // 2) + 8 * (uy - 0.5)
        placed.append((name, colour, (x, y, 8.5 + 3 * ur)))
    return placed


def cells_of(metadata: dict[str, Any], generator: torch.Generator) -> list[int]:
    """Choose cells of a 2 x 2 grid, by the objects' relation.

    Cells are numbered row by row.
    """
    cells = torch.randperm(4, generator=generator).tolist()
    relation = next((c["position"][0] for c in metadata["include"] if "position" in c), None)
    if relation is None:
        return cells
    dx, dy = RELATIONS[relation]  # the second object, against the first
    lane, first = int(torch.randint(2, (1,), generator=generator)), (0 if dx + dy > 0 else 1)
    return [first + 2 * lane, 1 - first + 2 * lane] if dx else [lane + 2 * first, lane + 2 * (1 - first)]


def _paint(images_B3HW: Tensor, batch: Sequence[tuple[int, str, str, tuple[float, float, float]]]) -> None:
    """Blend one object into each image that `batch` names, in place.

    Edges are antialiased.
    """
    index = torch.tensor([item[0] for item in batch])
    colour = torch.tensor([PALETTE[item[2]] for item in batch])[:, :, None, None]
    place = torch.tensor([item[3] for item in batch])
    x, y, radius = (place[:, i, None, None] for i in range(3))
    axis = torch.arange(SIZE) + 0.5
    px, py = axis[None, None, :] - x, axis[None, :, None] - y
    distances = {name: _signed_distance(name, px, py, radius) for name in {item[1] for item in batch}}
    distance = torch.stack([distances[item[1]][row] for row, item in enumerate(batch)])
    cover = (0.5 - distance).clamp(0, 1)[:, None]
    images_B3HW[index] = images_B3HW[index] * (1 - cover) + colour * cover


def _signed_distance(name: str, px: Tensor, py: Tensor, radius: Tensor) -> Tensor:
    """Approximate signed distance in pixels to a shape at 0.

    It is negative inside.
    """
    if name == "circle":
        return (px**2 + py**2).sqrt() - radius
    if name == "square":
        return torch.maximum(px.abs(), py.abs()) - 0.9 * radius
    if name == "triangle":  # apex up, as wide as high
        slope = (px.abs() * 2 - (py + radius)) / 5**0.5
        return torch.maximum(slope, py - radius)
    arm = CROSS_ARM * radius
    upright = torch.maximum(px.abs() - arm, py.abs() - radius)
    level = torch.maximum(px.abs() - radius, py.abs() - arm)
    return torch.minimum(upright, level)


@cache
def _glyph(char: str, size: int) -> np.ndarray:
    """Coverage (H, W) in [0, 1] of one character, cut to its ink."""
    font = ImageFont.load_default(size)
    canvas = Image.new("L", (2 * size, 2 * size), 0)
    ImageDraw.Draw(canvas).text((size // 2, size // 4), char, fill=255, font=font, stroke_width=0.6)
    left, top, right, bottom = canvas.getbbox()
    return np.asarray(canvas.crop((left, top, right, bottom)), dtype=np.float32) / 255


def _draw_sign(image_3HW: Tensor, text: str, generator: torch.Generator) -> None:
    width, height = SIGN_BOX
    colour = list(PALETTE)[int(torch.randint(len(PALETTE), (1,), generator=generator))]
    x0 = int(torch.randint(1, SIZE - width, (1,), generator=generator))
    y0 = int(torch.randint(6, SIZE - height - 5, (1,), generator=generator))
    frame_x, frame_y = round(SIGN_FRAME[0] * width), round(SIGN_FRAME[1] * height)
    panel = image_3HW[:, y0 : y0 + height, x0 : x0 + width]
    panel[:] = torch.tensor(PALETTE[colour])[:, None, None]
    panel[:, frame_y:-frame_y, frame_x:-frame_x] = 1.0
    cell = 13  # pixels a character; a sign's characters are centred
    left = x0 + (width - cell * len(text)) / 2
    for place, char in enumerate(text):
        ink = torch.from_numpy(_glyph(char, 20))
        gy, gx = y0 + (height - ink.shape[0]) // 2, int(left + cell * place + (cell - ink.shape[1]) / 2)
        spot = image_3HW[:, gy : gy + ink.shape[0], gx : gx + ink.shape[1]]
        spot[:] = spot * (1 - ink) + 0.1 * ink
