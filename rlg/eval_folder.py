"""An evaluation's folder: rows by job, files of several processes joined, and what the rows were made with."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from rlg import durable, run_lock
from rlg.config import check_links, read_json
from rlg.stats import Row, read_rows

if TYPE_CHECKING:  # rlg.status does without torch, which takes seconds to load
    from torch import Tensor

ROWS, META, IMAGES = "scores.jsonl", "meta.json", "images"
PLAN = "plan.json"  # {"images": how many rows there will be}, for `rlg.status`
_UNIT_END = b"\n\n"
# What an evaluation did whose meta.json is older than a setting: the same as without the option
_DEFAULTS = {"origin": None, "schedule": "constant", "chosen": None}


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt_id: int
    k: int
    w: float
    mode: str


def append(folder: Path, rank: int, rows: Iterable[Row]) -> None:
    """Add a unit's rows to a process's file, and an empty line, which says that they are all there."""
    with (folder / f"scores-{rank}.jsonl").open("a") as file:
        file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows) + "\n")


def _cut(file: Path) -> None:
    """Forget the rows of a unit that a kill or a full disk cut off: it is made anew, in the same batches."""
    whole = file.read_bytes().rfind(_UNIT_END) + len(_UNIT_END)
    os.truncate(file, whole if whole >= len(_UNIT_END) else 0)


def collect(folder: Path) -> dict[Job, Row]:
    """Everything that was scored so far, from scores.jsonl and from the files of processes that did not finish.

    Of the latter it forgets, also on disk, what is not a whole unit.
    """
    for file in folder.glob("scores-*.jsonl"):
        _cut(file)
    return {job: row for file in sorted(folder.glob("scores*.jsonl")) for job, row in read(file).items()}


def read(file: Path) -> dict[Job, Row]:
    """Rows of one file by job; none of a file that is missing or was cut off within its first line."""
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        if not lines.readline().endswith(b"\n"):  # nothing yet, or cut off within its first line
            return {}
    return {job_of(row): row for row in read_rows(file)}


def merge(folder: Path) -> int:
    """Join the processes' files into scores.jsonl, one row a job, in a fixed order. Returns the number of rows."""
    ordered = sorted(collect(folder).items(), key=lambda item: (item[0].mode, item[0].w, item[0].prompt_id, item[0].k))
    durable.write_parts(folder / ROWS, (json.dumps(asdict(row)) + "\n" for _, row in ordered))
    for file in folder.glob("scores-*.jsonl"):
        file.unlink()
    return len(ordered)


def job_of(row: Row) -> Job:
    """What a row is of."""
    return Job(row.prompt_id, row.k, row.w, row.mode)


def save_images(rows: Iterable[tuple[Row, Tensor]], folder: Path) -> None:
    """Write images (3, H, W) in [0, 1] as prompt-k-w.png."""
    folder.mkdir(exist_ok=True)
    for row, image_3HW in rows:
        to_pil(image_3HW).save(folder / f"{row.prompt_id}-{row.k}-{row.w:g}.png")


def to_pil(image_3HW: Tensor) -> Image.Image:
    """An image of pixels in [0, 1]."""
    return Image.fromarray((image_3HW.permute(1, 2, 0) * 255).round().byte().numpy())


def prepare_folder(folder: Path, meta: dict[str, Any], overwrite: bool) -> None:
    """Create the folder and meta.json.

    Raises ValueError if it holds an evaluation under other settings, something that is no evaluation, or a link that
    leads out of it.
    """
    file = folder / META
    check_links(folder)
    if run_lock.content(folder) and not file.is_file():
        raise ValueError(f"{folder} is not empty and holds no evaluation (no {META}); give --output another folder")
    if overwrite and file.is_file():
        for old in [*folder.glob("scores*.jsonl"), *folder.glob(PLAN), *folder.glob(f"{IMAGES}/*.png")]:
            old.unlink()  # meta.json stays until it is replaced, as without it this is no evaluation's folder
    elif file.is_file():
        before = _DEFAULTS | read_json(file)
        changed = [k for k in meta if before.get(k) != meta[k]]
        if changed:
            raise ValueError(
                f"{folder} holds an evaluation with another {changed[0]} ({before.get(changed[0])!r}, not "
                f"{meta[changed[0]]!r}); give --output another folder, or --overwrite"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    durable.write_text(file, json.dumps(meta | {"created": created, "command": shlex.join(sys.argv)}, indent=1))
