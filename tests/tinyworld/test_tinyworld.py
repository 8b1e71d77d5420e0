"""The tinyworld: what is held out, what a caption becomes, images that show their caption, and the shipped models."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

import rewards
import rlg.tinyworld
from rewards.composition import score
from rewards.detectors.blobs import PALETTE, SHAPES
from rewards.detectors.detection import Detection
from rlg.diffusion.sampling import SampleId, SampleNoise, sample
from rlg.guidance.guided import with_cfg
from rlg.models.policy import Policy
from rlg.prompts import spread
from rlg.tinyworld import networks, scenes
from rlg.tinyworld.worlds import EMOJI
from rlg.tinyworld.worlds import SHAPES as SHAPES_WORLD

SHIPPED = {  # pipeline, family and world
    "tiny-sd": (StableDiffusionPipeline, "sd", SHAPES_WORLD),
    "tiny-sd3": (StableDiffusion3Pipeline, "sd3", SHAPES_WORLD),
    "tiny-sd3-emoji": (StableDiffusion3Pipeline, "sd3", EMOJI),
    "tiny-sd-emoji": (StableDiffusionPipeline, "sd", EMOJI),
}
COUNTS = {  # captions of a tag: 4 shapes, 4 colours, 3 counts, 4 relations, ordered pairs without repetition
    "single_object": 4,
    "two_object": 12,
    "counting": 3 * 4 * (1 + 4),
    "colors": 16,
    "position": 12 * 4,
    "color_attr": 12 * 12,
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_splits_share_nothing_and_lack_nothing() -> None:
    train, test = (scenes.composition_prompts(split) for split in ("train", "test"))
    texts = [p.text for p in (*train, *test)]
    assert len(texts) == len(set(texts))
    assert Counter(p.metadata["tag"] for p in (*train, *test)) == COUNTS
    held_out = Counter(p.metadata["tag"] for p in test)
    assert set(held_out) == set(scenes.COMPOSITION_TAGS) == set(COUNTS)
    assert all(held_out[tag] == max(1, round(0.25 * count)) for tag, count in COUNTS.items())
    with pytest.raises(ValueError, match="unknown split 'val'; known: train, test"):
        scenes.composition_prompts("val")


def test_the_held_out_captions_are_the_same_in_every_version() -> None:
    """The shipped models were trained without them: another choice would leak."""
    test = [p.text for p in scenes.composition_prompts("test")]
    assert test[:4] == ["a triangle", "a circle and a triangle", "a cross and a circle", "a circle and a square"]
    assert [text for text in ("K7X", "AC", "9LFH", "CAT", "34", "PRTX") if scenes.is_test_sign(text)] == [
        "AC",
        "34",
        "PRTX",
    ]


def test_pretraining_sees_no_test_prompt() -> None:
    drawn = scenes.training_prompts(4000, seeded(0))
    test = {p.text for p in scenes.composition_prompts("test")}
    assert not test & {p.text for p in drawn}
    tags = Counter(p.metadata["tag"] for p in drawn)
    assert set(tags) == {*COUNTS, "text"}
    assert 0.17 < tags["text"] / 4000 < 0.23
    signs = [p.metadata["text"] for p in drawn if p.metadata["tag"] == "text"]
    assert not any(map(scenes.is_test_sign, signs))
    assert {len(text) for text in signs} == {2, 3, 4}
    assert [p.text for p in scenes.training_prompts(50, seeded(3))] == [
        p.text for p in scenes.training_prompts(50, seeded(3))
    ]


def test_signs_of_a_split() -> None:
    train, test = (scenes.sign_prompts(split, 300, seeded(1)) for split in ("train", "test"))
    for prompts, held_out in ((train, False), (test, True)):
        texts = [p.metadata["text"] for p in prompts]
        assert len(set(texts)) == 300
        assert {scenes.is_test_sign(text) for text in texts} == {held_out}
        assert set("".join(texts)) <= set(scenes.ALPHABET)
        assert [p.text for p in prompts] == [f'a sign that says "{text}"' for text in texts]
        assert min(Counter(map(len, texts)).values()) > 60
    pairs = [a + b for a in scenes.ALPHABET for b in scenes.ALPHABET]
    assert 0.2 < sum(map(scenes.is_test_sign, pairs)) / len(pairs) < 0.3


def test_captions_fit_and_every_word_is_one_token() -> None:
    tokenizer = networks.build_tokenizer()
    prompts = [*scenes.composition_prompts("train"), *scenes.composition_prompts("test")]
    for text in [p.text for p in prompts]:
        tokens = tokenizer(text).input_ids
        assert tokenizer.convert_ids_to_tokens(tokens)[1:-1] == [word + "</w>" for word in text.split()]
        assert len(tokens) <= tokenizer.model_max_length == SHAPES_WORLD.max_tokens == 12
    assert len({tuple(tokenizer(p.text).input_ids) for p in prompts}) == len(prompts)


@pytest.mark.parametrize("text", ["K7", "AAA", "9LFH", "3434"])
def test_signs_fit_and_are_spelled_by_character(text: str) -> None:
    tokenizer = networks.build_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(scenes.sign_prompt(text).text).input_ids)
    assert len(tokens) <= SHAPES_WORLD.max_tokens
    assert tokens[1:5] == ["a</w>", "sign</w>", "that</w>", "says</w>"]
    assert [token.removesuffix("</w>") for token in tokens[5:-1]] == ['"', *text.lower(), '"']


def test_draw_is_a_function_of_the_seed() -> None:
    prompts = scenes.training_prompts(48, seeded(0))
    images = scenes.draw(prompts, seeded(5))
    assert images.shape == (48, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, scenes.draw(prompts, seeded(5)))
    assert ((images - scenes.draw(prompts, seeded(6))).abs().flatten(1).max(dim=1).values > 0.1).all()
    state = torch.get_rng_state()
    scenes.draw(prompts[:2], seeded(0))
    assert torch.equal(torch.get_rng_state(), state)
    assert scenes.draw([], seeded(0)).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("tag", scenes.COMPOSITION_TAGS)
def test_every_layout_satisfies_its_metadata(tag: str) -> None:
    """By geometry alone, without a detector: boxes inside the image, apart, and scored by GenEval's rule."""
    prompts = [p for s in ("train", "test") for p in scenes.composition_prompts(s) if p.metadata["tag"] == tag]
    generator = seeded(0)
    for prompt in prompts * 8:
        things = scenes._layout(prompt.metadata, generator)
        boxes = [(x - r, y - r, x + r, y + r) for _, _, (x, y, r) in things]
        assert all(min(box) >= 0 and max(box) <= 64 for box in boxes)
        assert all(a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1] for a, b in pairs_of(boxes))
        found = [Detection(name, colour, box, 1.0) for (name, colour, _), box in zip(things, boxes, strict=True)]
        result = score(prompt.metadata, found)
        assert (result.strict, result.partial) == (True, 1.0), prompt
        assert {name for name, _, _ in things} <= set(SHAPES)
        assert {colour for _, colour, _ in things} <= set(PALETTE)


