"""The front of two rewards that blends of two experts reach: hypervolume, cost, and the figure.

A mode's front is its points over lambda (means over all images), with the experts at its ends where all modes meet.
Its hypervolume is the area that its points dominate above a reference point, in units of one reward times the other:

    area of the union over points p of [reference, p]        (p above the reference in both rewards)

The reference is the smallest mean of each reward over all points, the base among them, minus a tenth of their range:
below everything, so that no point is left out, and by as much as a grid of ten steps asks for if the ends shall count
like the middle (Ishibuchi et al. 2018, "How to specify a reference point in hypervolume calculation"). It is one for
all modes and for all resamples. Only fronts of as many points compare fairly: a maximum over noise grows with them.

Intervals are those of `rlg.stats`: prompts are drawn with all their images, for all points and modes at once, so the
difference of two modes is paired. With a single prompt they have no width.

Legend: P points, R resamples; the last axis of 2 is the pair of rewards, more is better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray

from rlg.stats import BLEND_MODES, EXPERT, MORL, Row, draws
from rlg.style import COLOURS, INK, MARKS, MODE_NAMES, MUTED

MARGIN = 0.1  # of the range, below the smallest mean
_TAILS = (2.5, 97.5)
Key = tuple[str, float]  # mode and w


def hypervolume(points_P2: ArrayLike, reference_2: ArrayLike) -> NDArray[np.float64]:
    """Area that points (..., P, 2) dominate above the reference (2,), both maximised; NaN counts as nothing."""
    above = np.nan_to_num(np.maximum(np.asarray(points_P2, dtype=np.float64) - np.asarray(reference_2), 0), nan=0)
    order = np.argsort(-above[..., 0], axis=-1)
    x, y = (np.take_along_axis(above[..., i], order, axis=-1) for i in range(2))
    width = x - np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], axis=-1)
    return (width * np.maximum.accumulate(y, axis=-1)).sum(axis=-1)


def front(points: Mapping[Key, Any] | Sequence[Key], mode: str, scale: float) -> list[Key]:
    """The points of a mode by lambda; at scale 1 its missing ends are the experts, where all modes meet."""
    own = {w: (m, w) for m, w in points if m == mode}
    if mode in BLEND_MODES and scale == 1 and own:
        own = {w: (m, w) for m, w in points if m == EXPERT} | own
    return [own[w] for w in sorted(own)]


def summarise_front(rows: Sequence[Row], rewards: Sequence[str], scale: float) -> dict[str, Any]:
    """The `pareto` entry of summary.json: the reference point, and for each mode its hypervolume and its cost.

    rewards: the two of the front. scale: the blend's W. Cost is the mean over the points that mix, 0 < lambda < 1.
    """
    by_key: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        by_key[row.mode, row.w].append(row)
    means = {
        key: np.array([np.mean([r.rewards[name] for r in group]) for name in rewards]) for key, group in by_key.items()
    }
    table_P2 = np.stack(list(means.values()))
    reference_2 = table_P2.min(axis=0) - MARGIN * np.ptp(table_P2, axis=0)
    resampled = _resampled(by_key, rewards)
    areas = {
        mode: (
            float(hypervolume(np.stack([means[key] for key in keys]), reference_2)),
            hypervolume(np.stack([resampled[key] for key in keys], axis=1), reference_2),
        )
        for mode in (*BLEND_MODES, EXPERT, MORL)
        if (keys := front(list(by_key), mode, scale))
    }
    modes = {mode: _of_mode(mode, areas, front(list(by_key), mode, scale), by_key) for mode in areas}
    return {"rewards": list(rewards), "reference": reference_2.tolist(), "modes": modes}


def _of_mode(
    mode: str,
    areas: Mapping[str, tuple[float, NDArray[np.float64]]],
    keys: Sequence[Key],
    by_key: Mapping[Key, list[Row]],
) -> dict[str, Any]:
    mean, area_R = areas[mode]
    fields: dict[str, Any] = {"points": len(keys), "hypervolume": mean, "hypervolume_ci95": _interval(area_R)}
    paired = mode in BLEND_MODES[1:] and BLEND_MODES[0] in areas
    against, against_R = areas[BLEND_MODES[0]] if paired else (0.0, area_R)
    fields["delta_vs_blend"] = mean - against if paired else None
    fields["delta_vs_blend_ci95"] = _interval(area_R - against_R) if paired else None
    mixing = [key for key in keys if key[0] == mode and 0 < key[1] < 1] or [key for key in keys if key[0] == mode]
    rows = [row for key in mixing for row in by_key[key]]
    fields["nfe_per_image"] = float(np.mean([row.nfe for row in rows]))
    fields["images_per_second"] = len(rows) / sum(row.seconds for row in rows)
    return fields


def _interval(values_R: NDArray[np.float64]) -> list[float]:
    return np.percentile(values_R, _TAILS).tolist()


def _resampled(by_key: Mapping[Key, list[Row]], rewards: Sequence[str]) -> dict[Key, NDArray[np.float64]]:
    """(R, 2) means of each point over the same resamples of prompts; NaN where a resample has none of its prompts."""
    prompts = sorted({row.prompt_id for rows in by_key.values() for row in rows})
    draws_RG = draws(len(prompts))
    result = {}
    for key, rows in by_key.items():
        group_N = np.searchsorted(prompts, [row.prompt_id for row in rows])
        count_R = draws_RG @ np.bincount(group_N, minlength=len(prompts))
        sums = (
            draws_RG @ np.bincount(group_N, [row.rewards[name] for row in rows], minlength=len(prompts))
            for name in rewards
        )
        with np.errstate(invalid="ignore"):
            result[key] = np.stack([sum_R / count_R for sum_R in sums], axis=1)
    return result


def draw_front(summary: Mapping[str, Any]) -> Figure:
    """The two rewards against each other: every mode over lambda, the experts, the base, models trained on a mix."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    axes = figure.add_subplot()
    names = summary["pareto"]["rewards"]
    points = {(p["mode"], p["w"]): [p["rewards"][name] for name in names] for p in summary["points"]}
    scale, experts = summary["meta"]["blend_scale"], summary["meta"]["experts"]
    for mode in (*BLEND_MODES, MORL, EXPERT):
        keys = front(list(points), mode, scale)
        if keys:
            own = [points[key] for key in keys if key[0] == mode]
            _bars(axes, own, COLOURS[mode])
            x, y = ([points[key][i]["mean"] for key in keys] for i in range(2))
            look = {"color": COLOURS[mode], "markersize": 12 if mode == EXPERT else 5.5, "linewidth": 1.7}
            axes.plot(x, y, label=MODE_NAMES[mode], **look | MARKS[mode])
    if base := points.get(("rlg", 0.0)):
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
    """95% intervals of both rewards."""
    for x, y in points:
        axes.plot(x["ci95"], [y["mean"]] * 2, color=colour, alpha=0.2, linewidth=1)
        axes.plot([x["mean"]] * 2, y["ci95"], color=colour, alpha=0.2, linewidth=1)


def _name_points(axes: Any, points: Mapping[Key, Any], scale: float, experts: Sequence[str]) -> None:
    """The experts by their names, and lambda along the first front that is there, on its inner side."""
    look = {"textcoords": "offset points", "fontsize": 8.5, "zorder": 5}
    for w, name in enumerate(experts):
        if x_y := points.get((EXPERT, float(w))):
            axes.annotate(name, [field["mean"] for field in x_y], xytext=(9, 5), color=INK, **look)
    mode = next((mode for mode in BLEND_MODES if front(list(points), mode, scale)), None)
    for key in front(list(points), mode, scale) if mode else []:
        if key[0] == mode:
            at = [field["mean"] for field in points[key]]
            axes.annotate(f"{key[1]:g}", at, xytext=(-5, -4), ha="right", va="top", color=COLOURS[mode], **look)
