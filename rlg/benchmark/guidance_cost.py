"""Cost and fidelity of each way to run guidance, on one noise.

    cost        seconds of the denoising loop / those of the tuned model alone (one pass with its CFG), batch by batch
    kept        (R_mode - R_base) / (R_full - R_base), means over the same images; 1 is all of the gain of guidance
    beyond      (R_mode - R_tuned) / (R_full - R_tuned): of what w adds to the tuned model, where it adds anything
    distance    |x0_mode - x0_full| / |x0_tuned - x0_full|, root mean squares of latents: 0 is full guidance, 1 is w=1

Text is encoded before the clock starts, and images are decoded after it stops. Modes take turns on every batch
(`rlg.benchmark.timing.turns`), so a busy machine slows all of them. Intervals are over batches (cost) and prompts (the
rest), by `rlg.stats`.

Legend: R batches, N images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rewards import RewardMix
from rlg.benchmark import timing
from rlg.choices import CONDITIONAL, FULL, TUNED
from rlg.diffusion import sampling
from rlg.diffusion.conditioning import Predictor
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.guidance.guided import rlg
from rlg.guidance.modes import Mode, Models, sweep
from rlg.models.policy import Policy
from rlg.prompts import Prompt
from rlg.stats import Estimate, Estimated, paired_difference, ratio, summed

BASE = "base"
_ROOM = 1.05  # passes of the base cost less than those with a LoRA
Array = NDArray[np.float64]


@dataclass(frozen=True)
class CostSettings:
    """Settings that decide the images."""

    w: float
    steps: int
    kernel: str
    level: float
    cfg: float
    resolution: int | None = None
    batch_size: int = 16


@dataclass(frozen=True)
class Result:
    """Cost and fidelity of one mode."""

    mode: str
    exact: bool
    nfe: float  # network evaluations an image
    seconds: float  # an image, median over batches
    cost: Estimate  # ratio by the wall clock
    cpu_cost: Estimate  # ratio by this process's CPU seconds
    peak_bytes: int | None
    distance: Estimate
    reward: float | None = None  # mean
    to_full: Estimate | None = None  # reward less that of full guidance, paired
    kept: Estimate | None = None
    beyond: Estimate | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values of its fields.

        An interval is {"mean", "low", "high"}.
        """
        return asdict(self)


@dataclass(frozen=True)
class Samples:
    """Images of one mode, with their cost."""

    latents_NCHW: Tensor
    evaluations: int
    wall_R: Array  # seconds an image
    cpu_R: Array
    reward_N: Array | None


