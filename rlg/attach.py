"""A slider on any diffusers pipeline: `guide = rlg.apply(pipe, "adapter"); guide.scale = 1.6; pipe("...")`.

The denoiser's `forward` is wrapped and nothing else: classifier-free guidance and the lerp are both linear, so
wrapping the denoiser equals wrapping the whole update, for every pipeline and every scheduler of diffusers. The tuned
pass is the denoiser with its LoRA on, or a second network if what is attached is a full one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlg import adapters, attach_mode, networks
from rlg.attach_mode import Passes, PipelineMode, sample_of, with_sample
from rlg.guidance import Weight, check_finite
from rlg.guidance_modes import FULL


def denoiser_name(pipe: Any) -> str:
    """The pipeline's attribute that holds its denoiser. Raises ValueError if it has none that we know."""
    for name in adapters.DENOISERS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    raise ValueError(f"{type(pipe).__name__} has no denoiser named {' or '.join(adapters.DENOISERS)}")


class Guide:
    """Reinforcement Learning Guidance on a pipeline; `scale` may be changed between calls, `remove()` takes it off."""

    def __init__(self, pipe: Any, network: nn.Module, scale: Weight, tuned: nn.Module | None = None, mode: str = FULL):
        self.pipe, self.network, self.tuned = pipe, network, tuned
        parsed = attach_mode.parse(mode, tuned is not None)
        self._mode = None if parsed.exact else PipelineMode(parsed, pipe)
        self._own_forward = vars(network).get("forward")  # set where another wrapper, as of accelerate, was here first
        self._forward: Callable[..., Any] = network.forward
        self.scale = scale
        network.forward = self._guided  # type: ignore[method-assign]

    @property
    def scale(self) -> Weight:
        """w: a number, one per sample of the denoiser's batch, or a function of the network's time."""
        return self._scale

    @scale.setter
    def scale(self, value: Weight) -> None:
        check_finite(value)
        self._scale = value

    def remove(self) -> None:
        """Restore the denoiser: an adapter stays attached, at w = 1; from beside a full network, it is the base."""
        if self._own_forward is None:
            vars(self.network).pop("forward", None)
        else:
            self.network.forward = self._own_forward  # type: ignore[method-assign]

    def _guided(self, *args: Any, **kwargs: Any) -> Any:
        w = self._weight(args, kwargs)
        if self._mode is not None and (callable(self._scale) or isinstance(w, Tensor) or w not in (0.0, 1.0)):
            base, tuned = (partial(run, *args, **kwargs) for run in (self._base_pass, self._tuned_pass))
            return self._mode(Passes(self.network, base, tuned), w, _first(args, kwargs), _time(args, kwargs))
        if isinstance(w, float) and w == 1.0:
            return self._tuned_pass(*args, **kwargs)
        base = self._base_pass(*args, **kwargs)
        if isinstance(w, float) and w == 0.0:
            return base
        return _lerp(base, self._tuned_pass(*args, **kwargs), w)

    def _base_pass(self, *args: Any, **kwargs: Any) -> Any:
        with adapters.disabled(self.network):
            return self._forward(*args, **kwargs)

    def _tuned_pass(self, *args: Any, **kwargs: Any) -> Any:
        if self.tuned is None:
            return self._forward(*args, **kwargs)
        x = _first(args, kwargs)
        if next(self.tuned.parameters()).device != x.device:  # the pipeline was moved, and does not know this network
            self.tuned.to(x.device)
        return self.tuned(*args, **kwargs)

    def _weight(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | Tensor:
        if isinstance(self._scale, Tensor):
            return self._scale if self._scale.ndim else float(self._scale)
        if not callable(self._scale):
            return float(self._scale)
        w = self._scale(_time(args, kwargs))
        check_finite(w)
        return float(w)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))


def _time(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    time = kwargs.get("timestep", args[1] if len(args) > 1 else None)
    if time is None:
        raise ValueError("a scale that is a function of t, or a mode, needs a denoiser that takes `timestep`")
    return float(torch.as_tensor(time).flatten()[0])


def _lerp(base: Any, tuned: Any, w: float | Tensor) -> Any:
    """base + w (tuned - base) on a tensor, a tuple or an output object, in fp32."""
    x = sample_of(base)
    if isinstance(w, Tensor):
        w = attach_mode.column(w, x)
    return with_sample(tuned, (1 - w) * x.float() + w * sample_of(tuned).float())


def apply(pipe: Any, tuned: str | Path, scale: Weight = 1.0, mode: str = FULL) -> Guide:
    """Attach a tuned model to a diffusers pipeline and guide it with w = `scale`.

    tuned: one of our checkpoints, a PEFT folder, a diffusers or kohya LoRA file, or a full fine-tuned network (its
    folder, or a pipeline's), by path or hub id, in safetensors. A full one is a second network; what the two take is
    printed.
    mode: a cheaper way to run guidance, of `rlg.guidance_modes`; see `rlg.attach_mode` for which.
    Raises ValueError if the mode is unknown or does not fit, the pipeline has no denoiser, or the tuned model is
    missing, damaged or made for another base.
    """
    check_finite(scale)
    is_network = networks.is_network(tuned)
    attach_mode.parse(mode, is_network)  # before anything is loaded
    name = denoiser_name(pipe)
    before = getattr(vars(getattr(pipe, name)).get("forward"), "__self__", None)
    if isinstance(before, Guide) and before.tuned is not None:
        raise ValueError(f"the {name} is guided by a full network already; call remove() on its guide first")
    if not is_network:
        adapters.load(pipe, name, tuned)
        return Guide(pipe, getattr(pipe, name), scale, mode=mode)
    network = networks.load(pipe, name, tuned)
    print(networks.memory(getattr(pipe, name), network), file=sys.stderr)
    return Guide(pipe, getattr(pipe, name), scale, network, mode)
