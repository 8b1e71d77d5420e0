"""VGG-Flow: a value's gradient, matched by a deterministic flow (arXiv 2512.05116).

    L = E sum_i | (v - v_base)(x_i) + eta(sigma_i) G / beta |^2,    G = grad r at the estimate of x_T, without gradient

    v, v_base  velocities, noise - image, of the tuned model and of the base; both are guided
    eta        (1 - sigma)^2, 1 - sigma or 1, where sigma is the share of noise in the latents

It aims at the least E[ beta / 2 int |v - v_base|^2 dt - r(x_T) ]. The law of this optimum is not the tilt
p_base exp(r / beta): on Gaussian data a linear reward moves the end by pi S / (2 beta) instead of S^2 / beta. G stands
for the value's gradient of that problem, and is not equal to it either (`tests/trainers/test_vgg_flow.py`).

Deviations from the paper and the official code
1. No value network nu and no consistency loss: the paper's G + nu with nu = 0. The official code gives nu the empty
   prompt, and a later study finds the learnt residuals to be negligible (arXiv 2604.17415).
2. The loss is written in estimates of x_T: with x_T = x - sigma v, they differ by sigma (v_base - v). A model of noise
   has the same estimate and its own sigma / (alpha + sigma), so it needs no case of its own.
3. G is clipped to the 80% quantile of the batch's norms, as the paper says. The official code sets that threshold to 1
   in every epoch, so that it clips to a norm of 1.
4. Trained steps: the last ones, and one of each equal part of the others. The official code never trains the first.
5. The gradient goes through both branches of classifier-free guidance; the official code detaches the other one.
6. `gradient_at: end` takes G once, at the end of the trajectory (arXiv 2604.17415).

    accelerate launch train_vgg_flow.py --config configs/tiny/vgg_flow_ink.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import times
from trainers.core.reward_gradient import Batch, Loss, TrainedStepsTrainer, weighted_mean
from trainers.vgg_flow_config import POWERS, VGGFlowConfig


def vgg_flow_loss(
    schedule: Schedule,
    i: int,
    out_BCHW: Tensor,
    base_BCHW: Tensor,
    gradient_BCHW: Tensor,
    weight_B: Tensor,
    power: int,
) -> Loss:
    """Loss of step i, and its metrics.

    gradient_BCHW: G over beta. power: that of eta.
    """
    sigma = schedule.sigma[i] / (schedule.alpha[i] + schedule.sigma[i])
    change = schedule.x0_out[i] * (out_BCHW.float() - base_BCHW.float()) / sigma  # v_base - v
    target = (1 - sigma) ** power * gradient_BCHW
    loss = weighted_mean((change - target).square().flatten(1).mean(dim=1), weight_B)
    metrics = {
        "loss": loss,
        "target": weighted_mean(target.square().flatten(1).mean(dim=1), weight_B),
        "kl": change.square().mean() / 2,
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def clip_norms(gradient_BCHW: Tensor, quantile: float) -> Tensor:
    """Scale gradients down to a quantile of the batch's norms."""
    norm_B = gradient_BCHW.flatten(1).norm(dim=1)
    scale_B = (torch.quantile(norm_B, quantile) / norm_B.clamp(min=1e-30)).clamp(max=1.0)
    return gradient_BCHW * scale_B.reshape(-1, *[1] * (gradient_BCHW.ndim - 1))


class VGGFlowTrainer(TrainedStepsTrainer):
    """Trainer that matches the reward's gradient at the steps of an ODE."""

    config: VGGFlowConfig

    @property
    def takes_end(self) -> bool:  # type: ignore[override]
        """Tell whether a rollout takes the gradient at its end."""
        return self.config.gradient_at == "end"

    def losses(self, batch: Batch, weight_B: Tensor, steps: Sequence[int]) -> Callable[[int], Loss]:
        """The function from a step to the batch's loss there."""
        return partial(self._step_loss, batch, weight_B, self.sampler(self.config.steps))

    def _step_loss(self, batch: Batch, weight_B: Tensor, schedule: Schedule, i: int) -> Loss:
        config, x = self.config, batch.trajectory.x_TBCHW[i]
        with self.accelerator.autocast():
            out = self.tuned_with_cfg(x, times(schedule, i, len(x)), batch.cond)
            with torch.no_grad():
                base = self.base_with_cfg(x, times(schedule, i, len(x)), batch.cond)
        estimate = process.predict_x0(schedule, i, x, out.detach())
        found = batch.end or self.latent_gradient(estimate, batch.prompt_B)
        gradient = clip_norms(found.gradient_BCHW, config.clip_quantile) / config.beta
        return vgg_flow_loss(schedule, i, out, base, gradient, weight_B, POWERS[config.eta])
