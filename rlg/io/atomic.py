"""Writing what must outlive a kill, a full disk and a loss of power: whole or not at all, and on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

_TEMPORARY = ".tmp"


def sync(path: Path) -> None:
    """Have the disk hold a file's content, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file: at any moment it has its old content or all of the new. Raises OSError, which names it."""
    write_parts(path, [text])


def write_parts(path: Path, parts: Iterable[str]) -> None:
    """As `write_text`, of a text that is never held as a whole."""
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
    """Whether a file or folder is what a kill left of something that was being written or deleted."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY)


def forget_leftovers(folder: Path) -> None:
    """Delete what a kill left in a folder (see `is_leftover`)."""
    for path in list(folder.glob(f".*{_TEMPORARY}")):
        _delete(path)


def temporary_of(folder: Path) -> Path:
    """Where a folder is put together before `publish`."""
    return folder.with_name(f".{folder.name}{_TEMPORARY}")


def publish(folder: Path) -> None:
    """Give `temporary_of(folder)` its name, and have the disk know; what was there under that name is deleted."""
    discard(folder)
    os.replace(temporary_of(folder), folder)
    sync(folder.parent)


def discard(folder: Path) -> None:
    """Delete a folder, if it is there, so that no part of it is ever seen under its name."""
    if folder.is_dir():
        aside = folder.with_name(f".{folder.name}.old{_TEMPORARY}")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        shutil.rmtree(aside)


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Delete what a folder holds, but for some names."""
    for path in folder.iterdir():
        if path.name not in keep:
            _delete(path)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


@contextmanager
def explaining(what: str, kept: Callable[[], str]) -> Iterator[None]:
    """Within, an error of the system (a full disk, say) becomes an OSError that says what failed and what is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(f"{what}: {getattr(error, 'strerror', None) or error}; {kept()}") from error
