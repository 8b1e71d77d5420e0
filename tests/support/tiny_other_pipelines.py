"""More tiny random pipelines of images and video; see `tests.support.tiny_pipelines`."""

from __future__ import annotations

from typing import Any

import diffusers
import torch

from tests.support import tiny_pipelines as tiny
from tests.support.tiny_pipelines import (
    BATCH,
    FLOW,
    FLUX,
    HEADS,
    TOKENS,
    UNET,
    WIDTH,
    TinyPipeline,
    call,
    image,
    network,
    prompts,
    randn,
    records,
    sd_call,
    vae,
    vp_scheduler,
    without_text,
)


def instruct_pix2pix() -> Any:
    """Three branches of CFG: with text and image, with the image alone, with neither."""
    unet = network(diffusers.UNet2DConditionModel, **UNET | {"in_channels": 8})
    return tiny.sd(diffusers.StableDiffusionInstructPix2PixPipeline, unet=unet, image_encoder=None)


def stable_video() -> Any:
    """Its image is given as the embedding that CLIP would make of it."""
    blocks = {
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    }
    size = {"sample_size": 8, "block_out_channels": (32, 64), "layers_per_block": 1, "num_attention_heads": (2, 2)}
    embedded = {"addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12}
    unet = network(diffusers.UNetSpatioTemporalConditionModel, **blocks, **size, **embedded, cross_attention_dim=WIDTH)
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", use_karras_sigmas=True
    )
    autoencoder = network(
        diffusers.AutoencoderKLTemporalDecoder,
        block_out_channels=(32,),
        down_block_types=("DownEncoderBlock2D",),
        layers_per_block=1,
    )
    pipe = diffusers.StableVideoDiffusionPipeline(autoencoder, None, unet, scheduler, None)
    embeds = torch.cat([torch.zeros(BATCH, 1, WIDTH), randn(BATCH, 1, WIDTH)])
    pipe._encode_image = lambda *_: embeds
    return tiny.quiet(pipe)


def dit() -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 8, "num_layers": 2, "sample_size": 8, "norm_num_groups": 4}
    transformer = network(diffusers.DiTTransformer2DModel, **config)
    return tiny.quiet(diffusers.DiTPipeline(transformer, vae(), vp_scheduler()))


