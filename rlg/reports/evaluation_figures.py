"""Curves of an evaluation: each reward and cost over w, with intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rlg.evaluation.methods import EXPERT, METHODS, MORL, RLG
from rlg.reports.evaluation_data import Run, reward_names
from rlg.reports.theme import COLOURS, FALL, INK, MARKS, MUTED, PALETTE


@dataclass(frozen=True)
class Panel:
    """One set of axes.

    It shows `reward`, or the points' `field` if that is None, against `x` ("w" or "kl").
    """

    title: str
    x: str
    reward: str | None
    field: str = "diversity"


def draw_curves(runs: Sequence[Run]) -> Figure:
    """Draw all panels.

    With one run, each method has a colour. With several, each run has a colour, and marks tell its methods apart.
    """
    panels = _panels(runs)
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(4.1 * columns, 6), 3.1 * lines + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    handles: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        _dress(axes, panel, runs)
        for r, run in enumerate(runs):
            for name, method in METHODS.items():
                if run.is_blend and (name in (RLG, MORL) or (name == EXPERT and run.scale == 1)):
                    continue  # it has no point along lambda, or is the end of every curve
                colour = PALETTE[r % len(PALETTE)] if len(runs) > 1 else COLOURS[name]
                label = method.label if len(runs) == 1 else f"{run.name}: {method.label}"
                line = _draw(axes, panel, run.curve(name), MARKS[name], colour)
                handles |= {label: line} if line else {}
        if len(runs) == 1:
            _draw_cursors(axes, panel, runs[0].curve(runs[0].sweep), i)
            _draw_fall(axes, panel, runs[0].summary["falls"])
    columns = min(len(handles) if len(runs) == 1 else len(runs), 4)  # a legend fills its columns first
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False)
    return figure


def _panels(runs: Sequence[Run]) -> list[Panel]:
    points = [point for run in runs for point in run.summary["points"]]
    names = reward_names(runs)
    panels = [Panel(f"{name}  ({'trained' if trained else 'held out'})", "w", name) for name, trained in names]
    if any(point["kl"] is not None for point in points):
        panels += [Panel(f"{name}  against KL", "kl", name) for name, trained in names if trained]
    for field, title in (("diversity", "diversity"), ("ess_at_most", _share_title(runs))):
        if any(point[field] is not None for point in points):
            panels.append(Panel(title, "w", None, field))
    return panels


def _share_title(runs: Sequence[Run]) -> str:
    """Title of the panel of the effective share."""
    counts = sorted({point["ess_k"] for run in runs for point in run.summary["points"] if point["ess_k"]})
    facts = [f"K = {', '.join(map(str, counts))}", *dict.fromkeys(run.steps for run in runs if run.steps)]
    heuristic = ",\nheuristic under CFG" if any(run.under_cfg for run in runs) else ""
    return f"effective share, at most ({', '.join(facts)}{heuristic})"


def method_names(runs: Sequence[Run]) -> dict[float, str]:
    """Names of models by their w, where all runs agree."""
    return {w: name for w, name in runs[0].named.items() if all(run.named.get(w) == name for run in runs)}


def _dress(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    axes.set_title(panel.title)
    axes.tick_params(length=0)
    axes.margins(x=0.06, y=0.12)
    one_blend = len(runs) == 1 and runs[0].is_blend
    weight = f"weight λ of {runs[0].summary['meta']['experts'][1]}" if one_blend else "guidance weight w"
    axes.set_xlabel(weight if panel.x == "w" else "path KL to the base (nats)")
    if panel.x == "w":
        for w, name in method_names(runs).items():
            axes.axvline(w, color=MUTED, linewidth=0.7, zorder=1)
            above = axes.get_xaxis_transform()
            axes.text(w, 1.02, name, transform=above, ha="center", va="bottom", fontsize=8.5, color=MUTED)


def _measured(points: Iterable[Mapping[str, Any]], panel: Panel) -> NDArray[np.float64]:
    """(P, 6): x, its low and high, y, its low and high.

    Points without x or y are left out.
    """
    table = []
    for point in points:
        held = (point, panel.field) if panel.reward is None else (point["rewards"].get(panel.reward), "mean")
        x, y = _interval(point, panel.x), _interval(*held)
        if x and y:
            table.append(x + y)
    return np.array(table, dtype=np.float64).reshape(-1, 6)


def _interval(fields: Mapping[str, Any] | None, key: str) -> tuple[float, ...]:
    """(value, low, high), or nothing if the value is unknown.

    A value without an interval is exact.
    """
    if fields is None or fields[key] is None:
        return ()
    ci = "ci95" if key == "mean" else f"{key}_ci95"
    return fields[key], *fields.get(ci, [fields[key]] * 2)


def _draw(axes: Axes, panel: Panel, points: list[dict[str, Any]], marks: Mapping[str, Any], colour: str) -> Any:
    """Draw one method of one run; return its line for the legend.

    Returns None if it has no points here.
    """
    x, x_low, x_high, y, y_low, y_high = _measured(points, panel).T
    if not len(x):
        return None
    if panel.x == "w" and len(x) > 1:
        axes.fill_between(x, y_low, y_high, color=colour, alpha=0.16, linewidth=0)
    else:
        axes.hlines(y, x_low, x_high, color=colour, alpha=0.55, linewidth=1.2)
        axes.vlines(x, y_low, y_high, color=colour, alpha=0.55, linewidth=1.2)
    return axes.plot(x, y, color=colour, linewidth=1.8, markersize=4.8, **marks)[0]


def _draw_cursors(axes: Axes, panel: Panel, sweep: Sequence[dict[str, Any]], index: int) -> None:
    """Draw transparent marks that the page's slider makes visible.

    They are elements `cursor-INDEX-W` of the SVG.
    """
    for point in sweep:
        for x, _, _, y, _, _ in _measured([point], panel):
            look = {"gid": f"cursor-{index}-{point['w']:g}", "color": INK, "alpha": 0, "zorder": 4}
            axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", **look)


def _draw_fall(axes: Axes, panel: Panel, falls: Mapping[str, Any]) -> None:
    """Mark the w from which a held-out reward falls."""
    if panel.x == "w" and (fall := falls.get(panel.reward)):
        axes.axvline(fall["w"], color=FALL, linewidth=1.2, linestyle=":", zorder=1)
        above = axes.get_xaxis_transform()
        axes.text(fall["w"], 0.02, " falls", transform=above, ha="left", va="bottom", fontsize=8.5, color=FALL)
