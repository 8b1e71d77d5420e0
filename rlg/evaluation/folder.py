"""An evaluation's folder: rows, images and meta.json.

Files of several processes are joined. meta.json says what the rows were made with.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlg.cli import called
from rlg.evaluation.rows import Row, read_rows
from rlg.io import atomic, folders
from rlg.io.folders import check_links
from rlg.io.parsing import read_json
from rlg.io.pixels import to_pil
from rlg.io.run_folder import ALL_ROWS, IMAGES, META, PLAN, ROWS, UNJOINED_ROWS, image_name, rows_name
from rlg.models import fingerprint

if TYPE_CHECKING:  # rlg.status must not load torch, which takes seconds
    from torch import Tensor

_UNIT_END = b"\n\n"
# An older meta.json lacks these settings. Such an evaluation ran without the options.
_DEFAULTS = {"origin": None, "schedule": "constant", "chosen": None}


@dataclass(frozen=True)
class Job:
    """One image to make."""

    prompt_id: int
    k: int
    w: float
    method: str


def append(folder: Path, rank: int, rows: Iterable[Row]) -> None:
    """Append a unit's rows to a process's file.

    An empty line follows, which says that the unit is complete.
    """
    with (folder / rows_name(rank)).open("a") as file:
        file.write("".join(json.dumps(asdict(row)) + "\n" for row in rows) + "\n")


def _cut(file: Path) -> None:
    """Delete the rows of an incomplete unit from a file.

    A kill or a full disk cut it off. It is made again, in the same batches.
    """
    whole = file.read_bytes().rfind(_UNIT_END) + len(_UNIT_END)
    os.truncate(file, whole if whole >= len(_UNIT_END) else 0)


def collect(folder: Path) -> dict[Job, Row]:
    """All rows that were scored so far.

    They come from scores.jsonl, and from the files of processes that did not finish. Incomplete units are deleted from
    these files.
    """
    for file in folder.glob(UNJOINED_ROWS):
        _cut(file)
    return {job: row for file in sorted(folder.glob(ALL_ROWS)) for job, row in read(file).items()}


def read(file: Path) -> dict[Job, Row]:
    """Rows of one file, by job.

    There are none if the file is missing, or was cut off within its first line.
    """
    if not file.is_file():
        return {}
    with file.open("rb") as lines:
        if not lines.readline().endswith(b"\n"):  # the file is empty, or cut off within its first line
            return {}
    return {job_of(row): row for row in read_rows(file)}


def merge(folder: Path) -> int:
    """Join the processes' files into scores.jsonl.

    The file has one row a job, in a fixed order. Returns the number of rows.
    """
    ordered = sorted(
        collect(folder).items(), key=lambda item: (item[0].method, item[0].w, item[0].prompt_id, item[0].k)
    )
    atomic.write_parts(folder / ROWS, (json.dumps(asdict(row)) + "\n" for _, row in ordered))
    for file in folder.glob(UNJOINED_ROWS):
        file.unlink()
    return len(ordered)


def job_of(row: Row) -> Job:
    """The job that a row is the result of."""
    return Job(row.prompt_id, row.k, row.w, row.method)


def save_images(rows: Iterable[tuple[Row, Tensor]], folder: Path) -> None:
    """Write images (3, H, W) in [0, 1] as prompt-k-w.png."""
    folder.mkdir(exist_ok=True)
    for row, image_3HW in rows:
        to_pil(image_3HW).save(folder / image_name(row.prompt_id, row.k, row.w))


def prepare_folder(folder: Path, meta: dict[str, Any], overwrite: bool) -> None:
    """Create the folder and meta.json.

    meta: it may hold the entries of `fingerprint.record`. Raises ValueError if the folder holds an evaluation with
    other settings or files, something that is no evaluation, or a link that leads out of it.
    """
    file = folder / META
    check_links(folder)
    if folders.content(folder) and not file.is_file():
        raise ValueError(f"{folder} is not empty and holds no evaluation (no {META}); give --output another folder")
    if overwrite and file.is_file():
        for old in [*folder.glob(ALL_ROWS), *folder.glob(PLAN), *folder.glob(f"{IMAGES}/*.png")]:
            old.unlink()  # meta.json stays until it is replaced, because it marks an evaluation's folder
    elif file.is_file():
        before = _DEFAULTS | read_json(file)
        made_of = {name: meta[name] for name in (fingerprint.DIGESTS, fingerprint.VERSIONS) if name in meta}
        changed = [k for k in meta if k not in made_of and before.get(k) != meta[k]]
        if changed:
            raise ValueError(
                f"{folder} holds an evaluation with another {changed[0]} ({before.get(changed[0])!r}, not "
                f"{meta[changed[0]]!r}); give --output another folder, or --overwrite"
            )
        fingerprint.check(folder, before, made_of, "give --output another folder, or --overwrite")
        return
    folder.mkdir(parents=True, exist_ok=True)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    atomic.write_text(file, json.dumps(meta | {"created": created, "command": command_line()}, indent=1))


def command_line() -> str:
    """The command of this process, as a user would type it.

    Paths below the working directory are relative.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    script = None if spec else f"python {shlex.quote(_relative(sys.argv[0]))}"
    start = script or called(f"python -m {spec.name.removesuffix('.__main__')}")
    return f"{start} {shlex.join(map(_relative, sys.argv[1:]))}".rstrip()


def _relative(word: str) -> str:
    option, sign, path = word.rpartition("=")
    inside = Path(path).is_absolute() and Path(path).is_relative_to(Path.cwd())
    return f"{option}{sign}{Path(path).relative_to(Path.cwd())}" if inside else word
