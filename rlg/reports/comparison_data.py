"""Data of a report on several runs, sweeps and evaluations.

python -m rlg.report runs/sweeps/grpo_tiny                  # a sweep, with the evaluations in its runs' folders
python -m rlg.report runs/A runs/B runs/sweeps/X runs/C/eval/ID

swept        parameters that a sweep drew, or that differ between the configs of the runs
metric       the sweep's, or the trained reward (on held-out prompts, if it was evaluated while training)
evaluations  the given ones, and those in the folders of runs, RUN/eval/*. Those that differ by w alone (an
             evaluation's sweep over w) are one curve, paired over prompts and noises
frontier     points of which no other has more reward at their path KL to the base (nats) or less. Only points of
             one base and one reward are compared
best w       chosen on every other prompt and reported on the rest; its interval holds each w that no other surely
             beats
"""

from __future__ import annotations

import json
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlg.evaluation.rows import Row
from rlg.evaluation.summary import Best, summarise
from rlg.io.parsing import check_type
from rlg.io.run_folder import CONFIG, EVALUATIONS, META, METRICS, ROWS, read_config
from rlg.reports.evaluation_data import Run, read_run
from rlg.runs.sweep_folder import FINISHED, INTERRUPTED, is_sweep, read_metrics, read_sweep

MAX_AXES = 8  # axes of parallel coordinates, besides the metric
_NO_PARAMETERS = (  # options that do not change what is trained
    "name",
    "output_dir",
    "save_steps",
    "save_total_limit",
    "sample_steps",
    "report_to",
    "project",
    "log_adapter",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "adapter_license",
    "eval_steps",
    "eval_num_prompts",
    "eval_prompts",
    "held_out_reward",
)
_SETTINGS = ("adapter", "base", "sampler", "steps", "cfg", "level", "schedule", "origin", "seed", "k", "num_prompts")


@dataclass(frozen=True)
class ComparedRun:
    """A run: a training, or one of a sweep."""

    name: str
    folder: Path
    status: str
    parameters: dict[str, Any]  # parameters that it was given
    metrics: list[dict[str, Any]]  # rows of metrics.jsonl; none for an evaluation
    metric: float | None = None

    def series(self, *names: str) -> np.ndarray:
        """(T, 1 + names) step and metrics, of rows with all."""
        known = [[row.get(name) for name in ("step", *names)] for row in self.metrics]
        kept = [row for row in known if all(isinstance(v, (int, float)) for v in row) and np.isfinite(row).all()]
        return np.array(kept, dtype=np.float64).reshape(-1, 1 + len(names))


@dataclass(frozen=True)
class BestOf:
    """The w of an evaluation at which a reward is highest."""

    run: Run
    reward: str
    found: Best

    @property
    def kl(self) -> float | None:
        """Path KL at that w, over all prompts."""
        return next(point["kl"] for point in self.run.curve(self.run.sweep) if point["w"] == self.found.w)


@dataclass(frozen=True)
class PlanePoint:
    """A point of an evaluation on the plane of KL and reward."""

    run: Run
    row: dict[str, Any]  # a point of summary.json
    reward: str

    @property
    def mean(self) -> float:
        """Mean of the reward."""
        return self.row["rewards"][self.reward]["mean"]


