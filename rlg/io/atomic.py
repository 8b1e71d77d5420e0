"""Atomic writes of files and folders.

A kill, a full disk or a loss of power leaves the old content or all of the new. A finished write is on the disk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_TEMPORARY = ".tmp"


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content.

    At any moment the file has its old content or all of the new. Raises OSError, which names the file.
    """
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """Write a text as `write_text` does, part by part.

    The text is never held in memory as a whole.
    """
    temporary = path.with_name(f".{path.name}{_TEMPORARY}")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            file.writelines(parts)
        sync(temporary)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync(path.parent)


def is_leftover(path: Path) -> bool:
    """Tell whether a kill left this file or folder behind.

    A process was writing or deleting it at that moment.
    """
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def forget_leftovers(folder: Path) -> None:
    """Delete what a kill left in a folder (see `is_leftover`)."""
    for path in list(folder.glob(f".*{_TEMPORARY}")):
        _delete(path)


def temporary_of(folder: Path) -> Path:
    """The place where a folder is put together before `publish`."""
    return folder.with_name(f".{folder.name}{_TEMPORARY}")


def publish(folder: Path) -> None:
    """Give `temporary_of(folder)` its name, and flush that to the disk.

    A folder that had this name before is deleted.
    """
    discard(folder)
    os.replace(temporary_of(folder), folder)
    sync(folder.parent)


def discard(folder: Path) -> None:
    """Delete a folder, if it is there.

    No part of it is ever seen under its name.
    """
    if folder.is_dir():
        aside = folder.with_name(f".{folder.name}.old{_TEMPORARY}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        shutil.rmtree(aside)


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete the content of a folder, except for some names."""
    for path in folder.iterdir():
        if path.name not in keep:
            _delete(path)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def explaining(what: str, kept: Callable[[], str]) -> Iterator[None]:
    """Turn an error of the system into an OSError that explains it.

    The message says what failed (on a full disk, for example) and what is kept.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{what}: {getattr(error, 'strerror', None) or error}; {kept()}") from error
