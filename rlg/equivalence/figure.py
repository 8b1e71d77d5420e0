"""Figure of `rlg.equivalence`: rewards against KL and w, and misses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from rlg.equivalence.oracle import TRUSTED
from rlg.reports.theme import INK, MUTED, PALETTE
from rlg.stats import Estimate

if TYPE_CHECKING:
    from rlg.equivalence.analysis import Result
    from rlg.equivalence.experiment import Experiment

GUIDED, NOMINAL, OTHER = PALETTE[:3]


def draw(experiment: Experiment, result: Result) -> Figure:
    """Draw three panels of one experiment."""
    figure = Figure(figsize=(13, 4.3), layout="constrained")
    plane, along, missed = figure.subplots(1, 3)
    _plane(plane, experiment, result)
    _along(along, experiment, result)
    _missed(missed, result)
    for axes in (plane, along, missed):
        axes.tick_params(length=0)
    for axes in (along, missed):
        axes.axvline(1, color=MUTED, linewidth=0.7, zorder=1)
        axes.set_xlabel("guidance weight w")
    return figure


def _bars(axes: Axes, x: Sequence[float], estimates: Sequence[Estimate], scale: float = 1.0, **look: object) -> None:
    y = scale * np.array([[e.mean, e.mean - e.low, e.high - e.mean] for e in estimates])
    axes.errorbar(x, y[:, 0], yerr=y[:, 1:].T.clip(min=0), elinewidth=1.1, markersize=4.5, **look)


def _bounded(estimate: Estimate) -> bool:
    return math.isfinite(estimate.low + estimate.high)


def _plane(axes: Axes, experiment: Experiment, result: Result) -> None:
    axes.set_title(f"{experiment.reward} against KL")
    axes.set_xlabel("KL to the base (nats): oracle of images, models of paths")
    axes.set_xscale("log")
    axes.margins(x=0.2)  # room for the names beside the points
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.axhline(result.base.mean, color=MUTED, linewidth=0.7, label="base")
    table = np.array([row for row in result.frontier if row[2] > 1e-3])
    if len(table):
        axes.plot(table[:, 2], table[:, 1], color=INK, linewidth=1.8, label=f"oracle (ESS ≥ {TRUSTED})")
    known = [p for p in result.points if p.w and p.path_kl]
    others = [t for t in result.trained if t.path_kl]
    for group, look in (
        (known, {"color": GUIDED, "marker": "o", "label": "guided"}),
        (others, {"color": OTHER, "marker": "D", "linestyle": "none", "label": "trained at its own β"}),
    ):
        if group:
            _bars(axes, [each.path_kl.mean for each in group], [each.reward for each in group], **look)
    left, right = {"xytext": (-6, 6), "ha": "right"}, {"xytext": (7, -12), "ha": "left"}
    names = [(p, f"w = {p.w:g}", MUTED, left) for p in known] + [(t, t.name, OTHER, right) for t in others]
    for each, text, colour, place in names:
        at = (each.path_kl.mean, each.reward.mean)
        axes.annotate(text, at, textcoords="offset points", fontsize=8, color=colour, **place)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _along(axes: Axes, experiment: Experiment, result: Result) -> None:
    w = [p.w for p in result.points]
    known = [p for p in result.points if p.oracle]
    reached = any(p.w for p in known)
    axes.set_title("against the oracle at β / w" if reached else "along w")
    if reached:
        _bars(axes, [p.w for p in known], [p.oracle for p in known], color=INK, marker="_", label="oracle at β / w")
    _bars(axes, w, [p.reward for p in result.points], color=GUIDED, marker="o", label="guided")
    shown = [t for t in result.trained if t.w <= max(w)]
    if shown:
        look = {"color": OTHER, "marker": "D", "linestyle": "none", "label": "trained at β / w"}
        _bars(axes, [t.w for t in shown], [t.reward for t in shown], **look)
    axes.axhline(result.base.mean, color=MUTED, linewidth=0.7)
    axes.set_ylabel(experiment.reward)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _missed(axes: Axes, result: Result) -> None:
    axes.set_title("what guidance misses")
    axes.set_ylabel("% of tuned - base")
    axes.axhline(0, color=INK, linewidth=1)
    own = result.matched_beta
    for label, look, found in (
        ("at the trained β", {"color": NOMINAL, "marker": "s"}, [(p.w, p.miss) for p in result.points]),
        (
            f"at the tuned model's own β, {own.mean:.2g}" if own else "",
            {"color": GUIDED, "marker": "o"},
            [(p.w, p.matched) for p in result.points],
        ),
    ):
        known = [(w, estimate) for w, estimate in found if estimate and _bounded(estimate)]
        if known:
            _bars(axes, [w for w, _ in known], [estimate for _, estimate in known], 100, label=label, **look)
    really = [t for t in sorted(result.trained, key=lambda t: t.w) if t.miss and _bounded(t.miss)]
    if really:
        look = {"color": OTHER, "marker": "D", "linestyle": "none", "label": "against training at β / w"}
        _bars(axes, [t.w for t in really], [t.miss for t in really], 100, **look)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
