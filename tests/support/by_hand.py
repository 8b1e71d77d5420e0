"""Guidance by hand: two separate copies of a denoiser, and the combination of their outputs written out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v")


def add_random_lora(network: nn.Module, name: str, targets: Any = TARGETS, std: float = 0.2, seed: int = 1) -> None:
    """Attach a LoRA of rank 4 to a network of diffusers, alone active, with random weights in both matrices."""
    network.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=list(targets)), name)
    network.set_adapter(name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in network.named_parameters():
        if ".lora_" in key and f".{name}." in key:
            parameter.data = (std * torch.randn(parameter.shape, generator=generator)).to(parameter)


def combine(base: Any, tuned: Any, w: Any) -> Any:
    """base + w (tuned - base) of every tensor in the two outputs."""
    if isinstance(base, Tensor):
        return base + w * (tuned - base)
    if isinstance(base, dict):  # diffusers' output objects are dicts as well
        return type(base)(**{key: combine(base[key], tuned[key], w) for key in base})
    return type(base)(combine(b, t, w) for b, t in zip(base, tuned, strict=True))


@contextmanager
def guided_by_hand(
    network: nn.Module, base: nn.Module, tuned: nn.Module, w: Any, around: Callable[[nn.Module], Any] | None = None
) -> Iterator[None]:
    """Within, calls of a network return the combination of two others' outputs.

    around: a context for a pass of one of the two, as its cache context.
    """

    def call(one: nn.Module, args: Any, kwargs: Any) -> Any:
        if around is None:
            return one(*args, **kwargs)
        with around(one):
            return one(*args, **kwargs)

    network.forward = lambda *args, **kwargs: combine(call(base, args, kwargs), call(tuned, args, kwargs), w)
    try:
        yield
    finally:
        del network.forward


def copies(network: nn.Module, tune: Callable[[nn.Module], object]) -> tuple[nn.Module, nn.Module]:
    """(a copy of a network, another one that is tuned)."""
    base, tuned = copy.deepcopy(network), copy.deepcopy(network)
    tune(tuned)
    return base, tuned
