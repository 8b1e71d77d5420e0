"""Manifests, which tell whether a checkpoint is whole.

    manifest.json   {"version": 1, "files": {"adapter/adapter_model.safetensors": {"bytes": N, "sha256": "..."}, ...}}

The manifest is written last, when the disk holds all the files that it names. A folder that agrees with its manifest
is whole. Files that were added later do no harm. The model card is not listed, because evaluations update it.
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
    """Write the manifest of a folder's files.

    The disk holds the files and the manifest when this returns. Raises OSError.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _OPEN)
    rows = {path.relative_to(folder).as_posix(): _describe(path) for path in files}
    for path in files:
        atomic.sync(path)
    for path in {path.parent for path in files}:
        atomic.sync(path)
    atomic.write_text(folder / MANIFEST, json.dumps({"version": 1, "files": rows}, indent=1) + "\n")


def fault(folder: Path) -> str | None:
    """Describe the first difference between a folder and its manifest.

    Returns None if there is no difference. Raises FileNotFoundError where there is no manifest.
    """
    try:
        rows = _read(folder)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        return f"{MANIFEST} is unreadable ({error})"
    return next((found for name, row in rows.items() if (found := _fault(folder / name, name, row))), None)


def fault_of(file: Path) -> str | None:
    """Describe the difference between one file and its manifest.

    The manifest lies in the file's folder or in the folder above. Returns None if there is no difference, or no
    manifest.
    """
    for folder in (file.parent, file.parent.parent):
        if (folder / MANIFEST).is_file():
            try:
                row = _read(folder).get(file.relative_to(folder).as_posix())
            except (ValueError, TypeError, AttributeError, KeyError):
                return None  # this project did not write the manifest
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
