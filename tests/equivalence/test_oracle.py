"""The sampled oracle against closed forms (coverage is in test_calibration_oracle)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlg.equivalence.oracle import TRUSTED, Oracle, tilted


def gaussian(prompts: int = 6, samples: int = 4000, seed: int = 0) -> np.ndarray:
    """(P, N) rewards of standard deviation 0.5, with a mean of each prompt's own."""
    return np.random.default_rng(seed).normal(size=(prompts, samples)) * 0.5 + np.arange(prompts)[:, None]


def test_by_hand() -> None:
    """Rewards 0, 0, log 3 at beta 1: weights 1, 1, 3, and without each of them 1, 3 or 1, 1.

    E = 0.6 log 3, without one 0.75 log 3 twice and 0 once: 3 E - 2 mean = (1.8 - 1) log 3. KL alike: E - log (5/3),
    and without one 0.75 log 3 - log 2 twice and 0 once.
    """
    reward, kl, ess = tilted(np.array([[0.0, 0.0, math.log(3.0)]]), beta=1.0)
    log3 = math.log(3)
    assert reward == pytest.approx([0.8 * log3])
    assert kl == pytest.approx([3 * (0.6 * log3 - math.log(5 / 3)) - 4 / 3 * (0.75 * log3 - math.log(2))])
    assert ess == pytest.approx([25 / 11])
    for beta in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            tilted(np.zeros((1, 2)), beta)


def test_gaussian_rewards_have_a_gaussian_optimum() -> None:
    """R ~ N(m, s^2): E_beta[R] = m + s^2 / beta and KL = s^2 / (2 beta^2)."""
    oracle = Oracle(gaussian())
    for beta in (2.0, 1.0, 0.5):
        reward_P, kl_P = oracle.at(beta)
        assert reward_P.mean() == pytest.approx(2.5 + 0.25 / beta, abs=0.02)
        assert kl_P.mean() == pytest.approx(0.125 / beta**2, rel=0.06)
        assert oracle.ess(beta) == pytest.approx(4000 * math.exp(-0.25 / beta**2), rel=0.05)
    base_P, none_P = oracle.at(math.inf)
    assert base_P.mean() == pytest.approx(2.5, abs=0.02) and not none_P.any()


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("law", ["normal", "exponential"])
def test_the_slope_of_the_frontier_is_beta(beta: float, law: str) -> None:
    """dE / dKL = beta is an identity of any finite sample: a test of the code, and no evidence of a fit."""
    reward_PN = getattr(np.random.default_rng(0), law)(size=(4, 400))
    (near, near_kl, _), (far, far_kl, _) = (tilted(reward_PN, beta * step) for step in (1 / 1.001, 1.001))
    assert (near - far).mean() / (near_kl - far_kl).mean() == pytest.approx(beta, rel=1e-3)


def test_matching_inverts_the_frontier() -> None:
    oracle = Oracle(gaussian())
    weight_MP = np.array([np.ones(6), [1, 1, 0, 1, 1, 1]])
    for beta in (0.4, 1.0, 5.0):
        reward_P = oracle.at(beta)[0]
        reward_M = weight_MP @ reward_P / weight_MP.sum(axis=1)
        assert oracle.matching(reward_M, weight_MP) == pytest.approx([beta] * 2, rel=1e-3)
        assert oracle.reward(np.full(2, beta), weight_MP) == pytest.approx(reward_M, rel=1e-4)
    beyond = np.array([oracle.reward_PN.mean() - 1, oracle.reward_PN.max() + 1])
    assert np.isnan(oracle.matching(beyond, np.ones((2, 6)))).all()


def test_too_few_samples_are_not_believed() -> None:
    oracle = Oracle(gaussian(samples=200))
    assert oracle.ess(1.0) > TRUSTED > oracle.ess(0.4)
    assert oracle.at(1.0) is not None and oracle.at(0.4) is None
    assert np.isnan(oracle.reward(np.array([0.4]), np.ones((1, 6)))).all()
    few = Oracle(gaussian(samples=20))  # none counts a hundred times
    assert few.at(100.0) is None and few.at(math.inf) is not None
    assert np.isnan(few.matching(np.zeros(1), np.ones((1, 6)))).all()
    assert np.isnan(few.reward(np.ones(1), np.ones((1, 6)))).all()
