"""Evaluations of several trainings, pooled into one claim.

    python -m rlg.pool runs/A-seed0/eval/ID runs/A-seed1/eval/ID runs/A-seed2/eval/ID --output results/NAME

The evaluations may differ only in the adapter and in the seed of the noise. Their rows are pooled by prompt, so that
an interval covers other prompts. It does not cover other trainings. These are covered by the seeds, and each seed is
shown. Guidance is compared with the LoRA scaled by the same w, on the same noise. The output is summary.json,
README.md with its tables, and the curves of all trainings together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class PoolOptions:
    """Options of `python -m rlg.pool`."""

    folders: tuple[Path, ...] = option(help="evaluations, one a training", metavar="DIR", place=0)
    output: Path = option(help="folder of what is written")
    title: str | None = option(None, "of README.md (default: the folder's name)")
    by: str = option("python -m rlg.pool", "the command that README.md names")


COMMAND = Command("python -m rlg.pool", PoolOptions, __doc__)
if __name__ == "__main__":
    COMMAND.answer()

import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib

from rlg.cli import fail_cleanly
from rlg.evaluation.methods import LORA_SCALE, METHODS, RLG
from rlg.evaluation.rows import Row, pair
from rlg.evaluation.summary import best_w, difference, named, summarise
from rlg.io import tables
from rlg.io.run_folder import CARD, CURVES, SUMMARY
from rlg.models.fingerprint import DIGESTS, VERSIONS
from rlg.reports.evaluation_data import Run, read_run, reward_names
from rlg.reports.evaluation_figures import draw_curves
from rlg.reports.theme import STYLE
from rlg.stats import PERCENT, Estimate

_OWN = {"adapter", "name", "seed", "created", "command"}  # entries of meta.json that differ between trainings
_SETTINGS = ("base", "trained_rewards", "prompts", "num_prompts", "k", "sampler", "level", "steps", "cfg", "schedule")
_MADE_OF = (DIGESTS, VERSIONS)
_DELTAS = {"delta_vs_base": 0.0, "delta_vs_tuned": 1.0}  # difference: w of the guided point that it refers to
_OF_A_TRAINING = ("mean", "ci95", *(f"{key}{end}" for key in _DELTAS for end in ("", "_ci95")))
Point = Mapping[str, Any]


def merged(runs: Sequence[Run]) -> Run:
    """All rows as one evaluation.

    Raises ValueError for different settings, or for the same noise.
    """
    _check(runs)
    rows = [row for run in runs for row in run.rows]
    name = ", ".join(run.name for run in runs)
    return Run(name, runs[0].folder, rows, summarise(rows, _common(runs[0]) | {"adapter": name}))


def pool(runs: Sequence[Run], pooled: Run) -> dict[str, Any]:
    """The content of summary.json."""
    meta, rows = pooled.summary["meta"], pooled.rows
    return {
        "settings": {name: _public(meta.get(name)) for name in (*_SETTINGS, *_MADE_OF)},
        "trainings": [{"name": run.name, "seed": run.summary["meta"].get("seed")} for run in runs],
        "rewards": [name for name, _ in reward_names(runs)],
        "points": [_with_trainings(point, runs) for point in pooled.summary["points"]],
        "falls": pooled.summary["falls"],
        "falls_by_training": {run.name: run.summary["falls"] for run in runs},
        "best": {name: _best(rows, name) for name in meta["trained_rewards"]},
        "guided_minus_lora": [entry for w in _scaled(rows) for entry in _against_lora(runs, rows, w)],
    }


def _public(value: Any) -> Any:
    """A setting without its folder on this machine."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _common(run: Run) -> dict[str, Any]:
    """The entries of meta.json that all trainings share."""
    meta = {name: value for name, value in run.summary["meta"].items() if name not in _OWN}
    digests = {name: digest for name, digest in meta.get(DIGESTS, {}).items() if name not in _OWN}
    return meta | {DIGESTS: digests}


def _check(runs: Sequence[Run]) -> None:
    first = _common(runs[0])
    for run in runs[1:]:
        other = _common(run)
        differ = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
        if differ:
            raise ValueError(f"{run.folder} and {runs[0].folder} differ in {', '.join(differ)}: those are two claims")
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("two of the evaluations have one name; give each training a --name of its own")
    seeds = [frozenset(row.seed for row in run.rows) for run in runs]
    if len(frozenset().union(*seeds)) < sum(map(len, seeds)):
        raise ValueError("two of the evaluations start from the same noise; give each a --seed of its own")


def _with_trainings(point: Point, runs: Sequence[Run]) -> dict[str, Any]:
    """A pooled point with the rewards of each training added."""
    where = point["method"], point["w"]
    same = [other for run in runs for other in run.summary["points"] if (other["method"], other["w"]) == where]
    own = {
        name: [{key: other["rewards"][name][key] for key in _OF_A_TRAINING} for other in same]
        for name in point["rewards"]
    }
    return {**point, "rewards": {name: {**row, "by_training": own[name]} for name, row in point["rewards"].items()}}


def _of(rows: Sequence[Row], method: str, w: float) -> list[Row]:
    return [row for row in rows if (row.method, row.w) == (method, w)]


