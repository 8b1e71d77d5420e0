"""The step of each call of a pipeline's denoiser.

A denoiser is given a time in its family's own unit (of 1000, of 1, or counted from the other end). The pipeline's
scheduler knows the steps, with their times and noise levels. The step with the nearest time is taken, because half
precision rounds times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlg.models.backbones.networks import call_of

_UNITS = (1.0, 1000.0)  # scheduler's time / denoiser's time
_TOLERANCE = 0.005  # relative error of a time: half the spacing of bfloat16, and the error of casts


@dataclass(frozen=True)
class Steps:
    """The steps of one pipeline call, for a schedule of w.

    They begin where the pipeline enters.
    """

    t: Tensor  # (T,) the scheduler's times, which fall towards the data
    sigma: Tensor  # (T + 1,) weight of the noise in x_t, in [0, 1]; 0 after the last step

    def __len__(self) -> int:
        return len(self.t)


class PipelineSteps:
    """The present step of one denoiser.

    It starts again when the pipeline is called again.
    """

    def __init__(self, scheduler: Callable[[], Any], network: object):
        self._scheduler, self._forward = scheduler, call_of(network).counts_up
        self._timesteps: Tensor | None = None
        self._units: tuple[float, ...] = _UNITS
        self._first = self._now = 0
        self.steps = Steps(torch.zeros(0), torch.zeros(1))

    def turn(self, t: float) -> tuple[int, bool]:
        """The step of a denoiser's call, and whether it begins a run.

        A run is a call of the pipeline, and its first step is 0. t: the time that the denoiser is given. Raises
        ValueError where no step of the scheduler has that time.
        """
        scheduler = self._scheduler()
        if scheduler.timesteps is not self._timesteps:
            self._units = _UNITS
        now = self._nearest(scheduler, t)
        begins = scheduler.timesteps is not self._timesteps or now < self._now
        if begins:
            self._timesteps, self._first = scheduler.timesteps, now
            self.steps = _steps(scheduler, now)
        self._now = now
        return now - self._first, begins

    def _nearest(self, scheduler: Any, t: float) -> int:
        """The step with the nearest time.

        The first call of a run settles the unit, because a time of 1 may be the first or the last.
        """
        known = scheduler.timesteps.detach().double().cpu()
        enters = getattr(scheduler, "begin_index", None) or 0
        found = []
        for unit in self._units:
            told = 1000 * (1 - t) if self._forward else unit * t
            distance = (known - told).abs() / max(abs(told), 1.0)
            step = int(distance.argmin())
            found.append((float(distance[step]), abs(step - enters), step, unit))
        distance, _, step, unit = min(found)
        if distance > _TOLERANCE:
            raise ValueError(f"the denoiser is called at t = {t:g}, and no step of the scheduler has that time")
        self._units = (unit,)
        return step


def _steps(scheduler: Any, first: int) -> Steps:
    t = scheduler.timesteps[first:].detach().float().cpu()
    if _rising(scheduler):
        t = scheduler.config.num_train_timesteps - t
    levels = [noise_level(scheduler, i) for i in range(first, len(scheduler.timesteps))]
    return Steps(t, torch.tensor([*levels, 0.0]))


def _rising(scheduler: Any) -> bool:
    """Tell whether times and sigmas rise towards the data, as in Mochi."""
    return bool(scheduler.config.get("invert_sigmas"))


def noise_level(scheduler: Any, i: int) -> float:
    """sigma of step i of a diffusers scheduler.

    It is the weight of the noise in x_t, in [0, 1] for every family. Flow models hold it as it is. Schedulers in EDM's
    terms hold sigma / alpha, and others the cumulative alphas. Raises ValueError for a scheduler that holds none of
    them.
    """
    config, sigmas = scheduler.config, getattr(scheduler, "sigmas", None)
    name = type(scheduler).__name__
    flow = name.startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"
    if flow or config.get("use_flow_sigmas"):
        return 1 - float(sigmas[i]) if _rising(scheduler) else float(sigmas[i])
    if sigmas is not None and len(sigmas) >= len(scheduler.timesteps):
        ratio = float(sigmas[i]) / float(config.get("sigma_data", 1.0))
        return ratio / (1 + ratio**2) ** 0.5
    if hasattr(scheduler, "alphas_cumprod"):
        return float((1 - scheduler.alphas_cumprod[int(scheduler.timesteps[i])]).sqrt())
    raise ValueError(f"{name} does not say its noise levels; give a function of t instead of a schedule by name")
