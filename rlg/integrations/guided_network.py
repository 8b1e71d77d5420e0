"""A network of a pipeline, guided by its class.

The module gets a subclass of its own class (of the same name), whose `__call__` asks the guide. All that replaces
`forward` lies inside: offloading hooks of accelerate and diffusers, caches, compiled blocks. When these restore a
forward, the guide stays, and when the guide goes, they stay. Everything inside the network acts in both passes. Base
and tuned model differ in LoRA adapters of given names (`LoraSwitch`) or in all weights (`WeightSwap`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rlg.integrations.step_caches import StepCaches
from rlg.models import lora

_KEY = "_rlg_guided"  # key in the module's __dict__, because the value is no submodule
BASE, TUNED = "base", "tuned"


class Switch(Protocol):
    """Protocol for turning the network into base or tuned model."""

    def state(self, tuned: bool) -> Any:
        """A context in which the network is the base or tuned model.

        Raises ValueError if that is not possible.
        """

    def release(self) -> None:
        """Remove all that was attached for this switch."""


class LoraSwitch:
    """Switch for adapters of given names.

    The user's own adapters stay as they are.
    """

    def __init__(self, network: nn.Module, names: Sequence[str], owned: bool):
        self.network, self.names, self.owned = network, tuple(names), owned

    def state(self, tuned: bool) -> Any:
        """A context in which the adapters are on or off.

        Raises ValueError if they were unloaded or fused.
        """
        return lora.switched(self.network, self.names, tuned)

    def scaled(self, factor: float) -> Any:
        """A context in which the adapters' updates are multiplied by a factor."""
        stack = ExitStack()
        stack.enter_context(self.state(tuned=True))
        stack.enter_context(lora.scaled(self.network, factor, self.names))
        return stack

    def release(self) -> None:
        """Take the adapters off, if the guide has attached them."""
        if self.owned:
            for name in self.names:
                lora.detach(self.network, name)


class WeightSwap:
    """Switch between the base's weights and those of a full network.

    There is only one module, so that adapters, attention processors and hooks of the base act in both passes.
    """

    def __init__(self, network: nn.Module, tuned: nn.Module):
        self.network = network
        self._tuned = {**dict(tuned.named_parameters()), **dict(tuned.named_buffers())}

    @contextmanager
    def state(self, tuned: bool) -> Iterator[None]:
        """Make the network the base or the tuned model, inside a context.

        Raises ValueError where the base's weights are not in the module (sequential offload, offload with a stream),
        and where an adapter is fused into the base alone.
        """
        self._check()
        pairs = self._pairs() if tuned else []
        for name, weight in pairs:
            weight.data, self._tuned[name] = self._tuned[name].data.to(weight.device, weight.dtype), weight.data
        try:
            yield
        finally:
            for name, weight in pairs:
                weight.data, self._tuned[name] = self._tuned[name], weight.data

    def release(self) -> None:
        """Drop the second set of weights."""
        self._tuned.clear()

    def _pairs(self) -> list[tuple[str, Tensor]]:
        named = [*self.network.named_parameters(), *self.network.named_buffers()]
        found = ((name.replace(".base_layer.", "."), tensor) for name, tensor in named)
        return [(name, tensor) for name, tensor in found if name in self._tuned]

    def _check(self) -> None:
        if any(p.device.type == "meta" for p in self.network.parameters()):
            raise ValueError(
                "sequential CPU offload brings the base's weights layer by layer, so a full network can't take their "
                "place; use enable_model_cpu_offload()"
            )
        for module in self.network.modules():
            hooks = module._diffusers_hook.hooks.values() if hasattr(module, "_diffusers_hook") else ()
            if any(getattr(getattr(hook, "group", None), "stream", None) is not None for hook in hooks):
                raise ValueError("group offloading with use_stream keeps copies of the base's weights; leave it out")
        if passed_by := lora.fused_projections(self.network, list(self.network.modules())):
            raise ValueError(f"{passed_by} holds copies of the base's weights; call unfuse_qkv_projections()")
        if fused := lora.fused(self.network):
            raise ValueError(f"the adapter {fused[0]!r} is fused into the base alone; call pipe.unfuse_lora()")


