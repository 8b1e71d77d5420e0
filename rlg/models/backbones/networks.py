"""Diffusers' denoisers, by their names and classes.

`rlg.apply` serves pipelines of any family, with or without a backbone. Therefore it looks at the network's class. A
network that is not in the table works as well, but without the options of the table.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn

from rlg.models.backbones import sd3

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")  # attributes of diffusers' pipelines
MAIN_DENOISERS = ("transformer", "unet")  # a pipeline has one of them; LoRA files and folders use these names

Inputs = dict[str, Any]  # keyword arguments of a network
Shorten = Callable[[nn.Module, Inputs], AbstractContextManager[Inputs]]


def _whole() -> Shorten:
    return lambda network, inputs: nullcontext(inputs)


@dataclass(frozen=True, kw_only=True)
class Call:
    """Properties of a network's call."""

    stacks: bool = False  # the batch is the first dimension of its arguments, so that they may be stacked
    counts_up: bool = False  # its pipeline gives it 1 - t / 1000
    shorten: Callable[[], Shorten] = _whole  # makes, once a guide, a function that drops inputs without effect


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
    """The properties of a network's call, by its class.

    A class that is not in the table has the defaults.
    """
    return CALLS.get(type(network).__name__, Call())


def loader_options(pipe: Any, network: nn.Module) -> dict[str, bool]:
    """Options of diffusers' `load_lora_weights` for one network of a pipeline.

    Raises ValueError for a network that diffusers never loads into.
    """
    if network is getattr(pipe, "unconditional_transformer", None):
        raise ValueError("diffusers loads its LoRA files into the other transformer; give a PEFT folder")
    return {"load_into_transformer_2": True} if network is getattr(pipe, "transformer_2", None) else {}
