"""The evaluator: images of a policy under guidance, scored, as rows (`python -m rlg.evaluate` is its command).

Base and adapter-enabled passes run on one network (a full fine-tuned network is a second one); several w share a
batch; w = 0 and w = 1 take one pass. Noise is a function of (seed, prompt, k), so all scales, modes and later runs are
paired. Beside the sweep (mode "rlg") it runs the two baselines that cost the same or less: the tuned model with twice
the steps ("tuned_2x_steps", equal network evaluations) and the LoRA scaled by w ("lora_scale", one pass; a full
network has none).

The work is cut into units (a few prompts, all their images, all scales) whose batches do not depend on the number of
processes; each process takes every n-th unit and appends its rows to a file of its own. Path KL is in nats, by
Girsanov with the variance that is really injected (stochastic samplers only).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rewards import RewardMix
from rlg import adapters, guidance, process, sampling
from rlg.eval_folder import IMAGES, ROWS, Job, job_of, read, save_images
from rlg.policy import Policy
from rlg.prompts import Prompt
from rlg.sampling import SampleId, SampleNoise
from rlg.stats import MODES, Row
from rlg.weight_schedule import CONSTANT, WeightSchedule

RLG, LORA_SCALE, TWICE = MODES
_ORIGIN = "origin"  # name of the adapter that guidance starts from, in the network
_DIVERSITY_SIDE = 16  # images are compared at 16x16: layout and colour, not texture


@dataclass(frozen=True)
class EvalSettings:
    """What decides the rows of an evaluation."""

    scales: tuple[float, ...]
    modes: tuple[str, ...]
    steps: int
    sampler: str  # a kernel of rlg.process
    level: float
    cfg: float
    resolution: int | None
    k: int  # images a prompt
    seed: int
    batch_size: int  # images a batch
    origin: str | None = None  # file of an adapter that guidance starts from instead of the base
    schedule: str = CONSTANT  # of w over the steps, for mode rlg: a form of rlg.weight_schedule

    def __post_init__(self) -> None:
        if not self.scales or not all(math.isfinite(w) for w in self.scales):
            raise ValueError(f"--scales must be finite numbers, got {list(self.scales)}")
        unknown = sorted(set(self.modes) - set(MODES))
        if unknown:
            raise ValueError(f"unknown mode {unknown[0]!r}; known: {', '.join(MODES)}")
        if min(self.k, self.steps, self.batch_size) < 1:
            raise ValueError("--k, --steps and --batch_size must be at least 1")
        WeightSchedule.parse(self.schedule)


@dataclass(frozen=True)
class Images:
    """A batch of finished jobs."""

    pixels_B3HW: Tensor  # [0, 1]
    kl_B: Tensor | None  # nats
    nfe_B: Tensor
    seconds_B: Tensor

    @staticmethod
    def cat(parts: Sequence[Images]) -> Images:
        """Join batches."""
        kl_B = None if parts[0].kl_B is None else torch.cat([part.kl_B for part in parts])
        rest = ([getattr(part, name) for part in parts] for name in ("pixels_B3HW", "nfe_B", "seconds_B"))
        pixels_B3HW, nfe_B, seconds_B = map(torch.cat, rest)
        return Images(pixels_B3HW, kl_B, nfe_B, seconds_B)


def plan(settings: EvalSettings, prompt_ids: Sequence[int], done: set[Job]) -> list[list[Job]]:
    """Units of work of one mode each (and of one w for `lora_scale`), without what is done.

    A prompt's images at one w stay together, as diversity compares them: unless all are there, all are made.
    """
    units: list[list[Job]] = []
    for mode, scales in _sweeps(settings):
        chunk = max(1, settings.batch_size // (settings.k * len(scales)))
        for start in range(0, len(prompt_ids), chunk):
            ids = prompt_ids[start : start + chunk]
            unit = [Job(p, k, w, mode) for p in ids for w in scales for k in range(settings.k)]
            units.append([job for job in unit if any(replace(job, k=k) not in done for k in range(settings.k))])
    return [unit for unit in units if unit]


def _sweeps(settings: EvalSettings) -> Iterator[tuple[str, tuple[float, ...]]]:
    if RLG in settings.modes:
        yield RLG, settings.scales
    if TWICE in settings.modes:
        yield TWICE, (1.0,)
    if LORA_SCALE in settings.modes:
        yield from ((LORA_SCALE, (w,)) for w in settings.scales if w not in (0.0, 1.0))


def modes_of(chosen: Sequence[str] | None, full: bool) -> tuple[str, ...]:
    """The modes of an evaluation, all that apply if none are chosen. Raises ValueError for one that does not."""
    if chosen is None:
        return tuple(mode for mode in MODES if not (full and mode == LORA_SCALE))
    if full and LORA_SCALE in chosen:
        raise ValueError(f"mode {LORA_SCALE} scales a LoRA, and the tuned model is a full network; leave it out")
    return tuple(chosen)


class Evaluator:
    """Makes and scores images of one policy. Raises ValueError for settings that do not fit it."""

    def __init__(self, policy: Policy, reward: RewardMix, prompts: Sequence[Prompt], settings: EvalSettings):
        if policy.tuned is not None:
            modes_of(settings.modes, full=True)
        if settings.origin is not None:
            policy.load_frozen_copy(_ORIGIN, Path(settings.origin))
        self.policy, self.reward, self.prompts, self.settings = policy, reward, prompts, settings
        self.negative = policy.encode([""])
        self.shape = policy.latent_shape(settings.resolution)
        policy.schedule(settings.steps, settings.sampler, settings.level)  # refused now rather than at the first batch

    def run(self, unit: Sequence[Job]) -> Iterator[tuple[Row, Tensor]]:
        """Rows of a unit with their images (3, H, W)."""
        size = self.settings.batch_size
        images = Images.cat([self.generate(unit[start : start + size]) for start in range(0, len(unit), size)])
        prompts = [self.prompts[job.prompt_id] for job in unit]
        scores = self.reward(images.pixels_B3HW, [p.text for p in prompts], [p.metadata for p in prompts])
        spread_B = diversity(images.pixels_B3HW, [(job.prompt_id, job.w) for job in unit])
        for i, (job, prompt) in enumerate(zip(unit, prompts, strict=True)):
            row = Row(
                **asdict(job),
                prompt=prompt.text,
                tag=None if "tag" not in prompt.metadata else str(prompt.metadata["tag"]),
                seed=self.settings.seed,
                sampler=self.settings.sampler,
                rewards={name: float(part[i]) for name, part in scores.parts.items()},
                kl=None if images.kl_B is None else float(images.kl_B[i]),
                diversity=spread_B[i],
                nfe=int(images.nfe_B[i]),
                seconds=float(images.seconds_B[i]),
            )
            yield row, images.pixels_B3HW[i]

    @torch.no_grad()
    def generate(self, unit: Sequence[Job]) -> Images:
        """Sample a batch of jobs of one mode. A batch's seconds are shared out by network evaluations."""
        mode, settings = unit[0].mode, self.settings
        steps = settings.steps * (2 if mode == TWICE else 1)
        schedule = self.policy.schedule(steps, settings.sampler, settings.level)
        weights_B = torch.ones(len(unit)) if mode != RLG else torch.tensor([job.w for job in unit])
        with adapters.scaled(self.policy.network, unit[0].w if mode == LORA_SCALE else 1.0):
            started = self._now()
            latents, kl_B, passes_B, wasted = self._sample(unit, schedule, weights_B)
            pixels = self.policy.decode(latents).cpu()
            seconds = self._now() - started - wasted
        nfe_B = passes_B * (2 if settings.cfg != 1.0 else 1)
        return Images(pixels, kl_B, nfe_B, seconds * nfe_B / nfe_B.sum())

    def _now(self) -> float:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)  # else one would time the launching of kernels
        return time.perf_counter()

    def _sample(
        self, unit: Sequence[Job], schedule: process.Schedule, weights_B: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, float]:
        """(latents, path KL, network passes, seconds spent on nothing but the KL)."""
        settings, policy = self.settings, self.policy
        base = guidance.with_cfg(policy.reference, self.negative, settings.cfg)
        tuned = guidance.with_cfg(policy.predict, self.negative, settings.cfg)
        cond = self._conditioning(unit)
        ids = [SampleId(settings.seed, job.prompt_id, job.k) for job in unit]
        noise = SampleNoise(ids, self.shape, policy.device)
        origin = base if settings.origin is None else self._origin()
        guided = guidance.rlg(origin, tuned, WeightSchedule.parse(settings.schedule).over(schedule, weights_B))
        x, kl_B, passes_B = noise.initial(), torch.zeros(len(unit)), torch.zeros(len(unit), dtype=torch.long)
        wasted = 0.0
        for i in range(len(schedule)):
            t_B = sampling.times(schedule, i, len(unit))
            out, base_out, known_B = guided.with_base(x, t_B, cond)
            passes_B += guided.passes(float(t_B[0]), len(unit))
            stochastic = bool(schedule.std[i] > 0)
            if stochastic:
                started = self._now()
                if origin is not base:
                    base_out, known_B = torch.zeros_like(out), torch.zeros_like(known_B)
                if not bool(known_B.all()):  # w = 1 skips the base, which the KL needs: an extra pass, off the clock
                    base_out = base_out + guidance.on_rows(base, ~known_B, x, t_B, cond)
                kl_B += sampling.path_kl_step(schedule, i, out, base_out).cpu()
                wasted += self._now() - started
            x = process.step(schedule, i, x, out, noise.step() if stochastic else None)
        return x, kl_B if schedule.stochastic_steps() else None, passes_B, wasted

    def _origin(self) -> guidance.Predictor:
        return guidance.with_cfg(partial(self.policy.predict_as, _ORIGIN), self.negative, self.settings.cfg)

    def _conditioning(self, unit: Sequence[Job]) -> Any:
        texts = [self.prompts[job.prompt_id].text for job in unit]
        unique = list(dict.fromkeys(texts))
        encoded = self.policy.encode(unique)
        return encoded[torch.tensor([unique.index(text) for text in texts], device=self.policy.device)]


