"""The sampled oracle: what the exact optimum at any KL coefficient would score, from rewards of base samples alone.

The optimum of E[R] - beta KL(p || p_base) is p_beta ~ p_base exp(R / beta). With rewards R_n of N samples of the base,

    E_beta[R] = sum_n R_n e^(R_n/beta) / sum_n e^(R_n/beta)         KL = E_beta[R] / beta - log mean_n e^(R_n/beta)

per prompt, and means over prompts. The slope of this frontier is dE / dKL = beta, and along w of the family
p_base exp(w R / beta) it is beta / w. Weights are trusted while their effective number is large.

Intervals are percentile bootstraps in two stages: prompts, and within each prompt its base samples and its images.

Legend: P prompts, N base samples a prompt, K images a prompt, S resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from rlg.stats import Estimate

Array = NDArray[np.float64]


def tilted(reward_PN: Array, beta: float, count_PN: Array | None = None) -> tuple[Array, Array, Array]:
    """(E_beta[R], KL in nats, effective number of samples), (..., P) each.

    count_PN: (..., P, N) how often each sample counts (default: once). Raises ValueError for beta <= 0.
    """
    if not beta > 0:
        raise ValueError(f"the KL coefficient must be positive, got {beta:g}")
    best_P1 = reward_PN.max(axis=-1, keepdims=True)
    weight_PN = np.exp((reward_PN - best_P1) / beta)
    count_PN = np.ones_like(reward_PN) if count_PN is None else count_PN
    total_P = np.einsum("...pn,pn->...p", count_PN, weight_PN)
    mean_P = np.einsum("...pn,pn->...p", count_PN, weight_PN * reward_PN) / total_P
    kl_P = (mean_P - best_P1[:, 0]) / beta - np.log(total_P / count_PN.sum(axis=-1))
    return mean_P, kl_P, total_P**2 / np.einsum("...pn,pn->...p", count_PN, weight_PN**2)


@dataclass(frozen=True)
class Oracle:
    """Rewards of base samples, and their resamples."""

    reward_PN: Array
    resamples: int = 1000
    seed: int = 0

    @cached_property
    def _count_SPN(self) -> Array:
        return _counts(self.resamples, self.reward_PN.shape, self.seed)

    @cached_property
    def _prompts_SP(self) -> Array:
        prompts = len(self.reward_PN)
        return _counts(self.resamples, (1, prompts), self.seed + 1)[:, 0]

    def at(self, beta: float) -> tuple[Array, Array]:
        """(E_beta[R], KL in nats), (1 + S, P) each: of the samples, and of each resample of them."""
        own, resampled = tilted(self.reward_PN, beta), tilted(self.reward_PN, beta, self._count_SPN)
        return np.concatenate([own[0][None], resampled[0]]), np.concatenate([own[1][None], resampled[1]])

    def ess(self, beta: float) -> float:
        """Mean over prompts of the effective number of samples."""
        return float(tilted(self.reward_PN, beta)[2].mean())

    def base(self) -> Array:
        """(1 + S, P) mean rewards of the base."""
        return self.images(self.reward_PN, self._count_SPN)

    def images(self, value_PK: Array, count_SPK: Array | None = None) -> Array:
        """(1 + S, P) means of images that are not of the base, and of resamples of theirs."""
        if count_SPK is None:
            count_SPK = _counts(self.resamples, value_PK.shape, self.seed + 2)
        resampled_SP = np.einsum("spk,pk->sp", count_SPK, value_PK) / value_PK.shape[1]
        return np.concatenate([value_PK.mean(axis=1)[None], resampled_SP])

    def estimate(self, top_SP: Array, bottom_SP: Array | None = None) -> Estimate:
        """Mean over prompts of (1 + S, P) values, or the ratio of two such means, over resampled prompts.

        A ratio is nan where its bottom is zero; resamples in which it is are left out of the interval.
        """
        weight_SP = np.concatenate([np.ones((1, top_SP.shape[1])), self._prompts_SP])
        top_S = (weight_SP * top_SP).sum(axis=1)
        bottom_S = (weight_SP if bottom_SP is None else weight_SP * bottom_SP).sum(axis=1)
        value_S = np.divide(top_S, bottom_S, out=np.full_like(top_S, np.nan), where=bottom_S != 0)
        known_S = value_S[1:][np.isfinite(value_S[1:])]
        low, high = np.percentile(known_S, [2.5, 97.5]) if len(known_S) else (np.nan, np.nan)
        return Estimate(float(value_S[0]), float(low), float(high))

    def slope(self, beta: float, step: float = 1.01) -> Estimate:
        """dE / dKL at beta, between beta / step and beta * step."""
        rise, run = (near - far for near, far in zip(self.at(beta / step), self.at(beta * step), strict=True))
        return self.estimate(rise, run)

    def matching(self, reward: float) -> float:
        """The beta whose mean reward is `reward`; inf at or under the base's, 0 over what samples reach."""
        return _bisect(lambda beta: float(tilted(self.reward_PN, beta)[0].mean()), reward, *self._range)

    @cached_property
    def _range(self) -> tuple[float, float]:
        spread = float(self.reward_PN.std(axis=1).mean())
        return 1e-2 * spread, 1e3 * spread


def _counts(resamples: int, shape: Sequence[int], seed: int) -> Array:
    """(S, *shape): how often each of the last axis is drawn, with replacement, for every place of the others."""
    count = shape[-1]
    draws = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=(resamples, *shape[:-1]))
    return draws.astype(np.float64)


def _bisect(falling: Callable[[float], float], value: float, low: float, high: float) -> float:
    if value >= falling(low):
        return 0.0
    if value <= falling(high):
        return float("inf")
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if falling(middle) > value else (low, middle)
    return (low * high) ** 0.5
