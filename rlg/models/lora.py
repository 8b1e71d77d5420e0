"""Switching, scaling, mixing and removing LoRA adapters inside a network.

PEFT's public switches also change requires_grad, which DDP must not see. Therefore this module sets the attributes
that these switches set.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention_processor import Attention
from diffusers.utils.peft_utils import delete_adapter_layers, recurse_remove_peft_layers
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def layers(network: nn.Module) -> list[BaseTunerLayer]:
    """The layers of a network that carry adapters."""
    return [m for m in network.modules() if isinstance(m, BaseTunerLayer)]


def carrying(network: nn.Module, names: Collection[str]) -> list[BaseTunerLayer]:
    """The layers that carry an adapter of one of these names."""
    return [layer for layer in layers(network) if any(name in layer.scaling for name in names)]


def names_of(network: nn.Module) -> list[str]:
    """Names of a network's adapters, in the order of attachment."""
    return list(dict.fromkeys(name for layer in layers(network) for name in layer.scaling))


def fused(network: nn.Module) -> list[str]:
    """Names of the adapters that are added to the base's weights.

    PEFT still knows them by these names.
    """
    return list(dict.fromkeys(name for layer in layers(network) for name in layer.merged_adapters))


def fused_projections(network: nn.Module, parts: Collection[nn.Module]) -> str | None:
    """The first attention that runs on copies of these layers' weights.

    Such an attention computes queries, keys and values together. Returns None if there is none.
    """
    among = {id(part) for part in parts}
    attentions = ((name, m) for name, m in network.named_modules() if _computes_from_copies(m))
    return next((name for name, m in attentions for part in _projections(m) if id(part) in among), None)


def _computes_from_copies(attention: nn.Module) -> bool:
    if isinstance(attention, Attention):  # this older class keeps its flag when its processor is put back
        return type(attention.processor).__name__.startswith("Fused")
    return getattr(attention, "fused_projections", False)


def _projections(attention: nn.Module) -> list[nn.Module]:
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    return [getattr(attention, name) for name in names if isinstance(getattr(attention, name, None), nn.Module)]


@contextmanager
def disabled(network: nn.Module) -> Iterator[None]:
    """Switch all LoRA layers of a network off, inside a context."""
    with _set(layers(network), "_disable_adapters", lambda _: True):
        yield


@contextmanager
def active(network: nn.Module, name: str) -> Iterator[None]:
    """Use one adapter in all LoRA layers, inside a context."""
    with _set(layers(network), "_active_adapter", lambda _: [name]):
        yield


@contextmanager
def switched(network: nn.Module, names: Sequence[str], on: bool) -> Iterator[None]:
    """Switch the adapters of these names on or off, inside a context.

    All others stay as they are. PEFT skips every adapter of a layer that has a fused one. Therefore the fused ones are
    hidden from it while these adapters are on. Raises ValueError if an adapter of these names is fused, or gone.
    """
    found = carrying(network, names)
    for name in names:
        if not any(name in layer.scaling for layer in found):
            raise ValueError(
                f"the guided adapter {name!r} is no longer attached; call guide.remove(), or rlg.apply again"
            )
        if any(name in layer.merged_adapters for layer in found):
            raise ValueError(f"the guided adapter {name!r} is fused and can't be switched; call pipe.unfuse_lora()")
    if passed_by := fused_projections(network, found):
        raise ValueError(f"{passed_by} is fused without the adapter of its parts; call unfuse_qkv_projections()")

    def others(layer: BaseTunerLayer) -> list[str]:
        hidden = (*names, *layer.merged_adapters) if on else names
        return [name for name in layer.active_adapters if name not in hidden]

    own = list(names) if on else []
    beside_fused = [layer for layer in found if on and layer.merged_adapters]
    with (
        _set(found, "_active_adapter", lambda layer: [*others(layer), *own]),
        _set(beside_fused, "merged_adapters", lambda _: []),
    ):
        yield


@contextmanager
def mixed(network: nn.Module, weights: Mapping[str, float]) -> Iterator[None]:
    """Add the weighted sum of all adapters' updates, inside a context.

    This is one pass with the merged dense weights. Ranks, alphas and layers may differ. An average of the factors
    would be another update, with cross terms.
    """
    with _scaling(layers(network), weights), _set(layers(network), "_active_adapter", lambda _: list(weights)):
        yield


