"""The command line of `python -m rlg.evaluate`, over a YAML file, over the run's own settings; what it asks for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlg import blend, networks
from rlg.blend_evaluator import BLEND_LS, BlendSettings
from rlg.choose import GOALS, Goal
from rlg.cli import TUNED_HELP, Parser
from rlg.evaluator import LORA_SCALE, EvalSettings, modes_of
from rlg.policy import DTYPES
from rlg.process import KERNELS
from rlg.stats import BLEND_MODES, MODES, RLG_LS
from rlg.weight_schedule import CONSTANT, FORMS, WeightSchedule

DESCRIPTION = "Evaluate a tuned model under Reinforcement Learning Guidance over a sweep of w."
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
OF_BLENDS = ("blend_scale", "blend_modes", "morl")  # options that do nothing without --blend


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.evaluate", description=DESCRIPTION)
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
    add("--schedule", help=f"of w over the steps: {', '.join(FORMS)} (LOW < sigma <= HIGH); default: {CONSTANT}")
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
    add("--report_to", choices=("wandb", "none"), default="none", help="a tracker that mirrors the files")
    add("--project", default="rlg", help="project name for the tracker")
    add("--log_adapter", action="store_true", help="keep the adapter as an artifact of the tracker, too")
    add("--overwrite", action="store_true", help="discard what an earlier evaluation left in the output folder")
    return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, from the command line over a YAML file over the run's own settings. Raises ValueError."""
    return complete(read_arguments(build_parser(), argv))


def read_arguments(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, from the command line over a YAML file; None where neither has a say. Raises ValueError."""
    from rlg.config import read_yaml

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
    args.ckpt = args.ckpts[0]
    return args


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The same arguments, with the run's own settings where there were none. Raises ValueError."""
    from rlg.config import run_settings

    if len(args.ckpts) > 1 and not args.blend:
        raise ValueError(f"{len(args.ckpts)} --ckpt are given: --blend START:STOP:STEP says how to mix them")
    if not args.blend and (given := given_of(args, OF_BLENDS)):
        raise ValueError(f"--{given[0]} does nothing without --blend")
    settings = [run_settings(Path(ckpt)) for ckpt in args.ckpts]
    for option in ("rewards", "held_out"):
        if getattr(args, option) is None:
            _check_servers(option, [name for row in settings for name in row.get(option) or ()])
    if args.blend and args.rewards is None and all("rewards" in row for row in settings):
        args.rewards = list(dict.fromkeys(name for row in settings for name in row["rewards"]))
    for name, value in settings[0].items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    return args


def _check_servers(option: str, names: Sequence[str]) -> None:
    """Raise ValueError for a reward on another machine that a checkpoint names: images and a token would go there."""
    for name in names:
        host = urlsplit(name.partition("=")[2]).hostname
        if host and host not in _LOOPBACK:
            raise ValueError(
                f"the run was scored by {name}, and evaluating it would send images there; if that server is yours, "
                f"give --{option} {' '.join(names)}"
            )


def given_of(args: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """Those of some options that are given."""
    return [name for name in names if getattr(args, name) is not None]


def _as_arguments(row: dict[str, Any]) -> Iterator[str]:
    """A YAML row as a command line, so that types and choices are checked in one place."""
    for name, value in row.items():
        if name in ("ckpt", "tuned") and isinstance(value, list):
            yield from (f"--{name}={each}" for each in value)
        elif value is not None and value is not False:
            yield f"--{name}"
            yield from map(str, [] if value is True else value if isinstance(value, list) else [value])


def settings_of(args: argparse.Namespace) -> EvalSettings:
    """What decides the rows. Raises ValueError for values that make no evaluation."""
    common: dict[str, Any] = dict(
        steps=20 if args.steps is None else args.steps,
        sampler=args.sampler or "ode",
        level=0.7 if args.level is None else args.level,
        cfg=4.5 if args.cfg is None else args.cfg,
        resolution=args.resolution,
        k=args.k,
        seed=args.seed,
        batch_size=args.batch_size,
        origin=args.origin,
        schedule=str(WeightSchedule.parse(args.schedule or CONSTANT)),
    )
    if args.blend:
        return _blend_settings(args, common)
    scales = tuple(sorted({float(f"{w:g}") for w in args.scales}))
    return EvalSettings(scales=scales, modes=modes_of(args.modes, networks.is_network(args.ckpt)), **common)


def _blend_settings(args: argparse.Namespace, common: dict[str, Any]) -> BlendSettings:
    if args.modes:
        raise ValueError("--modes are those of a sweep over w; a blend has --blend_modes")
    scale = 1.0 if args.blend_scale is None else args.blend_scale
    drawn = common["sampler"] != "ode" and 0 <= scale <= 1
    modes = args.blend_modes or [mode for mode in BLEND_MODES if drawn or mode != BLEND_LS]
    own = {"scales": blend.grid(args.blend), "blend_scale": scale, "morl": len(args.morl or [])}
    return BlendSettings(modes=tuple(modes), **own, **common)


def goal_of(args: argparse.Namespace) -> Goal | None:
    """What w is chosen by, if it is. Raises ValueError for a goal that does not go with the other arguments."""
    given = given_of(args, GOALS)
    if not given:
        return None
    if args.calibration_prompts < 1:
        raise ValueError(f"--calibration_prompts must be at least 1, got {args.calibration_prompts}")
    if args.blend:
        raise ValueError(f"--{given[0]} chooses one w, and --blend sweeps lambda; give one of them")
    if given[0] == "min_ess" and settings_of(args).schedule != CONSTANT:
        raise ValueError(f"--min_ess weighs the images of a w that stays; leave out --schedule {args.schedule}")
    return Goal(given[0], getattr(args, given[0]))
