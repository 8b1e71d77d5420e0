"""Published architectures with random weights.

Speed and memory are those of the real model, without a download. The numbers are the config.json files of
stabilityai/stable-diffusion-3.5-medium, stable-diffusion-v1-5 and stabilityai/stable-diffusion-xl-base-1.0. Tokenizers
are stand-ins: captions come out as other tokens, padded to the real lengths. Every scheduler is the one whose table
`rlg.diffusion.process` makes. NAME-tiny has the same config keys with fewer and narrower layers, for tests on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from rlg.models.loading import DTYPES
from rlg.models.policy import Policy
from rlg.tinyworld.networks import build_tokenizer

Config = Mapping[str, Any]

_CLIP_TOKENS = 77
_LORA_STD = 0.01  # std of B, so that base and tuned model differ
_SD_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


@dataclass(frozen=True)
class Architecture:
    """Content of the config files of a pipeline."""

    # (architecture, autoencoder, tokenizer, with T5) -> pipeline
    assemble: Callable[[Architecture, AutoencoderKL, CLIPTokenizer, bool], DiffusionPipeline]
    denoiser: Config
    vae: Config
    clips: tuple[Config, ...]  # CLIP text encoders, in the pipeline's order
    t5: Config | None = None


def _clip(width: int, layers: int, heads: int, act: str, projection: int | None = None) -> Config:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": act,
        "projection_dim": projection or width,
        "vocab_size": 49408,
        "max_position_embeddings": _CLIP_TOKENS,
    }


def _vae(channels: int, side: int, scaling: float, shift: float | None = None, width: int = 128) -> Config:
    widths = (width, 2 * width, 4 * width, 4 * width)
    return {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": 2 if width > 32 else 1,
        "latent_channels": channels,
        "norm_num_groups": 32 if width > 32 else 8,
        "sample_size": side,
        "scaling_factor": scaling,
        "shift_factor": shift,
        "use_quant_conv": shift is None,
        "use_post_quant_conv": shift is None,
    }


def _joint_transformer(
    layers: int, heads: int, head: int, dual: int, side: int, text: int, pooled: int, positions: int = 384
) -> Config:
    return {
        "sample_size": side,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": layers,
        "attention_head_dim": head,
        "num_attention_heads": heads,
        "joint_attention_dim": text,
        "caption_projection_dim": heads * head,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": positions,
        "dual_attention_layers": tuple(range(dual)),
        "qk_norm": "rms_norm",
    }


def _unet(widths: tuple[int, ...], attends: tuple[bool, ...], side: int, text: int, **extra: Any) -> Config:
    """Config of a U-Net.

    attends: for each level, from the finest, whether it cross-attends.
    """
    down = tuple("CrossAttnDownBlock2D" if each else "DownBlock2D" for each in attends)
    up = tuple("CrossAttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends))
    sizes = {"sample_size": side, "in_channels": 4, "out_channels": 4, "layers_per_block": 2}
    blocks = {"block_out_channels": widths, "down_block_types": down, "up_block_types": up}
    return {**sizes, **blocks, "cross_attention_dim": text, **extra}


def _text(config: Config, tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return CLIPTextConfig(**config, **ends)


def _sd(arch: Architecture, vae: AutoencoderKL, tokenizer: CLIPTokenizer, t5: bool) -> DiffusionPipeline:
    unet, scheduler = UNet2DConditionModel(**arch.denoiser), DDIMScheduler(**_SD_SCHEDULER)
    clip = CLIPTextModel(_text(arch.clips[0], tokenizer))
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(vae, clip, tokenizer, unet, scheduler, **absent)


def _sdxl(arch: Architecture, vae: AutoencoderKL, tokenizer: CLIPTokenizer, t5: bool) -> DiffusionPipeline:
    unet, scheduler = UNet2DConditionModel(**arch.denoiser), DDIMScheduler(**_SD_SCHEDULER)
    first = CLIPTextModel(_text(arch.clips[0], tokenizer))
    second = CLIPTextModelWithProjection(_text(arch.clips[1], tokenizer))
    clips = first, second, tokenizer, tokenizer
    return StableDiffusionXLPipeline(vae, *clips, unet, scheduler, add_watermarker=False)


def _sd3(arch: Architecture, vae: AutoencoderKL, tokenizer: CLIPTokenizer, t5: bool) -> DiffusionPipeline:
    first, second = (CLIPTextModelWithProjection(_text(clip, tokenizer)) for clip in arch.clips)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -1.0)]
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**arch.denoiser),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(T5Config(**arch.t5)) if t5 else None,
        tokenizer_3=T5TokenizerFast(vocab=vocabulary, extra_ids=0) if t5 else None,
    )


_XL_ADDED = {"addition_embed_type": "text_time", "use_linear_projection": True}
_T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_CLIP_L, _CLIP_G = _clip(768, 12, 12, "quick_gelu"), _clip(1280, 32, 20, "gelu")
_CLIP_TINY = _clip(32, 2, 4, "gelu")
ARCHITECTURES = {
    "sd35-medium": Architecture(
        _sd3,
        _joint_transformer(layers=24, heads=24, head=64, dual=13, side=128, text=4096, pooled=2048),
        _vae(16, 1024, 1.5305, 0.0609),
        (_CLIP_L, _CLIP_G),
        _T5_XXL,
    ),
    "sd15": Architecture(
        _sd,
        _unet((320, 640, 1280, 1280), (True, True, True, False), 64, 768, attention_head_dim=8),
        _vae(4, 512, 0.18215),
        (_CLIP_L,),
    ),
    "sdxl": Architecture(
        _sdxl,
        _unet(
            (320, 640, 1280),
            (False, True, True),
            128,
            2048,
            attention_head_dim=(5, 10, 20),
            transformer_layers_per_block=(1, 2, 10),
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=6 * 256 + 1280,
            **_XL_ADDED,
        ),
        _vae(4, 1024, 0.13025),
        (_CLIP_L, _CLIP_G),
    ),
    "sd35-medium-tiny": Architecture(
        _sd3,
        _joint_transformer(layers=3, heads=2, head=16, dual=1, side=16, text=64, pooled=64, positions=16),
        _vae(16, 128, 1.5305, 0.0609, width=16),
        (_CLIP_TINY, _CLIP_TINY),
        {**_T5_XXL, "vocab_size": 64, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 4},
    ),
    "sd15-tiny": Architecture(
        _sd,
        _unet((32, 32, 64, 64), (True, True, True, False), 16, 32, attention_head_dim=4, norm_num_groups=16),
        _vae(4, 128, 0.18215, width=16),
        (_CLIP_TINY,),
    ),
    "sdxl-tiny": Architecture(
        _sdxl,
        _unet(
            (32, 32, 64),
            (False, True, True),
            16,
            64,
            attention_head_dim=(1, 2, 4),
            transformer_layers_per_block=(1, 1, 2),
            addition_time_embed_dim=16,
            projection_class_embeddings_input_dim=6 * 16 + 32,
            norm_num_groups=16,
            **_XL_ADDED,
        ),
        _vae(4, 128, 0.13025, width=16),
        (_CLIP_TINY, _CLIP_TINY),
    ),
}


def random_policy(
    arch: str,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    lora_rank: int = 32,
    t5: bool = True,
    seed: int = 0,
) -> Policy:
    """A policy of a published architecture, with random weights.

    It has a LoRA that is not zero (rank, alpha 2x). t5: whether SD3 gets its third text encoder, of 4.8 billion
    weights. Without it its 256 tokens are zero, and collapsed to one (`rlg.models.backbones.sd3`), which is a cheaper
    network. Raises ValueError for an unknown architecture or dtype.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known: {', '.join(ARCHITECTURES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if lora_rank < 1:
        raise ValueError(f"the rank of the LoRA must be at least 1, got {lora_rank}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with _made_as(DTYPES[dtype], device):
            pipe = build(ARCHITECTURES[arch], t5)
        pipe.set_progress_bar_config(disable=True)
        policy = Policy(pipe.to(device, DTYPES[dtype]), arch)
        for parameter in policy.add_lora(lora_rank, 2 * lora_rank):
            if not parameter.any():
                nn.init.normal_(parameter, std=_LORA_STD)
    return policy


@contextmanager
def _made_as(dtype: torch.dtype, device: torch.device | str) -> Iterator[None]:
    """Make modules in this precision and place, for the block.

    They are never first in fp32, nor first on the CPU.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(arch: Architecture, t5: bool = True) -> DiffusionPipeline:
    """A randomly initialised pipeline; seed torch first."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = _CLIP_TOKENS
    return arch.assemble(arch, AutoencoderKL(**arch.vae), tokenizer, t5)
