"""Sampling and scoring of images under guidance, for `rlg.evaluate`.

Base and tuned passes run on one network (a full fine-tuned network is a second one). Several w share a batch, and w =
0 and w = 1 take one pass. Noise is a function of (seed, prompt, k), so that all w, methods and later runs are paired.
The work is cut into units (a few prompts, all their images, all w). Their batches do not depend on the number of
processes. Each process takes every n-th unit and appends its rows to its own file.

    rlg               the sweep over w, with any schedule of w; its rows hold the corrector's weights, `log_weight`
    tuned_2x_steps    the tuned model with twice the steps: equal network evaluations
    lora_scale        the LoRA times w: one pass; not for a full network
    rlg_ls            base or tuned model, drawn at each step (`rlg.guidance.blend`): one pass; on request
    corrected         images resampled towards base^(1-w) tuned^w (`rlg.guidance.corrector`); on request
    path KL           nats, by Girsanov with the injected variance; not for an ODE, and not for "corrected"

The values of `log_weight`, rlg_ls and corrected need a w that is the same at every step.
"""

from __future__ import annotations

import copy
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rewards import RewardMix
from rlg.choices import CONSTANT, cfg_rows
from rlg.diffusion import conditioning, process, sampling
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.distributed import Interruption
from rlg.evaluation.folder import Job, append, job_of, read, save_images
from rlg.evaluation.methods import CORRECTED, LORA_SCALE, METHODS, RLG, RLG_LS, TWICE, of_sweeps, rules
from rlg.evaluation.rows import Row
from rlg.guidance import blend
from rlg.guidance.corrector import RESAMPLE_BELOW, Corrector
from rlg.guidance.guided import Guided, Weight, rlg, with_cfg
from rlg.guidance.observers import PassCounter, PathKL
from rlg.guidance.weight_schedule import WeightSchedule
from rlg.io import atomic, out_of_memory
from rlg.io.run_folder import IMAGES, PLAN, ROWS
from rlg.models import lora
from rlg.models.policy import Policy
from rlg.prompts import Prompt

_TO_LOWER = "while sampling: lower --batch_size"
_ORIGIN = "origin"  # name in the network of the adapter that guidance starts from
_DIVERSITY_SIDE = 16  # pixels; at this size, layout and colour count, and texture does not


@dataclass(frozen=True)
class EvalSettings:
    """The settings that decide the rows of an evaluation."""

    scales: tuple[float, ...]
    methods: tuple[str, ...]
    steps: int
    sampler: str  # a kernel of rlg.diffusion.process
    level: float
    cfg: float
    resolution: int | None
    k: int  # images a prompt
    seed: int
    batch_size: int  # images a batch
    origin: str | None = None  # file of an adapter that guidance starts from instead of the base
    schedule: str = CONSTANT  # schedule of w for method rlg, by its name in rlg.guidance.weight_schedule

    def __post_init__(self) -> None:
        if not self.scales or not all(math.isfinite(w) for w in self.scales):
            raise ValueError(f"--w must be finite numbers, got {list(self.scales)}")
        unknown = sorted(set(self.methods) - set(self.known()))
        if unknown:
            raise ValueError(f"unknown method {unknown[0]!r}; known: {', '.join(self.known())}")
        if min(self.k, self.steps, self.batch_size) < 1:
            raise ValueError("--k, --steps and --batch_size must be at least 1")
        WeightSchedule.parse(self.schedule)
        constant = sorted({CORRECTED, RLG_LS} & set(self.methods)) if self.schedule != CONSTANT else []
        if constant:
            raise ValueError(f"method {constant[0]} is for a w that stays; leave it or --schedule {self.schedule} out")
        if CORRECTED in self.methods and self.k > self.batch_size:
            raise ValueError(
                f"method {CORRECTED} resamples the {self.k} images of a prompt together; raise --batch_size to that"
            )
        if RLG_LS in self.methods:
            blend.check_drawn(RLG_LS, [(w,) for w in self.scales], self.sampler, self.level)

    @staticmethod
    def known() -> tuple[str, ...]:
        """The methods that exist."""
        return of_sweeps()

    def shows(self, job: Job) -> bool:
        """Tell whether the report's slider stops at a job.

        Only then its image may be kept.
        """
        return job.method == RLG

    def sweeps(self) -> Iterator[tuple[str, tuple[float, ...]]]:
        """Each method, with the values of w that may share a batch."""
        if RLG in self.methods:
            yield RLG, self.scales
        if TWICE in self.methods:
            yield TWICE, (1.0,)
        between = tuple(w for w in self.scales if w not in (0.0, 1.0))
        for method in (LORA_SCALE, CORRECTED):
            if method in self.methods:
                yield from ((method, (w,)) for w in between)
        if RLG_LS in self.methods and between:
            yield RLG_LS, between
        yield from ((method, between) for method in rules() if between and method in self.methods)


