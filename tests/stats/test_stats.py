"""Estimates by hand: means, differences, wins, ratios, medians, the jackknife, and families of differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as laws

from rlg.stats import (
    Estimate,
    Estimated,
    ess,
    family,
    grouped_mean,
    jackknife,
    median,
    normalised,
    paired_difference,
    ratio,
    summed,
    weighted_mean,
    win_rate,
)

T_2 = 4.302653  # 97.5% of Student's law of two degrees of freedom


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def clustered(rng: np.random.Generator, prompts: int = 40, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Values of true mean 0 whose prompt effect has twice the standard deviation of the noise."""
    values = 2 * rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, k))
    return values.ravel(), np.repeat(np.arange(prompts), k)


def test_a_symmetric_mean_has_the_interval_of_student() -> None:
    """Values 1, 2, 3: mean 2, s = 1, no skewness."""
    estimate = grouped_mean([1.0, 2.0, 3.0], [0, 1, 2])
    reach = T_2 / math.sqrt(3)
    assert (estimate.mean, estimate.low, estimate.high) == pytest.approx((2, 2 - reach, 2 + reach))
    ninety = grouped_mean([1.0, 2.0, 3.0], [0, 1, 2], confidence=0.9)
    assert ninety.high - 2 == pytest.approx(2.919986 / math.sqrt(3))


def test_a_skewed_mean_solves_halls_equation() -> None:
    """The ends t of the interval satisfy T + c T^2 / 3 + c^2 T^3 / 27 + c / (6 G) = +- t_{G-1} / sqrt G."""
    values = np.random.default_rng(0).lognormal(size=20)
    estimate, c = grouped_mean(values, np.arange(20)), laws.skew(values)
    for end, sign in ((estimate.low, 1), (estimate.high, -1)):
        t = (estimate.mean - end) / values.std(ddof=1)
        left = t + c * t**2 / 3 + c**2 * t**3 / 27 + c / (6 * 20)
        assert left == pytest.approx(sign * laws.t.ppf(0.975, 19) / math.sqrt(20))
    assert estimate.high - estimate.mean > 1.5 * (estimate.mean - estimate.low)  # the long tail is above


def test_prompts_are_the_units_whatever_their_number_of_images() -> None:
    """Sums 6, 13, 3.5 of 2, 3, 1 images: mean 22.5 / 6, residuals 3 (S - m n) / 6."""
    values, groups = np.array([1.0, 5.0, 2.0, 8.0, 3.0, 3.5]), np.array([0, 0, 1, 1, 1, 2])
    found = summed(values, groups)
    assert found.mean == pytest.approx(3.75)
    assert found.residual_G == pytest.approx([(6 - 7.5) / 2, (13 - 11.25) / 2, (3.5 - 3.75) / 2])
    reach = T_2 * math.sqrt(sum(z**2 for z in (0.75, 0.875, 0.125)) / 6)
    difference = paired_difference(values + 1, np.ones(6), groups)
    assert (difference.low, difference.high) == pytest.approx((3.75 - reach, 3.75 + reach))


def test_copies_of_an_image_add_no_certainty() -> None:
    values = np.random.default_rng(1).normal(size=30)
    once = grouped_mean(values, np.arange(30))
    copied = grouped_mean(np.repeat(values, 4), np.repeat(np.arange(30), 4))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    naive = grouped_mean(np.repeat(values, 4), np.arange(120))
    assert width(naive) == pytest.approx(width(once) / 2, rel=0.1)


def test_pairing_removes_the_prompt_effect() -> None:
    rng = np.random.default_rng(3)
    shared, groups = clustered(rng)
    ours = shared + 0.3 + 0.1 * rng.normal(size=len(shared))
    difference = paired_difference(ours, shared, groups)
    assert difference.low < 0.3 < difference.high
    assert width(difference) < width(grouped_mean(ours, groups)) / 10


def test_win_rate_counts_a_tie_as_half() -> None:
    groups = [0, 0, 1, 2]
    ours, theirs = [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0]
    assert win_rate(ours, theirs, groups).mean == 0.5
    assert win_rate([1.0, 2.0], [0.0, 2.0], [0, 1]).mean == 0.75
    assert win_rate(ours, theirs, groups).mean + win_rate(theirs, ours, groups).mean == 1
    assert win_rate(ours, ours, groups) == Estimate(0.5, 0.5, 0.5)
    assert paired_difference(ours, ours, groups) == Estimate(0, 0, 0)


