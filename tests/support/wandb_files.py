"""What an offline run of W&B holds, read from its files: the .wandb log (LevelDB's format) and the media beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

PATIENCE = 1200  # times 50 ms
_BLOCK, _HEAD = 32768, 7  # bytes of a block, and of a header: checksum (4), length (2), type (1)
_FULL, _LAST = 1, 4


@dataclass
class OfflineRun:
    """A run as its log tells it."""

    folder: Path
    project: str = ""
    id: str = ""
    name: str = ""
    job_type: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None

    def last(self, key: str) -> Any:
        """The last value of a key in the history."""
        return [row[key] for row in self.history if key in row][-1]

    def table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """(columns, rows) of a table that was logged."""
        content = json.loads((self.folder / "files" / self.last(key)["path"]).read_text())
        return content["columns"], content["data"]

    def full_table(self, key: str) -> tuple[list[str], list[list[Any]]]:
        """`table`, but with an image's file as bytes, from the artifact that W&B makes of a table with images."""
        artifact = next(a for a in self.artifacts if a.type == "run_table" and f"-{key.replace('/', '')}-" in a.name)
        local = {entry.path: Path(entry.local_path) for entry in artifact.manifest.contents}
        content = json.loads(local[f"{key}.table.json"].read_text())
        cells = [[local[c["path"]].read_bytes() if isinstance(c, dict) else c for c in row] for row in content["data"]]
        return content["columns"], cells

    def images(self, key: str) -> list[tuple[Path, str | None]]:
        """(file, caption) of an image or of images that were logged."""
        value = self.last(key)
        if value["_type"] == "image-file":
            return [(self.folder / "files" / value["path"], value.get("caption"))]
        captions = value.get("captions") or [None] * len(value["filenames"])
        return [(self.folder / "files" / n, c) for n, c in zip(value["filenames"], captions, strict=True)]


def find(folder: Path) -> list[OfflineRun]:
    """The finished offline runs below a folder, oldest first. W&B's service may still be writing after `finish`."""
    runs = {file: read(file) for file in sorted(folder.rglob("offline-run-*/*.wandb"))}
    for _ in range(PATIENCE):
        late = [file for file, run in runs.items() if run.exit_code is None]
        if not late:
            break
        time.sleep(0.05)
        runs |= {file: read(file) for file in late}
    return list(runs.values())


def read(file: Path) -> OfflineRun:
    """One run."""
    run = OfflineRun(file.parent)
    for content in _contents(file.read_bytes()):
        record = Record()
        record.ParseFromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.project, run.id, run.name = record.run.project, record.run.run_id, record.run.display_name
            run.job_type = record.run.job_type
            _values(record.run.config.update, run.config)
        elif kind == "config":
            _values(record.config.update, run.config)
        elif kind == "history":
            run.history.append(_values(record.history.item))
        elif kind == "summary":
            run.summary |= _values(record.summary.update)
        elif kind == "artifact":
            run.artifacts.append(record.artifact)
        elif kind == "exit":
            run.exit_code = record.exit.exit_code
    return run


def _values(items: Any, values: dict[str, Any] | None = None) -> dict[str, Any]:
    """The items by key, with what was there before."""
    values = {} if values is None else values
    for item in items:
        *places, last = item.nested_key or [item.key]
        inner = values
        for place in places:
            inner = inner.setdefault(place, {})
        inner[last] = json.loads(item.value_json)
    return values


def _contents(data: bytes) -> Iterator[bytes]:
    """The records: each is whole, or a first, middle and last part in blocks that follow one another."""
    assert data[:4] == b":W&B"
    place, parts = _HEAD, b""
    while place + _HEAD <= len(data):
        if _BLOCK - place % _BLOCK < _HEAD:  # too little is left of the block for a header
            place += _BLOCK - place % _BLOCK
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        parts += data[place + _HEAD : place + _HEAD + length]
        place += _HEAD + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