@dataclass(frozen=True)
class Drawn:
    """Latents of a batch of jobs, with measurements of their paths."""

    latents_BCHW: Tensor
    kl_B: Tensor | None  # nats
    log_weight_B: Tensor | None  # nats
    passes_B: Tensor  # passes of the network, not counting classifier-free guidance
    off_the_clock: float  # seconds of passes that only the KL needs, because w = 1 skips the base


@dataclass(frozen=True)
class Images:
    """A batch of finished jobs."""

    pixels_B3HW: Tensor  # [0, 1]
    kl_B: Tensor | None  # nats
    nfe_B: Tensor
    seconds_B: Tensor
    log_weight_B: Tensor | None = None  # nats; for guidance that is not corrected

    @staticmethod
    def cat(parts: Sequence[Images]) -> Images:
        """Join batches."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(Images))
        return Images(*(None if column[0] is None else torch.cat(column) for column in columns))


def plan(settings: EvalSettings, prompt_ids: Sequence[int], done: set[Job]) -> list[list[Job]]:
    """Units of work, each of one method, without finished images.

    A unit has one w if the method changes the weights with w. Diversity compares a prompt's images at one w, so these
    stay together: if one is missing, all are made again.
    """
    units: list[list[Job]] = []
    for method, scales in settings.sweeps():
        chunk = max(1, settings.batch_size // (settings.k * len(scales)))
        for start in range(0, len(prompt_ids), chunk):
            ids = prompt_ids[start : start + chunk]
            unit = [Job(p, k, w, method) for p in ids for w in scales for k in range(settings.k)]
            units.append([job for job in unit if any(replace(job, k=k) not in done for k in range(settings.k))])
    return [unit for unit in units if unit]


def rule_of(method: str) -> Callable[[conditioning.Predictor, conditioning.Predictor, Weight], Guided]:
    """The guidance rule of a method, (base, tuned, w) -> guided."""
    module, _, name = METHODS[method].rule.partition(":")
    return getattr(importlib.import_module(module), name)


def methods_of(chosen: Sequence[str] | None, full: bool) -> tuple[str, ...]:
    """The methods of an evaluation.

    By default, these are all that apply, except `corrected`. Raises ValueError for others.
    """
    if chosen is None:
        return (RLG, TWICE) if full else (RLG, LORA_SCALE, TWICE)
    if full and LORA_SCALE in chosen:
        raise ValueError(f"method {LORA_SCALE} scales a LoRA, and the tuned model is a full network; leave it out")
    return tuple(chosen)


class Evaluator:
    """Make and score images of one policy.

    Raises ValueError for settings that do not fit the policy.
    """

    def __init__(self, policy: Policy, reward: RewardMix, prompts: Sequence[Prompt], settings: EvalSettings):
        if policy.tuned is not None:
            methods_of(settings.methods, full=True)
        if settings.origin is not None:
            policy.load_frozen_copy(_ORIGIN, Path(settings.origin))
        self.policy, self.reward, self.prompts, self.settings = policy, reward, prompts, settings
        self.negative = policy.encode([""])
        self.base = self.with_cfg(policy.reference)
        self.shape = policy.latent_shape(settings.resolution)
        self._schedule(settings.steps)  # raises now, and not at the first batch

    def with_scales(self, scales: Sequence[float]) -> Evaluator:
        """A copy of this evaluator with other values of w.

        It has the same models.
        """
        other = copy.copy(self)
        other.settings = replace(self.settings, scales=tuple(scales))
        return other

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
                log_weight=None if images.log_weight_B is None else float(images.log_weight_B[i]),
            )
            yield row, images.pixels_B3HW[i]

    def rows_at(self, prompt_ids: Sequence[int], w: float, k: int) -> list[Row]:
        """Rows of k images of each prompt at one w.

        They are used to choose w.
        """
        unit = [Job(p, each, w, RLG) for p in prompt_ids for each in range(k)]
        return [row for row, _ in self.run(unit)]

    @torch.no_grad()
    def generate(self, unit: Sequence[Job]) -> Images:
        """Sample a batch of jobs of one method.

        The seconds of the batch are divided in proportion to network evaluations.
        """
        method, settings = unit[0].method, self.settings
        steps = settings.steps * (2 if method == TWICE else 1)
        schedule = self._schedule(steps)
        with lora.scaled(self.policy.network, unit[0].w if method == LORA_SCALE else 1.0):
            started = self._now()
            drawn = self._sample(unit, schedule)
            pixels = self.policy.decode(drawn.latents_BCHW).cpu()
            seconds = self._now() - started - drawn.off_the_clock
        nfe_B = drawn.passes_B * cfg_rows(settings.cfg)
        return Images(pixels, drawn.kl_B, nfe_B, seconds * nfe_B / nfe_B.sum(), drawn.log_weight_B)

    def _schedule(self, steps: int) -> process.Schedule:
        how = self.settings
        return self.policy.schedule(steps, how.sampler, how.level, resolution=how.resolution)

    def _now(self) -> float:
        if self.policy.device.type == "cuda":
            torch.cuda.synchronize(self.policy.device)  # otherwise only the launch of kernels is timed
        return time.perf_counter()

    def guided(self, unit: Sequence[Job], schedule: process.Schedule) -> Guided:
        """The predictor for a batch of jobs of one method."""
        method, tuned = unit[0].method, self.with_cfg(self.policy.predict)
        origin = self.base
        if self.settings.origin is not None:
            origin = self.with_cfg(partial(self.policy.predict_as, _ORIGIN))
        weighted = method in (RLG, RLG_LS, CORRECTED, *rules())
        w_B = torch.tensor([job.w for job in unit]) if weighted else torch.ones(len(unit))
        if method == RLG_LS:
            return Guided(origin, (tuned,), blend.one_at_a_time(w_B[:, None], schedule, self.ids(unit)))
        rule = rule_of(method) if method in rules() else rlg
        return rule(origin, tuned, WeightSchedule.parse(self.settings.schedule).over(schedule, w_B))

    def with_cfg(self, predict: conditioning.Predictor) -> conditioning.Predictor:
        """A predictor under this evaluation's classifier-free guidance."""
        return with_cfg(predict, self.negative, self.settings.cfg)

    def ids(self, unit: Sequence[Job]) -> list[SampleId]:
        """The identity of each job's sample, which decides its noise."""
        return [SampleId(self.settings.seed, job.prompt_id, job.k) for job in unit]

    def _sample(self, unit: Sequence[Job], schedule: process.Schedule) -> Drawn:
        guided, corrector = self.guided(unit, schedule), self._corrector(unit)
        kl = PathKL(self.base, len(unit), guided.base is self.base, self._now)
        counter = PassCounter(guided, len(unit))
        # After resampling, a sample's states are no path of the sampler, so they have no path KL.
        has_kl = unit[0].method != CORRECTED and bool(schedule.stochastic_steps())
        latents = sampling.sample(
            guided.with_base,
            schedule,
            self._conditioning(unit),
            SampleNoise(self.ids(unit), self.shape, self.policy.device),
            moves=[corrector],
            observers=[counter, kl] if has_kl else [counter],
        )
        log_weight_B = corrector.log_weight_B if unit[0].method == RLG and self._weighs(RLG) else None
        return Drawn(latents, kl.kl_B if has_kl else None, log_weight_B, counter.passes_B, kl.seconds)

    def _weighs(self, method: str) -> bool:
        """Tell whether the corrector knows the weights of a method's images.

        It does not under a w that changes over the steps.
        """
        return method in (RLG, CORRECTED) and self.settings.schedule == CONSTANT

    def _corrector(self, unit: Sequence[Job]) -> Corrector:
        method = unit[0].method
        w_B = torch.tensor([job.w if self._weighs(method) else 1.0 for job in unit])
        groups = [(job.prompt_id, job.w) for job in unit]
        return Corrector(w_B, groups, RESAMPLE_BELOW if method == CORRECTED else 0.0, self.settings.seed)

    def _conditioning(self, unit: Sequence[Job]) -> Any:
        texts = [self.prompts[job.prompt_id].text for job in unit]
        unique = list(dict.fromkeys(texts))
        encoded = self.policy.encode(unique)
        return encoded[torch.tensor([unique.index(text) for text in texts], device=self.policy.device)]


