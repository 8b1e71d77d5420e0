"""Captions of the emoji world, as people write them, with GenEval metadata.

    single_object   a fox                          colors       a red apple
    two_object      a fox and an owl               color_attr   a red apple and a blue book
    counting        three red apples               counting     two pandas and a guitar
    position        a fox left of an owl

The metadata names its world, so that the reward `composition` takes the detector of it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from rewards.detectors.sprites import COLORED, DRAWINGS, NOUNS
from rewards.detectors.sprites import WORLD as NAME
from rlg.prompts import Prompt
from rlg.tinyworld.scenes import COMPOSITION_TAGS, COUNTS, RELATIONS

IRREGULAR = {"mouse": "mice", "fish": "fish", "cactus": "cacti", "leaf": "leaves"}
_SPOKEN_CONSONANT = ("unicorn",)  # begins with a vowel's letter and a consonant's sound


@dataclass(frozen=True)
class Thing:
    """Objects of one noun, and of one colour if any is said."""

    noun: str
    count: int = 1
    color: str = ""

    @property
    def text(self) -> str:
        """Their phrase: "a fox", "three red apples"."""
        name = self.noun if self.count == 1 else plural(self.noun)
        phrase = f"{self.color} {name}".strip()
        return f"{article(phrase) if self.count == 1 else COUNTS[self.count]} {phrase}"

    def clause(self, **extra: Any) -> dict[str, Any]:
        """Their entry of GenEval's `include`."""
        return {"class": self.noun, "count": self.count} | ({"color": self.color} if self.color else {}) | extra

    def too_many(self) -> dict[str, Any]:
        """Their entry of GenEval's `exclude`."""
        return {"class": self.noun, "count": self.count + 1}


@dataclass(frozen=True)
class Caption:
    """A caption's parts."""

    tag: str
    things: tuple[Thing, ...]  # one or two
    relation: str = "and"  # of the first thing to the second

    def prompt(self) -> Prompt:
        """Its text and its metadata."""
        return Prompt(self.text, self._metadata())

    @property
    def text(self) -> str:
        """Its words."""
        return f" {self.relation} ".join(thing.text for thing in self.things)

    def _metadata(self) -> dict[str, Any]:
        include = [thing.clause() for thing in self.things]
        if self.relation in RELATIONS:
            first, second = self.things
            include = [second.clause(), first.clause(position=[self.relation, 0])]
        exclude = [thing.too_many() for thing in self.things] if self.tag == "counting" else []
        return {"world": NAME, "tag": self.tag, "include": include} | ({"exclude": exclude} if exclude else {})


def plural(name: str) -> str:
    """Plural of a noun."""
    if name in IRREGULAR:
        return IRREGULAR[name]
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + ("es" if name.endswith(("s", "x", "sh", "ch")) else "s")


def article(phrase: str) -> str:
    """The indefinite article before a phrase: "a" or "an"."""
    return "an" if phrase[0] in "aeiou" and not phrase.startswith(_SPOKEN_CONSONANT) else "a"


def words() -> list[str]:
    """Every word that a caption can hold, without repetition."""
    relations = [word for relation in RELATIONS for word in relation.split()]
    nouns = [word for noun in NOUNS for word in (noun, plural(noun))]
    colors = [color for colors in COLORED.values() for color in colors]
    return list(dict.fromkeys(["a", "an", "and", *COUNTS.values(), *relations, *nouns, *colors]))


def captions(tag: str) -> list[Caption]:
    """All captions of a tag. Raises ValueError for an unknown one."""
    if tag not in COMPOSITION_TAGS:
        raise ValueError(f"unknown tag {tag!r}; known: {', '.join(COMPOSITION_TAGS)}")
    pairs = list(itertools.permutations(NOUNS, 2))
    painted = [Thing(noun, color=color) for noun, color in DRAWINGS if color]
    if tag == "single_object":
        return [Caption(tag, (Thing(noun),)) for noun in NOUNS]
    if tag == "colors":
        return [Caption(tag, (thing,)) for thing in painted]
    if tag == "two_object":
        return [Caption(tag, (Thing(a), Thing(b))) for a, b in pairs]
    if tag == "position":
        return [Caption(tag, (Thing(a), Thing(b)), relation) for a, b in pairs for relation in RELATIONS]
    if tag == "color_attr":
        return [Caption(tag, two) for two in itertools.permutations(painted, 2) if two[0].noun != two[1].noun]
    return _counting(pairs)


def _counting(pairs: list[tuple[str, str]]) -> list[Caption]:
    """Counting captions of one thing and of two.

    One thing has a colour or none; of two things at least one is several.
    """
    colors = {noun: ("", *COLORED.get(noun, ())) for noun in NOUNS}
    alone = [(Thing(noun, n, color),) for n in COUNTS for noun in NOUNS for color in colors[noun]]
    counts = [(n, m) for n, m in itertools.product(range(1, 4), repeat=2) if 2 < n + m <= max(COUNTS)]
    both = [(Thing(a, n), Thing(b, m)) for a, b in pairs for n, m in counts]
    return [Caption("counting", things) for things in (*alone, *both)]
