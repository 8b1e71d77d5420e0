"""The emoji world: its grammar, what is held out, and scenes that hold what their caption says."""

from __future__ import annotations

import inspect
import itertools
import re
from collections import Counter

import pytest
import torch

from rewards.composition import score
from rewards.detectors.detection import Detection
from rewards.detectors.sprites import COLORED, DRAWINGS, NOUNS, drawings
from rlg.prompts import Prompt
from rlg.tasks import prompt_sets
from rlg.tinyworld import emoji, emoji_captions, scenes
from rlg.tinyworld.emoji_captions import Caption, Thing, captions

COUNTS = {  # captions of a tag: 48 nouns; 18 coloured ones (2 + 2 + 4 + 5 + 5); three counts; four relations
    "single_object": 48,
    "two_object": 48 * 47,
    # alone: each noun in no colour, and each coloured one; with another: 1 and 2, 2 and 1, 1 and 3, 3 and 1, 2 and 2
    "counting": 3 * (48 + 18) + 5 * 48 * 47,
    "colors": 18,
    "position": 4 * 48 * 47,
    "color_attr": 18 * 18 - (2 * 2 + 2 * 2 + 4 * 4 + 5 * 5 + 5 * 5),
}
WORD_COUNTS = {"a": 1, "an": 1, "two": 2, "three": 3, "four": 4}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        (Caption("single_object", (Thing("fox"),)), "a fox"),
        (Caption("single_object", (Thing("owl"),)), "an owl"),
        (Caption("single_object", (Thing("unicorn"),)), "a unicorn"),
        (Caption("single_object", (Thing("umbrella"),)), "an umbrella"),
        (Caption("colors", (Thing("book", color="orange"),)), "an orange book"),
        (Caption("colors", (Thing("apple", color="red"),)), "a red apple"),
        (Caption("counting", (Thing("apple", 3, "red"),)), "three red apples"),
        (Caption("counting", (Thing("mouse", 4),)), "four mice"),
        (Caption("counting", (Thing("panda", 2), Thing("guitar"))), "two pandas and a guitar"),
        (Caption("counting", (Thing("octopus"), Thing("fish", 3))), "an octopus and three fish"),
        (Caption("two_object", (Thing("airplane"), Thing("cactus"))), "an airplane and a cactus"),
        (Caption("position", (Thing("fox"), Thing("owl")), "left of"), "a fox left of an owl"),
        (
            Caption("color_attr", (Thing("car", color="blue"), Thing("heart", color="red"))),
            "a blue car and a red heart",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_captions_by_hand(caption: Caption, text: str) -> None:
    assert caption.text == text == caption.prompt().text


def test_plurals_by_hand() -> None:
    regular = (
        "apples pears lemons bananas strawberries pineapples carrots mushrooms doughnuts cupcakes cats dogs foxes"
    )
    regular += " rabbits pandas tigers pigs frogs penguins owls unicorns octopuses crabs turtles butterflies whales"
    regular += " sunflowers trees cars rockets airplanes boats trains houses guitars keys crowns gifts umbrellas stars"
    regular += " robots books hearts balls"
    assert {emoji_captions.plural(noun) for noun in NOUNS} == {*regular.split(), "mice", "fish", "cacti", "leaves"}


def test_metadata_by_hand() -> None:
    assert Caption("position", (Thing("fox"), Thing("owl")), "left of").prompt().metadata == {
        "world": "emoji",
        "tag": "position",
        "include": [{"class": "owl", "count": 1}, {"class": "fox", "count": 1, "position": ["left of", 0]}],
    }
    assert Caption("counting", (Thing("apple", 2, "red"), Thing("key"))).prompt().metadata == {
        "world": "emoji",
        "tag": "counting",
        "include": [{"class": "apple", "count": 2, "color": "red"}, {"class": "key", "count": 1}],
        "exclude": [{"class": "apple", "count": 3}, {"class": "key", "count": 2}],
    }


def test_every_caption_is_there_once_and_in_the_world_s_words() -> None:
    every = [caption.text for tag in scenes.COMPOSITION_TAGS for caption in captions(tag)]
    assert {tag: len(captions(tag)) for tag in scenes.COMPOSITION_TAGS} == COUNTS
    assert len(set(every)) == len(every) == sum(COUNTS.values())
    assert {word for text in every for word in text.split()} == set(emoji_captions.words())
    assert max(len(text.split()) for text in every) == 7  # a red apple and a blue book
    with pytest.raises(ValueError, match="unknown tag 'text'; known: single_object, "):
        captions("text")


# --- the splits, by the captions' words alone ------------------------------------------------------------------------

SINGULAR = {emoji_captions.plural(noun): noun for noun in NOUNS} | {noun: noun for noun in NOUNS}


def things_of(text: str) -> list[tuple[int, str, str]]:
    """(count, colour or "", noun) of a caption's one or two things."""
    parts = re.split(r" (?:and|left of|right of|above|below) ", text)
    words = [part.split() for part in parts]
    return [(WORD_COUNTS[w[0]], w[1] if len(w) == 3 else "", SINGULAR[w[-1]]) for w in words]


def pairs_of(prompts: list[str]) -> set[frozenset[tuple[str, str]]]:
    """Unordered pairs of (noun, "") and of (noun, colour) that captions name."""
    pairs = set()
    for (_, c, a), (_, d, b) in (things_of(text) for text in prompts if len(things_of(text)) == 2):
        pairs |= {frozenset({(a, ""), (b, "")})} | ({frozenset({(a, c), (b, d)})} if c and d else set())
    return pairs


def test_what_is_held_out_is_never_said_in_training() -> None:
    train = [row.text for group in emoji.GROUPS for row in emoji._rows(group, "train")]
    held = emoji.held_out()
    counts = {(noun, count) for text in train for count, _, noun in things_of(text) if count > 1}
    assert len(held.counts) == 36 and not counts & held.counts
    assert counts | held.counts == set(itertools.product(NOUNS, (2, 3, 4)))
    assert max(Counter(noun for noun, _ in held.counts).values()) == 1  # two counts of every noun are seen
    assert not pairs_of(train) & held.pairs
    nouns = {pair for pair in held.pairs if all(not color for _, color in pair)}
    assert (len(nouns), len(held.pairs - nouns)) == (113, 12)  # of 48 * 47 / 2, and of 250 / 2
    alone = {text for text in train if text.split()[0] in ("a", "an") and len(things_of(text)) == 1}
    assert len(alone) == 48 - 12 + 18 - 5
    assert not alone & {thing.text for thing in held.alone}


def test_every_test_prompt_holds_what_is_held_out_and_every_thing_is_seen() -> None:
    train, test = (emoji.composition_prompts(split) for split in ("train", "test"))
    held = emoji.held_out()
    for prompt in test:
        things = things_of(prompt.text)
        counted = any((noun, count) in held.counts for count, _, noun in things)
        alone = len(things) == 1 and prompt.text in {thing.text for thing in held.alone}
        assert counted or alone or pairs_of([prompt.text]) & held.pairs, prompt.text
    seen = [thing for prompt in train for thing in things_of(prompt.text)]
    assert {noun for _, _, noun in seen} == set(NOUNS)
    assert {(noun, color) for _, color, noun in seen if color} == {drawing for drawing in DRAWINGS if drawing[1]}
    assert not {p.text for p in train} & {p.text for p in test}


def test_the_splits_have_every_tag_and_stay_as_they_are() -> None:
    test = emoji.composition_prompts("test")
    tags = {"single_object": 12, "two_object": 48, "counting": 48, "colors": 5, "position": 48, "color_attr": 24}
    assert Counter(p.metadata["tag"] for p in test) == tags
    assert {p.metadata["tag"] for p in emoji.composition_prompts("train")} == set(tags)
    assert [p.text for p in test[:3]] == ["a penguin", "a strawberry", "a fox"]  # trained models do not know them
    with pytest.raises(ValueError, match="unknown split 'val'; known: train, test"):
        emoji.composition_prompts("val")


def test_pretraining_sees_no_test_prompt_and_every_tag() -> None:
    drawn = emoji.training_prompts(2000, seeded(0))
    assert not {p.text for p in drawn} & {p.text for p in emoji.composition_prompts("test")}
    shares = Counter((p.metadata["tag"], len(things_of(p.text))) for p in drawn)
    assert all(abs(shares[g.tag, g.things] / 2000 - g.weight) < 0.04 for g in emoji.GROUPS)  # 4 standard errors
    assert drawn[:50] == emoji.training_prompts(2000, seeded(0))[:50]


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_prompt_set_has_a_name(split: str) -> None:
    assert prompt_sets.load(f"tinyworld:emoji/{split}") == list(emoji.composition_prompts(split))
    with pytest.raises(ValueError, match=r"^unknown prompt set tinyworld:emoji/x; known: composition.* or emoji, .*$"):
        prompt_sets.load("tinyworld:emoji/x")


def test_both_worlds_are_called_alike() -> None:
    for name in ("composition_prompts", "training_prompts", "draw"):
        ours, theirs = (inspect.signature(getattr(world, name)).parameters for world in (emoji, scenes))
        shared = ours.keys() & theirs.keys()
        assert list(ours)[: len(shared)] == list(theirs)[: len(shared)]
        extra = {p for own in (ours, theirs) for p in own.values() if p.name not in shared}
        assert all(p.default is not inspect.Parameter.empty for p in extra)


# --- scenes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True])
def test_draw_is_a_function_of_the_seed(soft: bool) -> None:
    prompts = emoji.training_prompts(24, seeded(0))
    images = emoji.draw(prompts, seeded(5), soft)
    assert (images.shape, images.dtype) == ((24, 3, 64, 64), torch.float32)
    assert images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, emoji.draw(prompts, seeded(5), soft))
    assert ((images - emoji.draw(prompts, seeded(6), soft)).abs().flatten(1).max(dim=1).values > 0.1).all()
    state = torch.get_rng_state()
    emoji.draw(prompts[:2], seeded(0), soft)
    assert torch.equal(torch.get_rng_state(), state)
    assert emoji.draw([], seeded(0), soft).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("tag", scenes.COMPOSITION_TAGS)
