"""Calibration of the effective share: log-weights of known spread, at the numbers of images that are drawn.

Log-weights N(0, s^2) have the share exp(-s^2). K images show more than that, and never less than 1 / K.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from rlg.equivalence.mixtures import tilted
from rlg.equivalence.toy import CASES, moments
from rlg.evaluation.choose_w import Choice, Goal, choose
from rlg.evaluation.rows import Row
from rlg.evaluation.summary import effective_share

PROMPTS = 16


def rows_of(log_weight_GK: np.ndarray) -> list[Row]:
    return [
        Row(p, "", None, k, 0, 2.0, "sde", "rlg", {"r": 0.0}, None, None, 1, 0.0, float(log))
        for (p, k), log in np.ndenumerate(log_weight_GK)
    ]


@pytest.mark.parametrize("k", [2, 4, 16, 32])
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 5.0])
def test_the_share_of_the_law_is_under_the_bound(k: int, spread: float) -> None:
    """In 97.5% or more, from 16 prompts; where K is small or weights are heavy, in all."""
    rng, times = np.random.default_rng(0), 200
    shares = [effective_share(rows_of(spread * rng.normal(size=(PROMPTS, k)))) for _ in range(times)]
    assert np.mean([math.exp(-(spread**2)) <= share.at_most for share in shares]) >= 0.96
    assert all(1 / k <= share.mean <= share.at_most <= 1 for share in shares)


@pytest.mark.parametrize("k", [4, 16])
def test_the_heaviest_weight_tells_the_floor_from_a_share(k: int) -> None:
    """At s = 5 K images show about 1 / K though the law has 1e-11; one of them holds nearly all."""
    share = effective_share(rows_of(5 * np.random.default_rng(1).normal(size=(200, k))))
    assert share.mean < 2 / k and share.largest > 0.7


def law(spread: float, seed: int) -> Callable[[float, int], list[Row]]:
    """Weights whose spread grows with w - 1; the first images are the same whatever their number."""
    noise_GK = np.random.default_rng(seed).normal(size=(PROMPTS, 64))
    return lambda w, k: rows_of(spread * (w - 1) * noise_GK[:, :k])


def chosen(asked: float, spread: float, seed: int) -> Choice | None:
    """The w of --min_ess, None where it is refused for want of images."""
    try:
        return choose(Goal("min_ess", asked), law(spread, seed), "r", k=4)
    except ValueError as error:
        assert "too few to know it; ask for a larger share, or give a larger --k" in str(error)
        return None


@pytest.mark.parametrize("asked", [0.5, 0.7])
def test_min_ess_finds_a_w_of_about_that_share(asked: float) -> None:
    """Sixteen images show up to 16% more than the law has, both counts compared 4%; prompts add noise."""
    found = [each for seed in range(60) if (each := chosen(asked, 0.6, seed))]
    assert len(found) >= 55  # 16 prompts may look by chance as if twice the images moved the share
    shares = np.array([math.exp(-((0.6 * (each.w - 1)) ** 2)) for each in found])
    assert asked * 0.88 < shares.mean() < asked * 1.02
    assert shares.min() > asked * 0.7
    assert {each.images for each in found} == {32}
    assert np.mean([each.share for each in found]) == pytest.approx(shares.mean(), abs=0.05)


def test_min_ess_refuses_a_share_that_images_cannot_tell() -> None:
    """At 0.15 of 16 images the law has 1% or less: twice as many show it."""
    assert sum(chosen(0.15, 1.0, seed) is None for seed in range(60)) >= 57


def test_standard_errors_of_the_toy() -> None:
    """Between 20 groups of samples: the truth is within two of them in 94% (Student, 19 degrees of freedom)."""
    case = CASES["narrow"]
    exact = tilted(case.base, case.tuned, 1.0)
    generator, inside = torch.Generator().manual_seed(0), []
    for _ in range(200):
        x = 1 + math.sqrt(0.5) * torch.randn(400, 1, 1, 1, generator=generator)  # of the tuned law
        value, error = moments(case, x.flatten(1))
        inside += [abs(getattr(value, q) - getattr(exact, q)) <= 2 * getattr(error, q) for q in ("mean", "reward")]
    assert 0.91 <= np.mean(inside) <= 0.97
