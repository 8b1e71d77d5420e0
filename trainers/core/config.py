"""Options that several trainings share, and their checks.

An algorithm's own options are in `trainers.NAME_config`. None of these modules imports torch, so that a command
answers `--help` and mistakes at once.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from rewards.table import REWARDS, require_gradients
from rlg import config_parser
from rlg.cli import stop
from rlg.io.parsing import read_yaml
from rlg.io.run_folder import is_of_run
from rlg.io.spellings import canonical_words
from rlg.publishing import hub_names

SCALES = ("group", "batch", "none")


@dataclass(kw_only=True)
class RunConfig:
    """Options of every training, with or without a policy.

    Names follow TRL.
    """

    # former options that had no effect, with their defaults; see `as_written`
    RETIRED: ClassVar[Mapping[str, Any]] = {}

    base: str = field(metadata={"help": "base model: hub id, folder, or tiny-sd, tiny-sd3, tiny-sdxl"})
    name: str = field(metadata={"help": "name of the run: its folder is output_dir/name"})
    output_dir: str = field(default="runs", metadata={"help": "where run folders go"})
    seed: int = field(default=42, metadata={"help": "decides prompts, noise and initial weights"})
    resolution: int | None = field(default=None, metadata={"help": "image side in pixels (default: the model's own)"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the frozen base: float32, bfloat16 or float16"})
    mixed_precision: str = field(
        default="no", metadata={"help": "autocast around the network: no, bf16 or fp16 (needed by float16)"}
    )
    vae_dtype: str | None = field(default=None, metadata={"help": "of the autoencoder (default: dtype)"})
    t5_length: int | None = field(
        default=None, metadata={"help": "tokens that T5 gets (default: 256, the pipeline's)"}
    )
    tf32: bool = field(
        default=True, metadata={"help": "round float32 products on GPUs to TF32, as the public codes do"}
    )
    cfg: float = field(default=4.5, metadata={"help": "classifier-free guidance of a sample"})
    batch_size: int = field(default=8, metadata={"help": "images a batch"})
    max_steps: int = field(default=100, metadata={"help": "iterations"})
    learning_rate: float = field(default=3e-4, metadata={"help": "of AdamW"})
    warmup_steps: int = field(default=0, metadata={"help": "iterations of linear warm-up of the learning rate"})
    adam_beta1: float = field(default=0.9, metadata={"help": "of AdamW"})
    adam_beta2: float = field(default=0.999, metadata={"help": "of AdamW"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "of AdamW"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient norm is clipped to this"})
    save_steps: int = field(default=50, metadata={"help": "iterations between checkpoints"})
    save_total_limit: int | None = field(default=3, metadata={"help": "checkpoints to keep (none: all)"})
    max_skipped: int = field(
        default=10, metadata={"help": "updates skipped in a row, for a loss or gradient that is not finite, that stop"}
    )
    report_to: str = field(
        default="none", metadata={"help": "wandb, tensorboard or none; metrics.jsonl is always kept"}
    )
    project: str = field(default="rlg", metadata={"help": "project name for the tracker"})
    resume: bool = field(default=False, metadata={"help": "go on from the last checkpoint"})
    overwrite: bool = field(default=False, metadata={"help": "discard an earlier run of this name"})
    allow_changes: bool = field(
        default=False, metadata={"help": "with --resume: go on with other settings than the run began with"}
    )
    dry_run: bool = field(
        default=False, metadata={"help": "print the resolved config with counts and memory, check files, and exit"}
    )
    processes: int | None = field(
        default=None, metadata={"help": "with --dry_run: count for so many processes (default: those launched)"}
    )

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name in (".", ".."):
            raise ValueError(f"name must be a plain folder name, got {self.name!r}")
        if self.report_to not in ("wandb", "tensorboard", "none"):
            raise ValueError(f"report_to must be wandb, tensorboard or none, got {self.report_to!r}")
        if self.allow_changes and not self.resume:
            raise ValueError("--allow_changes says how to go on with a run; it needs --resume")
        if self.resume and self.overwrite:
            raise ValueError("give --resume or --overwrite, not both")
        if self.processes is not None and not self.dry_run:
            raise ValueError("--processes is of --dry_run; a launcher says how many processes there are")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        require_positive(self, "max_steps", "save_steps", "save_total_limit", "learning_rate", "max_grad_norm")
        require_positive(self, "resolution", "batch_size", "max_skipped", "t5_length", "processes")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name

    def check_inputs(self, given: Collection[str] = ()) -> None:
        """Raise ValueError for an input that neither config nor caller gives.

        given: fields that a trainer is given.
        """

    def idle_options(self) -> Mapping[str, Any]:
        """Defaults of the options that have no effect in such a run.

        No file of the run lists them.
        """
        return {}

    def derived(self, processes: int) -> dict[str, int]:
        """Counts that follow from the sizes.

        Raises ValueError where sizes do not fit together.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Options that every trainer of a policy has."""

    LORA_COPIES: ClassVar[int] = 0  # frozen copies of the LoRA, besides the moving average

    reward: list[str] = field(default_factory=list, metadata={"help": "rewards to evaluate"})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "their weights (default: 1 each)"})
    reward_seconds: float = field(
        default=1800.0, metadata={"help": "that a reward without a server may take for a call; 0: any"}
    )
    held_out_reward: list[str] = field(default_factory=list, metadata={"help": "rewards to evaluate but not train on"})
    eval_prompts: str | None = field(default=None, metadata={"help": "held-out prompts (default: none)"})
    prompt_column: str | None = field(
        default=None, metadata={"help": "column of prompt files that have columns (default: prompt)"}
    )
    lora_rank: int = field(default=32, metadata={"help": "rank of the LoRA, whose weights are always float32"})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha"})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "modules (default: the family's attention)"}
    )
    steps: int = field(default=10, metadata={"help": "denoising steps of a sample"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "trade compute for memory"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the network: minutes first, then faster"})
    ema_decay: float = field(default=0.9, metadata={"help": "moving average of the LoRA; 0 turns it off"})
    ema_every: int = field(default=8, metadata={"help": "optimizer steps between updates of the average"})
    ema_repeats: int = field(
        default=1, metadata={"help": "times that it takes the weights in at an update (Flow-GRPO: the step's batches)"}
    )
    eval_steps: int = field(default=0, metadata={"help": "iterations between held-out evaluations; 0: never"})
    eval_num_steps: int | None = field(
        default=None, metadata={"help": "denoising steps of such an evaluation (default: steps)"}
    )
    eval_kernel: str | None = field(
        default=None, metadata={"help": "sampler of such an evaluation: ode (default: that of training)"}
    )
    eval_num_prompts: int = field(default=64, metadata={"help": "held-out prompts of such an evaluation"})
    sample_steps: int = field(default=10, metadata={"help": "iterations between sample images; 0: never"})
    log_adapter: bool = field(default=False, metadata={"help": "keep the last adapter as an artifact of W&B, too"})
    push_to_hub: bool = field(default=False, metadata={"help": "publish the last adapter, as rlg.push does"})
    hub_model_id: str | None = field(default=None, metadata={"help": "USER/NAME there (default: name, in your own)"})
    hub_private_repo: bool = field(default=False, metadata={"help": "only you see it, if it is made"})
    adapter_license: str | None = field(
        default=None, metadata={"help": "for its model card (default: none is stated)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.log_adapter and self.report_to != "wandb":
            raise ValueError("log_adapter keeps the adapter as an artifact of W&B; it needs report_to wandb")
        hub_names.check_license(self.adapter_license)
        if self.push_to_hub:
            hub_names.check_repo(self.hub_model_id or self.name)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {self.ema_decay}")
        require_choice(self, "eval_kernel", (None, "ode"))
        require_positive(self, "lora_rank", "lora_alpha", "ema_every", "ema_repeats", "steps")
        require_positive(self, "eval_num_prompts", "eval_num_steps")

    def check_inputs(self, given: Collection[str] = ()) -> None:
        """Raise ValueError for evaluations without held-out prompts."""
        super().check_inputs(given)
        if self.eval_steps and not self.eval_prompts and "eval_prompts" not in given:
            raise ValueError(f"eval_steps = {self.eval_steps} needs eval_prompts, the held-out prompts to evaluate on")

    def trained_at_once(self) -> int:
        """Rows of the batch that the network sees with a gradient."""
        return self.batch_size


@dataclass(kw_only=True)
class SamplingConfig(TrainConfig):
    """Options of training on the policy's own samples.

    Samples come in groups of one prompt. The defaults are Flow-GRPO's.
    """

    MIN_GENERATIONS: ClassVar[int] = 2  # an algorithm that compares within a group needs two

    reward: list[str] = field(default_factory=list, metadata={"help": "rewards to train on"})
    prompts: str | None = field(
        default=None,
        metadata={
            "help": "training prompts: tinyworld:composition/train, hub:SET:SPLIT:COLUMN, or a file (rlg.prompts)"
        },
    )
    num_prompts: int = field(default=48, metadata={"help": "prompts an iteration, over all processes"})
    num_generations: int = field(default=24, metadata={"help": "images a prompt: the group"})
    num_updates: int = field(default=1, metadata={"help": "optimizer steps for one pass over an iteration's images"})
    same_initial_noise: bool = field(default=False, metadata={"help": "a group starts from one noise (DanceGRPO)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_generations < self.MIN_GENERATIONS:
            raise ValueError(
                f"a group needs at least {self.MIN_GENERATIONS} images, got num_generations {self.num_generations}"
            )
        require_positive(self, "num_prompts", "num_updates")

    def check_inputs(self, given: Collection[str] = ()) -> None:
        """Raise ValueError without a reward or prompts to train on."""
        super().check_inputs(given)
        require_inputs(self, given, "reward", "prompts")

    def derived(self, processes: int) -> dict[str, int]:
        """Counts that follow from the sizes.

        Raises ValueError, with both numbers, where sizes do not divide.
        """
        images = self.num_prompts * self.num_generations
        batch = processes * self.batch_size
        if images % batch:
            raise ValueError(
                f"num_prompts * num_generations = {images} images are not divisible by "
                f"processes * batch_size = {batch}"
            )
        if (images // batch) % self.num_updates:
            raise ValueError(f"{images // batch} batches are not divisible by num_updates = {self.num_updates}")
        return {
            "processes": processes,
            "images_per_iteration": images,
            "batches_per_process": images // batch,
            "images_per_update": images // self.num_updates,
            "updates_per_iteration": self.num_updates,
            "images_in_total": images * self.max_steps,
        }


@dataclass(kw_only=True)
class AdvantageConfig(SamplingConfig):
    """Options of advantages.

    An advantage says how much a sample counts. The defaults are Flow-GRPO's.
    """

    scale_rewards: str = field(
        default="batch", metadata={"help": "divide advantages by the std of: group, batch, none"}
    )
    reward_aggregation: str = field(default="sum", metadata={"help": "mix rewards as their sum, or as advantages"})
    advantage_clip: float = field(default=5.0, metadata={"help": "advantages are clipped to this"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "scale_rewards", SCALES)
        require_choice(self, "reward_aggregation", ("sum", "advantage"))
        require_positive(self, "advantage_clip")


@dataclass(kw_only=True)
class RewardGradientConfig(SamplingConfig):
    """Options of training by a reward's gradient.

    A sample is compared with no other, so a group may be one image.
    """

    MIN_GENERATIONS = 1

    num_generations: int = field(default=1, metadata={"help": "images a prompt"})

    def check_inputs(self, given: Collection[str] = ()) -> None:
        """Raise ValueError for a reward that is known to have no gradient."""
        super().check_inputs(given)
        weights = self.reward_weights or [1.0] * len(self.reward)
        weighted = [name for name, weight in zip(self.reward, weights, strict=False) if weight]
        require_gradients([name for name in weighted if name.partition("=")[0] in REWARDS])


@dataclass(kw_only=True)
class TrainedStepsConfig(RewardGradientConfig):
    """Options of training at some steps of each sample's trajectory."""

    num_train_steps: int | None = field(
        default=None, metadata={"help": "denoising steps of a sample that are trained at (default: all that can be)"}
    )
    last_train_steps: int = field(
        default=1, metadata={"help": "of these, the last steps, which are always trained at; the others are random"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_train_steps")
        if self.last_train_steps < 0:
            raise ValueError(f"last_train_steps must not be negative, got {self.last_train_steps}")
        if self.num_train_steps is not None and self.last_train_steps > self.num_train_steps:
            raise ValueError(
                f"last_train_steps = {self.last_train_steps} is more than num_train_steps = {self.num_train_steps}"
            )


def own_options(kind: type[RunConfig], base: type[RunConfig]) -> dict[str, Any]:
    """Defaults of the options that a config adds to its base.

    Options without a default are left out.
    """
    inherited = {each.name for each in dataclasses.fields(base)}
    rows = [each for each in dataclasses.fields(kind) if each.name not in inherited]
    return {each.name: each.default for each in rows if each.default is not dataclasses.MISSING}


def require_inputs(config: Any, given: Collection[str], *names: str) -> None:
    """Raise ValueError for inputs that are neither named nor given.

    The config names them, or the trainer is given them.
    """
    missing = [name for name in names if not getattr(config, name) and name not in given]
    if missing:
        raise ValueError(f"there is nothing to train on without {' and '.join(missing)}; see --help")


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError for a field that is neither positive nor None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def require_choice(config: Any, name: str, known: Sequence[str | None]) -> None:
    """Raise ValueError for a field that is none of the known values."""
    if getattr(config, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, got {getattr(config, name)!r}")


# options that say what to do, and are no part of a run's settings
_COMMAND = ("resume", "overwrite", "allow_changes", "dry_run", "processes")


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def answer(kind: type[RunConfig], description: str | None = None) -> None:
    """Answer --help and mistakes of the command line.

    It comes before anything slow is imported.
    """
    file, _ = config_parser.split(sys.argv[1:])
    config_parser.parse(as_written(kind, file), description=description).check_inputs()


def parse_config(kind: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """A config from `--config FILE` and the command line, which wins.

    FILE: a YAML file, or a name that `rlg.config_files` knows. Raises ValueError for an unknown key.
    """
    from trl import TrlParser

    file, rest = config_parser.split(sys.argv[1:] if argv is None else argv)
    written = as_written(kind, file)
    parser = TrlParser(written, prog=Path(sys.argv[0]).name)
    parser.error = lambda message: stop(f"{message}; see --help")  # a message of one line, without the usage
    if file is not None:
        parser.set_defaults_with_config(**config_parser.read_values(written, file))
    names = [field.name for field in dataclasses.fields(written)]
    (config,) = parser.parse_args_and_config(canonical_words(rest, names))
    config_parser.check(config)
    return config if written is kind else _without_retired(kind, config, f"{file}")


def as_written(kind: type[ConfigT], file: Path | None) -> type[ConfigT]:
    """The class of options by which a file was written.

    It has the retired options that the file holds, if the file is an old run's own. In any other file, and on the
    command line, a retired option is as unknown as one that never existed.
    """
    if file is None or not kind.RETIRED or not is_of_run(file):
        return kind
    found = kind.RETIRED.keys() & read_yaml(file).keys()
    rows = [(name, type(value), field(default=value)) for name, value in kind.RETIRED.items() if name in found]
    return dataclasses.make_dataclass(kind.__name__, rows, bases=(kind,), kw_only=True) if rows else kind


def _without_retired(kind: type[ConfigT], config: ConfigT, where: str) -> ConfigT:
    """The config without its retired options.

    It warns of those that were not at their default.
    """
    values = dataclasses.asdict(config)
    former = {name: values.pop(name) for name in kind.RETIRED if name in values}
    said = [f"{name} = {value!r}" for name, value in former.items() if value != kind.RETIRED[name]]
    if said:
        warnings.warn(f"{where}: {', '.join(said)} is left out, as it never did anything there", stacklevel=3)
    return kind(**values)


def settings(config: RunConfig) -> dict[str, Any]:
    """The settings of a run: all options but the commands."""
    return {k: v for k, v in in_use(config).items() if k not in _COMMAND}


def in_use(config: RunConfig) -> dict[str, Any]:
    """All options that have an effect in such a run."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in config.idle_options()}
