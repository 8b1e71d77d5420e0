"""The emoji world's detector against what was drawn, and the reward that stands on it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rewards import build
from rewards.detectors import matching
from rewards.detectors.detection import Detection
from rewards.detectors.sprites import CELL, DRAWINGS, NOUNS, drawings
from rlg.prompts import Prompt, columns
from rlg.tinyworld import emoji, scenes

Placed = tuple[int, int, int, int]  # index into DRAWINGS, left, top, size


def over(image_3HW: Tensor, placed: list[Placed]) -> Tensor:
    """The image with drawings on it, in place."""
    for index, x, y, size in placed:
        color_3HW, alpha_HW = drawings(size)[index].split([3, 1])
        image_3HW[:, y : y + size, x : x + size] *= 1 - alpha_HW
        image_3HW[:, y : y + size, x : x + size] += color_3HW
    return image_3HW


def on_paper(placed: list[Placed]) -> Tensor:
    """A scene by hand."""
    return over(torch.tensor([0.97, 0.95, 0.99])[:, None, None].repeat(1, 64, 64), placed)


def is_same(found: Detection, placed: Placed) -> bool:
    """The same drawing, its box within 2.5 pixels: sizes are matched in steps of 3, and a place is a whole pixel."""
    index, x, y, size = placed
    gap = max(abs(a - b) for a, b in zip(found.box, (x, y, x + size, y + size), strict=True))
    return (found.name, found.color) == DRAWINGS[index] and gap <= 2.5


def right(found: list[Detection], placed: list[Placed]) -> bool:
    return len(found) == len(placed) and all(any(is_same(f, p) for f in found) for p in placed)


def blurred(images_B3HW: Tensor, sigma: float) -> Tensor:
    axis = torch.arange(-4, 5).float()
    line = torch.exp(-axis.square() / (2 * sigma**2))
    kernel = torch.outer(line, line) / line.sum() ** 2
    padded = functional.pad(images_B3HW, (4, 4, 4, 4), mode="replicate")
    return functional.conv2d(padded, kernel.expand(3, 1, 9, 9), groups=3)


@pytest.mark.parametrize("size", [25, 28, 30])
def test_every_drawing_is_found_with_its_color(size: int) -> None:
    for index in range(len(DRAWINGS)):
        placed = [(index, (5 * index) % (65 - size), (11 * index) % (65 - size), size)]
        assert right(matching.detect(on_paper(placed)), placed), DRAWINGS[index]


def test_four_of_a_kind_side_by_side_are_four() -> None:
    for index in range(len(DRAWINGS)):
        placed = [(index, x, y, 28) for x in (4, 32) for y in (4, 32)]  # they touch
        assert right(matching.detect(on_paper(placed)), placed), DRAWINGS[index]


@pytest.mark.parametrize("soft", [False, True])
def test_scenes_are_read_as_drawn_through_blur_and_noise(soft: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    truth: list[list[Placed]] = []
    layout = emoji.layout
    monkeypatch.setattr(emoji, "layout", lambda *args: truth.append(layout(*args)) or truth[-1])
    generator = torch.Generator().manual_seed(0)
    prompts = list(emoji.composition_prompts("test"))[::3]
    images = emoji.draw(prompts, generator, soft)
    noise = torch.randn(images.shape, generator=generator)
    clean, spoilt = images, (blurred(images, 1.0) + 0.05 * noise).clamp(0, 1)
    for pictures, share in ((clean, 1.0), (spoilt, 0.97)):
        verdicts = [right(matching.detect(image), placed) for image, placed in zip(pictures, truth, strict=True)]
        assert np.mean(verdicts) >= share


def test_the_reward_takes_the_detector_of_the_world() -> None:
    """Scenes of both worlds in one batch."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = emoji.composition_prompts("test")[::8], scenes.composition_prompts("test")[::8]
    images = torch.cat([emoji.draw(ours, generator), scenes.draw(theirs, generator)])
    mix = build(["composition", "composition_strict"])
    texts, metadata = columns([*ours, *theirs])
    parts = mix(images, texts, metadata).parts
    assert parts["composition_strict"].mean() == parts["composition"].mean() == 1
    wrong = mix(images, texts, metadata[1:] + metadata[:1]).parts
    assert wrong["composition_strict"].mean() < 0.2
    assert wrong["composition_strict"].mean() < wrong["composition"].mean() < 0.6


