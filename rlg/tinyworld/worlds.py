"""Worlds that ship: their captions, scenes and words, through one interface."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlg.prompts import Prompt
from rlg.tinyworld import emoji, emoji_captions, scenes


@dataclass(frozen=True, kw_only=True)
class World:
    """A world of captioned scenes."""

    name: str
    words: tuple[str, ...]  # every word of a caption
    merge_from_end: bool  # whether the tokenizer makes a word from its end; then no word's merges cut another
    max_tokens: int  # of the longest caption, start and end included
    size: int  # pixels, side of a scene
    paper: float  # every pixel of the background has channels of at least this
    drawn_weight: float  # weight of a pixel that is not paper, in the autoencoder's loss
    composition_prompts: Callable[[str], Sequence[Prompt]]  # of a split, "train" or "test"
    training_prompts: Callable[[int, torch.Generator], list[Prompt]]  # so many of the train split
    draw: Callable[[Sequence[Prompt], torch.Generator], Tensor]  # scenes (B, 3, size, size) in [0, 1]
    signs: Callable[[str, int, torch.Generator], list[Prompt]] | None = None  # so many of a split, if it has any

    def weights(self, images_B3HW: Tensor) -> Tensor:
        """Weights (B, 1, H, W) of pixels in the autoencoder's loss, of mean 1."""
        drawn_B1HW = images_B3HW.amin(dim=1, keepdim=True) < self.paper
        weight_B1HW = 1 + (self.drawn_weight - 1) * drawn_B1HW.float()
        return weight_B1HW / weight_B1HW.mean()


SHAPES = World(
    name="shapes",
    words=tuple(scenes.words()),
    merge_from_end=False,
    max_tokens=12,
    size=scenes.SIZE,
    paper=0.9,
    drawn_weight=1.0,
    composition_prompts=scenes.composition_prompts,
    training_prompts=scenes.training_prompts,
    draw=scenes.draw,
    signs=scenes.sign_prompts,
)
EMOJI = World(
    name=emoji_captions.NAME,
    words=tuple(emoji_captions.words()),
    merge_from_end=True,
    max_tokens=9,
    size=scenes.SIZE,
    paper=0.94,
    drawn_weight=5.0,
    composition_prompts=emoji.composition_prompts,
    training_prompts=emoji.training_prompts,
    draw=emoji.draw,
)
_WORLDS = {world.name: world for world in (SHAPES, EMOJI)}


def world_of(name: str) -> World:
    """The world of this name. Raises ValueError for an unknown one."""
    if name not in _WORLDS:
        raise ValueError(f"unknown world {name!r}; known: {', '.join(_WORLDS)}")
    return _WORLDS[name]


def world_of_words(tokens: Collection[str]) -> World:
    """Find the first world whose words are all tokens. Raises ValueError if there is none."""
    for world in _WORLDS.values():
        if all(f"{word}</w>" in tokens for word in world.words):
            return world
    raise ValueError(f"the model's tokenizer lacks words of every world; known: {', '.join(_WORLDS)}")


def check_words(tokens: Collection[str], texts: Sequence[str]) -> None:
    """Raise ValueError for a word that the model does not know.

    tokens: of the model's CLIP tokenizer. A world of signs spells every word, and other models know far more words
    than these worlds: for both nothing is raised.
    """
    try:
        world = world_of_words(tokens)
    except ValueError:
        return
    if world.signs is not None:
        return
    for text in texts:
        unknown = [word for word in text.lower().split() if word not in world.words]
        if unknown:
            near = difflib.get_close_matches(unknown[0], world.words)
            hint = f"near it are {', '.join(near)}" if near else f"it knows {len(world.words)} words"
            raise ValueError(f"the model does not know the word {unknown[0]!r}; {hint} (docs/tinyworld.md)")
