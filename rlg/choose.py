"""Choose w: for a KL budget, a target reward, or a floor under the effective share, by bisection on a few prompts.

    python -m rlg.evaluate --ckpt ... --sampler sde --kl_budget 20
    python -m rlg.evaluate --ckpt ... --target_reward 0.8
    python -m rlg.evaluate --ckpt ... --min_ess 0.5          # as far as beta / w can be believed

All three move in one direction along w as long as guidance does what it claims: KL and reward rise, and from w = 1 on
the effective share falls. So do the first two under a schedule of w that is not constant, where w = 0 is not the base;
the effective share is unknown there. What is drawn at one w is paired with what is drawn at another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlg.stats import Row, effective_share

GOALS = ("kl_budget", "target_reward", "min_ess")  # options of the command
LARGEST = 8.0  # w beyond which nothing is looked for
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Goal:
    """What w is chosen by."""

    option: str  # one of GOALS
    value: float

    def __post_init__(self) -> None:
        if self.option == "kl_budget" and self.value <= 0:
            raise ValueError(f"--kl_budget must be positive, got {self.value:g}")
        if self.option == "min_ess" and not 0 < self.value < 1:
            raise ValueError(f"--min_ess must lie between 0 and 1, got {self.value:g}")

    @property
    def start(self) -> float:
        """The w to search from: there the quantity is on the near side of its goal."""
        return 1.0 if self.option == "min_ess" else 0.0

    def measure(self, rows: Sequence[Row], reward: str) -> float:
        """The quantity, signed so that it rises with w. Raises ValueError where the rows do not know it."""
        if self.option == "target_reward":
            return float(np.mean([row.rewards[reward] for row in rows]))
        if self.option == "kl_budget":
            known = [row.kl for row in rows if row.kl is not None]
            if not known:
                raise ValueError("--kl_budget needs a stochastic sampler (--sampler sde): an ODE has no path KL")
            return float(np.mean(known))
        share = effective_share(rows)
        if share is None:
            raise ValueError("--min_ess compares the images of a prompt; --k must be at least 2")
        return -share.mean

    @property
    def bound(self) -> float:
        """The goal, signed as `measure`."""
        return -self.value if self.option == "min_ess" else self.value


def bisect(rising: Callable[[float], float], bound: float, start: float, tolerance: float = _TOLERANCE) -> float:
    """The w at which a rising function reaches `bound`, to within `tolerance`, from below.

    Steps of one, two and four from `start` find an interval, which is halved.
    Raises ValueError if it is over the bound at `start`, or under it up to LARGEST.
    """
    low, value = start, rising(start)
    if value > bound:
        raise ValueError(f"at w = {start:g} it is {abs(value):.4g} already")
    high, stride = start, 1.0
    while value <= bound:
        if high >= LARGEST:
            raise ValueError(f"it is not reached: at w = {high:g} it is {abs(value):.4g}")
        low, high, stride = high, min(high + stride, LARGEST), 2 * stride
        value = rising(high)
    while high - low > tolerance:
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > bound else (middle, high)
    return low


def choose(goal: Goal, rows_at: Callable[[float], Sequence[Row]], reward: str) -> float:
    """w for a goal, rounded down to two digits; rows_at(w) makes and scores the calibration images of one w.

    Raises ValueError, naming the option, if the goal is met nowhere or everywhere.
    """
    try:
        w = bisect(lambda w: goal.measure(rows_at(w), reward), goal.bound, goal.start)
    except ValueError as error:
        raise ValueError(f"--{goal.option} {goal.value:g}: {error}") from error
    return int(w * 100) / 100
