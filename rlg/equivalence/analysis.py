"""Numbers of `rlg.equivalence`: guidance with w against oracle and trained models.

The oracle is taken at beta / w, and so are the models. Intervals are over prompts. Each prompt that is left out has
the matched beta found anew, because it is found from the same rewards.

Legend: P prompts, K images a prompt, M weightings of the prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from rlg.equivalence.oracle import Oracle
from rlg.evaluation.rows import Row
from rlg.stats import Array, Estimate, Estimated, grouped_mean, jackknife, ratio, summed, weighted_mean

if TYPE_CHECKING:
    from rlg.equivalence.experiment import Experiment


@dataclass(frozen=True)
class Point:
    """Guidance with one w, against the oracle at beta / w.

    None stands where the oracle has too few samples.
    """

    w: float
    beta: float  # the trained beta over w; inf at w = 0
    reward: Estimate  # reward of guidance
    path_kl: Estimate | None
    oracle: Estimate | None  # reward at beta / w
    oracle_kl: Estimate | None  # nats
    ess: float  # effective number of base samples a prompt behind the oracle
    miss: Estimate | None  # (reward - oracle) / (tuned - base)
    matched: Estimate | None  # the same, against the oracle at the tuned model's own beta over w
    effective_w: Estimate | None  # matched beta of the tuned model over that of this point


@dataclass(frozen=True)
class Trained:
    """A model that was trained at a beta of its own.

    Guidance with w = beta_0 / beta claims to equal it.
    """

    name: str
    beta: float
    w: float
    reward: Estimate
    path_kl: Estimate | None
    oracle: Estimate | None
    ess: float  # effective samples of the oracle
    miss: Estimate | None  # (guided with w - this model) / (tuned - base), where that w was run


@dataclass(frozen=True)
class Slope:
    """dE / dKL of guidance between two w, on the paths' KL.

    beta: the value that it should equal.
    """

    beta: float
    slope: Estimate


@dataclass(frozen=True)
class Result:
    """Numbers of an experiment."""

    points: list[Point]
    trained: list[Trained]
    guided_slopes: list[Slope]  # between neighbouring w, where beta / w is that of their middle
    frontier: list[tuple[float, float, float, float]]  # (beta, reward, KL, ess) along the oracle, where it is trusted
    # the beta whose oracle scores as the tuned model does; None: no such oracle is trusted
    matched_beta: Estimate | None
    base: Estimate
    prompts: int


def table_of(rows: Sequence[Row], value: str, w: float) -> Array:
    """(P, K) rewards named `value`, or path KLs, of one w.

    Prompts and images are in order.
    """
    chosen = sorted((row for row in rows if row.w == w), key=lambda row: (row.prompt_id, row.k))
    prompts = len({row.prompt_id for row in chosen})
    values = [row.kl if value == "kl" else row.rewards[value] for row in chosen]
    return np.array(values, dtype=np.float64).reshape(prompts, -1)


@dataclass(frozen=True)
class Sweep:
    """Guidance with several w beside the oracle of its base.

    Each prompt has one value.
    """

    oracle: Oracle
    reward_P: dict[float, Array]  # reward of guidance by w

    @property
    def gap_P(self) -> Array:
        """Tuned model's reward less that of the base."""
        return self.reward_P[1.0] - self.oracle.base_P

    def share(self, top_P: Array) -> Estimate:
        """A mean as a share of the mean gap."""
        return ratio(*(summed(values_P, _each(values_P)) for values_P in (top_P, self.gap_P)))

    def matched_beta(self) -> Estimate | None:
        """The beta whose oracle scores as the tuned model does."""
        return _positive(jackknife(self._log_matched, len(self.gap_P)))

    def matched_miss(self, w: float) -> Estimate | None:
        """Miss of guidance with w against the oracle at matched beta / w.

        It is a share of the gap.
        """

        def missed(weight_MP: Array) -> Array:
            return weighted_mean(weight_MP, self.reward_P[w]) - self.oracle.reward(
                self._matched(weight_MP, 1.0) / w, weight_MP
            )

        found = ratio(
            jackknife(missed, len(self.gap_P)), jackknife(partial(weighted_mean, value_G=self.gap_P), len(self.gap_P))
        )
        return found if math.isfinite(found.mean) else None

    def effective_w(self, w: float) -> Estimate | None:
        """Matched beta of the tuned model over that of w."""

        def log_ratio(weight_MP: Array) -> Array:
            return self._log_matched(weight_MP) - np.log(self._matched(weight_MP, w))

        return _positive(jackknife(log_ratio, len(self.gap_P)))

    def _matched(self, weight_MP: Array, w: float) -> Array:
        return self.oracle.matching(weighted_mean(weight_MP, self.reward_P[w]), weight_MP)

    def _log_matched(self, weight_MP: Array) -> Array:
        return np.log(self._matched(weight_MP, 1.0))