def diversity(pixels_B3HW: Tensor, groups: Sequence[tuple[int, float]]) -> list[float | None]:
    """Mean RMS distance of each image to the others of its group.

    Images are compared at 16x16 pixels. The distance is None for a group of one image.
    """
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
    """This process's share of the work that scores.jsonl lacks."""
    return plan(settings, prompt_ids, set(read(folder / ROWS)))[rank::world]


def progress(images: int, rank: int = 0) -> tqdm:
    """A progress bar over images, shown by the first process."""
    return tqdm(total=images, desc="evaluate", unit="image", disable=rank > 0, mininterval=1)


def evaluate(
    evaluator: Evaluator,
    folder: Path,
    prompt_ids: Sequence[int],
    keep_images: Callable[[Job], bool],
    rank: int = 0,
    world: int = 1,
    bar: tqdm | None = None,
    interruption: Interruption | None = None,
) -> None:
    """Make this process's share of the rows that scores.jsonl lacks.

    bar: the caller's progress bar; by default there is a new one. Files of other processes are not read, because these
    may have begun, and all must cut the work in the same way. An interruption ends the work after the present unit.
    Raises OSError, which names the folder, for rows that cannot be written.
    """
    units = units_left(evaluator.settings, folder, prompt_ids, rank, world)
    if rank == 0:
        _write_total(evaluator.settings, folder, prompt_ids)
    shown = progress(sum(map(len, units)), rank) if bar is None else nullcontext(bar)
    with shown as bar:
        for unit in units:
            if interruption and interruption.requested:
                return
            with out_of_memory.explaining(
                {"": _TO_LOWER}, lambda: "what is scored is kept, and the command goes on from it"
            ):
                rows = list(evaluator.run(unit))
            with atomic.explaining(f"cannot write to {folder}", lambda: "what is scored is kept"):
                save_images([(row, image) for row, image in rows if keep_images(job_of(row))], folder / IMAGES)
                append(folder, rank, [row for row, _ in rows])
            bar.update(len(unit))


def _write_total(settings: EvalSettings, folder: Path, prompt_ids: Sequence[int]) -> None:
    """Write the final number of rows.

    It includes the rows of other values of w that are there already.
    """
    planned = {job for unit in plan(settings, prompt_ids, set()) for job in unit}
    atomic.write_text(folder / PLAN, json.dumps({"images": len(planned | set(read(folder / ROWS)))}))
