"""Mixes of rewards, built by name.

A mix is checked, and scored part by part and in total.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.calls import Batch, CheckedReward, Reward, RewardError, place, score
from rewards.table import REWARDS, RewardSpec, lookup
from rlg import extras

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_PIXEL_SLACK = 1e-3  # distance from [0, 1] to which rounding may take a pixel


@dataclass(frozen=True)
class RewardScores:
    """Scores of B images by a mix, fp32 on CPU."""

    total_B: Tensor  # sum over rewards of weight * part
    parts: dict[str, Tensor]  # name -> (B,) raw scores, before the weight


@dataclass(frozen=True)
class RewardMix:
    """A weighted sum of rewards, which are checked on every call.

    Raises ValueError for no rewards at all, or weights that are not as many finite numbers.
    """

    rewards: Mapping[str, Reward]
    weights: tuple[float, ...]  # one per reward, in order; a reward of weight 0 is scored and logged
    waits: frozenset[str] = frozenset()  # names of the rewards that mostly wait for a server; see rewards.background
    lenient: bool = False  # make a score that is not finite, or missing, NaN and no error; the caller leaves it out
    seconds: float = 1800.0  # limit of a call to a reward that does not wait for a server; 0: none

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(f"no reward is named; known: {', '.join(REWARDS)}")
        if len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards ({', '.join(self.names)}) but {len(self.weights)} weights")
        for name, weight in zip(self.names, self.weights, strict=True):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in the order of the weights."""
        return tuple(self.rewards)

    @property
    def models(self) -> dict[str, str]:
        """Models by reward, where a reward names its own."""
        return {name: r.model for name, r in self.rewards.items() if isinstance(r, CheckedReward) and r.model}

    def unscorable(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> dict[str, dict[int, str]]:
        """Prompts that a reward knows it cannot score.

        Returns reward -> index of the prompt -> reason. Rewards that can score all are left out.
        """
        checked = {
            name: r.check(prompts, metadata) for name, r in self.rewards.items() if isinstance(r, CheckedReward)
        }
        return {name: reasons for name, reasons in checked.items() if reasons}

    def check(self, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
        """Raise ValueError if a reward cannot score one of the prompts.

        This comes before an image is made.
        """
        for name, reasons in self.unscorable(prompts, metadata).items():
            first = min(reasons)
            raise ValueError(
                f"reward {name!r} cannot score {len(reasons)} of the {len(prompts)} prompts; the first is number "
                f"{first + 1}, {textwrap.shorten(prompts[first], 200)!r}: {reasons[first]}"
            )

    def __call__(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> RewardScores:
        """Total and parts for B images in [0, 1].

        Raises ValueError for images of another shape, type or range, and where the numbers of images, prompts and
        metadata differ. Raises RewardError for a reward that raises, takes too long, or returns another shape, NaN or
        an infinity (see `lenient`).
        """
        return self.weigh(self.parts(self.names, images_B3HW, prompts, metadata))

    def parts(
        self, names: Collection[str], images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """name -> (B,) raw scores by some of the rewards.

        Raises as the whole mix does.
        """
        check_batch(images_B3HW, prompts, metadata)
        import torch  # here, because the table of rewards is read without torch

        with torch.no_grad():
            return {name: self._part(name, images_B3HW, prompts, metadata) for name in names}

    def _part(
        self, name: str, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        seconds = 0.0 if name in self.waits else self.seconds
        batch = Batch(name, self.rewards[name], images_B3HW, list(prompts), list(metadata), seconds)
        scores_B = score(batch, self.lenient)
        broken = (~scores_B.isfinite()).nonzero()
        if len(broken) and not self.lenient:
            index = int(broken[0])
            raise RewardError(f"reward {name!r} returned {scores_B[index].item()} for {place(index, prompts)}")
        return scores_B.where(scores_B.isfinite(), math.nan)

    def weigh(self, parts: Mapping[str, Tensor]) -> RewardScores:
        """The total of every reward's (B,) scores.

        Raises RewardError where fp32 does not hold the total; `lenient` makes it NaN.
        """
        import torch

        ordered = {name: parts[name] for name in self.names}
        total_B = torch.zeros(len(ordered[self.names[0]]))
        missing_B = torch.zeros_like(total_B, dtype=torch.bool)
        for part_B, weight in zip(ordered.values(), self.weights, strict=True):
            total_B += weight * (part_B if weight else part_B.nan_to_num())  # a reward of weight 0 is only logged
            missing_B |= part_B.isnan() & (weight != 0)
        over_B = ~total_B.isfinite() & ~missing_B
        if over_B.any() and not self.lenient:
            raise RewardError(self._overflow(int(over_B.nonzero()[0]), ordered))
        return RewardScores(total_B.where(total_B.isfinite(), math.nan), ordered)

    def _overflow(self, index: int, parts: Mapping[str, Tensor]) -> str:
        """Words for a total that fp32 does not hold.

        They name the reward that adds most to it.
        """
        scores = {name: float(parts[name][index]) for name in self.names}
        weights = dict(zip(self.names, self.weights, strict=True))
        most = max(self.names, key=lambda name: abs(weights[name] * scores[name]))
        returned = f"reward {most!r} returned {scores[most]:.4g} for image {index}"
        return f"{returned}, and with its weight, {weights[most]:g}, the total is over what fp32 holds"


def build(
    names: Sequence[str], weights: Sequence[float] | None = None, device: torch.device | str = "cpu"
) -> RewardMix:
    """Load the named rewards, each as NAME or NAME=SOURCE, on a device.

    All weights are 1 unless given. Raises ValueError for an unknown name, one whose packages are not installed, a
    duplicate, or unfit weights; ServerError when a reward's server does not answer.
    """
    if isinstance(names, str):
        raise ValueError(f"the rewards must be a list of names, got the string {names!r}")
    asked = [(text.partition("=")[0], text.partition("=")[2] or None, lookup(text)) for text in map(str, names)]
    specs = {name: spec for name, _, spec in asked}
    if len(specs) < len(names):
        plain = [name for name, _, _ in asked]
        twice = sorted({name for name in plain if plain.count(name) > 1})
        raise ValueError(f"reward named more than once: {', '.join(twice)}; give it one weight instead")
    for name, spec in specs.items():
        if missing := spec.missing():
            raise ValueError(f"reward {name!r} needs {', '.join(missing)}: {extras.install(spec.extra)}")
    chosen = (1.0,) * len(names) if weights is None else tuple(weights)
    RewardMix(dict.fromkeys(specs, _unloaded), chosen)  # refuses unfit weights before anything is downloaded
    rewards = {name: _load(spec, device, source) for name, source, spec in asked}
    return RewardMix(rewards, chosen, frozenset(name for name, spec in specs.items() if spec.waits))


def _unloaded(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    raise AssertionError("a reward that was never loaded")


def _load(spec: RewardSpec, device: torch.device | str, source: str | None) -> Reward:
    module, function = spec.factory.split(":")
    try:
        return getattr(importlib.import_module(module), function)(device, source)
    except SystemExit as error:  # a library may call it, as if this were its own program
        raise RewardError(f"{spec.factory} called sys.exit({error.code!r})") from error


def check_batch(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
    """Raise ValueError for what is no batch of images in [0, 1].

    The numbers of images, prompts and metadata must agree, too.
    """
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or not images_B3HW.is_floating_point():
        shape = tuple(images_B3HW.shape)
        raise ValueError(f"images must be a float tensor (B, 3, H, W), got {images_B3HW.dtype} {shape}")
    if not len(images_B3HW) == len(prompts) == len(metadata):
        raise ValueError(f"{len(images_B3HW)} images, but {len(prompts)} prompts and {len(metadata)} metadata")
    if images_B3HW.numel() == 0:
        return
    low_B, high_B = images_B3HW.flatten(1).aminmax(dim=1)
    inside_B = (low_B >= -_PIXEL_SLACK) & (high_B <= 1 + _PIXEL_SLACK)  # false for NaN
    if not inside_B.all():
        index = int((~inside_B).nonzero()[0])
        span = f"from {low_B[index]:.3g} to {high_B[index]:.3g}"
        raise ValueError(f"{place(index, prompts)} has pixels {span}; rewards take images in [0, 1]")
