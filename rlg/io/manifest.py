"""Manifests: what a checkpoint's files must be for it to be whole.

manifest.json   {"version": 1, "files": {"adapter/adapter_model.safetensors": {"bytes": N, "sha256": "..."}, ...}}

It is written last, when the disk holds all the files that it names: a folder that agrees with its manifest is whole.
Files that came later do no harm, and the model card is not in it: evaluations bring that up to date.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from rlg.io import atomic
from rlg.io.run_folder import CARD

MANIFEST = "manifest.json"
_OPEN = (MANIFEST, CARD)
_BLOCK = 2**20  # bytes read at a time


def seal(folder: Path) -> None:
    """Write the manifest of a folder's files, and have the disk hold both. Raises OSError."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _OPEN)
    rows = {path.relative_to(folder).as_posix(): _describe(path) for path in files}
    for path in files:
        atomic.sync(path)
    for path in {path.parent for path in files}:
        atomic.sync(path)
    atomic.write_text(folder / MANIFEST, json.dumps({"version": 1, "files": rows}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """What keeps a folder from being what its manifest says, in words; None if nothing does.

    Raises FileNotFoundError where there is no manifest.
    """
    try:
        rows = _read(folder)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    return next((found for name, row in rows.items() if (found := _fault(folder / name, name, row))), None)


def fault_of(file: Path) -> str | None:
    """What keeps one file from being what a manifest in its folder, or the folder above, says; None if none does."""
    for folder in (file.parent, file.parent.parent):
        if (folder / MANIFEST).is_file():
            try:
                row = _read(folder).get(file.relative_to(folder).as_posix())
            except (ValueError, TypeError, AttributeError, KeyError):
                return None  # not a manifest of ours
            return None if row is None else _fault(file, file.name, row)
    return None


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    rows = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {str(name): {"bytes": row["bytes"], "sha256": row["sha256"]} for name, row in rows.items()}


def _fault(path: Path, name: str, row: dict[str, Any]) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    size = path.stat().st_size
    if size != row["bytes"]:
        return f"{name} has {size} bytes, not {row['bytes']}"
    return None if _describe(path) == row else f"{name} is not what {MANIFEST} says (sha256)"


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
