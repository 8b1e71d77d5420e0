"""Options of `python -m rlg.evaluate`, and the request that they make.

The command line overrides a YAML file, which overrides the run's own settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rlg.choices import CONSTANT, DTYPES, KERNELS, SCHEDULES
from rlg.cli import TUNED_HELP
from rlg.config_parser import Command, option
from rlg.evaluation.choose_w import GOALS, Goal
from rlg.evaluation.methods import BLEND_LS, BLEND_METHODS, LORA_SCALE, of_sweeps
from rlg.evaluation.request import EvalRequest
from rlg.tasks.prompt_files import has_columns

if TYPE_CHECKING:
    from rlg.evaluation.blend import BlendSettings
    from rlg.evaluation.evaluator import EvalSettings
    from rlg.models.tuned_model import TunedModel

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_MODELS, _SWEEP, _IMAGES, _FILES = "models", "what is compared", "images and rewards", "results"
OF_BLENDS = ("blend_scale", "morl")  # options that do nothing without --blend


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of `python -m rlg.evaluate`.

    None stands for the run's own setting, or else for a default.
    """

    ckpt: tuple[str, ...] = option((), TUNED_HELP + "; two for --blend", metavar="TUNED", repeat=True, group=_MODELS)
    base: str | None = option(None, "base model (default: the one that the adapter was trained on)", group=_MODELS)
    origin: str | None = option(
        None,
        "adapter that guidance starts from instead of the base: CKPT/trainer_state/lora_old.safetensors of NFT",
        metavar="FILE",
        group=_MODELS,
    )
    w: tuple[float, ...] = option((0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0), "values of w", group=_SWEEP)
    schedule: str | None = option(
        None,
        f"of w over the steps: {', '.join(SCHEDULES)} (LOW < sigma <= HIGH); default: {CONSTANT}",
        group=_SWEEP,
    )
    method: tuple[str, ...] | None = option(
        None,
        f"of {', '.join(of_sweeps())}; default: the first three (no {LORA_SCALE} for a full network); "
        f"with --blend of {', '.join(BLEND_METHODS)}, default: all that apply ({BLEND_LS}: no ODE, W <= 1)",
        group=_SWEEP,
    )
    kl_budget: float | None = option(
        None, "instead of --w: choose the w that spends this many nats of path KL", excludes="goal", group=_SWEEP
    )
    target_reward: float | None = option(
        None,
        "instead of --w: choose the w that reaches this mean of the first reward",
        excludes="goal",
        group=_SWEEP,
    )
    min_ess: float | None = option(
        None,
        "instead of --w: choose the largest w > 1 of this effective share (32 images)",
        excludes="goal",
        group=_SWEEP,
    )
    calibration_prompts: int = option(16, "prompts that w is chosen on, and not reported on", group=_SWEEP)
    blend: str | None = option(
        None,
        "blend two experts: the weights of the last --ckpt, such as 0:1:0.1",
        metavar="START:STOP:STEP",
        group=_SWEEP,
    )
    blend_scale: float | None = option(None, "base + W * (blend - base) (default: 1)", metavar="W", group=_SWEEP)
    morl: tuple[str, ...] | None = option(
        None, "adapters trained on a mix of the two rewards, as further points", metavar="CKPT", group=_SWEEP
    )
    prompts: str | None = option(None, "prompt set (default: the held-out set of the run)", group=_IMAGES)
    prompt_column: str | None = option(
        None, "of a prompt file with columns (default: the run's own, or prompt)", metavar="NAME", group=_IMAGES
    )
    num_prompts: int | None = option(None, "how many of them, spread evenly (default: all)", group=_IMAGES)
    k: int = option(4, "images a prompt", group=_IMAGES)
    reward: tuple[str, ...] | None = option(None, "rewards to report (default: those of the run)", group=_IMAGES)
    held_out_reward: tuple[str, ...] | None = option(
        None, "more rewards, not trained on (default: those of the run)", may_be_empty=True, group=_IMAGES
    )
    steps: int | None = option(None, "denoising steps (default: those of the run)", group=_IMAGES)
    kernel: str | None = option(None, "sampler (default: the run's own)", choices=KERNELS, group=_IMAGES)
    level: float | None = option(None, "noise level of a stochastic sampler (default: the run's own)", group=_IMAGES)
    cfg: float | None = option(
        None, "classifier-free guidance scale, inside each model (default: the run's own)", group=_IMAGES
    )
    resolution: int | None = option(None, "side of the images in pixels (default: the run's own)", group=_IMAGES)
    seed: int = option(0, "decides the noise", group=_IMAGES)
    batch_size: int = option(128, "images a batch", group=_IMAGES)
    dtype: str | None = option(None, "default: the run's own", choices=DTYPES, group=_IMAGES)
    vae_dtype: str | None = option(
        None, "of the autoencoder (default: the run's own, or --dtype)", choices=DTYPES, group=_IMAGES
    )
    t5_length: int | None = option(
        None, "tokens of a prompt that T5 is given (default: the run's own, or 256)", group=_IMAGES
    )
    output: Path | None = option(
        None, "default: eval/ID in the run's folder, or in runs/NAME for a model from elsewhere", group=_FILES
    )
    images: int = option(8, "prompts whose images are kept for the report; -1 keeps all", group=_FILES)
    report_to: str = option("none", "a tracker that mirrors the files", choices=("wandb", "none"), group=_FILES)
    project: str = option("rlg", "project name for the tracker", group=_FILES)
    log_adapter: bool = option(False, "keep the adapter as an artifact of the tracker, too", group=_FILES)
    overwrite: bool = option(False, "discard what an earlier evaluation left in the output folder", group=_FILES)
    dry_run: bool = option(False, "print the options that hold, and how many images they ask for, and exit")

    @property
    def is_blend(self) -> bool:
        """Tell whether two experts are blended.

        Otherwise one model is swept over w.
        """
        return self.blend is not None