@dataclass(frozen=True)
class Comparison:
    """The content of a report on several runs."""

    entries: list[ComparedRun]
    evaluations: list[Run]
    metric: str | None
    maximise: bool

    @property
    def swept(self) -> list[str]:
        """Parameters that differ between runs, at most MAX_AXES.

        All runs were given them.
        """
        if not self.entries:
            return []
        first = self.entries[0].parameters
        common = [name for name in first if all(name in entry.parameters for entry in self.entries)]
        differ = [name for name in common if len({_key(entry.parameters[name]) for entry in self.entries}) > 1]
        return [name for name in differ if name not in _NO_PARAMETERS][:MAX_AXES]

    def ranked(self) -> list[ComparedRun]:
        """Runs, the best first; those without a metric are last."""
        sign = -1 if self.maximise else 1
        return sorted(self.entries, key=lambda e: (e.metric is None, sign * (e.metric or 0)))


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def is_run(folder: Path) -> bool:
    """Tell whether a trainer wrote the folder."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


def is_evaluation(folder: Path) -> bool:
    """Tell whether `rlg.evaluate` wrote the folder."""
    return (folder / ROWS).is_file() and (folder / META).is_file()


def collect(folders: Sequence[Path], metric: str | None = None) -> Comparison:
    """Read sweeps, training runs and evaluations.

    Raises ValueError for a folder that is none of these.
    """
    entries: list[ComparedRun] = []
    evaluated: list[Path] = []
    goals: list[tuple[str | None, bool]] = []
    for folder in dict.fromkeys(folders):
        if is_sweep(folder):
            sweep = read_sweep(folder)
            goals.append((sweep.metric, sweep.maximise))
            for run in sweep.runs:
                at = folder / run.name
                entries.append(
                    ComparedRun(run.name, at, run.status, run.parameters, read_metrics(at / METRICS), run.metric)
                )
                evaluated += _evaluations(at)
        elif is_run(folder):
            entries.append(_training(folder))
            evaluated += _evaluations(folder)
        elif is_evaluation(folder):
            evaluated.append(folder)
        else:
            raise ValueError(f"{folder} holds no sweep, no training run and no evaluation")
    if len({goal for goal in goals if goal[0]}) == 1 and metric is None:
        name, maximise = next(goal for goal in goals if goal[0])
    else:
        name, maximise = metric or _metric_of(entries), True
    entries = [replace(entry, metric=_last(entry, name, entry.metric if goals else None)) for entry in entries]
    return Comparison(_distinct(entries), _labelled(_joined(dict.fromkeys(evaluated))), name, maximise)


def _evaluations(folder: Path) -> list[Path]:
    """Folders of evaluations of a run, itself included.

    One that has scored nothing yet is left out with a warning.
    """
    found = [place for place in (folder, *sorted(folder.glob(f"{EVALUATIONS}/*"))) if is_evaluation(place)]
    for place in found:
        if not (place / ROWS).stat().st_size:
            warnings.warn(f"{place} has scored nothing yet, and is left out", stacklevel=3)
    return [place for place in found if (place / ROWS).stat().st_size]


def _training(folder: Path) -> ComparedRun:
    config, metrics = read_config(folder / CONFIG), read_metrics(folder / METRICS)
    check_type(f"{folder / CONFIG}: max_steps", config.get("max_steps"), float | None)
    check_type(f"{folder / CONFIG}: reward", config.get("reward"), list[str] | str | None)
    done = bool(metrics) and metrics[-1].get("step", 0) >= (config.get("max_steps") or 0)
    return ComparedRun(folder.name, folder, FINISHED if done else INTERRUPTED, config, metrics)


def _metric_of(entries: Sequence[ComparedRun]) -> str | None:
    """The first metric that all training runs have.

    The candidates are the first trained reward on held-out prompts, then on their own samples, then the total.
    """
    trained = [entry for entry in entries if entry.metrics]
    rewards = trained[0].parameters.get("reward") or [] if trained else []
    first = [rewards] if isinstance(rewards, str) else rewards[:1]
    names = [f"{kind}/{name.partition('=')[0]}" for kind in ("eval", "reward") for name in first]
    known = (n for n in (*names, "reward") if trained and all(len(entry.series(n)) for entry in trained))
    return next(known, None)


def _last(entry: ComparedRun, name: str | None, known: float | None) -> float | None:
    if name is None or not len(series := entry.series(name)):
        return known
    return float(series[-1, 1])


def _distinct(entries: Sequence[ComparedRun]) -> list[ComparedRun]:
    """Put the folder's parent before names that occur twice.

    Two sweeps, for instance, have runs of equal names.
    """
    count = Counter(entry.name for entry in entries)
    return [replace(e, name=f"{e.folder.parent.name}/{e.name}") if count[e.name] > 1 else e for e in entries]


def _joined(folders: Iterable[Path]) -> list[Run]:
    """Read evaluations, and join those that differ by w or method alone.

    Their meta.json are equal but for time and command line.
    """
    groups: dict[str, list[Run]] = defaultdict(list)
    for folder in folders:
        run = read_run(folder)
        alone = str(folder) if run.is_blend else None
        groups[_key([alone, *sorted(_settings(run).items())])].append(run)
    return [_merge(group) for group in groups.values()]


def _settings(run: Run) -> dict[str, Any]:
    return {k: v for k, v in run.summary["meta"].items() if k not in ("created", "command", "chosen")}


def _merge(runs: Sequence[Run]) -> Run:
    if len(runs) == 1:
        return runs[0]
    rows: dict[tuple[Any, ...], Row] = {}
    for run in runs:
        for row in run.rows:
            rows.setdefault((*row.noise, row.w, row.sampler, row.method), row)
    return replace(runs[0], rows=list(rows.values()), summary=summarise(list(rows.values()), runs[0].summary["meta"]))


def _labelled(runs: Sequence[Run]) -> list[Run]:
    """Add to equal names the settings that differ, or else the folders."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        groups[run.name].append(run)
    named = []
    for run in runs:
        metas = [other.summary["meta"] for other in groups[run.name]]
        differ = [key for key in _SETTINGS if len({_key(meta.get(key)) for meta in metas}) > 1]
        parts = [_setting(key, run.summary["meta"].get(key)) for key in differ]
        named.append(replace(run, name=", ".join([run.name, *parts])))
    count = Counter(run.name for run in named)
    return [replace(run, name=f"{run.name} ({run.folder})") if count[run.name] > 1 else run for run in named]


