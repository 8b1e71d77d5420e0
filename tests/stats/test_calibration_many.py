"""Calibration of what is said of many w at once: falls, marks of a grid, the best w; error rates and power.

Every flat case has noises that the w share, as they do: what is drawn at one w is paired with what is drawn at
another.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pytest

from rlg.evaluation.rows import Row
from rlg.evaluation.summary import best_w, first_fall, perhaps_best
from rlg.stats import Family, family

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)


def sweep_of(values_WGK: np.ndarray) -> dict[float, list[Row]]:
    """Rows of the first scales."""
    return {
        w: [
            Row(p, "", None, k, 0, w, "ode", "rlg", {"r": float(value)}, None, None, 1, 0.0)
            for (p, k), value in np.ndenumerate(values_GK)
        ]
        for w, values_GK in zip(SCALES, values_WGK, strict=False)
    }


def drawn(rng: np.random.Generator, kind: str, W: int, G: int, K: int, mean_W: Sequence[float] = ()) -> np.ndarray:
    """(W, G, K) values whose means are mean_W (default: flat), half of an image's variance shared by all w."""
    if kind == "verdicts":
        shared, own = rng.random((G, K)) < 0.8, rng.random((W, G, K)) < 0.8
        return np.where(rng.random((W, G, K)) < 0.75, shared, own).astype(float)
    if kind == "skewed":
        return np.exp(rng.normal(size=(G, 1)) + 0.5 * rng.normal(size=(W, G, K)))
    values = np.sqrt(0.5) * (rng.normal(size=(G, K)) + rng.normal(size=(W, G, K)))
    return values + np.reshape(mean_W, (-1, 1, 1)) if len(mean_W) else values


def judged(values_WGK: np.ndarray) -> Family:
    """Differences of every two w, judged together: what `first_fall` goes by, without its rows."""
    pairs = list(combinations(range(len(values_WGK)), 2))
    groups = np.repeat(np.arange(values_WGK.shape[1]), values_WGK.shape[2])
    return family([((values_WGK[b] - values_WGK[a]).ravel(), groups) for a, b in pairs])


def falls(values_WGK: np.ndarray) -> bool:
    """Whether a reward is said to fall."""
    found = judged(values_WGK)
    return bool((found.sure_P & (found.mean_P < 0)).any())


def test_rows_and_their_values_are_judged_alike() -> None:
    rng = np.random.default_rng(9)
    for fall in (0.0, 0.2, 0.4, 0.6):
        values = drawn(rng, "normal", 4, 16, 2, [0, 0, 0, -fall])
        assert (first_fall(sweep_of(values), "r") is not None) is falls(values)


@pytest.mark.parametrize("kind", ["normal", "verdicts", "skewed"])
@pytest.mark.parametrize(("W", "G", "K"), [(3, 16, 4), (8, 24, 2), (8, 71, 4)])
def test_a_flat_reward_seldom_falls(kind: str, W: int, G: int, K: int) -> None:
    """Nominal 2.5% of sweeps, whatever their number of w; asked for: at most 5%."""
    rng, times = np.random.default_rng(0), 400 if G < 71 else 150
    assert sum(falls(drawn(rng, kind, W, G, K)) for _ in range(times)) / times <= 0.05


@pytest.mark.parametrize(("G", "fall", "power"), [(71, 0.2, 0.6), (71, 0.3, 0.95), (24, 0.5, 0.9)])
def test_a_reward_that_falls_is_found(G: int, fall: float, power: float) -> None:
    """Flat up to w = 1.5, then lower by a share of an image's standard deviation; 4 images a prompt."""
    rng, times = np.random.default_rng(0), 40
    means = [0.0] * 6 + [-fall, -fall]
    found = [first_fall(sweep_of(drawn(rng, "normal", 8, G, 4, means)), "r") for _ in range(times)]
    assert np.mean([f is not None for f in found]) >= power
    assert np.mean([f is not None and f["w"] < 2 for f in found]) <= 0.05  # nowhere before it does
    simultaneous = [f["delta_ci95"][0] <= -fall <= f["delta_ci95"][1] for f in found if f]
    assert np.mean(simultaneous) >= 0.93


@pytest.mark.parametrize("kind", ["normal", "verdicts"])
def test_a_grid_without_differences_is_seldom_marked(kind: str) -> None:
    """9 rows of 5 cells, 24 prompts x 2 images, every row with a w = 1 of its own: one mark in 5% of grids."""
    rng, times, groups = np.random.default_rng(0), 200, np.repeat(np.arange(24), 2)
    marked = 0
    for _ in range(times):
        rows = [drawn(rng, kind, 6, 24, 2) for _ in range(9)]
        cells = [((row[c] - row[0]).ravel(), groups) for row in rows for c in range(1, 6)]
        marked += bool(family(cells).sure_P.any())
    assert marked / times <= 0.06


def test_a_cell_that_differs_is_marked_and_the_others_are_not() -> None:
    rng, times, groups = np.random.default_rng(1), 60, np.repeat(np.arange(24), 2)
    hits = others = 0
    for _ in range(times):
        rows = [drawn(rng, "normal", 6, 24, 2) for _ in range(9)]
        rows[4][3] += 1.0
        sure_P = family([((row[c] - row[0]).ravel(), groups) for row in rows for c in range(1, 6)]).sure_P
        hits += bool(sure_P[4 * 5 + 2])
        others += bool(np.delete(sure_P, 4 * 5 + 2).any())
    assert hits / times >= 0.9 and others / times <= 0.08


@pytest.mark.parametrize("means", [(0, 0.2, 0.4, 0.45, 0.5, 0.45, 0.3, 0.0), (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)])
def test_the_best_w_is_among_those_that_none_surely_beats(means: tuple[float, ...]) -> None:
    rng, times, best = np.random.default_rng(2), 80, SCALES[int(np.argmax(means))]
    ends = [perhaps_best(sweep_of(drawn(rng, "normal", 8, 24, 4, means)), "r") for _ in range(times)]
    assert np.mean([low <= best <= high for low, high in ends]) >= 0.95
    assert np.mean([low > 0 for low, _ in ends]) > 0.5  # and the base is not


@pytest.mark.parametrize("G", [16, 24])
def test_a_best_w_is_reported_without_flattery(G: int) -> None:
    """Flat, so that the difference of whichever w is chosen is 0; on the same images it is above it."""
    rng, times = np.random.default_rng(3), 200
    deltas, flattered = [], []
    for _ in range(times):
        values = drawn(rng, "normal", 8, G, 4)
        sweep = sweep_of(values)
        best = best_w(sweep, "r", sweep[1.0])
        deltas += [best.delta] if best.delta else []
        means_W = values.mean(axis=(1, 2))
        flattered.append(means_W.max() - means_W[4])
    error = float(np.std([delta.mean for delta in deltas]) / np.sqrt(len(deltas)))
    assert abs(np.mean([delta.mean for delta in deltas])) < 3 * error
    assert np.mean(flattered) > 5 * error
    assert 0.925 <= np.mean([delta.low <= 0 <= delta.high for delta in deltas]) <= 0.98
