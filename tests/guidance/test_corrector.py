"""The corrector: its increments by hand, resampling, and the exact laws that it lands on where guidance does not."""

from __future__ import annotations

import math
from dataclasses import astuple

import pytest
import torch

from rlg.diffusion import process, sampling
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import make_schedule
from rlg.equivalence.mixtures import PROCESSES, Mixture, ToyNoise, log_ratio, measured, tilted
from rlg.equivalence.toy import CASES, SAMPLERS, Sampler, draw, moments
from rlg.guidance.corrector import Corrector, systematic
from rlg.guidance.guided import rlg

STEPS = 250


def total_tilt(name: str, steps: int, var: float, distance: float = 1.0) -> tuple[float, float]:
    """(sum of the steps' tilts, the exact integral) for N(0, var) and N(distance, var).

    The gap of the estimates of x0 is distance sigma^2 / (alpha^2 var + sigma^2), and with S = alpha^2 / (alpha^2 +
    sigma^2) the integral is that of distance^2 / (2 (S var + 1 - S)^2) over S.
    """
    schedule = make_schedule(PROCESSES[name], steps, "ode")
    alpha2, sigma2 = schedule.alpha.double() ** 2, schedule.sigma.double() ** 2
    outs = (distance * sigma2 / (alpha2 * var + sigma2))[:-1] / schedule.x0_out.double()
    gaps = [
        process.score_gap(schedule, i, out.reshape(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)) for i, out in enumerate(outs)
    ]
    gaps.append(process.gap_at_end(schedule, gaps[-2], gaps[-1]))
    total = sum(float(process.tilt(schedule, i, *gaps[i : i + 2])) for i in range(steps))
    first, last = (float(x) for x in (alpha2 / (alpha2 + sigma2))[[0, -1]])
    return total, distance**2 / 2 * (last / (last * var + 1 - last) - first / (first * var + 1 - first))


@pytest.mark.parametrize("name", ["eps", "flow"])
@pytest.mark.parametrize("steps", [10, 40, 250])
@pytest.mark.parametrize("var", [4.0, 1.0, 0.25, 0.05])
def test_steps_add_up_to_the_integral_for_two_gaussians_of_one_variance(name: str, steps: int, var: float) -> None:
    """At any number of steps: with one end of a step alone it is 40% (flow) and 58% short at 10 and variance 0.05."""
    total, exact = total_tilt(name, steps, var, distance=1.5)
    assert total == pytest.approx(exact, rel=1e-3)


@pytest.mark.parametrize(("case", "steps", "off"), [("narrow", 10, 0.1), ("modes", 10, 0.3), ("modes", 40, 0.1)])
def test_steps_come_near_the_integral_where_the_scores_turn(case: str, steps: int, off: float) -> None:
    """Of SDE paths at w = 2, against 500 steps; with one end of a step alone, modes are 160% too large at 10 steps."""
    few, many = (mean_tilt(case, count) for count in (steps, 500))
    assert few == pytest.approx(many, rel=off)


def mean_tilt(name: str, steps: int, samples: int = 2000) -> float:
    """Mean over SDE paths of log W / (w (w - 1)) at w = 2."""
    case, config = CASES[name], PROCESSES["flow"]
    schedule = make_schedule(config, steps, "sde", math.sqrt(2.0))
    corrector = Corrector(torch.full((samples,), 2.0), ["all"] * samples)
    noise = ToyNoise(samples, case.base.mean_MD.shape[1], seed=0)
    guided = rlg(case.base.predictor(config), case.tuned.predictor(config), 2.0)
    sampling.sample(guided.with_base, schedule, Conditioning({"none": torch.zeros(samples, 0)}), noise, [corrector])
    return float(corrector.log_weight_B.mean()) / 2


