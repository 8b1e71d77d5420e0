"""What every trainer shares and no algorithm does: configuration, run folders, checkpoints, metrics. No math here."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from PIL import Image
from torch import Tensor, nn

from rlg import durable, model_card, push, run_lock, wandb_log
from rlg import prompts as prompt_sets
from rlg.cli import stop
from rlg.config import CONFIG, METRICS, check_links, check_type, read_yaml
from rlg.policy import Policy
from rlg.together import together
from trainers import engines

SAMPLES = "samples"
_COMMAND = ("resume", "overwrite", "dry_run")  # what to do, and no part of what a run is


@dataclass(kw_only=True)
class RunConfig:
    """Options of everything that is trained, policy or not. Names follow TRL."""

    model: str = field(metadata={"help": "base model: hub id, folder, or tiny-sd, tiny-sd3, tiny-sdxl"})
    name: str = field(metadata={"help": "name of the run: its folder is output_dir/name"})
    output_dir: str = field(default="runs", metadata={"help": "where run folders go"})
    seed: int = field(default=42, metadata={"help": "decides prompts, noise and initial weights"})
    resolution: int | None = field(default=None, metadata={"help": "image side in pixels (default: the model's own)"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the frozen base: float32, bfloat16 or float16"})
    mixed_precision: str = field(default="no", metadata={"help": "autocast around the network: no, bf16 or fp16"})
    guidance_scale: float = field(default=4.5, metadata={"help": "classifier-free guidance of a sample"})
    per_device_batch_size: int = field(default=8, metadata={"help": "images a batch"})
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
    dry_run: bool = field(default=False, metadata={"help": "print the resolved config with derived counts, and exit"})

    def __post_init__(self) -> None:
        if not self.name or Path(self.name).name != self.name or self.name in (".", ".."):
            raise ValueError(f"name must be a plain folder name, got {self.name!r}")
        if self.report_to not in ("wandb", "tensorboard", "none"):
            raise ValueError(f"report_to must be wandb, tensorboard or none, got {self.report_to!r}")
        if self.resume and self.overwrite:
            raise ValueError("give --resume or --overwrite, not both")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, got {self.warmup_steps}")
        require_positive(self, "max_steps", "save_steps", "save_total_limit", "learning_rate", "max_grad_norm")
        require_positive(self, "resolution", "per_device_batch_size", "max_skipped")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name

    def derived(self, processes: int) -> dict[str, int]:
        """Counts that follow from the sizes. Raises ValueError where sizes do not fit together."""
        raise NotImplementedError


@dataclass(kw_only=True)
class TrainConfig(RunConfig):
    """Options that every trainer of a policy has."""

    reward: list[str] = field(default_factory=list, metadata={"help": "rewards to evaluate"})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "their weights (default: 1 each)"})
    held_out_reward: list[str] = field(default_factory=list, metadata={"help": "rewards to evaluate but not train on"})
    eval_prompts: str | None = field(default=None, metadata={"help": "held-out prompts (default: none)"})
    lora_rank: int = field(default=32, metadata={"help": "rank of the LoRA, whose weights are always float32"})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha"})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "modules (default: the family's attention)"}
    )
    num_steps: int = field(default=10, metadata={"help": "denoising steps of a sample"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "trade compute for memory"})
    compile: bool = field(default=False, metadata={"help": "torch.compile the network: minutes first, then faster"})
    ema_decay: float = field(default=0.9, metadata={"help": "moving average of the LoRA; 0 turns it off"})
    ema_every: int = field(default=8, metadata={"help": "optimizer steps between updates of the average"})
    eval_steps: int = field(default=0, metadata={"help": "iterations between held-out evaluations; 0: never"})
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
        if self.eval_steps and not self.eval_prompts:
            raise ValueError(f"eval_steps = {self.eval_steps} needs eval_prompts, the held-out prompts to evaluate on")
        if self.log_adapter and self.report_to != "wandb":
            raise ValueError("log_adapter keeps the adapter as an artifact of W&B; it needs report_to wandb")
        model_card.check_license(self.adapter_license)
        if self.push_to_hub:
            push.check_repo(self.hub_model_id or self.name)
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {self.ema_decay}")
        require_positive(self, "lora_rank", "lora_alpha", "ema_every", "eval_num_prompts", "num_steps")


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError for a field that is neither positive nor None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def require_choice(config: Any, name: str, known: Sequence[str]) -> None:
    """Raise ValueError for a field that is none of the known values."""
    if getattr(config, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}")


ConfigT = TypeVar("ConfigT", bound=RunConfig)


def parse_config(kind: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """A config from `--config FILE.yaml` and the command line, which wins. Raises ValueError for an unknown key."""
    from trl import TrlParser

    argv = list(sys.argv[1:] if argv is None else argv)
    if "--config" in argv:
        _check_file(kind, Path(*argv[argv.index("--config") + 1 :][:1]))
    parser = TrlParser(kind, prog=Path(sys.argv[0]).name)
    parser.error = lambda message: stop(f"{message}; see --help")  # one line, without the usage
    (config,) = parser.parse_args_and_config(argv)
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} must be finite, got {value}")
    return config


def _check_file(kind: type[RunConfig], file: Path) -> None:
    """Raise ValueError for a config that TRL's parser would take the wrong way; text it reads as a command line's."""
    row, hints = read_yaml(file), get_type_hints(kind)
    if "env" in row:
        raise ValueError(f"{file}: env is not read here; set the variables where the command is started")
    for name in hints.keys() & row.keys():
        if not isinstance(row[name], str) or get_origin(hints[name]) is list:
            check_type(f"{file}: {name}", row[name], hints[name])


def begin(kind: type[ConfigT]) -> tuple[ConfigT, Accelerator]:
    """The command line's config, checked, and its engine; with --dry_run print what follows from it, and exit."""
    config = parse_config(kind)
    accelerator = make_accelerator(config)
    derived = config.derived(accelerator.num_processes)
    if config.dry_run:
        print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip())
        print("# derived")
        for name, value in derived.items():
            print(f"# {name}: {value}")
        raise SystemExit(0)
    with together():
        if accelerator.is_main_process:
            check_folder(config)
            run_lock.check(config.folder)
    check_publishing(config, accelerator)
    return config, accelerator


