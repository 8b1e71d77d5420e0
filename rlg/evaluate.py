"""Evaluate a tuned model under Reinforcement Learning Guidance over a sweep of w.

    python -m rlg.evaluate --ckpt runs/NAME/checkpoint-N --scales 0 0.25 0.5 0.75 1 1.5 2 3
    python -m rlg.evaluate --tuned USER/REPO --base BASE     # made elsewhere: a LoRA, or a full fine-tuned network

What the rows mean is said in `rlg.evaluator`. What is already scored is not done again, but for a prompt at a scale
that was cut off midway.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rewards import RewardMix
from rlg import adapters, hub, networks
from rlg import prompts as prompt_sets
from rlg.cli import TUNED_HELP, Parser, fail_cleanly
from rlg.eval_folder import Job, merge, prepare_folder
from rlg.evaluator import LORA_SCALE, RLG, EvalSettings, Evaluator, evaluate, modes_of, progress, units_left
from rlg.policy import DTYPES, Policy, base_of
from rlg.process import KERNELS
from rlg.prompts import Prompt
from rlg.stats import MODES
from rlg.weight_schedule import CONSTANT, FORMS, WeightSchedule


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
    add("--schedule", help=f"of w over the steps: {', '.join(FORMS)} (LOW < sigma <= HIGH); default: {CONSTANT}")
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
    return complete(read_arguments(build_parser(), argv))


def read_arguments(parser: Parser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, from the command line over a YAML file; None where neither has a say. Raises ValueError."""
    from rlg.config import read_yaml

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
    return args


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """The same arguments, with the run's own settings where there were none."""
    from rlg.config import run_settings

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


def settings_of(args: argparse.Namespace) -> EvalSettings:
    """What decides the rows. Raises ValueError for values that make no evaluation."""
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
        schedule=str(WeightSchedule.parse(args.schedule or CONSTANT)),
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


@dataclass(frozen=True)
class Loaded:
    """What evaluations of one tuned model share."""

    state: Any  # accelerate's PartialState
    policy: Policy
    reward: RewardMix
    prompts: Sequence[Prompt]
    ids: Sequence[int]  # indices of the prompts that are used


@dataclass(frozen=True)
class Evaluation:
    """An evaluator and its folder."""

    evaluator: Evaluator
    folder: Path
    meta: dict[str, Any]  # of meta.json
    images: int  # prompts whose images are kept; -1 keeps all
    overwrite: bool


def load(args: argparse.Namespace) -> Loaded:
    """Models, rewards and prompts. Raises ValueError for what does not fit together."""
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    import rewards

    base = base_of(args.ckpt, args.base)
    settings_of(args)  # refused before anything is loaded
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num_prompts must be at least 1, got {args.num_prompts}")
    prompts = prompt_sets.load(_source(args))
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))  # else every process believes it is alone
    reward = rewards.build(_reward_names(args)[1], device=str(state.device))
    policy = Policy.load(base, args.dtype or "float32", state.device)
    policy.load_tuned(args.ckpt)
    if policy.tuned is not None and state.is_main_process:
        print(networks.memory(policy.network, policy.tuned), file=sys.stderr)  # stdout is the report's path
    return Loaded(state, policy, reward, prompts, prompt_sets.spread(prompts, args.num_prompts))


def _source(args: argparse.Namespace) -> str:
    return args.prompts or "tinyworld:composition/test"


def _reward_names(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """(those that were trained on, all)."""
    trained = list(args.rewards or ["jpeg_compressibility"])
    return trained, list(dict.fromkeys([*trained, *(args.held_out or [])]))


def begin(args: argparse.Namespace, loaded: Loaded) -> Evaluation:
    """The evaluation that the arguments ask for; writes nothing. Raises ValueError for settings that do not fit."""
    settings = settings_of(args)
    trained, names = _reward_names(args)
    name, home = home_of(args.ckpt)
    ident = f"{settings.sampler}{settings.steps}-cfg{settings.cfg:g}-seed{settings.seed}"
    ident += "" if settings.origin is None else f"-from-{Path(settings.origin).stem}"
    ident += "" if settings.schedule == CONSTANT else f"-{settings.schedule.replace(':', '_')}"
    meta = {
        "name": name if settings.origin is None else f"{name} from {Path(settings.origin).stem}",
        "base": base_of(args.ckpt, args.base),
        "adapter": str(Path(args.ckpt)),
        "trained_rewards": [name.partition("=")[0] for name in trained],  # as the rows name them
        "rewards": names,
        "prompts": _source(args),
        "num_prompts": len(loaded.ids),
        "dtype": args.dtype or "float32",
        **{k: v for k, v in asdict(settings).items() if k not in ("scales", "modes", "batch_size")},
    }
    folder = args.output or home / "eval" / f"{Path(args.ckpt).resolve().name}-{ident}"
    evaluator = Evaluator(loaded.policy, loaded.reward, loaded.prompts, settings)
    return Evaluation(evaluator, folder, meta, args.images, args.overwrite)


def finish(evaluations: Sequence[Evaluation], loaded: Loaded) -> None:
    """Make and score what the folders lack, under one progress bar, and write each one's report."""
    from rlg.report import write_report

    state, ids = loaded.state, loaded.ids
    if state.is_main_process:
        for evaluation in evaluations:
            prepare_folder(evaluation.folder, evaluation.meta, evaluation.overwrite)
            merge(evaluation.folder)
    state.wait_for_everyone()
    share = state.process_index, state.num_processes
    left = [sum(map(len, units_left(e.evaluator.settings, e.folder, ids, *share))) for e in evaluations]
    with progress(sum(left), state.process_index) as bar:
        for evaluation in evaluations:
            evaluate(evaluation.evaluator, evaluation.folder, ids, _keep(evaluation, ids), *share, bar)
            state.wait_for_everyone()
            if state.is_main_process:
                merge(evaluation.folder)
                write_report(evaluation.folder)


def _keep(evaluation: Evaluation, ids: Sequence[int]) -> Callable[[Job], bool]:
    everything = evaluation.images < 0
    shown = {ids[i] for i in prompt_sets.spread(ids, None if everything else evaluation.images)}
    return lambda job: job.mode == RLG and job.prompt_id in shown and (job.k == 0 or everything)


def run(args: argparse.Namespace) -> Path:
    """Evaluate and report; returns the output folder."""
    loaded = load(args)
    evaluation = begin(args, loaded)
    finish([evaluation], loaded)
    if loaded.state.is_main_process:
        print(evaluation.folder / "report.html")
    return evaluation.folder


if __name__ == "__main__":
    main()
