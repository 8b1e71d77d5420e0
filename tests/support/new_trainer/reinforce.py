"""REINFORCE, as someone outside would add it: the gradient of the expected reward along the sampler's own path.

L = - mean A log p(x_next | x)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.background import EarlyScores
from rlg.diffusion import process, sampling
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import Trajectory
from trainers.core.online import AdvantageTrainer
from trainers.reinforce_config import ReinforceConfig


def reinforce_loss(logp_B: Tensor, advantage_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one step, and its metrics."""
    loss = -(advantage_B * logp_B).mean()
    return loss, {"loss": loss.detach()}


@dataclass(frozen=True)
class Paths:
    """What an iteration sampled, in batches."""

    paths: list[Trajectory]
    conds: list[Conditioning]
    images_B3HW: Tensor
    prompt_B: Tensor
    early: EarlyScores | None = None


class ReinforceTrainer(AdvantageTrainer):
    """Sample, score, one step along the score function."""

    shown = ("reward", "loss")
    config: ReinforceConfig

    def sampler(self, steps: int) -> Schedule:
        """The kernel that is trained."""
        return self.schedule(steps, "sde", self.config.level)

    @torch.no_grad()
    def rollout(self) -> Paths:
        """Sample this process's share of the iteration."""
        parts = self.parts(torch.Generator().manual_seed(self.iteration_seed()))
        schedule = self.sampler(self.config.steps)
        paths = [sampling.rollout(self.tuned_with_cfg, schedule, part.cond, part.noise) for part in parts]
        images = [self.decode(path.x0, part, None) for path, part in zip(paths, parts, strict=True)]
        return Paths(paths, [part.cond for part in parts], torch.cat(images), torch.cat([p.prompt_B for p in parts]))

    def update(self, samples: Paths, advantage_B: Tensor) -> dict[str, float]:
        """One optimizer step; returns mean metrics."""
        schedule, collected = self.sampler(self.config.steps), []
        steps = schedule.stochastic_steps()
        self.begin_updates(len(samples.paths) * len(steps))
        parts = advantage_B.split(self.config.batch_size)
        for path, cond, part_B in zip(samples.paths, samples.conds, parts, strict=True):
            for i in steps:
                x, x_next = path.x_TBCHW[i], path.x_TBCHW[i + 1]
                with self.accelerator.accumulate(self.policy.wrapped), self.accelerator.autocast():
                    out = self.tuned_with_cfg(x, sampling.times(schedule, i, len(x)), cond)
                    loss, metrics = reinforce_loss(process.log_prob(schedule, i, x, out, x_next), part_B)
                    self.backward(loss, metrics)
                collected.append(metrics)
        return self.mean_metrics(collected)
