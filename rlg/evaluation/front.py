"""The front of two rewards that blends of two experts reach.

The points of a front are means over all images, by lambda. The experts are its ends, where all methods meet. Its
hypervolume is the area that its points dominate above a reference, in units of one reward times the other:

    area of the union over points p of [reference, p]        (p above the reference in both rewards)

    reference    smallest mean of each reward over all points (with the base) minus a tenth of their range, one for
                 all methods; with a grid of ten steps the ends then count like the middle (Ishibuchi et al. 2018,
                 "How to specify a reference point in hypervolume calculation")

Fronts compare fairly only with equal numbers of points, because a maximum over noise grows with the number. A
hypervolume of noisy means is therefore too large, and more so for a narrow front, so that it has no interval. The
difference of two methods on the same prompts and noises has one (`stats.jackknife`), because the excess cancels. It
needs two prompts.

Legend: P points, G prompts, M weightings of them; the last axis of 2 is the pair of rewards, more is better.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlg.evaluation.methods import BLEND_METHODS, EXPERT, METHODS, MORL
from rlg.evaluation.rows import Row
from rlg.evaluation.summary import named
from rlg.stats import Estimate, jackknife

MARGIN = 0.1  # distance of the reference below the smallest mean, in ranges
Key = tuple[str, float]  # (method, w)


def hypervolume(points_P2: ArrayLike, reference_2: ArrayLike) -> NDArray[np.float64]:
    """Area that points (..., P, 2) dominate above the reference (2,).

    Both rewards are maximised. A point with NaN counts as nothing.
    """
    above = np.nan_to_num(np.maximum(np.asarray(points_P2, dtype=np.float64) - np.asarray(reference_2), 0), nan=0)
    order = np.argsort(-above[..., 0], axis=-1)
    x, y = (np.take_along_axis(above[..., i], order, axis=-1) for i in range(2))
    width = x - np.concatenate([x[..., 1:], np.zeros_like(x[..., :1])], axis=-1)
    return (width * np.maximum.accumulate(y, axis=-1)).sum(axis=-1)


def front(points: Mapping[Key, Any] | Sequence[Key], method: str, scale: float) -> list[Key]:
    """The points of a method's front, in the order of lambda.

    At scale 1, its missing ends are the experts, where all methods meet.
    """
    own = {w: (m, w) for m, w in points if m == method}
    if METHODS[method].ends == EXPERT and scale == 1 and own:
        own = {w: (m, w) for m, w in points if m == EXPERT} | own
    return [own[w] for w in sorted(own)]


def summarise_front(rows: Sequence[Row], rewards: Sequence[str], scale: float) -> dict[str, Any]:
    """The `pareto` entry of summary.json.

    It holds the reference point, and the hypervolume and cost of each method. rewards: the two rewards of the front.
    scale: the blend's W. Cost is the mean over points with 0 < lambda < 1.
    """
    by_key: dict[Key, list[Row]] = defaultdict(list)
    for row in rows:
        by_key[row.method, row.w].append(row)
    means = {
        key: np.array([np.mean([r.rewards[name] for r in group]) for name in rewards]) for key, group in by_key.items()
    }
    table_P2 = np.stack(list(means.values()))
    reference_2 = table_P2.min(axis=0) - MARGIN * np.ptp(table_P2, axis=0)
    fronts = {
        method: keys for method in (*BLEND_METHODS, EXPERT, MORL) if (keys := front(list(by_key), method, scale))
    }
    methods = {}
    for method, keys in fronts.items():
        fields: dict[str, Any] = {"points": len(keys)}
        fields["hypervolume"] = float(hypervolume(np.stack([means[key] for key in keys]), reference_2))
        other = fronts.get(METHODS[method].against or "")
        delta = _difference(by_key, rewards, (keys, other), reference_2) if other else None
        methods[method] = fields | named("delta_vs_blend", delta) | _cost(method, keys, by_key)
    return {"rewards": list(rewards), "reference": reference_2.tolist(), "methods": methods}


def _cost(method: str, keys: Sequence[Key], by_key: Mapping[Key, list[Row]]) -> dict[str, float]:
    mixing = [key for key in keys if key[0] == method and 0 < key[1] < 1] or [key for key in keys if key[0] == method]
    rows = [row for key in mixing for row in by_key[key]]
    return {
        "nfe_per_image": float(np.mean([row.nfe for row in rows])),
        "images_per_second": len(rows) / sum(row.seconds for row in rows),
    }


def _difference(
    by_key: Mapping[Key, list[Row]],
    rewards: Sequence[str],
    fronts: tuple[Sequence[Key], Sequence[Key]],
    reference_2: NDArray[np.float64],
) -> Estimate | None:
    """Hypervolume of the first front minus that of the second.

    It is None with a single prompt.
    """
    prompts = sorted({row.prompt_id for keys in fronts for key in keys for row in by_key[key]})
    if len(prompts) < 2:
        return None
    tables = {key: _table(by_key[key], rewards, prompts) for keys in fronts for key in keys}

    def statistic(weight_MG: NDArray[np.float64]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):  # a point without images of the remaining prompts counts as nothing
            at = {key: weight_MG @ sum_G2 / (weight_MG @ count_G1) for key, (sum_G2, count_G1) in tables.items()}
        first, second = (hypervolume(np.stack([at[key] for key in keys], axis=1), reference_2) for keys in fronts)
        return first - second

    return jackknife(statistic, len(prompts)).interval()


def _table(
    rows: Sequence[Row], rewards: Sequence[str], prompts: Sequence[int]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of the two rewards and numbers of images, by prompt.

    They are (G, 2) and (G, 1).
    """
    group_N = np.searchsorted(prompts, [row.prompt_id for row in rows])
    columns = [[row.rewards[name] for row in rows] for name in rewards]
    sums = [np.bincount(group_N, column, minlength=len(prompts)) for column in columns]
    return np.stack(sums, axis=1), np.bincount(group_N, minlength=len(prompts))[:, None].astype(np.float64)
