"""Base of trainers that learn from the gradient of a reward.

A score's gradient goes through reward and decoder to the latents, apart from any gradient of the network: as
`LatentGradient`, in parts that fit in memory. A network's Jacobian is met as `pull_back`, its transpose times a
vector. A sample whose reward is not finite teaches nothing: its weight in the loss is 0, and that of any other is 1.

Legend: B samples of a batch, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from rewards import RewardScores, gradients
from rewards.background import EarlyScores
from rlg.diffusion import sampling
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import Noise, Trajectory
from trainers.core.config import RewardGradientConfig, TrainedStepsConfig
from trainers.core.online import OnlineTrainer
from trainers.core.setup import Given

Loss = tuple[Tensor, dict[str, Tensor]]


def pull_back(
    function: Callable[[Tensor], Tensor], x_BCHW: Tensor, vector: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """(y, J^T v) of y = function(x), v = vector(y), J = dy / dx.

    Both are fp32, without a graph. The backward pass gets v at a size of 1 a sample, since fp16 would round a small
    gradient to 0. Row b of y depends on row b of x alone.
    """
    with torch.enable_grad():
        x = x_BCHW.detach().float().requires_grad_()
        y = function(x)
        v = vector(y.detach().float())
        size_B111 = v.flatten(1).abs().amax(dim=1).clamp(min=1e-30).reshape(-1, *[1] * (v.ndim - 1))
        (product,) = torch.autograd.grad(y, x, (v / size_B111).to(y.dtype))
    return y.detach().float(), product * size_B111


def choose_steps(steps: Sequence[int], count: int | None, last: int, generator: torch.Generator) -> list[int]:
    """Choose steps: the `last` ones, and one of each part before.

    These are `count` steps; the parts are equal. None chooses all steps. Raises ValueError if there are too few.
    """
    if count is None:
        return list(steps)
    if count > len(steps):
        raise ValueError(f"num_train_steps = {count}, but only {len(steps)} steps can be trained at")
    earlier, parts = len(steps) - last, count - last
    edges = [earlier * part // max(parts, 1) for part in range(parts + 1)]
    picked = [int(torch.randint(low, high, (1,), generator=generator)) for low, high in pairwise(edges)]
    return [steps[place] for place in (*picked, *range(earlier, len(steps)))]


def weighted_mean(value_B: Tensor, weight_B: Tensor) -> Tensor:
    """Mean of weight * value over the batch.

    A value of weight 0 may be NaN.
    """
    return torch.where(weight_B != 0, weight_B * value_B, 0.0).mean()


@dataclass(frozen=True)
class LatentGradient:
    """Scores of B latents, and the gradient of their total."""

    scores: RewardScores
    images_B3HW: Tensor
    gradient_BCHW: Tensor  # d total / d latents, fp32; 0 for a score that is not finite

    @property
    def total_B(self) -> Tensor:
        """The totals, where the latents are."""
        return self.scores.total_B.to(self.gradient_BCHW.device)


@dataclass(frozen=True)
class Batch:
    """Samples of one batch, with their trajectory."""

    trajectory: Trajectory
    cond: Conditioning
    prompt_B: Tensor
    noise: Noise  # of the samples; its next steps are fresh
    end: LatentGradient | None  # at the end of the trajectory, if the algorithm asks for it


@dataclass(frozen=True)
class Rollout:
    """One process's share of an iteration's samples, in batches."""

    batches: list[Batch]
    images_B3HW: Tensor
    prompt_B: Tensor
    early: EarlyScores | None = None


class RewardGradientTrainer(OnlineTrainer):
    """Trainer that follows the gradient of a reward at its own samples."""

    shown = ("reward", "loss", "kl", "seconds_per_image")
    takes_end: ClassVar[bool] = False  # its rollout takes the reward's gradient at the end of each trajectory
    config: RewardGradientConfig

    def load(self, given: Given) -> None:
        """Load rewards and prompts.

        Raises ValueError for a reward without a gradient.
        """
        super().load(given)
        self.gradient_of = gradients.of(self.reward)

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Sample this process's share of the iteration, and keep the trajectories."""
        parts = self.parts(torch.Generator().manual_seed(self.iteration_seed()))
        schedule = self.sampler(self.config.steps)
        early = None if self.takes_end else EarlyScores(self.reward)
        batches, images = [], []
        for part in parts:
            with self.accelerator.autocast():
                trajectory = sampling.rollout(self.tuned_with_cfg, schedule, part.cond, part.noise)
            end = self.latent_gradient(trajectory.x0, part.prompt_B) if self.takes_end else None
            images.append(end.images_B3HW if end else self.decode(trajectory.x0, part, early))
            batches.append(Batch(trajectory, part.cond, part.prompt_B, part.noise, end))
        return Rollout(batches, torch.cat(images), torch.cat([part.prompt_B for part in parts]), early)

    def latent_gradient(self, x_BCHW: Tensor, prompt_B: Tensor) -> LatentGradient:
        """Scores of clean latents, and their gradient through reward and decoder."""
        texts, metadata = self._texts(prompt_B)
        found: list[gradients.Scored] = []

        def slope(images_B3HW: Tensor) -> Tensor:
            found.append(self.gradient_of(images_B3HW, texts, metadata))
            return found[0].gradient_B3HW

        images_B3HW, gradient_BCHW = pull_back(
            lambda latents: self.policy.decode_with_grad(latents, self.config.batch_size), x_BCHW, slope
        )
        return LatentGradient(RewardScores(found[0].total_B, found[0].parts), images_B3HW, gradient_BCHW)

    def scores_of(self, samples: Rollout) -> RewardScores:
        """Scores of this process's images; those at the trajectories' ends are known."""
        ends = [batch.end.scores for batch in samples.batches if batch.end]
        if not ends:
            return super().scores_of(samples)
        parts = {name: torch.cat([scores.parts[name] for scores in ends]) for name in ends[0].parts}
        return RewardScores(torch.cat([scores.total_B for scores in ends]), parts)

    def advantages(self, total_B: Tensor, parts: dict[str, Tensor], group_B: Tensor) -> Tensor:
        """(B,) weights: 1 for each sample with a finite reward."""
        return torch.ones_like(total_B)