def test_the_weight_is_w_times_w_less_one_and_zero_at_both_ends() -> None:
    """log W = w (w - 1) / 2 sum |gap_i| |gap_{i+1}| (S_{i+1} - S_i), gaps of tuned and base."""
    schedule = make_schedule(PROCESSES["flow"], 3, "sde", 0.7)
    w_B = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0])
    corrector, gaps = Corrector(w_B, list(range(5))), []
    for i in range(3):
        base, gap = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3)
        guided = base + w_B[:, None, None, None] * gap
        base[1] = float("nan")  # w = 1 skips the base's pass
        corrector.update(schedule, i, guided, base)
        gaps.append(process.score_gap(schedule, i, gap, torch.zeros_like(gap)))
    gaps.append(process.gap_at_end(schedule, gaps[-2], gaps[-1]))
    unit_B = sum(process.tilt(schedule, i, gaps[i], gaps[i + 1]) for i in range(3))
    assert corrector.log_weight_B.tolist() == pytest.approx((w_B * (w_B - 1) * unit_B).tolist(), rel=1e-5, abs=1e-12)


def test_a_resampled_path_goes_on_with_its_own_gap() -> None:
    """Sample 1 is copied over 0 after step 0; in step 1 both gain what 1 would have."""
    schedule = make_schedule(PROCESSES["flow"], 3, "ode")
    corrector = Corrector(torch.full((2,), 2.0), ["a", "a"], threshold=0.9)
    zero, gap = torch.zeros(2, 1, 1, 1), torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    corrector.update(schedule, 0, gap, zero)
    corrector.log_weight_B = torch.tensor([0.0, 50.0], dtype=torch.float64)
    source_B = corrector.resample()
    assert source_B is not None and source_B.tolist() == [1, 1]
    corrector.gather(source_B)
    corrector.update(schedule, 1, gap[[1, 1]], zero)
    first, second = (process.score_gap(schedule, i, gap[1:], zero[1:]) for i in (0, 1))
    expected = 0.5 * float(process.tilt(schedule, 0, first, second))  # (w - 1) / w of |guided - base|^2
    assert corrector.log_weight_B.tolist() == pytest.approx([expected] * 2)


def test_systematic_draws_come_floor_or_ceil_of_their_share() -> None:
    share = torch.tensor([0.1, 0.45, 0.0, 0.45])
    for u in (0.0, 0.3, 0.999):
        counts = torch.bincount(systematic((share + 1e-30).log(), u), minlength=4)
        assert counts.sum() == 4 and bool(((counts - 4 * share).abs() < 1).all())


def test_groups_compete_among_themselves_and_draws_depend_on_nothing_else() -> None:
    def survivors(groups: list[str]) -> list[float]:
        corrector = Corrector(torch.full((len(groups),), 2.0), groups, threshold=0.9)
        corrector.log_weight_B = torch.tensor([0.0, 50.0, 50.0, 0.0][: len(groups)], dtype=torch.float64)
        source_B = corrector.resample()
        assert source_B is not None
        return source_B.tolist()

    assert survivors(["a", "a", "b", "b"]) == [1, 1, 2, 2]
    assert survivors(["a", "a"]) == [1, 1]


def test_prompts_of_one_w_draw_numbers_of_their_own() -> None:
    groups = [(prompt, 2.0) for prompt in range(20) for _ in range(2)]
    corrector = Corrector(torch.full((40,), 2.0), groups, threshold=1.0)
    corrector.log_weight_B = torch.tensor([0.0, 1.0] * 20, dtype=torch.float64)
    source_B = corrector.resample()
    assert source_B is not None
    kept = source_B.reshape(20, 2) % 2
    assert len({tuple(pair) for pair in kept.tolist()}) == 2  # one prompt keeps both, another the heavier twice


def test_a_threshold_of_zero_only_keeps_the_weights() -> None:
    corrector = Corrector(torch.full((2,), 2.0), ["a", "a"])
    corrector.log_weight_B += torch.tensor([0.0, 50.0])
    assert corrector.resample(last=True) is None and corrector.log_weight_B.tolist() == [0, 50]
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        Corrector(torch.ones(1), ["a"], threshold=1.5)


