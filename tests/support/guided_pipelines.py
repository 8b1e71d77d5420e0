"""Tiny pipelines and adapters for the tests of rlg.apply, and what guidance of them must give (a pytest plugin)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_align_device_hook
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

from tests.support.by_hand import add_random_lora, copies, guided_by_hand

PROMPTS = ["a red circle", "two blue crosses"]
W = 2.0
ULPS = {"rtol": 1e-3, "atol": 2e-4}  # fp32, w = 2, three steps of a network with CFG: the same sums in another order
STYLE = ("ff.net.0.proj",)

Folder = Callable[[str], Path]


def load(folder: Path) -> Any:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: Any, cfg: float = 3.0, **options: Any) -> Tensor:
    """Final latents of two prompts after three steps."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    fixed = {"num_inference_steps": 3, "guidance_scale": cfg, "generator": generators, "output_type": "latent"}
    return pipe(PROMPTS, **fixed, **options).images


def denoiser(pipe: Any) -> nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def aligned(network: nn.Module) -> None:
    add_random_lora(network, "aligned", ("attn.to_q", "attn.to_v", "attn1.to_q", "attn2.to_v"), std=0.4)


def styled(network: nn.Module) -> None:
    add_random_lora(network, "style", STYLE, seed=2)


def save(network: nn.Module, folder: Path, name: str = "aligned", kind: str = "transformer") -> Path:
    """The adapter of a network as a diffusers file."""
    tensors = get_peft_model_state_dict(network, adapter_name=name)
    pipeline = diffusers.StableDiffusion3Pipeline if kind == "transformer" else diffusers.StableDiffusionPipeline
    pipeline.save_lora_weights(folder, **{f"{kind}_lora_layers": tensors})
    return folder


def by_hand(pipe: Any, tune: Callable[[nn.Module], object] = aligned, w: Any = W, **options: Any) -> Tensor:
    """What guidance of a pipeline's network must give, from two copies of it; the pipeline is as before."""
    network = denoiser(pipe)
    base, tuned = copies(network, tune)
    with guided_by_hand(network, base, tuned, w):
        return image(pipe, **options)


@pytest.fixture
def sd3_pipe(tiny_folder: Folder) -> Any:
    return load(tiny_folder("sd3"))


@pytest.fixture(scope="session")
def lora_files(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of an aligned adapter and of a style, as diffusers writes them."""
    made = {}
    for name, tune in {"aligned": aligned, "style": styled}.items():
        network = load(tiny_folder("sd3")).transformer
        tune(network)
        made[name] = save(network, tmp_path_factory.mktemp(name), name)
    return made


@pytest.fixture(scope="session")
def guided_latents(tiny_folder: Folder) -> Tensor:
    return by_hand(load(tiny_folder("sd3")))


def flux() -> FluxPipeline:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        **sizes,
    ).eval()
    vae = AutoencoderKL(latent_channels=1, norm_num_groups=32)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), vae, None, None, None, None, network)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_image(pipe: FluxPipeline, steps: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    text, pooled = (torch.randn(*shape, generator=generator) for shape in ((1, 8, 32), (1, 32)))
    options = {"height": 16, "width": 16, "num_inference_steps": steps, "output_type": "latent"}
    seed = torch.Generator().manual_seed(0)
    return pipe(prompt_embeds=text, pooled_prompt_embeds=pooled, generator=seed, **options).images


def flux_lora(network: nn.Module) -> None:
    add_random_lora(network, "aligned", ("to_q", "to_k", "to_v", "proj_mlp"), std=0.08)


def save_flux(folder: Path) -> Path:
    """The folder of that LoRA in a diffusers file."""
    network = flux().transformer
    flux_lora(network)
    tensors = get_peft_model_state_dict(network, adapter_name="aligned")
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=tensors)
    return folder


def sequentially(pipe: Any, gpu_id: Any = None, device: Any = None) -> None:
    """diffusers' sequential offload, without accelerate's table of tied weights.

    The table can't be used from CPU to CPU (accelerate 1.15 puts plain tensors in the place of parameters).
    """
    pipe._offload_device = torch.device("cpu")
    for part in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        weights = {name: tensor.detach().clone() for name, tensor in part.state_dict().items()}
        add_hook_to_module(part, AlignDevicesHook(io_same_device=True), append=True)
        attach_align_device_hook(part, execution_device=torch.device("cpu"), offload=True, weights_map=weights)
