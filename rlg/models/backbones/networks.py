"""Denoisers of diffusers, by the names that it gives them and by class: what `rlg.apply` and adapters must know.

`rlg.apply` serves any pipeline, of families with a backbone and without one, so that it goes by the network's class.
A network that is not in the table runs all the same; it lacks what the table would have said.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlg.models.backbones import sd3

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")  # as diffusers' pipelines name them
MAIN_DENOISERS = ("transformer", "unet")  # of which a pipeline has one: in LoRA files, and of folders of networks

Inputs = dict[str, Any]  # keyword arguments of a network
Shorten = Callable[[nn.Module, Inputs], AbstractContextManager[Inputs]]


def _whole() -> Shorten:
    return lambda network, inputs: nullcontext(inputs)


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a network is called."""

    stacks: bool = False  # its arguments have the batch as first dimension, and may be stacked
    counts_up: bool = False  # its pipeline tells it 1 - t / 1000
    shorten: Callable[[], Shorten] = _whole  # makes what drops inputs that change nothing, for a guide's life


CALLS = {
    "Ideogram4Transformer2DModel": Call(counts_up=True),
    "Lumina2Transformer2DModel": Call(counts_up=True),
    "LuminaNextDiT2DModel": Call(counts_up=True),
    "PixArtTransformer2DModel": Call(stacks=True),
    "SanaTransformer2DModel": Call(stacks=True),
    "SD3Transformer2DModel": Call(stacks=True, shorten=sd3.FewerTokens),
    "UNet2DConditionModel": Call(stacks=True),
    "ZImageTransformer2DModel": Call(counts_up=True),
}


def call_of(network: object) -> Call:
    """How a network is called, by its class; the default for a class that is not known."""
    return CALLS.get(type(network).__name__, Call())


def loader_options(pipe: Any, network: nn.Module) -> dict[str, bool]:
    """Options with which diffusers' `load_lora_weights` loads into this network of a pipeline.

    Raises ValueError for a network that it never loads into.
    """
    if network is getattr(pipe, "unconditional_transformer", None):
        raise ValueError("diffusers loads its LoRA files into the other transformer; give a PEFT folder")
    return {"load_into_transformer_2": True} if network is getattr(pipe, "transformer_2", None) else {}
