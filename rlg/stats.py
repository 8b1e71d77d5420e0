"""Evaluation rows (scores.jsonl) and their paired statistics (summary.json).

Images of one prompt resemble each other, so an interval that treats them as independent is too narrow. Every bootstrap
here resamples prompts and keeps all the images of a drawn prompt (the cluster bootstrap; a percentile interval). With
S_g the sum and n_g the number of values of prompt g, and c_g how often a resample drew it, the resampled mean is

    sum_g c_g S_g / sum_g c_g n_g

A point of a summary is a (mode, w). Its difference and its win rate against the tuned model (guidance at w=1) and the
base (w=0) are paired over the same prompt, k and seed.

Legend: N values (images), G groups (prompts), R resamples. Below some 20 prompts the intervals run a little short.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlg.config import parse_json

MODES = ("rlg", "lora_scale", "tuned_2x_steps", "corrected")  # of a sweep over w
RLG_LS = "rlg_ls"  # base or tuned model, drawn at each step: one pass
EXPERT, MORL = "expert", "morl"  # points of a blend: an expert on its own, and a model trained on the mix of rewards
BLEND_MODES = ("blend", "blend_ls", "soup")
ALL_MODES = (*MODES, RLG_LS, *BLEND_MODES, EXPERT, MORL)
SAMPLERS = ("ode", "sde", "cps")
OPTIONAL = ("kl", "diversity", "log_weight")  # numbers that a row may lack


@dataclass(frozen=True, slots=True)  # a report holds all rows of an evaluation
class Row:
    """One scored image: a line of scores.jsonl."""

    prompt_id: int
    prompt: str
    tag: str | None
    k: int  # which of the prompt's images; (prompt_id, k, seed) fixes the initial noise
    seed: int
    w: float  # guidance weight, to the 6 digits of an image's file name; of a blend, the last expert's weight in it
    sampler: str  # one of SAMPLERS
    mode: str  # one of ALL_MODES; the base is "rlg" at w=0, the tuned model "rlg" at w=1
    rewards: dict[str, float]
    kl: float | None  # path KL to the base in nats; None for a deterministic sampler
    diversity: float | None
    nfe: int  # network evaluations spent on the image
    seconds: float
    log_weight: float | None = None  # of the corrector, in nats, where guidance kept it; absent from older files

    @property
    def noise(self) -> tuple[int, int, int]:
        """What two rows share when they started from the same prompt and noise."""
        return self.prompt_id, self.k, self.seed

    @classmethod
    def from_json(cls, record: Any) -> Row:
        """Check a decoded line of scores.jsonl; keys that are not fields are ignored.

        Raises ValueError for a missing field, a wrong type, NaN or infinity, or an unknown mode or sampler.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, got {type(record).__name__}")
        record = {"log_weight": None, **record}
        missing = [name for name in cls.__dataclass_fields__ if name not in record]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        if not isinstance(record["rewards"], dict) or not record["rewards"]:
            raise ValueError("rewards must be an object with at least one entry")
        return cls(
            prompt=_text(record, "prompt"),
            tag=None if record["tag"] is None else _text(record, "tag"),
            sampler=_choice(record, "sampler", SAMPLERS),
            mode=_choice(record, "mode", ALL_MODES),
            w=float(f"{_number(record, 'w'):g}"),
            rewards={sys.intern(name): _number(record["rewards"], name) for name in record["rewards"]},
            seconds=_number(record, "seconds"),
            **{name: None if record[name] is None else _number(record, name) for name in OPTIONAL},
            **{name: _integer(record, name) for name in ("prompt_id", "k", "seed", "nfe")},
        )


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name} must be a string, got {record[name]!r}")
    return sys.intern(record[name])  # a prompt has many rows, and they hold it once


