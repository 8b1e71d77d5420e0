"""The content of summary.json, computed from rows.

A point is a (method, w). Its difference and its win rate against the tuned model (guidance at w = 1) and the base (w =
0) are paired over the same prompt, k and seed. Many w are judged together (`stats.family`). A w that is chosen on some
prompts is reported on others.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from rlg.evaluation.methods import CORRECTED, RLG
from rlg.evaluation.rows import Row, pair
from rlg.stats import Estimate, Family, ess, family, grouped_mean, normalised, paired_difference, win_rate

FORMAT = 2  # format of summary.json and of rows; 2 renamed the key `mode` to `method`


def summarise(rows: Sequence[Row], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of summary.json.

    It has a point for each (method, w), sorted. An unknown value is null. Raises ValueError for rows with several
    samplers or different rewards, because their means are not comparable.
    """
    samplers = sorted({row.sampler for row in rows})
    if len(samplers) > 1:
        raise ValueError(f"the rows mix the samplers {', '.join(samplers)}; give each its own evaluation folder")
    for row in rows:
        if row.rewards.keys() != rows[0].rewards.keys():
            raise ValueError(f"rewards differ: {sorted(rows[0].rewards)}, but {sorted(row.rewards)} in {row}")
    points: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        points[row.method, row.w].append(row)
    references = {"tuned": points.get((RLG, 1.0), []), "base": points.get((RLG, 0.0), [])}
    if not has_base(meta):
        references["base"] = []
    return {
        "format": FORMAT,
        "base": meta["base"],
        "adapter": meta["adapter"],
        "meta": dict(meta),
        "points": [_point(points[key], references) for key in sorted(points)],
        "falls": {
            name: first_fall({w: group for (method, w), group in points.items() if method == RLG}, name)
            for name in rows[0].rewards
            if name not in meta.get("trained_rewards", rows[0].rewards)
        },
    }


def has_base(meta: Mapping[str, Any]) -> bool:
    """Tell whether w = 0 is the base.

    Under a schedule of w that is not constant, some steps are the tuned model's.
    """
    return meta.get("schedule", "constant") == "constant"