class TrainedStepsTrainer(RewardGradientTrainer):
    """Trainer whose loss is a sum over steps of each trajectory.

    An algorithm adds `losses` and, if not all steps can be trained at, `trainable_steps`.
    """

    config: TrainedStepsConfig

    def set_up(self) -> None:
        """Raise ValueError for more trained steps than there are."""
        self._steps()

    def trainable_steps(self, schedule: Schedule) -> list[int]:
        """Steps that have a loss."""
        return list(range(len(schedule)))

    def losses(self, batch: Batch, weight_B: Tensor, steps: Sequence[int]) -> Callable[[int], Loss]:
        """The function from one of the steps to the batch's loss there."""
        raise NotImplementedError

    def update(self, samples: Rollout, weight_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration; return mean metrics."""
        steps, count = self._steps(), len(samples.batches)
        self.begin_updates(count // self.config.num_updates * len(steps))
        weights = weight_B.split(self.config.batch_size)
        collected: list[dict[str, Tensor]] = []
        for b in self.batch_order(count):
            loss_at = self.losses(samples.batches[b], weights[b], steps)
            for i in steps:
                with self.accelerator.accumulate(self.policy.wrapped):
                    loss, metrics = loss_at(i)
                    self.backward(loss, metrics)
                collected.append(metrics)
        return self.mean_metrics(collected)

    def _steps(self) -> list[int]:
        """The steps of this iteration, the same for all processes."""
        config, generator = self.config, torch.Generator().manual_seed(self.iteration_seed())
        steps = self.trainable_steps(self.sampler(config.steps))
        return choose_steps(steps, config.num_train_steps, config.last_train_steps, generator)
