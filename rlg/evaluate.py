"""Evaluate a tuned model under Reinforcement Learning Guidance over a sweep of w.

    python -m rlg.evaluate --ckpt runs/NAME/checkpoint-N --scales 0 0.25 0.5 0.75 1 1.5 2 3
    python -m rlg.evaluate --tuned USER/REPO --base BASE     # made elsewhere: a LoRA, or a full fine-tuned network

Base and adapter-enabled passes run on one network (a full fine-tuned network is a second one); several w share a
batch; w = 0 and w = 1 take one pass. Noise is a function of (seed, prompt, k), so all scales, modes and later runs are
paired. Beside the sweep (mode "rlg") it runs the two baselines that cost the same or less: the tuned model with twice
the steps ("tuned_2x_steps", equal network evaluations) and the LoRA scaled by w ("lora_scale", one pass; a full
network has none).

The work is cut into units (a few prompts, all their images, all scales) whose batches do not depend on the number of
processes; each process takes every n-th unit and appends its rows to a file of its own. What is already scored is not
done again, but for a prompt at a scale that was cut off midway. Path KL is in nats, by Girsanov with the variance that
is really injected (stochastic samplers only).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rewards import RewardMix
from rlg import adapters, guidance, hub, networks, process, sampling
from rlg import prompts as prompt_sets
from rlg.cli import TUNED_HELP, Parser, fail_cleanly
from rlg.eval_folder import IMAGES, ROWS, Job, job_of, merge, prepare_folder, read, save_images
from rlg.policy import DTYPES, Policy, base_of
from rlg.process import KERNELS
from rlg.prompts import Prompt
from rlg.sampling import SampleId, SampleNoise
from rlg.stats import MODES, Row

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

    def __post_init__(self) -> None:
        if not self.scales or not all(math.isfinite(w) for w in self.scales):
            raise ValueError(f"--scales must be finite numbers, got {list(self.scales)}")
        unknown = sorted(set(self.modes) - set(MODES))
        if unknown:
            raise ValueError(f"unknown mode {unknown[0]!r}; known: {', '.join(MODES)}")
        if min(self.k, self.steps, self.batch_size) < 1:
            raise ValueError("--k, --steps and --batch_size must be at least 1")


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
        guided = guidance.rlg(origin, tuned, weights_B)
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


def evaluate(
    evaluator: Evaluator,
    folder: Path,
    prompt_ids: Sequence[int],
    keep_images: Callable[[Job], bool],
    rank: int = 0,
    world: int = 1,
) -> None:
    """Make this process's share of the rows that scores.jsonl lacks, with a progress bar.

    Files of other processes are not looked at: they may have begun, and all must cut the work in the same way.
    """
    units = plan(evaluator.settings, prompt_ids, set(read(folder / ROWS)))[rank::world]
    bar = tqdm(total=sum(map(len, units)), desc="evaluate", unit="image", disable=rank > 0, mininterval=1)
    with (folder / f"scores-{rank}.jsonl").open("a") as file:
        for unit in units:
            rows = list(evaluator.run(unit))
            save_images([(row, image) for row, image in rows if keep_images(job_of(row))], folder / IMAGES)
            file.write("".join(json.dumps(asdict(row)) + "\n" for row, _ in rows))
            file.flush()
            bar.update(len(unit))
    bar.close()


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, help="YAML file with any of these options; the command line wins")
    add("--ckpt", "--tuned", metavar="TUNED", help=TUNED_HELP)
    add("--base", help="base model (default: the one that the adapter was trained on)")
    add(
        "--origin",
        metavar="FILE",
        help="adapter that guidance starts from instead of the base: CKPT/trainer_state/lora_old.safetensors of NFT",
    )
    add("--scales", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3], help="values of w")
    add("--modes", nargs="+", help=f"default: {' '.join(MODES)} (for a full network without {LORA_SCALE})")
    add("--prompts", help="prompt set (default: the held-out set of the run)")
    add("--num_prompts", type=int, help="how many of them, spread evenly (default: all)")
    add("--k", type=int, default=4, help="images a prompt")
    add("--rewards", nargs="+", help="rewards to report (default: those of the run)")
    add("--held_out", nargs="*", default=None, help="more rewards, not trained on (default: those of the run)")
    add("--steps", type=int, help="denoising steps (default: those of the run)")
    add("--sampler", choices=KERNELS, help="default: the run's own")
    add("--level", type=float, help="noise level of a stochastic sampler (default: the run's own)")
    add("--cfg", type=float, help="classifier-free guidance scale, inside each model (default: the run's own)")
    add("--resolution", type=int, help="side of the images in pixels (default: the run's own)")
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, default=128, help="images a batch")
    add("--dtype", choices=sorted(DTYPES), help="default: the run's own")
    add("--output", type=Path, help="default: eval/ID in the run's folder, or in runs/NAME for a model from elsewhere")
    add("--images", type=int, default=8, help="prompts whose images are kept for the report; -1 keeps all")
    add("--overwrite", action="store_true", help="discard what an earlier evaluation left in the output folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(parse(argv))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, from the command line over a YAML file over the run's own settings. Raises ValueError."""
    from rlg.config import read_yaml, run_settings

    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(argv)
    if args.config:
        row = read_yaml(args.config)
        known = set(vars(args)) - {"config"} | {"tuned"}
        unknown = sorted(set(row) - known)
        if unknown:
            raise ValueError(f"{args.config}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        args = parser.parse_args([*_as_arguments(row), *argv])
    if not args.ckpt:
        raise ValueError(f"--ckpt is needed (or --tuned): {TUNED_HELP}")
    for name, value in run_settings(Path(args.ckpt)).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def _as_arguments(row: dict[str, Any]) -> Iterator[str]:
    """A YAML row as a command line, so that types and choices are checked in one place."""
    for name, value in row.items():
        if value is not None and value is not False:
            yield f"--{name}"
            yield from map(str, [] if value is True else value if isinstance(value, list) else [value])


def _settings(args: argparse.Namespace) -> EvalSettings:
    return EvalSettings(
        scales=tuple(sorted({float(f"{w:g}") for w in args.scales})),
        modes=modes_of(args.modes, networks.is_network(args.ckpt)),
        steps=20 if args.steps is None else args.steps,
        sampler=args.sampler or "ode",
        level=0.7 if args.level is None else args.level,
        cfg=4.5 if args.cfg is None else args.cfg,
        resolution=args.resolution,
        k=args.k,
        seed=args.seed,
        batch_size=args.batch_size,
        origin=args.origin,
    )


def home_of(tuned: str | Path) -> tuple[str, Path]:
    """(name, folder) of the run that made an adapter; runs/NAME for a hub id and a full network, made elsewhere."""
    if hub.is_id(tuned):
        name = "--".join(Path(tuned).parts[:2])
    elif networks.is_network(tuned):
        path = Path(tuned).resolve()
        name = path.parent.name if path.name in adapters.DENOISERS else path.name
    else:
        folder = Path(tuned).resolve().parent
        return folder.name, folder
    return name, Path("runs") / name


def run(args: argparse.Namespace) -> Path:
    """Evaluate and report; returns the output folder."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    import rewards
    from rlg.report import write_report

    base = base_of(args.ckpt, args.base)
    settings = _settings(args)
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num_prompts must be at least 1, got {args.num_prompts}")
    source = args.prompts or "tinyworld:composition/test"
    prompts = prompt_sets.load(source)
    ids = prompt_sets.spread(prompts, args.num_prompts)
    trained = list(args.rewards or ["jpeg_compressibility"])
    names = list(dict.fromkeys([*trained, *(args.held_out or [])]))
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # else every process believes it is alone
    reward = rewards.build(names, device=str(state.device))
    policy = Policy.load(base, args.dtype or "float32", state.device)
    policy.load_tuned(args.ckpt)
    if policy.tuned is not None and state.is_main_process:
        print(networks.memory(policy.network, policy.tuned), file=sys.stderr)  # stdout is the report's path
    evaluator = Evaluator(policy, reward, prompts, settings)
    name, home = home_of(args.ckpt)
    origin = "" if settings.origin is None else f"-from-{Path(settings.origin).stem}"
    ident = f"{settings.sampler}{settings.steps}-cfg{settings.cfg:g}-seed{settings.seed}{origin}"
    folder = args.output or home / "eval" / f"{Path(args.ckpt).resolve().name}-{ident}"
    meta = {
        "name": name if settings.origin is None else f"{name} from {Path(settings.origin).stem}",
        "base": base,
        "adapter": str(Path(args.ckpt)),
        "trained_rewards": [name.partition("=")[0] for name in trained],  # as the rows name them
        "rewards": names,
        "prompts": source,
        "num_prompts": len(ids),
        "dtype": args.dtype or "float32",
        **{k: v for k, v in asdict(settings).items() if k not in ("scales", "modes", "batch_size")},
    }
    if state.is_main_process:
        prepare_folder(folder, meta, args.overwrite)
        merge(folder)
    state.wait_for_everyone()
    shown = {ids[i] for i in prompt_sets.spread(ids, args.images if args.images >= 0 else None)}

    def keep(job: Job) -> bool:
        return job.mode == RLG and job.prompt_id in shown and (job.k == 0 or args.images < 0)

    evaluate(evaluator, folder, ids, keep, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        merge(folder)
        print(write_report(folder))
    return folder


if __name__ == "__main__":
    main()
