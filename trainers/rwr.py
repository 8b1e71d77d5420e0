"""Reward-weighted regression: a direct fit to p_base exp(R / beta).

    L = E_prompt E_group[ (W - 1) |out(x_t) - target|^2 + |out(x_t) - out_base(x_t)|^2 ]
    W = K exp(R / beta) / sum_group exp(R / beta)

    x0       K samples of the base a prompt, by its own sampler
    target   that of pretraining, at random noise levels

The optimum of E[R] - beta KL(p || p_base) is the tilted law p_base exp(R / beta) / Z. Where the base is the denoiser
of its own samples, L is W |out - target|^2 up to a constant, and the denoiser of the tilted law minimises it. So beta
is the KL coefficient, which makes this trainer the ruler for guidance in `rlg.equivalence`. (Peters and Schaal, 2007;
Lee et al., arXiv 2302.12192, for diffusion.) With `on_policy` the trained model makes the samples and is the base of
the loss: this is expert iteration. Each round tilts once more, and beta is then no longer known.

1. The base in the loss is a control variate. No sampler's images are quite those that a network was trained on, so
   without it W = 1 would move the base: by thousands of nats where the reward asks for half of one. It also takes most
   of the noise out of the gradient, as W close to 1 then hardly has any.
2. W is normalised within the group. With K samples it is biased towards equal weights; the bias is small where the
   effective share of the group, logged as `ess`, is large.
3. Rewards are neither scaled nor clipped.

    accelerate launch train_rwr.py --config configs/equivalence/rwr_sd3_compressibility.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Schedule
from trainers.core.denoising import DenoisingTrainer
from trainers.core.online import Samples
from trainers.rwr_config import RWRConfig


def tilted_weights(reward_B: Tensor, group_B: Tensor, beta: float) -> Tensor:
    """(B,) exp(reward / beta), over its mean in the sample's group."""
    _, index_B = torch.unique(group_B, return_inverse=True)
    count_G = torch.bincount(index_B)
    best_G = torch.full((len(count_G),), -torch.inf, dtype=reward_B.dtype)
    best_G = best_G.scatter_reduce(0, index_B, reward_B, "amax")
    weight_B = ((reward_B - best_G[index_B]) / beta).exp()
    total_G = torch.zeros_like(best_G).index_add_(0, index_B, weight_B)
    return weight_B * count_G[index_B] / total_G[index_B]


def rwr_loss(
    out_BCHW: Tensor, target_BCHW: Tensor, anchor_BCHW: Tensor, weight_B: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one noise level, and its metrics.

    anchor: the output of the policy that made the samples.
    """
    error_B = (out_BCHW - target_BCHW).square().flatten(1).mean(dim=1)
    moved_B = (out_BCHW - anchor_BCHW).square().flatten(1).mean(dim=1)
    loss = ((weight_B - 1) * error_B + moved_B).mean()
    return loss, {"loss": loss.detach(), "error": error_B.detach().mean(), "moved": moved_B.detach().mean()}


class RWRTrainer(DenoisingTrainer):
    """Trainer that samples the base, weighs the samples and fits them."""

    shown = ("reward", "moved", "ess", "seconds_per_image")
    neutral = 1.0
    config: RWRConfig

    def sampler(self, steps: int) -> Schedule:
        """The sampler whose law is tilted."""
        return self.schedule(steps, self.config.kernel, self.config.level)

    def rollout(self) -> Samples:
        """Sample this process's share of the iteration."""
        bare = self.policy.predict if self.config.on_policy else self.policy.reference
        return self.sample_groups(bare, self.parts(torch.Generator().manual_seed(self.iteration_seed())))

    def advantages(self, total_B: Tensor, parts: dict[str, Tensor], group_B: Tensor) -> Tensor:
        """(B,) weights, 1 on average."""
        return tilted_weights(total_B, group_B, self.config.beta)

    def update(self, samples: Samples, advantage_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration; return mean metrics."""
        share = advantage_B.double().mean() ** 2 / advantage_B.double().square().mean()
        return super().update(samples, advantage_B) | {"ess": float(share)}

    def loss(
        self, x0_BCHW: Tensor, cond: Conditioning, advantage_B: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a batch at one random noise level a sample."""
        _, t_B, x_t, target = self.noised(x0_BCHW, generator)
        with self.accelerator.autocast():
            out = self.policy.predict(x_t, t_B, cond).float()
            with torch.no_grad():
                anchor = out.detach() if self.config.on_policy else self.policy.reference(x_t, t_B, cond).float()
        return rwr_loss(out, target, anchor, advantage_B)
