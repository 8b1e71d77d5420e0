"""Seconds by phase, which add up to the whole.

An inner phase stops the clock of the phase around it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from rlg.benchmark.timing import synchronise

REST = "rest"  # name of the time outside of phases


class Phases:
    """A stopwatch for one thread.

    The device is synchronised wherever a phase begins or ends.
    """

    def __init__(self, device: torch.device | str = "cpu", clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock = device, clock
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the block to this phase."""
        self._switch()
        self._open.append(name)
        try:
            yield
        finally:
            self._switch()
            self._open.pop()

    def whole(self, run: Callable[[], Any]) -> dict[str, float]:
        """Seconds by phase of one call, `rest` included.

        Their sum is the time that it took.
        """
        self.seconds.clear()
        with self(REST):
            run()
        return dict(self.seconds)

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a function as a phase."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return function(*args, **kwargs)

        return timed

    def _switch(self) -> None:
        synchronise(self.device)
        now = self.clock()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now
