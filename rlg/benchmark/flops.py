"""Model FLOP utilisation: floating point operations of a call, over its seconds, over the peak that was measured.

The peak is that of one large matrix product in the same precision, on the same device and in the same run: what this
machine gives, not what its maker says. Counted are matrix products, convolutions and attention, forward and backward
(torch.utils.flop_counter), two operations for a multiplication and its addition. On a CPU all seconds are the
process's own, over all its threads, which other processes hardly touch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rlg.benchmark.timing import Times, stopwatch

_SIDES = {"cpu": 1024, "cuda": 8192}  # of the matrices: large enough that the units are busy
_ENOUGH = 0.95  # of the best throughput: from here on a larger batch wins little


def _attention(q_shape: list[int], k_shape: list[int], v_shape: list[int], *_: object, **__: object) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _attention_backward(out: list[int], q: list[int], k: list[int], v: list[int], *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(out, q, k, v)


_ATEN = torch.ops.aten
_CPU_ATTENTION = {  # which torch's own table leaves out
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(run: Callable[[], object]) -> int:
    """Floating point operations of one call, which must not be compiled."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def device_seconds(times: tuple[float, float], device: torch.device | str) -> float:
    """Of (wall, CPU) seconds those that utilisation goes by."""
    return times[torch.device(device).type == "cpu"]


def seconds_by_round(times: Times, device: torch.device | str) -> list[float]:
    """(R,) seconds of each round that utilisation goes by."""
    return [device_seconds(pair, device) for pair in zip(times.wall_R, times.cpu_R, strict=True)]


def matmul_peak(dtype: torch.dtype, device: torch.device | str = "cpu", repeats: int = 10) -> float:
    """Operations a second of the fastest of some products of two large matrices."""
    side = _SIDES.get(torch.device(device).type, 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    stopwatch(lambda: a @ b, device)
    return 2 * side**3 / min(device_seconds(stopwatch(lambda: a @ b, device), device) for _ in range(repeats))


def utilisation(operations: float, seconds: float, peak: float) -> float:
    """Share of the peak, 0 to 1."""
    return operations / seconds / peak


def saturates_at(per_second: Mapping[int, float], enough: float = _ENOUGH) -> int:
    """The smallest batch size whose throughput (images a second, by batch size) is within 5% of the best one."""
    best = max(per_second.values())
    return min(size for size, rate in per_second.items() if rate >= enough * best)


def saturation(name: str, per_second: Mapping[int, float]) -> str:
    """One line on the batch size beyond which images a second hardly grow."""
    return f"{name} saturates at a batch of {saturates_at(per_second)} of {sorted(per_second)}"
