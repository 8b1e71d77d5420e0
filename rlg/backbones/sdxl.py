"""Stable Diffusion XL: a UNet with two text encoders, a pooled embedding and micro-conditioning on sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlg.backbones.base import Backbone, Conditioning
from rlg.backbones.sd import UNET_LORA_TARGETS


def encode(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """Hidden states, pooled embedding and time ids (original size = target size, no crop).

    The empty prompt is zeros where the pipeline's config says so, as in its own classifier-free guidance.
    """
    device = pipe.text_encoder.device
    embeds, _, pooled, _ = pipe.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
    if pipe.config.force_zeros_for_empty_prompt:
        empty_B = torch.tensor([not prompt for prompt in prompts], device=device)
        embeds, pooled = embeds.masked_fill(empty_B[:, None, None], 0), pooled.masked_fill(empty_B[:, None], 0)
    side = pipe.default_sample_size * pipe.vae_scale_factor
    time_ids = torch.tensor([side, side, 0, 0, side, side], dtype=pooled.dtype, device=pooled.device)
    return Conditioning(
        {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids.expand(len(pooled), 6)}
    )


def forward(network: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    """One evaluation of the network."""
    embeds = cond.tensors["encoder_hidden_states"]
    added = {"text_embeds": cond.tensors["text_embeds"], "time_ids": cond.tensors["time_ids"]}
    return network(x_BCHW.to(embeds.dtype), t_B, embeds, added_cond_kwargs=added, return_dict=False)[0]


def with_sizes(cond: Conditioning, sizes_B2: Tensor, crops_B2: Tensor, side: int) -> Conditioning:
    """Time ids (original height, width, crop top, left, target height, width), as SDXL was trained."""
    target_B2 = torch.full_like(sizes_B2, side)
    time_ids = torch.cat([sizes_B2, crops_B2, target_B2], dim=1).to(cond.tensors["time_ids"])
    return Conditioning(cond.tensors | {"time_ids": time_ids})


BACKBONE = Backbone(
    "unet", ("text_encoder", "text_encoder_2"), UNET_LORA_TARGETS, encode, forward, with_sizes=with_sizes
)
