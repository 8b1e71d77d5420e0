"""Peak of what tensors hold during a call: to the byte and repeatable, unlike the resident set of a process."""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from rlg.benchmark.timing import peak_memory


def peak_allocated(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes at the peak of one call, of what it allocated itself; the profiler slows a call on a CPU down.

    Of a GPU the caching allocator's, of a CPU that of torch, without what a kernel takes for itself.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        return int(peak_memory(run, device) or 0) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))
