"""Table of an equivalence experiment, in Markdown."""

from __future__ import annotations

import math

from rlg.equivalence.analysis import Result
from rlg.equivalence.experiment import Experiment
from rlg.equivalence.oracle import TRUSTED
from rlg.io import tables
from rlg.stats import Estimate


def markdown(experiment: Experiment, result: Result) -> str:
    """The numbers as tables."""
    matched = f"no beta of the oracle with {TRUSTED} effective samples a prompt scores what it does"
    if result.matched_beta:
        matched = f"the oracle scores what it does at beta = {_cell(result.matched_beta, '.3g')}"
    title = (
        f"{experiment.reward} on {experiment.base}: {experiment.ckpt}, trained at beta = {experiment.beta:g}; "
        f"{matched}. {result.prompts} prompts, {experiment.k} "
        f"images at each w, {experiment.samples} of the base; {experiment.kernel}, {experiment.steps} steps. "
        f"The oracle is left out where its ESS is under {TRUSTED}."
    )
    parts = [title, _points(result)]
    if result.guided_slopes:
        rows = [[f"{s.beta:.3g}", _cell(s.slope, ".4f")] for s in result.guided_slopes]
        parts.append(tables.markdown(["guidance, beta / w", "dE / dKL of the paths"], rows))
    if result.trained:
        parts.append(_trained(result))
    return "\n\n".join(parts) + "\n"


def _points(result: Result) -> str:
    heads = ["w", "reward", "oracle at beta / w", "miss, % of the gap", "miss, matched beta"]
    heads += ["effective w", "path KL", "KL of the oracle", "ESS"]
    rows = [
        [
            f"{point.w:g}",
            _cell(point.reward),
            _cell(point.oracle),
            _cell(point.miss, "+.0%"),
            _cell(point.matched, "+.0%"),
            _cell(point.effective_w, ".2f"),
            _cell(point.path_kl, ".2f"),
            _cell(point.oracle_kl, ".2f"),
            f"{point.ess:.0f}",
        ]
        for point in result.points
    ]
    return tables.markdown(heads, rows)


def _trained(result: Result) -> str:
    heads = ["trained", "beta", "reward", "path KL", "w", "guided with w against it, % of the gap"]
    heads += ["oracle at its beta", "ESS"]
    rows = [
        [
            t.name,
            f"{t.beta:g}",
            _cell(t.reward),
            _cell(t.path_kl, ".2f"),
            f"{t.w:.3g}",
            _cell(t.miss, "+.0%"),
            _cell(t.oracle),
            f"{t.ess:.0f}",
        ]
        for t in result.trained
    ]
    return tables.markdown(heads, rows)


def _cell(estimate: Estimate | None, form: str = ".3f") -> str:
    return "" if estimate is None or not math.isfinite(estimate.mean) else f"{estimate:{form}}"
