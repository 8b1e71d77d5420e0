"""Evaluate a tuned model under Reinforcement Learning Guidance over a sweep of w.

    python -m rlg.evaluate --ckpt runs/NAME/checkpoint-N --scales 0 0.25 0.5 0.75 1 1.5 2 3
    python -m rlg.evaluate --tuned USER/REPO --base BASE     # made elsewhere: a LoRA, or a full fine-tuned network
    python -m rlg.evaluate --ckpt runs/A/checkpoint-N --ckpt runs/B/checkpoint-N --blend 0:1:0.1     # two experts

What the rows mean is said in `rlg.evaluator`, and for two experts in `rlg.blend_evaluator`. What is already scored is
not done again, but for a prompt at a scale that was cut off midway.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rlg import adapters, blend, hub, networks
from rlg import prompts as prompt_sets
from rlg.blend_evaluator import (
    BLEND_LS,
    BlendEvaluator,
    BlendSettings,
    allow_more_morl,
    check_pair,
    load_experts,
    short_names,
)
from rlg.choose import Goal, choose
from rlg.cli import TUNED_HELP, Parser, fail_cleanly
from rlg.eval_folder import Job, merge, prepare_folder
from rlg.evaluator import LORA_SCALE, EvalSettings, Evaluator, evaluate, modes_of
from rlg.policy import DTYPES, Policy, base_of
from rlg.process import KERNELS
from rlg.stats import BLEND_MODES, MODES, RLG_LS


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.evaluate", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--config", type=Path, help="YAML file with any of these options; the command line wins")
    add("--ckpt", "--tuned", dest="ckpts", metavar="TUNED", action="append", help=TUNED_HELP + "; two for --blend")
    add("--base", help="base model (default: the one that the adapter was trained on)")
    add(
        "--origin",
        metavar="FILE",
        help="adapter that guidance starts from instead of the base: CKPT/trainer_state/lora_old.safetensors of NFT",
    )
    add("--scales", type=float, nargs="+", default=[0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3], help="values of w")
    add(
        "--modes",
        nargs="+",
        help=f"of {', '.join((*MODES, RLG_LS))}; default: the first three (no {LORA_SCALE} for a full network)",
    )
    goals = parser.add_mutually_exclusive_group()  # in place of --scales: the base, the tuned model and the w chosen
    goals.add_argument("--kl_budget", type=float, help="choose the w that spends this many nats of path KL")
    goals.add_argument("--target_reward", type=float, help="choose the w that reaches this mean of the first reward")
    goals.add_argument("--min_ess", type=float, help="choose the largest w > 1 of at least this effective share")
    add("--calibration_prompts", type=int, default=16, help="prompts that w is chosen on")
    add(
        "--blend", metavar="START:STOP:STEP", help="blend two experts: the weights of the last --ckpt, such as 0:1:0.1"
    )
    add("--blend_scale", type=float, metavar="W", help="base + W * (blend - base) (default: 1)")
    add("--blend_modes", nargs="+", choices=BLEND_MODES, help=f"default: all that apply ({BLEND_LS}: no ODE, W <= 1)")
    add("--morl", nargs="+", metavar="CKPT", help="adapters trained on a mix of the two rewards, as further points")
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
        known = set(vars(args)) - {"config", "ckpts"} | {"ckpt", "tuned"}
        unknown = sorted(set(row) - known)
        if unknown:
            raise ValueError(f"{args.config}: unknown key {unknown[0]!r}; known: {', '.join(sorted(known))}")
        if args.ckpts:
            row = {name: value for name, value in row.items() if name not in ("ckpt", "tuned")}
        args = parser.parse_args([*_as_arguments(row), *argv])
    if not args.ckpts:
        raise ValueError(f"--ckpt is needed (or --tuned): {TUNED_HELP}")
    if len(args.ckpts) > 1 and not args.blend:
        raise ValueError(f"{len(args.ckpts)} --ckpt are given: --blend START:STOP:STEP says how to mix them")
    if not args.blend and (
        given := [n for n in ("blend_scale", "blend_modes", "morl") if getattr(args, n) is not None]
    ):
        raise ValueError(f"--{given[0]} does nothing without --blend")
    args.ckpt = args.ckpts[0]
    settings = [run_settings(Path(ckpt)) for ckpt in args.ckpts]
    if args.blend and args.rewards is None and all("rewards" in row for row in settings):
        args.rewards = list(dict.fromkeys(name for row in settings for name in row["rewards"]))
    for name, value in settings[0].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def _as_arguments(row: dict[str, Any]) -> Iterator[str]:
    """A YAML row as a command line, so that types and choices are checked in one place."""
    for name, value in row.items():
        if name in ("ckpt", "tuned") and isinstance(value, list):
            yield from (f"--{name}={each}" for each in value)
        elif value is not None and value is not False:
            yield f"--{name}"
            yield from map(str, [] if value is True else value if isinstance(value, list) else [value])


def _settings(args: argparse.Namespace) -> EvalSettings:
    common = _common(args)
    if not args.blend:
        scales = tuple(sorted({float(f"{w:g}") for w in args.scales}))
        return EvalSettings(scales=scales, modes=modes_of(args.modes, networks.is_network(args.ckpt)), **common)
    if args.modes:
        raise ValueError("--modes are those of a sweep over w; a blend has --blend_modes")
    scale = 1.0 if args.blend_scale is None else args.blend_scale
    drawn = common["sampler"] != "ode" and 0 <= scale <= 1
    modes = args.blend_modes or [mode for mode in BLEND_MODES if drawn or mode != BLEND_LS]
    own = {"scales": blend.grid(args.blend), "blend_scale": scale, "morl": len(args.morl or [])}
    return BlendSettings(modes=tuple(modes), **own, **common)


def _common(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that a sweep over w and a blend share."""
    return dict(
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


def _goal(args: argparse.Namespace) -> Goal | None:
    given = [name for name in ("kl_budget", "target_reward", "min_ess") if getattr(args, name) is not None]
    if given and args.calibration_prompts < 1:
        raise ValueError(f"--calibration_prompts must be at least 1, got {args.calibration_prompts}")
    if given and args.blend:
        raise ValueError(f"--{given[0]} chooses one w, and --blend sweeps lambda; give one of them")
    return Goal(given[0], getattr(args, given[0])) if given else None


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


def _names(args: argparse.Namespace, settings: EvalSettings, goal: Goal | None) -> tuple[Path, dict[str, Any]]:
    """The output folder, and what meta.json says of the models."""
    runs = [home_of(ckpt) for ckpt in args.ckpts]
    files = [Path(ckpt).resolve().name for ckpt in args.ckpts]
    name, file = runs[0][0], files[0]
    naming: dict[str, Any] = {"name": name, "adapter": str(Path(args.ckpt))}
    ident = f"{settings.sampler}{settings.steps}-cfg{settings.cfg:g}-seed{settings.seed}"
    if settings.origin is not None:
        naming["name"] += f" from {Path(settings.origin).stem}"
        ident += f"-from-{Path(settings.origin).stem}"
    if goal:
        ident += f"-{goal.option}{goal.value:g}"
    if isinstance(settings, BlendSettings):
        names = [run for run, _ in runs]
        labels = names if len(set(names)) == len(names) else [f"{n}/{f}" for n, f in zip(names, files, strict=True)]
        file = "-with-".join([files[0], *(f"{n}-{f}" for n, f in zip(names[1:], files[1:], strict=True))])
        ident += "" if settings.blend_scale == 1 else f"-scale{settings.blend_scale:g}"
        naming = {"name": " + ".join(labels), "adapter": " + ".join(str(Path(ckpt)) for ckpt in args.ckpts)}
        naming |= {"experts": short_names(labels), "morl": [str(Path(ckpt)) for ckpt in args.morl or []]}
    return args.output or runs[0][1] / "eval" / f"{file}-{ident}", naming


def run(args: argparse.Namespace) -> Path:
    """Evaluate and report; returns the output folder."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    import rewards
    from rlg.report import write_report

    settings = _settings(args)
    goal = _goal(args)
    base = base_of(args.ckpt, args.base)
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num_prompts must be at least 1, got {args.num_prompts}")
    source = args.prompts or "tinyworld:composition/test"
    prompts = prompt_sets.load(source)
    ids = prompt_sets.spread(prompts, args.num_prompts)
    trained = list(args.rewards or ["jpeg_compressibility"])
    names = list(dict.fromkeys([*trained, *(args.held_out or [])]))
    if isinstance(settings, BlendSettings):
        check_pair(args.ckpts, args.morl or [], trained)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # else every process believes it is alone
    reward = rewards.build(names, device=str(state.device))
    policy = Policy.load(base, args.dtype or "float32", state.device)
    if isinstance(settings, BlendSettings):
        load_experts(policy, args.ckpts, args.morl or [])
    else:
        policy.load_tuned(args.ckpt)
    if policy.tuned is not None and state.is_main_process:
        print(networks.memory(policy.network, policy.tuned), file=sys.stderr)  # stdout is the report's path
    evaluator = (BlendEvaluator if isinstance(settings, BlendSettings) else Evaluator)(
        policy, reward, prompts, settings
    )
    folder, naming = _names(args, settings, goal)
    chosen = None
    if goal:
        calibration = prompt_sets.spread(ids, args.calibration_prompts)
        w = choose(goal, partial(evaluator.rows_at, calibration), names[0])
        chosen = asdict(goal) | {"w": w}
        print(f"--{goal.option} {goal.value:g}: w = {w:g}, by {len(calibration)} prompts", file=sys.stderr)
        settings = evaluator.settings = replace(settings, scales=tuple(sorted({0.0, 1.0, w})))
    meta = {
        **naming,
        "base": base,
        "trained_rewards": [name.partition("=")[0] for name in trained],  # as the rows name them
        "rewards": names,
        "prompts": source,
        "num_prompts": len(ids),
        "chosen": chosen,
        "dtype": args.dtype or "float32",
        **{k: v for k, v in asdict(settings).items() if k not in ("scales", "modes", "batch_size", "morl")},
    }
    if state.is_main_process:
        if "morl" in meta and not args.overwrite:
            allow_more_morl(folder, meta["morl"])
        prepare_folder(folder, meta, args.overwrite)
        merge(folder)
    state.wait_for_everyone()
    shown = {ids[i] for i in prompt_sets.spread(ids, args.images if args.images >= 0 else None)}

    def keep(job: Job) -> bool:
        return settings.shows(job) and job.prompt_id in shown and (job.k == 0 or args.images < 0)

    evaluate(evaluator, folder, ids, keep, state.process_index, state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        merge(folder)
        print(write_report(folder))
    return folder


if __name__ == "__main__":
    main()
