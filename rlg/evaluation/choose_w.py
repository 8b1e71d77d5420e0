"""Choice of w for a goal, by bisection on a few prompts.

    python -m rlg.evaluate --ckpt ... --kernel sde --kl_budget 20
    python -m rlg.evaluate --ckpt ... --target_reward 0.8
    python -m rlg.evaluate --ckpt ... --min_ess 0.5          # the largest w at which beta / w can be trusted

KL and reward rise with w, and from w = 1 on the effective share falls, as long as guidance works. Under a schedule of
w that is not constant, KL and reward still rise, and the effective share is unknown. Draws at different w are paired.
The report leaves out the prompts that w is chosen on. The share of K images is at least 1/K, and its mean is larger
than the true share. So at least 16 images and twice as many are compared, and the part that falls with K is removed:

    2 share of 2 K - share of K          bias 1 / K^2; if the two shares differ by more than a fifth, w is refused
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rlg.evaluation.rows import Row
from rlg.evaluation.summary import effective_share

GOALS = ("kl_budget", "target_reward", "min_ess")  # options of the command
LARGEST = 8.0  # the search does not go beyond this w
LEAST_IMAGES = 16  # images a prompt for an effective share
MOST_MOVED = 1.2  # largest ratio of the share of K images to that of 2 K
_TOLERANCE = 0.02


@dataclass(frozen=True)
class Goal:
    """A goal by which w is chosen."""

    option: str  # one of GOALS
    value: float

    def __post_init__(self) -> None:
        if self.option == "kl_budget" and self.value <= 0:
            raise ValueError(f"--kl_budget must be positive, got {self.value:g}")
        if self.option == "min_ess" and not 0 < self.value < 1:
            raise ValueError(f"--min_ess must lie between 0 and 1, got {self.value:g}")

    @property
    def start(self) -> float:
        """The w at which the search starts.

        There, the quantity has not yet reached its goal.
        """
        return 1.0 if self.option == "min_ess" else 0.0

    def images(self, k: int) -> int:
        """The number of images a prompt for the measurement.

        k: the number of the evaluation.
        """
        return 2 * max(k, LEAST_IMAGES) if self.option == "min_ess" else k

    def measure(self, rows: Sequence[Row], reward: str) -> float:
        """The measured quantity, signed so that it rises with w.

        Raises ValueError where the rows do not have it.
        """
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
        """The goal's value, signed as in `measure`."""
        return -self.value if self.option == "min_ess" else self.value


def bisect(rising: Callable[[float], float], bound: float, start: float, tolerance: float = _TOLERANCE) -> float:
    """The largest w at which a rising function is below `bound`.

    It is found to within `tolerance`. Steps of one, two and four from `start` find an interval, which is halved.
    Raises ValueError if the function is over the bound at `start`, or under it up to LARGEST.
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
    """Effective shares of half of the images, and of all.

    The first is the mean over the two halves of a prompt's images.
    """
    half = (1 + max(row.k for row in rows)) // 2
    parts = ([row for row in rows if (row.k < half) is first] for first in (True, False))
    few, many = ([share.mean for part in group if (share := effective_share(part))] for group in (parts, [rows]))
    return float(np.mean(few)), many[0]


@dataclass(frozen=True)
class Choice:
    """A chosen w, with the effective share that it was chosen by.

    The share and its number of images a prompt are None for other goals.
    """

    w: float
    share: float | None = None
    images: int | None = None


def choose(goal: Goal, rows_at: Callable[[float, int], Sequence[Row]], reward: str, k: int) -> Choice:
    """The w for a goal, rounded down to two digits.

    rows_at: makes and scores k calibration images a prompt at w, as rows_at(w, k). Raises ValueError, naming the
    option, if no w or every w meets the goal, or if there are too few images.
    """
    images = goal.images(k)
    try:
        w = int(100 * bisect(lambda w: goal.measure(rows_at(w, images), reward), goal.bound, goal.start)) / 100
        return _confirmed(w, rows_at(w, images), images) if goal.option == "min_ess" else Choice(w)
    except ValueError as error:
        raise ValueError(f"--{goal.option} {goal.value:g}: {error}") from error


def _confirmed(w: float, rows: Sequence[Row], images: int) -> Choice:
    """The choice of w.

    Raises ValueError where half as many images have another share.
    """
    few, many = _shares(rows)
    if few > MOST_MOVED * many:
        raise ValueError(
            f"at w = {w:g} {images // 2} images a prompt show an effective share of {few:.0%} and {images} of "
            f"{many:.0%}: too few to know it; ask for a larger share, or give a larger --k"
        )
    return Choice(w, 2 * many - few, images)