def _each(values_P: Array) -> Array:
    """Every prompt's own name."""
    return np.arange(len(values_P))


def _over_prompts(values_P: Array | None) -> Estimate | None:
    return None if values_P is None else grouped_mean(values_P, _each(values_P), scores=False)


def _positive(log: Estimated) -> Estimate | None:
    """A positive quantity from its logarithm.

    It is None where one prompt decides whether the quantity exists.
    """
    if not (math.isfinite(log.mean) and np.isfinite(log.residual_G).all()):
        return None
    found = log.interval()
    return Estimate(math.exp(found.mean), math.exp(found.low), math.exp(found.high))


def analyse(
    experiment: Experiment, base: Sequence[Row], guided: Sequence[Row], trained: Sequence[Sequence[Row]]
) -> Result:
    """Numbers of an experiment from its rows.

    The rows are those of the base, of guidance, and of each other trained model at w = 1.
    """
    name, beta = experiment.reward, experiment.beta
    oracle, start = Oracle(table_of(base, name, 0.0)), table_of(guided, name, 0.0)

    def moved(rows: Sequence[Row], w: float) -> Array:
        return oracle.base_P + (table_of(rows, name, w) - start).mean(axis=1)

    sweep = Sweep(oracle, {w: moved(guided, w) for w in experiment.w})
    spent = {w: kl_P for w in experiment.w if w >= 0 and (kl_P := _path_kl(guided, w)) is not None}
    near = [beta, *([matched.mean] if (matched := sweep.matched_beta()) else [])]
    grid = [float(each) for each in np.geomspace(20 * max(near), 0.2 * min(near), 41)]
    return Result(
        points=[_point(sweep, w, beta, spent.get(w)) for w in sorted(experiment.w) if w >= 0],
        trained=[
            _trained(sweep, model, beta / float(model["beta"]), moved(rows, 1.0), _path_kl(rows, 1.0))
            for model, rows in zip(experiment.trained, trained, strict=True)
        ],
        guided_slopes=[
            Slope(2 * beta / (a + b), _slope(sweep.reward_P[b] - sweep.reward_P[a], spent[b] - spent[a]))
            for a, b in pairwise(sorted(spent))
        ],
        frontier=[
            (each, float(found[0].mean()), float(found[1].mean()), oracle.ess(each))
            for each in grid
            if (found := oracle.at(each))
        ],
        matched_beta=matched,
        base=_over_prompts(oracle.base_P),
        prompts=len(oracle.reward_PN),
    )


def _path_kl(rows: Sequence[Row], w: float) -> Array | None:
    """(P,) mean path KLs at one w, where they are known."""
    known = [row for row in rows if row.w == w and row.kl is not None]
    return table_of(known, "kl", w).mean(axis=1) if known else None


def _slope(rise_P: Array, run_P: Array) -> Estimate:
    return ratio(summed(rise_P, _each(rise_P)), summed(run_P, _each(run_P)))


def _point(sweep: Sweep, w: float, beta: float, path_kl_P: Array | None) -> Point:
    own = beta / w if w else math.inf
    found = sweep.oracle.at(own)
    by_definition = w in (0.0, 1.0)
    return Point(
        w=w,
        beta=own,
        reward=_over_prompts(sweep.reward_P[w]),
        path_kl=_over_prompts(path_kl_P),
        oracle=_over_prompts(found and found[0]),
        oracle_kl=_over_prompts(found and found[1]),
        ess=sweep.oracle.ess(own),
        miss=sweep.share(sweep.reward_P[w] - found[0]) if found and w else None,
        matched=None if by_definition else sweep.matched_miss(w),
        effective_w=None if by_definition else sweep.effective_w(w),
    )


def _trained(sweep: Sweep, model: Mapping[str, Any], w: float, reward_P: Array, path_kl_P: Array | None) -> Trained:
    own = float(model["beta"])
    found = sweep.oracle.at(own)
    same = next((at_P for at, at_P in sweep.reward_P.items() if math.isclose(at, w, rel_tol=1e-6)), None)
    return Trained(
        name=model["name"],
        beta=own,
        w=w,
        reward=_over_prompts(reward_P),
        path_kl=_over_prompts(path_kl_P),
        oracle=_over_prompts(found and found[0]),
        ess=sweep.oracle.ess(own),
        miss=None if same is None else sweep.share(same - reward_P),
    )