def _point(rows: Sequence[Row], references: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    pairs = {name: pair(rows, reference) for name, reference in references.items()}
    for name, matched in pairs.items():
        if references[name] and len(matched) < len(rows):
            lonely = f"{len(rows) - len(matched)} of {len(rows)} images"
            warnings.warn(f"{rows[0].method} w={rows[0].w:g}: {lonely} have no {name} partner", stacklevel=3)
    share = effective_share(rows)
    corrected = rows[0].method == CORRECTED  # older files give a path KL here, but resampled images have no path
    return {
        "w": rows[0].w,
        "method": rows[0].method,
        "n": len(rows),
        "nfe_per_image": float(np.mean([row.nfe for row in rows])),
        "seconds_per_image": float(np.mean([row.seconds for row in rows])),
        **named("kl", None if corrected else _known_mean(rows, "kl")),
        **named("diversity", _known_mean(rows, "diversity")),
        "ess": share and share.mean,
        "ess_at_most": share and share.at_most,
        "ess_largest": share and share.largest,
        "ess_k": share and share.k,
        "rewards": {name: _reward(name, rows, pairs, references) for name in rows[0].rewards},
    }


def _reward(
    name: str,
    rows: Sequence[Row],
    pairs: Mapping[str, list[tuple[Row, Row]]],
    references: Mapping[str, Sequence[Row]],
) -> dict[str, Any]:
    mean = _mean(rows, name)
    fields: dict[str, Any] = {"mean": mean.mean, "ci95": [mean.low, mean.high]}
    for against, matched in pairs.items():
        same = rows is references[against]
        delta = Estimate(0.0, 0.0, 0.0) if same else difference(matched, name)
        win = Estimate(0.5, 0.5, 0.5) if same else _wins(matched, name)
        fields |= named(f"win_vs_{against}", win) | named(f"delta_vs_{against}", delta)
    return fields


def named(key: str, estimate: Estimate | None) -> dict[str, Any]:
    """An estimate as two fields of a JSON file."""
    if estimate is None:
        return {key: None, f"{key}_ci95": None}
    return {key: estimate.mean, f"{key}_ci95": [estimate.low, estimate.high]}


def _mean(rows: Sequence[Row], reward: str) -> Estimate:
    return grouped_mean([row.rewards[reward] for row in rows], [row.prompt_id for row in rows])


def difference(matched: Sequence[tuple[Row, Row]], reward: str) -> Estimate | None:
    """The mean difference of a reward over pairs of rows.

    It is None without pairs.
    """
    return paired_difference(*columns_of(matched, reward)) if matched else None


def _wins(matched: Sequence[tuple[Row, Row]], reward: str) -> Estimate | None:
    return win_rate(*columns_of(matched, reward)) if matched else None


def columns_of(matched: Sequence[tuple[Row, Row]], reward: str) -> tuple[list[float], list[float], list[int]]:
    """A reward on both sides of pairs, and the pairs' prompts."""
    sides = ([row.rewards[reward] for row in side] for side in zip(*matched, strict=True))
    return (*sides, [row.prompt_id for row, _ in matched])


def _known_mean(rows: Sequence[Row], field: str) -> Estimate | None:
    known = [(getattr(row, field), row.prompt_id) for row in rows if getattr(row, field) is not None]
    return grouped_mean(*zip(*known, strict=True), scores=False) if known else None


# --- many w at once


def compared(sweep: Mapping[float, Sequence[Row]], reward: str) -> tuple[list[tuple[float, float]], Family] | None:
    """Paired differences of every two w of a sweep.

    Each is the larger w minus the smaller. The result is None without a pair.
    """
    found = {
        (low, high): matched
        for low, high in combinations(sorted(sweep), 2)
        if (matched := pair(sweep[high], sweep[low]))
    }
    if not found:
        return None
    columns = (columns_of(matched, reward) for matched in found.values())
    return list(found), family([(np.subtract(ours, theirs), prompts) for ours, theirs, prompts in columns])


def first_fall(sweep: Mapping[float, Sequence[Row]], reward: str) -> dict[str, Any] | None:
    """The first w >= 0 at which a reward surely falls.

    It is lower there than at some smaller w. None means that there is no such w. For a reward that was not trained on,
    this limits w as a guard against reward hacking. All pairs of w are judged together. A flat reward therefore
    appears to fall in 2.5% of sweeps, for any number of w. The difference is the largest of the sure ones, with its
    simultaneous 95% interval.
    """
    found = compared({w: rows for w, rows in sweep.items() if w >= 0}, reward)
    if found is None:
        return None
    pairs, judged = found
    falls = [p for p in range(len(pairs)) if judged.sure_P[p] and judged.mean_P[p] < 0]
    if not falls:
        return None
    first = min(pairs[p][1] for p in falls)
    p = min((p for p in falls if pairs[p][1] == first), key=lambda p: judged.mean_P[p])
    return {"w": first, "from": pairs[p][0], **named("delta", judged.interval(p))}


def perhaps_best(sweep: Mapping[float, Sequence[Row]], reward: str) -> tuple[float, float]:
    """The least and the largest w that may be the best.

    No other w surely beats them. The best w lies between them in 95% of sweeps.
    """
    pairs, judged = compared(sweep, reward) or ([], None)
    beaten = {low if judged.mean_P[p] > 0 else high for p, (low, high) in enumerate(pairs) if judged.sure_P[p]}
    left = sorted(set(sweep) - beaten)
    return left[0], left[-1]


@dataclass(frozen=True)
class Best:
    """The w of the highest mean.

    It is chosen on every other prompt, and reported on the prompts between.
    """

    w: float
    mean: Estimate
    delta: Estimate | None  # paired difference to the reference; None at the reference, and without one
    win: Estimate | None
    n: int  # number of images of `mean`
    between: tuple[float, float]  # `perhaps_best` on all prompts


def best_w(sweep: Mapping[float, Sequence[Row]], reward: str, reference: Sequence[Row] = ()) -> Best | None:
    """The w at which a reward is highest.

    It is None with fewer than two prompts, because none would be left to report on.
    """
    prompts = sorted({row.prompt_id for rows in sweep.values() for row in rows})
    chosen_on, reported_on = (set(prompts[start::2]) for start in (0, 1))
    there = {w: [row for row in rows if row.prompt_id in chosen_on] for w, rows in sweep.items()}
    here = {w: [row for row in rows if row.prompt_id in reported_on] for w, rows in sweep.items()}
    complete = [w for w in sweep if there[w] and here[w]]
    if not complete:
        return None
    w = max(complete, key=lambda w: float(np.mean([row.rewards[reward] for row in there[w]])))
    matched = [] if {id(row) for row in reference} & {id(row) for row in here[w]} else pair(here[w], reference)
    return Best(
        w=w,
        mean=_mean(here[w], reward),
        delta=difference(matched, reward),
        win=_wins(matched, reward),
        n=len(here[w]),
        between=perhaps_best(sweep, reward),
    )


# --- the corrector's weights


@dataclass(frozen=True)
class Share:
    """The effective share of K images.

    It is at least 1/K, and its mean is larger than the share of the law.
    """

    mean: float
    at_most: float  # upper end of its interval: the law's share is lower in at least 95% of cases
    largest: float  # the heaviest image's part of all weights, as a mean over prompts
    k: int  # smallest number of images that were compared


def effective_share(rows: Sequence[Row]) -> Share | None:
    """Mean over prompts of `(sum W)^2 / (K sum W^2)`.

    W are the corrector's weights of a prompt's K images at one w. 1 means that guidance samples what w claims. 1/K
    means that one image in K stands for all. The share is None where weights are unknown, or K is 1.
    """
    groups: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.log_weight is not None:
            groups[row.prompt_id, row.seed].append(row.log_weight)
    compared = {key: weights for key, weights in groups.items() if len(weights) > 1}
    if not compared:
        return None
    share = grouped_mean([ess(weights) for weights in compared.values()], [prompt for prompt, _ in compared])
    return Share(
        mean=share.mean,
        at_most=min(1.0, max(share.mean, share.high)),
        largest=float(np.mean([normalised(weights).max() for weights in compared.values()])),
        k=min(len(weights) for weights in compared.values()),
    )