def test_partial_credit_by_hand() -> None:
    fox, owl = DRAWINGS.index(("fox", "")), DRAWINGS.index(("owl", ""))
    green = DRAWINGS.index(("apple", "green"))
    two_foxes = on_paper([(fox, 2, 2, 28), (fox, 34, 2, 28)])
    fox_left = on_paper([(fox, 2, 20, 28), (owl, 34, 20, 28)])
    apple = on_paper([(green, 10, 20, 28)])
    cases = [
        (two_foxes, [{"class": "fox", "count": 3}], 2 / 3),
        (two_foxes, [{"class": "fox", "count": 2}], 1),
        (fox_left, [{"class": "owl", "count": 1}, {"class": "fox", "count": 1, "position": ["left of", 0]}], 1),
        (fox_left, [{"class": "owl", "count": 1}, {"class": "fox", "count": 1, "position": ["above", 0]}], 2 / 3),
        (apple, [{"class": "apple", "count": 1, "color": "red"}], 1 / 2),
        (apple, [{"class": "ball", "count": 1, "color": "green"}], 0),
    ]
    metadata = [{"world": "emoji", "tag": "-", "include": include} for _, include, _ in cases]
    images = torch.stack([image for image, _, _ in cases])
    scores = build(["composition"])(images, [""] * len(cases), metadata).total_B
    assert scores.tolist() == pytest.approx([expected for *_, expected in cases])


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "dragon"}, r"cannot see a 'dragon'; it knows apple, pear, .* in red, "),
        ({"class": "apple", "color": "blue"}, r"cannot see a 'blue apple'; it knows apple in red, green; car in "),
        ({"class": "fox", "color": "red"}, r"cannot see a 'red fox'; it knows apple in red, green; car in "),
        ({"class": "circle"}, "cannot see a 'circle'"),
    ],
)
def test_what_the_world_lacks_is_one_line(clause: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(["composition"]).check(["a dragon"], [{"world": "emoji", "include": [{"count": 1} | clause]}])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("world", ["manga", "", None, ["emoji"]])
def test_an_unknown_world_is_one_line(world: object) -> None:
    metadata = {"world": world, "include": [{"class": "fox", "count": 1}]}
    with pytest.raises(ValueError, match=r"unknown world .* in the metadata; known: shapes, emoji$") as caught:
        build(["composition"]).check(["a fox"], [metadata])
    assert repr(world) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "images",
    [
        torch.ones(2, 3, 64, 64),
        torch.zeros(2, 3, 64, 64),
        torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
        blurred(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), 2.0),
        torch.full((2, 3, 64, 64), torch.nan),
        torch.zeros(2, 3, 0, 0),
        torch.ones(2, 3, 1, 1),
    ],
    ids=["white", "black", "noise", "clouds", "nan", "empty", "one pixel"],
)
def test_images_of_nothing_hold_nothing(images: Tensor) -> None:
    assert [matching.detect(image) for image in images] == [[], []]


def test_half_of_one_and_half_of_another_is_neither() -> None:
    """Left and right halves of two nouns: of 25 pairs 3 at most pass for one of them."""
    plain = [index for index, (_, color) in enumerate(DRAWINGS) if not color]
    passed = 0
    for a, b in zip(plain[:25], plain[5:30], strict=True):
        pieces_4HW = torch.cat([drawings(28)[a][..., :14], drawings(28)[b][..., 14:]], dim=-1)
        image = torch.ones(3, 64, 64)
        image[:, 18:46, 18:46] = image[:, 18:46, 18:46] * (1 - pieces_4HW[3]) + pieces_4HW[:3]
        passed += bool(matching.detect(image))
    assert passed <= 3


def test_larger_images_are_read_at_64_pixels() -> None:
    placed = [(DRAWINGS.index(("panda", "")), 30, 8, 28), (DRAWINGS.index(("key", "")), 2, 34, 26)]
    image = functional.interpolate(on_paper(placed)[None], (256, 256), mode="nearest")[0]
    assert right(matching.detect(image), placed)


def test_a_pixel_that_is_no_number_hides_nothing() -> None:
    placed = [(DRAWINGS.index(("panda", "")), 30, 8, 28)]
    image = on_paper(placed)
    image[:, 60, 3] = torch.nan
    assert right(matching.detect(image), placed)


def test_the_paper_is_found_below_four_drawings() -> None:
    axis = torch.linspace(-1, 1, 64)
    slope = 0.1 * torch.tensor([1.0, -1.0, 0.5])[:, None, None]
    paper = torch.tensor([0.84, 0.84, 0.9])[:, None, None] + slope * (axis + 0.5 * axis[:, None])
    index = DRAWINGS.index(("ball", "red"))
    image = over(paper.clone(), [(index, x, y, 29) for x in (2, 34) for y in (2, 34)])
    assert (matching.paper(image) - paper).abs().max() < 0.01


def test_drawings_are_few_small_and_whole() -> None:
    assert len(NOUNS) == len(set(NOUNS)) == 48
    assert len(DRAWINGS) == len(set(DRAWINGS)) == 61
    pieces = drawings(CELL)
    assert pieces.shape == (61, 4, 64, 64)
    assert (pieces[:, 3].amax(dim=(1, 2)) == 1).all()
    assert (pieces[:, :3] <= pieces[:, 3:] + 1e-6).all()  # multiplied by alpha
    distances = torch.cdist(pieces.flatten(1), pieces.flatten(1))
    assert distances.fill_diagonal_(100).min() > 5  # no two alike


def test_no_images_have_no_scores() -> None:
    assert build(["composition"])(torch.ones(0, 3, 64, 64), [], []).total_B.shape == (0,)


def test_prompts_of_no_world_are_of_the_shapes() -> None:
    shape = Prompt("a circle", {"tag": "single_object", "include": [{"class": "circle", "count": 1}]})
    build(["composition"]).check([shape.text], [shape.metadata])
    build(["composition"]).check([shape.text], [shape.metadata | {"world": "shapes"}])
