"""Checkpoint folders: written whole or not at all, found, checked, deleted.

A trainer decides the content. A checkpoint is put together under a temporary name, sealed with a manifest
(`rlg.io.manifest`) and renamed. A checkpoint from before there were manifests counts as whole if it has a state.json.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rlg.distributed import together
from rlg.io import atomic, manifest, out_of_memory, run_folder
from rlg.io.run_folder import METRICS, STATE
from trainers.core.config import RunConfig

_SMALLER = "lower batch_size (with --resume: and give --allow_changes) or the resolution"
_SAVE = "set gradient_checkpointing, lower update_batch_size if there is one,"
_TO_LOWER = {  # Keys are the functions that ran out of memory; see `rlg.io.out_of_memory`.
    "": f"while training: {_SMALLER}",
    "rollout": f"while sampling: {_SMALLER}",
    "evaluate": f"while sampling held-out images: {_SMALLER}",
    "decode": f"while decoding images: {_SMALLER}",
    "update": f"in an update: {_SAVE} or {_SMALLER}",
    "backward": f"in a backward pass: {_SAVE} or {_SMALLER}",
}
_SEALED = "sealed"  # key of state.json that says that there must be a manifest


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first.

    Those that were clearly never finished are left out. The others may be damaged.
    """
    found = [path for path in folder.glob("*") if run_folder.step_of(path.name) is not None]
    known = [path for path in found if (path / STATE).is_file() or (path / manifest.MANIFEST).is_file()]
    return sorted(known, key=_step_of)


def _step_of(checkpoint: Path) -> int:
    step = run_folder.step_of(checkpoint.name)
    assert step is not None
    return step


def write_state(folder: Path, row: Mapping[str, Any]) -> None:
    """Write state.json, by which a checkpoint is known.

    It says that `written` seals the checkpoint with a manifest.
    """
    (folder / STATE).write_text(json.dumps({**row, _SEALED: True}))


@contextmanager
def written(config: RunConfig, accelerator: Accelerator, step: int) -> Iterator[Path]:
    """Yield a folder that becomes checkpoint-`step` after the block.

    All processes run the block. Older checkpoints then make room. If one process fails, all fail, and the checkpoints
    stay as they were.
    """
    final, main = run_folder.checkpoint_at(config.folder, step), accelerator.is_main_process
    temporary = atomic.temporary_of(final)
    try:
        with together():
            if main:
                atomic.forget_leftovers(config.folder)
                temporary.mkdir(parents=True)
        with together():
            yield temporary
        with together():
            if main:
                if (config.folder / METRICS).is_file():
                    atomic.sync(config.folder / METRICS)
                manifest.seal(temporary)
                atomic.publish(final)
                _make_room(config.folder, step, config.save_total_limit)
    except BaseException:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)  # a full disk may need the room
        raise


def _make_room(folder: Path, newest: int, limit: int | None) -> None:
    """Delete the oldest checkpoints beyond the limit.

    Those after the newest whole one are damaged. They do not count, and do not push it out.
    """
    older = [path for path in checkpoints(folder) if _step_of(path) <= newest]
    for path in older[: -limit if limit else 0]:
        atomic.discard(path)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the last whole checkpoint.

    Returns (the checkpoint, the faults of those after it).
    """
    faults = []
    for checkpoint in reversed(checkpoints(folder)):
        fault = _fault(checkpoint)
        if fault is None:
            return checkpoint, faults
        faults.append(f"{checkpoint} is damaged ({fault})")
    return None, faults


def _fault(checkpoint: Path) -> str | None:
    if (checkpoint / manifest.MANIFEST).is_file():
        return manifest.fault(checkpoint)
    try:
        sealed = json.loads((checkpoint / STATE).read_text()).get(_SEALED)
    except (ValueError, AttributeError, OSError) as error:
        return f"{STATE} is unreadable: {error}"
    return f"{manifest.MANIFEST} is missing" if sealed else None


def to_resume(folder: Path, accelerator: Accelerator) -> Path:
    """The last whole checkpoint of a run, the same on all processes.

    Warns of damaged ones that it passes over. Raises ValueError if there is none.
    """
    found: list[Path | None] = [None]
    with together():
        if accelerator.is_main_process:
            atomic.forget_leftovers(folder)
            found[0], faults = newest_whole(folder)
            if found[0] is None:
                raise ValueError("; ".join([f"nothing to resume: {folder} holds no whole checkpoint", *faults]))
            if faults:
                warnings.warn(f"{'; '.join(faults)}; going on from {found[0]}, the last whole one", stacklevel=3)
    return broadcast_object_list(found)[0]


def last_of(folder: Path) -> str:
    """Words about the last whole checkpoint, for a message."""
    found, _ = newest_whole(folder)
    return f"the last whole checkpoint is {found}, which --resume goes on from" if found else "nothing is saved yet"


@contextmanager
def explaining(folder: Path) -> Iterator[None]:
    """Turn system errors and lack of memory into one line.

    The line names the last whole checkpoint of the run.
    """
    kept = partial(last_of, folder)
    with out_of_memory.explaining(_TO_LOWER, kept), atomic.explaining(f"cannot go on with {folder}", kept):
        yield
