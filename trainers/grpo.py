"""GRPO for diffusion and flow models, one trainer for all families.

It covers Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818) and DDPO (arXiv 2305.13301) on DDIM kernels.

    J = E[ 1/S sum_i min(rho_i A, clip(rho_i, 1 - epsilon, 1 + epsilon) A) ] - beta KL(pi_theta || pi_ref)
    rho_i = exp(log pi_theta(x_{i+1} | x_i) - log pi_old(x_{i+1} | x_i)),   A = (R - mean_group) / std

Log-probabilities are means over latent dimensions; every published epsilon, 1e-4 or 1e-5, presumes that. The loss is
taken at each denoising step, and gradients accumulate over steps. The reference of the KL is the model with its
adapter off. The KL has a gradient, and one of two conventions:

    kl_convention "gaussian"   the true KL of the two kernels, |mean - mean_ref|^2 / (2 std^2)
    kl_convention "flow_grpo"  without dt, |mean - mean_ref|^2 / (2 std^2 / dt): Flow-GRPO's published beta is in it

Deviations from the public code
1. Samples are shuffled before the rollout, not after it, and a training minibatch is a rollout batch: the ratio is
   exactly 1 before the first update, also where kernels are not batch-invariant. `update_batch_size` makes a minibatch
   a part of that batch, or several of its steps; the ratio is then 1 up to the rounding of those kernels.
2. `num_train_steps` trains on a random subset of the stochastic steps, the same for the whole batch.
3. Groups are keyed by the prompt's index in its data set, not by its text.
4. Prompts, noise and the window depend on (seed, iteration) alone, so that resuming, and any number of processes,
   give the same rollouts.
5. Without a KL (beta = 0), samples whose advantage is exactly 0 get no pass, since they add 0 to the gradient. The
   loss is still the mean over all samples; `approx_kl`, `clip_fraction` and `ratio_max` are of the others.
6. Under classifier-free guidance the gradient goes through both branches: it is the gradient of the policy that
   samples. DDPO, DanceGRPO and the code behind Flow-GRPO's published models do the same. Flow-GRPO's later code (from
   July 2025) detaches the unconditional branch: `detach_unconditional`. In a first update of tiny-sd3 at CFG 4.5 that
   gradient is three times as long, and its cosine with the other is 0.79.

    accelerate launch train_grpo.py --config configs/tiny/grpo_sd3_compressibility.yaml
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rewards.background import EarlyScores
from rlg.diffusion import process, sampling
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import Trajectory
from rlg.guidance.guided import with_cfg
from trainers.core.online import AdvantageTrainer
from trainers.grpo_config import GRPOConfig


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
    """Log-ratio of GRPO-Guard (arXiv 2510.22319): unbiased, with equal scale at every step.

    The mean of log rho under the old policy is -|mean - old_mean|^2 / (2 std^2). It is added back, and the result is
    multiplied by std.
    """
    bias_B = ((mean_BCHW - old_mean_BCHW) ** 2).flatten(1).mean(dim=1) / (2 * std**2)
    return (log_ratio_B + bias_B) * std


@dataclass(frozen=True)
class Pass:
    """One pass of the network in the update.

    It takes samples [start, stop) of a batch, each at the same steps.
    """

    batch: int
    steps: tuple[int, ...]
    start: int
    stop: int
    kept: Tensor | None = None  # indices of the samples that are run, counted from start; None: all

    @property
    def share(self) -> float:
        """Share of its samples that are run."""
        return 1.0 if self.kept is None else len(self.kept) / (self.stop - self.start)

    def rows(self, values_B: Any) -> Any:
        """Select its samples from values of the whole batch."""
        values_b = values_B[self.start : self.stop]
        return values_b if self.kept is None else values_b[self.kept]


def passes(batch: int, advantage_B: Tensor, steps: Sequence[int], size: int, skip_zeros: bool) -> list[Pass]:
    """Cut an update of B samples at some steps into passes.

    A pass has `size` pairs of sample and step; B divides size, or size divides B. With `skip_zeros` a pass runs only
    the samples whose advantage, on the CPU, is not 0, but at least one. Every process thus makes the same number of
    passes: a pass may be a collective operation.
    """
    count = len(advantage_B)
    steps_a_pass = max(1, size // count)
    groups = [tuple(steps[i : i + steps_a_pass]) for i in range(0, len(steps), steps_a_pass)]
    edges = range(0, count, min(size, count))
    parts = [Pass(batch, group, start, start + edges.step) for group in groups for start in edges]
    return [replace(p, kept=_nonzero(p.rows(advantage_B))) for p in parts] if skip_zeros else parts


def _nonzero(advantage_B: Tensor) -> Tensor | None:
    kept = advantage_B.nonzero().flatten()
    return None if len(kept) == len(advantage_B) else kept if len(kept) else torch.tensor([0])


@dataclass(frozen=True)
class Rollout:
    """One process's share of an iteration's images.

    The update goes through its batches again.
    """

    batches: list[Trajectory]
    conds: list[Conditioning]
    images_B3HW: Tensor
    prompt_B: Tensor  # index of each sample's prompt
    schedule: Schedule
    train_steps: list[int]  # the denoising steps to train on
    early: EarlyScores | None = None
    references: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)  # outputs that inner epochs share


class GRPOTrainer(AdvantageTrainer):
    """Trainer of rollout, reward, advantages and update; see the module's docstring."""

    maxima = ("ratio_max",)
    config: GRPOConfig

    def set_up(self) -> None:
        """Add the policy that is trained.

        Raises ValueError for steps that the kernel has not.
        """
        config = self.config
        self.trained_with_cfg = with_cfg(self.policy.predict, self.negative, config.cfg, config.detach_unconditional)
        _, steps = self._schedule(torch.Generator())
        if len(steps) < (config.num_train_steps or 1):
            raise ValueError(
                f"num_train_steps = {config.num_train_steps or 1}, but {len(steps)} steps are stochastic and trained"
            )
        together = max(1, (config.update_batch_size or 1) // config.batch_size)
        if len(steps) % together:
            raise ValueError(
                f"update_batch_size = {config.update_batch_size} takes {together} steps of a batch at once, which do "
                f"not divide the {len(steps)} that are trained"
            )

    def sampler(self, steps: int) -> Schedule:
        """The kernel that is trained, stochastic at every step."""
        return self.schedule(steps, self.config.kernel, self.config.level)

    def rollout(self) -> Rollout:
        """Sample this process's share of the iteration.

        The samples depend on (seed, iteration) alone.
        """
        config = self.config
        generator = torch.Generator().manual_seed(self.iteration_seed())
        schedule, train_steps = self._schedule(generator)
        parts = self.parts(generator)
        batches, images, early = [], [], EarlyScores(self.reward)
        for part in parts:
            with self.accelerator.autocast():
                batches.append(
                    sampling.rollout(
                        self.tuned_with_cfg, schedule, part.cond, part.noise, keep_means=config.ratio == "guard"
                    )
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
        schedule = self.schedule(config.steps, config.kernel, config.level, window)
        steps = [i for i in schedule.stochastic_steps() if i < config.trained_steps]
        if config.num_train_steps:
            picked = torch.randperm(len(steps), generator=generator)[: config.num_train_steps].tolist()
            steps = sorted(steps[i] for i in picked)
        return schedule, steps

    def update(self, roll: Rollout, advantage_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration; return mean metrics."""
        config, accelerator = self.config, self.accelerator
        advantages = advantage_B.split(config.batch_size)
        size = config.update_batch_size or config.batch_size
        cut = [passes(b, a.cpu(), roll.train_steps, size, config.beta == 0) for b, a in enumerate(advantages)]
        self.begin_updates(len(roll.batches) // config.num_updates * len(cut[0]))
        collected: list[dict[str, Tensor]] = []
        for epoch in range(config.num_iterations):
            for b in self.batch_order(len(roll.batches), epoch):
                for part in cut[b]:
                    with accelerator.accumulate(self.policy.wrapped):
                        loss, metrics = self.pass_loss(roll, part, advantages[b])
                        self.backward(loss, metrics)
                    collected.append(metrics)
        return self.mean_metrics(collected)

    def pass_loss(self, roll: Rollout, part: Pass, advantage_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of a pass over its steps and its samples.

        advantage_B: advantages of the whole batch.
        """
        states, count = roll.batches[part.batch].x_TBCHW, len(part.steps)
        x = torch.cat([part.rows(states[i]) for i in part.steps])
        t_B = torch.cat([sampling.times(roll.schedule, i, len(x) // count) for i in part.steps])
        cond = Conditioning.cat([part.rows(roll.conds[part.batch])] * count)
        with self.accelerator.autocast():
            outs = self.trained_with_cfg(x, t_B, cond).chunk(count)
        references = self._references(roll, part, x, t_B, cond) if self.config.beta else [None] * count
        rows = [
            self._step_loss(roll, part, i, *outputs, part.rows(advantage_B))
            for i, *outputs in zip(part.steps, outs, references, strict=True)
        ]
        return self._mean(rows, part.share)

    def _references(self, roll: Rollout, part: Pass, x: Tensor, t_B: Tensor, cond: Conditioning) -> Sequence[Tensor]:
        """The base's output for each step.

        An inner epoch meets the same states again, and the base never moves. So the outputs are kept.
        """
        key = part.batch, part.steps, part.start
        out = roll.references.get(key)
        if out is None:
            with torch.no_grad(), self.accelerator.autocast():
                out = self.base_with_cfg(x, t_B, cond)
        if self.config.num_iterations > 1:
            roll.references[key] = out
        return out.chunk(len(part.steps))

    def _step_loss(
        self, roll: Rollout, part: Pass, i: int, out: Tensor, reference: Tensor | None, advantage_B: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        config, batch, schedule = self.config, roll.batches[part.batch], roll.schedule
        x, x_next = part.rows(batch.x_TBCHW[i]), part.rows(batch.x_TBCHW[i + 1])
        log_ratio_B = process.log_prob(schedule, i, x, out, x_next) - part.rows(batch.logp_TB[i])
        if config.ratio == "guard":
            mean = process.mean(schedule, i, x, out)
            log_ratio_B = guard_log_ratio(log_ratio_B, mean, part.rows(batch.mean_TBCHW[i]), float(schedule.std[i]))
            # GRPO-Guard divides the policy loss by dt, and leaves the KL as it is
            advantage_B = advantage_B / schedule.dt[i]
        kl_B = None
        if reference is not None:
            kl_B = process.kl(schedule, i, out, reference, per_time=config.kl_convention == "flow_grpo")
        return grpo_loss(log_ratio_B, advantage_B, config.epsilon, kl_B, config.beta)

    def _mean(
        self, rows: Sequence[tuple[Tensor, dict[str, Tensor]]], share: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over steps; samples without a pass have a loss of 0."""
        loss = torch.stack([loss for loss, _ in rows]).mean() * share
        columns = {name: torch.stack([metrics[name] for _, metrics in rows]) for name in rows[0][1]}
        metrics = {n: column.max() if n in self.maxima else column.mean() for n, column in columns.items()}
        return loss, metrics | {n: metrics[n] * share for n in ("loss", "policy_loss")}
