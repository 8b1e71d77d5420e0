"""Choose w: for a KL budget, a target reward, or a floor under the effective share, by bisection on a few prompts.

    python -m rlg.evaluate --ckpt ... --kernel sde --kl_budget 20
    python -m rlg.evaluate --ckpt ... --target_reward 0.8
    python -m rlg.evaluate --ckpt ... --min_ess 0.5          # as far as beta / w can be believed

All three move in one direction along w as long as guidance does what it claims: KL and reward rise, and from w = 1 on
the effective share falls. So do the first two under a schedule of w that is not constant, where w = 0 is not the base;
the effective share is unknown there. What is drawn at one w is paired with what is drawn at another. The prompts that
w is chosen on are left out of the report.

K images show no effective share under 1/K, whatever the law's is, and more than it on average. So at least 16 images
and twice as many are compared: what falls with K is taken out once more (2 share of 2 K - share of K, which leaves a
bias of 1 / K^2), and a w at which it is over a fifth is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlg.evaluation.rows import Row
from rlg.evaluation.summary import effective_share

GOALS = ("kl_budget", "target_reward", "min_ess")  # options of the command
LARGEST = 8.0  # w beyond which nothing is looked for
LEAST_IMAGES = 16  # of a prompt, that an effective share is taken of
MOST_MOVED = 1.2  # share of K images / share of 2 K images
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

    def images(self, k: int) -> int:
        """How many images a prompt it is measured on, k being those of the evaluation."""
        return 2 * max(k, LEAST_IMAGES) if self.option == "min_ess" else k

    def measure(self, rows: Sequence[Row], reward: str) -> float:
        """The quantity, signed so that it rises with w. Raises ValueError where the rows do not know it."""
        if self.option == "target_reward":
            return float(np.mean([row.rewards[reward] for row in rows]))
        if self.option == "kl_budget":
            known = [row.kl for row in rows if row.kl is not None]
            if not known:
                raise ValueError("--kl_budget needs a stochastic sampler (--kernel sde): an ODE has no path KL")
            return float(np.mean(known))
        few, many = _shares(rows)
        return -(2 * many - few)

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


def _shares(rows: Sequence[Row]) -> tuple[float, float]:
    """Effective shares of halves of a prompt's images, on average, and of all of them."""
    half = (1 + max(row.k for row in rows)) // 2
    parts = ([row for row in rows if (row.k < half) is first] for first in (True, False))
    few, many = ([share.mean for part in group if (share := effective_share(part))] for group in (parts, [rows]))
    return float(np.mean(few)), many[0]


@dataclass(frozen=True)
class Choice:
    """A w, and where it was chosen by the effective share, that share and how many images a prompt it is of."""

    w: float
    share: float | None = None
    images: int | None = None


def choose(goal: Goal, rows_at: Callable[[float, int], Sequence[Row]], reward: str, k: int) -> Choice:
    """w for a goal, rounded down to two digits; rows_at(w, k) makes and scores k calibration images a prompt at one w.

    Raises ValueError, naming the option, if the goal is met nowhere or everywhere, or if images are too few to tell.
    """
    images = goal.images(k)
    try:
        w = int(100 * bisect(lambda w: goal.measure(rows_at(w, images), reward), goal.bound, goal.start)) / 100
        return _confirmed(w, rows_at(w, images), images) if goal.option == "min_ess" else Choice(w)
    except ValueError as error:
        raise ValueError(f"--{goal.option} {goal.value:g}: {error}") from error


def _confirmed(w: float, rows: Sequence[Row], images: int) -> Choice:
    """The choice of w. Raises ValueError where half as many images show another share."""
    few, many = _shares(rows)
    if few > MOST_MOVED * many:
        raise ValueError(
            f"at w = {w:g} {images // 2} images a prompt show an effective share of {few:.0%} and {images} of "
            f"{many:.0%}: too few to know it; ask for a larger share, or give a larger --k"
        )
    return Choice(w, 2 * many - few, images)
