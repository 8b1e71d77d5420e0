"""Samples of a base model, and a table of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rlg.diffusion import process, sampling
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.guidance.guided import with_cfg
from rlg.io.pixels import levels
from rlg.models.backbones import backbone_of
from rlg.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a base model is sampled: by the ODE."""

    cfg: float = 1.0
    steps: int = 20
    seed: int = 0
    batch_size: int = 96


@torch.no_grad()
def generate(pipe: Any, prompts: Sequence[Prompt], how: Sampling, quiet: bool = False) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of a pipeline that `Backbone.prepare` has seen."""
    backbone = backbone_of(pipe)
    network = backbone.denoiser(pipe)
    device = next(network.parameters()).device
    schedule = backbone.schedule(pipe, process.config_of(pipe.scheduler), how.steps, "ode", 0.0).to(device)
    side = backbone.image_size(pipe, network)
    shape = backbone.latent_shape(pipe, network, side, side)

    def predict(x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        return backbone.forward(network, x_BCHW, t_B, cond)

    predictor = with_cfg(predict, backbone.encode(pipe, [""]), how.cfg)
    parts = []
    starts = range(0, len(prompts), how.batch_size)
    for start in tqdm(starts, desc="images", disable=True if quiet else None):
        batch = prompts[start : start + how.batch_size]
        ids = [SampleId(how.seed, start + i, 0) for i in range(len(batch))]
        cond = backbone.encode(pipe, [p.text for p in batch])
        latents = sampling.sample(predictor, schedule, cond, SampleNoise(ids, shape, device))
        parts.append(backbone.decode(pipe, latents).cpu())
    return torch.cat(parts)


def strict(images_B3HW: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Strict verdicts (B,): 1 if an image shows its prompt, else 0.

    The detector of the prompt's world decides.
    """
    import rewards

    score = rewards.build(["composition_strict"])
    return score(images_B3HW, [p.text for p in prompts], [p.metadata for p in prompts]).total_B


def sheet(images_B3HW: Tensor, columns: int) -> Image.Image:
    """Images in a table, row by row, with a thin gap."""
    padded = torch.nn.functional.pad(images_B3HW, (1, 1, 1, 1), value=0.8)
    count, _, height, width = padded.shape
    table = padded.reshape(count // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = table.reshape(count // columns * height, columns * width, 3)
    return Image.fromarray(levels(pixels).numpy())