@contextmanager
def scaled(network: nn.Module, factor: float, names: Collection[str] | None = None) -> Iterator[None]:
    """Multiply the updates of adapters by a factor, inside a context.

    names: None means all adapters. This is guidance to first order, in one pass.
    """
    chosen = names_of(network) if names is None else names
    with _scaling(layers(network), dict.fromkeys(chosen, factor)):
        yield


@contextmanager
def rows(network: nn.Module, factor_N: Tensor, names: Collection[str] | None = None) -> Iterator[None]:
    """Multiply the updates of row n by factor_N[n], inside a context.

    0 is the base, and 1 is the tuned model, so that one batch holds passes of several models. names: the adapters to
    scale; None means all active ones. The few channels of the rank are scaled, before they are projected up. A pass
    raises ValueError for a layer whose batch has another size.
    """

    def scale(module: nn.Module, args: Any, low: Tensor) -> Tensor:
        if len(low) != len(factor_N):
            raise ValueError(f"{len(factor_N)} factors of the LoRA for a batch of {len(low)}")
        return low * factor_N.to(low).reshape(-1, *[1] * (low.ndim - 1))

    found = [(layer, name) for layer in layers(network) for name in layer.active_adapters if name in layer.lora_A]
    downs = [layer.lora_A[name] for layer, name in found if names is None or name in names]
    handles = [down.register_forward_hook(scale) for down in downs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hidden_in_state_dict(network: nn.Module) -> Iterator[None]:
    """Hide adapters in `network.state_dict()`, inside a context.

    It then holds the base's weights under their own names.
    """
    plain = network.state_dict

    def base_alone(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = plain(*args, **kwargs)
        return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}

    vars(network)["state_dict"] = base_alone
    try:
        yield
    finally:
        del vars(network)["state_dict"]


def unwrapped(network: nn.Module) -> nn.Module:
    """The network inside torch.compile's wrapper, or itself."""
    return network._orig_mod if hasattr(network, "_orig_mod") else network


def other_parts(pipe: Any, network: nn.Module, names: Collection[str]) -> list[str]:
    """Names of the pipeline's other parts that carry these adapters."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return [name for name, part in parts.items() if unwrapped(part) is not network and carrying(part, names)]


def attach(network: nn.Module, config: LoraConfig, name: str) -> None:
    """Put a new adapter into a network.

    This also works for a class that diffusers has no loader for.
    """
    if isinstance(network, PeftAdapterMixin):
        network.add_adapter(config, name)
    else:
        inject_adapter_in_model(config, network, adapter_name=name)


def activate(network: nn.Module, name: str) -> None:
    """Make an adapter the active one; the others are frozen."""
    for layer in layers(network):
        layer.set_adapter(name)


def detach(network: nn.Module, name: str) -> None:
    """Take an adapter off a network, if it is there.

    With the last adapter, PEFT's layers are removed.
    """
    if not carrying(network, [name]):
        return
    others = [each for each in names_of(network) if each != name]
    if others:
        before = {id(layer): [each for each in layer.active_adapters if each != name] for layer in layers(network)}
        delete_adapter_layers(network, name)
        for layer in layers(network):
            layer._active_adapter = before[id(layer)]
    else:
        remove_layers(network)


def remove_layers(network: nn.Module) -> None:
    """Take PEFT's layers out of a network, with all adapters."""
    if hasattr(network, "unload_lora"):
        network.unload_lora()
    else:  # diffusers has no loader for this network
        recurse_remove_peft_layers(network)
        vars(network).pop("peft_config", None)


def _scaling(found: list[BaseTunerLayer], factors: Mapping[str, float]) -> Any:
    """Multiply each named adapter's scaling by its factor, inside a context."""

    def times(layer: BaseTunerLayer) -> dict[str, float]:
        return {name: value * factors.get(name, 1.0) for name, value in layer.scaling.items()}

    return _set(found, "scaling", times)


@contextmanager
def _set(found: list[BaseTunerLayer], attribute: str, value: Callable[[BaseTunerLayer], Any]) -> Iterator[None]:
    before = [getattr(layer, attribute) for layer in found]
    for layer in found:
        setattr(layer, attribute, value(layer))
    try:
        yield
    finally:
        for layer, was in zip(found, before, strict=True):
            setattr(layer, attribute, was)
