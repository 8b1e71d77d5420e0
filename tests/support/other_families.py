"""Two model families that the project does not have, as someone outside would add them: FLUX.1 and PixArt-Sigma.

FLUX.1 packs its latents by 2 x 2, takes a distilled guidance, and shifts its noise levels by the image's size. PixArt
masks its text, predicts a variance that is left out, and has no LoRA files in diffusers. Its record is the one of
docs/extending.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from rlg.diffusion.conditioning import Conditioning
from rlg.models.backbones import Backbone
from rlg.tinyworld import networks
from tests.support.documented import module
from tests.support.tiny_families import TinyFamily

LETTERS = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", -1.0),
    *((letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"),
]
T5 = {"vocab_size": len(LETTERS), "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
SIZES = networks.SIZES["shapes"]
TOKENS = 16  # of T5: enough for a tiny model
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}


def t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    return T5EncoderModel(T5Config(**T5)), T5TokenizerFast(vocab=LETTERS, extra_ids=0)


# --- FLUX.1 -------------------------------------------------------------------------------------------------------


def pack(x_BCHW: Tensor) -> Tensor:
    return diffusers.FluxPipeline._pack_latents(x_BCHW, *x_BCHW.shape)


def flux_encode(pipe: Any, prompts: Sequence[str], t5_length: int = TOKENS) -> Conditioning:
    device = pipe.text_encoder.device
    embeds, pooled, _ = pipe.encode_prompt(list(prompts), device=device, max_sequence_length=t5_length)
    guidance = torch.full((len(pooled),), 3.5, device=device)  # the pipeline's default
    return Conditioning({"encoder_hidden_states": embeds, "pooled_projections": pooled, "guidance": guidance})


def flux_forward(network: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    batch, _, height, width = x_BCHW.shape
    like = {"device": x_BCHW.device, "dtype": x_BCHW.dtype}
    img_ids = diffusers.FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, **like)
    txt_ids = torch.zeros(cond.tensors["encoder_hidden_states"].shape[1], 3, **like)
    inputs = {**cond.tensors, "img_ids": img_ids, "txt_ids": txt_ids, "return_dict": False}
    return diffusers.FluxPipeline._unpack_latents(
        network(pack(x_BCHW), timestep=t_B / 1000, **inputs)[0], height, width, 1
    )


FLUX = Backbone(
    "transformer",
    ("text_encoder", "text_encoder_2"),
    ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    flux_encode,
    flux_forward,
    max_t5_length=512,
    latent_shape=lambda pipe, network, height, width: (network.config.in_channels // 4, height // 8, width // 8),
    image_size=lambda pipe, network: pipe.vae.config.sample_size,
    image_tokens=lambda network, shape: shape[1] * shape[2] // 4,
    sigmas=lambda steps: [1 - i / steps for i in range(steps)],
    pipeline_cfg=lambda scale: {"true_cfg_scale": scale, "negative_prompt": ""},
)


def tiny_flux() -> diffusers.DiffusionPipeline:
    tokenizer = networks.build_tokenizer()
    encoder, spelling = t5()
    transformer = diffusers.FluxTransformer2DModel(
        **HEADS,
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4),
        vae=networks.build_vae(16, SIZES.vae_widths, shifted=True),
        text_encoder=CLIPTextModel(networks._text_config(tokenizer, SIZES.text_width, 1)),
        tokenizer=tokenizer,
        text_encoder_2=encoder,
        tokenizer_2=spelling,
        transformer=transformer,
    )


# --- PixArt-Sigma -------------------------------------------------------------------------------------------------


def tiny_pixart() -> diffusers.DiffusionPipeline:
    encoder, spelling = t5()
    transformer = diffusers.PixArtTransformer2DModel(
        **HEADS, sample_size=8, num_layers=2, cross_attention_dim=32, caption_channels=32
    )
    scheduler = networks._vp_scheduler()
    return diffusers.PixArtSigmaPipeline(
        spelling, encoder, networks.build_vae(4, SIZES.vae_widths, shifted=False), transformer, scheduler
    )


# Name: the pipeline's class, its record, and its tiny pipeline.
OTHERS = {
    "flux": ("FluxPipeline", FLUX, TinyFamily(tiny_flux, pack, {"max_sequence_length": TOKENS})),
    "pixart": (
        "PixArtSigmaPipeline",
        module("rlg/models/backbones/pixart.py").BACKBONE,
        TinyFamily(tiny_pixart, options={"use_resolution_binning": False}),
    ),
}
