"""Pretrain a base model of the tinyworld in two stages.

    python -m rlg.pretraining --family sd3 --world emoji --output runs/tiny-sd3-emoji

The autoencoder learns freshly drawn scenes by L1 + L2 + a small KL, and at last its decoder alone. The denoiser learns
the latents of a fixed set of scenes by the family's own objective, with captions of the train split, 10% of them
dropped for classifier-free guidance. AdamW updates all, or Muon the matrices of the transformer (`Budget.muon`); the
weights that are saved are an exponential moving average. All stages checkpoint every few minutes and go on from there
when the command is given again; with more steps they go on to those.
"""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline
from torch import nn

from rlg.models.backbones import backbone_of
from rlg.models.loading import device_of
from rlg.pretraining import autoencoder, denoiser
from rlg.pretraining.settings import PretrainingSettings
from rlg.tinyworld import networks
from rlg.tinyworld.worlds import world_of


def run(settings: PretrainingSettings) -> None:
    """Train by the settings, and save the pipeline in half precision."""
    world, budget, state = world_of(settings.world), settings.budget(), settings.state_folder()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pipe = _fresh(settings)
    whole, decoder = autoencoder.parts(pipe.vae, budget)
    autoencoder.train(pipe.vae, whole, world, state / "vae", budget, settings)
    latents = autoencoder.cached_latents(pipe.vae, world, state / "latents.safetensors", budget, settings)
    if decoder.steps:
        autoencoder.train(pipe.vae, decoder, world, state / "decoder", budget, settings)
    components = dict(pipe.components)
    backbone_of(pipe).prepare(pipe)
    objective = denoiser.Objective(pipe, latents.normalised(pipe.vae), latents.captions, budget)
    folder, samples = (state / f"{name}-{settings.family}" for name in ("denoiser", "samples"))
    denoiser.train(objective, world, folder, samples, settings)
    taken_off = {name: part for name, part in components.items() if part is not pipe.components[name]}
    pipe.register_modules(**taken_off)  # the stand-in for T5, which the folder needs and our passes don't
    networks.save(pipe, settings.output)
    print(f"saved {settings.output}")


def _fresh(settings: PretrainingSettings) -> DiffusionPipeline:
    """A random pipeline, ready to be trained."""
    torch.manual_seed(settings.seed)
    pipe = networks.build(settings.family, world_of(settings.world))
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.to(device_of(settings.device)).requires_grad_(True).train()
    return pipe
