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
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from rewards import RewardMix
from rlg import adapters, hub, model_card, networks, run_lock, wandb_log
from rlg import prompts as prompt_sets
from rlg.blend_evaluator import (
    BlendEvaluator,
    BlendSettings,
    allow_more_morl,
    check_pair,
    labels_of,
    load_experts,
    short_names,
)
from rlg.choose import Goal, choose
from rlg.cli import fail_cleanly
from rlg.eval_arguments import goal_of, parse, settings_of
from rlg.eval_folder import Job, merge, prepare_folder
from rlg.evaluator import EvalSettings, Evaluator, evaluate, progress, units_left
from rlg.policy import Policy, base_of
from rlg.prompts import Prompt
from rlg.stats import Row
from rlg.together import Interruption, together
from rlg.weight_schedule import CONSTANT


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(parse(argv))


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


def names_of(args: argparse.Namespace, settings: EvalSettings, goal: Goal | None) -> tuple[Path, dict[str, Any]]:
    """The output folder, and what meta.json says of the models."""
    runs = [(*home_of(ckpt), Path(ckpt).resolve().name) for ckpt in args.ckpts]
    name, home, file = runs[0]
    parts = [f"{settings.sampler}{settings.steps}", f"cfg{settings.cfg:g}", f"seed{settings.seed}"]
    naming: dict[str, Any] = {"name": name, "adapter": " + ".join(str(Path(ckpt)) for ckpt in args.ckpts)}
    if settings.origin is not None:
        naming["name"] += f" from {Path(settings.origin).stem}"
        parts.append(f"from-{Path(settings.origin).stem}")
    if settings.schedule != CONSTANT:
        parts.append(settings.schedule.replace(":", "_"))
    if goal:
        parts.append(f"{goal.option}{goal.value:g}")
    if isinstance(settings, BlendSettings):
        labels = labels_of([(name, file) for name, _, file in runs])
        file = "-with-".join([file, *(f"{n}-{f}" for n, _, f in runs[1:])])
        parts += [] if settings.blend_scale == 1 else [f"scale{settings.blend_scale:g}"]
        morl = [str(Path(ckpt)) for ckpt in args.morl or []]
        naming |= {"name": " + ".join(labels), "experts": short_names(labels), "morl": morl}
    return args.output or home / "eval" / "-".join([file, *parts]), naming


@dataclass(frozen=True)
class Loaded:
    """What evaluations of the same models share."""

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
    tracking: wandb_log.Tracking | None
    checkpoints: Sequence[Path]  # whose model cards show the curve


def load(args: argparse.Namespace) -> Loaded:
    """Models, rewards and prompts. Raises ValueError for what does not fit together."""
    import torch
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    import rewards

    tracking = tracking_of(args)
    settings_of(args), goal_of(args)  # refused before anything is loaded
    base = base_of(args.ckpt, args.base)
    if args.num_prompts is not None and args.num_prompts < 1:
        raise ValueError(f"--num_prompts must be at least 1, got {args.num_prompts}")
    prompts = prompt_sets.load(_source(args))
    trained, names = _reward_names(args)
    if args.blend:
        check_pair(args.ckpts, args.morl or [], trained)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)  # without being told, every process on the CPU believes that it is alone
    if tracking and state.is_main_process:
        wandb_log.require()
    reward = rewards.build(names, device=str(state.device))
    policy = Policy.load(base, args.dtype or "float32", state.device)
    if args.blend:
        load_experts(policy, args.ckpts, args.morl or [])
    else:
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
    settings, goal = settings_of(args), goal_of(args)
    silent = None if loaded.state.is_main_process else True  # None: unless it is a terminal
    kind = BlendEvaluator if isinstance(settings, BlendSettings) else Evaluator
    evaluator = kind(loaded.policy, loaded.reward, loaded.prompts, settings)
    folder, naming = names_of(args, settings, goal)
    trained, names = _reward_names(args)
    meta = {
        **naming,
        "base": base_of(args.ckpt, args.base),
        "trained_rewards": [name.partition("=")[0] for name in trained],  # as the rows name them
        "rewards": names,
        "prompts": _source(args),
        "num_prompts": len(loaded.ids),
        "chosen": _choose(goal, evaluator, prompt_sets.spread(loaded.ids, args.calibration_prompts), names[0], silent),
        "dtype": args.dtype or "float32",
        **{k: v for k, v in asdict(settings).items() if k not in ("scales", "modes", "batch_size", "morl")},
    }
    return Evaluation(
        evaluator, folder, meta, args.images, args.overwrite, tracking_of(args), list(map(Path, args.ckpts))
    )