def test_scores_that_are_all_0_or_all_1_have_the_exact_bound_of_their_prompts() -> None:
    """G prompts without a hit: a rate u leaves none in (1 - u)^G of samples; u = 1 - 0.025^(1/G)."""
    groups = np.repeat(np.arange(16), 4)
    bound = 1 - 0.025 ** (1 / 16)
    assert grouped_mean(np.zeros(64), groups) == Estimate(0, 0, pytest.approx(bound))
    assert grouped_mean(np.ones(64), groups) == Estimate(1, pytest.approx(1 - bound), 1)
    assert grouped_mean(np.zeros(64), groups, scores=False) == Estimate(0, 0, 0)  # such as the base's KL to itself
    assert grouped_mean(np.full(64, 7.0), groups) == Estimate(7, 7, 7)
    assert win_rate(np.ones(64), np.zeros(64), groups).low == pytest.approx(1 - bound)


def test_scores_stay_within_the_exact_interval_of_as_many_verdicts() -> None:
    """One prompt of 16 hits: as a verdict each, 1 of 16, it lies in [0.0016, 0.3023] (Clopper and Pearson)."""
    values = np.zeros((16, 4))
    values[3] = 1
    estimate = grouped_mean(values.ravel(), np.repeat(np.arange(16), 4))
    assert estimate.mean == 1 / 16
    assert estimate.low >= 0.00158 and estimate.high == pytest.approx(0.3023, abs=1e-4)


def test_verdicts_that_did_not_change_prove_nothing() -> None:
    """None of 24 x 4 changed: as wide as if one image had, t_23 sqrt(1/16 / (24 23))."""
    groups = np.repeat(np.arange(24), 4)
    estimate = paired_difference(np.ones(96), np.ones(96), groups)
    assert estimate.high == pytest.approx(laws.t.ppf(0.975, 23) / 4 / math.sqrt(24 * 23)) == -estimate.low
    assert paired_difference(np.full(96, 0.3), np.full(96, 0.3), groups) == Estimate(0, 0, 0)  # no verdicts


def test_any_order_gives_the_same_interval() -> None:
    values, groups = clustered(np.random.default_rng(4))
    order = np.random.default_rng(5).permutation(len(values))
    first, again = grouped_mean(values, groups), grouped_mean(values[order], groups[order])
    assert (again.low, again.high) == pytest.approx((first.low, first.high))


