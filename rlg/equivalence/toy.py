"""Test of the claim on known laws: samples against base^(1-w) tuned^w.

Guidance and the corrector make the samples, by the project's own sampler (`rlg.diffusion.process` schedules,
`rlg.guidance`, `rlg.guidance.corrector`), with exact scores in place of a network. Each case is compared with the
exact tilted law. The figure shows where beta / w holds (rewards that choose between modes, or move a Gaussian) and
where it does not (rewards that narrow it).

Legend: B samples, D dimensions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from rlg.diffusion import process, sampling
from rlg.diffusion.conditioning import Conditioning
from rlg.equivalence.mixtures import MEMORYLESS, PROCESSES, Mixture, Moments, ToyNoise, measured, tilted
from rlg.guidance.corrector import Corrector
from rlg.guidance.guided import rlg
from rlg.io import tables
from rlg.reports.theme import INK, MUTED, PALETTE, STYLE

GROUPS = 20  # groups within which samples are resampled, and between which standard errors are taken
QUANTITIES = ("mean", "var", "mass", "reward")


@dataclass(frozen=True)
class Sampler:
    """Process and corrector of a toy."""

    label: str
    process: str  # a key of toy.PROCESSES
    kernel: str
    threshold: float  # threshold of the corrector; 0: off


SAMPLERS = {
    "ode": Sampler("guided, ODE", "flow", "ode", 0.0),
    "sde": Sampler("guided, SDE", "flow", "sde", 0.0),
    "corrected": Sampler("corrected, SDE", "flow", "sde", 0.5),
    "corrected_ode": Sampler("corrected, ODE", "flow", "ode", 0.9),
}


@dataclass(frozen=True)
class Case:
    """A base and a tuned law.

    The tuned law is the exact optimum of the reward log(tuned / base) at beta = 1.
    """

    name: str
    title: str
    base: Mixture
    tuned: Mixture


def _plus(far: float, var: tuple[float, float, float, float], weight: Sequence[float]) -> Mixture:
    """Four modes on the axes of the plane."""
    means = ((far, 0.0), (-far, 0.0), (0.0, far), (0.0, -far))
    return Mixture.of(*((w, m, (v, v)) for w, m, v in zip(weight, means, var, strict=True)))


_STANDARD = Mixture.of((1.0, 0.0, 1.0))
_MODES = Mixture.of((0.5, -5.0, 1.0), (0.5, 5.0, 1.0))
CASES = {
    case.name: case
    for case in (
        Case("linear", "linear reward", _STANDARD, Mixture.of((1.0, 1.0, 1.0))),
        Case("narrow", "reward that narrows", _STANDARD, Mixture.of((1.0, 1.0, 0.5))),
        Case("wide", "reward that widens", _STANDARD, Mixture.of((1.0, 0.0, 2.0))),
        Case("modes", "choice of a mode", _MODES, Mixture.of((0.2, -5.0, 1.0), (0.8, 5.0, 1.0))),
        Case(
            "plane",
            "modes of the plane, narrowed",
            _plus(4.0, (1.0,) * 4, (0.25,) * 4),
            _plus(4.0, (0.5,) * 4, (0.4, 0.1, 0.3, 0.2)),
        ),
    )
}
ROWS = [
    ("linear", 2.0),
    ("narrow", 0.5),
    ("narrow", 1.5),
    ("narrow", 2.0),
    ("wide", 2.0),
    ("modes", 0.5),
    ("modes", 1.5),
    ("modes", 2.0),
    ("modes", 3.0),
    ("plane", 2.0),
]
SHOWN = ("linear", "modes", "narrow", "plane")
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0)


def draw(case: Case, sampler: Sampler, scales: Sequence[float], samples: int, steps: int, seed: int) -> list[Tensor]:
    """(B, D) samples of the guided law at each w, in one batch.

    The corrector is on or off.
    """
    config = PROCESSES[sampler.process]
    schedule = process.make_schedule(config, steps, sampler.kernel, MEMORYLESS[sampler.process])
    w_B = torch.tensor(scales, dtype=torch.float32).repeat_interleave(samples)
    guided = rlg(case.base.predictor(config), case.tuned.predictor(config), w_B)
    noise = ToyNoise(len(w_B), case.base.mean_MD.shape[1], seed)
    groups = [b * GROUPS // samples for b in range(len(w_B))]  # GROUPS of them at each w
    corrector = Corrector(w_B, groups, sampler.threshold, seed)
    nothing = Conditioning({"none": torch.zeros(len(w_B), 0)})
    x = sampling.sample(guided.with_base, schedule, nothing, noise, moves=[corrector])
    return list(x.flatten(1).split(samples))


def moments(case: Case, samples_BD: Tensor) -> tuple[Moments, Moments]:
    """(moments of samples, their standard errors).

    The errors are between groups, because resampling ties the samples of one group.
    """
    rows = [astuple(measured(case.base, case.tuned, part)) for part in samples_BD.chunk(GROUPS)]
    table = torch.tensor(rows, dtype=torch.float64)
    return Moments(*table.mean(dim=0).tolist()), Moments(*(table.std(dim=0) / GROUPS**0.5).tolist())


@dataclass(frozen=True)
class Point:
    """One case at one w under one sampler."""

    case: str
    w: float
    sampler: str
    value: Moments
    error: Moments  # standard errors
    exact: Moments | None  # None: the tilted law has no normaliser
    gap: float  # reward of the tuned law less that of the base, exact

    @property
    def miss(self) -> tuple[float, float]:
        """(reward less the exact one, its standard error).

        Both are shares of the tuned-base gap; nan if nothing is exact.
        """
        off = math.nan if self.exact is None else self.value.reward - self.exact.reward
        return off / self.gap, self.error.reward / self.gap


def points_of(name: str, key: str, scales: Sequence[float], samples: int, steps: int, seed: int) -> list[Point]:
    """A case under a sampler, at each w."""
    case = CASES[name]
    exact = {w: tilted(case.base, case.tuned, w) for w in {0.0, 1.0, *scales}}
    gap = exact[1.0].reward - exact[0.0].reward
    drawn = zip(scales, draw(case, SAMPLERS[key], scales, samples, steps, seed), strict=True)
    return [Point(name, w, key, *moments(case, x_BD), exact[w], gap) for w, x_BD in drawn]


def run(output: Path, samples: int, steps: int, seed: int) -> list[Path]:
    """Draw the table's rows and the figure; write toy.json, toy.md and toy.png."""
    jobs = [(name, key, [w for n, w in ROWS if n == name], samples, steps) for name in CASES for key in SAMPLERS]
    sweep = [(name, key, SWEEP, samples // 2, steps // 2) for name in SHOWN for key in ("ode", "sde", "corrected")]
    points: list[list[Point]] = []
    for name, key, scales, n, t in tqdm(jobs + sweep, desc="toy", unit="law"):
        points.append(points_of(name, key, scales, n, t, seed))
    rows = [point for group in points[: len(jobs)] for point in group]
    output.mkdir(parents=True, exist_ok=True)
    settings = {"samples": samples, "steps": steps, "seed": seed}
    record = {"settings": settings, "rows": [asdict(point) for point in rows]}
    (output / "toy.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "toy.md").write_text(table(rows))
    with matplotlib.rc_context(STYLE):
        draw_figure([point for group in points[len(jobs) :] for point in group]).savefig(output / "toy.png", dpi=150)
    return [output / name for name in ("toy.json", "toy.md", "toy.png")]


def table(rows: Sequence[Point]) -> str:
    """The rows as a Markdown table, with standard errors.

    Its columns are mean, variance, mass of x > 0 and reward.
    """
    lines = []
    for name, w in ROWS:
        group = [point for point in rows if (point.case, point.w) == (name, w)]
        exact = group[0].exact
        cells = ["none"] * len(QUANTITIES) if exact is None else [f"{value:.3f}" for value in astuple(exact)]
        lines.append([CASES[name].title, f"{w:g}", "exact", *cells, ""])
        for point in group:
            pairs = zip(astuple(point.value), astuple(point.error), strict=True)
            off = "" if exact is None else f"{point.miss[0]:+.1%} ± {point.miss[1]:.1%}"
            cells = [f"{value:.3f} ± {error:.3f}" for value, error in pairs]
            lines.append(["", "", SAMPLERS[point.sampler].label, *cells, off])
    return tables.markdown(["law", "w", "sampler", *QUANTITIES, "miss"], lines) + "\n"


def draw_figure(points: Sequence[Point]) -> Figure:
    """Draw reward along w against the exact law, and the misses below.

    A miss is a share of the tuned-base gap.
    """
    figure = Figure(figsize=(12.5, 5.6), layout="constrained")
    axes = figure.subplots(2, len(SHOWN), sharex=True)
    looks = dict(zip(("ode", "sde", "corrected"), zip(PALETTE, "os^", strict=False), strict=True))
    for column, name in enumerate(SHOWN):
        upper, lower = axes[:, column]
        upper.set_title(CASES[name].title)
        lower.set_xlabel("guidance weight w")
        lower.axhline(0, color=INK, linewidth=1)
        lower.set_ylim(-20, 25)
        for key, (colour, marker) in looks.items():
            group = sorted((p for p in points if (p.case, p.sampler) == (name, key)), key=lambda point: point.w)
            known = [point for point in group if point.exact is not None]
            w = [point.w for point in group]
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.4}
            upper.plot(w, [point.value.reward for point in group], label=SAMPLERS[key].label, **style)
            missed = [100 * point.miss[0] for point in known]
            bars = [200 * point.miss[1] for point in known]
            lower.errorbar([p.w for p in known], missed, yerr=bars, elinewidth=1, **style)
        exact = [(p.w, p.exact.reward) for p in group if p.exact is not None]
        upper.plot(*zip(*exact, strict=True), color=INK, linewidth=1.4, linestyle=":", label="exact law")
        for each in (upper, lower):
            each.tick_params(length=0)
            each.axvline(1, color=MUTED, linewidth=0.7, zorder=1)
    axes[0, 0].set_ylabel("reward / beta")
    axes[1, 0].set_ylabel("miss, % of tuned - base")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=4, frameon=False)
    return figure
