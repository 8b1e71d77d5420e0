"""The figure of `rlg.equivalence`: rewards against KL, rewards along w, and what guidance misses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlg.stats import Estimate
from rlg.style import INK, MUTED, PALETTE

if TYPE_CHECKING:
    from rlg.equivalence import Experiment, Result

TRUSTED = 100  # effective samples from which on the oracle is drawn solid
GUIDED, NOMINAL, OTHER = PALETTE[:3]


def draw(experiment: Experiment, result: Result) -> Figure:
    """Three panels of one experiment."""
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


def _plane(axes: Axes, experiment: Experiment, result: Result) -> None:
    axes.set_title(f"{experiment.reward} against KL")
    axes.set_xlabel("KL to the base (nats): oracle of images, models of paths")
    furthest = max(p.path_kl.mean for p in result.points if p.path_kl) if result.points[0].path_kl else np.inf
    table = np.array([row for row in result.frontier if row[2] <= max(furthest, 0.1)])
    solid = table[table[:, 3] >= TRUSTED]
    axes.plot(table[:, 2], table[:, 1], color=INK, linewidth=1.2, linestyle=":")
    axes.plot(solid[:, 2], solid[:, 1], color=INK, linewidth=1.8, label=f"oracle (ESS ≥ {TRUSTED} solid)")
    known = [p for p in result.points if p.path_kl]
    if known:
        _bars(
            axes, [p.path_kl.mean for p in known], [p.reward for p in known], color=GUIDED, marker="o", label="guided"
        )
    for p in known:
        place = (p.path_kl.mean, p.reward.mean)
        axes.annotate(f"w = {p.w:g}", place, xytext=(5, -11), textcoords="offset points", fontsize=8, color=MUTED)
    others = [t for t in result.trained if t.path_kl]
    if others:
        look = {"color": OTHER, "marker": "D", "linestyle": "none", "label": "trained at its own β"}
        _bars(axes, [t.path_kl.mean for t in others], [t.reward for t in others], **look)
    for t in others:
        place, text = (t.path_kl.mean, t.reward.mean), f"{t.name}, β = {t.beta:g}"
        axes.annotate(text, place, xytext=(5, 5), textcoords="offset points", fontsize=8, color=OTHER)
    axes.legend(frameon=False, fontsize=9, loc="lower right")


def _along(axes: Axes, experiment: Experiment, result: Result) -> None:
    axes.set_title("against the oracle at β / w")
    w = [p.w for p in result.points]
    _bars(axes, w, [p.oracle for p in result.points], color=INK, marker="_", label="oracle at β / w")
    _bars(axes, w, [p.reward for p in result.points], color=GUIDED, marker="o", label="guided")
    axes.axhline(result.base.mean, color=MUTED, linewidth=0.7)
    axes.set_ylabel(experiment.reward)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def _missed(axes: Axes, result: Result) -> None:
    axes.set_title("what guidance misses")
    axes.set_ylabel("% of tuned - base")
    axes.axhline(0, color=INK, linewidth=1)
    w = [p.w for p in result.points]
    _bars(axes, w, [p.miss for p in result.points], 100, color=NOMINAL, marker="s", label="at the trained β")
    matched = f"at the tuned model's own β, {result.matched_beta:.2g}"
    _bars(axes, w, [p.matched for p in result.points], 100, color=GUIDED, marker="o", label=matched)
    axes.legend(frameon=False, fontsize=9)
