"""Two doubles of torch's CPU products, to find tests that rest on the luck of one CPU's kernels.

    pytest --kernels by_rows       a result depends on how many rows the product has: some elements are one ulp off
    pytest --kernels row_by_row    the control: each row is computed on its own, so that no other row can change it

On some Intel CPUs, MKL is the first of the two: how it blocks a product decides in which order a row is summed. What
passes under `by_rows` asks for equal bits only where both sides run the same kernels on the same shapes. The doubles
stand below autograd, in the dispatcher: they see the products of LoRA layers, of attention and of the backward pass,
on every thread. Backward passes of convolutions and attention, and other processes, run the kernels of the machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", _ATTENTION)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16)  # what nextafter takes
Kernel = Callable[..., Any]  # (*arguments) -> what the product returns


def by_rows(name: str, kernel: Kernel, *arguments: Any, **options: Any) -> Any:
    """The product, with elements moved by one ulp in a pattern that the number of its rows decides."""
    result = kernel(*arguments, **options)
    out = _output(result)
    if out.dtype not in _FLOATS or not out.numel():
        return result
    if name == "convolution":
        _, channels, *space = out.shape
        pattern = _pattern(len(out), channels, out.dtype).view(-1, *[1] * len(space))
    else:
        rows = len(out) if name == _ATTENTION else out.shape[:-1].numel()
        pattern = _pattern(rows, out.shape[-1], out.dtype)
    stays = (pattern == 0) | (out == 0)  # sums of zeros, as of a fresh LoRA, are 0 in any order
    out.copy_(torch.nextafter(out, torch.where(stays, out, pattern)))
    return result


def row_by_row(name: str, kernel: Kernel, *arguments: Any, **options: Any) -> Any:
    """The product of each row alone, joined: of each image, in a convolution, attention or batch of products."""
    split = {"mm": (0,), "addmm": (1,), "bmm": (0, 1), "baddbmm": (1, 2), "convolution": (0,), _ATTENTION: (0, 1, 2)}
    along = split[name]
    count = len(arguments[along[0]])
    if name in ("addmm", "baddbmm") and arguments[0].ndim == arguments[1].ndim and len(arguments[0]) == count:
        along = (0, *along)  # what is added has rows, too
    if count < 2:
        return kernel(*arguments, **options)
    parts = [kernel(*_row(arguments, along, i), **options) for i in range(count)]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


DOUBLES = {double.__name__: double for double in (by_rows, row_by_row)}


def install(name: str) -> torch.library.Library:
    """Put a double in place of the CPU's products until the library that is returned is destroyed."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that kernels are overridden
        for product in PRODUCTS:
            kernel = torch.library.get_kernel(f"aten::{product}", "CPU")
            library.impl(product, partial(_call, DOUBLES[name], product, kernel), "CPU", with_keyset=True)
    return library


def _call(double: Kernel, product: str, kernel: Any, keyset: Any, *arguments: Any, **options: Any) -> Any:
    return double(product, partial(kernel.call_boxed, keyset), *arguments, **options)


def _output(result: Tensor | Sequence[Tensor]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _row(arguments: Sequence[Any], along: Sequence[int], i: int) -> list[Any]:
    # copies, as a kernel may also look at where in memory a row begins
    return [each[i : i + 1].clone() if place in along else each for place, each in enumerate(arguments)]


@cache
def _pattern(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """(columns,) where an element goes by one ulp: up (inf), down (-inf) or nowhere (0)."""
    generator = torch.Generator().manual_seed(rows)
    directions = torch.tensor([-torch.inf, 0.0, torch.inf], dtype=dtype)
    return directions[torch.randint(3, (columns,), generator=generator)]
