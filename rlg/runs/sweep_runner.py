"""Runner of local sweeps.

It draws parameters, starts runs, and records how each ended.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rlg import extras
from rlg.io.parsing import check_type, read_yaml
from rlg.io.run_folder import CONFIG, STATE, checkpoint_name
from rlg.models import fingerprint
from rlg.runs.sweep_folder import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    LOGS,
    RUNNING,
    Sweep,
    SweepRun,
    check_metric,
    history,
    write_sweep,
)

METHODS = ("grid", "random", "bayes")
DEFAULT_COMMAND = ("${env}", "${interpreter}", "${program}", "${args}")  # W&B's default
_ENVIRONMENT = re.compile(r"\$\{envvar:([A-Z0-9_]*)\}")  # W&B's syntax
_OF_AGENTS = ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH")
POLL_SECONDS = 0.1
_MAX_ERROR = 300  # characters of a failed run's last line


def read_file(path: Path) -> dict[str, Any]:
    """Read a sweep file.

    Raises ValueError, in one line, for content that W&B's schema or this runner refuses.
    """
    config = read_yaml(path)
    if config.get("method") not in METHODS:
        raise ValueError(f"{path}: method must be one of {', '.join(METHODS)}, got {config.get('method')!r}")
    if not isinstance(config.get("program"), str):
        raise ValueError(f"{path}: program is needed, the script that a run executes")
    if not isinstance(config.get("parameters"), dict) or not config["parameters"]:
        raise ValueError(f"{path}: parameters is needed, a mapping of at least one name")
    check_type(f"{path}: command", config.get("command"), list[Any] | str | None)
    check_type(f"{path}: run_cap", config.get("run_cap"), int | None)
    try:
        check_metric(config)
        found = _library().schema_violations_from_proposed_config(_known(config))
    except Exception as error:  # checks of the schema raise many types for a file that is far from one
        found = [str(error)]
    if found:
        raise ValueError(f"{path}: {found[-1]}")  # the last one names the parameter
    if not Path(config["program"]).is_file():
        raise ValueError(f"{path}: no such program: {config['program']} (from {Path.cwd()})")
    if "early_terminate" in config:
        warnings.warn(f"{path}: early_terminate is ignored, as it needs W&B's server", stacklevel=2)
    return config


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The file without run_cap.

    W&B and this runner know it, but sweeps 0.2.0 does not.
    """
    return {name: value for name, value in config.items() if name != "run_cap"}


def _library() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydantic warns about the style of the library's models
            import sweeps
    except ImportError as error:
        raise ValueError(f"local sweeps need W&B's search library ({error}): {extras.install('sweep')}") from error
    return sweeps


