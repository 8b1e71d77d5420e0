"""State of all runs below a folder, read from their files.

Runs are trainings, evaluations and sweeps.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import re
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlg.evaluation.methods import RLG, method_of
from rlg.io.folders import LOCK
from rlg.io.run_folder import (
    ADAPTER,
    ALL_ROWS,
    CONFIG,
    IMAGES,
    META,
    METRICS,
    PLAN,
    ROWS,
    SAMPLES,
    SUMMARY,
    checkpoint_at,
    read_config,
    step_of,
)
from rlg.runs.sweep_folder import FAILED, FINISHED, SWEEP, is_sweep, read_sweep

TRAINING, EVALUATION, KIND_SWEEP, UNKNOWN = "training", "evaluation", "sweep", "unknown"
RUNNING, STOPPED, DONE, BROKEN, FOREIGN = "running", "stopped", "done", "broken", "no run"
TAIL = 1 << 16  # bytes that are read of metrics.jsonl or scores.jsonl: the last hundred rows or so
_LARGEST = 1 << 24  # most bytes of any other file
_DEEPEST = 6  # levels of folders below the given one
_QUIET, _STEPS, _BATCH = 120.0, 5, 128  # seconds; steps; images that an evaluation makes between two writes
_NO_RUNS = re.compile(rf"\..*|checkpoint-\d+|{SAMPLES}|{IMAGES}|logs|wandb|report")  # folders that hold no runs
_NAME_WIDTH, _NOTE_WIDTH = 46, 90


@dataclass(frozen=True)
class Status:
    """State of one run; None stands for unknown values."""

    name: str  # path below the folder that was given
    kind: str = UNKNOWN
    state: str = FOREIGN
    step: int | None = None  # step of a training; images of an evaluation; ended runs of a sweep
    total: int | None = None  # steps, images or runs in all
    reward: float | None = None  # the last of a training, the best w's of an evaluation, the best of a sweep
    reward_name: str | None = None  # key of metrics.jsonl, name of a reward or metric
    seconds_per_step: float | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    checkpoint: str | None = None  # name of the last one
    idle_seconds: float | None = None  # since its last write
    note: str = ""


def collect(root: Path, now: float | None = None) -> list[list[Status]]:
    """Groups of runs below a folder, or of the folder itself.

    A run is first in a group with the runs inside it. Running ones come first, then the most recent. Raises ValueError
    if there is no such folder.
    """
    if not root.is_dir():
        raise ValueError(f"no such folder: {root}")
    groups = list(_groups(root, root, time.time() if now is None else now, 0))
    return sorted(groups, key=lambda group: (_all_idle(group), min(map(_idle, group))))


def _all_idle(group: Sequence[Status]) -> bool:
    return all(status.state != RUNNING for status in group)


def _idle(status: Status) -> float:
    return math.inf if status.idle_seconds is None else status.idle_seconds


def _groups(folder: Path, root: Path, now: float, depth: int) -> Iterator[list[Status]]:
    own, inside = _read(folder, root, now), []
    for child in _folders(folder) if depth < _DEEPEST else ():
        found = list(_groups(child, root, now, depth + 1))
        if not found and depth == 0 and own is None:
            found = [[Status(child.name, note="no run in it")]]
        inside += found
    if own is None:
        yield from inside
        return
    rest = [status for group in inside for status in group]
    if own.kind == KIND_SWEEP and not _all_idle(rest):
        own = replace(own, state=RUNNING)
    yield [own, *sorted(rest, key=lambda status: status.name)]


def _folders(folder: Path) -> list[Path]:
    """Folders in a folder that may hold runs, without links."""
    try:
        with os.scandir(folder) as entries:
            kept = [e.name for e in entries if e.is_dir(follow_symlinks=False) and not _NO_RUNS.fullmatch(e.name)]
    except OSError:
        return []
    return [folder / name for name in sorted(kept)]


def _read(folder: Path, root: Path, now: float) -> Status | None:
    """The status of a folder; None if it is no run."""
    name = folder.name if folder == root else str(folder.relative_to(root))
    readers = {SWEEP: (_sweep, KIND_SWEEP), META: (_evaluation, EVALUATION), CONFIG: (_training, TRAINING)}
    for sign, (reader, kind) in readers.items():
        try:
            if os.path.lexists(folder / sign):
                return reader(folder, name, now)
        except Exception as error:  # the folder may hold anything, which must not hide the other runs
            note = textwrap.shorten(f"{type(error).__name__}: {error}", _NOTE_WIDTH, placeholder=" ...")
            return Status(name, kind, BROKEN, note=note)
    return None


def _training(folder: Path, name: str, now: float) -> Status | None:
    if not (folder / METRICS).exists() and (folder / ADAPTER).is_dir():
        return None  # an adapter that `rlg.average` made
    rows = [row for row in tail(folder / METRICS) if _whole(row.get("step")) is not None]
    steps = [step for name in os.listdir(folder) if (step := step_of(name)) is not None]
    last = checkpoint_at(folder, max(steps)) if steps else folder
    file = last / CONFIG if (last / CONFIG).is_file() else folder / CONFIG  # a resumed run's own keeps the first steps
    _check(file)
    config, step = read_config(file), rows[-1]["step"] if rows else 0
    total = _whole(config.get("max_steps"))
    if total is None:
        raise ValueError(f"{CONFIG} is no training run's: it has no max_steps")
    key, reward = _last_reward(config.get("reward"), rows)
    seconds, rate = step_seconds(rows), _number(rows[-1].get("seconds_per_image")) if rows else None
    idle = _idle_seconds([folder / METRICS, folder / CONFIG], now)
    state = _state(folder, step == total, idle, seconds or 0.0)
    left = None if seconds is None or state == DONE or step > total else (total - step) * seconds
    return Status(
        name,
        TRAINING,
        state,
        step,
        total if step <= total else None,  # the run was resumed with more steps, and has no checkpoint since
        reward,
        key,
        seconds_per_step=seconds,
        images_per_second=1 / rate if rate else None,
        seconds_left=left,
        checkpoint=None if last == folder else last.name,
        idle_seconds=idle,
    )


def _last_reward(trained: Any, rows: Sequence[dict[str, Any]]) -> tuple[str | None, float | None]:
    """(key, value) of the last reward of a training.

    It is the first trained reward, on held-out prompts if it was evaluated, or else the total.
    """
    names = [str(name).partition("=")[0] for name in (trained if isinstance(trained, list) else [trained])]
    for key in (*(f"eval/{name}" for name in names[:1]), "reward"):
        known = [value for row in rows if (value := _number(row.get(key))) is not None]
        if known:
            return key, known[-1]
    return None, None


def step_seconds(rows: Sequence[dict[str, Any]]) -> float | None:
    """Median seconds of a step over rows of metrics.jsonl.

    It is None if they do not say. A run that counts `images` adds up `seconds`; in other runs `seconds` is that of one
    step. Preference trainers count `pairs`, and time one.
    """
    after = [row for row in rows if row["step"] > 0]
    if not after:
        return None

    def differences(key: str, factor: str | None = None) -> list[float]:
        known = [(r["step"], _number(r.get(key)), 1.0 if factor is None else _number(r.get(factor))) for r in after]
        whole = [(step, value, by) for step, value, by in known if value is not None and by is not None]
        steps = pairwise([(0, 0.0, 1.0), *whole] if len(whole) == 1 else whole)
        return [(b - a) / (j - i) * by for (i, a, _), (j, b, by) in steps if j > i]

    if "images" in after[-1]:
        values = differences("seconds")
    elif "seconds_per_pair" in after[-1]:
        values = differences("pairs", "seconds_per_pair")
    else:
        values = [value for row in after if (value := _number(row.get("seconds"))) is not None]
    usable = [value for value in values if value > 0 and math.isfinite(value)]
    return statistics.median(usable) if usable else None


def _evaluation(folder: Path, name: str, now: float) -> Status:
    meta = _json(folder / META)
    files = sorted(folder.glob(ALL_ROWS))
    summary_file = folder / SUMMARY
    summary = _json(summary_file) if summary_file.is_file() else {}
    joined = files == [folder / ROWS]
    is_current = bool(summary) and joined and summary_file.stat().st_mtime >= files[0].stat().st_mtime
    images = sum(point["n"] for point in summary["points"]) if is_current else sum(map(_lines, files))
    total = _whole(_json(folder / PLAN).get("images")) if (folder / PLAN).is_file() else None
    latest = [value for file in files for row in tail(file)[-_BATCH:] if (value := _number(row.get("seconds")))]
    seconds = statistics.fmean(latest) if latest else None
    idle = _idle_seconds([*files, folder / META, summary_file], now)
    # Each process writes a file of its own, and they are joined at the end.
    open_files = sum(file.name != ROWS for file in files)
    done = is_current if total is None else images >= total and not open_files
    state = _state(folder, done, idle, _BATCH * (seconds or 0.0))
    per_second = max(1, open_files) / seconds if seconds else None
    left = None if per_second is None or total is None or state == DONE else max(0, total - images) / per_second
    reward = str(meta["trained_rewards"][0]).partition("=")[0]
    w, best = _best(summary, reward)
    return Status(
        name,
        EVALUATION,
        state,
        step=images,
        total=images if state == DONE else total,
        reward=best,
        reward_name=reward if best is not None else None,
        images_per_second=per_second,
        seconds_left=left,
        idle_seconds=idle,
        note="" if w is None else f"at w = {w:g}",
    )


def _best(summary: dict[str, Any], reward: str) -> tuple[float | None, float | None]:
    """(w, mean) of the guided point at which a reward is highest."""
    points = [p for p in summary.get("points", []) if method_of(p) == RLG and reward in p["rewards"]]
    known = [(_number(p["rewards"][reward]["mean"]), _number(p["w"])) for p in points]
    mean, w = max(((m, w) for m, w in known if m is not None and w is not None), default=(None, None))
    return w, mean


def _sweep(folder: Path, name: str, now: float) -> Status:
    _check(folder / SWEEP)
    assert is_sweep(folder)
    sweep = read_sweep(folder)
    ended, failed = (sum(run.status in kinds for run in sweep.runs) for kinds in ((FINISHED, FAILED), (FAILED,)))
    best = sweep.best()
    return Status(
        name,
        KIND_SWEEP,
        DONE if ended == len(sweep.runs) else STOPPED,  # it counts as running if one of its runs is
        ended,
        len(sweep.runs),
        None if best is None else _number(best.metric),
        sweep.metric,
        idle_seconds=_idle_seconds([folder / SWEEP], now),
        note=f"{failed} failed" if failed else "",
    )


def _state(folder: Path, done: bool, idle: float, step: float) -> str:
    held = _held(folder / LOCK)
    if held or (held is None and not done and idle < max(_QUIET, _STEPS * step)):
        return RUNNING
    return DONE if done else STOPPED


def _held(lock: Path) -> bool | None:
    """Tell whether a process holds a lock file.

    It is None if there is no file, or the file system has no locks.
    """
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def tail(file: Path, size: int = TAIL) -> list[dict[str, Any]]:
    """Rows in the last `size` bytes of a file of JSON lines.

    A line that is no JSON object is left out.
    """
    if not file.is_file():
        return []
    with file.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, end - size))
        # a first line that was cut is no object, because its braces don't match
        lines = stream.read(size).split(b"\n")
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        rows += [row] if isinstance(row, dict) else []
    return rows


def _lines(file: Path) -> int:
    with file.open("rb") as stream:
        return sum(not line.isspace() for line in stream)  # an empty line ends a unit


def _json(file: Path) -> dict[str, Any]:
    _check(file)
    row = json.loads(file.read_bytes())
    if not isinstance(row, dict):
        raise ValueError(f"{file.name} holds no object")
    return row


def _check(file: Path) -> None:
    """Raise ValueError for a file that is too large.

    A folder or a named pipe is refused, too.
    """
    if not file.is_file():
        raise ValueError(f"{file.name} is no file")
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{file.name} has {file.stat().st_size} bytes; at most {_LARGEST} are read")


def _idle_seconds(files: Sequence[Path], now: float) -> float:
    """Seconds since the last change of any of these files."""
    return max(0.0, now - max(file.stat().st_mtime for file in files if file.is_file()))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**12 else None


def _number(value: Any) -> float | None:
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if usable else None


def printable(text: str) -> str:
    """The text without signs that a terminal would obey or cannot show.

    They are control and direction characters, and half surrogates.
    """
    return "".join(c if c.isprintable() else "?" for c in text)


def duration(seconds: float | None) -> str:
    """Seconds in words, in at most two units."""
    if seconds is None:
        return ""
    for unit, size, part, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60)):
        if seconds >= size:
            return f"{seconds // size:.0f} {unit} {seconds % size // smaller:.0f} {part}"
    return f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:.0f} s"


def table(groups: Sequence[Sequence[Status]]) -> str:
    """The runs as lines of aligned columns."""
    rows = [("run", "state", "step", "reward", "speed", "left", "last checkpoint", "idle", "")]
    for first, *inside in groups:
        rows.append(_cells(first, first.name))
        rows += [_cells(status, "  " + _below(status.name, first.name)) for status in inside]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _below(name: str, parent: str) -> str:
    return name.removeprefix(f"{parent}/")


def _cells(status: Status, name: str) -> tuple[str, ...]:
    name = printable(name)
    if len(name) > _NAME_WIDTH:
        name = f"{name[: _NAME_WIDTH // 2 - 1]}…{name[-_NAME_WIDTH // 2 :]}"
    step = "" if status.step is None else f"{status.step}" + ("" if status.total is None else f"/{status.total}")
    reward = "" if status.reward is None else f"{status.reward:.4g} {status.reward_name}"
    speed = "" if status.seconds_per_step is None else f"{status.seconds_per_step:.3g} s/step"
    if status.images_per_second is not None:
        speed = ", ".join(filter(None, (speed, f"{status.images_per_second:.3g} images/s")))
    times = duration(status.seconds_left), duration(status.idle_seconds)
    cells = (status.state, step, reward, speed, times[0], status.checkpoint or "", times[1], status.note)
    return (name, *(printable(cell) for cell in cells))
