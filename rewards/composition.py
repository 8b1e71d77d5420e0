"""Composition: GenEval's verdict on detected objects (arXiv 2310.11513).

    metadata = {tag, include: [{class, count, color?, position?: [relation, index of an earlier clause]}],
                exclude?: [{class, count}]}

strict is the verdict of GenEval's evaluate_images.py (djghosh13/geneval, 16f1681):

    count      every `include` clause finds `count` objects of its class
    colour     its `count` most confident ones have the colour
    position   they stand in the relation to each of those of the clause that `position` names
    exclude    no `exclude` clause finds `count` objects or more; extra objects are an error only there (tag counting)

partial is the mean over requirements, in the spirit of Flow-GRPO's training score (yifan123/reward-server, 7131478):

    count      1 - |count - found| / count, at least 0: too many costs as much as too few, for every tag
    colour     the share of the wanted objects that are there and have the colour
    position   the share of the wanted objects that are there and stand in the relation to all targets found
    exclude    0 for a class found that `include` does not name; no credit for its absence

So partial = 1 implies strict, partial = 0 where nothing wanted is found, and repeating an object is never worth it.
strict = 1 with partial < 1 is possible: GenEval's rule lets a second circle pass for "a circle".
Differences from Flow-GRPO's score
1. Its count term goes negative with more than twice the objects; here it stops at 0.
2. It gives colour and position nothing when the count is wrong; here each object counts, so the score is denser.
3. Its wrong position adds a 0 and then a 1 to the mean; here it adds the share alone.

`score` takes `Detection`s of any detector. The rewards `composition` and `composition_strict` use that of the world
which the metadata names: `rewards.detectors.blobs` for shapes (default), `rewards.detectors.matching` for emoji.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards import CheckedReward, Reward
from rewards.detectors.detection import Box, Detection

RELATIONS = ("left of", "right of", "above", "below")
POSITION_THRESHOLD = 0.1  # GenEval's: share of the two boxes' extents by which an offset is shrunk
_MIN_COSINE = 0.5  # GenEval's: share of the offset's length that lies in the relation's direction


@dataclass(frozen=True)
class Clause:
    """One entry of `include` or `exclude`."""

    name: str  # class of the objects
    count: int  # at least 1
    color: str | None = None
    relation: str | None = None  # one of RELATIONS, to the objects of the clause `target`
    target: int = 0


@dataclass(frozen=True)
class Requirements:
    """GenEval metadata, checked."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...]


@dataclass(frozen=True)
class CompositionScore:
    """Scores of an image against its metadata."""

    strict: bool  # GenEval's verdict
    partial: float  # in [0, 1]; 1 implies strict


def parse(metadata: Mapping[str, Any]) -> Requirements:
    """Parse GenEval metadata into clauses.

    Raises ValueError, naming the fault, for anything else.
    """
    include = metadata.get("include") if isinstance(metadata, Mapping) else None
    if not include:
        raise ValueError(
            "the metadata has no 'include': composition needs a prompt set with GenEval metadata "
            "(the tinyworld's own, or a *_metadata.jsonl), not plain text prompts"
        )
    return Requirements(_clauses("include", include), _clauses("exclude", metadata.get("exclude") or ()))


def _clauses(key: str, rows: Any) -> tuple[Clause, ...]:
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"the metadata's {key!r} must be a list of clauses, got {rows!r}")
    return tuple(_clause(key, index, row) for index, row in enumerate(rows))


def _clause(key: str, index: int, row: Any) -> Clause:
    where = f"clause {index} of the metadata's {key!r}"
    if not isinstance(row, Mapping) or not isinstance(row.get("class"), str):
        raise ValueError(f"{where} must be {{class, count, color?, position?}}, got {row!r}")
    count = row.get("count")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where} needs a whole count of at least 1, got {count!r}")
    color, position = row.get("color"), row.get("position")
    if not isinstance(color, str | None):
        raise ValueError(f"{where} needs the name of a colour, got {color!r}")
    if position is None:
        return Clause(row["class"], count, color)
    if not isinstance(position, Sequence) or len(position) != 2 or position[0] not in RELATIONS:
        raise ValueError(f"{where} needs a position [relation, clause] with {', '.join(RELATIONS)}, got {position!r}")
    relation, target = position
    if target not in range(index):
        raise ValueError(f"{where} is placed against clause {target!r}, which is not an earlier one")
    return Clause(row["class"], count, color, relation, target)


def relations(a: Box, b: Box) -> frozenset[str]:
    """The relations of box a to box b: a subset of RELATIONS.

    It is empty if they are too close to tell. The offset of the centres is shrunk, on each axis, by POSITION_THRESHOLD
    of the boxes' summed extents, and divided by its length before that; a component beyond 0.5 is a relation. On a
    diagonal two can hold, or neither.
    """
    offset = ((a[0] + a[2] - b[0] - b[2]) / 2, (a[1] + a[3] - b[1] - b[3]) / 2)
    extent = (abs(a[2] - a[0]) + abs(b[2] - b[0]), abs(a[3] - a[1]) + abs(b[3] - b[1]))
    length = math.hypot(*offset)
    if length == 0:
        return frozenset()
    dx, dy = (_shrunk(offset[axis], POSITION_THRESHOLD * extent[axis]) / length for axis in (0, 1))
    holds = (dx < -_MIN_COSINE, dx > _MIN_COSINE, dy < -_MIN_COSINE, dy > _MIN_COSINE)
    return frozenset(relation for relation, true in zip(RELATIONS, holds, strict=True) if true)


