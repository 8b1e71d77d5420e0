"""Figures of a report on several runs.

They are frontier and training curves, parallel coordinates, and the best w.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

from rlg.evaluation.methods import RLG
from rlg.reports.comparison_data import BestOf, ComparedRun, Comparison, PlanePoint, frontier, planes
from rlg.reports.evaluation_data import Run
from rlg.reports.theme import HOLLOW, INK, MUTED, PALETTE
from rlg.stats import PERCENT

RANKS = LinearSegmentedColormap.from_list("ranks", ["#8fb0cc", "#8a73b8", "#d55e00"])  # visible on light and dark
LOG_RATIO = 20  # an axis of positive numbers is logarithmic if its largest is this many times its smallest
MARKERS = "os^Dv"  # marks of the evaluations of one run
MAX_LABELS = 8  # most lines that a legend names
_BAR = {"alpha": 0.5, "linewidth": 1.1}


def _owner(comparison: Comparison, run: Run) -> Path:
    """Folder of the run of an evaluation.

    It is the evaluation's own if no run of the report has it.
    """
    places = (run.folder, *run.folder.parents)
    return next((entry.folder for entry in comparison.entries if entry.folder in places), run.folder)


def _colours(comparison: Comparison, trained: Sequence[ComparedRun]) -> dict[Path, str]:
    """A colour for each folder that is drawn.

    A few folders have distinct colours. Many have colours by rank, of their metric or of their highest reward.
    """
    sign = 1 if comparison.maximise else -1
    values = {entry.folder: None if entry.metric is None else sign * entry.metric for entry in trained}
    for points in planes(comparison.evaluations).values():
        for point in points:
            owner = _owner(comparison, point.run)
            if owner not in {entry.folder for entry in trained}:
                values[owner] = max(values.get(owner, -math.inf), point.mean)
    colours = PALETTE[: len(values)] if len(values) <= len(PALETTE) else ranked(list(values.values()))
    return dict(zip(values, colours, strict=True))


def ranked(values: Sequence[float | None]) -> list[str]:
    """Colours along RANKS, with the largest value at its end.

    None is muted.
    """
    known = [value for value in values if value is not None]
    low, span = min(known, default=0.0), (max(known, default=0.0) - min(known, default=0.0)) or 1.0
    return [MUTED if v is None else to_hex(RANKS((v - low) / span)) for v in values]


def draw_frontier(comparison: Comparison) -> Figure | None:
    """Draw reward against KL for each base and reward, and training curves.

    Returns None if there is neither.
    """
    evaluated = planes(comparison.evaluations)
    trained = [e for e in comparison.entries if comparison.metric and len(e.series(comparison.metric)) > 1]
    with_kl = [e for e in trained if len(e.series("kl", "reward")) > 1]
    count = len(evaluated) + bool(trained) + bool(with_kl)
    if not count:
        return None
    columns = min(count, 2)
    lines = math.ceil(count / columns)
    figure = Figure(figsize=(6.2 * columns, 4.4 * lines), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    places = iter(figure.subplots(lines, columns, squeeze=False).flat)
    colours = _colours(comparison, trained)
    for (base, reward), points in evaluated.items():
        title = reward if len({b for b, _ in evaluated}) == 1 else f"{reward} on {base}"
        _plane(next(places), points, title, [colours[_owner(comparison, point.run)] for point in points])
    if with_kl:
        _training(
            next(places), with_kl, colours, "kl", "reward", "while training", "KL of the trainer's loss (its own unit)"
        )
    if trained:
        _training(
            next(places), trained, colours, None, comparison.metric, f"{comparison.metric} while training", "iteration"
        )
    for left in places:
        left.set_visible(False)
    return figure


def _plane(axes: Axes, points: Sequence[PlanePoint], title: str, colours: Sequence[str]) -> None:
    """Draw the points of one base and reward, and their frontier.

    Each run is a line.
    """
    groups: dict[int, list[tuple[PlanePoint, str]]] = {}
    for point, colour in zip(points, colours, strict=True):
        groups.setdefault(id(point.run), []).append((point, colour))
    seen: Counter[str] = Counter()
    for group in groups.values():
        colour = group[0][1]
        for point, _ in group:
            axes.plot(point.row.get("kl_ci95") or [point.row["kl"]] * 2, [point.mean] * 2, color=colour, **_BAR)
            axes.plot([point.row["kl"]] * 2, point.row["rewards"][point.reward]["ci95"], color=colour, **_BAR)
        look = {"color": colour, "linewidth": 1.3, "markersize": 4, "marker": MARKERS[seen[colour] % len(MARKERS)]}
        seen[colour] += 1
        label = group[0][0].run.name if len(groups) <= MAX_LABELS else None
        axes.plot([s.row["kl"] for s, _ in group], [s.mean for s, _ in group], label=label, zorder=3, **look)
    front = frontier(points)
    axes.step(
        [s.row["kl"] for s in front], [s.mean for s in front], where="post", color=INK, linewidth=1.1, zorder=2.5
    )
    look = {"markersize": 8, "markerfacecolor": "none", "color": INK, "zorder": 4}
    axes.plot([s.row["kl"] for s in front], [s.mean for s in front], "o", label="frontier", **look)
    for point in front:
        at = (point.row["kl"], point.mean)
        axes.annotate(f"{point.row['w']:g}", at, xytext=(-5, 6), textcoords="offset points", fontsize=7.5, ha="right")
    _dress(axes, f"{title}: frontier", "path KL to the base (nats); numbers: w")
    axes.legend(loc="lower right", frameon=False, fontsize=7.5)


def _training(
    axes: Axes,
    entries: Sequence[ComparedRun],
    colours: Mapping[Path, str],
    x: str | None,
    y: str,
    title: str,
    label: str,
) -> None:
    for entry in entries:
        series, colour = entry.series(*([x] if x else []), y), colours[entry.folder]
        name = entry.name if len(entries) <= MAX_LABELS else None
        axes.plot(series[:, -2], series[:, -1], color=colour, linewidth=1.3, alpha=0.9, label=name)
        axes.plot(series[-1:, -2], series[-1:, -1], "o", color=colour, markersize=4)
    _dress(axes, title, label)
    if len(entries) <= MAX_LABELS:
        axes.legend(loc="best", frameon=False, fontsize=7.5)


def _dress(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.tick_params(length=0)
    axes.margins(x=0.06, y=0.1)


def draw_parameters(comparison: Comparison) -> Figure | None:
    """Draw parallel coordinates of swept parameters, with the metric last.

    Returns None if there is nothing to compare.
    """
    names, entries = comparison.swept, comparison.entries
    if not names or comparison.metric is None or len(entries) < 2:
        return None
    metrics = [entry.metric for entry in entries]
    if all(value is None for value in metrics):
        return None
    scales = [Scale([entry.parameters[name] for entry in entries]) for name in names]
    scales.append(Scale([value for value in metrics if value is not None]))
    figure = Figure(figsize=(max(1.75 * len(scales), 6.4), 4.2), layout="constrained")
    axes = figure.add_subplot()
    good = metrics if comparison.maximise else [None if v is None else -v for v in metrics]
    order = sorted(zip(entries, ranked(good), good, strict=True), key=lambda row: (row[2] is not None, row[2] or 0))
    for i, (entry, colour, value) in enumerate(order):
        heights = [scale.at(entry.parameters[name]) for name, scale in zip(names, scales, strict=False)]
        heights += [] if value is None else [scales[-1].at(entry.metric)]
        best = i == len(order) - 1
        look = {"linewidth": 2.8 if best else 1.3, "alpha": 1 if best else 0.8}
        axes.plot(range(len(heights)), heights, color=colour, linestyle="-" if value is not None else ":", **look)
    for i, (name, scale) in enumerate(zip([*names, comparison.metric], scales, strict=True)):
        _axis(axes, i, f"{name} (log)" if scale.is_log else name, scale)
    axes.set_xlim(-0.15, len(scales) - 0.45)
    axes.set_ylim(-0.06, 1.16)
    axes.axis("off")
    if any(value is None for value in metrics):
        figure.supxlabel("dotted: runs without the metric", fontsize=8.5, color=MUTED, x=0.01, ha="left")
    return figure


def _axis(axes: Axes, x: int, name: str, scale: Scale) -> None:
    axes.plot([x, x], [0, 1], color=MUTED, linewidth=0.9, zorder=1)
    axes.text(x, 1.08, name, ha="center", va="bottom", fontsize=8.5, fontweight="bold")
    box = {"facecolor": "#ffffff", "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
    for height, label in scale.ticks():
        axes.plot([x - 0.02, x + 0.02], [height] * 2, color=MUTED, linewidth=0.9)
        axes.text(x + 0.04, height, label, va="center", fontsize=8, bbox=box, zorder=5)


class Scale:
    """Heights in [0, 1] of the values of one axis.

    Numbers are placed by size, on a log scale where they span far. Other values have equal steps.
    """

    def __init__(self, values: Sequence[Any]):
        self.numeric = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
        self.levels = sorted(set(values)) if self.numeric else sorted({str(v) for v in values})
        positive = self.numeric and self.levels[0] > 0
        self.is_log = bool(positive and self.levels[-1] / self.levels[0] >= LOG_RATIO)
        self.low, self.high = (self._number(self.levels[i]) for i in (0, -1)) if self.numeric else (0, 1)

    def _number(self, value: float) -> float:
        return math.log(value) if self.is_log else value

    def at(self, value: Any) -> float:
        """The height of a value."""
        if not self.numeric:
            return self.levels.index(str(value)) / max(len(self.levels) - 1, 1)
        return (self._number(value) - self.low) / (self.high - self.low) if self.high > self.low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """(height, label) of all values, or of ends and middle.

        More than five numbers have labels at the ends and in the middle.
        """
        if not self.numeric:
            return [(self.at(level), level[:18]) for level in self.levels]
        if len(self.levels) <= 5:
            return [(self.at(level), f"{level:.4g}") for level in self.levels]
        middle = (self.low + self.high) / 2
        return [
            (h, f"{math.exp(v) if self.is_log else v:.3g}") for h, v in ((0, self.low), (0.5, middle), (1, self.high))
        ]


def draw_best(bests: Sequence[BestOf]) -> Figure | None:
    """Draw the best w of each evaluation, and its reward.

    The tuned model's reward is beside it.

    Returns None without evaluations.
    """
    if not bests:
        return None
    rewards = list(dict.fromkeys(best.reward for best in bests))
    ordered = [best for reward in rewards for best in bests if best.reward == reward]
    figure = Figure(figsize=(10.5, 0.36 * len(ordered) + 1.3 + 0.7 * len(rewards)), layout="constrained")
    counts = [sum(best.reward == reward for best in ordered) for reward in rewards]
    grid = figure.subplots(len(rewards), 2, squeeze=False, sharey="row", height_ratios=[n + 1 for n in counts])
    for (left, right), reward in zip(grid, rewards, strict=True):
        group = [best for best in ordered if best.reward == reward]
        for y, best in enumerate(group):
            scales = [point["w"] for point in best.run.curve(best.run.sweep)]
            left.plot(scales, [y] * len(scales), "|", color=MUTED, markersize=7)
            left.plot(best.found.between, [y, y], color=PALETTE[0], linewidth=5, alpha=0.25, solid_capstyle="butt")
            left.plot([best.found.w], [y], "o", color=PALETTE[0], markersize=6)
            _rewards(right, y, best)
        left.set_yticks(np.arange(len(group)), [best.run.name[-64:] for best in group], fontsize=8.5)
        left.invert_yaxis()
        left.margins(y=0.6 / len(group))
        _dress_best(left, f"{reward}: best w", "w (band: none surely beats it; ticks: evaluated)")
        _dress_best(right, reward, f"mean of the other prompts, {PERCENT}; hollow: tuned, of all")
    return figure


def _rewards(axes: Axes, y: int, best: BestOf) -> None:
    mean = best.found.mean
    axes.plot([mean.low, mean.high], [y, y], color=PALETTE[1], **_BAR)
    tuned = next((p for p in best.run.points(RLG) if p["w"] == 1), None)
    if tuned is not None:
        axes.plot([tuned["rewards"][best.reward]["mean"]], [y], "D", color=MUTED, markersize=5, **HOLLOW)
    axes.plot([mean.mean], [y], "o", color=PALETTE[1], markersize=6)


def _dress_best(axes: Axes, title: str, x: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.tick_params(length=0)