def pairs_of(rows: list) -> list[tuple]:
    return [(a, b) for i, a in enumerate(rows) for b in rows[:i]]


def test_drawn_images_show_their_captions() -> None:
    """One draw of each caption, and of some signs, through the detector; test_detector.py measures this at length."""
    prompts = [*scenes.composition_prompts("test"), *scenes.sign_prompts("test", 20, seeded(0))]
    images = scenes.draw(prompts, seeded(1))
    verdicts = rewards.build(["composition_strict"])(images, [p.text for p in prompts], [p.metadata for p in prompts])
    assert verdicts.total_B.mean() >= 0.99


def test_a_sign_shows_its_characters() -> None:
    """Two signs that differ in one character differ there, and nowhere else."""
    first, second = (scenes.draw([scenes.sign_prompt(text)], seeded(3))[0] for text in ("KAX", "KTX"))
    columns = ((first - second).abs().sum(dim=(0, 1)) > 0.1).nonzero().flatten()
    assert 3 <= int(columns.max() - columns.min()) <= 16
    ink = (first.mean(dim=0) < 0.2).sum()
    assert ink > 60


def test_unknown_models_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown tinyworld model 'tiny-flux'; known: tiny-sd, tiny-sd3, tiny-sdxl"):
        rlg.tinyworld.path("tiny-flux")
    with pytest.raises(ValueError, match="unknown family 'flux'; known: sd, sdxl, sd3"):
        networks.build("flux")