def _shrunk(value: float, by: float) -> float:
    return math.copysign(max(abs(value) - by, 0.0), value)


def score(metadata: Mapping[str, Any], detections: Sequence[Detection]) -> CompositionScore:
    """GenEval's verdict and the partial credit of one image.

    Raises ValueError for invalid metadata.
    """
    needed = parse(metadata)
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        found.setdefault(detection.name, []).append(detection)
    return CompositionScore(_verdict(needed, found), _credit(needed, found))


def _verdict(needed: Requirements, found: Mapping[str, Sequence[Detection]]) -> bool:
    wanted = [found.get(clause.name, ())[: clause.count] for clause in needed.include]
    for clause, objects in zip(needed.include, wanted, strict=True):
        if len(objects) < clause.count or not all(_coloured(clause, objects)):
            return False
        if clause.relation is not None and not all(_placed(clause, wanted, objects)):
            return False
    return not any(len(found.get(clause.name, ())) >= clause.count for clause in needed.exclude)


def _credit(needed: Requirements, found: Mapping[str, Sequence[Detection]]) -> float:
    wanted = [found.get(clause.name, ())[: clause.count] for clause in needed.include]
    credits: list[float] = []
    for clause, objects in zip(needed.include, wanted, strict=True):
        credits.append(max(0.0, 1 - abs(clause.count - len(found.get(clause.name, ()))) / clause.count))
        if clause.color is not None:
            credits.append(sum(_coloured(clause, objects)) / clause.count)
        if clause.relation is not None:
            credits.append(sum(_placed(clause, wanted, objects)) / clause.count)
    named = {clause.name for clause in needed.include}
    intruders = [c for c in needed.exclude if c.name not in named and len(found.get(c.name, ())) >= c.count]
    return sum(credits) / (len(credits) + len(intruders))


def _coloured(clause: Clause, objects: Sequence[Detection]) -> list[bool]:
    return [clause.color is None or thing.color == clause.color for thing in objects]


def _placed(clause: Clause, wanted: Sequence[Sequence[Detection]], objects: Sequence[Detection]) -> list[bool]:
    targets = wanted[clause.target]
    return [bool(targets) and all(clause.relation in relations(o.box, t.box) for t in targets) for o in objects]


@dataclass(frozen=True)
class World:
    """A small world whose objects a detector finds."""

    detect: Callable[[Tensor], list[Detection]]  # finds objects in one image (3, H, W) in [0, 1]
    require: Callable[[Requirements], None]  # raises ValueError for objects that the world lacks


def worlds() -> dict[str, World]:
    """The worlds that metadata may name."""
    from rewards.detectors import blobs, matching, sprites

    def shapes(needed: Requirements) -> None:
        check_vocabulary(needed, (*blobs.SHAPES, blobs.SIGN), blobs.PALETTE)

    def drawings(needed: Requirements) -> None:
        check_vocabulary(needed, sprites.NOUNS, sprites.COLORS)
        check_colors(needed, sprites.COLORED)

    return {"shapes": World(blobs.detect, shapes), sprites.WORLD: World(matching.detect, drawings)}


def partial(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `composition`, the partial credit; always on the CPU."""
    return _tinyworld_reward(lambda result: result.partial)


def strict(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `composition_strict`, 0 or 1; always on the CPU."""
    return _tinyworld_reward(lambda result: float(result.strict))


def _tinyworld_reward(pick: Callable[[CompositionScore], float]) -> Reward:
    known = worlds()

    def world(row: Mapping[str, Any]) -> World:
        name = row.get("world", "shapes")
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"unknown world {name!r} in the metadata; known: {', '.join(known)}")
        return known[name]

    def require(prompt: str, row: dict[str, Any]) -> None:
        needed = parse(row)
        world(row).require(needed)

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        for prompt, row in zip(prompts, metadata, strict=True):
            require(prompt, row)
        results = [score(row, world(row).detect(image)) for image, row in zip(images_B3HW, metadata, strict=True)]
        return torch.tensor([pick(result) for result in results], dtype=torch.float32)

    return CheckedReward(reward, require)


def check_vocabulary(needed: Requirements, names: Collection[str], colors: Collection[str]) -> None:
    """Raise ValueError for an object that a detector cannot see.

    Such a prompt would score 0 for ever.
    """
    for clause in (*needed.include, *needed.exclude):
        if clause.name not in names or (clause.color is not None and clause.color not in colors):
            thing = clause.name if clause.color is None else f"{clause.color} {clause.name}"
            known = f"{', '.join(names)} in {', '.join(colors)}"
            raise ValueError(f"the reward's detector cannot see a {thing!r}; it knows {known}")


def check_colors(needed: Requirements, colored: Mapping[str, Collection[str]]) -> None:
    """Raise ValueError for a class in a colour that it lacks."""
    for clause in (*needed.include, *needed.exclude):
        if clause.color is not None and clause.color not in colored.get(clause.name, ()):
            known = "; ".join(f"{name} in {', '.join(colors)}" for name, colors in colored.items())
            raise ValueError(f"the reward's detector cannot see a '{clause.color} {clause.name}'; it knows {known}")