def _scaled(rows: Sequence[Row]) -> list[float]:
    return sorted({row.w for row in rows if row.method == LORA_SCALE})


def _against_lora(runs: Sequence[Run], rows: Sequence[Row], w: float) -> list[dict[str, Any]]:
    """Guidance minus the LoRA times w, for each reward.

    An entry has the pooled difference and those of each training.
    """

    def minus(some: Sequence[Row], name: str) -> Any:
        return difference(pair(_of(some, RLG, w), _of(some, LORA_SCALE, w)), name)

    return [
        {"w": w, "reward": name, **named("delta", minus(rows, name))}
        | {"by_training": [each and each.mean for each in (minus(run.rows, name) for run in runs)]}
        for name in rows[0].rewards
    ]


def _best(rows: Sequence[Row], reward: str) -> dict[str, Any] | None:
    """The best w, and its difference to w = 1.

    It is chosen on every other prompt, and its difference is that of the prompts between.
    """
    sweep = {w: _of(rows, RLG, w) for w in sorted({row.w for row in rows if row.method == RLG})}
    best = best_w(sweep, reward, sweep.get(1.0, ()))
    return None if best is None else {"w": best.w, "n": best.n, **named("delta_vs_tuned", best.delta)}


def readme(summary: Mapping[str, Any], title: str, command: str) -> str:
    """A README with the tables of summary.json."""
    settings, names = summary["settings"], [row["name"] for row in summary["trainings"]]
    where = f"{settings['sampler']}, {settings['steps']} steps, CFG {settings['cfg']:g}"
    parts = [
        f"# {title}",
        f"`{command}`",
        f"{settings['base']} on {settings['num_prompts']} prompts of `{settings['prompts']}`, {settings['k']} images "
        f"each, {len(names)} trainings ({', '.join(names)}); {where}; n = {summary['points'][0]['n']} a row. "
        f"Intervals are {PERCENT}, over prompts; in brackets after them the trainings, one by one.",
    ]
    for reward in summary["rewards"]:
        trained = "trained" if reward in settings["trained_rewards"] else "held out"
        parts += [f"## {reward} ({trained})", _points(summary, reward), *_remarks(summary, reward)]
        if entries := [entry for entry in summary["guided_minus_lora"] if entry["reward"] == reward]:
            rows = [[f"{e['w']:g}", _interval(e, "delta", "+") + _each(e["by_training"])] for e in entries]
            parts.append(tables.markdown(["w", "guided minus LoRA × w"], rows))
    return "\n\n".join(parts) + "\n"


def _points(summary: Mapping[str, Any], reward: str) -> str:
    head = ["", "w", "mean", "against base", "against w = 1", "passes"]
    return tables.markdown(head, [_cells(point, reward) for point in _ordered(summary["points"])])


def _ordered(points: Sequence[Point]) -> list[Point]:
    methods = list(METHODS)
    return sorted(points, key=lambda point: (methods.index(point["method"]), point["w"]))


def _cells(point: Point, reward: str) -> list[str]:
    values = point["rewards"][reward]
    cells = [METHODS[point["method"]].label, f"{point['w']:g}", _interval(values, "mean")]
    for key, w in _DELTAS.items():
        itself = (point["method"], point["w"]) == (RLG, w)
        own = _each([training[key] for training in values["by_training"]])
        cells.append("" if itself else _interval(values, key, "+") + own)
    return [*cells, f"{point['nfe_per_image']:g}"]


def _remarks(summary: Mapping[str, Any], reward: str) -> list[str]:
    if reward not in summary["falls"]:
        best = summary["best"].get(reward)
        chosen = best and f"Best w, chosen on half of the prompts: {best['w']:g}; on the others (n = {best['n']}) "
        return [chosen + f"{_interval(best, 'delta_vs_tuned', '+')} against w = 1."] if chosen else []
    fall = summary["falls"][reward]
    seeds = [each[reward] and f"{each[reward]['w']:g}" for each in summary["falls_by_training"].values()]
    where = ", ".join(seed or "none" for seed in seeds)
    return [f"Falls from w = {fall['w']:g} on (by training: {where})." if fall else f"No fall (by training: {where})."]


def _interval(values: Mapping[str, Any], key: str, sign: str = "") -> str:
    if values[key] is None:
        return "-"
    ends = values["ci95" if key == "mean" else f"{key}_ci95"]
    return f"{Estimate.of(values[key], ends):{sign}.3f}"


def _each(values: Sequence[float | None]) -> str:
    return " (" + ", ".join("-" if value is None else f"{value:+.3f}" for value in values) + ")"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; prints the path of README.md."""
    with fail_cleanly():
        options = COMMAND.parse(argv)
        runs = [read_run(folder) for folder in options.folders]
        pooled = merged(runs)
        summary = pool(runs, pooled)
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / SUMMARY).write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")
        with matplotlib.rc_context(STYLE):
            draw_curves([pooled]).savefig(options.output / CURVES, dpi=100)
        (options.output / CARD).write_text(readme(summary, options.title or options.output.name, options.by))
        print(options.output / CARD)


if __name__ == "__main__":
    main()
