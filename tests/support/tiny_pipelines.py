"""Tiny random pipelines of diffusers, with inputs for a seeded run of a few steps on the CPU.

Text encoders are left out: prompts are given as embeddings. Every weight is drawn anew, since some networks begin with
zeros (which hide what is behind them) or with memory that is not initialised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

BATCH, TOKENS, WIDTH = 2, 5, 16
ATTENTION = ("to_q", "to_k", "to_v")


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline, the inputs of a call, and what a LoRA may change in it."""

    name: str
    build: Callable[[], Any]
    call: Callable[[], dict[str, Any]]  # fresh keyword arguments: generators have a state
    targets: tuple[str, ...] = ATTENTION
    denoisers: tuple[str, ...] = ("transformer",)


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def generators(count: int = BATCH) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(i) for i in range(count)]


def network(kind: type[nn.Module], seed: int = 0, **config: Any) -> Any:
    """A network with every weight drawn anew, in fp32."""
    net = kind(**config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in net.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        fan_in = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 100
        is_scale = parameter.ndim == 1 and name.endswith("weight")
        parameter.data = float(is_scale) + noise * fan_in**-0.5
    return net


def vae(channels: int = 4, **config: Any) -> Any:
    """An autoencoder whose latents are as large as the image."""
    return network(
        diffusers.AutoencoderKL, latent_channels=channels, block_out_channels=(8,), norm_num_groups=4, **config
    )


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def without_text(kind: type, *names: str, **parts: Any) -> Any:
    """A pipeline with None for its text encoders and tokenizers, and for the other parts of these names."""
    absent = dict.fromkeys(("text_encoder", "tokenizer", *names))
    return quiet(kind(**absent, **parts))


def call(steps: int = 2, count: int = BATCH, **options: Any) -> dict[str, Any]:
    return {"num_inference_steps": steps, "generator": generators(count), "output_type": "latent", **options}


def prompts(count: int = BATCH, width: int = WIDTH, negative: bool = True, **more: Any) -> dict[str, Any]:
    """Embeddings of prompts (count, TOKENS, width), and of negative ones."""
    found = {"prompt_embeds": randn(count, TOKENS, width, seed=2)}
    if negative:
        found["negative_prompt_embeds"] = randn(count, TOKENS, width, seed=3)
    return found | more


def pooled(width: int = 8, negative: bool = True) -> dict[str, Tensor]:
    found = {"pooled_prompt_embeds": randn(BATCH, width, seed=4)}
    return found | ({"negative_pooled_prompt_embeds": randn(BATCH, width, seed=5)} if negative else {})


def masks(tokens: int = TOKENS) -> dict[str, Tensor]:
    """Attention masks of prompts and negative prompts, the second of which ends early."""
    mask = torch.ones(BATCH, tokens, dtype=torch.long)
    shorter = mask.clone()
    shorter[:, -1] = 0
    return {"prompt_attention_mask": mask, "negative_prompt_attention_mask": shorter}


def image(size: int, seed: int = 6) -> Tensor:
    return torch.rand(BATCH, 3, size, size, generator=torch.Generator().manual_seed(seed))


# Stable Diffusion and its kin

UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def vp_scheduler(kind: type = diffusers.DDIMScheduler, **config: Any) -> Any:
    return kind.from_config({"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1} | config)


def sd(kind: type = diffusers.StableDiffusionPipeline, scheduler: Any = None, **parts: Any) -> Any:
    unet = parts.pop("unet", None) or network(diffusers.UNet2DConditionModel, **UNET)
    return without_text(
        kind,
        "safety_checker",
        "feature_extractor",
        requires_safety_checker=False,
        vae=vae(),
        unet=unet,
        scheduler=scheduler or vp_scheduler(),
        **parts,
    )


def sd_call(**options: Any) -> dict[str, Any]:
    return call(guidance_scale=3.0) | prompts() | options


def sd_inpaint() -> Any:
    unet = network(diffusers.UNet2DConditionModel, **UNET | {"in_channels": 9})
    return sd(diffusers.StableDiffusionInpaintPipeline, unet=unet)


def sd_controlnet() -> Any:
    shared = {k: v for k, v in UNET.items() if k not in ("sample_size", "up_block_types")}
    control = network(diffusers.ControlNetModel, seed=1, conditioning_embedding_out_channels=(4,), **shared)
    return sd(diffusers.StableDiffusionControlNetPipeline, controlnet=control)


def sd_ip_adapter() -> Any:
    """Cross-attention to the tokens of an image, put in by attention processors."""
    pipe = sd()
    layers = [name for name in pipe.unet.attn_processors if "attn2" in name]
    widths = [pipe.unet.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in layers]
    keys = {
        f"{2 * i + 1}.{kind}_ip.weight": randn(width, WIDTH, seed=10 + i) * WIDTH**-0.5
        for i, width in enumerate(widths)
        for kind in ("to_k", "to_v")
    }
    projection = {
        "proj.weight": randn(4 * WIDTH, 8, seed=20),
        "proj.bias": randn(4 * WIDTH, seed=21),
        "norm.weight": torch.ones(WIDTH),
        "norm.bias": torch.zeros(WIDTH),
    }
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": keys}])
    return pipe


def latent_consistency() -> Any:
    unet = network(diffusers.UNet2DConditionModel, **UNET | {"time_cond_proj_dim": 8})
    return sd(diffusers.LatentConsistencyModelPipeline, vp_scheduler(diffusers.LCMScheduler), unet=unet)


def sdxl(kind: type = diffusers.StableDiffusionXLPipeline) -> Any:
    extra = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = network(diffusers.UNet2DConditionModel, **UNET, **extra, projection_class_embeddings_input_dim=32)
    absent = ("text_encoder_2", "tokenizer_2")
    return without_text(kind, *absent, vae=vae(), unet=unet, scheduler=vp_scheduler(diffusers.EulerDiscreteScheduler))


def animatediff() -> Any:
    unet = network(diffusers.UNet2DConditionModel, **UNET)
    motion = {"motion_layers_per_block": 1, "motion_num_attention_heads": 2, "motion_norm_num_groups": 4}
    adapter = network(diffusers.MotionAdapter, seed=1, block_out_channels=UNET["block_out_channels"], **motion)
    return without_text(
        diffusers.AnimateDiffPipeline, vae=vae(), unet=unet, motion_adapter=adapter, scheduler=vp_scheduler()
    )


# Transformers of images

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
SD3 = HEADS | {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 8,
}


def sd3(kind: type = diffusers.StableDiffusion3Pipeline, **parts: Any) -> Any:
    absent = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    transformer = network(diffusers.SD3Transformer2DModel, **SD3)
    return without_text(kind, *absent, vae=vae(shift_factor=0.0), transformer=transformer, scheduler=FLOW(), **parts)


def sd3_controlnet() -> Any:
    config = SD3 | {"num_layers": 1}
    return sd3(
        diffusers.StableDiffusion3ControlNetPipeline, controlnet=network(diffusers.SD3ControlNetModel, 1, **config)
    )


def sd3_call(**options: Any) -> dict[str, Any]:
    return call(guidance_scale=3.0) | prompts() | pooled() | options


FLUX = HEADS | {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "joint_attention_dim": WIDTH,
    "axes_dims_rope": (4, 2, 2),
}


def flux(kind: type = diffusers.FluxPipeline) -> Any:
    absent = ("text_encoder_2", "tokenizer_2")
    transformer = network(diffusers.FluxTransformer2DModel, **FLUX, pooled_projection_dim=8, guidance_embeds=True)
    return without_text(kind, *absent, vae=vae(shift_factor=0.0), transformer=transformer, scheduler=FLOW())


def flux_call(**options: Any) -> dict[str, Any]:
    return call(height=8, width=8) | prompts(negative=False) | pooled(negative=False) | options


def flux2_klein() -> Any:
    config = FLUX | {"axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 16, "guidance_embeds": False}
    transformer = network(diffusers.Flux2Transformer2DModel, **config)
    autoencoder = network(
        diffusers.AutoencoderKLFlux2,
        latent_channels=4,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        layers_per_block=1,
    )
    return without_text(diffusers.Flux2KleinPipeline, vae=autoencoder, transformer=transformer, scheduler=FLOW())


def chroma() -> Any:
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = network(diffusers.ChromaTransformer2DModel, **FLUX, **approximator)
    return without_text(diffusers.ChromaPipeline, vae=vae(shift_factor=0.0), transformer=transformer, scheduler=FLOW())


def qwen_image() -> Any:
    config = HEADS | {"in_channels": 16, "out_channels": 4, "num_layers": 2, "joint_attention_dim": WIDTH}
    transformer = network(diffusers.QwenImageTransformer2DModel, **config, axes_dims_rope=(4, 2, 2))
    return without_text(diffusers.QwenImagePipeline, vae=None, transformer=transformer, scheduler=FLOW())


def qwen_call(**options: Any) -> dict[str, Any]:
    mask = torch.ones(BATCH, TOKENS)
    given = prompts(prompt_embeds_mask=mask, negative_prompt_embeds_mask=mask)
    return call(height=64, width=64, true_cfg_scale=3.0) | given | options


def z_image() -> Any:
    config = {"in_channels": 4, "dim": 16, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    rope = {"axes_dims": [4, 2, 2], "axes_lens": [64, 32, 32]}
    transformer = network(diffusers.ZImageTransformer2DModel, **config, **rope, cap_feat_dim=WIDTH)
    return without_text(
        diffusers.ZImagePipeline, vae=vae(shift_factor=0.0), transformer=transformer, scheduler=FLOW(shift=3.0)
    )


def z_image_call(**options: Any) -> dict[str, Any]:
    given = {name: list(embeds.unbind()) for name, embeds in prompts().items()}
    return call(height=8, width=8, guidance_scale=3.0) | given | options


def sana() -> Any:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    config = HEADS | cross | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 8}
    transformer = network(diffusers.SanaTransformer2DModel, **config, caption_channels=WIDTH)
    flow = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return without_text(diffusers.SanaPipeline, vae=None, transformer=transformer, scheduler=flow)


def pixart_sigma() -> Any:
    config = HEADS | {"sample_size": 8, "num_layers": 2, "cross_attention_dim": 16, "caption_channels": WIDTH}
    transformer = network(diffusers.PixArtTransformer2DModel, **config)
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return without_text(diffusers.PixArtSigmaPipeline, vae=vae(), transformer=transformer, scheduler=scheduler)


def masked_call(size: int, **options: Any) -> dict[str, Any]:
    size_and_cfg = {"height": size, "width": size, "guidance_scale": 3.0}
    return call(**size_and_cfg) | prompts() | masks() | options


def aura_flow() -> Any:
    config = HEADS | {"sample_size": 8, "num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 16}
    text = {"joint_attention_dim": WIDTH, "caption_projection_dim": 16}
    transformer = network(diffusers.AuraFlowTransformer2DModel, **config, **text)
    return without_text(diffusers.AuraFlowPipeline, vae=vae(), transformer=transformer, scheduler=FLOW())


def lumina2() -> Any:
    config = {"sample_size": 8, "in_channels": 4, "hidden_size": 16, "num_layers": 1, "num_refiner_layers": 1}
    heads = {"num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16}
    rope = {"axes_dim_rope": (4, 2, 2), "axes_lens": (64, 32, 32)}
    transformer = network(diffusers.Lumina2Transformer2DModel, **config, **heads, **rope, cap_feat_dim=WIDTH)
    return without_text(diffusers.Lumina2Pipeline, vae=None, transformer=transformer, scheduler=FLOW())


def hunyuan_dit() -> Any:
    config = HEADS | {"sample_size": 8, "in_channels": 4, "patch_size": 2, "hidden_size": 16, "num_layers": 4}
    text = {"cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 8}
    lengths = {"text_len": TOKENS, "text_len_t5": TOKENS, "use_style_cond_and_image_meta_size": False}
    transformer = network(diffusers.HunyuanDiT2DModel, **config, **text, **lengths)
    return without_text(
        diffusers.HunyuanDiTPipeline,
        "safety_checker",
        "feature_extractor",
        vae=vae(),
        transformer=transformer,
        scheduler=vp_scheduler(diffusers.DDPMScheduler),
        requires_safety_checker=False,
    )


def hunyuan_dit_call() -> dict[str, Any]:
    both = prompts() | masks()
    return masked_call(16, use_resolution_binning=False) | {f"{name}_2": value for name, value in both.items()}


def cogview4() -> Any:
    config = HEADS | {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": WIDTH}
    time = {"time_embed_dim": 8, "condition_dim": 4, "sample_size": 8, "rope_axes_dim": (8, 8)}
    transformer = network(diffusers.CogView4Transformer2DModel, **config, **time)
    return without_text(diffusers.CogView4Pipeline, vae=vae(), transformer=transformer, scheduler=FLOW())


def kandinsky3() -> Any:
    config = {"block_out_channels": (8, 16), "layers_per_block": 3, "groups": 2, "attention_head_dim": 4}
    unet = network(
        diffusers.Kandinsky3UNet, **config, time_embedding_dim=8, cross_attention_dim=8, encoder_hid_dim=WIDTH
    )
    movq = network(diffusers.VQModel, block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    scheduler = vp_scheduler(diffusers.DDPMScheduler)
    return without_text(diffusers.Kandinsky3Pipeline, unet=unet, movq=movq, scheduler=scheduler)


def kandinsky3_call() -> dict[str, Any]:
    renamed = {name.removeprefix("prompt_").replace("_prompt_", "_"): mask for name, mask in masks().items()}
    return sd_call(height=8, width=8) | renamed


def stable_cascade_prior() -> Any:
    """A pipeline whose denoiser has another name."""
    prior = nn.Linear(1, 1)
    absent = ("feature_extractor", "image_encoder")
    return without_text(
        diffusers.StableCascadePriorPipeline, *absent, prior=prior, scheduler=diffusers.DDPMWuerstchenScheduler()
    )


def records(*records: TinyPipeline) -> Mapping[str, TinyPipeline]:
    return {record.name: record for record in records}


_UNET = {"denoisers": ("unet",)}
_NO_BINS = {"negative_prompt": None, "use_resolution_binning": False}
IMAGES = records(
    TinyPipeline("sd", sd, sd_call, **_UNET),
    TinyPipeline(
        "sd_img2img",
        lambda: sd(diffusers.StableDiffusionImg2ImgPipeline),
        lambda: sd_call(image=image(8), strength=0.7, num_inference_steps=3),
        **_UNET,
    ),
    TinyPipeline(
        "sd_inpaint",
        sd_inpaint,
        lambda: sd_call(image=image(8), mask_image=(image(8, seed=7)[:, :1] > 0.5).float(), height=8, width=8),
        **_UNET,
    ),
    TinyPipeline("sd_controlnet", sd_controlnet, lambda: sd_call(image=image(8)), **_UNET),
    TinyPipeline(
        "sd_pag",
        lambda: sd(diffusers.StableDiffusionPAGPipeline, pag_applied_layers="mid"),
        lambda: sd_call(pag_scale=2.0),
        **_UNET,
    ),
    TinyPipeline(
        "sd_ip_adapter",
        sd_ip_adapter,
        lambda: sd_call(ip_adapter_image_embeds=[randn(2 * BATCH, 1, 8, seed=8)]),
        **_UNET,
    ),
    TinyPipeline("latent_consistency", latent_consistency, lambda: call() | prompts(negative=False), **_UNET),
    TinyPipeline("sdxl", sdxl, lambda: sd3_call(height=8, width=8), **_UNET),
    TinyPipeline(
        "sdxl_img2img",
        lambda: sdxl(diffusers.StableDiffusionXLImg2ImgPipeline),
        lambda: sd3_call(image=image(8), strength=0.7, num_inference_steps=3),
        **_UNET,
    ),
    TinyPipeline("animatediff", animatediff, lambda: sd_call(num_frames=2), **_UNET),
    TinyPipeline("kandinsky3", kandinsky3, kandinsky3_call, **_UNET),
    TinyPipeline("sd3", sd3, sd3_call),
    TinyPipeline(
        "sd3_img2img",
        lambda: sd3(diffusers.StableDiffusion3Img2ImgPipeline),
        lambda: sd3_call(image=image(8), strength=0.7, num_inference_steps=3),
    ),
    TinyPipeline("sd3_controlnet", sd3_controlnet, lambda: sd3_call(control_image=image(8))),
    TinyPipeline("flux", flux, flux_call),
    TinyPipeline(
        "flux_img2img",
        lambda: flux(diffusers.FluxImg2ImgPipeline),
        lambda: flux_call(image=image(8), strength=0.7, num_inference_steps=3),
    ),
    TinyPipeline(
        "flux_kontext",
        lambda: flux(diffusers.FluxKontextPipeline),
        lambda: flux_call(image=image(8), max_area=64, _auto_resize=False),
    ),
    TinyPipeline("flux2_klein", flux2_klein, lambda: call(height=8, width=8, guidance_scale=3.0) | prompts()),
    TinyPipeline("chroma", chroma, lambda: masked_call(8) | {name: mask.bool() for name, mask in masks().items()}),
    TinyPipeline("qwen_image", qwen_image, qwen_call),
    TinyPipeline("z_image", z_image, z_image_call),
    TinyPipeline("sana", sana, lambda: masked_call(256, **_NO_BINS)),
    TinyPipeline("pixart_sigma", pixart_sigma, lambda: masked_call(8, **_NO_BINS)),
    TinyPipeline("aura_flow", aura_flow, lambda: masked_call(8)),
    TinyPipeline("lumina2", lumina2, lambda: masked_call(64)),
    TinyPipeline("hunyuan_dit", hunyuan_dit, hunyuan_dit_call),
    TinyPipeline("cogview4", cogview4, lambda: call(height=16, width=16, guidance_scale=3.0) | prompts()),
)