def _choice(record: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    if record[name] not in known:
        raise ValueError(f"unknown {name} {record[name]!r}; known: {', '.join(known)}")
    return sys.intern(record[name])


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _integer(record: Mapping[str, Any], name: str) -> int:
    if type(record[name]) is not int:  # neither True nor 1.0
        raise ValueError(f"{name} must be an integer, got {record[name]!r}")
    return record[name]


def read_rows(path: Path) -> list[Row]:
    """The rows of a scores.jsonl, in file order.

    A last line without its newline that does not parse was cut off by a crash: it is left out with a warning. Raises
    ValueError with the file and the line for any other bad or repeated line, and for a file without rows.
    """
    with path.open("rb") as lines:  # line by line: the bytes of all take as much as their rows
        return _rows_of(path, lines)


def _rows_of(path: Path, lines: Iterable[bytes]) -> list[Row]:
    rows: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if line.endswith(b"\n"):
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            warnings.warn(f"{path}:{number}: the last line is cut off and was ignored", stacklevel=2)
            continue
        try:
            row = Row.from_json(record)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        key = (*row.noise, row.w, row.sampler, row.mode)
        if key in rows:
            raise ValueError(f"{path}:{number}: a second row for (prompt_id, k, seed, w, sampler, mode) = {key}")
        rows[key] = row
    if not rows:
        raise ValueError(f"{path} has no rows")
    return list(rows.values())


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float


def bootstrap_mean(
    values_N: ArrayLike, groups_N: ArrayLike, *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Estimate:
    """Mean of the values, with a percentile interval from resampling whole groups (prompts).

    With a single group its values are resampled instead; a single value has an interval of no width. The same seed and
    number of groups draw the same resamples, so the intervals along a sweep wobble together.
    Raises ValueError for no values, lengths that differ, or a value that is not finite (named by index and group).
    """
    values, groups = np.asarray(values_N, dtype=np.float64), np.asarray(groups_N)
    _check(values, groups)
    names, group_of = np.unique(groups, return_inverse=True)
    if len(names) == 1:
        group_of = np.arange(len(values))
    sum_G, count_G = np.bincount(group_of, weights=values), np.bincount(group_of)
    draws_RG = draws(len(sum_G), resamples, seed)
    means_R = draws_RG @ sum_G / (draws_RG @ count_G)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means_R, [tail, 100 - tail])
    return Estimate(float(values.mean()), float(low), float(high))


def paired_difference(a_N: ArrayLike, b_N: ArrayLike, groups_N: ArrayLike, **options: Any) -> Estimate:
    """Mean of a - b over pairs: a_N[i] and b_N[i] share their prompt and noise. Options as for `bootstrap_mean`."""
    a, b = _aligned(a_N, b_N)
    return bootstrap_mean(a - b, groups_N, **options)


def win_rate(a_N: ArrayLike, b_N: ArrayLike, groups_N: ArrayLike, **options: Any) -> Estimate:
    """Share of the pairs in which a beats b, a tie counting one half. Options as for `bootstrap_mean`."""
    a, b = _aligned(a_N, b_N)
    wins = np.where(np.isfinite(a - b), (a > b) + 0.5 * (a == b), np.nan)
    return bootstrap_mean(wins, groups_N, **options)


def pair(rows: Sequence[Row], reference: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(row, its partner in the reference) for rows with the same prompt, k and seed, in the order of `rows`.

    Rows without a partner are left out. Raises ValueError when two rows of the reference start from the same noise.
    """
    partner = {row.noise: row for row in reference}
    if len(partner) < len(reference):
        raise ValueError("the reference has several rows for one (prompt_id, k, seed)")
    return [(row, partner[row.noise]) for row in rows if row.noise in partner]


def _aligned(a_N: ArrayLike, b_N: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(a_N, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    if a.shape != b.shape:
        raise ValueError(f"paired values must have one shape, got {a.shape} and {b.shape}")
    return a, b


def _check(values: NDArray[np.float64], groups: NDArray[Any]) -> None:
    if values.ndim != 1 or values.shape != groups.shape or not len(values):
        raise ValueError(f"need as many values as groups and at least one, got {values.shape} and {groups.shape}")
    if not np.isfinite(values).all():
        first = np.flatnonzero(~np.isfinite(values))[0]
        raise ValueError(f"value {first} (group {groups[first]}) is {values[first]}")


@lru_cache(maxsize=4)
def draws(groups: int, resamples: int = 2000, seed: int = 0) -> NDArray[np.float64]:
    """(R, G): how often each resample drew each group; G draws with replacement a row."""
    drawn_RG = np.random.default_rng(seed).integers(groups, size=(resamples, groups))
    flat = drawn_RG + groups * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * groups).reshape(resamples, groups).astype(np.float64)


def summarise(rows: Sequence[Row], meta: Mapping[str, Any]) -> dict[str, Any]:
    """The content of summary.json: a point for each (mode, w), sorted; null where there is nothing to say.

    Raises ValueError for rows of several samplers or of differing rewards: their means would not be comparable.
    """
    samplers = sorted({row.sampler for row in rows})
    if len(samplers) > 1:
        raise ValueError(f"the rows mix the samplers {', '.join(samplers)}; give each its own evaluation folder")
    for row in rows:
        if row.rewards.keys() != rows[0].rewards.keys():
            raise ValueError(f"rewards differ: {sorted(rows[0].rewards)}, but {sorted(row.rewards)} in {row}")
    points: dict[tuple[str, float], list[Row]] = defaultdict(list)
    for row in rows:
        points[row.mode, row.w].append(row)
    references = {"tuned": points.get(("rlg", 1.0), []), "base": points.get(("rlg", 0.0), [])}
    if not has_base(meta):
        references["base"] = []
    return {
        "base": meta["base"],
        "adapter": meta["adapter"],
        "meta": dict(meta),
        "points": [_point(points[key], references) for key in sorted(points)],
        "falls": {
            name: first_fall({w: group for (mode, w), group in points.items() if mode == "rlg"}, name)
            for name in rows[0].rewards
            if name not in meta.get("trained_rewards", rows[0].rewards)
        },
    }


def has_base(meta: Mapping[str, Any]) -> bool:
    """Whether w = 0 is the base: under a schedule of w that is not constant, some steps are the tuned model's."""
    return meta.get("schedule", "constant") == "constant"


def first_fall(sweep: Mapping[float, Sequence[Row]], reward: str) -> dict[str, Any] | None:
    """Where a reward starts to fall along w: the first w >= 0 at which it is below its best at a smaller w, paired.

    Below: the 95% interval of the difference is. None if it never is. The guard against reward hacking: of a reward
    that was not trained on, it says how far w may go.
    """
    best: float | None = None
    for w in sorted(w for w in sweep if w >= 0):
        if best is not None and (matched := pair(sweep[w], sweep[best])):
            ours, theirs = ([row.rewards[reward] for row in side] for side in zip(*matched, strict=True))
            delta = paired_difference(ours, theirs, [row.prompt_id for row, _ in matched])
            if delta.high < 0:
                return {"w": w, "from": best, **_named("delta", delta)}
        if best is None or _mean(sweep[w], reward) > _mean(sweep[best], reward):
            best = w
    return None


def _mean(rows: Sequence[Row], reward: str) -> float:
    return float(np.mean([row.rewards[reward] for row in rows]))


def _point(rows: Sequence[Row], references: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    pairs = {name: pair(rows, reference) for name, reference in references.items()}
    for name, matched in pairs.items():
        if references[name] and len(matched) < len(rows):
            lonely = f"{len(rows) - len(matched)} of {len(rows)} images"
            warnings.warn(f"{rows[0].mode} w={rows[0].w:g}: {lonely} have no {name} partner", stacklevel=3)
    return {
        "w": rows[0].w,
        "mode": rows[0].mode,
        "n": len(rows),
        "nfe_per_image": float(np.mean([row.nfe for row in rows])),
        "seconds_per_image": float(np.mean([row.seconds for row in rows])),
        **_named("kl", _known_mean(rows, "kl")),
        **_named("diversity", _known_mean(rows, "diversity")),
        **_named("ess", effective_share(rows)),
        "rewards": {name: _reward(name, rows, pairs) for name in rows[0].rewards},
    }


def _reward(name: str, rows: Sequence[Row], pairs: Mapping[str, list[tuple[Row, Row]]]) -> dict[str, Any]:
    mean = bootstrap_mean([row.rewards[name] for row in rows], [row.prompt_id for row in rows])
    fields: dict[str, Any] = {"mean": mean.mean, "ci95": [mean.low, mean.high]}
    for against, matched in pairs.items():
        ours = [row.rewards[name] for row, _ in matched]
        theirs = [row.rewards[name] for _, row in matched]
        prompts = [row.prompt_id for row, _ in matched]
        for key, statistic in (("win", win_rate), ("delta", paired_difference)):
            fields |= _named(f"{key}_vs_{against}", statistic(ours, theirs, prompts) if matched else None)
    return fields


def _known_mean(rows: Sequence[Row], field: str) -> Estimate | None:
    known = [(getattr(row, field), row.prompt_id) for row in rows if getattr(row, field) is not None]
    return bootstrap_mean(*zip(*known, strict=True)) if known else None


def effective_share(rows: Sequence[Row]) -> Estimate | None:
    """Mean over prompts of (sum W)^2 / (K sum W^2), W the corrector's weights of a prompt's K images at one w.

    1: guidance samples what w claims; 1/K: one image in K stands for all. None where weights are unknown or K is 1.
    """
    groups: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        if row.log_weight is not None:
            groups[row.prompt_id, row.seed].append(row.log_weight)
    shares = [(ess(weights), prompt) for (prompt, _), weights in groups.items() if len(weights) > 1]
    return bootstrap_mean(*zip(*shares, strict=True)) if shares else None


def ess(log_weight_K: ArrayLike) -> float:
    """(sum W)^2 / (K sum W^2) of K log-weights: the effective share of a group."""
    log_K = np.asarray(log_weight_K, dtype=np.float64)
    weight_K = np.exp(log_K - log_K.max())
    return float(weight_K.sum() ** 2 / (len(weight_K) * (weight_K**2).sum()))


def _named(key: str, estimate: Estimate | None) -> dict[str, Any]:
    if estimate is None:
        return {key: None, f"{key}_ci95": None}
    return {key: estimate.mean, f"{key}_ci95": [estimate.low, estimate.high]}