def check_publishing(config: RunConfig, accelerator: Accelerator) -> None:
    """Raise ValueError for a tracker or a hub that would refuse at the end; touches nothing."""
    if accelerator.is_main_process and config.report_to == "wandb":
        wandb_log.require()
    if isinstance(config, TrainConfig) and config.push_to_hub:
        push.check_token()


def check_folder(config: RunConfig) -> None:
    """Raise ValueError where `prepare_folder` would; touches nothing, so that it can come before slow work."""
    folder = config.folder
    check_links(folder)
    if config.resume:
        if not folder.is_dir():
            raise ValueError(f"nothing to resume: {folder} does not exist")
    elif run_lock.content(folder):
        if not config.overwrite:
            raise ValueError(f"{folder} exists; give --resume, --overwrite or another --name")
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} is no run folder (it has no {CONFIG}); it is not overwritten")


@contextmanager
def run_folder(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Within, the run's folder is there, and no other run's. Raises ValueError as `check_folder`, or if one has it."""
    with ExitStack() as stack:
        with together():
            if accelerator.is_main_process:
                check_folder(config)
                stack.enter_context(run_lock.held(config.folder))
        prepare_folder(config, accelerator)
        yield


def prepare_folder(config: RunConfig, accelerator: Accelerator) -> None:
    """Create the run's folder, once nothing else can be refused. Raises ValueError as `check_folder`."""
    with together():
        if accelerator.is_main_process:
            check_folder(config)
            if not config.resume:
                config.folder.mkdir(parents=True, exist_ok=True)
                for lock in config.folder.rglob(f"*/{run_lock.LOCK}"):
                    run_lock.check(lock.parent)  # an evaluation inside a run that is to be discarded
                durable.clear(config.folder, keep=(run_lock.LOCK, CONFIG))  # a run's to the last: see `check_folder`
                write_config(config, config.folder)


def write_config(config: RunConfig, folder: Path) -> None:
    """config.yaml, as --config reads it again."""
    durable.write_text(folder / CONFIG, yaml.safe_dump(settings(config), sort_keys=False))


def settings(config: RunConfig) -> dict[str, Any]:
    """What a run is: all options but those that say what to do with it."""
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in _COMMAND}


