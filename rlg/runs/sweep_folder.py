"""A local sweep's folder: its runs, their parameters, and their ends.

sweep.json   {"config": the sweep file's content, "seed", "runs": [SweepRun]}, from which the sweep goes on
sweep.csv    a row a run: run, status, the metric by its name, the parameters, seconds, folder, error
run-000/     files that the program wrote (RLG_SWEEP_DIR/RLG_SWEEP_RUN)
logs/        run-000.out and run-000.err
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlg.evaluation.methods import RLG, method_of
from rlg.io import atomic, folders, tables
from rlg.io.parsing import check_type, parse_json, read_json
from rlg.io.run_folder import METRICS, SUMMARY

SWEEP, TABLE, LOGS = "sweep.json", "sweep.csv", "logs"
RUNNING, FINISHED, FAILED, INTERRUPTED = STATUSES = ("running", "finished", "failed", "interrupted")
_NAME = re.compile(r"run-\d+")  # name of a run: the command writes to the folder of that name
# a sweep with other values of these is another sweep
_DECIDES = ("program", "command", "method", "metric", "parameters")
BEST = "best/"  # metric of an evaluation: best/REWARD is the highest mean of the guided points


@dataclass
class SweepRun:
    """One run of a sweep."""

    name: str  # name of its folder
    parameters: dict[str, Any]
    status: str = RUNNING
    metric: float | None = None  # None: not known
    seconds: float = 0.0  # wall time, over all attempts
    error: str = ""  # last line of a failed run's stderr


@dataclass
class Sweep:
    """The content of sweep.json."""

    config: dict[str, Any]
    seed: int
    runs: list[SweepRun] = field(default_factory=list)
    # sha256 of the program, and of the configs that runs are given
    files: dict[str, str] = field(default_factory=dict)

    @property
    def metric(self) -> str | None:
        """Name of the metric."""
        return (self.config.get("metric") or {}).get("name")

    @property
    def maximise(self) -> bool:
        """Tell whether more of the metric is better.

        W&B's default is less.
        """
        return (self.config.get("metric") or {}).get("goal") == "maximize"

    def best(self) -> SweepRun | None:
        """The run with the best metric, if one has it."""
        known = [run for run in self.runs if run.metric is not None]
        return max(known, key=lambda run: run.metric if self.maximise else -run.metric, default=None)


def is_sweep(folder: Path) -> bool:
    """Tell whether `rlg.sweep` wrote the folder."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> Sweep:
    """Read the sweep of a folder.

    Raises ValueError for a file of something else.
    """
    file = folder / SWEEP
    try:
        row = read_json(file)
        sweep = Sweep(row["config"], row["seed"], [SweepRun(**run) for run in row["runs"]], row.get("files", {}))
        check_type("files", sweep.files, dict)
        check_metric(sweep.config)
        for run in sweep.runs:
            _check(run)
        return sweep
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no sweep's: {error}") from error


def check_metric(config: Any) -> None:
    """Check the metric of a sweep's config.

    Raises ValueError unless the config is a mapping, and its metric, if it has one, is one with a name.
    """
    check_type("config", config, dict)
    check_type("metric", config.get("metric"), dict | None)
    if config.get("metric"):
        check_type("metric.name", config["metric"].get("name"), str)


def _check(run: SweepRun) -> None:
    kinds = {"name": str, "parameters": dict, "status": str, "metric": float | None, "seconds": float, "error": str}
    for name, kind in kinds.items():
        check_type(name, getattr(run, name), kind)
    if not _NAME.fullmatch(run.name):
        raise ValueError(f"a run is named run-NUMBER, not {run.name!r}")
    if run.status not in STATUSES:
        raise ValueError(f"unknown status {run.status!r}; known: {', '.join(STATUSES)}")


def open_sweep(folder: Path, config: Mapping[str, Any], seed: int, files: Mapping[str, str] | None = None) -> Sweep:
    """The sweep in a folder, or a new one; writes nothing.

    files: the sha256 of files that runs are given. Runs that were running when the sweep ended are now interrupted.
    Raises ValueError if the folder holds something else, or runs that have finished with other files of the same
    names.
    """
    files = dict(files or {})
    if not is_sweep(folder):
        if folders.content(folder):
            raise ValueError(f"{folder} is not empty and holds no sweep; give --output another folder")
        return Sweep(dict(config), seed, files=files)
    sweep = read_sweep(folder)
    changed = [key for key in _DECIDES if sweep.config.get(key) != config.get(key)]
    changed += ["seed"] if sweep.seed != seed else []
    if changed:
        raise ValueError(f"{folder} holds a sweep with another {changed[0]}; give --output another folder")
    edited = [name for name, digest in files.items() if sweep.files.get(name, digest) != digest]
    if edited and any(run.status == FINISHED for run in sweep.runs):
        raise ValueError(f"{edited[0]} has changed since runs of {folder} have finished; give --output another folder")
    sweep.files |= files
    for run in sweep.runs:
        run.status = INTERRUPTED if run.status == RUNNING else run.status
    return sweep


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Write sweep.json, whole or not at all, and sweep.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / SWEEP, json.dumps(asdict(sweep), indent=1) + "\n")
    names = list(dict.fromkeys(name for run in sweep.runs for name in run.parameters))
    heads = ["run", "status", sweep.metric or "metric", *names, "seconds", "folder", "error"]
    rows = []
    for run in sweep.runs:
        values = [run.parameters.get(name, "") for name in names]
        metric = "" if run.metric is None else run.metric
        rows.append([run.name, run.status, metric, *values, f"{run.seconds:.1f}", folder / run.name, run.error])
    tables.write(folder / TABLE, heads, rows)


def history(folder: Path, metric: str) -> list[float]:
    """Finite values of a metric in a run's folder, in order.

    They are empty if it has none. Those of a training run are in metrics.jsonl. For an evaluation, `best/REWARD` is
    the highest mean of the points of guidance in summary.json.
    """
    rows: Sequence[Any] = read_metrics(folder / METRICS)
    values = [row.get(metric) for row in rows]
    summary = folder / SUMMARY
    if metric.startswith(BEST) and summary.is_file():
        try:
            values.append(best_metrics(read_json(summary)).get(metric))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{summary} is no evaluation's summary ({error})") from error
    return [float(v) for v in values if isinstance(v, (int, float)) and math.isfinite(v)]


def best_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """best/REWARD and best_w/REWARD of a summary.json.

    The first is the highest mean of the points of guidance, the second the w that has it.
    """
    found: dict[str, float] = {}
    for point in (p for p in summary["points"] if method_of(p) == RLG):
        for name, fields in point["rewards"].items():
            if fields["mean"] > found.get(f"{BEST}{name}", -math.inf):
                found |= {f"{BEST}{name}": fields["mean"], f"best_w/{name}": point["w"]}
    return found


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; none where there is no file.

    A line that was cut off, or is no row, is left out.
    """
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    rows = []
    for line in lines:
        try:
            row = parse_json(line, finite=False)  # a metric may have been NaN
        except ValueError:
            continue
        rows += [row] if isinstance(row, dict) and type(row.get("step", 0)) is int else []
    return rows
