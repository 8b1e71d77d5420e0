"""The modes of `rlg.guidance_modes` around a pipeline's own denoiser, which sees neither prompts nor branches of CFG.

A mode goes through the steps of the pipeline's scheduler in turn, and begins anew with each call of the pipeline: that
is where the scheduler gets new timesteps, or the time goes up. Left out is what needs more than the denoiser's call:
noise of each sample (random), the branches of CFG (conditional), noise levels (interval; a scale that is a function of
t does the same), rows of two models in one batch (+batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlg import adapters
from rlg.guidance_modes import FULL, REUSE, REUSE_AT, SCALED, SCALED_BUT, TUNED, Mode, Trajectory

KINDS = (FULL, TUNED, REUSE, REUSE_AT, SCALED, SCALED_BUT)


def parse(text: str, full_network: bool) -> Mode:
    """A mode that a pipeline can run. Raises ValueError for any other, and for a LoRA's on a full network."""
    mode = Mode.parse(text)
    if mode.kind not in KINDS or mode.one_batch:
        raise ValueError(f"mode {text} does not run on a plain pipeline; those that do: {', '.join(KINDS)}")
    if full_network and mode.kind in (SCALED, SCALED_BUT):
        raise ValueError(f"mode {text} scales a LoRA, and the tuned model is a full network")
    return mode


@dataclass(frozen=True)
class Passes:
    """What `Trajectory` asks of `guidance_modes.Models`, for one call of the denoiser; outputs are fp32 tensors."""

    network: nn.Module
    run_base: Callable[[], Any]
    run_tuned: Callable[[], Any]
    made: list[Any] = field(default_factory=list)  # outputs as the denoiser gives them

    def base(self, *_: object) -> Tensor:
        """The base model's output."""
        return self._kept(self.run_base())

    def tuned(self, *_: object) -> Tensor:
        """The tuned model's output."""
        return self._kept(self.run_tuned())

    def both(self, *_: object) -> tuple[Tensor, Tensor]:
        """(base output, tuned output)."""
        return self.base(), self.tuned()

    def scaled(self, factor: float, *_: object) -> Tensor:
        """The output with the LoRA times a factor."""
        with adapters.scaled(self.network, factor):
            return self.tuned()

    def _kept(self, out: Any) -> Tensor:
        self.made.append(out)
        return sample_of(out).float()


@dataclass(frozen=True)
class Steps:
    """The times of a pipeline's steps, as `Trajectory` asks a schedule for them."""

    t: Tensor

    def __len__(self) -> int:
        return len(self.t)


class PipelineMode:
    """A mode along the calls of a pipeline."""

    def __init__(self, mode: Mode, pipe: Any):
        self.mode, self.pipe = mode, pipe
        self._timesteps: Tensor | None = None
        self._last = 0.0  # time of the last call

    def __call__(self, passes: Passes, w: float | Tensor, x: Tensor, t: float) -> Any:
        """The guided output of one call of the denoiser, at time t, in the form of the denoiser's own output.

        Raises ValueError for a scheduler or pipeline that calls the network several times a step, unless the mode
        takes every call alike; for several w where the LoRA is scaled; and for steps that there are not.
        """
        if isinstance(w, Tensor):
            if self.mode.kind in (SCALED, SCALED_BUT):
                raise ValueError(f"mode {self.mode} needs one w for the whole batch, got {len(w)}")
            w = column(w, x)
        now = self._turn(t)
        self._trajectory.models, self._trajectory.w = passes, w  # type: ignore[assignment]
        guided = self._trajectory(x, torch.tensor([now]), None)  # type: ignore[arg-type]
        return with_sample(passes.made[-1], guided)

    def _turn(self, t: float) -> float:
        """The scheduler's time of this call: that of the step behind the last one's."""
        timesteps = self.pipe.scheduler.timesteps
        if timesteps is not self._timesteps or t > self._last:
            self._begin(timesteps, t)
        elif t == self._last and self._counts:
            raise ValueError(
                f"mode {self.mode}: the pipeline calls its denoiser several times a step; use mode {FULL}"
            )
        else:
            self._next += 1
        self._last = t
        if self._counts and self._next >= len(self._times):
            raise ValueError(f"mode {self.mode}: more calls of the denoiser than the {len(self._times)} steps")
        return self._times[self._next if self._counts else 0]

    def _begin(self, timesteps: Tensor, t: float) -> None:
        self._counts = self.mode.kind in (REUSE, REUSE_AT, SCALED_BUT)
        order = getattr(self.pipe.scheduler, "order", 1)
        if self._counts and order > 1:
            name = type(self.pipe.scheduler).__name__
            raise ValueError(f"mode {self.mode}: {name} calls the network {order} times a step; use mode {FULL}")
        every = [float(each) for each in timesteps]
        self._times = every[every.index(t) if t in every else 0 :]  # image to image enters on the way
        if self.mode.steps and max(self.mode.steps) >= len(self._times):
            steps = f"the {len(self._times)} steps begin with 0"
            raise ValueError(f"mode {self.mode}: there is no step {max(self.mode.steps)}, {steps}")
        self._timesteps, self._next = timesteps, 0
        self._trajectory = Trajectory(self.mode, None, 1.0, Steps(torch.tensor(self._times)))  # type: ignore[arg-type]


def column(w_B: Tensor, x: Tensor) -> Tensor:
    """Weights that broadcast over what the denoiser takes. Raises ValueError for other than one a row of it."""
    if len(w_B) != len(x):
        raise ValueError(f"{len(w_B)} guidance weights for a batch of {len(x)} (2 per image under CFG)")
    return w_B.to(x.device).reshape(-1, *[1] * (x.ndim - 1))


def sample_of(out: Any) -> Tensor:
    """The tensor in what a denoiser returns: itself, the first of a tuple, or the `sample` of an output object."""
    if isinstance(out, Tensor):
        return out
    return out[0] if isinstance(out, tuple) else out.sample


def with_sample(out: Any, sample: Tensor) -> Any:
    """What a denoiser returned with another tensor in it, in the precision of the one that was there."""
    sample = sample.to(sample_of(out).dtype)
    if isinstance(out, Tensor):
        return sample
    if isinstance(out, tuple):
        return (sample, *out[1:])
    out.sample = sample
    return out
