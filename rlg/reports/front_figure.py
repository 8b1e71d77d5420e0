"""Figure of the fronts that blends of two experts reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from rlg.evaluation.front import Key, front
from rlg.evaluation.methods import BLEND_METHODS, EXPERT, METHODS, MORL, RLG
from rlg.reports.theme import COLOURS, INK, MARKS, MUTED


def draw_front(summary: Mapping[str, Any]) -> Figure:
    """Draw two rewards against each other.

    It shows every method over lambda, the experts, the base, and models trained on a mix.
    """
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    names = summary["pareto"]["rewards"]
    points = {(p["method"], p["w"]): [p["rewards"][name] for name in names] for p in summary["points"]}
    scale, experts = summary["meta"]["blend_scale"], summary["meta"]["experts"]
    for method in (*BLEND_METHODS, MORL, EXPERT):
        keys = front(list(points), method, scale)
        if keys:
            own = [points[key] for key in keys if key[0] == method]
            _bars(axes, own, COLOURS[method])
            x, y = ([points[key][i]["mean"] for key in keys] for i in range(2))
            look = {"color": COLOURS[method], "markersize": 12 if method == EXPERT else 5.5, "linewidth": 1.7}
            axes.plot(x, y, label=METHODS[method].label, **look | MARKS[method])
    if base := points.get((RLG, 0.0)):
        _bars(axes, [base], MUTED)
        axes.plot(*([field["mean"]] for field in base), "X", color=MUTED, markersize=9, label="base")
    _name_points(axes, points, scale, experts)
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.tick_params(length=0)
    axes.margins(0.1)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure


def _bars(axes: Any, points: Sequence[Sequence[Mapping[str, Any]]], colour: str) -> None:
    """Draw the intervals of both rewards."""
    for x, y in points:
        axes.plot(x["ci95"], [y["mean"]] * 2, color=colour, alpha=0.2, linewidth=1)
        axes.plot([x["mean"]] * 2, y["ci95"], color=colour, alpha=0.2, linewidth=1)


def _name_points(axes: Any, points: Mapping[Key, Any], scale: float, experts: Sequence[str]) -> None:
    """Write names at the experts, and lambda along the first front.

    The values of lambda are on the inner side of the front.
    """
    look = {"textcoords": "offset points", "fontsize": 8.5, "zorder": 5}
    for w, name in enumerate(experts):
        if x_y := points.get((EXPERT, float(w))):
            axes.annotate(name, [field["mean"] for field in x_y], xytext=(9, 5), color=INK, **look)
    method = next((method for method in BLEND_METHODS if front(list(points), method, scale)), None)
    for key in front(list(points), method, scale) if method else []:
        if key[0] == method:
            at = [field["mean"] for field in points[key]]
            axes.annotate(f"{key[1]:g}", at, xytext=(-5, -4), ha="right", va="top", color=COLOURS[method], **look)
