"""Stage 1 of the pretraining: the autoencoder, and latents of scenes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from rlg.pretraining.settings import Budget, PretrainingSettings
from rlg.pretraining.stage import Stage, autocast, generator_of, learning_rate
from rlg.tinyworld.worlds import World

_PEAK, _WARMUP = 2e-3, 100  # learning rate, and steps
_ENCODED_AT_ONCE = 128


@dataclass(frozen=True)
class Latents:
    """Scenes as the autoencoder puts them out, and what they show."""

    latents_NCHW: Tensor
    captions: list[str]

    def normalised(self, vae: AutoencoderKL) -> Tensor:
        """Scale the latents to variance 1, and tell the autoencoder's config.

        The config gets the scale, and the shift if the family has one.
        """
        shift = self.latents_NCHW.mean().item() if vae.config.shift_factor is not None else 0.0
        scale = 1 / (self.latents_NCHW - shift).std().item()
        vae.register_to_config(scaling_factor=scale)
        if vae.config.shift_factor is not None:
            vae.register_to_config(shift_factor=shift)
        return (self.latents_NCHW - shift) * scale


def vae_loss(vae: AutoencoderKL, images_B3HW: Tensor, weight_B1HW: Tensor, generator: torch.Generator) -> Tensor:
    """Loss of the autoencoder: L1 + 4 L2 + 1e-3 KL.

    Images are in [0, 1]. The KL is a mean over latent dimensions.

    weight_B1HW: of each pixel in L1 and L2.
    """
    pixels = images_B3HW * 2 - 1
    posterior = vae.encode(pixels).latent_dist
    eps = torch.randn(posterior.mean.shape, generator=generator).to(pixels.device)
    decoded = vae.decode(posterior.mean + posterior.std * eps).sample
    error = (decoded - pixels).float()
    kl = -0.5 * (1 + posterior.logvar - posterior.mean**2 - posterior.var).float().mean()
    return (weight_B1HW * (error.abs() + 4 * error.square())).mean() + 1e-3 * kl


def crowded_scenes(world: World, count: int, generator: torch.Generator) -> Tensor:
    """Draw full scenes (B, 3, H, W) for the autoencoder.

    Of twice as many captions, the half with most things is drawn.
    """
    prompts = world.training_prompts(2 * count, generator)
    prompts.sort(key=lambda prompt: -sum(clause["count"] for clause in prompt.metadata["include"]))
    return world.draw(prompts[:count], generator)


@dataclass(frozen=True)
class Part:
    """One training of the autoencoder, or of its decoder alone."""

    name: str
    module: nn.Module
    steps: int
    seen: int = 0  # steps of an earlier training, whose scenes are not drawn again


def parts(vae: AutoencoderKL, budget: Budget) -> list[Part]:
    """Both trainings, in turn; the second one does not change the latents."""
    decoder = Part("decoder", vae.decoder, budget.decoder_steps, seen=budget.vae_steps)
    return [Part("autoencoder", vae, budget.vae_steps), decoder]


def train(
    vae: AutoencoderKL, part: Part, world: World, folder: Path, budget: Budget, settings: PretrainingSettings
) -> None:
    """Train a part in place on fresh scenes, and freeze everything.

    The training goes on from the folder's checkpoint.
    """
    vae.requires_grad_(False).train()
    part.module.requires_grad_(True)
    stage = Stage(folder, part.module, [torch.optim.AdamW(part.module.parameters(), weight_decay=1e-4)], part.steps)
    bar = tqdm(total=stage.steps, initial=stage.step, desc=part.name, mininterval=2)
    while stage.step < stage.steps:
        generator = generator_of(settings.seed, part.seen + stage.step)
        images = crowded_scenes(world, budget.vae_batch, generator)
        weights = world.weights(images)
        with autocast(vae.device.type, settings.dtype):
            loss = vae_loss(vae, images.to(vae.device), weights.to(vae.device), generator)
        stage.update(loss, [learning_rate(stage.step, stage.steps, _PEAK, _WARMUP)])
        bar.update()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    bar.close()
    stage.finish()
    vae.requires_grad_(False).eval()


def cached_latents(
    vae: AutoencoderKL, world: World, file: Path, budget: Budget, settings: PretrainingSettings
) -> Latents:
    """Read the latents of a file, or make and write them."""
    if not file.exists():
        made = encode_scenes(vae, world, budget.scenes, settings)
        temporary = file.with_suffix(".tmp")
        save_file(
            {"latents": made.latents_NCHW.contiguous()}, temporary, metadata={"captions": json.dumps(made.captions)}
        )
        temporary.replace(file)
    with safe_open(file, framework="pt") as opened:
        return Latents(opened.get_tensor("latents"), json.loads(opened.metadata()["captions"]))


@torch.no_grad()
def encode_scenes(vae: AutoencoderKL, world: World, scenes: int, settings: PretrainingSettings) -> Latents:
    """Latents of freshly drawn scenes of the train split."""
    generator = generator_of(settings.seed, 0)
    prompts = world.training_prompts(scenes, generator)
    chunks = []
    for start in tqdm(range(0, len(prompts), _ENCODED_AT_ONCE), desc="latents", mininterval=2):
        images = world.draw(prompts[start : start + _ENCODED_AT_ONCE], generator).to(vae.device)
        with autocast(vae.device.type, settings.dtype):
            chunks.append(vae.encode(images * 2 - 1).latent_dist.mode().float().cpu())
    return Latents(torch.cat(chunks), [prompt.text for prompt in prompts])