class Bench:
    """One policy with its prompts and a reward.

    Raises ValueError for settings that do not fit it.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Prompt], settings: CostSettings, reward: RewardMix | None):
        self.policy, self.prompts, self.settings, self.reward = policy, prompts, settings, reward
        self.schedule: Schedule = policy.schedule(
            settings.steps, settings.kernel, settings.level, resolution=settings.resolution
        )
        self.shape = policy.latent_shape(settings.resolution)
        self.negative = policy.encode([""])
        self._encoded = policy.encode([prompt.text for prompt in prompts])

    def batches(self, ids: Sequence[SampleId]) -> list[Sequence[SampleId]]:
        """Images cut into batches; the last may be smaller."""
        size = self.settings.batch_size
        return [ids[start : start + size] for start in range(0, len(ids), size)]

    @torch.no_grad()
    def denoise(self, name: str, ids: Sequence[SampleId], w: float | None = None) -> tuple[Tensor, int]:
        """(latents, network evaluations) of one batch in one mode.

        The mode "base" is w = 0.
        """
        models = self._models()
        w = self.settings.w if w is None else w
        mode, w = (FULL, 0.0) if name == BASE else (name, w)
        predict = Mode.parse(mode).begin(models, w, self.schedule, ids)
        return self._sample(predict, ids), models.evaluations

    @torch.no_grad()
    def denoise_sweep(self, scales: Sequence[float], ids: Sequence[SampleId], shared: bool) -> Tensor:
        """Latents of several w in one batch, image after image.

        shared: see `rlg.guidance.modes.sweep`.
        """
        rows = [each for each in ids for _ in scales]
        w_B = torch.tensor([float(w) for _ in ids for w in scales])
        models = self._models()
        guided = sweep(models, w_B, self.schedule, rows) if shared else rlg(models.base, models.tuned, w_B)
        return self._sample(guided, rows)

    def _models(self) -> Models:
        return Models(self.policy, self.negative, self.settings.cfg)

    def _sample(self, predict: Predictor, ids: Sequence[SampleId]) -> Tensor:
        cond = self._encoded[torch.tensor([each.prompt for each in ids], device=self.policy.device)]
        noise = SampleNoise(ids, self.shape, self.policy.device)
        return sampling.sample(predict, self.schedule, cond, noise)

    def check(self, names: Sequence[str]) -> None:
        """Raise ValueError for a mode that does not exist or fit.

        It comes before anything is run.
        """
        for name in names:
            Mode.parse(name).begin(self._models(), self.settings.w, self.schedule, [SampleId(0, 0, 0)])

    def run(self, names: Sequence[str], ids: Sequence[SampleId]) -> dict[str, Samples]:
        """Run every mode on every image, in turn on each batch."""
        made: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in names}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
        for r, batch in enumerate(self.batches(ids)):
            for name in timing.turns(names, r):
                go = partial(self.denoise, name, batch)
                wall, cpu = timing.stopwatch(lambda n=name, go=go: made[n].append(go()), self.policy.device)
                seconds[name].append((wall / len(batch), cpu / len(batch)))
        return {name: self._samples(rows, np.array(seconds[name]), ids) for name, rows in made.items()}

    def _samples(self, rows: list[tuple[Tensor, int]], seconds_R2: Array, ids: Sequence[SampleId]) -> Samples:
        latents = torch.cat([x for x, _ in rows])
        evaluations = sum(count for _, count in rows)
        return Samples(latents.cpu(), evaluations, seconds_R2[:, 0], seconds_R2[:, 1], self._score(latents, ids))

    def _score(self, latents_NCHW: Tensor, ids: Sequence[SampleId]) -> Array | None:
        if self.reward is None:
            return None
        prompts = [self.prompts[each.prompt] for each in ids]
        images = self.policy.decode(latents_NCHW).cpu()
        scores = self.reward(images, [p.text for p in prompts], [p.metadata for p in prompts])
        return next(iter(scores.parts.values())).double().numpy()

    def peaks(self, names: Sequence[str], ids: Sequence[SampleId]) -> dict[str, int | None]:
        """Bytes at each mode's peak over one batch.

        It is a warm-up, too.
        """
        return {name: timing.peak_memory(partial(self.denoise, name, ids), self.policy.device) for name in names}


def compare(samples: dict[str, Samples], ids: Sequence[SampleId], peaks: dict[str, int | None]) -> list[Result]:
    """Results of each mode.

    The base, the tuned model and full guidance are among them.
    """
    prompt_N = [each.prompt for each in ids]
    full, tuned, base = samples[FULL], samples[TUNED], samples[BASE]
    results = []
    for name, own in samples.items():
        rewards: dict[str, Any] = {}
        if own.reward_N is not None:
            rewards = {
                "reward": float(own.reward_N.mean()),
                "to_full": paired_difference(own.reward_N, full.reward_N, prompt_N),
                "kept": share(own.reward_N - base.reward_N, full.reward_N - base.reward_N, prompt_N),
                "beyond": share(own.reward_N - tuned.reward_N, full.reward_N - tuned.reward_N, prompt_N),
            }
        results.append(
            Result(
                mode=name,
                exact=name != BASE and Mode.parse(name).exact,
                nfe=own.evaluations / len(ids),
                seconds=float(np.median(own.wall_R)),
                cost=timing.ratio(own.wall_R, tuned.wall_R),
                cpu_cost=timing.ratio(own.cpu_R, tuned.cpu_R),
                peak_bytes=peaks.get(name),
                distance=distance(own.latents_NCHW, full.latents_NCHW, tuned.latents_NCHW, prompt_N),
                **rewards,
            )
        )
    return results


def share(part_N: Array, whole_N: Array, prompt_N: Sequence[int]) -> Estimate | None:
    """mean(part) / mean(whole), paired, with an interval over prompts.

    It is None where the interval of the whole reaches 0: a share of nothing would say nothing.
    """
    found = ratio(summed(part_N, prompt_N), summed(whole_N, prompt_N))
    return found if np.isfinite([found.low, found.high]).all() else None


def distance(x_NCHW: Tensor, full_NCHW: Tensor, tuned_NCHW: Tensor, prompt_N: Sequence[int]) -> Estimate:
    """Distance to full guidance, as a share of the tuned model's.

    Distances are root mean squares. The interval is over prompts.
    """
    squares = (((each - full_NCHW) ** 2).flatten(1).mean(dim=1).double().numpy() for each in (x_NCHW, tuned_NCHW))
    own, tuned = (summed(square_N, prompt_N) for square_N in squares)
    if own.mean == 0 or tuned.mean == 0:
        return Estimate(*[0.0 if own.mean == 0 else float("inf")] * 3)
    residual_G = own.residual_G / own.mean - tuned.residual_G / tuned.mean
    # take logarithms, because a distance is not negative
    log = Estimated(float(np.log(own.mean / tuned.mean)), residual_G).interval()
    return Estimate(*(float(np.exp(end / 2)) for end in (log.mean, log.low, log.high)))


def candidates(schedule: Schedule, cfg: float, w: float, full: bool, budget: float) -> list[str]:
    """Modes and parameters that a budget may choose from.

    Those of too many passes (with some room) are left out. full: whether the tuned model is a full network, which has
    no LoRA to scale.
    """
    steps = len(schedule)
    listed = ("0", "1", "2", "0,1", "0,2", "0,3", "1,3", "1,4", "2,5", "0,1,2", "0,1,3", "0,2,5", "0,1,2,3", "0,1,3,6")
    names = [f"reuse:{n}" for n in (2, 3, 4, 5, 8)] + ["reuse:2:linear", "reuse:4:linear"]
    names += [f"reuse_at:{text}" for text in listed] + ["interval:0.7:1", "interval:0.9:1"]
    if not full:
        names += ["scaled:0.7", "scaled:0.85", "scaled", *(f"scaled_but:{text}" for text in listed)]
    if cfg != 1:
        names += ["conditional", "conditional:equal"]
    if schedule.stochastic_steps() and 0 <= w <= 1:
        names.append("random")
    modes = {name: Mode.parse(name) for name in names}
    fitting = {name: mode for name, mode in modes.items() if max(mode.steps, default=0) < steps}
    return [name for name, mode in fitting.items() if _passes(mode, schedule) <= _ROOM * budget]


def _passes(mode: Mode, schedule: Schedule) -> float:
    """Passes a step; those of the tuned model are 1."""
    return 1.5 if mode.kind == CONDITIONAL else 1 + sum(mode.refreshes(schedule)) / len(schedule)


def pick(results: Sequence[Result], budget: float, clock: str) -> tuple[Result, Result]:
    """Choose the mode that keeps most gain, and the nearest one.

    Both are within the budget. They may differ, because a mode may gain as much by other images. A gain of full
    guidance is enough: of the modes that reach it, the nearest keeps most. Without rewards both are the mode nearest
    to full guidance. clock: "cost" or "cpu_cost". Raises ValueError if nothing is within the budget.
    """
    within = [r for r in results if r.mode not in (BASE, FULL) and getattr(r, clock).mean <= budget]
    if not within:
        raise ValueError(f"no way to run guidance costs at most {budget:g} times the tuned model; raise --budget")
    nearest = min(within, key=lambda r: r.distance.mean)
    return max(within, key=lambda r: (min(r.kept.mean, 1.0) if r.kept else 0.0, -r.distance.mean)), nearest
