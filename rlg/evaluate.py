"""Evaluate a tuned model under Reinforcement Learning Guidance, over several w.

    python -m rlg.evaluate --ckpt runs/NAME/checkpoint-N --w 0 0.25 0.5 0.75 1 1.5 2 3
    python -m rlg.evaluate --tuned USER/REPO --base BASE     # made elsewhere: a LoRA, or a full fine-tuned network
    python -m rlg.evaluate --ckpt runs/A/checkpoint-N --ckpt runs/B/checkpoint-N --blend 0:1:0.1     # two experts

`rlg.evaluation.evaluator` explains the rows, and `rlg.evaluation.blend` those of two experts. Images that are scored
are not made again. Only a prompt that was cut off midway at some w is.
"""

from __future__ import annotations

from rlg.evaluation import options

if __name__ == "__main__":
    options.COMMAND.answer()

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from rewards import RewardMix
from rlg.cli import fail_cleanly
from rlg.config_parser import as_yaml
from rlg.distributed import Interruption, together
from rlg.evaluation.blend import BlendEvaluator, BlendSettings, allow_more_morl, load_experts, morl_name
from rlg.evaluation.choose_w import Choice, Goal, choose
from rlg.evaluation.evaluator import Evaluator, evaluate, progress, units_left
from rlg.evaluation.folder import Job, merge, prepare_folder
from rlg.evaluation.naming import names_of
from rlg.evaluation.request import EvalRequest
from rlg.evaluation.rows import Row
from rlg.io.folders import held
from rlg.io.run_folder import PAGE
from rlg.models import fingerprint, full_networks
from rlg.models.policy import Policy
from rlg.models.tuned_model import TunedModel, resolve
from rlg.prompts import Prompt, columns, spread
from rlg.publishing import model_card, wandb_runs
from rlg.reports import wandb_mirror
from rlg.tasks import prompt_sets

_NOT_IN_META = ("scales", "methods", "batch_size", "morl")  # a later run may add to an evaluation with other values


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        asked = options.completed(argv)
        if asked.dry_run:
            print(dry_run(asked), end="")
        else:
            run(options.request_of(asked, options.models_of(asked)))


def dry_run(asked: options.EvalOptions) -> str:
    """The options as YAML, and the number of images that they request.

    Raises ValueError for options that do not fit together.
    """
    request = options.request_of(asked, options.models_of(asked))
    (prompts,) = prompt_sets.load_each([request.prompts], request.prompt_column)
    count = len(spread(prompts, request.num_prompts))
    images = sum(len(scales) for _, scales in request.settings.sweeps()) * count * request.settings.k
    how = "besides those that w is chosen by" if request.goal else f"{count} prompts of {request.prompts}"
    return f"{as_yaml(asked)}# {images} images, {how}\n"


@dataclass(frozen=True)
class Loaded:
    """Models, rewards and prompts that several evaluations share."""

    state: Any  # accelerate's PartialState
    policy: Policy
    reward: RewardMix
    prompts: Sequence[Prompt]
    ids: Sequence[int]  # indices of the prompts that are used
    tracking: wandb_runs.Tracking | None


@dataclass(frozen=True)
class Evaluation:
    """An evaluator and its folder."""

    evaluator: Evaluator
    folder: Path
    ids: Sequence[int]  # reported prompts: all except those that w was chosen on
    meta: dict[str, Any]  # content of meta.json
    record: Callable[[], fingerprint.Record]  # digests and versions, which meta.json holds as well
    images: int  # prompts whose images are kept; -1 keeps all
    overwrite: bool
    tracking: wandb_runs.Tracking | None
    checkpoints: Sequence[Path]  # their model cards show the curve


