"""Estimates and their intervals, with prompts as the units.

Images of one prompt resemble each other, so an interval that treats them as independent is too narrow. S_g is the sum
and n_g the number of values of prompt g. All intervals rest on G residuals z_g of mean 0:

    mean m = sum S / sum n      z_g = G (S_g - m n_g) / sum n
    any other theta             z_g = (G - 1) (mean of theta without a prompt - theta without g), the jackknife

    difference   m +- t s / sqrt G, s^2 = sum z^2 / (G - 1), t of G - 1 degrees of freedom
    mean         the same with Hall's correction for skewness (J. Roy. Statist. Soc. B 54, 1992, 221-228)
    ratio        Fieller's set: every r for which the difference of the top and r times the bottom may be 0
    many         max |t| of all under flipped signs of whole prompts: one error rate for the whole family

A mean of 0/1 scores stays inside the exact binomial interval of G prompts, which is needed where every score is 0.
tests/stats/test_calibration.py measures coverage and error rates at the sizes of reports. It also says where they fall
short: a mean of which a few prompts hold most is covered in 91% at 16 to 24 prompts.

Legend: N values (images), G groups (prompts), P members of a family, R random flips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

Array = NDArray[np.float64]

CONFIDENCE = 0.95
PERCENT = f"{100 * CONFIDENCE:g}%"  # the confidence as text
_FLIPS = 2000
_SCORES = np.array([0.0, 0.5, 1.0])  # scores of a verdict, or of a win with ties
_EQUAL = 1e-12  # residuals below this share of the values are rounding errors


@dataclass(frozen=True)
class Estimate:
    """A value and its confidence interval.

    An end is infinite where nothing bounds it.
    """

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, ends: Sequence[float] | None) -> Estimate:
        """An estimate from a file, which may lack the interval."""
        return cls(mean, *(ends or (math.nan, math.nan)))

    def __format__(self, spec: str) -> str:
        """Format all three numbers by one spec, as "1.50 [1.25, 1.75]".

        Only the mean gets the spec's sign.
        """
        return self.text(lambda value: format(value, spec), lambda end: format(end, spec.removeprefix("+")))

    def text(self, number: Callable[[float], str], number_of_end: Callable[[float], str] | None = None) -> str:
        """Join the three numbers as `__format__` does.

        number: writes the mean, and also the ends without `number_of_end`.
        """
        return f"{number(self.mean)} {interval_text((self.low, self.high), number_of_end or number)}"


def interval_text(ends: Sequence[float], number: Callable[[float], str]) -> str:
    """The form of an interval in texts.

    It is "[low, high]", or says that there are no bounds.
    """
    low, high = ends
    return f"[{number(low)}, {number(high)}]" if math.isfinite(low + high) else "(no bounds)"


def grouped_mean(
    values_N: ArrayLike, groups_N: ArrayLike, *, scores: bool = True, confidence: float = CONFIDENCE
) -> Estimate:
    """Mean of the values, with an interval over groups (prompts).

    With a single group, its values are the units instead. A single value has an interval of no width, unless it is a
    score of 0 or 1. scores: whether values that are all 0, 1/2 or 1 are scores, so that others were possible. A path
    KL that is 0 by definition is no score. Raises ValueError for no values, lengths that differ, or a value that is
    not finite (named by index and group).
    """
    sum_G, count_G = _sums(*_checked(values_N, groups_N))
    mean = float(sum_G.sum() / count_G.sum())
    estimate = Estimate(mean, *_corrected(mean, _residuals(sum_G, count_G), confidence))
    if scores and bool(np.isin(np.asarray(values_N), _SCORES).all()):
        return _within(estimate, *_binomial(mean, len(sum_G), confidence))
    return estimate


def paired_difference(
    a_N: ArrayLike, b_N: ArrayLike, groups_N: ArrayLike, *, confidence: float = CONFIDENCE
) -> Estimate:
    """Mean of a - b over pairs with the same prompt and noise.

    If 0/1 scores seldom change, their lack of change is no proof. So one more changed image is added to the width.
    Raises ValueError as `grouped_mean` does.
    """
    a, b = _aligned(a_N, b_N)
    sum_G, count_G = _sums(*_checked(a - b, groups_N))
    mean = float(sum_G.sum() / count_G.sum())
    seldom = bool(np.isin(a, _SCORES[::2]).all() and np.isin(b, _SCORES[::2]).all())
    unseen = (len(sum_G) / count_G.sum()) ** 2 if seldom else 0.0
    reach = _reach(_residuals(sum_G, count_G), confidence, unseen)
    return Estimate(mean, mean - reach, mean + reach)


def win_rate(a_N: ArrayLike, b_N: ArrayLike, groups_N: ArrayLike, *, confidence: float = CONFIDENCE) -> Estimate:
    """Share of the pairs in which a beats b.

    A tie counts one half. Raises ValueError as `grouped_mean` does.
    """
    a, b = _aligned(a_N, b_N)
    wins = np.where(np.isfinite(a - b), (a > b) + 0.5 * (a == b), np.nan)
    return grouped_mean(wins, groups_N, confidence=confidence)


@dataclass(frozen=True)
class Estimated:
    """A value with the residuals of its G prompts.

    Their mean is 0.
    """

    mean: float
    residual_G: Array

    def interval(self, confidence: float = CONFIDENCE) -> Estimate:
        """The interval of a difference, or of any nearly symmetric statistic."""
        if not math.isfinite(self.mean):
            return Estimate(self.mean, math.nan, math.nan)
        reach = _reach(self.residual_G, confidence)
        return Estimate(self.mean, self.mean - reach, self.mean + reach)


def ratio(top: Estimated, bottom: Estimated, confidence: float = CONFIDENCE) -> Estimate:
    """The ratio top / bottom, with Fieller's interval.

    Its ends are infinite where the bottom may be 0, and nan where it is 0.
    """
    groups = len(top.residual_G)
    scale = _quantile(groups, confidence) ** 2 / (groups * max(groups - 1, 1))

    def less_noise(x: Estimated, y: Estimated) -> float:
        return x.mean * y.mean - scale * float(x.residual_G @ y.residual_G)

    a, b, c = less_noise(bottom, bottom), less_noise(top, bottom), less_noise(top, top)
    if bottom.mean == 0 or not math.isfinite(top.mean + bottom.mean):
        return Estimate(math.nan, math.nan, math.nan)
    if a <= 0:
        return Estimate(top.mean / bottom.mean, -math.inf, math.inf)
    root = math.sqrt(max(0.0, b * b - a * c))
    return Estimate(top.mean / bottom.mean, (b - root) / a, (b + root) / a)


def summed(values_N: ArrayLike, groups_N: ArrayLike) -> Estimated:
    """A mean with its residuals, for `ratio`.

    Raises ValueError as `grouped_mean` does.
    """
    sum_G, count_G = _sums(*_checked(values_N, groups_N))
    return Estimated(float(sum_G.sum() / count_G.sum()), _residuals(sum_G, count_G))


def jackknife(statistic: Callable[[Array], Array], groups: int) -> Estimated:
    """A smooth statistic of prompts, with its residuals.

    statistic: takes weights (M, G) of the prompts, each 0 or 1, and returns its M values. If one of these is not
    finite, the interval is not finite either.
    """
    weight_MG = np.concatenate([np.ones((1, groups)), 1 - np.eye(groups)])
    value_M = np.asarray(statistic(weight_MG), dtype=np.float64)
    return Estimated(float(value_M[0]), (groups - 1) * (value_M[1:].mean() - value_M[1:]))


def weighted_mean(weight_MG: Array, value_G: Array) -> Array:
    """(M, ...) means of the prompts' values (G, ...) under M weightings.

    The weightings are those of `jackknife`.
    """
    total_M = weight_MG.sum(axis=1)
    return weight_MG @ value_G / total_M.reshape(-1, *[1] * (value_G.ndim - 1))


@dataclass(frozen=True)
class Family:
    """Differences that are judged together.

    The chance that any is called `sure` without being one is 5% in all.
    """

    mean_P: Array
    error_P: Array  # standard errors
    critical: float  # critical value of |t|; inf if there are too few prompts for any member to be sure

    @property
    def sure_P(self) -> NDArray[np.bool_]:
        """True for members that surely differ from 0."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.abs(self.mean_P / self.error_P) > self.critical

    def interval(self, p: int) -> Estimate:
        """The simultaneous interval of a member."""
        reach = self.critical * self.error_P[p] if self.error_P[p] else 0.0
        return Estimate(float(self.mean_P[p]), float(self.mean_P[p] - reach), float(self.mean_P[p] + reach))


