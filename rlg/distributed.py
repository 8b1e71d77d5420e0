"""What several processes do as one: they fail together, and stop together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, reduce
from safetensors import SafetensorError


@contextmanager
def together() -> Iterator[None]:
    """Within, bad input or an error of the system in one process ends all, which would wait forever; also a barrier.

    A process that raised it goes on to raise it; the others leave with exit code 2, as it has said why.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        failure = error
    failed = any(gather_object([failure is not None]))
    if failure is not None:
        raise failure
    if failed:
        raise SystemExit(2)


def agree(what: Mapping[str, Any], instead: str) -> None:
    """Raise ValueError unless all processes come with the same values; it names the first that differs, and how.

    Without this one process would sample other prompts than the rest, or wait for a step that they never take. A value
    of None is of a process that does not know, and is not compared. instead: what to do about it.
    """
    rows = gather_object([dict(what)])
    with together():
        for name in dict.fromkeys(name for row in rows for name in row):
            known = {rank: row[name] for rank, row in enumerate(rows) if row.get(name) is not None}
            if PartialState().is_main_process and len({repr(value) for value in known.values()}) > 1:
                shown = ", ".join(f"{value!r} on process {rank}" for rank, value in list(known.items())[:4])
                raise ValueError(f"the processes disagree on {name}: {shown}; {instead}")


class Interruption:
    """Within, SIGINT and SIGTERM ask for an end after the step that is being taken, and say so. A second one kills."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call it, as one that stops alone hangs the others."""
        return bool(reduce(torch.tensor(float(self.requested), device=PartialState().device), "sum") > 0)

    def leave(self) -> None:
        """End the command, with exit code 0, if any process was asked to stop; what it made so far is kept."""
        if self.agreed():
            if PartialState().is_main_process:
                print("interrupted; the same command goes on where it was", file=sys.stderr)
            raise SystemExit(0)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True
        name = signal.Signals(number).name
        told = f"\n{name}: this step is finished and kept, then it ends; once more ends it now, and loses the step\n"
        os.write(2, told.encode())  # print is not made for a signal's handler