def diversity(pixels_B3HW: Tensor, groups: Sequence[tuple[int, float]]) -> list[float | None]:
    """Mean RMS distance, at 16x16 pixels, of each image to the others of its group; None for a group of one."""
    small = torch.nn.functional.interpolate(pixels_B3HW, size=(_DIVERSITY_SIDE,) * 2, mode="area").flatten(1)
    members: dict[tuple[int, float], list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    result: list[float | None] = [None] * len(groups)
    for rows in members.values():
        if len(rows) > 1:
            exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}
            distance = torch.cdist(small[rows], small[rows], **exact) / math.sqrt(small.shape[1])
            for row, value in zip(rows, distance.sum(dim=1) / (len(rows) - 1), strict=True):
                result[row] = float(value)
    return result


def units_left(
    settings: EvalSettings, folder: Path, prompt_ids: Sequence[int], rank: int = 0, world: int = 1
) -> list[list[Job]]:
    """This process's share of what scores.jsonl lacks."""
    return plan(settings, prompt_ids, set(read(folder / ROWS)))[rank::world]


def progress(images: int, rank: int = 0) -> tqdm:
    """A bar over images, on the first process."""
    return tqdm(total=images, desc="evaluate", unit="image", disable=rank > 0, mininterval=1)


def evaluate(
    evaluator: Evaluator,
    folder: Path,
    prompt_ids: Sequence[int],
    keep_images: Callable[[Job], bool],
    rank: int = 0,
    world: int = 1,
    bar: tqdm | None = None,
) -> None:
    """Make this process's share of the rows that scores.jsonl lacks, with a progress bar (or on one of the caller's).

    Files of other processes are not looked at: they may have begun, and all must cut the work in the same way.
    """
    units = units_left(evaluator.settings, folder, prompt_ids, rank, world)
    shown = progress(sum(map(len, units)), rank) if bar is None else nullcontext(bar)
    with shown as bar, (folder / f"scores-{rank}.jsonl").open("a") as file:
        for unit in units:
            rows = list(evaluator.run(unit))
            save_images([(row, image) for row, image in rows if keep_images(job_of(row))], folder / IMAGES)
            file.write("".join(json.dumps(asdict(row)) + "\n" for row, _ in rows))
            file.flush()
            bar.update(len(unit))
