"""Folders that one process writes.

A lock ends with the process that holds it. No link in the folder may lead out of it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rlg.io import atomic


def check_links(folder: Path) -> None:
    """Raise ValueError if a link in a folder leads out of it.

    Call this before anything is written there.
    """
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    for entry in inside:
        if entry.is_symlink() and not entry.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{entry} is a link that leads out of its folder; remove it, or write somewhere else")


LOCK = ".lock"
# Try again, because `check` of another command holds the lock for a moment. The pause is in seconds.
_TRIES, _PAUSE = 5, 0.05
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a folder, which is created.

    Raises ValueError if another process holds the folder. The lock file is removed at the end. So are folders that
    were made for it and stayed empty.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with atomic.explaining(f"cannot write to {folder}", lambda: "give another folder"):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = _acquire(folder)
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        with suppress(OSError):
            for path in made:
                path.rmdir()


def check(folder: Path) -> None:
    """Raise ValueError if a folder is in use or cannot be written.

    This changes nothing on the disk.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"cannot write to {folder}: {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write to {folder}: {nearest} is not writable")
    if (folder / LOCK).is_file():
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
        try:
            _flock(descriptor, fcntl.LOCK_SH, folder)
        finally:
            os.close(descriptor)


def content(folder: Path) -> list[Path]:
    """Files and folders inside a folder, without lock and leftovers.

    The list is empty if the folder does not exist.
    """
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.name != LOCK and not atomic.is_leftover(path)]


def _acquire(folder: Path) -> int:
    tries = _TRIES
    while True:
        tries -= 1
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _flock(descriptor, fcntl.LOCK_EX, folder)
        except ValueError:
            os.close(descriptor)
            if tries <= 0:
                raise
        else:
            if _is_current(descriptor, folder / LOCK):
                _sign(descriptor, folder / LOCK)
                return descriptor
            os.close(descriptor)
        time.sleep(_PAUSE)


def _sign(descriptor: int, path: Path) -> None:
    """Write who holds the lock.

    If this fails (on a full disk), no file stays behind.
    """
    try:
        os.truncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
    except OSError:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        raise


def _is_current(descriptor: int, path: Path) -> bool:
    """Tell whether a locked file still has this name.

    Its last owner may have deleted it just before it was locked.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _flock(descriptor: int, kind: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError as error:
        process, _, host = os.pread(descriptor, 300, 0).decode(errors="replace").strip().partition(" ")
        owner = f"process {process} on {host}" if host else "another process"
        raise ValueError(f"{folder} is in use: {owner} writes to it; wait for it, or give another folder") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(f"{folder} cannot be locked ({error.strerror}): have no other run write there", stacklevel=4)
