"""One-line errors for commands that run out of memory.

The line says what was being done, what to lower, and what is kept. This module does not import torch.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

_SIGNS = ("out of memory", "t allocate memory", "cannot allocate memory", "bad_alloc", "alloc_failed")


def is_shortage(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out.

    Libraries have many messages for it, and it may be memory of the machine or of a device.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))


def told(error: BaseException) -> str:
    """The error's own message, without the place in the allocator."""
    text = str(error).rpartition("DefaultCPUAllocator: ")[2]
    return textwrap.shorten(text, 160) or type(error).__name__


@contextmanager
def explaining(advice: Mapping[str, str], kept: Callable[[], str]) -> Iterator[None]:
    """Turn a shortage of memory into a ValueError with advice.

    advice: a text by the name of a function. The innermost function at work that has a text decides; "" is for all
    others.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        name = next((name for name in _at_work(error) if name in advice), "")
        raise ValueError(f"out of memory {advice[name]}; {kept()} ({told(error)})") from error


def _at_work(error: BaseException) -> list[str]:
    """Names of the functions that the error came through, the innermost first."""
    names, frame = [], error.__traceback__
    while frame is not None:
        names.append(frame.tb_frame.f_code.co_name)
        frame = frame.tb_next
    return names[::-1]
