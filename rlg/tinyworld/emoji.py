"""The emoji world: 64x64 captioned scenes of small drawings, with GenEval-format metadata.

A scene holds one to four drawings (`rewards.detectors.sprites`) of 25 to 30 pixels on light paper. Captions are those
of `rlg.tinyworld.emoji_captions`. The test split holds what no training caption says:

    a pair of a noun and a count            "three foxes", alone and beside other things
    a pair of nouns, or of coloured nouns   fox and owl, whatever is said of them
    a noun or a coloured noun alone         "a fox"

Every noun, every colour of a noun and every count is seen in training. `composition_prompts`, `training_prompts` and
`draw` are called as those of the shapes are (`rlg.tinyworld.scenes`).
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rewards.detectors.sprites import COLORED, DRAWINGS, NOUNS, SIZES, drawings
from rlg.prompts import Prompt
from rlg.tinyworld.emoji_captions import Caption, Thing, captions
from rlg.tinyworld.scenes import COUNTS, SIZE, cells_of, check_split, rank

Placed = tuple[int, int, int, int]  # index into DRAWINGS, left, top, size


@dataclass(frozen=True)
class Group:
    """Captions of one tag and one number of things."""

    tag: str
    things: int  # of a caption: a noun with its count and its colour
    test: int  # prompts of the test split
    weight: float  # share in pretraining


GROUPS = (
    Group("single_object", 1, test=12, weight=0.06),
    Group("two_object", 2, test=48, weight=0.16),
    Group("counting", 1, test=24, weight=0.14),
    Group("counting", 2, test=24, weight=0.14),
    Group("colors", 1, test=5, weight=0.06),
    Group("position", 2, test=48, weight=0.28),
    Group("color_attr", 2, test=24, weight=0.16),
)
TRAIN_PROMPTS = 1000  # of a group in the train split's list, at most; pretraining draws from all
_PAIRS_HELD_OUT = 0.1  # of the pairs of nouns, and of those of coloured nouns
_COUNTS_HELD_OUT = 36  # of the 144 pairs of a noun and a count; of a noun one at most


@dataclass(frozen=True)
class HeldOut:
    """Things that no training caption says."""

    alone: frozenset[Thing]
    counts: frozenset[tuple[str, int]]
    pairs: frozenset[frozenset[tuple[str, str]]]  # of (noun, colour or "")

    def holds(self, caption: Caption) -> bool:
        """Tell whether a caption says one of these."""
        things = caption.things
        if any((thing.noun, thing.count) in self.counts for thing in things):
            return True
        if len(things) == 1:
            return things[0] in self.alone
        plain, painted = ({(t.noun, ""), (t.noun, t.color)} for t in things)
        return any(frozenset(pair) in self.pairs for pair in itertools.product(plain, painted))


def _first(rows: Iterable[Any], count: int) -> list[Any]:
    """`count` rows that a hash of their text chooses."""
    return sorted(rows, key=lambda row: rank(str(row)))[:count]


@cache
def held_out() -> HeldOut:
    """Choose the things of the test split, by a fixed hash."""
    painted = [drawing for drawing in DRAWINGS if drawing[1]]
    size = {group.tag: group.test for group in GROUPS if group.things == 1}
    alone = [Thing(noun) for noun in _first(NOUNS, size["single_object"])]
    alone += [Thing(noun, color=color) for noun, color in _first(painted, size["colors"])]
    counts: dict[str, int] = {}
    for noun, count in _first(itertools.product(NOUNS, COUNTS), len(NOUNS) * len(COUNTS)):
        if len(counts) < _COUNTS_HELD_OUT:
            counts.setdefault(noun, count)
    pairs = [*_pairs([(noun, "") for noun in NOUNS]), *_pairs(painted)]
    return HeldOut(frozenset(alone), frozenset(counts.items()), frozenset(map(frozenset, pairs)))


def _pairs(things: Sequence[tuple[str, str]]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    pairs = [(a, b) for a, b in itertools.combinations(things, 2) if a[0] != b[0]]
    return _first(pairs, round(_PAIRS_HELD_OUT * len(pairs)))


@cache
def _rows(group: Group, split: str) -> tuple[Caption, ...]:
    """Captions of a group and a split, in a fixed order."""
    rows = [row for row in captions(group.tag) if len(row.things) == group.things]
    chosen = [row for row in rows if held_out().holds(row) == (split == "test")]
    return tuple(sorted(chosen, key=lambda row: rank(row.text)))


@cache
def composition_prompts(split: str) -> tuple[Prompt, ...]:
    """Composition prompts of a split ("train" or "test"), in a fixed order.

    Every tag is in both splits. Of each group the first ones are taken: `Group.test` for the test split,
    `TRAIN_PROMPTS` for the other.
    """
    check_split(split)
    sizes = [group.test if split == "test" else TRAIN_PROMPTS for group in GROUPS]
    return tuple(row.prompt() for group, n in zip(GROUPS, sizes, strict=True) for row in _rows(group, split)[:n])


def training_prompts(count: int, generator: torch.Generator) -> list[Prompt]:
    """Draw `count` prompts for pretraining, without the held-out ones.

    Groups that take longer to learn are drawn more often.
    """
    weights = torch.tensor([group.weight for group in GROUPS])
    chosen = torch.multinomial(weights, count, replacement=True, generator=generator).tolist()
    picks = torch.rand(count, generator=generator, dtype=torch.float64).tolist()
    rows = [_rows(group, "train") for group in GROUPS]
    return [rows[group][int(u * len(rows[group]))].prompt() for group, u in zip(chosen, picks, strict=True)]


def draw(prompts: Sequence[Prompt], generator: torch.Generator, soft: bool = False) -> Tensor:
    """Ground-truth images for prompts: float (B, 3, 64, 64) in [0, 1].

    What a caption leaves open (colours, places, sizes, the paper) is drawn from `generator`. soft: the paper goes from
    one pale colour to another, instead of being nearly white.
    """
    papers_B3HW = papers(len(prompts), generator, soft)
    return drawn(papers_B3HW, [layout(prompt.metadata, generator) for prompt in prompts])


def drawn(papers_B3HW: Tensor, layouts: Sequence[Sequence[Placed]]) -> Tensor:
    """Draw layouts onto papers, in place; the same tensor, within [0, 1]."""
    for image_3HW, placed in zip(papers_B3HW, layouts, strict=True):
        for index, x, y, size in placed:
            drawing = drawings(size)[index]
            spot = image_3HW[:, y : y + size, x : x + size]
            spot[:] = spot * (1 - drawing[3]) + drawing[:3]
    return papers_B3HW.clamp_(0, 1)


def papers(count: int, generator: torch.Generator, soft: bool) -> Tensor:
    """Empty scenes (B, 3, 64, 64): nearly white, or soft."""
    return _gradients(count, generator) if soft else _papers(count, generator)


def _papers(count: int, generator: torch.Generator) -> Tensor:
    tint_B311 = 0.94 + 0.06 * torch.rand(count, 3, 1, 1, generator=generator)
    return tint_B311.expand(-1, 3, SIZE, SIZE).clone()


def _gradients(count: int, generator: torch.Generator) -> Tensor:
    """From one pale colour to another, in any direction: (B, 3, 64, 64)."""
    start, end = (_pale(count, generator) for _ in range(2))
    angle_B11 = 2 * torch.pi * torch.rand(count, 1, 1, generator=generator)
    axis = torch.linspace(-0.5, 0.5, SIZE) / 2**0.5
    share_BHW = 0.5 + axis * angle_B11.cos() + axis[:, None] * angle_B11.sin()
    return start + (end - start) * share_BHW[:, None]


def _pale(count: int, generator: torch.Generator) -> Tensor:
    """Colours (B, 3, 1, 1) near white, the brightest channel 1."""
    depth_B311 = 0.25 * torch.rand(count, 3, 1, 1, generator=generator)
    return 1 - depth_B311 + depth_B311.amin(dim=1, keepdim=True)


def layout(metadata: dict[str, Any], generator: torch.Generator) -> list[Placed]:
    """Place every drawing that the metadata asks for, in pixels."""
    indices = [i for clause in metadata["include"] for i in [_drawing(clause, generator)] * clause["count"]]
    low, high = SIZES
    sizes = torch.randint(low, high + 1, (len(indices),), generator=generator).tolist()
    u_N2 = torch.rand(len(indices), 2, generator=generator).tolist()
    if len(indices) == 1:
        return [(indices[0], *(int(u * (SIZE - sizes[0] + 1)) for u in u_N2[0]), sizes[0])]
    placed = []
    for index, cell, size, (ux, uy) in zip(indices, cells_of(metadata, generator), sizes, u_N2, strict=False):
        room = SIZE // 2 - size + 1
        placed.append((index, SIZE // 2 * (cell % 2) + int(ux * room), SIZE // 2 * (cell // 2) + int(uy * room), size))
    return placed


def _drawing(clause: dict[str, Any], generator: torch.Generator) -> int:
    """Index into DRAWINGS; a colour that the clause leaves open is drawn."""
    colors: Collection[str] = COLORED.get(clause["class"], ("",))
    open_color = list(colors)[int(torch.randint(len(colors), (1,), generator=generator))]
    return DRAWINGS.index((clause["class"], clause.get("color", open_color)))