def _setting(key: str, value: Any) -> str:
    if key == "adapter":
        return Path(str(value)).name
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if key == "sampler" else f"{key} {text}"


def trained_reward(run: Run) -> str | None:
    """The first trained reward of the run that its points have."""
    points = run.summary["points"]
    return next((n for n in run.summary["meta"]["trained_rewards"] if n in points[0]["rewards"]), None)


def best_of(run: Run) -> BestOf | None:
    """The w at which the trained reward is highest.

    It is None without points of guidance, or with a single prompt.
    """
    reward = trained_reward(run)
    if reward is None or not run.points(run.sweep):
        return None
    found = run.best(reward)
    return None if found is None else BestOf(run, reward, found)


def planes(runs: Sequence[Run]) -> dict[tuple[str, str], list[PlanePoint]]:
    """Points of guidance with a known KL, by (base, reward)."""
    found: dict[tuple[str, str], list[PlanePoint]] = defaultdict(list)
    for run in runs:
        if (reward := trained_reward(run)) is not None:
            points = [PlanePoint(run, p, reward) for p in run.curve(run.sweep) if p["kl"] is not None]
            found[run.summary["base"], reward] += points
    return {place: points for place, points in found.items() if points}


def mixed(points: Sequence[PlanePoint]) -> list[str]:
    """Settings that differ between the runs of a plane.

    They move reward and KL whatever the model.
    """
    metas = [point.run.summary["meta"] for point in points]
    names = ("sampler", "steps", "cfg", "level", "schedule", "prompts", "num_prompts", "resolution")
    return [name for name in names if len({_key(meta.get(name)) for meta in metas}) > 1]


def frontier(points: Sequence[PlanePoint]) -> list[PlanePoint]:
    """Points that no other beats at their KL or less.

    They are in the order of their KL.
    """
    front: list[PlanePoint] = []
    for point in sorted(points, key=lambda point: (point.row["kl"], -point.mean)):
        if not front or point.mean > front[-1].mean:
            front.append(point)
    return front
