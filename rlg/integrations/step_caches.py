"""Diffusers' step caches under guidance, one for each pass.

A cache (first block, Mag, Sea, TaylorSeer, text keys and values, pyramid attention broadcast, FasterCache) takes parts
of the network from the previous pass. With one cache for both models, the tuned pass would take them from the base
pass, and their difference would be lost. Most caches keep a state for each named context of a pipeline ("cond",
"uncond"). For these, a pass adds its own name. Pyramid attention broadcast and FasterCache keep one state a layer,
which is exchanged.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks.hooks import CacheContext, ModelHook, StateManager
from torch import nn

_NO_CONTEXT = "inference"  # diffusers' own name if a pipeline names no context


class StepCaches:
    """The caches of one network, by branch of guidance."""

    def __init__(self, network: nn.Module):
        self.network = network
        self._kept: dict[tuple[int, str], Any] = {}  # states of hooks that have one state for all contexts

    @contextmanager
    def of(self, branch: str) -> Iterator[None]:
        """Use the caches of one branch ("base" or "tuned"), inside a context.

        Raises ValueError for a cache that keeps its state in an unknown way.
        """
        undo = [change for hook in stateful_hooks(self.network) for change in self._enter(hook, branch)]
        try:
            yield
        finally:
            for change in undo:
                change()

    def forget(self) -> None:
        """Clear all states, as the caches do at a pipeline call's end."""
        self._kept.clear()

    def _enter(self, hook: ModelHook, branch: str) -> list[Any]:
        managers = [value for value in vars(hook).values() if isinstance(value, StateManager)]
        if managers:
            return [_rename(manager, branch) for manager in managers]
        if not hasattr(hook, "state"):
            raise ValueError(f"the cache {type(hook).__name__} can't be kept apart for base and tuned; disable it")
        return [self._exchange(hook, branch)]

    def _exchange(self, hook: Any, branch: str) -> Any:
        before, key = hook.state, (id(hook), branch)
        hook.state = self._kept.setdefault(key, type(before)())

        def back() -> None:
            self._kept[key], hook.state = hook.state, before

        return back


def stateful_hooks(network: nn.Module) -> list[ModelHook]:
    """Hooks of a network and its layers that keep a state."""
    registries = [m._diffusers_hook for m in network.modules() if hasattr(m, "_diffusers_hook")]
    return [hook for registry in registries for hook in registry.hooks.values() if hook._is_stateful]


def _rename(manager: StateManager, branch: str) -> Any:
    before = manager._context
    context = before or CacheContext(_NO_CONTEXT)
    if not context.name.endswith(f"/{branch}"):  # two hooks can share a manager
        manager.set_context(dataclasses.replace(context, name=f"{context.name}/{branch}"))
    return lambda: manager.set_context(before)