def test_one_prompt_has_its_images_for_units() -> None:
    values = np.arange(10.0)
    assert grouped_mean(values, np.zeros(10)) == grouped_mean(values, np.arange(10))
    assert grouped_mean([0.7], [0]) == Estimate(0.7, 0.7, 0.7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    with pytest.raises(ValueError, match=r"value 2 \(group 11\) is (nan|inf)"):
        grouped_mean([0.0, 1.0, bad], [10, 10, 11])
    for statistic in (paired_difference, win_rate):
        with pytest.raises(ValueError, match=r"value 1 \(group 5\)"):
            statistic([0.0, bad], [0.0, 1.0], [4, 5])


def test_lengths_must_agree() -> None:
    with pytest.raises(ValueError, match="at least one"):
        grouped_mean([], [])
    with pytest.raises(ValueError, match="as many values as groups"):
        grouped_mean([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="one shape"):
        win_rate([1.0, 2.0], [1.0], [0, 0])


def test_a_ratio_holds_every_value_whose_difference_may_be_0() -> None:
    """Fieller: at its ends r, the interval of top - r bottom just touches 0."""
    rng = np.random.default_rng(6)
    groups, bottom = np.arange(20), rng.normal(3, 1, size=20)
    top = 2 * bottom + rng.normal(0, 1, size=20)
    found = ratio(summed(top, groups), summed(bottom, groups))
    assert found.mean == pytest.approx(top.mean() / bottom.mean())
    for end in (found.low, found.high):
        touching = paired_difference(top, end * bottom, groups)
        assert min(abs(touching.low), abs(touching.high)) == pytest.approx(0, abs=1e-9)
    same = ratio(summed(bottom, groups), summed(bottom, groups))
    assert (same.mean, same.low, same.high) == pytest.approx((1, 1, 1))
    unbounded = ratio(summed(top, groups), summed(bottom - 3, groups))
    assert (unbounded.low, unbounded.high) == (-math.inf, math.inf)
    assert math.isnan(ratio(summed(top, groups), summed(np.zeros(20), groups)).mean)


def test_the_jackknife_of_a_mean_is_its_own_interval() -> None:
    values = np.random.default_rng(7).normal(size=15)
    found = jackknife(lambda weight_MG: weight_MG @ values / weight_MG.sum(axis=1), 15)
    assert found.residual_G == pytest.approx(values - values.mean())
    expected = paired_difference(values, np.zeros(15), np.arange(15))
    assert (found.interval().low, found.interval().high) == pytest.approx((expected.low, expected.high))
    assert math.isnan(Estimated(math.inf, np.ones(3)).interval().low)


def test_medians_have_exact_intervals() -> None:
    """Of 15 values the 4th and the 12th: 1 - 2 P(Bin(15, 1/2) <= 3) = 96.5%; of 5 all, 93.75%."""
    assert median(np.arange(15.0)) == Estimate(7, 3, 11)
    assert median([9.0, 1.0, 2.0, 4.0, 5.0]) == Estimate(4, 1, 9)
    assert median([3.0]) == Estimate(3, 3, 3)
    with pytest.raises(ValueError, match="at least one"):
        median([])


def test_a_single_difference_is_judged_by_its_signs() -> None:
    """Of 6 prompts whose differences agree in sign, flips reach |t| in 2 of 64 cases, under 5%; of 5 in 2 of 32."""
    for count, sure in ((6, True), (5, False)):
        judged = family([(np.linspace(1.0, 1.1, count), np.arange(count))])
        assert bool(judged.sure_P[0]) is sure
    same = family([(np.ones(8), np.arange(8)), (np.zeros(8), np.arange(8))])  # no spread at all, and nothing
    assert same.sure_P.tolist() == [True, False]
    assert same.interval(0) == Estimate(1, 1, 1)


def test_a_family_has_wider_intervals_than_its_members() -> None:
    rng = np.random.default_rng(8)
    members = [(rng.normal(size=30), np.arange(30)) for _ in range(20)]
    judged = family(members)
    alone = paired_difference(members[0][0], np.zeros(30), np.arange(30))
    own = judged.interval(0)
    assert own.mean == pytest.approx(alone.mean)
    assert 1.3 < width(own) / width(alone) < 1.8  # 20 independent ones: t at 0.25% instead of 5%, 3.3 for 2.05
    assert family(members).critical == judged.critical


def test_members_of_a_family_may_have_other_prompts_and_numbers_of_images() -> None:
    """Standard errors are those of the members on their own."""
    rng = np.random.default_rng(9)
    members = [(rng.normal(size=40), np.repeat(np.arange(10), 4)), (rng.normal(size=9), [3, 3, 4, 5, 6, 7, 8, 20, 21])]
    judged = family(members)
    for (values, groups), mean, error in zip(members, judged.mean_P, judged.error_P, strict=True):
        found = summed(values, groups)
        count = len(found.residual_G)
        assert mean == pytest.approx(found.mean)
        assert error == pytest.approx(math.sqrt((found.residual_G**2).sum() / (count * (count - 1))))


def test_ess_of_known_weights() -> None:
    assert ess([0.3] * 4) == pytest.approx(1)
    assert ess([0.0, -1e4, -1e4, -1e4]) == pytest.approx(0.25)
    assert ess(np.log([1.0, 3.0]) + 1e3) == pytest.approx(16 / 20)
    assert normalised(np.log([1.0, 3.0])) == pytest.approx([0.25, 0.75])


def test_an_estimate_is_written_in_one_form() -> None:
    """One spec for all three numbers; the sign of a difference stands at its mean alone."""
    estimate = Estimate(0.125, -0.25, 0.5)
    assert f"{estimate:+.2f}" == "+0.12 [-0.25, 0.50]"
    assert f"{estimate:.0%}" == "12% [-25%, 50%]"
    assert estimate.text(str) == "0.125 [-0.25, 0.5]"
    assert f"{Estimate(2.0, -math.inf, math.inf):g}" == f"{Estimate.of(2.0, None):g}" == "2 (no bounds)"


def test_weighted_means_of_one_value_and_of_several() -> None:
    """With all prompts (1 + 3 + 8) / 3, without the last (1 + 3) / 2. The second column is 10 times the first."""
    weight = np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    value = np.array([1.0, 3.0, 8.0])
    assert weighted_mean(weight, value).tolist() == [4, 2]
    assert weighted_mean(weight, np.stack([value, 10 * value], axis=1)).tolist() == [[4, 40], [2, 20]]
