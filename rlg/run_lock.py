"""One writer a folder: a lock that ends with the process that holds it, however it ends.

The lock is `flock` on the file `.lock`, which holds the owner's process id and host for others to read. It belongs to
the process and to the children that it forks. Over NFS, Linux turns it into a lock of the server, which other hosts
see where the server keeps locks; a file system without locks gets a warning, and then nothing watches.
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

from rlg import durable

LOCK = ".lock"
_TRIES, _PAUSE = 5, 0.05  # `check` of another command holds the lock for a moment; seconds
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Within, no other process may write to the folder, which is created. Raises ValueError if another one does.

    The file goes with the lock, and so do folders that were made for it and stayed empty.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with durable.explaining(f"cannot write to {folder}", lambda: "give another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder)
    try:
        yield
    finally:
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):
            for path in made:
                path.rmdir()


def check(folder: Path) -> None:
    """Raise ValueError if another process holds the folder, or nothing can be written there; touches nothing."""
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
    """What a folder holds besides the lock and what a kill left; nothing if it is not there."""
    found = folder.iterdir() if folder.is_dir() else ()
    return [path for path in found if path.name != LOCK and not durable.is_leftover(path)]


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
                os.truncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode())
                return descriptor
            os.close(descriptor)
        time.sleep(_PAUSE)


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether a locked file is still the one of that name: its last owner may have deleted it just before."""
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