def test_every_layout_satisfies_its_metadata(tag: str) -> None:
    """By geometry alone, without a detector: inside the image, apart, and scored by GenEval's rule."""
    generator = seeded(0)
    for caption in captions(tag)[::7]:
        metadata = caption.prompt().metadata
        placed = emoji.layout(metadata, generator)
        boxes = [(x, y, x + size, y + size) for _, x, y, size in placed]
        assert all(min(box) >= 0 and max(box) <= 64 for box in boxes)
        assert all(25 <= size <= 30 for *_, size in placed)
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        found = [Detection(*DRAWINGS[i], box, 1.0) for (i, *_), box in zip(placed, boxes, strict=True)]
        result = score(metadata, found)
        assert (result.strict, result.partial) == (True, 1.0), caption


def test_an_open_color_is_drawn_and_is_one_for_all_of_a_thing() -> None:
    metadata = Caption("counting", (Thing("heart", 3),)).prompt().metadata
    generator = seeded(0)
    drawn = [{DRAWINGS[i] for i, *_ in emoji.layout(metadata, generator)} for _ in range(60)]
    assert all(len(one) == 1 for one in drawn)
    assert {color for ((_, color),) in drawn} == set(COLORED["heart"])


def test_a_scene_is_the_drawing_on_pale_paper() -> None:
    prompt = Prompt("a key", {"tag": "single_object", "include": [{"class": "key", "count": 1}]})
    ((index, x, y, size),) = emoji.layout(prompt.metadata, seeded(7))
    assert DRAWINGS[index] == ("key", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "layout", lambda *_: [(index, x, y, size)])
        image = emoji.draw([prompt], seeded(7))[0]
    drawing = drawings(size)[index]
    opaque = drawing[3] > 0.999
    assert opaque.sum() > 100
    assert torch.allclose(image[:, y : y + size, x : x + size][:, opaque], drawing[:3, opaque], atol=2e-3)
    outside = torch.ones(64, 64, dtype=torch.bool)
    outside[y : y + size, x : x + size] = False
    assert image[:, outside].min() >= 0.94
    assert (image[:, outside].amax(dim=1) - image[:, outside].amin(dim=1)).max() == 0


def test_soft_paper_is_pale_and_changes_slowly() -> None:
    papers = emoji._gradients(40, seeded(0))
    assert papers.min() >= 0.75 and papers.max() <= 1
    assert (papers.diff(dim=2).abs().max() < 0.01) and (papers.diff(dim=3).abs().max() < 0.01)
    assert (papers.flatten(2).amax(dim=2) - papers.flatten(2).amin(dim=2)).mean() > 0.03
