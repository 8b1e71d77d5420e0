"""Tiny random pipelines of video and sound; see `tests.support.tiny_pipelines`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.pipelines.ltx2 import LTX2TextConnectors

from tests.support.tiny_pipelines import (
    BATCH,
    FLOW,
    HEADS,
    TOKENS,
    WIDTH,
    TinyPipeline,
    call,
    image,
    masks,
    network,
    pooled,
    prompts,
    records,
    without_text,
)


def wan_transformer(seed: int = 0) -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "ffn_dim": 16, "freq_dim": 16}
    return network(diffusers.WanTransformer3DModel, seed, **config, text_dim=WIDTH, rope_max_seq_len=32)


def wan(experts: int = 1, **config: Any) -> Any:
    flow = diffusers.UniPCMultistepScheduler(flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True)
    second = {"transformer_2": wan_transformer(1), "boundary_ratio": 0.8} if experts == 2 else {}
    return without_text(
        diffusers.WanPipeline, vae=None, transformer=wan_transformer(), scheduler=flow, **second, **config
    )


def video_call(size: int = 32, frames: int = 5, **options: Any) -> dict[str, Any]:
    return call(height=size, width=size, num_frames=frames, guidance_scale=3.0) | prompts() | options


def ltx(kind: type = diffusers.LTXPipeline) -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "cross_attention_dim": 16}
    transformer = network(diffusers.LTXVideoTransformer3DModel, **config, caption_channels=WIDTH)
    autoencoder = None
    if kind is not diffusers.LTXPipeline:
        autoencoder = network(
            diffusers.AutoencoderKLLTXVideo,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        )
    return without_text(kind, vae=autoencoder, transformer=transformer, scheduler=FLOW())


def ltx2_vae() -> Any:
    one = {"latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    layers = {"layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    return network(
        diffusers.AutoencoderKLLTX2Video,
        **one,
        **layers,
        down_block_types=("LTX2VideoDownBlock3D",),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_type=("spatiotemporal",),
        upsample_residual=(False,),
        upsample_factor=(1,),
    )


def ltx2_audio_vae() -> Any:
    config = {"base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "latent_channels": 2, "mel_bins": 8}
    return network(diffusers.AutoencoderKLLTX2Audio, **config, resolution=32)


def ltx2() -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": 16}
    audio = {"audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2}
    heard = {"audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
    transformer = network(diffusers.LTX2VideoTransformer3DModel, **config, **audio, **heard, caption_channels=WIDTH)
    connectors = network(
        LTX2TextConnectors,
        caption_channels=WIDTH,
        text_proj_in_factor=1,
        video_connector_num_attention_heads=2,
        video_connector_attention_head_dim=8,
        video_connector_num_layers=1,
        video_connector_num_learnable_registers=None,
        audio_connector_num_attention_heads=2,
        audio_connector_attention_head_dim=8,
        audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None,
    )
    return without_text(
        diffusers.LTX2Pipeline,
        "vocoder",
        vae=ltx2_vae(),
        audio_vae=ltx2_audio_vae(),
        connectors=connectors,
        transformer=transformer,
        scheduler=FLOW(),
    )


def cogvideox() -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": WIDTH}
    size = {"time_embed_dim": 8, "sample_width": 4, "sample_height": 4, "sample_frames": 5}
    transformer = network(diffusers.CogVideoXTransformer3DModel, **config, **size, max_text_seq_length=TOKENS)
    scheduler = diffusers.CogVideoXDDIMScheduler(clip_sample=False)
    return without_text(diffusers.CogVideoXPipeline, vae=None, transformer=transformer, scheduler=scheduler)


def hunyuan_video() -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1}
    text = {"num_refiner_layers": 1, "text_embed_dim": WIDTH, "pooled_projection_dim": 8, "rope_axes_dim": (4, 2, 2)}
    transformer = network(diffusers.HunyuanVideoTransformer3DModel, **config, **text)
    absent = ("text_encoder_2", "tokenizer_2")
    return without_text(diffusers.HunyuanVideoPipeline, *absent, vae=None, transformer=transformer, scheduler=FLOW())


def mochi() -> Any:
    config = HEADS | {"in_channels": 4, "num_layers": 2, "pooled_projection_dim": 8, "text_embed_dim": WIDTH}
    transformer = network(diffusers.MochiTransformer3DModel, **config, time_embed_dim=8, max_sequence_length=TOKENS)
    return without_text(diffusers.MochiPipeline, vae=None, transformer=transformer, scheduler=FLOW(invert_sigmas=True))


VIDEOS = records(
    TinyPipeline("wan", wan, video_call),
    TinyPipeline(
        "wan_2_experts",
        lambda: wan(2),
        lambda: video_call(num_inference_steps=4),
        denoisers=("transformer", "transformer_2"),
    ),
    TinyPipeline("wan_token_times", lambda: wan(expand_timesteps=True), video_call),
    TinyPipeline("ltx", ltx, lambda: video_call(32, 9) | masks()),
    TinyPipeline(
        "ltx_img2video",
        lambda: ltx(diffusers.LTXImageToVideoPipeline),
        lambda: video_call(32, 9, image=image(32)) | masks(),
    ),
    TinyPipeline("ltx2", ltx2, lambda: video_call(32, 9) | masks()),
    TinyPipeline("cogvideox", cogvideox, video_call),
    TinyPipeline(
        "hunyuan_video",
        hunyuan_video,
        lambda: (
            call(height=32, width=32, num_frames=5, prompt_attention_mask=torch.ones(BATCH, TOKENS))
            | prompts(negative=False)
            | pooled(negative=False)
        ),
    ),
    TinyPipeline("mochi", mochi, lambda: video_call(32, 7) | {name: mask.bool() for name, mask in masks().items()}),
)
