"""rlg.apply of a full network: what is attached to the base acts in both passes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    StableDiffusionPAGPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

import rlg
from rlg.models import lora
from tests.support.by_hand import add_random_lora
from tests.support.guided_pipelines import ULPS, Folder, W, by_hand, image, load, sequentially


@pytest.fixture(scope="module")
def sd_network(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full fine-tuned UNet."""
    unet, folder = load(tiny_folder("sd")).unet, tmp_path_factory.mktemp("network")
    move(unet)
    unet.save_pretrained(folder / "unet")
    return folder


def move(network: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        if ".lora_" not in name:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def reference_tuned(network: nn.Module, folder: Path) -> None:
    """The base's weights replaced by those of the fine-tuned network."""
    state = UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()
    own = {name: name.replace(".base_layer.", ".") for name in network.state_dict()}
    network.load_state_dict({name: state[key] for name, key in own.items() if key in state}, strict=False)


EXTRAS: dict[str, Callable[[Any], object]] = {
    "nothing": lambda pipe: None,
    "a style LoRA": lambda pipe: add_random_lora(pipe.unet, "style", ("attn1.to_q",), seed=2),
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "attention slicing": lambda pipe: pipe.enable_attention_slicing(1),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu:0"),
    "channels last": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("extra", EXTRAS)
@pytest.mark.parametrize("first", ["extra", "guide"])
def test_a_full_network(
    first: str, extra: str, tiny_folder: Folder, sd_network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    reference, pipe = load(tiny_folder("sd")), load(tiny_folder("sd"))
    if extra != "model offload":
        EXTRAS[extra](reference)
    expected = by_hand(reference, lambda network: reference_tuned(network, sd_network))
    if first == "extra":
        EXTRAS[extra](pipe)
    guide = rlg.apply(pipe, sd_network, W)
    if first == "guide":
        EXTRAS[extra](pipe)
    for _ in range(2):
        torch.testing.assert_close(image(pipe), expected, **ULPS)
    guide.unload()
    torch.testing.assert_close(image(pipe), image(reference), **ULPS)


def test_a_full_network_under_perturbed_attention(tiny_folder: Folder, sd_network: Path) -> None:
    """The PAG pipeline shares the network; its processors act in both passes."""

    def pag(pipe: Any) -> Any:
        components = {**pipe.components, "requires_safety_checker": False}
        made = StableDiffusionPAGPipeline(**components, pag_applied_layers=["mid"])
        made.set_progress_bar_config(disable=True)
        return made

    reference, pipe = load(tiny_folder("sd")), load(tiny_folder("sd"))
    tuned = load(tiny_folder("sd"))
    reference_tuned(tuned.unet, sd_network)
    rlg.apply(pipe, sd_network, 1.0)
    torch.testing.assert_close(image(pag(pipe), pag_scale=3.0), image(pag(tuned), pag_scale=3.0), **ULPS)
    assert (image(pag(reference), pag_scale=3.0) - image(pag(pipe), pag_scale=3.0)).abs().max() > 1e-2


def off(found: Tensor, expected: Tensor) -> float:
    """Distance of two images, in lengths of the second."""
    return float((found - expected).norm() / expected.norm())


def test_a_full_network_follows_the_precision(tiny_folder: Folder, sd_network: Path) -> None:
    reference, pipe = load(tiny_folder("sd")), load(tiny_folder("sd"))
    guide = rlg.apply(pipe, sd_network, W)
    for each in (pipe, reference):
        each.to(torch.bfloat16)
    expected = by_hand(reference, lambda network: (reference_tuned(network, sd_network), network.to(torch.bfloat16)))
    guided = image(pipe)
    assert off(guided, expected) < 0.05  # combined in fp32 here, in bf16 there
    guide.remove()
    assert off(image(pipe), expected) > 0.2
    torch.testing.assert_close(image(pipe), image(reference), rtol=0.05, atol=0.05)


def test_what_a_full_network_can_not_follow(tiny_folder: Folder, sd_network: Path) -> None:
    pipe = load(tiny_folder("sd"))
    add_random_lora(pipe.unet, "style", ("attn1.to_q",))
    rlg.apply(pipe, sd_network, W)
    with pytest.raises(ValueError, match="fusing would change the base alone"):
        pipe.fuse_lora()
    lora.layers(pipe.unet)[0].merge()
    with pytest.raises(ValueError, match="'style' is fused into the base alone"):
        image(pipe)
    pipe = load(tiny_folder("sd"))
    rlg.apply(pipe, sd_network, W)
    sequentially(pipe)
    with pytest.raises(ValueError, match="sequential CPU offload brings the base's weights layer by layer"):
        image(pipe)
    pipe = load(tiny_folder("sd"))
    rlg.apply(pipe, sd_network, W)
    pipe.fuse_qkv_projections()
    with pytest.raises(ValueError, match="holds copies of the base's weights"):
        image(pipe)