class GuidedNetwork:
    """A network of a pipeline whose calls go to `answer(self, args, kwargs)`."""

    def __init__(self, pipe: Any, name: str, switch: Switch):
        self.pipe, self.name, self.switch = pipe, name, switch
        self.module: nn.Module = getattr(pipe, name)  # it may be torch.compile's wrapper
        self.bare = lora.unwrapped(self.module)
        self.caches = StepCaches(self.bare)
        self._plain = type(self.module)
        self._compiled: tuple[Any, Callable[..., Any]] | None = None

    def install(self, answer: Callable[[GuidedNetwork, Any, Any], Any]) -> None:
        """Send the network's calls to `answer` from now on."""
        self.answer = answer
        vars(self.bare)[_KEY] = vars(self.module)[_KEY] = self
        self.module.__class__ = _guided_class(self._plain)

    def remove(self) -> None:
        """Restore the network's class.

        All that others have attached since stays.
        """
        if guided(self.bare) is self:
            for module in {self.bare, self.module}:
                vars(module).pop(_KEY, None)
            self.module.__class__ = self._plain

    def run(self, branch: str, args: Any, kwargs: Any) -> Any:
        """One pass of the network, on the caches of a branch.

        The network stays in its present state.
        """
        with self.caches.of(branch):
            return self._call()(*args, **kwargs)

    def base(self, args: Any, kwargs: Any) -> Any:
        """The base model's pass."""
        with self.switch.state(tuned=False):
            return self.run(BASE, args, kwargs)

    def tuned(self, args: Any, kwargs: Any) -> Any:
        """The tuned model's pass."""
        with self.switch.state(tuned=True):
            return self.run(TUNED, args, kwargs)

    def _call(self) -> Callable[..., Any]:
        """The network's call without the guide.

        It is compiled if the pipeline's network was compiled around the guide.
        """
        plain = partial(self._plain.__call__, self.module)
        wrapper = getattr(self.pipe, self.name, None)
        if wrapper is self.module or getattr(wrapper, "_orig_mod", None) is not self.module:
            return plain
        if self._compiled is None or self._compiled[0] is not wrapper:
            self._compiled = wrapper, wrapper.dynamo_ctx(lambda *args, **kwargs: plain(*args, **kwargs))
        return self._compiled[1]

    def __deepcopy__(self, memo: Any) -> None:
        """Copy a guided network as a plain one."""


def guided(network: nn.Module) -> GuidedNetwork | None:
    """The guided network around a module, or None."""
    return vars(lora.unwrapped(network)).get(_KEY)


@lru_cache
def _guided_class(plain: type) -> type:
    """A subclass of a network's class whose instances ask their guide.

    It has the same name.
    """

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        around = vars(self).get(_KEY)
        return plain.__call__(self, *args, **kwargs) if around is None else _answer(around, args, kwargs)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if vars(self).get(_KEY) is None:
            return plain.save_pretrained(self, *args, **kwargs)
        with lora.hidden_in_state_dict(self):
            return plain.save_pretrained(self, *args, **kwargs)

    def fuse_lora(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (around := vars(self).get(_KEY)) is not None:
            _refuse_fusing(around, kwargs.get("adapter_names", args[2] if len(args) > 2 else None))
        return plain.fuse_lora(self, *args, **kwargs)

    def _reset_stateful_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (around := vars(self).get(_KEY)) is not None:
            around.caches.forget()
        return plain._reset_stateful_cache(self, *args, **kwargs)

    _skip_compilation(__call__)
    own = {f.__name__: f for f in (save_pretrained, fuse_lora, _reset_stateful_cache) if hasattr(plain, f.__name__)}
    named = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain)(plain.__name__, (plain,), {"__call__": __call__, **own, **named})


def _refuse_fusing(around: GuidedNetwork, names: Sequence[str] | None) -> None:
    if isinstance(around.switch, WeightSwap):
        raise ValueError("fusing would change the base alone, and not the full network; remove the guide first")
    ours = around.switch.names
    if names is None or set(names) & set(ours):
        raise ValueError(
            f"the adapter {ours[0]!r} is guided, and can't be switched off when fused; call guide.remove() first, or "
            "name the others: fuse_lora(adapter_names=[...])"
        )


def _skip_compilation(function: Any) -> None:
    torch._dynamo.eval_frame.skip_code(function.__code__)


@torch.compiler.disable
def _answer(around: GuidedNetwork, args: Any, kwargs: Any) -> Any:
    return around.answer(around, args, kwargs)