# The published numbers: mean and variance of guidance by ODE and SDE and of corrected samples (VE, exact scores,
# 1e5 samples or more). Ours are flow matching; for equal variances an ODE from pure noise has no bias of its start.
PUBLISHED = [
    ("narrow", 0.5, {"ode": (0.552, 0.708), "sde": (0.584, 0.698), "corrected": (0.671, 0.673)}),
    ("narrow", 1.5, {"ode": (1.338, 0.354), "sde": (1.291, 0.378), "corrected": (1.202, 0.403)}),
    ("narrow", 2.0, {"ode": (1.611, 0.250), "sde": (1.498, 0.294), "corrected": (1.335, 0.335)}),
    ("wide", 2.0, {"ode": (0.0, 4.00), "sde": (0.0, 4.66)}),
]
MASSES = [  # of the mode that the reward prefers: ODE, SDE, corrected
    (0.5, {"ode": 0.658, "sde": 0.662, "corrected": 0.668}),
    (1.5, {"ode": 0.895, "sde": 0.895, "corrected": 0.888}),
    (2.0, {"ode": 0.946, "sde": 0.950, "corrected": 0.938}),
    (3.0, {"ode": 0.986, "sde": 0.991, "corrected": 0.985}),
]


@pytest.mark.parametrize(("name", "w", "rows"), PUBLISHED)
def test_toy_rows_are_the_published_ones(name: str, w: float, rows: dict[str, tuple[float, float]]) -> None:
    for key, expected in rows.items():
        (samples,) = draw(CASES[name], SAMPLERS[key], [w], 8000, STEPS, seed=0)
        value, error = moments(CASES[name], samples)
        assert value.mean == pytest.approx(expected[0], abs=3 * error.mean + 5e-4), key
        assert value.var == pytest.approx(expected[1], abs=3 * error.var + 5e-4), key


@pytest.mark.parametrize("key", ["ode", "sde", "corrected"])
def test_mode_masses_are_the_published_ones(key: str) -> None:
    scales = [w for w, _ in MASSES]
    for (_, rows), samples in zip(MASSES, draw(CASES["modes"], SAMPLERS[key], scales, 4000, STEPS, 0), strict=True):
        value, error = moments(CASES["modes"], samples)
        assert value.mass == pytest.approx(rows[key], abs=3 * error.mass + 5e-4)


def test_the_bias_of_a_finite_start_is_reproduced() -> None:
    """sigma_max = 80, equal variances, w = 2: mean 1.975 instead of 2, variance 1.001."""
    sampler = Sampler("", "eps", "ode", 0.0)
    value, error = moments(CASES["linear"], draw(CASES["linear"], sampler, [2.0], 8000, 500, 0)[0])
    assert value.mean == pytest.approx(1.975, abs=3 * error.mean)
    assert value.var == pytest.approx(1.001, abs=3 * error.var)


@pytest.mark.parametrize("w", [0.5, 2.0, 3.0])
def test_an_ode_raises_the_variance_to_the_power_of_w(w: float) -> None:
    """Mean 0, variances 1 and s2: guidance by an ODE has variance s2^w, exactly, and the tilted law another."""
    base, tuned, config = Mixture.of((1.0, 0.0, 1.0)), Mixture.of((1.0, 0.0, 0.5)), PROCESSES["flow"]
    schedule = make_schedule(config, 1000, "ode")
    x, d = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1)
    for i in range(len(schedule)):  # linear in x, so one path is enough
        t_B = schedule.t[i].expand(1)
        outs = [law.predictor(config)(x, t_B, d) for law in (base, tuned)]
        x = process.step(schedule, i, x, outs[0] + w * (outs[1] - outs[0]), None)
    assert float(x) ** 2 == pytest.approx(0.5**w, rel=5e-3)
    assert tilted(base, tuned, w).var == pytest.approx(1 / (w / 0.5 + 1 - w), rel=1e-4)


