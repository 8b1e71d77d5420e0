"""Sampling: noise that belongs to a sample, rollouts with log-probabilities, and plain generation with path KL.

Legend: B batch, T denoising steps. Noise is a function of (seed, prompt id, k, purpose) and of nothing else, so base,
tuned and guided images are paired, on any number of processes and in any batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlg import process
from rlg.backbones import Conditioning
from rlg.guidance import Predictor
from rlg.process import Schedule


@dataclass(frozen=True)
class SampleId:
    """Which sample of an experiment: its noise depends on this alone."""

    seed: int
    prompt: int  # index of the prompt in its data set
    k: int  # index of the image among those of the prompt

    def generator(self, purpose: str) -> torch.Generator:
        """A generator of this sample's own, for one purpose."""
        text = f"{self.seed}/{self.prompt}/{self.k}/{purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class SampleNoise:
    """The noise of a batch of samples: `initial` latents, and `step` by step noise for stochastic samplers.

    With `same_start`, all images of a prompt start from the noise of its first (DanceGRPO's init_same_noise).
    """

    def __init__(
        self,
        ids: Sequence[SampleId],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        same_start: bool = False,
    ):
        self.ids, self.shape, self.device = list(ids), shape, device
        self._starts = [replace(sample, k=0) for sample in ids] if same_start else self.ids
        self._steps = [sample.generator("steps") for sample in self.ids]

    def initial(self) -> Tensor:
        """x_T, (B, C, H, W) fp32."""
        return self._draw([sample.generator("initial") for sample in self._starts])

    def step(self) -> Tensor:
        """The next step's noise, (B, C, H, W) fp32."""
        return self._draw(self._steps)

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)


@dataclass(frozen=True)
class Trajectory:
    """A rollout; all tensors fp32."""

    x_TBCHW: Tensor  # (T+1, B, C, H, W): before each step, and the final latents
    logp_TB: Tensor  # (T, B): mean log-density over latent dimensions; 0 where the step is deterministic
    mean_TBCHW: Tensor | None  # (T, B, C, H, W): means of the kernels, where they were asked for

    @property
    def x0(self) -> Tensor:
        """The final latents, (B, C, H, W)."""
        return self.x_TBCHW[-1]

    def rows(self, index: Tensor) -> Trajectory:
        """Some of the samples."""
        means = None if self.mean_TBCHW is None else self.mean_TBCHW[:, index]
        return Trajectory(self.x_TBCHW[:, index], self.logp_TB[:, index], means)

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join along the batch."""
        means = None
        if parts[0].mean_TBCHW is not None:
            means = torch.cat([p.mean_TBCHW for p in parts], dim=1)
        return Trajectory(
            torch.cat([p.x_TBCHW for p in parts], dim=1), torch.cat([p.logp_TB for p in parts], dim=1), means
        )


def times(schedule: Schedule, i: int, batch: int) -> Tensor:
    """(B,) the network's time at step i."""
    return schedule.t[i].expand(batch)


@torch.no_grad()
def rollout(
    predict: Predictor, schedule: Schedule, cond: Conditioning, noise: SampleNoise, keep_means: bool = False
) -> Trajectory:
    """Sample and keep what policy gradients need: every state and the log-probability of every stochastic step."""
    x = noise.initial()
    states, logps, means = [x], [], []
    for i in range(len(schedule)):
        out = predict(x, times(schedule, i, len(x)), cond)
        stochastic = schedule.std[i] > 0
        x_next = process.step(schedule, i, x, out, noise.step() if stochastic else None)
        logps.append(process.log_prob(schedule, i, x, out, x_next) if stochastic else torch.zeros_like(x[:, 0, 0, 0]))
        if keep_means:
            means.append(process.mean(schedule, i, x, out))
        x = x_next
        states.append(x)
    return Trajectory(torch.stack(states), torch.stack(logps), torch.stack(means) if keep_means else None)


@torch.no_grad()
def sample(predict: Predictor, schedule: Schedule, cond: Conditioning, noise: SampleNoise) -> Tensor:
    """Final latents, (B, C, H, W) fp32, in constant memory."""
    x = noise.initial()
    for i in range(len(schedule)):
        out = predict(x, times(schedule, i, len(x)), cond)
        x = process.step(schedule, i, x, out, noise.step() if schedule.std[i] > 0 else None)
    return x


@torch.no_grad()
def path_kl_step(schedule: Schedule, i: int, out_BCHW: Tensor, base_BCHW: Tensor) -> Tensor:
    """(B,) nats that step i adds to KL(path || base path): Girsanov with the variance that is really injected."""
    dimensions = out_BCHW[0].numel()
    return process.kl(schedule, i, out_BCHW, base_BCHW) * dimensions
