"""rlg.apply on adapters from every loader, beside the user's own, against guidance by hand of two networks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import rlg
from rlg.integrations.guided_network import guided
from rlg.models import lora
from tests.support.by_hand import add_random_lora
from tests.support.guided_pipelines import ULPS, Folder, W, aligned, by_hand, image, load, save


def test_a_folder_of_save_lora_adapter(sd3_pipe: Any, guided_latents: Tensor, tmp_path: Path) -> None:
    network = copy.deepcopy(sd3_pipe.transformer)
    aligned(network)
    network.save_lora_adapter(tmp_path, adapter_name="aligned")
    rlg.apply(sd3_pipe, tmp_path, W)
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)


def test_adapters_that_diffusers_has_loaded(
    sd3_pipe: Any, lora_files: dict[str, Path], guided_latents: Tensor
) -> None:
    sd3_pipe.load_lora_weights(lora_files["aligned"], adapter_name="mine")
    guide = rlg.apply(sd3_pipe, adapters=["mine"], scale=W)
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    guide.unload()
    assert lora.names_of(sd3_pipe.transformer) == ["mine"]  # the user's, and stays
    for wrong, message in (
        (["other"], "no adapter named 'other'; those that it carries: mine"),
        ("mine", "as a list"),
    ):
        with pytest.raises(ValueError, match=message):
            rlg.apply(sd3_pipe, adapters=wrong)
    with pytest.raises(ValueError, match="is attached already, as 'mine'"):
        rlg.apply(sd3_pipe, lora_files["aligned"])


def test_an_adapter_that_also_changes_a_text_encoder(sd3_pipe: Any, lora_files: dict[str, Path]) -> None:
    sd3_pipe.load_lora_weights(lora_files["aligned"], adapter_name="mine")
    sd3_pipe.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"]), "mine")
    with pytest.raises(ValueError, match="also changes the text_encoder"):
        rlg.apply(sd3_pipe, adapters=["mine"])


def test_a_network_for_which_diffusers_has_no_loader(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 3, "caption_channels": 8}
        return PixArtTransformer2DModel(sample_size=8, cross_attention_dim=24, in_channels=4, out_channels=8, **sizes)

    peft = get_peft_model(network(), LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    peft.save_pretrained(tmp_path)
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4)
    pipe = PixArtSigmaPipeline(None, None, vae, network(), diffusers.DPMSolverMultistepScheduler())
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    inputs = {"timestep": torch.tensor([500, 500]), "encoder_hidden_states": text, "return_dict": False}
    inputs["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    base, keys = network()(x, **inputs)[0], set(pipe.transformer.state_dict())
    guide = rlg.apply(pipe, tmp_path, W)
    tuned = peft.base_model.model(x, **inputs)[0]
    torch.testing.assert_close(pipe.transformer(x, **inputs)[0], 2 * tuned - base, rtol=1e-4, atol=1e-4)
    guide.unload()
    assert set(pipe.transformer.state_dict()) == keys
    torch.testing.assert_close(pipe.transformer(x, **inputs)[0], base)


# --- the user's own LoRAs


def with_style(network: nn.Module) -> None:
    """The aligned adapter beside the style, both active."""
    aligned(network)
    network.set_adapters(["style", "aligned"])


@pytest.mark.parametrize("first", ["style", "guide"])
def test_a_style_is_in_both_passes(
    first: str, sd3_pipe: Any, lora_files: dict[str, Path], tiny_folder: Folder
) -> None:
    reference = load(tiny_folder("sd3"))
    reference.load_lora_weights(lora_files["style"], adapter_name="style")
    style_alone, expected = image(reference), by_hand(reference, with_style)
    if first == "style":
        sd3_pipe.load_lora_weights(lora_files["style"], adapter_name="style")
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], W)
    if first == "guide":
        sd3_pipe.load_lora_weights(lora_files["style"], adapter_name="style")
        sd3_pipe.set_adapters(["default", "style"])
    torch.testing.assert_close(image(sd3_pipe), expected, **ULPS)
    guide.scale = 0
    torch.testing.assert_close(image(sd3_pipe), style_alone, **ULPS)
    guide.scale = W
    sd3_pipe.set_adapters(["style"], [0.5])  # the guide's own adapter is its own to switch
    reference.set_adapters(["style"], [0.5])
    half = by_hand(reference, lambda network: (aligned(network), network.set_adapters(["style", "aligned"], [0.5, 1])))
    torch.testing.assert_close(image(sd3_pipe), half, **ULPS)
    guide.unload()
    assert lora.names_of(sd3_pipe.transformer) == ["style"]
    torch.testing.assert_close(image(sd3_pipe), image(reference), **ULPS)


def test_a_style_that_is_fused(sd3_pipe: Any, lora_files: dict[str, Path], tiny_folder: Folder) -> None:
    reference = load(tiny_folder("sd3"))
    reference.load_lora_weights(lora_files["style"], adapter_name="style")
    expected = by_hand(reference, with_style)
    sd3_pipe.load_lora_weights(lora_files["style"], adapter_name="style")
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], W)
    sd3_pipe.fuse_lora(adapter_names=["style"])
    torch.testing.assert_close(image(sd3_pipe), expected, **ULPS)
    sd3_pipe.unfuse_lora()
    torch.testing.assert_close(image(sd3_pipe), expected, **ULPS)
    for names in (None, ["style", guide_adapter(guide)]):
        with pytest.raises(ValueError, match="is guided, and can't be switched off when fused"):
            sd3_pipe.fuse_lora(adapter_names=names)
    torch.testing.assert_close(image(sd3_pipe), expected, **ULPS)


def guide_adapter(guide: rlg.Guide) -> str:
    (network,) = guide.networks.values()
    return guided(network).switch.names[0]


def test_a_style_on_the_same_layers_that_is_fused(
    sd3_pipe: Any, lora_files: dict[str, Path], tiny_folder: Folder
) -> None:
    """PEFT passes by all adapters of a layer into which one is fused."""
    reference = load(tiny_folder("sd3"))
    add_random_lora(reference.transformer, "style", ("attn.to_q",), seed=2)
    expected = by_hand(reference, with_style)
    add_random_lora(sd3_pipe.transformer, "style", ("attn.to_q",), seed=2)
    rlg.apply(sd3_pipe, lora_files["aligned"], W)
    sd3_pipe.fuse_lora(adapter_names=["style"])
    torch.testing.assert_close(image(sd3_pipe), expected, **ULPS)


def test_merging_behind_the_back(sd3_pipe: Any, lora_files: dict[str, Path]) -> None:
    rlg.apply(sd3_pipe, lora_files["aligned"], W)
    lora.layers(sd3_pipe.transformer)[0].merge()
    with pytest.raises(ValueError, match="'default' is fused and can't be switched"):
        image(sd3_pipe)


def test_unloading_and_loading_again(sd3_pipe: Any, lora_files: dict[str, Path], guided_latents: Tensor) -> None:
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], W)
    sd3_pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=r"'default' is no longer attached; call guide.remove\(\)"):
        image(sd3_pipe)
    sd3_pipe.load_lora_weights(lora_files["aligned"], adapter_name="default")
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    sd3_pipe.unload_lora_weights()
    rlg.apply(sd3_pipe, lora_files["aligned"], W)  # takes the place of the guide that has nothing to guide
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    guide.remove()  # no longer there, and leaves the other alone
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)


def test_hot_swapping(sd3_pipe: Any, lora_files: dict[str, Path], guided_latents: Tensor, tmp_path: Path) -> None:
    network = copy.deepcopy(sd3_pipe.transformer)
    add_random_lora(network, "aligned", ("attn.to_q", "attn.to_v"), seed=7)
    rlg.apply(sd3_pipe, save(network, tmp_path), W)
    assert (image(sd3_pipe) - guided_latents).abs().max() > 0.1
    sd3_pipe.load_lora_weights(lora_files["aligned"], adapter_name="default", hotswap=True)
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)


def test_fused_projections_are_refused(sd3_pipe: Any, lora_files: dict[str, Path], guided_latents: Tensor) -> None:
    rlg.apply(sd3_pipe, lora_files["aligned"], W)
    sd3_pipe.transformer.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"attn is fused without the adapter of its parts; call unfuse_qkv"):
        image(sd3_pipe)
    sd3_pipe.transformer.unfuse_qkv_projections()
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
