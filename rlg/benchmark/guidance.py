"""Cost against fidelity, for every way to run guidance (`rlg.guidance.modes`).

    python -m rlg.benchmark guidance --ckpt runs/NAME/checkpoint-N --w 3 --budget 1.25
    python -m rlg.benchmark guidance --base tiny-sd3               # a random LoRA: cost and distance, no rewards
    python -m rlg.benchmark guidance --arch sd35-medium --dtype bfloat16 --resolution 512 --compile    # random weights

Exact modes are timed at each of --batch_sizes: cost, images a second, model FLOP utilisation (`rlg.benchmark.flops`),
and the batch at which images a second saturate. --compile times them also under torch.compile, on a second policy. It
leaves out the mode of one batch for both models: hooks tell its rows apart, and torch.compile does not see when hooks
change. --budget chooses two modes within that cost: the one that keeps most of the reward's gain, and the one nearest
to full guidance. They are chosen on other prompts and another seed than those of the report. The command writes
results.json, table.md, cost.png and cost.svg.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rlg import stats
from rlg.benchmark import flops, timing
from rlg.benchmark.architectures import random_policy
from rlg.benchmark.guidance_cost import BASE, Bench, CostSettings, Result, candidates, compare, pick
from rlg.benchmark.guidance_figure import draw, table
from rlg.benchmark.options import GUIDANCE, ORIGIN, GuidanceOptions
from rlg.choices import BATCH, FULL, TUNED
from rlg.cli import fail_cleanly
from rlg.diffusion.sampling import SampleId
from rlg.io.run_folder import run_settings
from rlg.models.loading import DTYPES, base_of
from rlg.models.policy import Policy
from rlg.models.tuned_model import resolve
from rlg.prompts import Prompt, columns, spread
from rlg.reports.theme import save
from rlg.tasks import prompt_sets

DEFAULT_MODES = ("reuse:2", "reuse:4", "reuse:2:linear", "reuse_at:0", "reuse_at:0,1", "scaled", "scaled_but:0")
_CALIBRATION_SEED = 1_000_000  # added to the seed
COMPILED = ", compiled"  # suffix of a mode's name
_LORA_STD = 0.02  # std of B, where the LoRA is random
_SWEEP = (0.0, 0.5, 1.0, 1.5, 2.0)  # scales of the sweep that is timed


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with fail_cleanly():
        options = complete(GUIDANCE.parse(argv))
        reward = None
        if options.reward:
            import rewards

            reward = rewards.build(options.reward[:1], device=options.device)
        print(run(options, reward))


def complete(options: GuidanceOptions) -> GuidanceOptions:
    """Complete the options by the run's own settings.

    Raises ValueError for options that do not fit.
    """
    if options.arch and (options.ckpt or options.base):
        raise ValueError(f"--arch {options.arch} has random weights; leave it or --ckpt and --base out")
    if not (options.arch or options.ckpt or options.base):
        raise ValueError("say what to measure: --ckpt, --base or --arch")
    if options.reward and not options.ckpt:
        raise ValueError("--reward needs --ckpt: a random LoRA gains nothing")
    counts = {
        name: getattr(options, name) for name in ("k", "batch_size", "repeats", "calibration_prompts", "lora_rank")
    }
    counts["batch_sizes"] = min(options.batch_sizes, default=1)
    wrong = [name for name, value in counts.items() if value < 1]
    if wrong:
        raise ValueError(f"--{wrong[0]} must be at least 1")
    if options.budget is not None and not options.budget >= 1:
        raise ValueError(f"--budget {options.budget:g}: nothing costs less than the tuned model alone, which is 1")
    known = run_settings(Path(options.ckpt)) if options.ckpt else {}
    if options.prompts:
        known.pop("prompt_column", None)
    known.pop("dtype", None)  # a CPU is slow in the precision of a training
    fallback = {
        "prompts": ORIGIN,
        "steps": 10,
        "kernel": "ode",
        "level": 0.7,
        "cfg": 1.0,
        "dtype": "float32",
    }
    fallback["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    known = {name: value for name, value in known.items() if name in {field.name for field in fields(options)}}
    own = {name: value for name, value in {**fallback, **known}.items() if getattr(options, name) is None}
    return replace(options, **own, mode=tuple(dict.fromkeys(options.mode or DEFAULT_MODES)))


def load(options: GuidanceOptions) -> Policy:
    """Load the model that is measured.

    Raises ValueError if it is missing or does not fit.
    """
    if options.arch:
        return random_policy(options.arch, options.dtype, options.device, options.lora_rank)
    tuned = resolve(options.ckpt) if options.ckpt else None
    base = base_of(tuned, options.base) if tuned else options.base
    policy = Policy.load(base, options.dtype, options.device, t5_length=options.t5_length, vae_dtype=options.vae_dtype)
    if tuned:
        policy.load_tuned(tuned)
        return policy
    generator = torch.Generator(policy.device).manual_seed(options.seed)
    for parameter in policy.add_lora(options.lora_rank, 2 * options.lora_rank):
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=_LORA_STD, generator=generator)
    return policy


def run(options: GuidanceOptions, reward: Any | None) -> Path:
    """Measure, choose and write; return the folder.

    Raises ValueError for options that do not fit.
    """
    folder = output_of(options)
    prompts = prompt_sets.load(options.prompts, options.prompt_column)
    ids = spread(prompts, options.num_prompts)
    if reward:
        reward.check(*columns([prompts[i] for i in ids]))
    chosen_on, measured_on = split(ids, options)
    settings = CostSettings(**{field.name: getattr(options, field.name) for field in fields(CostSettings)})
    bench = Bench(load(options), prompts, settings, reward)
    bench.check(options.mode)
    exact = exact_modes(bench)
    choice = calibrate(bench, options, chosen_on) if options.budget is not None else None
    names = list(
        dict.fromkeys([BASE, TUNED, FULL, *options.mode, *([choice["mode"], choice["nearest"]] if choice else [])])
    )
    ids = samples_of(measured_on, options.k, options.seed)
    peaks = bench.peaks(names, ids[: options.batch_size])
    results = compare(bench.run(names, ids), ids, peaks)
    peak = flops.matmul_peak(DTYPES[options.dtype], options.device)
    rows = batches(bench, compiled(options, prompts, settings) if options.compile else None, exact, options, peak)
    report = {
        "command": {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()},
        "machine": timing.machine(options.device)
        | {"dtype": options.dtype, "matmul_peak_gflops": round(peak / 1e9, 1)},
        "n": len(ids),
        "prompts": len(measured_on),
        "reward": reward.names[0] if reward else None,
        "choice": choice,
        "results": [result.as_json() for result in results],
        "batches": rows,
        "saturates": saturates(rows),
        "sweep": sweeps(bench, options),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "table.md").write_text(table(report))
    save(draw(report), folder / "cost")
    return folder


def output_of(options: GuidanceOptions) -> Path:
    """The folder to write to.

    Raises ValueError if it holds results, and may not be overwritten.
    """
    model = options.arch or (Path(options.ckpt).resolve().parent.name if options.ckpt else Path(options.base).name)
    name = f"guidance-{model}-{options.kernel}{options.steps}-cfg{options.cfg:g}-w{options.w:g}-seed{options.seed}"
    folder = options.output or Path("runs/benchmarks") / name
    if (folder / "results.json").exists() and not options.overwrite:
        raise ValueError(f"{folder} holds results; give --overwrite, or another --output")
    return folder


def split(ids: Sequence[int], options: GuidanceOptions) -> tuple[list[int], list[int]]:
    """(prompts to choose a mode on, prompts to measure on).

    They have none in common. Each part is spread over the set.
    """
    if options.budget is None:
        return [], list(ids)
    if len(ids) <= options.calibration_prompts:
        raise ValueError(
            f"--calibration_prompts {options.calibration_prompts} of {len(ids)} leave none to measure on; lower it"
        )
    chosen = {ids[i] for i in spread(ids, options.calibration_prompts)}
    return sorted(chosen), [i for i in ids if i not in chosen]


def samples_of(prompt_ids: Sequence[int], k: int, seed: int) -> list[SampleId]:
    """Identities of the images of some prompts."""
    return [SampleId(seed, prompt, i) for prompt in prompt_ids for i in range(k)]


def exact_modes(bench: Bench) -> list[str]:
    """Modes that equal full guidance, to rounding.

    A full network can't be switched within a batch.
    """
    return [FULL] if bench.policy.tuned is not None else [FULL, FULL + BATCH]


def calibrate(bench: Bench, options: GuidanceOptions, prompt_ids: Sequence[int]) -> dict[str, Any]:
    """Choose the modes that a budget buys.

    Returns them with the measurements behind the choice. Raises ValueError if the budget buys none.
    """
    ids = samples_of(prompt_ids, options.k, options.seed + _CALIBRATION_SEED)
    within = candidates(bench.schedule, options.cfg, options.w, bench.policy.tuned is not None, options.budget)
    names = list(dict.fromkeys([BASE, TUNED, FULL, *within]))
    bench.denoise(FULL, ids[: options.batch_size])  # a warm-up
    clock = "cost" if bench.policy.device.type == "cuda" else "cpu_cost"
    results = compare(bench.run(names, ids), ids, {})
    most, nearest = pick(results, options.budget, clock)
    print(
        f"--budget {options.budget:g}: {f'keeps most: {_found(most, clock)}; ' if bench.reward else ''}nearest to "
        f"full guidance: {_found(nearest, clock)}; by {len(ids)} images of {len(prompt_ids)} prompts, of "
        f"{len(within)} candidates",
        file=sys.stderr,
    )
    chosen = {"mode": most.mode, "nearest": nearest.mode, "budget": options.budget, "n": len(ids)}
    return {**chosen, "candidates": [r.as_json() for r in results]}


def _found(result: Result, clock: str) -> str:
    gained = f", {result.kept.mean:.0%} of the gain" if result.kept else ""
    return f"{result.mode} (cost {getattr(result, clock).mean:.2f}{gained}, distance {result.distance.mean:.2f})"


def compiled(options: GuidanceOptions, prompts: Sequence[Prompt], settings: CostSettings) -> Bench:
    """The same model once more, with its network compiled.

    The first passes of each batch size take minutes.
    """
    bench = Bench(load(options), prompts, settings, None)
    for network in (bench.policy.network, bench.policy.tuned):
        if network is not None:
            network.compile()
    return bench


def batches(
    bench: Bench, fast: Bench | None, exact: Sequence[str], options: GuidanceOptions, peak: float
) -> list[dict[str, Any]]:
    """Cost, throughput and utilisation of the exact modes at each batch size.

    fast: the compiled bench. peak: operations a second, of which utilisation is a share.
    """
    rows = []
    for size in options.batch_sizes:
        ids = samples_of([0], size, options.seed)
        contenders = {name: partial(bench.denoise, name, ids) for name in (TUNED, *exact)}
        operations = {name: flops.flops(run) / size for name, run in contenders.items()}
        for name in (TUNED, FULL) if fast else ():
            contenders[name + COMPILED] = partial(fast.denoise, name, ids)
            operations[name + COMPILED] = operations[name]
        timed = _timed(contenders, options, size)
        used = {
            name: flops.utilisation(operations[name], 1 / timed["images_per_second"][name], peak)
            for name in contenders
        }
        rows.append({"batch": size, **timed, "utilisation": used})
    return rows


def saturates(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The batch size by mode beyond which throughput hardly grows."""
    names = rows[0]["cost"] if rows else ()
    return {name: flops.saturates_at({row["batch"]: row["images_per_second"][name] for row in rows}) for name in names}