def make_accelerator(config: RunConfig) -> Accelerator:
    """accelerate's engine for this run. Raises ValueError for a tracker that is not installed."""
    if config.report_to not in ("none", *map(str, get_available_trackers())):  # accelerate would drop it in silence
        raise ValueError(f"report_to is {config.report_to}, which is not installed: pip install {config.report_to}")
    return engines.make_accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=str(config.folder), logging_dir=str(config.folder / "logs")),
    )


def prepare_policy(
    config: TrainConfig, accelerator: Accelerator, copies: Sequence[str] = (), policy: Policy | None = None
) -> tuple[Policy, torch.optim.AdamW, dict[str, list[nn.Parameter]]]:
    """(policy with a fresh LoRA, its optimizer, frozen copies of the LoRA by name), wrapped by accelerate.

    policy: one that is there already, with its LoRA, instead of the config's.
    """
    if policy is None:
        policy = Policy.load(config.model, config.dtype, accelerator.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            policy.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets)
    parameters = policy.trainable()
    frozen = {name: policy.add_frozen_copy(name) for name in copies}
    if config.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()
    if config.compile:
        policy.network.compile()  # in place: the module and its parameters keep their names
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    engines.configure(accelerator, policy.network, config.per_device_batch_size, config.max_grad_norm)
    policy.wrapped, optimizer = accelerator.prepare(policy.network, optimizer)
    return policy, optimizer, frozen


class Log:
    """metrics.jsonl, sample grids and the tracker; silent on all processes but the main one."""

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.folder, self.accelerator = config.folder, accelerator
        if config.report_to == "wandb" and accelerator.is_main_process:
            options = wandb_log.options(config.folder, config.name, "train", config.name)
            with wandb_log.one_line():
                accelerator.init_trackers(config.project, settings(config), {"wandb": options})
        elif config.report_to == "tensorboard":
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(config).items()}
            accelerator.init_trackers(config.project, flat)

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row, and send it to the tracker."""
        if not self.accelerator.is_main_process:
            return
        rounded = {k: float(f"{v:.8g}") for k, v in row.items()}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step} | rounded) + "\n")
        self.accelerator.log(dict(row), step=step)

    def images(
        self, step: int, images_B3HW: Tensor, prompts: Sequence[str], scores: Mapping[str, Tensor] | None = None
    ) -> None:
        """Save a grid of samples with a line each, its prompt and its rewards (B,), and send them to the tracker."""
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / SAMPLES
        folder.mkdir(exist_ok=True)
        rows = [{name: float(score_B[i]) for name, score_B in (scores or {}).items()} for i in range(len(prompts))]
        captions = [wandb_log.caption(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        grid(images_B3HW).save(folder / f"step-{step:06d}.png")
        (folder / f"step-{step:06d}.txt").write_text("\n".join(captions) + "\n", errors="replace")
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log({"samples": wandb_log.pictures(images_B3HW, captions)}, step=step)
            else:
                pixels = (images_B3HW.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")

    def publish(self, config: TrainConfig, checkpoint: Path) -> None:
        """What a finished run's config asks for: its adapter as an artifact, and on the hub.

        Raises ValueError where the hub refuses; the checkpoint is whole then.
        """
        if not self.accelerator.is_main_process:
            return
        if config.log_adapter:
            wandb_log.log_adapter(self.accelerator.get_tracker("wandb", unwrap=True), checkpoint, config.name)
        if config.push_to_hub:
            print(push.push(checkpoint, config.hub_model_id or config.name, config.hub_private_repo))


def grid(images_B3HW: Tensor, columns: int = 8) -> Image.Image:
    """Images side by side, row by row; places left over are white."""
    count, _, height, width = images_B3HW.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    white = images_B3HW.new_ones(rows * columns - count, 3, height, width)
    table = torch.cat([images_B3HW, white]).reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = (table.reshape(rows * height, columns * width, 3) * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels)


def load_prompts(config: TrainConfig) -> tuple[list[prompt_sets.Prompt], list[prompt_sets.Prompt]]:
    """(training prompts, held-out prompts); a trainer without `prompts` has only the second."""
    training = prompt_sets.load(config.prompts) if getattr(config, "prompts", None) else []
    held_out = prompt_sets.load(config.eval_prompts) if config.eval_prompts else []
    return training, held_out
