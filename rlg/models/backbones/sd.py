"""Stable Diffusion 1.x / 2.x: a UNet with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from rlg.diffusion.conditioning import Conditioning
from rlg.models.backbones.base import Backbone

UNET_LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")  # source: trl and diffusers' DPO example


def encode(pipe: Any, prompts: Sequence[str]) -> Conditioning:
    """CLIP's last hidden states, as StableDiffusionPipeline passes them."""
    embeds, _ = pipe.encode_prompt(list(prompts), pipe.text_encoder.device, 1, do_classifier_free_guidance=False)
    return Conditioning({"encoder_hidden_states": embeds})


def forward(network: nn.Module, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    """One evaluation of the network."""
    dtype = cond.tensors["encoder_hidden_states"].dtype
    return network(x_BCHW.to(dtype), t_B, return_dict=False, **cond.tensors)[0]


BACKBONE = Backbone("unet", ("text_encoder",), UNET_LORA_TARGETS, encode, forward)
