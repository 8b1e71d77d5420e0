"""Cost against fidelity, for every way to run guidance (`rlg.guidance_modes`), side by side in one run.

    python -m rlg.benchmark guidance --ckpt runs/NAME/checkpoint-N --w 3 --budget 1.25
    python -m rlg.benchmark guidance --model tiny-sd3              # a random LoRA: cost and distance, no rewards
    python -m rlg.benchmark guidance --arch sd35-medium --dtype bfloat16 --resolution 512 --compile    # random weights

Exact modes are timed at each of --batch_sizes: cost, images a second, model FLOP utilisation (`rlg.flops`) and where
images a second saturate; with --compile also under torch.compile, on a second policy. Not so one batch for both
models: its rows are told apart by hooks, and torch.compile does not look whether those have changed.

--budget chooses, within that cost, the mode that keeps most of the reward's gain and the one that is nearest to full
guidance: a mode may gain as much by other images. They are chosen on prompts and noise of their own, so that what is
reported of them comes from other prompts and another seed. Writes results.json, table.md, cost.png and cost.svg.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlg import flops, measure
from rlg import prompts as prompt_sets
from rlg.architectures import ARCHITECTURES, random_policy
from rlg.cli import TUNED_HELP, Parser, fail_cleanly
from rlg.config import run_settings
from rlg.cost_figure import draw, table
from rlg.guidance_cost import BASE, Bench, CostSettings, Result, candidates, compare, pick
from rlg.guidance_modes import BATCH, FORMS, FULL, TUNED
from rlg.policy import DTYPES, Policy, base_of
from rlg.process import KERNELS
from rlg.prompts import Prompt
from rlg.sampling import SampleId
from rlg.style import save

DEFAULT_MODES = ("reuse:2", "reuse:4", "reuse:2:linear", "reuse_at:0", "reuse_at:0,1", "scaled", "scaled_but:0")
_CALIBRATION_SEED = 1_000_000  # added to the seed
COMPILED = ", compiled"  # behind a mode's name
_ORIGIN = "tinyworld:composition/test"
_LORA_STD = 0.02  # of B, where the LoRA is random
_SWEEP = (0.0, 0.5, 1.0, 1.5, 2.0)  # scales of the sweep that is timed


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.benchmark guidance", description="What guidance costs, and what it keeps.")
    add = parser.add_argument
    add("--ckpt", "--tuned", dest="ckpt", metavar="TUNED", help=TUNED_HELP)
    add("--model", "--base", dest="model", help="base model (default: the one that --ckpt was trained on)")
    add("--arch", choices=ARCHITECTURES, help="a published architecture with random weights, instead of a model")
    add("--w", type=float, default=2.0, help="guidance weight")
    add("--modes", nargs="+", help=f"of {', '.join(FORMS)}; {BATCH} behind those that run both models")
    add(
        "--budget",
        type=float,
        help="choose the modes that keep most, and are nearest, at this cost (1: the tuned model)",
    )
    add("--calibration_prompts", type=int, default=24, help="prompts that the mode is chosen on, not measured on")
    add("--prompts", help=f"prompt set (default: the held-out set of the run, or {_ORIGIN})")
    add("--num_prompts", type=int, help="how many of them, spread evenly (default: all)")
    add("--k", type=int, default=2, help="images a prompt")
    add("--rewards", nargs="+", help="the first is what guidance gains (default: the run's own); needs --ckpt")
    add("--steps", type=int, help="denoising steps (default: those of the run, or 10)")
    add("--sampler", choices=KERNELS, help="default: the run's own, or ode")
    add("--level", type=float, help="noise level of a stochastic sampler (default: the run's own, or 0.7)")
    add("--cfg", type=float, help="classifier-free guidance scale (default: the run's own, or 1)")
    add("--resolution", type=int, help="side of the images in pixels (default: the model's own)")
    add("--seed", type=int, default=0)
    add("--batch_size", type=int, default=16, help="images a batch")
    add("--batch_sizes", type=int, nargs="*", default=[1, 2, 4, 8], help="batches that exact modes are timed at, too")
    add("--compile", action="store_true", help="time full guidance under torch.compile, too (minutes more)")
    add("--repeats", type=int, default=7, help="rounds of those timings")
    add("--dtype", choices=sorted(DTYPES), help="default: float32")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--lora_rank", type=int, default=16, help="of the random LoRA, where no --ckpt is given")
    add("--output", type=Path, help="default: runs/benchmarks/ID")
    add("--overwrite", action="store_true", help="replace the results that are in the output folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        args = complete(build_parser().parse_args(argv))
        reward = None
        if args.rewards:
            import rewards

            reward = rewards.build(args.rewards[:1], device=args.device)
        print(run(args, reward))


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The same arguments, with the run's own settings where there were none. Raises ValueError."""
    if args.arch and (args.ckpt or args.model):
        raise ValueError(f"--arch {args.arch} has random weights; leave it or --ckpt and --model out")
    if not (args.arch or args.ckpt or args.model):
        raise ValueError("say what to measure: --ckpt, --model or --arch")
    if args.rewards and not args.ckpt:
        raise ValueError("--rewards needs --ckpt: a random LoRA gains nothing")
    counts = {name: getattr(args, name) for name in ("k", "batch_size", "repeats", "calibration_prompts", "lora_rank")}
    counts["batch_sizes"] = min(args.batch_sizes, default=1)
    wrong = [name for name, value in counts.items() if value < 1]
    if wrong:
        raise ValueError(f"--{wrong[0]} must be at least 1")
    if args.budget is not None and not args.budget >= 1:
        raise ValueError(f"--budget {args.budget:g}: nothing costs less than the tuned model alone, which is 1")
    known = run_settings(Path(args.ckpt)) if args.ckpt else {}
    known.pop("dtype", None)  # a CPU is slow in the precision that a run was trained in
    fallback = {"prompts": _ORIGIN, "steps": 10, "sampler": "ode", "level": 0.7, "cfg": 1.0, "dtype": "float32"}
    fallback["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    for name, value in {**fallback, **known}.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.modes = list(dict.fromkeys(args.modes or DEFAULT_MODES))
    return args


def load(args: argparse.Namespace) -> Policy:
    """The model that is measured. Raises ValueError if it is missing or does not fit."""
    if args.arch:
        return random_policy(args.arch, args.dtype, args.device, args.lora_rank)
    base = base_of(args.ckpt, args.model) if args.ckpt else args.model
    policy = Policy.load(base, args.dtype, args.device)
    if args.ckpt:
        policy.load_tuned(args.ckpt)
        return policy
    generator = torch.Generator(policy.device).manual_seed(args.seed)
    for parameter in policy.add_lora(args.lora_rank, 2 * args.lora_rank):
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=_LORA_STD, generator=generator)
    return policy