def family(members: Sequence[tuple[ArrayLike, ArrayLike]], confidence: float = CONFIDENCE, seed: int = 0) -> Family:
    """Judge paired differences together.

    members: (differences, their prompts) each. The law of the largest |t| comes from flipping the signs of whole
    prompts, the same ones in every member (Westfall and Young, 1993). It is exact where differences are symmetric
    about 0, as they are between two w of one effect. Raises ValueError as `grouped_mean` does.
    """
    checked = [_checked(*member) for member in members]
    names = np.unique(np.concatenate([groups for _, groups in checked]))
    tables = [_sums(values, groups, names) for values, groups in checked]
    sum_GP, count_GP = (np.stack(columns, axis=1) for columns in zip(*tables, strict=True))
    mean_P, error_P = _studied(sum_GP, count_GP, np.ones((1, len(names))))
    flips_RG = np.where(np.random.default_rng(seed).random((_FLIPS, len(names))) < 0.5, -1.0, 1.0)
    flipped_RP, flipped_error_RP = _studied(sum_GP, count_GP, flips_RG)
    with np.errstate(divide="ignore", invalid="ignore"):
        largest_R = np.nan_to_num(np.abs(flipped_RP / flipped_error_RP), nan=0.0, posinf=np.inf).max(axis=1)
    critical = float(np.quantile(largest_R, confidence, method="higher"))
    return Family(mean_P[0], error_P[0], critical)