@pytest.mark.parametrize(
    ("plain", "corrected", "steps"),
    [
        (SAMPLERS["sde"], SAMPLERS["corrected"], 400),
        (SAMPLERS["ode"], SAMPLERS["corrected_ode"], 400),
        (Sampler("", "eps", "sde", 0.0), Sampler("", "eps", "sde", 0.5), 1000),
    ],
    ids=["flow-sde", "flow-ode", "eps-sde"],
)
def test_corrected_samples_are_of_the_exact_law_where_guidance_misses_it(
    plain: Sampler, corrected: Sampler, steps: int
) -> None:
    case, w = CASES["narrow"], 2.0
    exact = tilted(case.base, case.tuned, w)
    (guided, guided_error), (value, error) = (
        moments(case, draw(case, sampler, [w], 16_000, steps, seed=1)[0]) for sampler in (plain, corrected)
    )
    assert abs(guided.mean - exact.mean) > 10 * guided_error.mean
    assert abs(guided.var - exact.var) > 10 * guided_error.var
    assert value.mean == pytest.approx(exact.mean, abs=3 * error.mean)
    assert value.var == pytest.approx(exact.var, abs=3 * error.var)


# --- the laws themselves


def test_the_grid_agrees_with_closed_forms() -> None:
    base, tuned = Mixture.of((1.0, 0.0, 1.0)), Mixture.of((1.0, 1.0, 0.5))
    for w in (0.5, 1.5, 2.0):
        precision = w / 0.5 + 1 - w
        found = tilted(base, tuned, w)
        assert (found.mean, found.var) == pytest.approx((w / 0.5 / precision, 1 / precision), rel=1e-5)
    assert tilted(base, Mixture.of((1.0, 0.0, 2.0)), 2.0) is None  # precision 0: no such law
    plane = tilted(CASES["plane"].base, CASES["plane"].tuned, 1.0)
    assert (plane.mean, plane.mass) == pytest.approx((4 * 0.3, 0.4 + 0.5 * 0.5), abs=1e-3)


def test_moments_of_samples_and_of_the_law_agree() -> None:
    base, tuned = CASES["modes"].base, CASES["modes"].tuned
    x_BD = torch.cat([torch.full((2, 1), -5.0), torch.full((8, 1), 5.0)]).double()
    found = measured(base, tuned, x_BD)
    assert (found.mean, found.var, found.mass) == pytest.approx((3.0, 16.0, 0.8))
    assert found.reward == pytest.approx(float(log_ratio(base, tuned, x_BD).mean()))
    assert found.reward == pytest.approx(0.2 * math.log(0.4) + 0.8 * math.log(1.6), abs=1e-6)


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_the_predictor_is_the_network_that_training_would_end_at(name: str) -> None:
    """Least squares of the training target on (1, x_t) finds the predictor of a Gaussian."""
    law, table = Mixture.of((1.0, 0.5, 0.3)), process.process_from_config(PROCESSES[name])
    row = torch.full((200_000,), 600)
    x0 = (0.5 + 0.3**0.5 * torch.randn(len(row), generator=torch.Generator().manual_seed(0)))[:, None, None, None]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    x_t, target = process.noise(table, row, x0, noise)
    design = torch.stack([torch.ones(len(row)), x_t.flatten()], dim=1).double()
    fit = torch.linalg.lstsq(design, target.flatten().double()).solution
    at = torch.tensor([-1.0, 0.0, 1.0])
    found = law.predictor(PROCESSES[name])(at[:, None, None, None], table.time[row[:3]], None).flatten()
    assert found.tolist() == pytest.approx((fit[0] + fit[1] * at).tolist(), abs=0.02)
    assert len(astuple(measured(law, law, at[:, None]))) == 4
