"""Side-by-side measurement: interleaved timings, peak memory, and the machine.

A busy machine slows down whatever runs at the moment. So contenders take turns, each round in another order. The
report has the median over rounds of the ratio within a round, with its interval. Seconds are of the wall clock, with
the device synchronised. Beside them are the CPU's own, which other processes hardly touch.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from rlg.stats import Estimate, median

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): sets the peak of the resident set to its present size


@dataclass(frozen=True)
class Times:
    """Seconds of one contender, a number for each round."""

    wall_R: tuple[float, ...]
    cpu_R: tuple[float, ...]  # seconds of this process, all its threads


def interleaved(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
) -> dict[str, Times]:
    """Run the contenders in turn, `repeats` rounds after `warmup` uncounted ones.

    Rounds differ in their order (`turns`), so that none is always first or behind the same one.
    Raises ValueError for less than one round.
    """
    if repeats < 1:
        raise ValueError(f"the number of repeats must be at least 1, got {repeats}")
    names = list(contenders)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for r in range(-warmup, repeats):
        for name in turns(names, r):
            spent = stopwatch(contenders[name], device)
            if r >= 0:
                seconds[name].append(spent)
    return {name: Times(*map(tuple, zip(*rows, strict=True))) for name, rows in seconds.items()}


def turns(names: Sequence[str], r: int) -> list[str]:
    """The names in the order of round r.

    Each round begins with another one, and every other round goes backwards.
    """
    order = [*names[r % len(names) :], *names[: r % len(names)]]
    return order if r % 2 else order[::-1]


def stopwatch(run: Callable[[], object], device: torch.device | str = "cpu") -> tuple[float, float]:
    """(wall, CPU) seconds of one call.

    The device is idle before and after it.
    """
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronise(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def synchronise(device: torch.device | str) -> None:
    """Wait until the device is idle.

    Otherwise one would time the launching of kernels.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def ratio(times_R: ArrayLike, reference_R: ArrayLike) -> Estimate:
    """Median over rounds of times / reference, each within its round."""
    times, reference = np.asarray(times_R, dtype=np.float64), np.asarray(reference_R, dtype=np.float64)
    if times.shape != reference.shape:
        raise ValueError(f"ratios need the same rounds, got {times.shape} and {reference.shape}")
    return median(times / reference)


def peak_memory(run: Callable[[], object], device: torch.device | str = "cpu") -> int | None:
    """Bytes at the peak of one call, weights included.

    They are those allocated on a GPU, or those of this process's resident set on a CPU (Linux; else None). On a CPU
    memory that was freed before is given back first, as far as it can be.
    """
    if torch.device(device).type == "cuda":
        synchronise(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        synchronise(device)
        return torch.cuda.max_memory_allocated(device)
    gc.collect()
    if not _CLEAR.exists():
        run()
        return None
    _give_back()
    _CLEAR.write_text(_RESET_PEAK)
    run()
    row = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(row.split()[1]) * 1024


def _give_back() -> None:
    """Have the allocator return free memory to the system.

    Only glibc can.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Facts about the machine for a table of timings."""
    import diffusers

    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