def test_tiny_sdxl_is_made_once_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    folders = []
    for name in ("a", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        folders.append(rlg.tinyworld.path("tiny-sdxl"))
        assert folders[-1].is_relative_to(tmp_path / name)
        assert [p.name for p in folders[-1].parent.iterdir()] == [folders[-1].name]  # no temporary folder is left
    assert torch.equal(torch.get_rng_state(), state)
    files = [sorted(folder.rglob("*.safetensors")) for folder in folders]
    assert len(files[0]) == 4
    assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]
    written = files[1][0].stat().st_mtime_ns
    assert rlg.tinyworld.path("tiny-sdxl") == folders[1]
    assert files[1][0].stat().st_mtime_ns == written
    pipe = DiffusionPipeline.from_pretrained(folders[0])
    assert type(pipe) is StableDiffusionXLPipeline
    assert pipe("two red circles", num_inference_steps=1).images[0].size == (64, 64)


@pytest.mark.parametrize("name", SHIPPED)
def test_plain_diffusers_runs_the_shipped_models(name: str) -> None:
    kind, _, world = SHIPPED[name]
    pipe = kind.from_pretrained(rlg.tinyworld.path(name))
    assert {p.dtype for m in ("vae", "text_encoder") for p in getattr(pipe, m).parameters()} == {torch.float32}
    image = pipe(world.composition_prompts("test")[0].text, num_inference_steps=2, generator=seeded(0)).images[0]
    assert image.size == (64, 64)
    assert len(image.getcolors(64 * 64)) > 50  # an image, not a blank or a NaN


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_are_what_the_code_builds(name: str) -> None:
    _, family, world = SHIPPED[name]
    pipe, built = DiffusionPipeline.from_pretrained(rlg.tinyworld.path(name)), networks.build(family, world)
    for part, module in built.components.items():
        if isinstance(module, torch.nn.Module):
            shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (module, pipe.components[part])]
            assert shapes[0] == shapes[1], part
    assert pipe.tokenizer.get_vocab() == built.tokenizer.get_vocab()
    assert pipe.vae.config.scaling_factor != built.vae.config.scaling_factor  # measured in pretraining


def test_shipped_weights_are_small_half_precision_and_no_pickles() -> None:
    folders = [rlg.tinyworld.path(name) for name in SHIPPED]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    for folder in folders:
        assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 24e6
    assert {file.suffix for file in files} <= {".safetensors", ".json", ".txt", ".model", ".md"}
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                dtypes = {opened.get_slice(key).get_dtype() for key in opened.keys()}
            assert dtypes <= {"F16", "I64"}, file


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_models_show_what_they_are_told(name: str) -> None:
    """Held-out captions, some of each tag; LOG.md has the accuracy over all of them."""
    policy, test = Policy.load(name), SHIPPED[name][2].composition_prompts("test")
    prompts = [test[i] for i in spread(test, 48)]
    texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
    noise = SampleNoise([SampleId(0, i, 0) for i in range(len(prompts))], policy.latent_shape())
    predict = with_cfg(policy.reference, policy.encode([""]), 4.5)
    images = policy.decode(sample(predict, policy.schedule(10, "ode", 0.0), policy.encode(texts), noise))
    reward = rewards.build(["composition_strict"])
    told = float(reward(images, texts, metadata).total_B.mean())
    mixed_up = float(reward(images, texts[::-1], metadata[::-1]).total_B.mean())
    assert told >= 0.4
    assert mixed_up <= 0.1
