"""What a model family is told beside the prompt: sizes, lengths and precisions, against diffusers' own pipelines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from rlg.benchmark import architectures
from rlg.diffusion.conditioning import Conditioning
from rlg.guidance.guided import with_cfg
from rlg.models.backbones import pipeline_cfg
from rlg.models.policy import Policy


def told(network: nn.Module, call: Callable[[], object]) -> list[list[float]]:
    """The time ids that a call of the network gets, a row a sample."""
    seen: dict[str, list] = {}

    def spy(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen["ids"] = kwargs["added_cond_kwargs"]["time_ids"].tolist()

    handle = network.register_forward_pre_hook(spy, with_kwargs=True)
    call()
    handle.remove()
    return seen["ids"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sdxl_is_told_the_size_of_the_image(tiny_folder: Callable[[str], Path], guidance: float) -> None:
    """As StableDiffusionXLPipeline tells it, for the model's own size and another, with one conditioning."""
    policy = Policy.load(str(tiny_folder("sdxl")))
    cond = policy.encode(["two red circles"])
    predict = with_cfg(policy.predict, policy.encode([""]), guidance)
    for side in (policy.image_size(), policy.image_size() // 2):

        def theirs(side: int = side) -> None:
            options = {"num_inference_steps": 1, "guidance_scale": guidance, "output_type": "latent"}
            policy.pipe("two red circles", height=side, width=side, **options)

        x = torch.zeros(1, *policy.latent_shape(side))
        ours = told(policy.network, lambda x=x: predict(x, torch.tensor([500.0]), cond))
        assert ours == told(policy.network, theirs)
        assert ours[0] == [side, side, 0, 0, side, side]


def test_conditionings_that_say_different_things_are_not_joined(tiny_folder: Callable[[str], Path]) -> None:
    policy = Policy.load(str(tiny_folder("sdxl")))
    cond = policy.encode([""])
    sized = policy.with_sizes(cond, torch.tensor([[80, 64]]), torch.tensor([[8, 0]]), 64)
    with pytest.raises(ValueError, match="do not go together"):
        Conditioning.cat([cond, sized])


def test_t5_is_given_as_many_tokens_as_asked_for(tiny_folder: Callable[[str], Path]) -> None:
    own, short = (architectures.random_policy("sd35-medium-tiny", t5=True) for _ in range(2))
    short = Policy(short.pipe, short.base, t5_length=128)
    for policy, length in ((own, 256), (short, 128)):
        embeds, _, _, _ = policy.pipe.encode_prompt(
            ["a red circle"], None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
        assert torch.equal(policy.encode(["a red circle"]).tensors["encoder_hidden_states"], embeds)
        assert embeds.shape[1] == 77 + length
    collapsed = Policy.load(str(tiny_folder("sd3")), t5_length=128)
    assert collapsed.encode(["a red circle"]).tensors["last_token_count"].tolist() == [128]


@pytest.mark.parametrize(
    ("family", "length", "message"),
    [("sd3", 513, "takes 1 to 512 tokens"), ("sd3", 0, "takes 1 to 512"), ("sdxl", 128, "has no T5")],
)
def test_lengths_that_do_not_fit_are_refused(
    tiny_folder: Callable[[str], Path], family: str, length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"t5_length is {length}, but .* {message}"):
        Policy.load(str(tiny_folder(family)), t5_length=length)


def test_the_autoencoder_has_a_precision_of_its_own(tiny_folder: Callable[[str], Path]) -> None:
    for dtype, vae_dtype, expected in (
        ("bfloat16", None, torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float16", None, torch.float32),  # SDXL's overflows: its pipeline decodes in float32
    ):
        policy = Policy.load(str(tiny_folder("sdxl")), dtype, vae_dtype=vae_dtype)
        assert policy.pipe.vae.dtype == expected
        assert policy.network.dtype == getattr(torch, dtype)
        assert policy.decode(torch.zeros(1, *policy.latent_shape())).dtype == torch.float32
    assert Policy.load(str(tiny_folder("sd")), "float16").pipe.vae.dtype == torch.float16
    with pytest.raises(ValueError, match="unknown dtype 'half'"):
        Policy.load(str(tiny_folder("sdxl")), vae_dtype="half")


def test_a_family_may_have_latents_of_its_own(tiny_policy: Callable[..., Policy]) -> None:
    """Packed by 2 x 2, say: the family's record says so, and nobody else is asked."""
    policy = tiny_policy("sd", fresh=True)
    assert policy.latent_shape() == (4, 8, 8) and policy.image_size() == 64

    def packed(pipe: object, network: object, height: int, width: int) -> tuple[int, int, int]:
        return 16, height // 16, width // 16

    policy.backbone = replace(policy.backbone, latent_shape=packed, image_size=lambda pipe, network: 96)
    assert policy.latent_shape() == (16, 6, 6)
    assert policy.latent_shape(32) == (16, 2, 2)


def test_images_go_through_the_autoencoder_in_chunks_of_pixels(tiny_folder: Callable[[str], Path]) -> None:
    """Four images of 1024 x 1024 in bfloat16 at once, two in float32; and the same images as in one piece."""
    policy = Policy.load(str(tiny_folder("sd")))
    sizes: list[int] = []

    def spy(pipe: object, batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return torch.zeros(len(batch), 3, 1, 1)

    policy.backbone = replace(policy.backbone, decode=spy, encode_image=spy)
    factor = policy.pipe.vae_scale_factor
    for dtype, side, expected in (("float32", 1024, [2, 2, 1]), ("bfloat16", 1024, [4, 1]), ("bfloat16", 512, [5])):
        policy.pipe.vae.to(getattr(torch, dtype))
        for call in (
            lambda side=side: policy.decode(torch.zeros(5, 4, side // factor, side // factor)),
            lambda side=side: policy.encode_images(torch.zeros(5, 3, 1, 1).expand(5, 3, side, side)),
        ):
            sizes.clear()
            assert len(call()) == 5
            assert sizes == expected
    policy.decode(torch.zeros(5, 4, 512 // factor, 512 // factor), batch=2)
    assert sizes[-3:] == [2, 2, 1]  # never more than it is told


def test_a_pipeline_is_told_its_cfg_as_its_family_says(tiny_folder: Callable[[str], Path]) -> None:
    """`guidance_scale`, unless the family says otherwise; pipelines without a family have that name for it."""
    pipe = DiffusionPipeline.from_pretrained(tiny_folder("sd3"))
    assert pipeline_cfg(pipe, 3.0) == pipeline_cfg(object(), 3.0) == {"guidance_scale": 3.0}
