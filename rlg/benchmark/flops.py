"""Model FLOP utilisation of a call: operations over seconds, over the peak.

The peak is that of one large matrix product in the same precision, on the same device and in the same run. So it is
the machine's own, and not its maker's claim. The operations are matrix products, convolutions and attention, forward
and backward (torch.utils.flop_counter), two for a multiplication and its addition. On a CPU all seconds are the
process's own, over all its threads, which other processes hardly touch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from rlg.benchmark.timing import Times, stopwatch

_SIDES = {"cpu": 1024, "cuda": 8192}  # sides of the matrices: large enough that the units are busy
_ENOUGH = 0.95  # share of the best throughput above which a larger batch wins little


def _attention(q_shape: list[int], k_shape: list[int], v_shape: list[int], *_: object, **__: object) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _attention_backward(out: list[int], q: list[int], k: list[int], v: list[int], *_: object, **__: object) -> int:
    return sdpa_backward_flop_count(out, q, k, v)


_ATEN = torch.ops.aten
_CPU_ATTENTION = {  # torch's own table leaves these out
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(run: Callable[[], object]) -> int:
    """Floating point operations of one call.

    The call must not be compiled.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        run()
    return counter.get_total_flops()


def device_seconds(times: tuple[float, float], device: torch.device | str) -> float:
    """Pick CPU seconds on a CPU, wall seconds on a GPU."""
    wall, cpu = times
    return cpu if torch.device(device).type == "cpu" else wall


def seconds_by_round(times: Times, device: torch.device | str) -> list[float]:
    """(R,) seconds of each round, by the clock of the device."""
    return [device_seconds(pair, device) for pair in zip(times.wall_R, times.cpu_R, strict=True)]


def matmul_peak(dtype: torch.dtype, device: torch.device | str = "cpu", repeats: int = 10) -> float:
    """Operations a second of a product of two large matrices.

    The fastest of some products counts.
    """
    side = _SIDES.get(torch.device(device).type, 2048)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    stopwatch(lambda: a @ b, device)
    return 2 * side**3 / min(device_seconds(stopwatch(lambda: a @ b, device), device) for _ in range(repeats))


def utilisation(operations: float, seconds: float, peak: float) -> float:
    """Share of the peak, 0 to 1."""
    return operations / seconds / peak


def saturates_at(per_second: Mapping[int, float], enough: float = _ENOUGH) -> int:
    """The smallest batch size with a throughput near the best one.

    A throughput is in images a second, by batch size; near means within 5%.
    """
    best = max(per_second.values())
    return min(size for size, rate in per_second.items() if rate >= enough * best)


def saturation(name: str, per_second: Mapping[int, float]) -> str:
    """A line on the batch size beyond which throughput hardly grows."""
    return f"{name} saturates at a batch of {saturates_at(per_second)} of {sorted(per_second)}"