def _studied(sum_GP: Array, count_GP: Array, sign_RG: Array) -> tuple[Array, Array]:
    """Means and standard errors of sums with flipped signs.

    Both are (R, P).
    """
    used_P, total_P = (count_GP > 0).sum(axis=0), count_GP.sum(axis=0)
    mean_RP = sign_RG @ sum_GP / total_P
    square_RP = (sum_GP**2).sum(axis=0) - 2 * mean_RP * (sign_RG @ (sum_GP * count_GP))
    square_RP = square_RP + mean_RP**2 * (count_GP**2).sum(axis=0)
    square_RP[square_RP < _EQUAL * (sum_GP**2).sum(axis=0)] = 0.0
    return mean_RP, np.sqrt(square_RP * used_P / np.maximum(used_P - 1, 1)) / total_P


def median(values_N: ArrayLike, confidence: float = CONFIDENCE) -> Estimate:
    """Median with the exact interval between two ordered values.

    With fewer than six values, the interval spans all of them (confidence 1 - 2^(1 - N)). Raises ValueError for no
    values.
    """
    ordered = np.sort(np.asarray(values_N, dtype=np.float64))
    if not len(ordered):
        raise ValueError("need at least one value")
    # Chance that at most c values lie below the median.
    below_C = special.bdtr(np.arange(len(ordered) // 2 + 1), len(ordered), 0.5)
    cut = max(0, int((below_C <= (1 - confidence) / 2).sum()) - 1)
    return Estimate(float(np.median(ordered)), float(ordered[cut]), float(ordered[-1 - cut]))


def ess(log_weight_K: ArrayLike) -> float:
    """The effective share of a group of K log-weights.

    (sum W)^2 / (K sum W^2)
    """
    weight_K = normalised(log_weight_K)
    return float(1 / (len(weight_K) * (weight_K**2).sum()))


def normalised(log_weight_K: ArrayLike) -> Array:
    """Weights that sum to 1."""
    log_K = np.asarray(log_weight_K, dtype=np.float64)
    weight_K = np.exp(log_K - log_K.max())
    return weight_K / weight_K.sum()


def _checked(values_N: ArrayLike, groups_N: ArrayLike) -> tuple[Array, NDArray]:
    values, groups = np.asarray(values_N, dtype=np.float64), np.asarray(groups_N)
    if values.ndim != 1 or values.shape != groups.shape or not len(values):
        raise ValueError(f"need as many values as groups and at least one, got {values.shape} and {groups.shape}")
    if not np.isfinite(values).all():
        first = np.flatnonzero(~np.isfinite(values))[0]
        raise ValueError(f"value {first} (group {groups[first]}) is {values[first]}")
    return values, groups


def _aligned(a_N: ArrayLike, b_N: ArrayLike) -> tuple[Array, Array]:
    a, b = np.asarray(a_N, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must have one shape, got {a.shape} and {b.shape}")
    return a, b


def _sums(values: Array, groups: NDArray, names: NDArray | None = None) -> tuple[Array, Array]:
    """(G,) sums and numbers of each group's values.

    They are in the order of `names` (default: sorted).
    """
    if names is None:
        names = np.unique(groups)
        if len(names) == 1:  # with a single prompt, its values are the units
            return values, np.ones_like(values)
    group_of = np.searchsorted(names, groups)
    return (
        np.bincount(group_of, weights=values, minlength=len(names)),
        np.bincount(group_of, minlength=len(names)).astype(np.float64),
    )


def _residuals(sum_G: Array, count_G: Array) -> Array:
    mean = sum_G.sum() / count_G.sum()
    residual_G = len(sum_G) * (sum_G - mean * count_G) / count_G.sum()
    residual_G[np.abs(residual_G) < _EQUAL * np.abs(sum_G).max()] = 0.0
    return residual_G


@lru_cache(maxsize=1024)
def _quantile(groups: int, confidence: float) -> float:
    """Quantile of |t| with G - 1 degrees of freedom.

    It is 0 for a single unit, which has no interval.
    """
    return float(special.stdtrit(groups - 1, (1 + confidence) / 2)) if groups > 1 else 0.0


def _reach(residual_G: Array, confidence: float, unseen: float = 0.0) -> float:
    """Half the width of the interval by t.

    unseen: a square that is added to those of the residuals.
    """
    groups = len(residual_G)
    if groups < 2:
        return 0.0
    variance = (float(residual_G @ residual_G) + unseen) / (groups * (groups - 1))
    return _quantile(groups, confidence) * math.sqrt(variance)


def _corrected(mean: float, residual_G: Array, confidence: float) -> tuple[float, float]:
    """Ends of the interval by Hall's cubic transformation of t.

        T + c T^2 / 3 + c^2 T^3 / 27 + c / (6 G),  T = (mean - truth) / s,  c the skewness

    It removes the skewness of the prompts from the law of t. It is monotonic, and is inverted in closed form.
    """
    groups, spread = len(residual_G), math.sqrt(float(np.mean(residual_G**2)))
    if groups < 2 or spread == 0:
        return mean, mean
    skewness = float(np.mean(residual_G**3)) / spread**3
    reach = _quantile(groups, confidence) / math.sqrt(groups)
    scale = spread * math.sqrt(groups / (groups - 1))
    low, high = (mean - scale * _untransformed(x, skewness, groups) for x in (reach, -reach))
    return low, high


def _untransformed(x: float, skewness: float, groups: int) -> float:
    if abs(skewness) < 1e-6:
        return x
    return 3 / skewness * (math.cbrt(1 + skewness * (x - skewness / (6 * groups))) - 1)


@lru_cache(maxsize=4096)
def _binomial(mean: float, groups: int, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's interval for `groups` verdicts of this mean.

    No interval of scores needs to be wider.
    """
    tail, hits = (1 - confidence) / 2, mean * groups
    low = float(special.betaincinv(hits, groups - hits + 1, tail)) if hits > 0 else 0.0
    high = float(special.betaincinv(hits + 1, groups - hits, 1 - tail)) if hits < groups else 1.0
    return low, high


def _within(estimate: Estimate, low: float, high: float) -> Estimate:
    """The part of an interval between two ends.

    If all scores are 0 or all are 1, it is the two ends themselves.
    """
    if estimate.mean in (0.0, 1.0):
        return Estimate(estimate.mean, low, high)
    return Estimate(estimate.mean, max(estimate.low, low), min(estimate.high, high))
