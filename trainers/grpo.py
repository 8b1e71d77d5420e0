"""GRPO for diffusion and flow models, one trainer for all families.

Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), DDPO (arXiv 2305.13301) on DDIM kernels.

    J = E[ 1/S sum_i min(rho_i A, clip(rho_i, 1 - epsilon, 1 + epsilon) A) ] - beta KL(pi_theta || pi_ref)
    rho_i = exp(log pi_theta(x_{i+1} | x_i) - log pi_old(x_{i+1} | x_i)),   A = (R - mean_group) / std

Log-probabilities are means over latent dimensions (every published epsilon, 1e-4 or 1e-5, presumes that), the loss is
taken per denoising step, and gradients accumulate over steps. KL, with gradient, to the model with its adapter off:

    kl_convention "gaussian"   the true KL of the two kernels, |mean - mean_ref|^2 / (2 std^2)
    kl_convention "flow_grpo"  without dt, |mean - mean_ref|^2 / (2 std^2 / dt): Flow-GRPO's published beta is in it

Deviations from the public code
1. Samples are shuffled before the rollout, not after it, and a training minibatch is a rollout batch: the ratio is
   exactly 1 before the first update, also where kernels are not batch-invariant.
2. `num_train_steps` trains on a random subset of the stochastic steps, the same for the whole batch.
3. Groups are keyed by the prompt's index in its data set, not by its text.
4. Prompts, noise and the window depend on (seed, iteration) alone, so that resuming, and any number of processes,
   give the same rollouts.

    accelerate launch train_grpo.py --config configs/tiny/grpo_sd3_compressibility.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor

from rewards import RewardMix
from rewards.background import EarlyScores
from rlg import process, sampling
from rlg.backbones import Conditioning
from rlg.process import Schedule
from rlg.prompts import Prompt
from rlg.sampling import Trajectory
from trainers import common
from trainers.online import OnlineConfig, OnlineTrainer

KL_CONVENTIONS = ("gaussian", "flow_grpo")
RATIOS = ("ppo", "guard")


@dataclass(kw_only=True)
class GRPOConfig(OnlineConfig):
    """Options of GRPO; the defaults are Flow-GRPO's."""

    num_iterations: int = field(default=1, metadata={"help": "passes over an iteration's images (inner epochs)"})
    kernel: str = field(default="sde", metadata={"help": "sde (flow SDE, or DDIM) or cps"})
    noise_level: float = field(default=0.7, metadata={"help": "of the kernel; eta for DDIM"})
    window_size: int = field(default=0, metadata={"help": "stochastic steps, in one random window; 0: all steps"})
    window_start: int = field(default=0, metadata={"help": "windows do not begin before this step"})
    window_end: int | None = field(default=None, metadata={"help": "windows lie before this step (default: half)"})
    num_train_steps: int | None = field(
        default=None, metadata={"help": "random stochastic steps trained (default: all)"}
    )
    skip_last_step: bool = field(default=True, metadata={"help": "never train on the last step (Flow-GRPO's 0.99)"})
    epsilon: float = field(default=1e-4, metadata={"help": "clip range of the ratio"})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient"})
    kl_convention: str = field(default="gaussian", metadata={"help": "gaussian (true KL) or flow_grpo (without dt)"})
    ratio: str = field(default="ppo", metadata={"help": "ppo, or guard (GRPO-Guard's normalised ratio)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require_choice(self, "kernel", ("sde", "cps"))
        common.require_choice(self, "kl_convention", KL_CONVENTIONS)
        common.require_choice(self, "ratio", RATIOS)
        common.require_positive(self, "num_iterations", "noise_level", "num_train_steps", "window_end", "epsilon")
        for name in ("beta", "window_size", "window_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        end = self.window_start + self.window_size
        if self.window_size and not end <= self.last_window_step <= self.trained_steps:
            raise ValueError(
                f"a window of {self.window_size} steps from {self.window_start} on must end by window_end = "
                f"{self.last_window_step}, and that by the last step that is trained, {self.trained_steps} of "
                f"{self.num_steps}"
            )

    @property
    def last_window_step(self) -> int:
        """Windows lie before this step; the first half is Flow-GRPO-Fast's choice."""
        return self.window_end or self.num_steps // 2

    @property
    def trained_steps(self) -> int:
        """Steps before this one may be trained."""
        return self.num_steps - self.skip_last_step

    def derived(self, processes: int) -> dict[str, int]:
        """As of every online trainer, with the inner epochs."""
        counts = super().derived(processes)
        return counts | {"updates_per_iteration": self.num_updates * self.num_iterations}


def grpo_loss(
    log_ratio_B: Tensor, advantage_B: Tensor, epsilon: float, kl_B: Tensor | None = None, beta: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of one denoising step, and its metrics.

    log_ratio_B: log pi_theta - log pi_old, (B,), with gradient. kl_B: KL to the reference, (B,), with gradient.
    """
    ratio_B = log_ratio_B.exp()
    clipped_B = ratio_B.clamp(1 - epsilon, 1 + epsilon)
    policy_loss = torch.maximum(-advantage_B * ratio_B, -advantage_B * clipped_B).mean()
    loss = policy_loss if kl_B is None else policy_loss + beta * kl_B.mean()
    metrics = {
        "loss": loss,
        "policy_loss": policy_loss,
        "approx_kl": 0.5 * (log_ratio_B**2).mean(),
        "clip_fraction": ((ratio_B - 1).abs() > epsilon).float().mean(),
        "ratio_max": ratio_B.max(),
    }
    if kl_B is not None:
        metrics["kl"] = kl_B.mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


def guard_log_ratio(log_ratio_B: Tensor, mean_BCHW: Tensor, old_mean_BCHW: Tensor, std: float) -> Tensor:
    """GRPO-Guard (arXiv 2510.22319): the log-ratio without its negative bias, and with equal scale in every step.

    The mean of log rho under the old policy is -|mean - old_mean|^2 / (2 std^2): it is added back, and the result is
    multiplied by std.
    """
    bias_B = ((mean_BCHW - old_mean_BCHW) ** 2).flatten(1).mean(dim=1) / (2 * std**2)
    return (log_ratio_B + bias_B) * std


@dataclass(frozen=True)
class Rollout:
    """One process's share of an iteration's images, as batches that training goes through again."""

    batches: list[Trajectory]
    conds: list[Conditioning]
    images_B3HW: Tensor
    prompt_B: Tensor  # index of each sample's prompt
    schedule: Schedule
    train_steps: list[int]  # the denoising steps to train on
    early: EarlyScores | None = None


class GRPOTrainer(OnlineTrainer):
    """Rollout, reward, advantages, update; see the module's docstring."""

    maxima = ("ratio_max",)
    config: GRPOConfig

    def __init__(
        self,
        config: GRPOConfig,
        reward: RewardMix,
        prompts: Sequence[Prompt],
        eval_prompts: Sequence[Prompt] = (),
        accelerator: Accelerator | None = None,
        held_out: RewardMix | None = None,
    ):
        super().__init__(config, reward, prompts, eval_prompts, accelerator, held_out)
        _, steps = self._schedule(torch.Generator())
        if len(steps) < (config.num_train_steps or 1):
            raise ValueError(
                f"num_train_steps = {config.num_train_steps or 1}, but {len(steps)} steps are stochastic and trained"
            )

    def evaluation_schedule(self) -> Schedule:
        """The kernel that is trained, stochastic in every step."""
        return self.policy.schedule(self.config.num_steps, self.config.kernel, self.config.noise_level)

    def rollout(self) -> Rollout:
        """Sample this process's share of the iteration; what it is depends on (seed, iteration) alone."""
        config = self.config
        generator = torch.Generator().manual_seed(self.iteration_seed())
        schedule, train_steps = self._schedule(generator)
        parts = self.parts(generator)
        batches, images, early = [], [], EarlyScores(self.reward)
        for part in parts:
            with self.accelerator.autocast():
                batches.append(
                    sampling.rollout(self.tuned, schedule, part.cond, part.noise, keep_means=config.ratio == "guard")
                )
            images.append(self.decode(batches[-1].x0, part, early))
        prompt_B = torch.cat([part.prompt_B for part in parts])
        return Rollout(
            batches, [part.cond for part in parts], torch.cat(images), prompt_B, schedule, train_steps, early
        )

    def _schedule(self, generator: torch.Generator) -> tuple[Schedule, list[int]]:
        config = self.config
        window = None
        if config.window_size:
            places = config.last_window_step - config.window_size - config.window_start + 1
            first = config.window_start + int(torch.randint(places, (1,), generator=generator))
            window = (first, first + config.window_size)
        schedule = self.policy.schedule(config.num_steps, config.kernel, config.noise_level, window)
        steps = [i for i in schedule.stochastic_steps() if i < config.trained_steps]
        if config.num_train_steps:
            picked = torch.randperm(len(steps), generator=generator)[: config.num_train_steps].tolist()
            steps = sorted(steps[i] for i in picked)
        return schedule, steps

    def update(self, roll: Rollout, advantage_B: Tensor) -> dict[str, float]:
        """All optimizer steps of the iteration; returns mean metrics."""
        config, accelerator = self.config, self.accelerator
        advantages = advantage_B.split(config.per_device_batch_size)
        self.begin_updates(len(roll.batches) // config.num_updates * len(roll.train_steps))
        collected: list[dict[str, Tensor]] = []
        for epoch in range(config.num_iterations):
            for b in self.batch_order(len(roll.batches), epoch):
                for i in roll.train_steps:
                    with accelerator.accumulate(self.policy.wrapped):
                        loss, metrics = self.loss(roll, b, i, advantages[b])
                        self.backward(loss, metrics)
                    collected.append(metrics)
        return self.mean_metrics(collected)

    def loss(self, roll: Rollout, b: int, i: int, advantage_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of batch b at denoising step i."""
        config, batch, schedule = self.config, roll.batches[b], roll.schedule
        x, x_next = batch.x_TBCHW[i], batch.x_TBCHW[i + 1]
        t_B = sampling.times(schedule, i, len(x))
        with self.accelerator.autocast():
            out = self.tuned(x, t_B, roll.conds[b])
        log_ratio_B = process.log_prob(schedule, i, x, out, x_next) - batch.logp_TB[i]
        if config.ratio == "guard":
            mean = process.mean(schedule, i, x, out)
            log_ratio_B = guard_log_ratio(log_ratio_B, mean, batch.mean_TBCHW[i], float(schedule.std[i]))
            advantage_B = advantage_B / schedule.dt[i]  # the policy loss over dt, and not the KL
        kl_B = None
        if config.beta:
            with torch.no_grad(), self.accelerator.autocast():
                reference = self.reference(x, t_B, roll.conds[b])
            kl_B = process.kl(schedule, i, out, reference, per_time=config.kl_convention == "flow_grpo")
        return grpo_loss(log_ratio_B, advantage_B, config.epsilon, kl_B, config.beta)
