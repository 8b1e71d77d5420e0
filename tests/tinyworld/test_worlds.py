"""Both worlds through one interface: words and tokens, scenes and their paper, and what is said of an unknown one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlg.tinyworld import networks
from rlg.tinyworld.worlds import EMOJI, SHAPES, World, check_words, world_of, world_of_words

WORLDS = pytest.mark.parametrize("world", [SHAPES, EMOJI], ids=lambda world: world.name)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texts_of(world: World) -> set[str]:
    prompts = [p for split in ("train", "test") for p in world.composition_prompts(split)]
    return {p.text for p in (*prompts, *world.training_prompts(500, seeded(0))) if p.metadata["tag"] != "text"}


@WORLDS
def test_every_word_of_a_caption_is_one_token(world: World) -> None:
    tokenizer = networks.build_tokenizer(world)
    texts = texts_of(world)
    for text in texts:
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)
        assert tokens == ["<|startoftext|>", *(f"{word}</w>" for word in text.split()), "<|endoftext|>"]
    assert {word for text in texts for word in text.split()} <= set(world.words)
    for word in world.words:
        assert tokenizer.convert_ids_to_tokens(tokenizer(word).input_ids)[1:-1] == [f"{word}</w>"]


def test_the_longest_caption_of_the_emoji_fits_exactly() -> None:
    lengths = {text: len(text.split()) + 2 for text in texts_of(EMOJI)}
    assert max(lengths.values()) == EMOJI.max_tokens == networks.build_tokenizer(EMOJI).model_max_length


@WORLDS
@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_networks_are_of_the_world(world: World, family: str) -> None:
    pipe = networks.build(family, world)
    assert len(pipe.tokenizer) == pipe.text_encoder.config.vocab_size
    assert pipe.text_encoder.config.max_position_embeddings == world.max_tokens
    denoiser = pipe.components["unet" if family == "sd" else "transformer"]
    assert denoiser.config.sample_size * pipe.vae_scale_factor == world.size
    assert denoiser.config.in_channels == pipe.vae.config.latent_channels
    assert (pipe.vae.config.shift_factor is not None) == (family == "sd3")


def test_the_families_of_the_emoji_have_one_autoencoder() -> None:
    shapes = [{k: v.shape for k, v in networks.build(f, EMOJI).vae.state_dict().items()} for f in ("sd", "sd3")]
    assert shapes[0] == shapes[1]


@WORLDS
def test_scenes_are_drawn_on_paper_that_is_lighter_than_the_limit(world: World) -> None:
    single = [p for p in world.composition_prompts("train") if p.metadata["tag"] == "single_object"] * 8
    images = world.draw(single, seeded(1))
    assert images.shape == (len(single), 3, world.size, world.size)
    papers = images.flatten(2).median(dim=2).values  # one object covers less than half of a scene
    assert papers.min() >= world.paper
    covered = (images.amin(dim=1) < world.paper).float().mean(dim=(1, 2))
    assert covered.min() > 0.02
    assert covered.max() < 0.5


def test_what_is_drawn_weighs_more() -> None:
    """Weights 5, 1, 1, 1 over their mean, 2."""
    image = torch.ones(1, 3, 2, 2)
    image[0, 1, 0, 0] = 0.5  # one channel is enough
    assert EMOJI.weights(image).tolist() == [[[[2.5, 0.5], [0.5, 0.5]]]]
    assert SHAPES.weights(image).tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]
    assert EMOJI.weights(torch.ones(1, 3, 2, 2)).tolist() == [[[[1.0, 1.0], [1.0, 1.0]]]]


def test_a_world_is_known_by_its_name_and_by_its_words() -> None:
    for world in (SHAPES, EMOJI):
        assert world_of(world.name) is world
        assert world_of_words(networks.build_tokenizer(world).get_vocab()) is world
    with pytest.raises(ValueError, match=r"^unknown world 'smileys'; known: shapes, emoji$"):
        world_of("smileys")
    with pytest.raises(ValueError, match=r"tokenizer lacks words of every world; known: shapes, emoji$"):
        world_of_words(["fox</w>"])


def test_the_tokenizer_of_a_new_world_needs_its_words_alone() -> None:
    """From the end no merge cuts another word, whatever the words are: here each is a part of the next."""
    words = ("an", "ban", "banana", "bananas")
    tokenizer = networks.build_tokenizer(replace(EMOJI, words=words))
    tokens = tokenizer.convert_ids_to_tokens(tokenizer(" ".join(words)).input_ids)
    assert tokens[1:-1] == [f"{word}</w>" for word in words]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a fox and two owl", None),
        ("A Fox", None),  # the tokenizer reads lower case
        ("a foxe and an owl", "does not know the word 'foxe'; near it are fox"),
        ("a zeppelin", "does not know the word 'zeppelin'; it knows 112 words "),
    ],
)
def test_a_word_that_the_world_lacks_is_named(text: str, said: str | None) -> None:
    """Emoji alone: the shapes' models spell words for their signs, and other models know more than these worlds."""
    tokens = networks.build_tokenizer(EMOJI).get_vocab()
    check_words(networks.build_tokenizer(SHAPES).get_vocab(), [text])
    check_words({"zeppelin</w>"}, [text])
    if said is None:
        check_words(tokens, [text])
    else:
        with pytest.raises(ValueError, match=said):
            check_words(tokens, ["a fox", text])
