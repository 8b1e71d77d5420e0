"""The sampled oracle: scores of the exact optimum at any KL coefficient.

Rewards of base samples are all that it needs. The optimum of E[R] - beta KL(p || p_base) is p_beta ~ p_base exp(R /
beta). With rewards R_n of N samples of the base, for each prompt,

    E_beta[R] = sum_n R_n e^(R_n/beta) / sum_n e^(R_n/beta)         KL = E_beta[R] / beta - log mean_n e^(R_n/beta)

Both are ratios of means and biased towards the base. The jackknife over the N samples takes out the bias of order 1/N.
The rest grows as the effective number of samples falls, and fastest where the reward has a long upper tail. So nothing
is said under TRUSTED of them, mean over prompts (coverage: tests/stats/test_calibration_oracle.py). The spread over
prompts gives the interval (`rlg.stats`), as it has the noise of samples in it. dE / dKL = beta is an identity of any
finite sample, and so no evidence.

Legend: P prompts, N base samples a prompt, B betas, M weightings of the prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rlg.stats import Array, weighted_mean

TRUSTED = 100  # least effective samples a prompt with which the oracle is trusted
_BETAS = 400  # points of its curve


def tilted(reward_PN: Array, beta: float) -> tuple[Array, Array, Array]:
    """(E_beta[R], KL in nats, effective number of samples), (P,) each.

    The first two are without their bias of order 1/N. Raises ValueError for beta <= 0.
    """
    if not beta > 0:
        raise ValueError(f"the KL coefficient must be positive, got {beta:g}")
    count, best_P1 = reward_PN.shape[1], reward_PN.max(axis=1, keepdims=True)
    weight_PN = np.exp((reward_PN - best_P1) / beta)
    total_P1, square_P = weight_PN.sum(axis=1, keepdims=True), (weight_PN**2).sum(axis=1)
    reached_P1 = (weight_PN * reward_PN).sum(axis=1, keepdims=True)

    def at(total: Array, reached: Array, samples: int) -> tuple[Array, Array]:
        mean = reached / total
        return mean, (mean - best_P1) / beta - np.log(total / samples)

    whole = at(total_P1, reached_P1, count)
    with np.errstate(divide="ignore", invalid="ignore"):
        without = at(total_P1 - weight_PN, reached_P1 - weight_PN * reward_PN, count - 1)
    mean_P, kl_P = (
        count * all_P1[:, 0] - (count - 1) * _known(each_PN, all_P1).mean(axis=1)
        for all_P1, each_PN in zip(whole, without, strict=True)
    )
    return mean_P, kl_P, total_P1[:, 0] ** 2 / square_P


def _known(each_PN: Array, all_P1: Array) -> Array:
    """The values without a sample, or of all samples.

    All samples stand where one holds all of the weight.
    """
    return np.where(np.isfinite(each_PN), each_PN, all_P1)


@dataclass(frozen=True)
class Oracle:
    """Rewards of base samples, and the optimum at other betas."""

    reward_PN: Array

    def at(self, beta: float) -> tuple[Array, Array] | None:
        """(E_beta[R], KL in nats), (P,) each; None where too few samples count.

        At infinity they are the base's own.
        """
        if beta == float("inf"):
            return self.base_P, np.zeros_like(self.base_P)
        return tilted(self.reward_PN, beta)[:2] if self.ess(beta) >= TRUSTED else None

    def ess(self, beta: float) -> float:
        """Mean over prompts of the effective number of samples."""
        return self.reward_PN.shape[1] if beta == float("inf") else float(tilted(self.reward_PN, beta)[2].mean())

    @property
    def base_P(self) -> Array:
        """(P,) mean rewards of the base."""
        return self.reward_PN.mean(axis=1)

    @cached_property
    def _curve(self) -> tuple[Array, Array]:
        """(B,) logs of trusted betas, the largest first, and (P, B) rewards."""
        spread = float(self.reward_PN.std(axis=1).mean()) or 1.0
        logs, rewards = [], []
        for beta in np.geomspace(1e3 * spread, 1e-2 * spread, _BETAS):
            mean_P, _, ess_P = tilted(self.reward_PN, float(beta))
            if ess_P.mean() < TRUSTED:
                break
            logs.append(float(np.log(beta)))
            rewards.append(mean_P)
        return np.array(logs), np.stack(rewards, axis=1) if rewards else np.zeros((len(self.reward_PN), 0))

    def matching(self, reward_M: Array, weight_MP: Array) -> Array:
        """(M,) betas whose mean reward over the weighted prompts is given.

        A beta is nan where no trusted one has that reward.
        """
        logs_B, reward_PB = self._curve
        if not len(logs_B):
            return np.full(len(reward_M), np.nan)
        rising_MB = np.maximum.accumulate(weighted_mean(weight_MP, reward_PB), axis=1)
        found = [
            np.interp(reward, row_B, logs_B, left=np.nan, right=np.nan)
            for reward, row_B in zip(reward_M, rising_MB, strict=True)
        ]
        return np.exp(found)

    def reward(self, beta_M: Array, weight_MP: Array) -> Array:
        """(M,) mean rewards over the weighted prompts, each at its own beta.

        A reward is nan where it is not trusted.
        """
        logs_B, reward_PB = self._curve
        if not len(logs_B):
            return np.full(len(beta_M), np.nan)
        found = [
            np.interp(-np.log(beta), -logs_B, row_B, left=np.nan, right=np.nan)
            for beta, row_B in zip(beta_M, weighted_mean(weight_MP, reward_PB), strict=True)
        ]
        return np.array(found)