def draw(sweep: Sweep, folder: Path) -> dict[str, Any] | None:
    """Parameters of the next run, by the file's method.

    It is None when a grid is used up. They depend on (seed, number of runs so far) and, for bayes, on how those ended.
    Raises ValueError for parameters that the method cannot draw.
    """
    sweeps = _library()
    past = [_as_wandb(sweeps, sweep, run, folder) for run in sweep.runs]
    with _seeded(sweep.seed * 1_000_003 + len(sweep.runs)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the fits of bayes warn
        (suggested,) = sweeps.next_runs(sweeps.SweepConfig(_known(sweep.config)), past, n=1)
    if suggested is None:
        return None
    return {name: _plain(entry["value"]) for name, entry in suggested.config.items()}


def _as_wandb(sweeps: Any, sweep: Sweep, run: SweepRun, folder: Path) -> Any:
    """A run as the search library knows it.

    A run whose metric is missing has failed.
    """
    values = history(folder / run.name, sweep.metric) if sweep.metric else []
    state = {FINISHED: "finished", FAILED: "failed"}.get(run.status, "running")
    if state == "finished" and sweep.metric and not values:
        state = "failed"
    return sweeps.SweepRun(
        name=run.name,
        state=sweeps.RunState(state),
        config={name: {"value": value} for name, value in run.parameters.items()},
        summaryMetrics={sweep.metric: values[-1]} if values else {},
        sampledHistory=[{sweep.metric: value} for value in values],
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators for the block, then put them back.

    The search library draws from them.
    """
    before = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def command_line(config: Mapping[str, Any], parameters: Mapping[str, Any], more: Sequence[str] = ()) -> list[str]:
    """The command line that `wandb agent` would execute.

    ${interpreter} is our own Python, and `more` follows ${args}. Raises ValueError for a macro that is not one of
    W&B's.
    """
    pairs = [f"{name}={value}" for name, value in parameters.items()]
    flags = [f"--{n}" if value is True else f"--{n}={value}" for n, value in parameters.items() if value is not False]
    macros = {
        "env": ["/usr/bin/env"],
        "interpreter": [sys.executable],
        "program": [config["program"]],
        "args": [f"--{text}" for text in pairs] + list(more),
        "args_no_hyphens": pairs + list(more),
        "args_no_boolean_flags": flags + list(more),
        "args_no_equals": [text for n, value in parameters.items() for text in (f"--{n}", str(value))] + list(more),
        "args_json": [json.dumps(dict(parameters)), *more],
    }
    line: list[str] = []
    for chunk in map(str, config.get("command") or DEFAULT_COMMAND):
        chunk = _ENVIRONMENT.sub(lambda match: os.environ.get(match[1], match[1]), chunk)
        if chunk.startswith("${") and chunk.endswith("}"):
            if chunk[2:-1] not in macros:
                raise ValueError(f"unknown macro {chunk} in command; known: {', '.join(macros)}")
            line += macros[chunk[2:-1]]
        else:
            line.append(chunk)
    return line


def files_of(config: Mapping[str, Any]) -> dict[str, str]:
    """sha256 of the program and of every file of a run.

    The command line or the parameters name the file.
    """
    given = [value for each in config["parameters"].values() for value in (each.get("value"), *each.get("values", ()))]
    command = config.get("command") or ()
    words = [config["program"], *(command.split() if isinstance(command, str) else command), *given]
    named = sorted({str(word).rpartition("=")[2] for word in words if isinstance(word, str)})
    return {name: digest for name in named if Path(name).is_file() and (digest := fingerprint.of_model(name))}


def go_on(folder: Path) -> list[str]:
    """Options with which a program goes on after an earlier attempt.

    A trainer resumes from its last checkpoint, and begins anew if there is none yet; an evaluation needs no option.
    """
    if any(folder.glob(f"{checkpoint_name('*')}/{STATE}")):
        return ["--resume"]
    return ["--overwrite"] if (folder / CONFIG).is_file() else []


@dataclass
class Job:
    """A run that is being executed."""

    run: SweepRun
    process: subprocess.Popen
    slot: int
    started: float


@dataclass
class Runner:
    """Executor of a sweep in its folder.

    It runs `parallel` runs at a time, until there are `limit` runs (None: until the sweep ends).
    """

    sweep: Sweep
    folder: Path
    limit: int | None
    parallel: int = 1
    retry_failed: bool = False

    def __post_init__(self) -> None:
        again = (INTERRUPTED, FAILED) if self.retry_failed else (INTERRUPTED,)
        self.waiting = [run for run in self.sweep.runs if run.status in again]
        self.jobs: list[Job] = []

    def execute(self) -> None:
        """Run what is left.

        On KeyboardInterrupt the runs are asked to stop, waited for, and marked interrupted.
        """
        total = self.limit if self.limit is not None else _grid_size(self.sweep.config)
        done = len(self.sweep.runs) - len(self.waiting)
        with tqdm(total=total, initial=done, desc=self.folder.name, unit="run") as bar:
            try:
                while self._fill() or self.jobs:
                    self._collect(bar)
                    time.sleep(POLL_SECONDS)
            except KeyboardInterrupt:
                self._stop()
                raise
            finally:
                write_sweep(self.folder, self.sweep)

    def _fill(self) -> bool:
        """Start runs while there is room; tell whether one was started."""
        started = False
        while len(self.jobs) < self.parallel and (run := self._next()) is not None:
            self._start(run)
            started = True
        return started

    def _next(self) -> SweepRun | None:
        if self.waiting:
            return self.waiting.pop(0)
        if self.limit is not None and len(self.sweep.runs) >= self.limit:
            return None
        parameters = draw(self.sweep, self.folder)
        if parameters is None:
            self.limit = len(self.sweep.runs)  # the grid is used up
            return None
        self.sweep.runs.append(SweepRun(f"run-{len(self.sweep.runs):03d}", parameters))
        return self.sweep.runs[-1]

    def _start(self, run: SweepRun) -> None:
        slot = min(set(range(self.parallel)) - {job.slot for job in self.jobs})
        line = command_line(self.sweep.config, run.parameters, go_on(self.folder / run.name))
        run.status, run.error = RUNNING, ""
        write_sweep(self.folder, self.sweep)
        (self.folder / LOGS).mkdir(exist_ok=True)
        out, err = (self.folder / LOGS / f"{run.name}.{ending}" for ending in ("out", "err"))
        with out.open("ab") as stdout, err.open("ab") as stderr:
            process = subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=self._environment(run, slot),
                start_new_session=True,  # Ctrl-C reaches us alone, and we pass it on
            )
        self.jobs.append(Job(run, process, slot, time.monotonic()))

    def _environment(self, run: SweepRun, slot: int) -> dict[str, str]:
        environment = {name: value for name, value in os.environ.items() if name not in _OF_AGENTS}
        paths = [str(Path(sys.executable).parent), *filter(None, [environment.get("PATH")])]
        ours = {"RLG_SWEEP_DIR": str(self.folder), "RLG_SWEEP_RUN": run.name, "RLG_SWEEP_SLOT": str(slot)}
        return {"RLG_REPORT_TO": "none"} | environment | ours | {"PATH": os.pathsep.join(paths)}

    def _collect(self, bar: tqdm) -> None:
        """Record the runs that have ended."""
        for job in [job for job in self.jobs if job.process.poll() is not None]:
            self.jobs.remove(job)
            self._conclude(job, FINISHED if job.process.returncode == 0 else FAILED)
            write_sweep(self.folder, self.sweep)
            bar.update()
        best = self.sweep.best()
        shown = {"running": len(self.jobs), "failed": sum(run.status == FAILED for run in self.sweep.runs)}
        bar.set_postfix(shown | ({"best": f"{best.metric:.4g}"} if best else {}), refresh=False)

    def _conclude(self, job: Job, status: str) -> None:
        run = job.run
        run.status, run.seconds = status, run.seconds + time.monotonic() - job.started
        values = history(self.folder / run.name, self.sweep.metric) if self.sweep.metric else []
        run.metric = values[-1] if values else None
        if status == FAILED:
            run.error = last_line(self.folder / LOGS / f"{run.name}.err") or f"exit code {job.process.returncode}"
        elif status == FINISHED and self.sweep.metric and not values:
            run.error = f"it left no {self.sweep.metric}"

    def _stop(self) -> None:
        """Ask all runs to stop, and wait until they have saved.

        It records how each ended. A second interruption kills them.
        """
        try:
            self._signal(signal.SIGINT)
            while any(_alive(job.process) for job in self.jobs):
                time.sleep(POLL_SECONDS)
        except KeyboardInterrupt:
            self._signal(signal.SIGKILL)
        for job in self.jobs:
            job.process.wait()
            self._conclude(job, INTERRUPTED)

    def _signal(self, number: int) -> None:
        for job in self.jobs:
            try:
                os.killpg(job.process.pid, number)
            except ProcessLookupError:
                continue


def _alive(process: subprocess.Popen) -> bool:
    """Tell whether a process of its group still works.

    A launcher may end before the trainer that it launched has saved.
    """
    if process.poll() is None:
        return True
    import psutil  # accelerate brings it

    for other in psutil.process_iter(["status"]):
        try:
            if os.getpgid(other.pid) == process.pid and other.info["status"] != psutil.STATUS_ZOMBIE:
                return True
        except (ProcessLookupError, PermissionError):
            continue
    return False


def last_line(file: Path) -> str:
    """The last line of a log that says something.

    It is cut to a readable length. Progress bars write \\r for new lines.
    """
    lines = re.split(r"[\r\n]+", file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else []
    said = [line.strip() for line in lines if line.strip()]
    return said[-1][:_MAX_ERROR] if said else ""


def _grid_size(config: Mapping[str, Any]) -> int | None:
    """Number of points of a grid of listed values.

    It is None for a grid with other parameters.
    """
    entries = config["parameters"].values()
    if config["method"] != "grid" or any("values" not in entry and "value" not in entry for entry in entries):
        return None
    return int(np.prod([len(entry.get("values", [0])) for entry in entries]))
