"""DRaFT, ReFL, AlignProp: the reward's gradient through the sampler's last part.

    L = E[ - r(x) ] + kl_coef E |out - out_base|^2        or  relu(margin - r)  for - r

    method     x                                            the gradient goes through
    draft_k    x_T, the end of the sampler                  the last K steps (DRaFT-K, arXiv 2309.17400)
    draft_lv   x_T from x_T noised again, `noise_copies` times    the last step (DRaFT-LV, the same paper)
    refl       the estimate of x_T at one late random step  that step's network (ReFL, arXiv 2304.05977)
    alignprop  x_T                                          the steps from a random one on (arXiv 2310.03739)

Without kl_coef there is no optimum to reach: a linear reward grows without bound, and any reward is over-optimised in
time. The KL term is that of DRaFT+ (arXiv 2409.06493), a mean over the steps and latents that are trained.

Deviations from the papers and the official codes
1. The first steps are sampled once, with the trajectory kept. The trained steps start from it and draw fresh noise.
2. A sampler without noise is the default, as in DRaFT. AlignProp has DDIM of eta 1: `--kernel sde --level 1`.
3. ReFL's code samples 40 steps without guidance and trains at one of the last 10; its step is one for a whole batch,
   as here. Its paper adds the pretraining loss, its code does not, and neither does this trainer.
4. With a margin, a reward above it has no gradient: ReFL's is 2. Rewards of another scale need another margin, so the
   default is none. AlignProp's |r - 10| of aesthetic scores is a margin of 10 that no score reaches.
5. DRaFT-LV adds the gradients of its copies; here they are averaged, which is the same up to the learning rate.
6. AlignProp starts at step N(42, 5) of 50. Here both numbers are shares of the steps.
7. The gradient goes through both branches of classifier-free guidance, and through decoder and reward apart from the
   sampler: with g = dr/dx, the loss - g x has the same gradient.

    accelerate launch train_draft.py --config configs/tiny/draft_ink.yaml
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import Step, trajectory
from trainers.core.reward_gradient import Batch, Loss, RewardGradientTrainer, Rollout, weighted_mean
from trainers.draft_config import DRaFTConfig


@dataclass(frozen=True)
class Part:
    """The part of a trajectory that the gradient goes through."""

    start: int  # its first step
    x_BCHW: Tensor  # the latents before it
    stop: int  # the step after its last
    estimates: bool = False  # it ends in the last step's estimate of x_T


def parts(batch: Batch, schedule: Schedule, config: DRaFTConfig, generator: torch.Generator) -> Iterator[Part]:
    """Yield the parts of a batch's trajectory that are trained."""
    count, states = len(schedule), batch.trajectory.x_TBCHW
    if config.method == "draft_k":
        start = count - config.num_grad_steps
        yield Part(start, states[start], count)
    elif config.method == "draft_lv":
        for _ in range(config.noise_copies):
            noised = schedule.alpha[-2] * states[-1] + schedule.sigma[-2] * batch.noise.step()
            yield Part(count - 1, noised, count)
    elif config.method == "refl":
        first = int(config.refl_from * count)
        start = int(torch.randint(first, count, (1,), generator=generator))
        yield Part(start, states[start], start + 1, estimates=True)
    else:
        drawn = count * (config.start_mean + config.start_std * float(torch.randn((), generator=generator)))
        start = min(max(round(drawn), 0), count - 1)
        yield Part(start, states[start], count)


def reward_loss(
    end_BCHW: Tensor, total_B: Tensor, gradient_BCHW: Tensor, weight_B: Tensor, margin: float | None = None
) -> Tensor:
    """Mean of -r, or relu(margin - r), with its gradient through the end.

    total_B: r at the end. gradient_BCHW: dr / d end. Neither has a graph.
    """
    value_B, below_B = -total_B, torch.ones_like(total_B)
    if margin is not None:
        value_B, below_B = (margin - total_B).relu(), (total_B < margin).float()
    slope_B = -below_B * (gradient_BCHW * end_BCHW).flatten(1).sum(dim=1)
    return weighted_mean(value_B + slope_B - slope_B.detach(), weight_B)


def output_distance(outs: Sequence[Tensor], references: Sequence[Tensor]) -> Tensor:
    """(B,) |out - out_base|^2, a mean over steps and latents."""
    pairs = zip(outs, references, strict=True)
    return torch.stack([(out - base).square().flatten(1).mean(dim=1) for out, base in pairs]).mean(dim=0)


class DRaFTTrainer(RewardGradientTrainer):
    """Trainer that samples, and goes back through the end of the sampler."""

    config: DRaFTConfig

    def sampler(self, steps: int) -> Schedule:
        """The config's sampler."""
        return self.schedule(steps, self.config.kernel, self.config.level)

    def update(self, samples: Rollout, weight_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration; return mean metrics."""
        config, schedule, count = self.config, self.sampler(self.config.steps), len(samples.batches)
        copies = config.noise_copies if config.method == "draft_lv" else 1
        self.begin_updates(count // config.num_updates * copies)
        generator = torch.Generator().manual_seed(self.iteration_seed())
        weights = weight_B.split(config.batch_size)
        collected: list[dict[str, Tensor]] = []
        for b in self.batch_order(count):
            for part in parts(samples.batches[b], schedule, config, generator):
                with self.accelerator.accumulate(self.policy.wrapped):
                    loss, metrics = self.loss(samples.batches[b], schedule, part, weights[b])
                    self.backward(loss, metrics)
                collected.append(metrics)
        return self.mean_metrics(collected)

    def loss(self, batch: Batch, schedule: Schedule, part: Part, weight_B: Tensor) -> Loss:
        """Loss of a batch at a part of its trajectory."""
        with self.accelerator.autocast():
            path = trajectory(
                self.tuned_with_cfg,
                schedule,
                batch.cond,
                batch.noise,
                start=part.start,
                stop=part.stop,
                x=part.x_BCHW,
            )
            steps = list(path)
        end = steps[-1].x0_BCHW if part.estimates else steps[-1].x_next_BCHW
        found = self.latent_gradient(end.detach(), batch.prompt_B)
        loss = reward_loss(end, found.total_B, found.gradient_BCHW, weight_B, self.config.margin)
        metrics = {"reward_loss": loss, "trained_steps": loss.new_tensor(float(len(steps)))}
        if self.config.kl_coef:
            kl = weighted_mean(output_distance([s.outputs.out_BCHW for s in steps], self._references(steps)), weight_B)
            loss, metrics["kl"] = loss + self.config.kl_coef * kl, kl
        return loss, {name: value.detach() for name, value in (metrics | {"loss": loss}).items()}

    @torch.no_grad()
    def _references(self, steps: Sequence[Step]) -> list[Tensor]:
        """The base's output at each step."""
        with self.accelerator.autocast():
            return [self.base_with_cfg(step.x_BCHW, step.t_B, step.cond) for step in steps]
