"""Stable Diffusion XL: a UNet with micro-conditioning on sizes.

It has two text encoders and a pooled embedding. The sizes are those of the image, which `forward` reads from the
latents. So a conditioning serves images of any size. `with_sizes` sets other sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlg.diffusion.conditioning import Conditioning
from rlg.models.backbones.base import Backbone
from rlg.models.backbones.sd import UNET_LORA_TARGETS


def encode(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """Hidden states, pooled embedding, and pixels a latent.

    The empty prompt is zeros if the pipeline's config says so, as in its own classifier-free guidance.
    """
    device = pipe.text_encoder.device
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        empty_B = torch.tensor([not prompt for prompt in prompts], device=device)
        embeds, pooled = embeds.masked_fill(empty_B[:, None, None], 0), pooled.masked_fill(empty_B[:, None], 0)
    scale = torch.full((len(pooled),), pipe.vae_scale_factor, device=pooled.device)
    return Conditioning({"encoder_hidden_states": embeds, "text_embeds": pooled, "pixels_a_latent": scale})


def forward(network: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    """One evaluation of the network."""
    embeds = cond.tensors["encoder_hidden_states"]
    added = {"text_embeds": cond.tensors["text_embeds"], "time_ids": _time_ids(x_BCHW, cond)}
    return network(x_BCHW.to(embeds.dtype), t_B, embeds, added_cond_kwargs=added, return_dict=False)[0]


def _time_ids(x_BCHW: Tensor, cond: Conditioning) -> Tensor:
    """(B, 6) sizes by `with_sizes`, or else those of the image.

    The image is then neither resized nor cropped, as in diffusers.
    """
    if "time_ids" in cond.tensors:
        return cond.tensors["time_ids"]
    pixels_B = cond.tensors["pixels_a_latent"]
    height_B, width_B = (pixels_B * side for side in x_BCHW.shape[2:])
    none_B = torch.zeros_like(pixels_B)
    rows = [height_B, width_B, none_B, none_B, height_B, width_B]
    return torch.stack(rows, dim=1).to(cond.tensors["text_embeds"])


def with_sizes(cond: Conditioning, sizes_B2: Tensor, crops_B2: Tensor, side: int) -> Conditioning:
    """Conditioning with given time ids, as SDXL was trained.

    They are (original height, width, crop top, left, target height, width).
    """
    target_B2 = torch.full_like(sizes_B2, side)
    time_ids = torch.cat([sizes_B2, crops_B2, target_B2], dim=1).to(cond.tensors["text_embeds"])
    return Conditioning(cond.tensors | {"time_ids": time_ids})


def prepare(pipe: Any) -> None:
    """Use float32 for an autoencoder that overflows in float16.

    StableDiffusionXLPipeline does the same to decode.
    """
    if pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast:
        pipe.vae.to(torch.float32)


BACKBONE = Backbone(
    "unet", ("text_encoder", "text_encoder_2"), UNET_LORA_TARGETS, encode, forward, prepare, with_sizes
)