def run(args: argparse.Namespace, reward: Any | None) -> Path:
    """Measure, choose and write; returns the folder. Raises ValueError for what does not fit."""
    folder = output_of(args)
    prompts = prompt_sets.load(args.prompts)
    chosen_on, measured_on = split(prompt_sets.spread(prompts, args.num_prompts), args)
    settings = CostSettings(**{field.name: getattr(args, field.name) for field in fields(CostSettings)})
    bench = Bench(load(args), prompts, settings, reward)
    bench.check(args.modes)
    exact = exact_modes(bench)
    choice = calibrate(bench, args, chosen_on) if args.budget is not None else None
    names = list(
        dict.fromkeys([BASE, TUNED, FULL, *args.modes, *([choice["mode"], choice["nearest"]] if choice else [])])
    )
    ids = samples_of(measured_on, args.k, args.seed)
    peaks = bench.peaks(names, ids[: args.batch_size])
    results = compare(bench.run(names, ids), ids, peaks)
    peak = flops.matmul_peak(DTYPES[args.dtype], args.device)
    rows = batches(bench, compiled(args, prompts, settings) if args.compile else None, exact, args, peak)
    report = {
        "command": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
        "machine": measure.machine(args.device) | {"dtype": args.dtype, "matmul_peak_gflops": round(peak / 1e9, 1)},
        "n": len(ids),
        "prompts": len(measured_on),
        "reward": reward.names[0] if reward else None,
        "choice": choice,
        "results": [result.as_json() for result in results],
        "batches": rows,
        "saturates": saturates(rows),
        "sweep": sweeps(bench, args),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "table.md").write_text(table(report))
    save(draw(report), folder / "cost")
    return folder


def output_of(args: argparse.Namespace) -> Path:
    """The folder. Raises ValueError if it holds results, and they were not given up."""
    model = args.arch or (Path(args.ckpt).resolve().parent.name if args.ckpt else Path(args.model).name)
    name = f"guidance-{model}-{args.sampler}{args.steps}-cfg{args.cfg:g}-w{args.w:g}-seed{args.seed}"
    folder = args.output or Path("runs/benchmarks") / name
    if (folder / "results.json").exists() and not args.overwrite:
        raise ValueError(f"{folder} holds results; give --overwrite, or another --output")
    return folder