def sana_sprint() -> Any:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    config = HEADS | cross | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8}
    more = {"caption_channels": WIDTH, "guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    transformer = network(diffusers.SanaTransformer2DModel, **config, **more)
    return without_text(
        diffusers.SanaSprintPipeline, vae=None, transformer=transformer, scheduler=diffusers.SCMScheduler()
    )


def sana_sprint_call() -> dict[str, Any]:
    mask = {"prompt_attention_mask": torch.ones(BATCH, TOKENS, dtype=torch.long)}
    size = {"height": 256, "width": 256, "use_resolution_binning": False}
    return call(**size) | prompts(negative=False) | mask


def flux_controlnet() -> Any:
    config = FLUX | {"num_layers": 1, "num_single_layers": 0, "pooled_projection_dim": 8, "guidance_embeds": True}
    control = network(diffusers.FluxControlNetModel, seed=1, **config)
    absent = ("text_encoder_2", "tokenizer_2")
    transformer = network(diffusers.FluxTransformer2DModel, **FLUX, pooled_projection_dim=8, guidance_embeds=True)
    parts = {"vae": vae(shift_factor=0.0), "transformer": transformer, "scheduler": FLOW(), "controlnet": control}
    return without_text(diffusers.FluxControlNetPipeline, *absent, **parts)


def flux2_klein_kv() -> Any:
    """Keeps keys and values of the reference image in the first step, for those that follow."""
    parts = {name: part for name, part in tiny.flux2_klein().components.items() if part is not None}
    return without_text(diffusers.Flux2KleinKVPipeline, **{k: v for k, v in parts.items() if k != "is_distilled"})


def ovis_image() -> Any:
    transformer = network(diffusers.OvisImageTransformer2DModel, **FLUX, out_channels=16)
    return without_text(
        diffusers.OvisImagePipeline, vae=vae(shift_factor=0.0), transformer=transformer, scheduler=FLOW()
    )


def lumina() -> Any:
    config = {"sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 2, "num_attention_heads": 2}
    text = {"cross_attention_dim": WIDTH, "multiple_of": 8, "num_kv_heads": 1}
    transformer = network(diffusers.LuminaNextDiT2DModel, **config, **text)
    return without_text(diffusers.LuminaPipeline, vae=vae(), transformer=transformer, scheduler=FLOW())


def hidream() -> Any:
    config = HEADS | {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "patch_size": 2}
    text = {"caption_channels": [WIDTH, WIDTH], "text_emb_dim": 8, "llama_layers": [0, 0]}
    rope = {"axes_dims_rope": (4, 2, 2), "max_resolution": (8, 8), "num_routed_experts": 2, "num_activated_experts": 1}
    transformer = network(diffusers.HiDreamImageTransformer2DModel, **config, **text, **rope)
    absent = [f"{part}_{i}" for part in ("text_encoder", "tokenizer") for i in (2, 3, 4)]
    parts = {"vae": vae(), "transformer": transformer, "scheduler": FLOW()}
    pipe = without_text(diffusers.HiDreamImagePipeline, *absent, **parts)
    pipe.default_sample_size = 16  # it draws images of this size, whatever is asked for
    return pipe


def hidream_call() -> dict[str, Any]:
    t5 = {f"{name}_t5": embeds for name, embeds in prompts().items()}
    llama = {f"{name}_llama3": embeds[None] for name, embeds in prompts().items()}
    return call(height=16, width=16, guidance_scale=3.0) | t5 | llama | tiny.pooled()


def ideogram4() -> Any:
    """Two networks: one for the prompt, one for the branch of CFG without it."""
    config = {"in_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    more = {"intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": WIDTH, "mrope_section": (2, 1, 1)}
    nets = [network(diffusers.Ideogram4Transformer2DModel, seed, **config, **more) for seed in (0, 1)]
    pipe = without_text(
        diffusers.Ideogram4Pipeline,
        vae=vae(),
        transformer=nets[0],
        unconditional_transformer=nets[1],
        scheduler=FLOW(),
    )

    def encode_prompt(grid_h: int, grid_w: int, max_sequence_length: int, **_: Any) -> tuple[Any, ...]:
        ids = pipe._prepare_ids([TOKENS] * BATCH, grid_h, grid_w, max_sequence_length, "cpu")
        return randn(BATCH, max_sequence_length + grid_h * grid_w, WIDTH), *ids

    pipe.encode_prompt = encode_prompt
    return pipe


def ideogram4_call() -> dict[str, Any]:
    size = {"height": 8, "width": 8, "max_sequence_length": TOKENS}
    return call(**size, guidance_scale=3.0, guidance_schedule=None) | {"prompt": ["a red circle", "two blue crosses"]}


def skyreels() -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "ffn_dim": 16, "freq_dim": 16}
    transformer = network(diffusers.SkyReelsV2Transformer3DModel, **config, text_dim=WIDTH, rope_max_seq_len=32)
    flow = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    return without_text(diffusers.SkyReelsV2Pipeline, vae=None, transformer=transformer, scheduler=flow)


_UNET = {"denoisers": ("unet",)}
_MASK = (image(8, seed=7)[:, :1] > 0.5).float()
OTHERS = records(
    TinyPipeline("sd_pix2pix", instruct_pix2pix, lambda: sd_call(image=image(8)), **_UNET),
    TinyPipeline(
        "sdxl_inpaint",
        lambda: tiny.sdxl(diffusers.StableDiffusionXLInpaintPipeline),
        lambda: tiny.sd3_call(image=image(8), mask_image=_MASK, height=8, width=8, strength=0.9),
        **_UNET,
    ),
    TinyPipeline(
        "sdxl_pag",
        lambda: tiny.sdxl(diffusers.StableDiffusionXLPAGPipeline),
        lambda: tiny.sd3_call(height=8, width=8, pag_scale=2.0),
        **_UNET,
    ),
    TinyPipeline(
        "stable_video",
        stable_video,
        lambda: call(image=image(8), height=8, width=8, num_frames=2, max_guidance_scale=3.0),
        **_UNET,
    ),
    TinyPipeline(
        "sd3_pag",
        lambda: tiny.sd3(diffusers.StableDiffusion3PAGPipeline, pag_applied_layers=["transformer_blocks.0"]),
        lambda: tiny.sd3_call(pag_scale=2.0),
    ),
    TinyPipeline(
        "dit",
        dit,
        lambda: {
            "class_labels": [1, 2],
            "num_inference_steps": 2,
            "generator": tiny.generators(),
            "output_type": "np",
        },
    ),
    TinyPipeline("sana_sprint", sana_sprint, sana_sprint_call),
    TinyPipeline("flux_controlnet", flux_controlnet, lambda: tiny.flux_call(control_image=image(8))),
    TinyPipeline("flux2_klein_kv", flux2_klein_kv, lambda: call(height=8, width=8) | prompts(negative=False)),
    TinyPipeline(
        "ovis_image", ovis_image, lambda: call(height=8, width=8, guidance_scale=3.0, negative_prompt=None) | prompts()
    ),
    TinyPipeline("lumina", lumina, lambda: tiny.masked_call(16)),
    TinyPipeline("hidream", hidream, hidream_call),
    TinyPipeline("ideogram4", ideogram4, ideogram4_call, denoisers=("transformer", "unconditional_transformer")),
    TinyPipeline(
        "skyreels_v2", skyreels, lambda: call(height=32, width=32, num_frames=5, guidance_scale=3.0) | prompts()
    ),
)
