"""The modes of `rlg.guidance.modes` around a pipeline's own denoiser.

A mode goes through the steps of the pipeline's scheduler in order, and starts again with each call of the pipeline.
Some modes need more than the denoiser's call, and do not run: `random` needs the noise of each sample, and
`conditional` the branches of CFG. Instead of `interval`, a schedule of w is used. `full+batch` runs for networks whose
arguments are known to have the batch as their first dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlg.choices import BATCH, FULL, REUSE, REUSE_AT, SCALED, SCALED_BUT, TUNED
from rlg.guidance.modes import Mode, Trajectory
from rlg.integrations import guided_outputs
from rlg.integrations.guided_network import TUNED as TUNED_CACHES
from rlg.integrations.guided_network import GuidedNetwork, LoraSwitch
from rlg.integrations.pipeline_steps import PipelineSteps
from rlg.models import lora
from rlg.models.backbones.networks import call_of

KINDS = (FULL, TUNED, REUSE, REUSE_AT, SCALED, SCALED_BUT)
_COUNTING = (REUSE, REUSE_AT, SCALED_BUT)  # modes that do not treat all steps alike


def parse(text: str, full_network: bool) -> Mode:
    """A mode that a pipeline can run.

    Raises ValueError for any other, and for a mode that scales a LoRA on a full network.
    """
    mode = Mode.parse(text)
    if mode.kind not in KINDS or (mode.one_batch and mode.kind != FULL):
        known = ", ".join((*KINDS, FULL + BATCH))
        raise ValueError(f"mode {text} does not run on a plain pipeline; those that do: {known}")
    if full_network and (mode.one_batch or mode.kind in (SCALED, SCALED_BUT)):
        raise ValueError(f"mode {text} needs a LoRA, and the tuned model is a full network")
    return mode


def check_network(mode: Mode, network: GuidedNetwork, alone: bool) -> None:
    """Raise ValueError where a mode does not run on a network.

    alone: this is the only guided network of the pipeline.
    """
    if not alone and mode.kind in _COUNTING:
        raise ValueError(f"mode {mode} follows the calls of one denoiser, and several are guided; use mode {FULL}")
    if mode.one_batch and not call_of(network.bare).stacks:
        name = type(network.bare).__name__
        raise ValueError(f"mode {mode} is not known to stack the arguments of a {name}; use mode {FULL}")


def in_one_batch(network: GuidedNetwork, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """`(base output, tuned output)` of one pass of twice the batch.

    The outputs equal those of two passes up to rounding.
    """
    rows = len(guided_outputs.first((args, kwargs)))
    factor_N = torch.arange(2.0).repeat_interleave(rows)

    def twice(x: Tensor) -> Tensor:
        return torch.cat([x, x]) if x.ndim and len(x) == rows else x

    switch = network.switch
    assert isinstance(switch, LoraSwitch)
    args, kwargs = guided_outputs.mapped((args, kwargs), twice)
    with switch.state(tuned=True), lora.rows(network.bare, factor_N, switch.names):
        out = network.run(TUNED_CACHES, args, kwargs)
    halves = (slice(0, rows), slice(rows, None))
    base, tuned = (guided_outputs.mapped(out, lambda x, half=half: x[half]) for half in halves)
    return base, tuned


@dataclass(frozen=True)
class Passes:
    """The part of `modes.Models` that `Trajectory` uses, for one call.

    Outputs are fp32 tensors.
    """

    network: GuidedNetwork
    args: Any
    kwargs: Any
    made: list[Any] = field(default_factory=list)  # outputs in the denoiser's own form

    def base(self, *_: object) -> Tensor:
        """The base model's output."""
        return self._kept(self.network.base(self.args, self.kwargs))

    def tuned(self, *_: object) -> Tensor:
        """The tuned model's output."""
        return self._kept(self.network.tuned(self.args, self.kwargs))

    def both(self, *_: object) -> tuple[Tensor, Tensor]:
        """`(base output, tuned output)`."""
        return self.base(), self.tuned()

    def scaled(self, factor: float, *_: object) -> Tensor:
        """The output with the LoRA times a factor."""
        switch = self.network.switch
        assert isinstance(switch, LoraSwitch)
        with switch.scaled(factor):
            return self._kept(self.network.run(TUNED_CACHES, self.args, self.kwargs))

    def _kept(self, out: Any) -> Tensor:
        if guided_outputs.predictions(out) != 1:
            raise ValueError(f"the denoiser returns several tensors, of which a mode remembers one; use mode {FULL}")
        self.made.append(out)
        return guided_outputs.first(out).float()


class PipelineMode:
    """A mode along the calls of one denoiser of a pipeline."""

    def __init__(self, mode: Mode, network: GuidedNetwork, steps: PipelineSteps, scheduler: Callable[[], Any]):
        self.mode, self.network, self.steps, self._scheduler = mode, network, steps, scheduler
        self._counts = mode.kind in _COUNTING
        self._last = -1
        self._trajectory: Trajectory | None = None

    def __call__(self, w: float | Tensor, args: Any, kwargs: Any, step: int, begins: bool) -> Any:
        """The guided output of one call of the denoiser.

        It has the form of the denoiser's own output. Raises ValueError for several w where the LoRA is scaled, and for
        steps that do not exist. If a scheduler or pipeline calls the network several times a step, only a mode that
        treats all calls alike runs; others raise ValueError.
        """
        passes = Passes(self.network, args, kwargs)
        x = guided_outputs.first((args, kwargs))
        if isinstance(w, Tensor):
            if self.mode.kind in (SCALED, SCALED_BUT):
                raise ValueError(f"mode {self.mode} needs one w for the whole batch, got {len(w)}")
            w = guided_outputs.column(w, x)
        if begins or self._trajectory is None:
            self._begin()
        elif step == self._last and self._counts:
            several = "the pipeline calls its denoiser several times a step"
            raise ValueError(f"mode {self.mode}: {several}; use mode {FULL}")
        self._last = step
        self._trajectory.models, self._trajectory.w = passes, w  # type: ignore[assignment]
        now = self.steps.steps.t[step : step + 1]
        guided = self._trajectory(x, now, None)  # type: ignore[arg-type]
        return guided_outputs.with_first(passes.made[-1], guided)

    def _begin(self) -> None:
        order = getattr(self._scheduler(), "order", 1)
        if self._counts and order > 1:
            name = type(self._scheduler()).__name__
            raise ValueError(f"mode {self.mode}: {name} calls the network {order} times a step; use mode {FULL}")
        steps = self.steps.steps
        if self.mode.steps and max(self.mode.steps) >= len(steps):
            counted = f"the {len(steps)} steps begin with 0"
            raise ValueError(f"mode {self.mode}: there is no step {max(self.mode.steps)}, {counted}")
        self._trajectory = Trajectory(self.mode, None, 1.0, steps)  # type: ignore[arg-type]
