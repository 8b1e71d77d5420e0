"""Laws with known scores: mixtures of Gaussians, and their exact tilted law.

A mixture is a predictor of any noise process. sum_m weight_m N(mean_m, diag var_m) stays a mixture under noise, and
the posterior mean of x0 is

    E[x0 | x_t] = sum_m r_m(x_t) (mean_m + alpha var_m / (alpha^2 var_m + sigma^2) (x_t - alpha mean_m))

with responsibilities r_m ~ weight_m N(x_t; alpha mean_m, alpha^2 var_m + sigma^2). The law that guidance claims to
sample, base^(1-w) tuned^w, is integrated on a grid.

Legend: B samples, M components, D dimensions (1 or 2), N grid points. A sample is a latent image (D, 1, 1).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlg.diffusion.conditioning import Conditioning, Predictor
from rlg.diffusion.process import process_from_config

# VP with epsilon-prediction, from sigma / alpha = 80 at pure noise, and rectified flow without a shift.
PROCESSES: dict[str, dict[str, Any]] = {
    "eps": {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "linear",
        "beta_start": 1e-5,
        "beta_end": 0.01743,
        "clip_sample": False,
        "timestep_spacing": "trailing",
    },
    "flow": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0},
}
MEMORYLESS = {"eps": 1.0, "flow": math.sqrt(2.0)}  # noise levels of the full reverse SDE


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians with diagonal covariances, fp64."""

    weight_M: Tensor
    mean_MD: Tensor
    var_MD: Tensor

    @classmethod
    def of(cls, *components: tuple[float, float | tuple[float, ...], float | tuple[float, ...]]) -> Mixture:
        """Make it of components (weight, mean, variance).

        They are numbers in one dimension, tuples in more.
        """
        weight, mean, var = zip(*components, strict=True)
        mean_MD, var_MD = (
            torch.tensor(rows, dtype=torch.float64).reshape(len(components), -1) for rows in (mean, var)
        )
        return cls(torch.tensor(weight, dtype=torch.float64), mean_MD, var_MD)

    def log_density(self, x_BD: Tensor, alpha: float = 1.0, sigma: float = 0.0) -> Tensor:
        """(B,) log-density of alpha x0 + sigma noise, fp64."""
        return self._log_parts(x_BD.double(), alpha, sigma).logsumexp(dim=1)

    def posterior_mean(self, x_BD: Tensor, alpha: float, sigma: float) -> Tensor:
        """(B, D) E[x0 | x_t], fp64."""
        x_B1D = x_BD.double()[:, None]
        share_BM1 = self._log_parts(x_BD.double(), alpha, sigma).softmax(dim=1)[..., None]
        gain_MD = alpha * self.var_MD / (alpha**2 * self.var_MD + sigma**2)
        return (share_BM1 * (self.mean_MD + gain_MD * (x_B1D - alpha * self.mean_MD))).sum(dim=1)

    def predictor(self, config: Mapping[str, Any]) -> Predictor:
        """The exact network of this law for a scheduler's config.

        Perfect training would end at it.
        """
        table = process_from_config(config)
        columns = [table.alpha, table.sigma, table.out_x0, table.out_noise]

        def predict(x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
            t = float(t_B[0])
            alpha, sigma, out_x0, out_noise = (_interpolate(t, table.time, column) for column in columns)
            x_BD = x_BCHW.flatten(1).double()
            x0_BD = self.posterior_mean(x_BD, alpha, sigma)
            noise_BD = (x_BD - alpha * x0_BD) / sigma
            return (out_x0 * x0_BD + out_noise * noise_BD).reshape(x_BCHW.shape)

        return predict

    def _log_parts(self, x_BD: Tensor, alpha: float, sigma: float) -> Tensor:
        var_MD = alpha**2 * self.var_MD + sigma**2
        error_BMD = (x_BD[:, None] - alpha * self.mean_MD) ** 2 / var_MD
        return self.weight_M.log() - 0.5 * (error_BMD + (2 * math.pi * var_MD).log()).sum(dim=2)


def _interpolate(t: float, time_N: Tensor, column_N: Tensor) -> float:
    """Interpolate a table between its rows.

    It is exact where the column is linear in time (flow) or t is a row (the others).
    """
    after = int(torch.searchsorted(time_N, t).clamp(1, len(time_N) - 1))
    (t0, t1), (c0, c1) = (rows[after - 1 : after + 1].double().tolist() for rows in (time_N, column_N))
    return c0 + (c1 - c0) * (t - t0) / (t1 - t0)


@dataclass(frozen=True)
class Moments:
    """Moments of a law, or of samples of it."""

    mean: float  # mean of the first coordinate
    var: float  # variance of the first coordinate
    mass: float  # probability of the half space x > 0
    reward: float  # mean of log(tuned / base), which is reward / beta


class ToyNoise:
    """Noise of B samples of D dimensions from one generator.

    Its interface is that of `sampling.SampleNoise`.
    """

    def __init__(self, samples: int, dimensions: int, seed: int):
        self.shape = (samples, dimensions, 1, 1)
        self.generator = torch.Generator().manual_seed(seed)

    def initial(self) -> Tensor:
        """x_T, (B, D, 1, 1)."""
        return self.step()

    def step(self) -> Tensor:
        """The next step's noise, (B, D, 1, 1)."""
        return torch.randn(self.shape, generator=self.generator)

    def gather(self, index_B: Tensor) -> ToyNoise:
        """Its own noise for as many rows.

        They draw from one generator, so that no two share a number.
        """
        gathered = copy.copy(self)
        gathered.shape = (len(index_B), *self.shape[1:])
        return gathered


def log_ratio(base: Mixture, tuned: Mixture, x_BD: Tensor) -> Tensor:
    """(B,) log(tuned / base): the reward over beta, up to a constant.

    `tuned` is the optimum of this reward.
    """
    return tuned.log_density(x_BD) - base.log_density(x_BD)


def tilted(base: Mixture, tuned: Mixture, w: float, half_width: float = 16.0, points: int = 4000) -> Moments | None:
    """The exact law base^(1-w) tuned^w / Z, on a grid.

    It is None if it has no Z. The grid has `points` (1-D) or 6 sqrt(points) squared. The number of points on an axis
    is even, so that none lies on x = 0, where `mass` is cut.
    """
    dimensions = base.mean_MD.shape[1]
    axis = torch.linspace(-half_width, half_width, points if dimensions == 1 else 6 * int(points**0.5))
    x_ND = torch.cartesian_prod(*[axis.double()] * dimensions).reshape(-1, dimensions)
    log_N = (1 - w) * base.log_density(x_ND) + w * tuned.log_density(x_ND)
    share_N = log_N.softmax(dim=0)
    edge_N = (x_ND.abs() >= half_width).any(dim=1)
    if float(share_N[edge_N].max()) > 1e-6 * float(share_N.max()):
        return None
    return _moments(base, tuned, x_ND, share_N)


def measured(base: Mixture, tuned: Mixture, x_BD: Tensor) -> Moments:
    """Moments of samples."""
    return _moments(base, tuned, x_BD.double(), torch.full((len(x_BD),), 1 / len(x_BD), dtype=torch.float64))


def _moments(base: Mixture, tuned: Mixture, x_ND: Tensor, share_N: Tensor) -> Moments:
    x_N = x_ND[:, 0]
    mean = (share_N * x_N).sum()
    values = (x_N, (x_N - mean) ** 2, (x_N > 0).double(), log_ratio(base, tuned, x_ND))
    return Moments(*(float((share_N * value).sum()) for value in values))