def load(request: EvalRequest) -> Loaded:
    """Models, rewards and prompts of a request.

    Raises ValueError for parts that do not fit together.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    import rewards

    tracking = tracking_of(request)
    (prompts,) = prompt_sets.load_each([request.prompts], request.prompt_column)
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu)  # without `cpu`, every process on the CPU believes that it is the only one
    if tracking and state.is_main_process:
        wandb_runs.require()
    reward = rewards.build(list(request.rewards), device=str(state.device))
    ids = spread(prompts, request.num_prompts)
    reward.check(*columns([prompts[i] for i in ids]))
    policy = _policy(request, state.device)
    if policy.tuned is not None and state.is_main_process:
        # stdout is for the report's path.
        print(full_networks.memory(policy.network, policy.tuned), file=sys.stderr)
    return Loaded(state, policy, reward, prompts, ids, tracking)


def _policy(request: EvalRequest, device: torch.device) -> Policy:
    policy = Policy.load(request.base, request.dtype, device, t5_length=request.t5_length, vae_dtype=request.vae_dtype)
    if isinstance(request.settings, BlendSettings):
        load_experts(policy, request.models, request.morl)
    else:
        policy.load_tuned(request.models[0])
    return policy


def begin(request: EvalRequest, loaded: Loaded) -> Evaluation:
    """The evaluation that is requested.

    Where a goal chooses w, images of the calibration prompts are made. No file is written. Raises ValueError for
    settings that do not fit.
    """
    kind = BlendEvaluator if isinstance(request.settings, BlendSettings) else Evaluator
    evaluator = kind(loaded.policy, loaded.reward, loaded.prompts, request.settings)
    folder, naming = names_of(request)
    chosen_on, ids = _split(request.goal, loaded.ids, request.calibration_prompts)
    choice = None
    if request.goal:
        silent = None if loaded.state.is_main_process else True  # None shows the bar in a terminal only
        choice = choose_w(request.goal, evaluator, chosen_on, request.rewards[0], silent)
        evaluator = evaluator.with_scales(sorted({0.0, 1.0, choice.w}))
    meta = {
        **naming,
        "base": request.base,
        "trained_rewards": [name.partition("=")[0] for name in request.trained_rewards],  # the rows use these names
        "rewards": list(request.rewards),
        "reward_models": loaded.reward.models or None,
        "prompts": request.prompts,
        "num_prompts": len(ids),
        "chosen": _choice_row(request.goal, choice, len(chosen_on)),
        "dtype": request.dtype,
        "vae_dtype": request.vae_dtype,
        "t5_length": request.t5_length,
        **{k: v for k, v in asdict(request.settings).items() if k not in _NOT_IN_META},
    }
    return Evaluation(
        evaluator=evaluator,
        folder=folder,
        ids=ids,
        meta=meta,
        record=partial(_record, request, loaded),
        images=request.images,
        overwrite=request.overwrite,
        tracking=loaded.tracking,
        checkpoints=[Path(model.path) for model in request.models],
    )


def _record(request: EvalRequest, loaded: Loaded) -> fingerprint.Record:
    """Digests and versions of all that the rows are made of.

    See `rlg.models.fingerprint`.
    """
    import rewards

    first, *others = request.models
    origin = request.settings.origin
    tuned = {"adapter": first.digest, "origin": origin and resolve(origin).digest}
    tuned |= {f"adapter {place}": model.digest for place, model in enumerate(others, 2)}
    tuned |= {morl_name(place): model.digest for place, model in enumerate(request.morl)}
    packages = [module for name in request.rewards for module in rewards.lookup(name).modules]
    places = rewards.places(list(request.rewards))
    record = fingerprint.record(tuned, request.base, {"prompts": loaded.prompts}, places, packages)
    if not request.base_is_given:
        _check_base(request.models, request.base, record[fingerprint.DIGESTS].get("base"))
    return record


def _check_base(models: Sequence[TunedModel], base: str, found: str | None) -> None:
    """Raise ValueError for an adapter whose base has changed.

    The base's name then stands for other weights than those of the training.
    """
    for model in models:
        trained_on = fingerprint.base_of(model.path)
        if found and trained_on and trained_on != found:
            changed = f"sha256 {trained_on[:12]}, now {found[:12]}"
            raise ValueError(f"{model.path} was trained on another {base} than is there ({changed}); give --base")


def tracking_of(request: EvalRequest) -> wandb_runs.Tracking | None:
    """The tracker that mirrors the evaluation, or None.

    Raises ValueError if that is not possible.
    """
    if request.project is None:
        return None
    folders = [Path(model.path) for model in request.models] if request.log_adapter else []
    for folder in folders:
        if not model_card.files(folder):
            raise ValueError(f"--log_adapter: {folder} is no checkpoint of ours here")
    return wandb_runs.Tracking(request.project, tuple(folders))


def _split(goal: Goal | None, ids: Sequence[int], count: int) -> tuple[Sequence[int], Sequence[int]]:
    """`(prompts that w is chosen on, prompts that are reported)`.

    Raises ValueError where none are left to report.
    """
    if goal is None:
        return [], ids
    chosen_on = [ids[place] for place in spread(ids, count)]
    rest = [each for each in ids if each not in set(chosen_on)]
    if not rest:
        raise ValueError(
            f"--calibration_prompts {count} of {len(ids)} leave none to report on: a w is reported on other prompts "
            "than it was chosen on; lower it"
        )
    return chosen_on, rest


def choose_w(goal: Goal, evaluator: Evaluator, ids: Sequence[int], reward: str, silent: bool | None) -> Choice:
    """The w of a goal, chosen on images of the prompts `ids`.

    It shows a progress bar, and prints the w on one line.
    """
    with tqdm(desc=f"w for {goal.option}", unit="w", disable=silent) as bar:  # the total is not known in advance

        def rows_at(w: float, k: int) -> list[Row]:
            rows = evaluator.rows_at(ids, w, k)
            bar.update()
            return rows

        found = choose(goal, rows_at, reward, evaluator.settings.k)
    share = "" if found.share is None else f", effective share {found.share:.0%} of {found.images} images"
    print(f"--{goal.option} {goal.value:g}: w = {found.w:g}, by {len(ids)} prompts{share}", file=sys.stderr)
    return found


def _choice_row(goal: Goal | None, choice: Choice | None, prompts: int) -> dict[str, Any] | None:
    """The entry of meta.json about the choice of w.

    It is None where w was not chosen.
    """
    if goal is None or choice is None:
        return None
    return asdict(goal) | {"calibration_prompts": prompts} | asdict(choice)


def finish(evaluations: Sequence[Evaluation], loaded: Loaded) -> None:
    """Make and score missing images, and write each evaluation's report.

    There is one progress bar for all. Raises ValueError where another process works in one of the folders. SIGINT and
    SIGTERM finish the present unit, keep all that is scored, and end the command with exit code 0.
    """
    from rlg.reports.evaluation_page import write_report

    state = loaded.state
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        with together():
            if state.is_main_process:
                for evaluation in evaluations:
                    stack.enter_context(held(evaluation.folder))
                    _prepare(evaluation)
        share = state.process_index, state.num_processes
        left = [sum(map(len, units_left(e.evaluator.settings, e.folder, e.ids, *share))) for e in evaluations]
        with progress(sum(left), state.process_index) as bar:
            for evaluation in evaluations:
                folder, ids = evaluation.folder, evaluation.ids
                tracking = evaluation.tracking if state.is_main_process else None
                with wandb_mirror.evaluation_run(tracking, folder, evaluation.meta) as tracked:
                    evaluate(evaluation.evaluator, folder, ids, _keep(evaluation, ids), *share, bar, interruption)
                    state.wait_for_everyone()
                    if state.is_main_process:
                        merge(folder)
                    interruption.leave()
                    if state.is_main_process:
                        write_report(folder)
                        model_card.update_all(evaluation.checkpoints)
                    if tracked:
                        wandb_mirror.log_evaluation(tracked, folder, tracking)


def _prepare(evaluation: Evaluation) -> None:
    """Prepare the folder of an evaluation.

    Raises ValueError if the folder belongs to another one.
    """
    meta = evaluation.meta | evaluation.record()
    if "morl" in meta and not evaluation.overwrite:
        allow_more_morl(evaluation.folder, meta)
    prepare_folder(evaluation.folder, meta, evaluation.overwrite)
    if evaluation.overwrite:
        wandb_runs.forget(evaluation.folder)
    merge(evaluation.folder)


def _keep(evaluation: Evaluation, ids: Sequence[int]) -> Callable[[Job], bool]:
    everything = evaluation.images < 0
    shown = {ids[i] for i in spread(ids, None if everything else evaluation.images)}
    shows = evaluation.evaluator.settings.shows
    return lambda job: shows(job) and job.prompt_id in shown and (job.k == 0 or everything)


def run(request: EvalRequest) -> Path:
    """Evaluate and report.

    Returns the output folder.
    """
    loaded = load(request)
    evaluation = begin(request, loaded)
    finish([evaluation], loaded)
    if loaded.state.is_main_process:
        print(evaluation.folder / PAGE)
    return evaluation.folder


if __name__ == "__main__":
    main()