def split(ids: Sequence[int], args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """(prompts to choose a mode on, prompts to measure on): without a common one, each spread over the set."""
    if args.budget is None:
        return [], list(ids)
    if len(ids) <= args.calibration_prompts:
        raise ValueError(
            f"--calibration_prompts {args.calibration_prompts} of {len(ids)} leave none to measure on; lower it"
        )
    chosen = {ids[i] for i in prompt_sets.spread(ids, args.calibration_prompts)}
    return sorted(chosen), [i for i in ids if i not in chosen]


def samples_of(prompt_ids: Sequence[int], k: int, seed: int) -> list[SampleId]:
    """The images of some prompts."""
    return [SampleId(seed, prompt, i) for prompt in prompt_ids for i in range(k)]


def exact_modes(bench: Bench) -> list[str]:
    """Those that are full guidance, to rounding; a full network can't be switched within a batch."""
    return [FULL] if bench.policy.tuned is not None else [FULL, FULL + BATCH]


def calibrate(bench: Bench, args: argparse.Namespace, prompt_ids: Sequence[int]) -> dict[str, Any]:
    """The modes that a budget buys, and what was known of all when they were chosen; ValueError if it buys none."""
    ids = samples_of(prompt_ids, args.k, args.seed + _CALIBRATION_SEED)
    options = candidates(bench.schedule, args.cfg, args.w, bench.policy.tuned is not None, args.budget)
    names = list(dict.fromkeys([BASE, TUNED, FULL, *options]))
    bench.denoise(FULL, ids[: args.batch_size])  # a warm-up
    clock = "cost" if bench.policy.device.type == "cuda" else "cpu_cost"
    results = compare(bench.run(names, ids), ids, {})
    most, nearest = pick(results, args.budget, clock)
    print(
        f"--budget {args.budget:g}: {f'keeps most: {_found(most, clock)}; ' if bench.reward else ''}nearest to full "
        f"guidance: {_found(nearest, clock)}; by {len(ids)} images of {len(prompt_ids)} prompts, of {len(options)} "
        "candidates",
        file=sys.stderr,
    )
    chosen = {"mode": most.mode, "nearest": nearest.mode, "budget": args.budget, "n": len(ids)}
    return {**chosen, "candidates": [r.as_json() for r in results]}


def _found(result: Result, clock: str) -> str:
    gained = f", {result.kept.mean:.0%} of the gain" if result.kept else ""
    return f"{result.mode} (cost {getattr(result, clock).mean:.2f}{gained}, distance {result.distance.mean:.2f})"


def compiled(args: argparse.Namespace, prompts: Sequence[Prompt], settings: CostSettings) -> Bench:
    """The same model once more, its network compiled: the first passes of each batch size take minutes."""
    bench = Bench(load(args), prompts, settings, None)
    for network in (bench.policy.network, bench.policy.tuned):
        if network is not None:
            network.compile()
    return bench


def batches(
    bench: Bench, fast: Bench | None, exact: Sequence[str], args: argparse.Namespace, peak: float
) -> list[dict[str, Any]]:
    """Cost, throughput and utilisation of the exact modes at each batch size.

    fast: the compiled bench. peak: operations a second, of which utilisation is a share.
    """
    rows = []
    for size in args.batch_sizes:
        ids = samples_of([0], size, args.seed)
        contenders = {name: partial(bench.denoise, name, ids) for name in (TUNED, *exact)}
        operations = {name: flops.flops(run) / size for name, run in contenders.items()}
        for name in (TUNED, FULL) if fast else ():
            contenders[name + COMPILED] = partial(fast.denoise, name, ids)
            operations[name + COMPILED] = operations[name]
        timed = _timed(contenders, args, size)
        used = {
            name: flops.utilisation(operations[name], 1 / timed["images_per_second"][name], peak)
            for name in contenders
        }
        rows.append({"batch": size, **timed, "utilisation": used})
    return rows


def saturates(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The batch size by mode beyond which images a second hardly grow."""
    names = rows[0]["cost"] if rows else ()
    return {name: flops.saturates_at({row["batch"]: row["images_per_second"][name] for row in rows}) for name in names}


def sweeps(bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a sweep over w: each w on its own, all in one batch, and with a shared first step."""
    ids = samples_of([0], max(1, args.batch_size // len(_SWEEP)), args.seed)
    contenders: dict[str, Callable[[], object]] = {
        TUNED: lambda: bench.denoise(TUNED, ids),
        "each w on its own": lambda: [bench.denoise(FULL, ids, w) for w in _SWEEP],
        "all w in one batch": lambda: bench.denoise_sweep(_SWEEP, ids, shared=False),
        "one batch, first step shared": lambda: bench.denoise_sweep(_SWEEP, ids, shared=True),
    }
    return {"scales": list(_SWEEP), "images": len(ids), **_timed(contenders, args, len(ids))}


def _timed(contenders: Mapping[str, Callable[[], object]], args: argparse.Namespace, images: int) -> dict[str, Any]:
    times = measure.interleaved(contenders, args.repeats, args.device)
    return {
        "seconds": {name: measure.median(t.wall_R).mean / images for name, t in times.items()},
        "cost": {name: asdict(measure.ratio(t.wall_R, times[TUNED].wall_R)) for name, t in times.items()},
        "cpu_cost": {name: asdict(measure.ratio(t.cpu_R, times[TUNED].cpu_R)) for name, t in times.items()},
        "images_per_second": {
            name: images / measure.median(flops.seconds_by_round(t, args.device)).mean for name, t in times.items()
        },
    }
