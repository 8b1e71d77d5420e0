"""Processes that fail together and stop together."""

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
    """Let all processes fail if one fails, inside a context.

    Otherwise the others would wait for it without end. The failures are bad input and errors of the system. The
    process that failed raises its error, which explains it. The others exit with code 2. The end of the context is a
    barrier.
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
    """Raise ValueError unless all processes have the same values.

    The message names the first value that differs. Otherwise a process would sample other prompts than the rest, or
    wait for a step that the others never take. A value of None means that the process does not know it, and is not
    compared. instead: advice for the message.
    """
    rows = gather_object([dict(what)])
    with together():
        for name in dict.fromkeys(name for row in rows for name in row):
            known = {rank: row[name] for rank, row in enumerate(rows) if row.get(name) is not None}
            if PartialState().is_main_process and len({repr(value) for value in known.values()}) > 1:
                shown = ", ".join(f"{value!r} on process {rank}" for rank, value in list(known.items())[:4])
                raise ValueError(f"the processes disagree on {name}: {shown}; {instead}")


class Interruption:
    """Let SIGINT and SIGTERM end the command after the present step.

    This holds inside a context, and the user is told so. A second signal kills the process.
    """

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
        """Tell whether any process was asked to stop.

        All processes must call this, because the others hang if one stops alone.
        """
        return bool(reduce(torch.tensor(float(self.requested), device=PartialState().device), "sum") > 0)

    def leave(self) -> None:
        """End the command with exit code 0 after a request to stop.

        The request may have reached any process. All that was made so far is kept.
        """
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
        os.write(2, told.encode())  # print is not safe in a signal handler