def sweeps(bench: Bench, options: GuidanceOptions) -> dict[str, Any]:
    """Seconds of a sweep over w, run in three ways.

    They are each w on its own, all in one batch, and all with a shared first step.
    """
    ids = samples_of([0], max(1, options.batch_size // len(_SWEEP)), options.seed)
    contenders: dict[str, Callable[[], object]] = {
        TUNED: lambda: bench.denoise(TUNED, ids),
        "each w on its own": lambda: [bench.denoise(FULL, ids, w) for w in _SWEEP],
        "all w in one batch": lambda: bench.denoise_sweep(_SWEEP, ids, shared=False),
        "one batch, first step shared": lambda: bench.denoise_sweep(_SWEEP, ids, shared=True),
    }
    return {"scales": list(_SWEEP), "images": len(ids), **_timed(contenders, options, len(ids))}


def _timed(contenders: Mapping[str, Callable[[], object]], options: GuidanceOptions, images: int) -> dict[str, Any]:
    times = timing.interleaved(contenders, options.repeats, options.device)
    return {
        "seconds": {name: stats.median(t.wall_R).mean / images for name, t in times.items()},
        "cost": {name: asdict(timing.ratio(t.wall_R, times[TUNED].wall_R)) for name, t in times.items()},
        "cpu_cost": {name: asdict(timing.ratio(t.cpu_R, times[TUNED].cpu_R)) for name, t in times.items()},
        "images_per_second": {
            name: images / stats.median(flops.seconds_by_round(t, options.device)).mean for name, t in times.items()
        },
    }
