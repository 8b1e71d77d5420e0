"""Chains of one Gaussian dimension, whose optimal control is known.

Data are N(mean, spread^2), so the base network is affine: `Affine` has a slope and an intercept a step, and those of
the tuned model beside them. `Moments` are noises whose sample means and covariances are exactly 0 and 1, so that a
mean over them of a polynomial of degree two is its expectation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import Trajectory, rollout

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
SD15 = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
NOTHING = Conditioning({})


def chain(config: dict, steps: int, kernel: str = "sde", noisy_end: bool = True) -> Schedule:
    """A memoryless chain, or an ODE."""
    window = None if noisy_end else (0, steps - 1)
    return process.make_schedule(config, steps, kernel, process.memoryless_level(config), window)


class Moments:
    """Noise of N samples, (N, 1, 1, 1) a draw, with exact first and second moments over all draws."""

    def __init__(self, count: int, draws: int, seed: int = 0):
        raw = torch.randn(count, draws, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        columns, _ = torch.linalg.qr(torch.cat([torch.ones(count, 1, dtype=torch.float64), raw], dim=1))
        self.columns, self.place = columns[:, 1:] * count**0.5, 0

    def initial(self) -> Tensor:
        """The first draw."""
        self.place = 0
        return self.step()

    def step(self) -> Tensor:
        """The next draw."""
        self.place += 1
        return self.columns[:, self.place - 1].float()[:, None, None, None]

    def gather(self, index_B: Tensor) -> Moments:
        """Nothing here resamples."""
        raise NotImplementedError


@dataclass
class Affine:
    """Base and tuned networks of one dimension: output = slope x + intercept, a step."""

    schedule: Schedule
    slope_T: Tensor
    intercept_T: Tensor
    change_T2: Tensor  # of the tuned network: (slope, intercept) a step

    @classmethod
    def of(cls, schedule: Schedule, mean: float = 0.0, spread: float = 1.0) -> Affine:
        """The exact network for data N(mean, spread^2); the tuned one begins as the base."""
        alpha, sigma = schedule.alpha[:-1].double(), schedule.sigma[:-1].double()
        gain = alpha * spread**2 / (alpha**2 * spread**2 + sigma**2)  # E[x0 | x] = mean + gain (x - alpha mean)
        slope = (gain - schedule.x0_x.double()) / schedule.x0_out.double()
        intercept = (mean - gain * alpha * mean) / schedule.x0_out.double()
        return cls(schedule, slope.float(), intercept.float(), torch.zeros(len(schedule), 2))

    def step_of(self, t_B: Tensor) -> int:
        """The step at which the network has this time."""
        return int((self.schedule.t == t_B[0]).nonzero())

    def base(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The base's output."""
        i = self.step_of(t_B)
        return self.slope_T[i] * x_BCHW + self.intercept_T[i]

    def tuned(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        """The tuned model's output."""
        slope, intercept = self.change_T2[self.step_of(t_B)]
        return self.base(x_BCHW, t_B, cond) + slope * x_BCHW + intercept

    def sample(self, count: int = 400) -> Trajectory:
        """Trajectories of the tuned model with exact moments."""
        return rollout(self.tuned, self.schedule, NOTHING, Moments(count, len(self.schedule) + 1))

    def minimise(self, i: int, loss_of: Callable[[], Tensor]) -> None:
        """Take a step's change to the minimum of its loss, which is a quadratic in it."""
        start = self.change_T2[i].clone()

        def loss(change_2: Tensor) -> Tensor:
            self.change_T2 = torch.cat([self.change_T2[:i].detach(), change_2[None], self.change_T2[i + 1 :].detach()])
            return loss_of()

        hessian_22 = torch.autograd.functional.hessian(loss, start)
        gradient_2 = torch.autograd.functional.jacobian(loss, start)
        self.change_T2 = self.change_T2.detach()
        self.change_T2[i] = start - torch.linalg.solve(hessian_22, gradient_2)

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def decay_T(self) -> Tensor:
        """B of the base's kernels x_next ~ N(B x + const, std^2)."""
        return (self.schedule.a_x + self.schedule.a_out * self.slope_T).double()

    def memory_variance(self) -> float:
        """Var(x_T | x_0) of the base's chain: the shift of its end by a linear reward, at slope / beta = 1."""
        variance = torch.zeros((), dtype=torch.float64)
        for decay, std in zip(self.decay_T, self.schedule.std.double(), strict=True):
            variance = decay**2 * variance + std**2
        return float(variance)

    def optimal_std(self, curvature: float) -> float:
        """Spread of the end under the best control for the reward -curvature beta x^2 / 2, with data of mean 0.

        V_i = -P_i x^2 / 2 with P_T = curvature and P_i = B^2 P_{i+1} / (1 + std^2 P_{i+1}).
        """
        std_T, gains, value = self.schedule.std.double(), [], torch.tensor(curvature, dtype=torch.float64)
        for decay, std in zip(self.decay_T.flip(0), std_T.flip(0), strict=True):
            gains.append(decay / (1 + std**2 * value))
            value = decay**2 * value / (1 + std**2 * value)
        variance = torch.ones((), dtype=torch.float64)
        for gain, std in zip(reversed(gains), std_T, strict=True):
            variance = gain**2 * variance + std**2
        return float(variance.sqrt())
