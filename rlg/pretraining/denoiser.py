"""Stage 2 of the pretraining: text encoders and denoiser together."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rlg.diffusion import process
from rlg.models.backbones import backbone_of
from rlg.pretraining.samples import Sampling, generate, sheet, strict
from rlg.pretraining.settings import Budget, PretrainingSettings
from rlg.pretraining.stage import Stage, autocast, generator_of, learning_rate
from rlg.prompts import spread
from rlg.tinyworld.worlds import World

_SHOWN, _COLUMNS = 24, 12  # samples of a look at the training
_LOOK = Sampling(cfg=3.0, batch_size=_SHOWN)


def split_parameters(modules: Iterable[nn.Module], muon: bool) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Split parameters into those for Muon and those for AdamW.

    Muon gets the matrices of a transformer's blocks, if `muon` is true.
    """
    matrices, rest = [], []
    for module in modules:
        for name, parameter in module.named_parameters():
            hidden = muon and parameter.ndim == 2 and name.startswith("transformer_blocks")
            (matrices if hidden else rest).append(parameter)
    return matrices, rest


def optimizers_of(modules: Iterable[nn.Module], muon: bool) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for what is left to it."""
    matrices, rest = split_parameters(modules, muon)
    adamw = torch.optim.AdamW(rest, weight_decay=1e-4, betas=(0.9, 0.95), fused=True)
    if not matrices:
        return [adamw]
    return [adamw, torch.optim.Muon(matrices, weight_decay=1e-3, ns_steps=4, adjust_lr_fn="match_rms_adamw")]


class Objective:
    """The loss of a batch: `E |out - target|^2` with (x_t, target) from `process.noise`."""

    def __init__(self, pipe: Any, latents_NCHW: Tensor, captions: list[str], budget: Budget):
        self.pipe, self.latents_NCHW, self.captions, self.budget = pipe, latents_NCHW, captions, budget
        self.backbone = backbone_of(pipe)
        self.network = self.backbone.denoiser(pipe)
        self.process = self.backbone.forward_process(pipe, process.config_of(pipe.scheduler))

    def loss(self, generator: torch.Generator) -> Tensor:
        """Loss of a random batch, in which some captions are dropped.

        Classifier-free guidance needs a network that knows the empty caption.
        """
        batch, device = self.budget.batch, next(self.network.parameters()).device
        pick = torch.randint(len(self.captions), (batch,), generator=generator)
        dropped = (torch.rand(batch, generator=generator) < self.budget.dropout).tolist()
        texts = ["" if drop else self.captions[i] for i, drop in zip(pick.tolist(), dropped, strict=True)]
        x0 = self.latents_NCHW[pick]
        eps = torch.randn(x0.shape, generator=generator)
        rows = process.sample_t(self.process, batch, generator)
        x_t, target = process.noise(self.process, rows, x0, eps)
        cond = self.backbone.encode(self.pipe, texts)
        out = self.backbone.forward(self.network, x_t.to(device), self.process.time[rows].to(device), cond)
        return (out.float() - target.to(device)).square().mean()


def look(pipe: Any, world: World, file: Path) -> float:
    """Save samples for held-out captions; return the share that is right."""
    test = world.composition_prompts("test")
    prompts = [test[i] for i in spread(test, _SHOWN)]
    images = generate(pipe, prompts, _LOOK, quiet=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet(images, _COLUMNS).save(file)
    return strict(images, prompts).mean().item()


def train(objective: Objective, world: World, folder: Path, samples: Path, settings: PretrainingSettings) -> None:
    """Train the pipeline in place, and save samples now and then.

    The training goes on from the folder's checkpoint.
    """
    pipe, budget = objective.pipe, objective.budget
    encoders = {name: getattr(pipe, name) for name in objective.backbone.text_encoders}
    trained = nn.ModuleDict({"denoiser": objective.network} | encoders)
    optimizers = optimizers_of(trained.values(), budget.muon)
    stage = Stage(folder, trained, optimizers, budget.steps)
    device = next(objective.network.parameters()).device.type
    bar = tqdm(total=stage.steps, initial=stage.step, desc="denoiser", mininterval=5)
    average = None
    while stage.step < stage.steps:
        with autocast(device, settings.dtype):
            loss = objective.loss(generator_of(settings.seed, stage.step))
        rate = learning_rate(stage.step, stage.steps, budget.lr, budget.warmup, budget.decay)
        stage.update(loss, [rate, 2 * rate][: len(optimizers)])
        average = loss.item() if average is None else 0.99 * average + 0.01 * loss.item()
        bar.update()
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        if stage.step % settings.look_every == 0:
            with stage.averaged():
                share = look(pipe, world, samples / f"{stage.step:06d}.png")
            bar.write(f"step {stage.step}: loss {average:.4f}, {share:.0%} of {_SHOWN} samples show their caption")
    bar.close()
    stage.finish()
