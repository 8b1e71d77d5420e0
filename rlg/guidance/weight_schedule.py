"""Schedules of the guidance weight over the denoising steps.

    w_t = 1 + share(t) (w - 1)          share = 1: the full w      share = 0: the tuned model alone, in one pass

    constant              share = 1
    interval:LOW:HIGH     share = 1 where LOW < sigma <= HIGH, else 0 (arXiv 2404.07724, applied to w)
    linear_down           share = t / t_first: sampling starts at w and comes down to 1 at the data (t = 0)
    linear_up             share = 1 - t / t_first: it starts at 1, in one pass, and goes up to w at the data

    sigma     weight of the noise in x_t, in [0, 1] (`Schedule.sigma`): t / 1000 for flow models, else sqrt(1 - abar)
    alpha     1 - sigma for flow models, else sqrt(abar); the paper's intervals are in EDM's sigma, here sigma / alpha
    t_first   the network's time at the noisiest step of the schedule

w = 1 is the tuned model under every schedule. w = 0 is the base only under `constant`.

Legend: B samples, T denoising steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rlg.choices import CONSTANT, DOWN, INTERVAL, SCHEDULES, UP
from rlg.diffusion.process import Schedule
from rlg.guidance.guided import Weight

_DIGITS = 6  # sigma is rounded, because 0.6 in fp32 is above the 0.6 that a user writes


@dataclass(frozen=True)
class WeightSchedule:
    """The share of w - 1 that each denoising step gets."""

    kind: str  # constant, interval, linear_down or linear_up
    low: float = 0.0  # noise levels of an interval
    high: float = 1.0

    @classmethod
    def parse(cls, text: str) -> WeightSchedule:
        """One of `SCHEDULES`.

        Raises ValueError for anything else, and for bounds outside 0 <= LOW <= HIGH <= 1.
        """
        kind, *bounds = text.split(":")
        if kind not in (CONSTANT, INTERVAL, DOWN, UP) or len(bounds) != (2 if kind == INTERVAL else 0):
            raise ValueError(f"unknown schedule of w {text!r}; known: {', '.join(SCHEDULES)}")
        try:
            low, high = map(float, bounds or (0, 1))
        except ValueError as error:
            raise ValueError(f"the bounds of {text!r} must be numbers") from error
        if not (math.isfinite(low) and math.isfinite(high) and 0 <= low <= high <= 1):
            raise ValueError(f"the bounds of {text!r} must be noise levels, 0 <= LOW <= HIGH <= 1")
        return cls(kind, low, high)

    def __str__(self) -> str:
        return f"{self.kind}:{self.low:g}:{self.high:g}" if self.kind == INTERVAL else self.kind

    def shares(self, schedule: Schedule) -> list[float]:
        """(T,) share of w - 1 at each step, in [0, 1].

        Raises ValueError for a linear schedule over times that are logarithms, which some schedulers of EDM have.
        """
        t_T, sigma_T = schedule.t.tolist(), schedule.sigma[:-1].tolist()
        if self.kind == INTERVAL:
            return [float(self.low < round(sigma, _DIGITS) <= self.high) for sigma in sigma_T]
        if self.kind == CONSTANT:
            return [1.0] * len(t_T)
        if min(t_T) < 0:
            raise ValueError(f"the schedule {self} needs times that fall to 0, and the scheduler's are logarithms")
        return [t / t_T[0] if self.kind == DOWN else 1 - t / t_T[0] for t in t_T]

    def over(self, schedule: Schedule, w_B: Tensor) -> Weight:
        """The w_t of each sample, as a function of time.

        The function takes one of the schedule's own times and returns (B,) on the CPU. At the two ends it is exactly
        w_B or 1. w_B: each sample's w.
        """
        if self.kind == CONSTANT:
            return w_B
        share_of = dict(zip(schedule.t.tolist(), self.shares(schedule), strict=True))
        return lambda t: torch.lerp(torch.ones_like(w_B), w_B, share_of[t])