OptionsT = TypeVar("OptionsT", bound=EvalOptions)
COMMAND = Command(
    "python -m rlg.evaluate",
    EvalOptions,
    "Evaluate a tuned model under Reinforcement Learning Guidance over a sweep of w.",
)


def parse(argv: Sequence[str] | None) -> EvalRequest:
    """The evaluation that a command line requests.

    Raises ValueError for options that do not fit together.
    """
    options = completed(argv)
    return request_of(options, models_of(options))


def completed(argv: Sequence[str] | None) -> EvalOptions:
    """Options from the command line, a YAML file and the run.

    The first of these that sets an option decides it. Raises ValueError.
    """
    return complete(read(COMMAND, argv))


def read(command: Command[OptionsT], argv: Sequence[str] | None) -> OptionsT:
    """Options from the command line and a YAML file.

    The command line wins. An option that neither sets is None. Raises ValueError.
    """
    options = command.parse(argv)
    if not options.ckpt:
        raise ValueError(f"--ckpt is needed (or --tuned): {TUNED_HELP}")
    return options


def varied(options: EvalOptions, changes: Mapping[str, Any], models: Sequence[TunedModel]) -> EvalRequest:
    """A request from options that `read` has read, with changes.

    Raises ValueError as `parse` does.
    """
    return request_of(complete(replace(options, **changes)), models)


def complete(options: OptionsT) -> OptionsT:
    """The same options, with the run's own settings for missing ones.

    Raises ValueError.
    """
    from rlg.io.run_folder import run_settings

    if len(options.ckpt) > 1 and not options.is_blend:
        raise ValueError(f"{len(options.ckpt)} --ckpt are given: --blend START:STOP:STEP says how to mix them")
    if not options.is_blend and (given := given_of(options, OF_BLENDS)):
        raise ValueError(f"--{given[0]} does nothing without --blend")
    settings = [run_settings(Path(ckpt)) for ckpt in options.ckpt]
    for name in ("reward", "held_out_reward"):
        if getattr(options, name) is None:
            _check_servers(name, [each for row in settings for each in row.get(name) or ()])
    if options.is_blend and options.reward is None and all("reward" in row for row in settings):
        settings[0]["reward"] = tuple(dict.fromkeys(name for row in settings for name in row["reward"]))
    if options.prompts or not has_columns(settings[0].get("prompts", "")):
        settings[0].pop("prompt_column", None)  # it belongs to the training prompts
    own = {name: value for name, value in settings[0].items() if getattr(options, name) is None}
    return replace(options, **own)


def _check_servers(option: str, names: Sequence[str]) -> None:
    """Raise ValueError if a checkpoint names a reward on another machine.

    Images and a token would be sent there.
    """
    for name in names:
        host = urlsplit(name.partition("=")[2]).hostname
        if host and host not in _LOOPBACK:
            raise ValueError(
                f"the run was scored by {name}, and evaluating it would send images there; if that server is yours, "
                f"give --{option} {' '.join(names)}"
            )


def given_of(options: EvalOptions, names: Sequence[str]) -> list[str]:
    """The names of those options that are set."""
    return [name for name in names if getattr(options, name) is not None]


def models_of(options: EvalOptions) -> list[TunedModel]:
    """The models of --ckpt and then of --morl, each resolved once.

    Raises ValueError for a model that does not exist.
    """
    from rlg.models.tuned_model import resolve

    paths = [*options.ckpt, *(options.morl or ())]
    found = {path: resolve(path) for path in dict.fromkeys(paths)}
    return [found[path] for path in paths]


