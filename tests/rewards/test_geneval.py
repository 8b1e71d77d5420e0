"""GenEval on photos: what counts as detected, colours by CLIP, and the whole on tiny random checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from rewards import REWARDS, RewardError, build, geneval, preprocessing
from rewards.clip import Clip
from rewards.detectors import mask2former
from rewards.detectors.mask2former import Instance, Mask2Former, bounds, instances
from rewards.geneval import CLASSES, COLORS, Colors, crop, judge
from rewards.weights import Origin
from tests.conftest import check_contract
from tests.support import published

NAMES = ("geneval", "geneval_strict")
SIDE = 32
RGB = {"red": (1.0, 0.0, 0.0), "blue": (0.0, 0.0, 1.0), "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source with both models."""
    root = tmp_path_factory.mktemp("geneval")
    published.write_mask2former(root / "detector")
    published.write_clip(root / "clip")
    return root


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The network sees images of about 64 pixels, not 800."""
    monkeypatch.setattr(mask2former, "SHORTER", 64)
    monkeypatch.setattr(mask2former, "LONGER", 100)


def pictures(*shape: int) -> Tensor:
    coarse = torch.rand(shape[0], 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return functional.interpolate(coarse, shape[1:], mode="bilinear")


def as_pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())


# The words of GenEval


def test_the_classes_are_cocos_in_the_words_of_geneval() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    places = {"person": 0, "traffic light": 9, "bench": 13, "orange": 49, "computer mouse": 64, "toothbrush": 79}
    assert {name: CLASSES.index(name) for name in places} == places
    assert CLASSES[65:67] == ("tv remote", "computer keyboard")
    assert len(COLORS) == 10


def test_the_published_detector_has_80_classes_and_one_for_nothing(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "detector" / "model.safetensors")
    assert weights["class_predictor.weight"].shape[0] == 80 + 1
    published.write_mask2former(tmp_path / "detector", classes=133)  # of the panoptic weights
    with pytest.raises(ValueError, match=r"'geneval': the Mask2Former in .*detector knows 133 classes, not 80"):
        build([f"geneval={tmp_path}"])


# The scores, with an ideal detector: rectangles on grey


def thing(name: str, box: tuple[int, int, int, int], score: float = 0.95) -> Instance:
    left, top, right, bottom = box
    mask = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return Instance(CLASSES.index(name), score, bounds(mask), mask)


def canvas(things: Sequence[Instance], colors: Sequence[str]) -> Tensor:
    image = torch.full((3, SIDE, SIDE), 0.5)
    for instance, color in zip(things, colors, strict=True):
        image = torch.where(instance.mask_HW, torch.tensor(RGB[color])[:, None, None], image)
    return image


def nearest(crops: Sequence[Tensor], name: str) -> list[str]:
    """The colour of a rectangle's centre."""
    return [min(RGB, key=lambda c: math.dist(RGB[c], x[:, x.shape[1] // 2, x.shape[2] // 2].tolist())) for x in crops]


def scores(row: dict[str, Any], things: Sequence[Instance], colors: Sequence[str] = ()) -> tuple[bool, float]:
    """(verdict, partial credit) of one image, with a detector that applies its threshold and nothing else."""
    image = canvas(things, colors or ["white"] * len(things))

    def detect(images: Tensor, thresholds: Sequence[float]) -> list[list[Instance]]:
        ordered = sorted(things, key=lambda t: -t.score)
        return [[t for t in ordered if t.score > threshold] for threshold in thresholds]

    strict, partial = (
        judge(detect, nearest, pick)(image[None], ["x"], [row]).item()
        for pick in (lambda result: float(result.strict), lambda result: result.partial)
    )
    return bool(strict), partial


LEFT, RIGHT, TOP = (2, 12, 10, 20), (22, 12, 30, 20), (12, 1, 20, 9)
# Rows as in GenEval's evaluation_metadata.jsonl
SINGLE = {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
TWO = {"tag": "two_object", "include": [{"class": "tv", "count": 1}, {"class": "computer mouse", "count": 1}]}
COUNT = {
    "tag": "counting",
    "include": [{"class": "clock", "count": 2}],
    "exclude": [{"class": "clock", "count": 3}],
    "prompt": "a photo of two clocks",
}
COLOR = {"tag": "colors", "include": [{"class": "car", "count": 1, "color": "red"}], "prompt": "a photo of a red car"}
POSITION = {
    "tag": "position",
    "include": [{"class": "cow", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    "prompt": "a photo of a dog left of a cow",
}
ATTR = {
    "tag": "color_attr",
    "include": [{"class": "cup", "count": 1, "color": "blue"}, {"class": "bowl", "count": 1, "color": "black"}],
    "prompt": "a photo of a blue cup and a black bowl",
}
clocks = [thing("clock", LEFT), thing("clock", RIGHT), thing("clock", TOP), thing("clock", (12, 22, 20, 30))]
cow, dog = thing("cow", RIGHT), thing("dog", LEFT)
cup, bowl = thing("cup", LEFT), thing("bowl", RIGHT)

CASES: dict[str, tuple[dict, list[Instance], list[str], bool, float]] = {
    "single": (SINGLE, [thing("bench", LEFT)], [], True, 1),
    "single: faint": (SINGLE, [thing("bench", LEFT, 0.31)], [], True, 1),
    "single: too faint": (SINGLE, [thing("bench", LEFT, 0.3)], [], False, 0),
    "single: two pass, for less than full credit": (SINGLE, [thing("bench", LEFT), thing("bench", TOP)], [], True, 0),
    "two": (TWO, [thing("tv", LEFT), thing("computer mouse", RIGHT)], [], True, 1),
    "two: one": (TWO, [thing("tv", LEFT)], [], False, 1 / 2),
    "count": (COUNT, clocks[:2], [], True, 1),
    "count: exclude, one too many": (COUNT, clocks[:3], [], False, 1 / 2),
    "count: twice as many": (COUNT, clocks, [], False, 0),
    "count: far more, and not below 0": (COUNT, clocks * 4, [], False, 0),
    "count: 0.9 is not sure enough": (COUNT, [clocks[0], thing("clock", RIGHT, 0.9)], [], False, 1 / 2),
    "count: the third is not sure enough": (COUNT, [*clocks[:2], thing("clock", TOP, 0.85)], [], True, 1),
    "colour": (COLOR, [thing("car", LEFT)], ["red"], True, 1),
    "colour: another": (COLOR, [thing("car", LEFT)], ["blue"], False, 1 / 2),
    "colour: of the surest": (COLOR, [thing("car", LEFT, 0.5), thing("car", RIGHT)], ["blue", "red"], True, 1 / 2),
    "position": (POSITION, [cow, dog], [], True, 1),
    "position: mirrored": (POSITION, [thing("cow", LEFT), thing("dog", RIGHT)], [], False, 2 / 3),
    "position: above": (POSITION, [thing("cow", (12, 22, 20, 30)), thing("dog", TOP)], [], False, 2 / 3),
    "attributes": (ATTR, [cup, bowl], ["blue", "black"], True, 1),
    "attributes: swapped": (ATTR, [cup, bowl], ["black", "blue"], False, 1 / 2),
}


@pytest.mark.parametrize(("row", "things", "colors", "strict", "partial"), CASES.values(), ids=CASES.keys())
def test_scores_by_hand(row: dict, things: list[Instance], colors: list[str], strict: bool, partial: float) -> None:
    assert scores(row, things, colors) == (strict, pytest.approx(partial))


def test_no_more_than_16_of_a_class_count() -> None:
    row = {"tag": "single_object", "include": [{"class": "clock", "count": 16}]}
    assert scores(row, [thing("clock", LEFT)] * 40) == (True, 1)
    row = {"tag": "single_object", "include": [{"class": "clock", "count": 17}]}
    assert scores(row, [thing("clock", LEFT)] * 40) == (False, pytest.approx(16 / 17))


def test_colours_are_asked_for_where_the_prompt_names_one() -> None:
    asked = []

    def paint(crops: Sequence[Tensor], name: str) -> list[str]:
        asked.append((name, len(crops)))
        return ["red"] * len(crops)

    things = [thing("car", LEFT), thing("car", RIGHT), thing("dog", TOP)]
    reward = judge(lambda images, thresholds: [things], paint, lambda result: result.partial)
    reward(torch.zeros(1, 3, SIDE, SIDE), ["x"], [COLOR])
    reward(torch.zeros(1, 3, SIDE, SIDE), ["x"], [SINGLE])
    assert asked == [("car", 2)]


def test_a_crop_is_the_object_on_grey() -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 3] = mask[5, 3:7] = True  # an L
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    cut = crop(image, Instance(0, 1.0, bounds(mask), mask))
    assert cut.shape == (3, 4, 4)
    assert torch.equal(cut[:, :, 0], image[:, 2:6, 3]) and torch.equal(cut[:, 3], image[:, 5, 3:7])
    assert (preprocessing.pil_images(cut[None, :, :3, 1:])[0].getcolors()) == [(9, (0x99, 0x99, 0x99))]


@pytest.mark.parametrize(
    ("clause", "message"),
    [
        ({"class": "mouse", "count": 1}, "detector cannot see a 'mouse'; it knows person, bicycle"),
        ({"class": "car", "count": 1, "color": "grey"}, "cannot see a 'grey car'.* in red, orange"),
        ({"class": "car", "count": 0}, "whole count of at least 1"),
    ],
)
def test_what_cannot_be_seen_is_refused(clause: dict[str, Any], message: str) -> None:
    reward = judge(lambda images, thresholds: [[]], nearest, lambda result: result.partial)
    with pytest.raises(ValueError, match=message):
        reward(torch.zeros(1, 3, 8, 8), ["x"], [{"tag": "colors", "include": [clause]}])


# The detector's output, by hand: two queries, three classes and "no object"


def sure(label: int, logit: float = 20.0) -> Tensor:
    return torch.zeros(4).index_fill(0, torch.tensor([label]), logit)


def square(rows: slice, columns: slice, inside: float = 9.0) -> Tensor:
    """Mask logits at a quarter of a 32 x 32 input."""
    logits = torch.full((8, 8), -9.0)
    logits[rows, columns] = inside
    return logits


def test_instances_have_class_box_mask_and_confidence() -> None:
    masks = torch.stack([square(slice(0, 4), slice(0, 2)), square(slice(4, 8), slice(4, 8), inside=1.0)])
    first, second = instances(torch.stack([sure(2), sure(0)]), masks, (32, 32), (32, 32), 0.3)
    assert (first.label, second.label) == (2, 0)
    assert (first.box, second.box) == ((0, 0, 8, 16), (18, 18, 32, 32))  # the edge is where the logits cross 0
    assert first.mask_HW.sum() == 8 * 16 - 1 and not first.mask_HW[15, 7]  # the corner is round
    assert first.score > 0.97
    assert 0.6 < second.score < 1 / (1 + math.exp(-1))  # no pixel is surer than the logit 1
    logits = functional.interpolate(masks[1][None, None], (32, 32), mode="bilinear")[0, 0]
    assert second.score == pytest.approx(logits[logits > 0].sigmoid().mean().item(), rel=1e-4)


def test_instances_are_dropped_at_the_threshold_and_never_for_overlap() -> None:
    whole = square(slice(0, 8), slice(0, 8))
    classes = torch.stack([sure(1), sure(1), sure(3), torch.tensor([2.0, 1.9, -9.0, -9.0])])
    found = instances(classes, whole.expand(4, 8, 8), (32, 32), (32, 32), 0.3)
    assert [i.label for i in found] == [1, 1, 0, 1]  # the third is no object, and the last is two of them
    assert [round(i.score, 2) for i in found] == [1, 1, 0.52, 0.47]
    assert [i.label for i in instances(classes, whole.expand(4, 8, 8), (32, 32), (32, 32), 0.5)] == [1, 1, 0]
    assert instances(classes, -whole.expand(4, 8, 8).abs(), (32, 32), (32, 32), 0.3) == []  # no pixel is inside


def test_masks_leave_the_padding_and_take_the_images_size() -> None:
    masks = square(slice(0, 8), slice(0, 4))[None]  # the left half of the padded 32 x 32
    (found,) = instances(sure(0)[None], masks, (24, 16), (48, 32), 0.3)  # the input was 24 x 16
    assert found.mask_HW.shape == (48, 32)
    assert found.mask_HW.all()


# The network's input


@pytest.mark.parametrize(("size", "expected"), [((32, 32), (64, 64)), ((20, 28), (64, 90)), ((20, 90), (22, 100))])
def test_images_are_resized_and_normalised_as_by_the_processor(
    size: tuple[int, int], expected: tuple[int, int]
) -> None:
    images = pictures(2, *size)
    found = preprocessing.bounded(images, 64, 100)
    assert found.shape == (2, 3, *expected)
    fixed = {"size": {"height": expected[0], "width": expected[1]}, "size_divisor": 0, "do_pad": False}
    rows = Mask2FormerImageProcessorPil(**fixed)([as_pil(image) for image in images], return_tensors="pt")
    assert torch.allclose(found, rows["pixel_values"], atol=1e-5)


def test_the_network_gets_a_multiple_of_32_padded_with_zeros(folder: Path, small: None) -> None:
    detector = Mask2Former.load(Origin("geneval", str(folder / "detector")), "cpu", 80)
    seen = []
    detector.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        detector(pictures(9, 20, 90), [0.3] * 9)
    assert [tuple(x.shape) for x in seen] == [(8, 3, 32, 128), (1, 3, 32, 128)]
    assert torch.equal(seen[1][..., :22, :100], preprocessing.bounded(pictures(9, 20, 90)[8:], 64, 100))
    assert (seen[0][..., 22:, :] == 0).all() and (seen[0][..., 100:] == 0).all()


# Colours by CLIP


def test_colours_are_the_best_of_ten_by_the_mean_of_three_prompts(folder: Path) -> None:
    model, tokenizer = (
        CLIPModel.from_pretrained(folder / "clip").eval(),
        CLIPTokenizer.from_pretrained(folder / "clip"),
    )
    crops = [pictures(1, 40 + i, 61 - i)[0].roll(i, 0) ** (1 + i % 3) for i in range(6)]
    found = Colors(Clip(model, tokenizer, geneval._square))
    expected = []
    with torch.no_grad():
        rows = []
        for color in COLORS:
            texts = [f"a photo of a {color} cup", f"a photo of a {color}-colored cup", f"a photo of a {color} object"]
            ids = tokenizer(
                texts, padding=True, truncation=True, max_length=published.TINY.length, return_tensors="pt"
            )
            features = model.get_text_features(**ids).pooler_output
            mean = (features / features.norm(dim=1, keepdim=True)).mean(dim=0)
            rows.append(mean / mean.norm())
        for cut in crops:
            squares = preprocessing.centre_crop(cut[None], published.SIDE, preprocessing.round_half)
            image = model.get_image_features(pixel_values=squares).pooler_output[0]
            expected.append(COLORS[int((torch.stack(rows) @ image).argmax())])
        assert found(crops, "cup") == expected
        assert found._texts["cup"].allclose(torch.stack(rows), atol=1e-6)
        features = found._texts["cup"]
        assert found(crops[:2], "cup") == expected[:2] and found._texts["cup"] is features
        assert not torch.equal(found._features("bowl"), features)


# The whole, on random weights


def requests(folder: Path, images: Tensor) -> list[dict[str, Any]]:
    """Metadata that speaks of what the random detector sees, so that scores differ."""
    detector = Mask2Former.load(Origin("geneval", str(folder / "detector")), "cpu", 80)
    with torch.no_grad():
        seen = [[CLASSES[thing.label] for thing in things] for things in detector(images, [0.3] * len(images))]
    assert all(seen)
    rows = [[{"class": names[0], "count": 1 + i % 2, "color": COLORS[i]}] for i, names in enumerate(seen)]
    return [
        {"tag": "color_attr", "include": [*row, {"class": "sink", "count": 1}][: 1 + i % 2]}
        for i, row in enumerate(rows)
    ]


def test_contract_of_the_partial_credit(folder: Path, small: None) -> None:
    images = pictures(4, 40, 61)
    reward = build([f"geneval={folder}"]).rewards["geneval"]
    found = check_contract(reward, images, ["x"] * 4, requests(folder, images), 1e-4)
    assert ((found >= 0) & (found <= 1)).all()


def test_the_verdict_is_that_of_the_same_objects(folder: Path, small: None) -> None:
    images = pictures(4, 40, 61)
    rows = requests(folder, images)
    for row in rows:
        del row["include"][1:], row["include"][0]["color"]
        row["include"][0]["count"] = 1
    rows[0]["include"][0]["count"] = 40
    mix = build([f"{name}={folder}" for name in NAMES])
    parts = mix(images, ["x"] * 4, rows).parts
    assert parts["geneval_strict"].tolist() == [0, 1, 1, 1]
    assert (parts["geneval"] <= 1).all()


def test_nothing_is_found_where_nothing_was_asked_to_be(folder: Path, small: None) -> None:
    mix = build([f"geneval={folder}"])
    with pytest.raises(RewardError, match=r"'geneval' failed on image 0 .*has no 'include'"):
        mix(torch.zeros(1, 3, 32, 32), ["x"], [{}])


# Sources


def test_the_clip_comes_from_the_folder_or_the_hub(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in (folder / "detector").iterdir():
        (plain / file.name).symlink_to(file)
    with pytest.raises(
        ValueError, match="'geneval' has no CLIP of 'openai/clip-vit-large-patch14' here: `hf download"
    ):
        build([f"geneval={plain}"])
    monkeypatch.setattr(geneval, "CLIP_L", str(folder / "clip"))
    build([f"geneval={plain}"])
    monkeypatch.undo()
    (plain / "clip").symlink_to(folder / "clip")
    build([f"geneval_strict={plain}"])


@pytest.mark.parametrize("name", NAMES)
def test_the_default_is_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub = "facebook/mask2former-swin-small-coco-instance"
    with pytest.raises(ValueError) as caught:
        build([name])
    assert str(caught.value).startswith(f"reward {name!r} has no Mask2Former of {hub!r} here: `hf download {hub}`")
    assert "\n" not in str(caught.value)
    assert "download" in REWARDS[name].needs


def test_a_folder_without_a_detector_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"reward 'geneval'.*Mask2Former"):
        build([f"geneval={folder / 'clip'}"])
