"""DiffusionNFT: negative-aware fine-tuning on the forward process (arXiv 2509.16117).

One trainer serves all model families.

    L = E[ r |x0(plus) - x0|^2 / c_plus + (1 - r) |x0(minus) - x0|^2 / c_minus ] / beta + kl_coef |out - out_ref|^2
    plus = out_old + beta (out - out_old),   minus = out_old - beta (out - out_old)
    r = 1/2 + A / (2 clip) in [0, 1],   c = mean |x0(.) - x0| of the sample, without gradient

x0 are samples of the old policy, by any solver and without log-probabilities. x0(out) is the estimate of x0 that an
output makes at a freshly noised x_t. At the optimum, plus is the policy of the good samples, so that
out_old + (plus - out_old) / beta is itself a guidance direction. After every iteration the old policy follows:
old <- d old + (1 - d) trained.

Deviations from the paper and the official code
1. t is drawn from the density that the model was trained with (`process.sample_t`), not from the sampler's times, so
   that models of noise and of velocity need no case of their own.
2. The loss goes through x0, which is `x_t - t v` for flow models and `(x_t - sigma eps) / alpha` for models of noise;
   the weights c make up for the scale of either.
3. A checkpoint holds the old policy, and resuming restores it (the official code starts it anew).

    accelerate launch train_nft.py --config configs/tiny/nft_sd3_composition.yaml
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from trainers.checkpoints import engines
from trainers.core.denoising import DenoisingTrainer
from trainers.core.online import AdvantageTrainer, Samples
from trainers.nft_config import NFTConfig

OLD = "old"  # name of the adapter that samples


def optimality(advantage_B: Tensor, clip: float) -> Tensor:
    """(B,) r in [0, 1], the probability of being a good sample.

    It is 1/2 at the mean of the sample's group.
    """
    return (advantage_B / (2 * clip) + 0.5).clamp(0, 1)


def nft_loss(
    x0_BCHW: Tensor, plus_BCHW: Tensor, minus_BCHW: Tensor, r_B: Tensor, beta: float, scale: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of one noise level, and its metrics.

    plus and minus: their estimates of x0, with gradient.
    """
    plus_B, minus_B = _relative_error(plus_BCHW, x0_BCHW), _relative_error(minus_BCHW, x0_BCHW)
    loss = scale * (r_B * plus_B + (1 - r_B) * minus_B).mean() / beta
    metrics = {"policy_loss": loss, "plus_error": plus_B.mean(), "minus_error": minus_B.mean()}
    return loss, {name: value.detach() for name, value in metrics.items()}


def _relative_error(estimate_BCHW: Tensor, x0_BCHW: Tensor) -> Tensor:
    """(B,) mean squared error over the mean absolute error.

    The mean absolute error has no gradient.
    """
    error_BD = (estimate_BCHW - x0_BCHW).flatten(1)
    return error_BD.square().mean(dim=1) / error_BD.detach().abs().mean(dim=1).clamp(min=1e-5)


class NFTTrainer(DenoisingTrainer, AdvantageTrainer):
    """Trainer that samples with the old policy and fits the trained one."""

    shown = ("reward", "loss", "kl", "seconds_per_image")
    copies = (OLD,)
    config: NFTConfig

    def old(self, x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The output of the policy that samples."""
        return self.policy.predict_as(OLD, x, t_B, cond)

    def rollout(self) -> Samples:
        """Sample this process's share of the iteration with the old policy."""
        return self.sample_groups(self.old, self.parts(torch.Generator().manual_seed(self.iteration_seed())))

    def update(self, samples: Samples, advantage_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration, then move the old policy."""
        metrics = super().update(samples, advantage_B)
        self._follow(self.config.old_decay(self.state.step))
        return metrics

    def loss(
        self, x0_BCHW: Tensor, cond: Conditioning, advantage_B: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch at one random noise level a sample."""
        config = self.config
        rows_B, t_B, x_t, _ = self.noised(x0_BCHW, generator)
        with self.accelerator.autocast():
            with torch.no_grad():
                old = self.old(x_t, t_B, cond).float()
                reference = self.policy.reference(x_t, t_B, cond).float() if config.kl_coef else None
            out = self.policy.predict(x_t, t_B, cond).float()
        change = config.nft_beta * (out - old)
        plus, minus = (process.clean(self.process, rows_B, x_t, old + sign * change) for sign in (1, -1))
        r_B = optimality(advantage_B, config.advantage_clip)
        loss, metrics = nft_loss(x0_BCHW, plus, minus, r_B, config.nft_beta, config.advantage_clip)
        metrics["old_distance"] = (out - old).square().mean().detach()
        if reference is not None:
            kl = (out - reference).square().mean()
            loss, metrics["kl"] = loss + config.kl_coef * kl, kl.detach()
        return loss, metrics | {"loss": loss.detach()}

    @torch.no_grad()
    def _follow(self, decay: float) -> None:
        copies, parameters = self.state.copies[OLD], self.policy.trainable()
        with engines.whole([*copies, *parameters], write=True):
            for old, trained in zip(copies, parameters, strict=True):
                old.lerp_(trained, 1 - decay)
