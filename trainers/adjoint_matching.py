"""Adjoint Matching: stochastic optimal control with a lean adjoint (arXiv 2409.08861).

    L = E sum_i | C_i (f(x_i) - f_base(x_i)) / s_i + s_i a_{i+1} |^2
    a_T = - grad r(x_T) / beta,    a_i = A_i a_{i+1} + C_i J_base(x_i)^T a_{i+1}

    x_{i+1} = A_i x_i + C_i f(x_i) + s_i z    any Gaussian sampler, as `rlg.diffusion.process` tables it
    f, f_base                                 the output of the tuned model, and that of the base
    J_base                                    the Jacobian of f_base in x

The trajectory is the tuned model's own, and the adjoint goes back along it through the base alone, without gradient.
At the optimum the path law is p_base exp(r(x_T) / beta) / Z, as far as kernels of fixed variance hold it. Only with
memoryless noise, where x_T does not depend on x_0, are images so distributed, too. This noise is the flow SDE of level
sqrt(2), or DDIM with eta = 1. beta is then the KL coefficient. L / 2 is in nats, as the path KL is.

Deviations from the paper and the official code
1. The recursions are those of the discrete chain, which has the exact optimum of its own path KL. The paper makes a
   chain of an equation in continuous time, and moves its noise by a step: sqrt(2 (1 - t + h) / (t + h)). Here only
   the first step of a flow, at sigma = 1, takes the next sigma.
2. The last step has no noise, so it has no loss, and stays in the adjoint. `noisy_end` gives it noise and a loss.
3. Trained steps: the last ones, and one of each equal part of the others (paper: 10 of the first 30 at random, all of
   the last 10; official code: 2 of the first 60%, 2 of the others). Steps are not weighted, as there.
4. A term above loss_clip / beta^2 is left out, as the paper's clip does (1.6). The official code masks terms whose
   residual is above a moving 90% quantile. Here `mask_quantile` masks samples whose target |s a|^2 is above that
   quantile of their batch and step: the tail is the adjoint's, this needs no state, and no step is left out whole.
5. Classifier-free guidance: the paper has none in training. The official code samples at 7.5 with the control and the
   adjoint of the unguided network (`cfg_in_loss: false`), as its full form "blows up". By default both are guided: the
   target is then the tilt of the guided base.
6. A LoRA is trained; both official codes train the whole network.

    accelerate launch train_adjoint_matching.py --config configs/tiny/adjoint_matching_ink.yaml
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning, Predictor
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import times
from trainers.adjoint_matching_config import AdjointMatchingConfig
from trainers.core.reward_gradient import Batch, Loss, TrainedStepsTrainer, pull_back, weighted_mean


@dataclass(frozen=True)
class Adjoint:
    """The lean adjoint along a trajectory, with the base's outputs."""

    after: dict[int, Tensor]  # step -> a_{i+1}, the adjoint after the step, (B, C, H, W)
    base: dict[int, Tensor]  # step -> f_base(x_i)


def lean_adjoint(
    base: Predictor, schedule: Schedule, x_TBCHW: Tensor, cond: Conditioning, end_BCHW: Tensor, first: int = 0
) -> Adjoint:
    """The adjoint after each step from `first` on.

    end_BCHW: a_T, minus the gradient of the reward over beta.
    """
    after, outputs, adjoint = {}, {}, end_BCHW.float()
    for i in reversed(range(first, len(schedule))):
        after[i], x, t_B = adjoint, x_TBCHW[i], times(schedule, i, x_TBCHW.shape[1])
        outputs[i], product = pull_back(lambda x, t_B=t_B: base(x, t_B, cond), x, lambda _, a=adjoint: a)
        adjoint = schedule.a_x[i] * adjoint + schedule.a_out[i] * product
    return Adjoint(after, outputs)


def adjoint_matching_loss(
    schedule: Schedule,
    i: int,
    out_BCHW: Tensor,
    base_BCHW: Tensor,
    after_BCHW: Tensor,
    weight_B: Tensor,
    limit: float | None = None,
) -> Loss:
    """Loss of step i, and its metrics.

    after_BCHW: a_{i+1}. weight_B: weights of the samples. limit: terms above it are left out.
    """
    control = schedule.a_out[i] * (out_BCHW.float() - base_BCHW) / schedule.std[i]
    target = -schedule.std[i] * after_BCHW
    error_B = (control - target).square().flatten(1).sum(dim=1)
    kept_B = weight_B if limit is None else weight_B * (error_B <= limit)
    loss = weighted_mean(error_B, kept_B)
    metrics = {
        "loss": loss,
        "target": weighted_mean(target.square().flatten(1).sum(dim=1), kept_B),
        "masked": (kept_B == 0).float().mean(),
        "kl": process.kl(schedule, i, out_BCHW, base_BCHW).mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def below_quantile(value_B: Tensor, weight_B: Tensor, quantile: float) -> Tensor:
    """(B,) weights that are 0 for values above a quantile.

    The quantile is that of the samples that count.
    """
    if quantile == 1 or not weight_B.any():
        return weight_B
    return weight_B * (value_B <= torch.quantile(value_B[weight_B != 0], quantile))


class AdjointMatchingTrainer(TrainedStepsTrainer):
    """Trainer that samples, goes back with the adjoint, and fits it."""

    takes_end = True
    config: AdjointMatchingConfig

    def set_up(self) -> None:
        """Choose the networks of control and adjoint.

        Raises ValueError as the base class.
        """
        guided = self.config.cfg_in_loss
        self.controlled: Predictor = self.tuned_with_cfg if guided else self.policy.predict
        self.uncontrolled: Predictor = self.base_with_cfg if guided else self.policy.reference
        super().set_up()

    def sampler(self, steps: int) -> Schedule:
        """The memoryless chain, or that of the config's level."""
        level = self.config.level or process.memoryless_level(self.policy.scheduler_config)
        return self.schedule(steps, "sde", level, None if self.config.noisy_end else (0, steps - 1))

    def trainable_steps(self, schedule: Schedule) -> list[int]:
        """Steps with noise."""
        return schedule.stochastic_steps()

    def losses(self, batch: Batch, weight_B: Tensor, steps: Sequence[int]) -> Callable[[int], Loss]:
        """Go back along the trajectories; return the loss at a step."""
        assert batch.end is not None
        schedule = self.sampler(self.config.steps)
        end = -batch.end.gradient_BCHW / self.config.beta
        with self.accelerator.autocast():
            adjoint = lean_adjoint(
                self.uncontrolled, schedule, batch.trajectory.x_TBCHW, batch.cond, end, first=min(steps)
            )
        return partial(self._step_loss, batch, weight_B, schedule, adjoint)

    def _step_loss(self, batch: Batch, weight_B: Tensor, schedule: Schedule, adjoint: Adjoint, i: int) -> Loss:
        x, after = batch.trajectory.x_TBCHW[i], adjoint.after[i]
        with self.accelerator.autocast():
            out = self.controlled(x, times(schedule, i, len(x)), batch.cond)
        weight_B = below_quantile(after.square().flatten(1).sum(dim=1), weight_B, self.config.mask_quantile)
        limit = None if self.config.loss_clip is None else self.config.loss_clip / self.config.beta**2
        return adjoint_matching_loss(schedule, i, out, adjoint.base[i], after, weight_B, limit)
