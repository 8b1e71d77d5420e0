"""Heat maps of a grid, one for each reward, and their page.

The data is the content of grid.json, by `rlg.grid.tabulate`. A cell's colour is its paired difference to w = 1 of its
row, so that rows of different level compare: blue is above, orange below, and w = 1 has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rlg.evaluation.summary import has_base
from rlg.reports.theme import INK, MUTED, STYLE, render, save

PAGE = "grid.html"
AXIS_NAMES = {
    "cfg": "CFG scale",
    "kernel": "sampler",
    "sampler": "sampler",  # name in older files
    "steps": "network evaluations",
    "schedule": "schedule of w",
    "none": "",
}
# The ends are light enough for dark numbers. Every kind of colour vision tells blue from orange.
COLOURS = LinearSegmentedColormap.from_list("against_tuned", ["#ec8a45", "#f8f7f5", "#5ba7dc"])
# unlike the report's colours, these stay: a cell's background stays light in the dark
CELL_INK, CELL_MUTED = "#14181d", "#4d5661"
CELL_WIDTH, CELL_HEIGHT = 1.02, 0.66  # inches
MAX_DECIMALS = 6


def label_of(axis: str, row: Mapping[str, Any]) -> str:
    """Label of a row: its value, or its network evaluations.

    The cells of a row of the axis `steps` have these in common.
    """
    if axis == "steps":
        return f"{row['cells'][0]['nfe_per_image']:g}"
    if axis == "cfg":
        return f"{row['value']:g}"
    return "" if row["value"] is None else str(row["value"])


def decimals_of(largest: float) -> int:
    """Number of decimals that shows two digits of the largest difference."""
    return min(MAX_DECIMALS, max(0, 1 - math.floor(math.log10(largest)))) if largest > 0 else 2


def draw(grid: Mapping[str, Any], reward: str) -> Figure:
    """Draw the heat map of one reward.

    w goes to the right. The axis goes down from the top, in its order.
    """
    rows, scales = grid["rows"], grid["scales"]
    delta_RW = np.array([[cell["rewards"][reward]["delta_vs_tuned"] for cell in row["cells"]] for row in rows])
    largest = float(np.abs(delta_RW).max())
    labels = [label_of(grid["axis"], row) for row in rows]
    names = 0.085 * max(map(len, labels)) + 0.5
    width, height = CELL_WIDTH * len(scales) + names + 1.1, CELL_HEIGHT * len(rows) + 1.9
    figure = Figure(figsize=(max(width, 6.4), height), layout="constrained")
    axes = figure.add_subplot()
    limit = largest or 1.0
    mesh = axes.pcolormesh(delta_RW, cmap=COLOURS, norm=Normalize(-limit, limit), edgecolors="white", linewidth=2)
    for r, row in enumerate(rows):
        for c, cell in enumerate(row["cells"]):
            _write_cell(axes, r, c, cell["rewards"][reward], scales[c] == 1, decimals_of(largest))
    _dress(axes, grid, labels)
    trained = "trained" if reward in grid["meta"]["trained_rewards"] else "held out"
    axes.set_title(f"{reward}  ({trained}): {grid['units'][reward]}")
    bar = figure.colorbar(mesh, ax=axes, fraction=0.025, pad=0.015, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"{value:+.{decimals_of(largest)}f}" if value else "0" for value in (-limit, 0, limit)])
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.solids.set_edgecolor("face")
    figure.supxlabel(_legend(grid), fontsize=8.5, color=MUTED, x=0.01, ha="left")
    return figure


def _dress(axes: Axes, grid: Mapping[str, Any], labels: Sequence[str]) -> None:
    scales = grid["scales"]
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    named = {1.0: "tuned"} if _always_tuned_outside(grid) else {0.0: "base", 1.0: "tuned"}
    axes.set_xticks(np.arange(len(scales)) + 0.5, [f"{w:g}" + (f"\n{named[w]}" if w in named else "") for w in scales])
    axes.set_yticks(np.arange(len(labels)) + 0.5, labels)
    axes.tick_params(labelcolor=INK, labelsize=10)
    axes.set_xlabel("guidance weight w")
    axes.set_ylabel(AXIS_NAMES[grid["axis"]])
    axes.invert_yaxis()
    one = scales.index(1.0)
    axes.add_patch(Rectangle((one, 0), 1, len(labels), fill=False, edgecolor=MUTED, linewidth=1.2, clip_on=False))


def _always_tuned_outside(grid: Mapping[str, Any]) -> bool:
    """Tell whether w = 0 is not the base in some row.

    A schedule of w leaves steps to the tuned model.
    """
    return grid["axis"] == "schedule" or not has_base(grid["meta"])


def _write_cell(axes: Axes, r: int, c: int, reward: Mapping[str, Any], is_tuned: bool, decimals: int) -> None:
    middle = {"ha": "center", "va": "center"}
    axes.text(c + 0.5, r + 0.36, f"{reward['mean']:.{decimals}f}", color=CELL_INK, fontsize=12, **middle)
    if is_tuned:
        return
    sure = reward["differs"]
    mark = (" ▲" if reward["delta_vs_tuned"] > 0 else " ▼") if sure else ""
    look = {"color": CELL_INK if sure else CELL_MUTED, "fontweight": "bold" if sure else "normal", "fontsize": 9}
    axes.text(c + 0.5, r + 0.72, f"{reward['delta_vs_tuned']:+.{decimals}f}{mark}", **look, **middle)


def _legend(grid: Mapping[str, Any]) -> str:
    n = grid["rows"][0]["cells"][0]["n"]
    lines = [f"Mean of {n} images a cell; below it and as colour the paired difference to w = 1 of the row."]
    lines.append("Bold and ▲ ▼: it surely differs, all cells judged together (5% in all, over prompts).")
    if grid["axis"] == "steps":
        lines.append("A row's cells cost the same: w = 0 and w = 1 take one pass a step, the others two.")
    return "\n".join(lines)


def file_of(reward: str) -> str:
    """File name of a reward, without its ending."""
    return re.sub(r"[^\w.-]", "_", reward)


def write(grid: Mapping[str, Any], folder: Path) -> Path:
    """Write REWARD.png and REWARD.svg for each reward, and their page.

    Returns the page.
    """
    with matplotlib.rc_context(STYLE):
        figures = {reward: save(draw(grid, reward), folder / file_of(reward)) for reward in grid["units"]}
    html = render(
        "grid.html.template",
        grid=grid,
        figures=figures,
        labels=[label_of(grid["axis"], row) for row in grid["rows"]],
        axis_name=AXIS_NAMES[grid["axis"]],
        partly_tuned=_always_tuned_outside(grid),
    )
    (folder / PAGE).write_text(html, encoding="utf-8", errors="replace")
    return folder / PAGE
