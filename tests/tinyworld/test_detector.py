"""The tinyworld's detector against what was drawn, and GenEval's rules against cases worked out by hand."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import RewardError, build
from rewards.composition import parse, relations, score
from rewards.detectors.blobs import PALETTE, SHAPES, SIGN, detect, shape_mask
from rewards.detectors.detection import Detection
from rlg.prompts import Prompt
from rlg.tinyworld import scenes

pytestmark = pytest.mark.xdist_group("detector")  # one world for all
COPIES = 5  # scenes per caption of the test split, different in all that the caption leaves open


@pytest.fixture(scope="module")
def world() -> tuple[list[Prompt], Tensor, list[list[Detection]]]:
    """Prompts, their images, and what was truly drawn in each (recorded while drawing)."""
    generator = torch.Generator().manual_seed(0)
    prompts = list(scenes.composition_prompts("test")) * COPIES
    prompts += list(scenes.composition_prompts("train"))
    prompts += scenes.sign_prompts("test", 80, generator)
    truth: list[list[Detection]] = []
    with pytest.MonkeyPatch.context() as patch:
        layout, draw_sign = scenes._layout, scenes._draw_sign

        def record_layout(metadata: dict, generator: torch.Generator) -> list:
            things = layout(metadata, generator)
            truth.append([_true_object(*thing) for thing in things])
            return things

        def record_sign(*args: Any) -> None:
            draw_sign(*args)
            truth.append([Detection(SIGN, "", (0.0, 0.0, 1.0, 1.0), 1.0)])

        patch.setattr(scenes, "_layout", record_layout)
        patch.setattr(scenes, "_draw_sign", record_sign)
        images = scenes.draw(prompts, generator)
    return prompts, images, truth


def _true_object(name: str, color: str, place: tuple[float, float, float]) -> Detection:
    x, y, radius = place
    half = 0.9 * radius if name == "square" else radius
    return Detection(name, color, (x - half, y - half, x + half, y + half), 1.0)


def _strict(prompts: Sequence[Prompt], images: Tensor) -> Tensor:
    metadata = [p.metadata for p in prompts]
    return build(["composition_strict"])(images, [p.text for p in prompts], metadata).total_B


def _failures(prompts: Sequence[Prompt], strict_B: Tensor) -> list[str]:
    return [p.text for p, s in zip(prompts, strict_B.tolist(), strict=True) if not s][:10]


def test_ground_truth_scores_one(world) -> None:
    prompts, images, _ = world
    assert len(prompts) >= 600
    strict_B = _strict(prompts, images)
    assert strict_B.mean() >= 0.99, _failures(prompts, strict_B)
    partial_B = build(["composition"])(images, [p.text for p in prompts], [p.metadata for p in prompts]).total_B
    assert partial_B.mean() >= 0.995


def test_detections_are_what_was_drawn(world) -> None:
    _, images, truth = world
    wrong = 0
    for image, objects in zip(images, truth, strict=True):
        found = detect(image)
        if objects[0].name == SIGN:
            wrong += [d.name for d in found] != [SIGN]
            continue
        here = [any(_is_same(thing, other) for other in found) for thing in objects]
        wrong += not (all(here) and len(found) == len(objects))
    assert wrong <= 0.01 * len(truth)


def _is_same(a: Detection, b: Detection) -> bool:
    gap = max(abs(p - q) for p, q in zip(a.box, b.box, strict=True))
    return (a.name, a.color) == (b.name, b.color) and gap <= 1.5  # pixels


def test_wrong_images_score_what_chance_gives(world) -> None:
    prompts, images, truth = world
    rows = range(0, len(prompts), 3)  # every third scene, all pairs
    detected = [detect(images[i]) for i in rows]
    drawn = [truth[i] for i in rows]
    seen = np.array([[score(prompts[i].metadata, objects).strict for objects in detected] for i in rows])
    chance = np.array([[_holds(prompts[i].metadata, objects) for objects in drawn] for i in rows])
    other = ~np.eye(len(seen), dtype=bool)
    assert 0.02 < chance[other].mean() < 0.15  # most captions do not fit another scene, some do
    assert abs(seen[other].mean() - chance[other].mean()) < 0.002
    assert (seen != chance)[other].mean() < 0.002  # of pairs: not only as many, but the same ones
    fits = chance & other
    assert (seen & fits).sum() > 0.99 * fits.sum()


def _holds(metadata: dict[str, Any], objects: Sequence[Detection]) -> bool:
    """Whether a caption is true of a drawn scene, by a rule that knows the tinyworld and not GenEval's code.

    Objects of one class share a colour, and two classes come one of each, so order and confidence play no part.
    """
    for clause in metadata["include"]:
        mine = [thing for thing in objects if thing.name == clause["class"]]
        if len(mine) < clause["count"] or any(thing.color != clause.get("color", thing.color) for thing in mine):
            return False
        if "position" in clause:
            relation, index = clause["position"]
            target = next(t for t in objects if t.name == metadata["include"][index]["class"])
            (ax, ay), (bx, by) = _centre(mine[0]), _centre(target)
            along, across = (ax - bx, ay - by) if relation in ("left of", "right of") else (ay - by, ax - bx)
            along = along if relation in ("right of", "below") else -along
            extent = mine[0].box[2] - mine[0].box[0] + target.box[2] - target.box[0]  # boxes here are square
            if along - 0.1 * extent <= 0.5 * (along**2 + across**2) ** 0.5:
                return False
    excluded = metadata.get("exclude", [])
    return not any(sum(t.name == e["class"] for t in objects) >= e["count"] for e in excluded)


def _centre(thing: Detection) -> tuple[float, float]:
    return (thing.box[0] + thing.box[2]) / 2, (thing.box[1] + thing.box[3]) / 2


def test_pixel_noise_does_not_matter(world) -> None:
    prompts, images, _ = world
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    strict_B = _strict(prompts, (images + 0.05 * noise).clamp(0, 1))
    assert strict_B.mean() >= 0.95, _failures(prompts, strict_B)


def test_jpeg_artefacts_do_not_matter(world) -> None:
    prompts, images, _ = world
    strict_B = _strict(prompts, torch.stack([_through_jpeg(image, quality=50) for image in images]))
    assert strict_B.mean() >= 0.95, _failures(prompts, strict_B)


def _through_jpeg(image_3HW: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray((image_3HW * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1) / 255


@pytest.mark.parametrize(
    "images",
    [
        torch.ones(2, 3, 64, 64),
        torch.zeros(2, 3, 64, 64),
        torch.full((2, 3, 64, 64), 0.5),
        torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        torch.zeros(2, 3, 0, 0),
        torch.ones(2, 3, 1, 1),
    ],
    ids=["white", "black", "grey", "noise", "empty", "one pixel"],
)
def test_images_of_nothing_score_zero(images: Tensor) -> None:
    prompts = [scenes.composition_prompts("test")[0], scenes.sign_prompt("A7")]
    mix = build(["composition", "composition_strict"])
    scores = mix(images, [p.text for p in prompts], [p.metadata for p in prompts])
    assert scores.total_B.tolist() == [0, 0]
    assert [detect(image) for image in images] == [[], []]


def test_pixels_that_are_not_numbers_are_nothing() -> None:
    assert detect(torch.full((3, 64, 64), torch.nan)) == []


def test_detections_have_box_colour_and_confidence() -> None:
    image = torch.ones(3, 64, 64)
    image[:, 10:30, 40:60] = torch.tensor(PALETTE["blue"])[:, None, None]
    image[:, 5:7, 5:7] = torch.tensor(PALETTE["red"])[:, None, None]  # a speck
    assert detect(image) == [Detection("square", "blue", (40.0, 10.0, 60.0, 30.0), 1.0)]


def test_detections_come_largest_first_and_one_blob_at_a_time() -> None:
    image = torch.ones(3, 64, 64)
    red = torch.tensor(PALETTE["red"])[:, None, None]
    image[:, 10:17, 10:17] = red  # a square in the corner of the circle's box, and before it in reading order
    circle = torch.from_numpy(shape_mask("circle", 50, 50))
    image[:, 10:60, 10:60] = torch.where(circle, red, image[:, 10:60, 10:60])
    expected = [("circle", (10.0, 10.0, 60.0, 60.0), 1.0), ("square", (10.0, 10.0, 17.0, 17.0), 1.0)]
    assert [(d.name, d.box, d.score) for d in detect(image)] == expected


def test_the_reward_is_the_partial_credit_and_the_strict_one_the_verdict() -> None:
    image = torch.ones(1, 3, 64, 64)
    image[:, :, 10:30, 10:30] = torch.tensor(PALETTE["blue"])[:, None, None]
    metadata = [{"tag": "colors", "include": [_include("square", color="red")]}]
    parts = build(["composition", "composition_strict"])(image, ["a red square"], metadata).parts
    assert (parts["composition"].item(), parts["composition_strict"].item()) == (0.5, 0)


def test_blobs_like_no_shape_are_not_objects() -> None:
    image = torch.ones(3, 64, 64)
    red = torch.tensor(PALETTE["red"])[:, None, None]
    image[:, 10:40, 10:14] = image[:, 36:40, 10:40] = red  # a thin L
    image[:, 50:60, 4:60] = torch.tensor(PALETTE["blue"])[:, None, None]  # a bar: wide, and no sign's ring
    assert detect(image) == []


# --- GenEval's rules by hand: boxes are (x0, y0, x1, y1), y downwards ------------------------------------------------


def _thing(name: str, color: str = "red", x: float = 32, y: float = 32, size: float = 20, s: float = 0.9) -> Detection:
    return Detection(name, color, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), s)


def _include(name: str, count: int = 1, **extra: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **extra}


ONE = {"tag": "single_object", "include": [_include("circle")]}
TWO = {"tag": "two_object", "include": [_include("circle"), _include("square")]}
COLORS = {"tag": "colors", "include": [_include("circle", color="red")]}
ATTR = {"tag": "color_attr", "include": [_include("circle", color="red"), _include("square", color="blue")]}
THREE = {"tag": "counting", "include": [_include("circle", 3)], "exclude": [_include("circle", 4)]}
THREE_RED = {"tag": "counting", "include": [_include("circle", 3, color="red")], "exclude": [_include("circle", 4)]}
ABOVE = {"tag": "position", "include": [_include("square"), _include("circle", position=["above", 0])]}
SIGNED = {"tag": "text", "include": [_include("sign")], "exclude": [], "text": "A7"}
WITHOUT = {"tag": "two_object", "include": [_include("circle")], "exclude": [_include("cross", 1)]}
NEAR_BLUE = {  # relation to a clause that has a requirement of its own
    "tag": "position",
    "include": [_include("square", color="blue"), _include("circle", position=["right of", 0])],
}
LEFT_OF_PAIR = {"tag": "position", "include": [_include("square", 2), _include("circle", position=["left of", 0])]}
PAIR_LEFT = {"tag": "position", "include": [_include("square"), _include("circle", 2, position=["left of", 0])]}

red, blue = _thing("circle"), _thing("circle", "blue")
square = _thing("square", "blue", 32, 32)

CASES = {
    "one": (ONE, [red], True, 1),
    "one: nothing there": (ONE, [], False, 0),
    "one: another class": (ONE, [square], False, 0),
    "one: others do not matter": (ONE, [red, square, _thing("cross")], True, 1),
    "one: two of them pass GenEval, but not for full credit": (ONE, [red, blue], True, 0),
    "two": (TWO, [red, square], True, 1),
    "two: one missing": (TWO, [red], False, 1 / 2),
    "two: the wrong one twice": (TWO, [red, blue], False, 0),
    "colours": (COLORS, [red], True, 1),
    "colours: the wrong one": (COLORS, [blue], False, 1 / 2),
    "colours: nothing there": (COLORS, [square], False, 0),
    "colours: only the most confident counts": (COLORS, [_thing("circle", s=0.8), blue], False, 0),
    "colours: and the order given does not": (COLORS, [_thing("circle", "blue", s=0.8), red], True, 1 / 2),
    "attributes": (ATTR, [red, square], True, 1),
    "attributes: swapped": (ATTR, [blue, _thing("square", "red")], False, 1 / 2),
    "attributes: one wrong": (ATTR, [blue, square], False, 3 / 4),
    "attributes: one missing": (ATTR, [red], False, 1 / 2),
    "count": (THREE, [red, blue, red], True, 1),
    "count: one too few": (THREE, [red, blue], False, 2 / 3),
    "count: one too many": (THREE, [red] * 4, False, 2 / 3),
    "count: twice as many": (THREE, [red] * 6, False, 0),
    "count: far too many is not below zero": (THREE, [red] * 9, False, 0),
    "count: others do not matter": (THREE, [red, red, red, square], True, 1),
    "count: none": (THREE, [square], False, 0),
    "count in a colour": (THREE_RED, [red] * 3, True, 1),
    "count in a colour: one of another": (THREE_RED, [red, red, blue], False, (1 + 2 / 3) / 2),
    "count in a colour: one missing": (THREE_RED, [red, red], False, 2 / 3),
    "count in a colour: one too many": (THREE_RED, [red] * 4, False, (2 / 3 + 1) / 2),
    "count in a colour: none": (THREE_RED, [square], False, 0),
    "position": (ABOVE, [square, _thing("circle", y=8)], True, 1),
    "position: the other way round": (ABOVE, [square, _thing("circle", y=56)], False, 2 / 3),
    "position: beside": (ABOVE, [square, _thing("circle", x=8)], False, 2 / 3),
    "position: on top of each other": (ABOVE, [square, red], False, 2 / 3),
    "position: nothing to be above of": (ABOVE, [_thing("circle", y=8)], False, 1 / 3),
    "position: only the target": (ABOVE, [square], False, 1 / 3),
    "position: nothing": (ABOVE, [_thing("cross")], False, 0),
    "position: target of another colour": (NEAR_BLUE, [_thing("square"), _thing("circle", x=60)], False, 3 / 4),
    "position: target in its colour": (NEAR_BLUE, [square, _thing("circle", x=60)], True, 1),
    "position: both": (PAIR_LEFT, [square, _thing("circle", x=8), _thing("circle", x=4)], True, 1),
    "position: one of two": (PAIR_LEFT, [square, _thing("circle", x=8), _thing("circle", x=60)], False, 5 / 6),
    "position: left of both": (LEFT_OF_PAIR, [square, _thing("square", x=40), _thing("circle", x=4)], True, 1),
    "position: between two": (LEFT_OF_PAIR, [square, _thing("square", x=4), _thing("circle", x=18)], False, 2 / 3),
    "exclude: absent": (WITHOUT, [red], True, 1),
    "exclude: there": (WITHOUT, [red, _thing("cross")], False, 1 / 2),
    "exclude: no credit for absence alone": (WITHOUT, [square], False, 0),
    "exclude: only the intruder": (WITHOUT, [_thing("cross")], False, 0),
    "sign": (SIGNED, [_thing("sign")], True, 1),
    "sign: a shape instead": (SIGNED, [red], False, 0),
}


@pytest.mark.parametrize(("metadata", "detections", "strict", "partial"), CASES.values(), ids=CASES.keys())
def test_scores_by_hand(metadata: dict, detections: list[Detection], strict: bool, partial: float) -> None:
    result = score(metadata, detections)
    assert result.strict is strict
    assert result.partial == pytest.approx(partial)


@pytest.mark.parametrize(
    ("x", "y", "size", "expected"),
    [
        (-30, 0, 20, {"left of"}),
        (30, 0, 20, {"right of"}),
        (0, -30, 20, {"above"}),
        (0, 30, 20, {"below"}),
        (0, 0, 20, set()),  # the same place
        (3.9, 0, 20, set()),  # within the threshold: 0.1 * (20 + 20) = 4
        (7.9, 0, 20, set()),  # (7.9 - 4) / 7.9 = 0.494
        (8.1, 0, 20, {"right of"}),  # (8.1 - 4) / 8.1 = 0.506
        (-8.1, 0, 20, {"left of"}),
        (30, 30, 20, {"right of", "below"}),  # (30 - 4) / 42.4 = 0.61 on both axes
        (-30, 30, 20, {"left of", "below"}),
        (13, 13, 20, set()),  # (13 - 4) / 18.4 = 0.49: a tie that is near holds on neither
        (30, -12, 20, {"right of"}),  # (12 - 4) / 32.3 = 0.25
    ],
)
def test_relations_by_hand(x: float, y: float, size: float, expected: set[str]) -> None:
    assert relations(_thing("circle", x=x, y=y, size=size).box, _thing("square", x=0, y=0, size=size).box) == expected


def test_relations_weigh_each_axis_by_its_own_extent() -> None:
    wide, tall = (-40.0, -5.0, 40.0, 5.0), (-5.0, -40.0, 5.0, 40.0)
    assert relations((10.0, -1.0, 12.0, 1.0), wide) == frozenset()  # 11 - 0.1 * 82 = 2.8, over 11
    assert relations((10.0, -1.0, 12.0, 1.0), tall) == {"right of"}  # 11 - 0.1 * 12 = 9.8, over 11


def test_full_credit_implies_the_verdict() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(choices: Sequence[Any]) -> Any:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    prompts = [p for p in scenes.composition_prompts("train")]
    verdicts = 0
    for _ in range(20000):
        things = [_thing(draw(SHAPES[:3]), draw(("red", "blue")), draw((10, 50)), draw((10, 50))) for _ in range(2)]
        result = score(draw(prompts).metadata, things)
        assert 0 <= result.partial <= 1
        assert result.strict or result.partial < 1
        verdicts += result.strict
    assert verdicts > 200


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "has no 'include': composition needs a prompt set with GenEval metadata"),
        ({"include": []}, "has no 'include'"),
        (None, "has no 'include'"),
        ({"include": "circle"}, "must be a list of clauses"),
        ({"include": ["circle"]}, "clause 0 of the metadata's 'include' must be"),
        ({"include": [{"count": 1}]}, "clause 0 .* must be"),
        ({"include": [{"class": "circle"}]}, "whole count of at least 1, got None"),
        ({"include": [_include("circle", 0)]}, "whole count of at least 1, got 0"),
        ({"include": [_include("circle", 1.5)]}, "whole count of at least 1, got 1.5"),
        ({"include": [_include("circle", color=3)]}, "name of a colour, got 3"),
        ({"include": [_include("circle"), _include("cross", position=["near", 0])]}, "relation, clause.*near"),
        ({"include": [_include("circle"), _include("cross", position="above")]}, "relation, clause.*above"),
        ({"include": [_include("circle"), _include("cross", position=["above", 1])]}, "clause 1 .* not an earlier"),
        ({"include": [_include("circle", position=["above", -1])]}, "against clause -1, which is not an earlier one"),
        ({"include": [_include("circle")], "exclude": [{"class": "cross"}]}, "'exclude' needs a whole count"),
    ],
)
def test_invalid_metadata_is_refused(metadata: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(metadata)
    with pytest.raises(RewardError, match=f"'composition' failed on image 1 .*prompt 'b'.*{message}"):
        build(["composition"])(torch.ones(2, 3, 8, 8), ["a", "b"], [ONE, metadata])


@pytest.mark.parametrize("clause", [_include("dog"), _include("circle", color="purple")])
def test_objects_that_the_detector_cannot_see_are_refused(clause: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match=r"detector cannot see a '(dog|purple circle)'; it knows circle"):
        build(["composition_strict"])(torch.ones(1, 3, 8, 8), ["a"], [{"tag": "colors", "include": [clause]}])