def tracking_of(args: argparse.Namespace) -> wandb_log.Tracking | None:
    """Where the evaluation is mirrored to. Raises ValueError if that is not possible."""
    if args.report_to == "none":
        if args.log_adapter:
            raise ValueError("--log_adapter keeps the adapter as an artifact of W&B; add --report_to wandb")
        return None
    folders = [Path(ckpt) for ckpt in args.ckpts] if args.log_adapter else []
    for folder in folders:
        if not model_card.files(folder):
            raise ValueError(f"--log_adapter: {folder} is no checkpoint of ours here")
    return wandb_log.Tracking(args.project, tuple(folders))


def _choose(
    goal: Goal | None, evaluator: Evaluator, ids: Sequence[int], reward: str, silent: bool | None
) -> dict[str, Any] | None:
    """Have the evaluator sweep over w = 0, 1 and the w of a goal, by the prompts `ids`; the `chosen` of meta.json."""
    if goal is None:
        return None
    with tqdm(desc=f"w for {goal.option}", unit="w", disable=silent) as bar:  # how many it tries is not known before

        def rows_at(w: float) -> list[Row]:
            rows = evaluator.rows_at(ids, w)
            bar.update()
            return rows

        w = choose(goal, rows_at, reward)
    print(f"--{goal.option} {goal.value:g}: w = {w:g}, by {len(ids)} prompts", file=sys.stderr)
    evaluator.settings = replace(evaluator.settings, scales=tuple(sorted({0.0, 1.0, w})))
    return asdict(goal) | {"w": w}


def finish(evaluations: Sequence[Evaluation], loaded: Loaded) -> None:
    """Make and score what the folders lack, under one progress bar, and write each one's report.

    Raises ValueError where another process works in one of the folders. SIGINT and SIGTERM finish the unit at work,
    keep what is scored, and end the command with exit code 0.
    """
    from rlg.report import write_report

    state, ids = loaded.state, loaded.ids
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        with together():
            if state.is_main_process:
                for evaluation in evaluations:
                    stack.enter_context(run_lock.held(evaluation.folder))
                    _prepare(evaluation)
        share = state.process_index, state.num_processes
        left = [sum(map(len, units_left(e.evaluator.settings, e.folder, ids, *share))) for e in evaluations]
        with progress(sum(left), state.process_index) as bar:
            for evaluation in evaluations:
                folder, tracking = evaluation.folder, evaluation.tracking if state.is_main_process else None
                with wandb_log.evaluation_run(tracking, folder, evaluation.meta) as tracked:
                    evaluate(evaluation.evaluator, folder, ids, _keep(evaluation, ids), *share, bar, interruption)
                    state.wait_for_everyone()
                    if state.is_main_process:
                        merge(folder)
                    interruption.leave()
                    if state.is_main_process:
                        write_report(folder)
                        model_card.update_all(evaluation.checkpoints)
                    if tracked:
                        wandb_log.log_evaluation(tracked, folder, tracking)


def _prepare(evaluation: Evaluation) -> None:
    """Bring the folder into the state that the evaluation goes on from. Raises ValueError if it is of another one."""
    if "morl" in evaluation.meta and not evaluation.overwrite:
        allow_more_morl(evaluation.folder, evaluation.meta["morl"])
    prepare_folder(evaluation.folder, evaluation.meta, evaluation.overwrite)
    if evaluation.overwrite:
        wandb_log.forget(evaluation.folder)
    merge(evaluation.folder)


def _keep(evaluation: Evaluation, ids: Sequence[int]) -> Callable[[Job], bool]:
    everything = evaluation.images < 0
    shown = {ids[i] for i in prompt_sets.spread(ids, None if everything else evaluation.images)}
    shows = evaluation.evaluator.settings.shows
    return lambda job: shows(job) and job.prompt_id in shown and (job.k == 0 or everything)


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
