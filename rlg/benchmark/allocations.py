"""Peak of the bytes that tensors hold during a call.

It is exact to the byte and repeatable, unlike the resident set of a process.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile

from rlg.benchmark.timing import peak_memory


def peak_allocated(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Bytes that one call allocated itself, at its peak.

    On a GPU they are the caching allocator's. On a CPU they are torch's, without the workspace of a kernel, and the
    profiler slows the call down.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        before = torch.cuda.memory_allocated(device)
        return int(peak_memory(run, device) or 0) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate((e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), initial=0))
