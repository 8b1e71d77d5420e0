"""The sampled oracle against closed forms, and its intervals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlg.oracle import Oracle, tilted


def gaussian(prompts: int = 6, samples: int = 4000, seed: int = 0) -> np.ndarray:
    """(P, N) rewards of standard deviation 0.5, with a mean of each prompt's own."""
    return np.random.default_rng(seed).normal(size=(prompts, samples)) * 0.5 + np.arange(prompts)[:, None]


def test_by_hand() -> None:
    reward, kl, ess = tilted(np.array([[0.0, math.log(3.0)]]), beta=1.0)
    assert reward == pytest.approx([0.75 * math.log(3)])
    assert kl == pytest.approx([0.75 * math.log(3) - math.log(2)])
    assert ess == pytest.approx([16 / 10])
    twice = tilted(np.array([[0.0, math.log(3.0)]]), 1.0, np.array([[2.0, 1.0]]))
    assert twice[0] == pytest.approx([0.6 * math.log(3)])
    assert twice[1] == pytest.approx([0.6 * math.log(3) - math.log(5 / 3)])
    for beta in (0.0, -1.0):
        with pytest.raises(ValueError, match="must be positive"):
            tilted(np.zeros((1, 2)), beta)


def test_gaussian_rewards_have_a_gaussian_optimum() -> None:
    """R ~ N(m, s^2): E_beta[R] = m + s^2 / beta and KL = s^2 / (2 beta^2)."""
    oracle = Oracle(gaussian(), resamples=200)
    for beta in (2.0, 1.0, 0.5):
        reward, kl = (oracle.estimate(values) for values in oracle.at(beta))
        assert reward.mean == pytest.approx(2.5 + 0.25 / beta, abs=0.02)
        assert kl.mean == pytest.approx(0.125 / beta**2, rel=0.06)
        assert oracle.ess(beta) == pytest.approx(4000 * math.exp(-0.25 / beta**2), rel=0.05)


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0, 2.0])
def test_the_slope_of_the_frontier_is_beta(beta: float) -> None:
    slope = Oracle(gaussian(samples=2000), resamples=200).slope(beta)
    assert slope.low <= beta * 1.001 and slope.high >= beta * 0.999
    assert slope.mean == pytest.approx(beta, rel=1e-3)


def test_matching_inverts_the_frontier() -> None:
    oracle = Oracle(gaussian(), resamples=10)
    for beta in (0.3, 1.0, 5.0):
        assert oracle.matching(float(oracle.at(beta)[0][0].mean())) == pytest.approx(beta, rel=1e-6)
    assert oracle.matching(float(oracle.reward_PN.mean()) - 1) == math.inf
    assert oracle.matching(float(oracle.reward_PN.max()) + 1) == 0.0


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Prompts of one mean: E_beta[R] = 0.5 at beta = 0.5, 95% intervals from 8 prompts of 200 samples."""
    hits = 0
    for seed in range(60):
        reward_PN = np.random.default_rng(seed).normal(size=(8, 200)) * 0.5
        estimate = Oracle(reward_PN, resamples=200, seed=seed).estimate(Oracle(reward_PN, 200, seed).at(0.5)[0])
        hits += estimate.low <= 0.5 <= estimate.high
    assert hits >= 50


def test_a_ratio_is_of_means_and_pairs_its_parts() -> None:
    oracle = Oracle(gaussian(prompts=5, samples=50), resamples=300)
    top = oracle.base()
    same = oracle.estimate(top, top)
    assert (same.mean, same.low, same.high) == pytest.approx((1, 1, 1))
    half = oracle.estimate(top, 2 * top)
    assert half.mean == pytest.approx(0.5)