def request_of(options: EvalOptions, models: Sequence[TunedModel]) -> EvalRequest:
    """The request of completed options and their `models_of`.

    Raises ValueError for options that do not fit together.
    """
    from rlg.models.loading import base_of

    if options.log_adapter and options.report_to == "none":
        raise ValueError("--log_adapter keeps the adapter as an artifact of W&B; add --report_to wandb")
    settings = settings_of(options, models[0].is_network)
    goal = _goal(options, settings)
    base = base_of(models[0], options.base)
    if options.num_prompts is not None and options.num_prompts < 1:
        raise ValueError(f"--num_prompts must be at least 1, got {options.num_prompts}")
    experts, morl = tuple(models[: len(options.ckpt)]), tuple(models[len(options.ckpt) :])
    trained = tuple(options.reward or ["jpeg_compressibility"])
    if options.is_blend:
        _check_pair(experts, morl, trained)
    return EvalRequest(
        models=experts,
        morl=morl,
        base=base,
        base_is_given=options.base is not None,
        settings=settings,
        goal=goal,
        calibration_prompts=options.calibration_prompts,
        prompts=options.prompts or "tinyworld:composition/test",
        prompt_column=options.prompt_column,
        num_prompts=options.num_prompts,
        trained_rewards=trained,
        rewards=tuple(dict.fromkeys([*trained, *(options.held_out_reward or [])])),
        dtype=options.dtype or "float32",
        vae_dtype=options.vae_dtype,
        t5_length=options.t5_length,
        output=options.output,
        images=options.images,
        project=None if options.report_to == "none" else options.project,
        log_adapter=options.log_adapter,
        overwrite=options.overwrite,
    )


def _check_pair(experts: Sequence[TunedModel], morl: Sequence[TunedModel], rewards: Sequence[str]) -> None:
    from rlg.evaluation.blend import check_pair  # it loads torch

    check_pair(experts, morl, rewards)


def settings_of(options: EvalOptions, full: bool) -> EvalSettings:
    """The settings that decide the rows.

    full: the tuned model is a full network. Raises ValueError for values that make no evaluation.
    """
    from rlg.evaluation.evaluator import EvalSettings, methods_of
    from rlg.guidance.weight_schedule import WeightSchedule

    common: dict[str, Any] = dict(
        steps=20 if options.steps is None else options.steps,
        sampler=options.kernel or "ode",
        level=0.7 if options.level is None else options.level,
        cfg=4.5 if options.cfg is None else options.cfg,
        resolution=options.resolution,
        k=options.k,
        seed=options.seed,
        batch_size=options.batch_size,
        origin=options.origin,
        schedule=str(WeightSchedule.parse(options.schedule or CONSTANT)),
    )
    if options.is_blend:
        return _blend_settings(options, common)
    scales = tuple(sorted({float(f"{w:g}") for w in options.w}))
    return EvalSettings(scales=scales, methods=methods_of(options.method, full), **common)


def _blend_settings(options: EvalOptions, common: dict[str, Any]) -> BlendSettings:
    from rlg.evaluation.blend import BlendSettings
    from rlg.guidance import blend

    if odd := [name for name in options.method or () if name not in BLEND_METHODS]:
        raise ValueError(f"--method {odd[0]} is of a sweep over w; with --blend there is {', '.join(BLEND_METHODS)}")
    scale = 1.0 if options.blend_scale is None else options.blend_scale
    drawn = common["sampler"] != "ode" and 0 <= scale <= 1
    methods = options.method or tuple(name for name in BLEND_METHODS if drawn or name != BLEND_LS)
    own = {"scales": blend.grid(options.blend), "blend_scale": scale, "morl": len(options.morl or [])}
    return BlendSettings(methods=methods, **own, **common)


def _goal(options: EvalOptions, settings: EvalSettings) -> Goal | None:
    """The goal that w is chosen for, or None.

    Raises ValueError for a goal that does not fit the other options.
    """
    given = given_of(options, GOALS)
    if not given:
        return None
    if options.calibration_prompts < 1:
        raise ValueError(f"--calibration_prompts must be at least 1, got {options.calibration_prompts}")
    if options.is_blend:
        raise ValueError(f"--{given[0]} chooses one w, and --blend sweeps lambda; give one of them")
    if given[0] == "min_ess" and settings.schedule != CONSTANT:
        raise ValueError(f"--min_ess weighs the images of a w that stays; leave out --schedule {options.schedule}")
    return Goal(given[0], getattr(options, given[0]))
