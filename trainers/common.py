"""What every trainer shares and no algorithm does: configuration, run folders, checkpoints, metrics. No math here."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import ProjectConfiguration
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlg import prompts as prompt_sets
from rlg.cli import stop
from rlg.config import CONFIG
from rlg.policy import Policy
from rlg.state import load_optimizer, save_optimizer

METRICS = "metrics.jsonl"
SAMPLES = "samples"
_STATE = "trainer_state"
_COMMAND = ("resume", "overwrite", "dry_run")  # what to do, and no part of what a run is
_MAY_CHANGE = ("name", "output_dir", "max_steps", "save_steps", "save_total_limit", "sample_steps", "report_to")


@dataclass(kw_only=True)
class TrainConfig:
    """Options that every trainer has. Names follow TRL."""

    model: str = field(metadata={"help": "base model: hub id, folder, or tiny-sd, tiny-sd3, tiny-sdxl"})
    name: str = field(metadata={"help": "name of the run: its folder is output_dir/name"})
    output_dir: str = field(default="runs", metadata={"help": "where run folders go"})
    seed: int = field(default=42, metadata={"help": "decides prompts, noise and initial weights"})
    reward: list[str] = field(metadata={"help": "rewards to train on"})
    reward_weights: list[float] | None = field(default=None, metadata={"help": "their weights (default: 1 each)"})
    held_out_reward: list[str] = field(default_factory=list, metadata={"help": "rewards to evaluate but not train on"})
    prompts: str = field(metadata={"help": "training prompts: tinyworld:composition/train, a .txt or a .jsonl file"})
    eval_prompts: str | None = field(default=None, metadata={"help": "held-out prompts (default: none)"})
    resolution: int | None = field(default=None, metadata={"help": "image side in pixels (default: the model's own)"})
    dtype: str = field(default="bfloat16", metadata={"help": "of the frozen base: float32, bfloat16 or float16"})
    mixed_precision: str = field(default="no", metadata={"help": "autocast around the network: no, bf16 or fp16"})
    lora_rank: int = field(default=32, metadata={"help": "rank of the LoRA, whose weights are always float32"})
    lora_alpha: int = field(default=64, metadata={"help": "LoRA alpha"})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "modules (default: the family's attention)"}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "trade compute for memory"})
    max_steps: int = field(default=100, metadata={"help": "iterations"})
    learning_rate: float = field(default=3e-4, metadata={"help": "of AdamW"})
    adam_beta1: float = field(default=0.9, metadata={"help": "of AdamW"})
    adam_beta2: float = field(default=0.999, metadata={"help": "of AdamW"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "of AdamW"})
    weight_decay: float = field(default=1e-4, metadata={"help": "of AdamW"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient norm is clipped to this"})
    ema_decay: float = field(default=0.9, metadata={"help": "moving average of the LoRA; 0 turns it off"})
    ema_every: int = field(default=8, metadata={"help": "optimizer steps between updates of the average"})
    save_steps: int = field(default=50, metadata={"help": "iterations between checkpoints"})
    save_total_limit: int | None = field(default=3, metadata={"help": "checkpoints to keep (none: all)"})
    eval_steps: int = field(default=0, metadata={"help": "iterations between held-out evaluations; 0: never"})
    eval_num_prompts: int = field(default=64, metadata={"help": "held-out prompts of such an evaluation"})
    sample_steps: int = field(default=10, metadata={"help": "iterations between sample images; 0: never"})
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
        if self.eval_steps and not self.eval_prompts:
            raise ValueError(f"eval_steps = {self.eval_steps} needs eval_prompts, the held-out prompts to evaluate on")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and less than 1, got {self.ema_decay}")
        require_positive(self, "max_steps", "lora_rank", "lora_alpha", "save_steps", "save_total_limit", "ema_every")
        require_positive(self, "learning_rate", "max_grad_norm", "eval_num_prompts", "resolution")

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name


def require_positive(config: Any, *names: str) -> None:
    """Raise ValueError for a field that is neither positive nor None."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


ConfigT = TypeVar("ConfigT", bound=TrainConfig)


def parse_config(kind: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """A config from `--config FILE.yaml` and the command line, which wins. Raises ValueError for an unknown key."""
    from trl import TrlParser

    argv = list(sys.argv[1:] if argv is None else argv)
    if "--config" in argv[:-1] and not Path(argv[argv.index("--config") + 1]).is_file():
        raise ValueError(f"no such config: {argv[argv.index('--config') + 1]}")
    parser = TrlParser(kind, prog=Path(sys.argv[0]).name)
    parser.error = lambda message: stop(f"{message}; see --help")  # one line, without the usage
    try:
        (config,) = parser.parse_args_and_config(argv)
    except yaml.YAMLError as error:
        raise ValueError(f"the config is not valid YAML: {error}") from error
    return config


def dry_run(config: TrainConfig, derived: Mapping[str, Any]) -> None:
    """Print the resolved config and what follows from it."""
    print(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False).rstrip())
    print("# derived")
    for name, value in derived.items():
        print(f"# {name}: {value}")


def check_folder(config: TrainConfig) -> None:
    """Raise ValueError where `prepare_folder` would; touches nothing, so that it can come before slow work."""
    folder = config.folder
    if config.resume:
        if not folder.is_dir():
            raise ValueError(f"nothing to resume: {folder} does not exist")
    elif folder.exists() and any(folder.iterdir()):
        if not config.overwrite:
            raise ValueError(f"{folder} exists; give --resume, --overwrite or another --name")
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} is no run folder (it has no {CONFIG}); it is not overwritten")


def prepare_folder(config: TrainConfig, accelerator: Accelerator) -> None:
    """Create the run's folder, once nothing else can be refused. Raises ValueError as `check_folder`."""
    if accelerator.is_main_process:
        check_folder(config)
        if not config.resume:
            if config.folder.exists():
                shutil.rmtree(config.folder)
            config.folder.mkdir(parents=True)
            write_config(config, config.folder)
    accelerator.wait_for_everyone()


def write_config(config: TrainConfig, folder: Path) -> None:
    """config.yaml, as --config reads it again."""
    row = {k: v for k, v in dataclasses.asdict(config).items() if k not in _COMMAND}
    (folder / CONFIG).write_text(yaml.safe_dump(row, sort_keys=False))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate's engine for this run. Raises ValueError for a tracker that is not installed."""
    if config.report_to not in ("none", *map(str, get_available_trackers())):  # accelerate would drop it in silence
        raise ValueError(f"report_to is {config.report_to}, which is not installed: pip install {config.report_to}")
    return Accelerator(
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=str(config.folder), logging_dir=str(config.folder / "logs")),
    )


def prepare_policy(config: TrainConfig, accelerator: Accelerator) -> tuple[Policy, torch.optim.AdamW]:
    """Policy with a fresh LoRA and its optimizer, wrapped by accelerate."""
    policy = Policy.load(config.model, config.dtype, accelerator.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        parameters = policy.add_lora(config.lora_rank, config.lora_alpha, config.lora_targets)
    if config.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    policy.wrapped, optimizer = accelerator.prepare(policy.network, optimizer)
    return policy, optimizer


class Ema:
    """Exponential moving average of the LoRA, warmed up over n optimizer steps as in Flow-GRPO (flow_grpo/ema.py):

    decay_n = min((1 + n) / (10 + n), decay), on every n that `every` divides.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, every: int):
        self.parameters = list(parameters)
        self.decay, self.every, self.steps = decay, every, 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        """Count an optimizer step, and fold the parameters in when it is time."""
        self.steps += 1
        if self.steps % self.every:
            return
        decay = min((1 + self.steps) / (10 + self.steps), self.decay)
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            shadow.lerp_(parameter.detach(), 1 - decay)

    def swap(self) -> None:
        """Exchange average and parameters; a second call undoes it."""
        for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
            value = parameter.detach().clone()
            parameter.data.copy_(shadow)
            shadow.copy_(value)


@dataclass
class TrainState:
    """Everything a checkpoint restores."""

    policy: Policy
    optimizer: Any
    ema: Ema | None
    step: int = 0
    counters: dict[str, float] = field(default_factory=dict)  # images, seconds

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the network holds the moving average, where there is one."""
        if self.ema:
            self.ema.swap()
        try:
            yield
        finally:
            if self.ema:
                self.ema.swap()


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if _step_of(p).isdigit() and (p / "state.json").is_file()]
    return sorted(found, key=lambda p: int(_step_of(p)))


def _step_of(checkpoint: Path) -> str:
    return checkpoint.name.removeprefix("checkpoint-")


def save_checkpoint(config: TrainConfig, accelerator: Accelerator, state: TrainState) -> Path:
    """Write checkpoint-N, first under another name, so that a checkpoint is whole or not there.

    `adapter/` and the diffusers file hold the moving average where there is one: it is what evaluation should use.
    """
    final = config.folder / f"checkpoint-{state.step}"
    temporary = config.folder / f".checkpoint-{state.step}.tmp"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / _STATE).mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_file({"cpu": torch.get_rng_state()}, temporary / _STATE / f"rng-{accelerator.process_index}.safetensors")
    if accelerator.is_main_process:
        _write_main(config, accelerator, state, temporary)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        for old in checkpoints(config.folder)[: -config.save_total_limit if config.save_total_limit else 0]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def _write_main(config: TrainConfig, accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    lora = {str(i): p.detach().cpu().clone() for i, p in enumerate(state.policy.trainable())}
    save_file(lora, folder / _STATE / "lora.safetensors")
    save_optimizer(state.optimizer, folder / _STATE / "optimizer.safetensors")
    if state.ema:
        average = {str(i): s.cpu().clone() for i, s in enumerate(state.ema.shadow)}
        save_file(average, folder / _STATE / "ema.safetensors")
    with state.averaged():
        state.policy.save_adapter(folder)
    write_config(config, folder)
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    row = {
        "step": state.step,
        "base": config.model,
        "ema_steps": state.ema.steps if state.ema else 0,
        "counters": state.counters,
        "processes": accelerator.num_processes,
        "scaler": scaler,
    }
    (folder / "state.json").write_text(json.dumps(row))


def resume(config: TrainConfig, accelerator: Accelerator, state: TrainState) -> None:
    """Restore the last whole checkpoint, and forget the metrics of later steps. Raises ValueError if there is none.

    Settings are those of `config`; one that the checkpoint was made with another value of is warned of.
    """
    found = checkpoints(config.folder)
    if not found:
        raise ValueError(f"nothing to resume: {config.folder} holds no whole checkpoint")
    _warn_of_changes(config, found[-1] / CONFIG)
    try:
        _restore(config, accelerator, state, found[-1])
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"{found[-1]} is damaged ({error}); remove it to resume from an earlier one") from error
    if accelerator.is_main_process:
        _truncate_metrics(config.folder / METRICS, state.step)


def _restore(config: TrainConfig, accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    row = json.loads((folder / "state.json").read_text())
    lora = load_file(folder / _STATE / "lora.safetensors")
    parameters = state.policy.trainable()
    if [tuple(lora[k].shape) for k in sorted(lora, key=int)] != [tuple(p.shape) for p in parameters]:
        raise ValueError(f"{folder} was made with another LoRA (rank or targets); resume with its {CONFIG}")
    for i, parameter in enumerate(parameters):
        parameter.data.copy_(lora[str(i)])
    options = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    load_optimizer(state.optimizer, folder / _STATE / "optimizer.safetensors")
    for group, ours in zip(state.optimizer.param_groups, options, strict=True):
        group.update(ours)  # the file brings its own learning rate
    if state.ema:
        file = folder / _STATE / "ema.safetensors"
        average = load_file(file) if file.is_file() else lora
        for i, shadow in enumerate(state.ema.shadow):
            shadow.copy_(average[str(i)])
        state.ema.steps = row["ema_steps"]
    rng = folder / _STATE / f"rng-{accelerator.process_index}.safetensors"
    if rng.is_file():
        torch.set_rng_state(load_file(rng)["cpu"])
    if accelerator.scaler and row["scaler"]:
        accelerator.scaler.load_state_dict(row["scaler"])
    state.step, state.counters = row["step"], row["counters"]


def _warn_of_changes(config: TrainConfig, file: Path) -> None:
    before = yaml.safe_load(file.read_text()) if file.is_file() else {}
    for name, value in dataclasses.asdict(config).items():
        if name in before and before[name] != value and name not in _MAY_CHANGE:
            warnings.warn(f"resuming with {name} = {value!r}; it was {before[name]!r}", stacklevel=3)


def _truncate_metrics(path: Path, step: int) -> None:
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)


class Log:
    """metrics.jsonl, sample grids and the tracker; silent on all processes but the main one."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator):
        self.folder, self.accelerator = config.folder, accelerator
        if config.report_to != "none":
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(config).items()}
            options = {"wandb": {"name": config.name, "dir": str(config.folder), "resume": "allow"}}
            accelerator.init_trackers(config.project, flat, options if config.report_to == "wandb" else {})

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row, and send it to the tracker."""
        if not self.accelerator.is_main_process:
            return
        rounded = {k: float(f"{v:.8g}") for k, v in row.items()}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step} | rounded) + "\n")
        self.accelerator.log(dict(row), step=step)

    def images(self, step: int, images_B3HW: Tensor, captions: Sequence[str]) -> None:
        """Save a grid of samples, and send it to the tracker."""
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / SAMPLES
        folder.mkdir(exist_ok=True)
        grid(images_B3HW).save(folder / f"step-{step:06d}.png")
        (folder / f"step-{step:06d}.txt").write_text("\n".join(captions) + "\n")
        for tracker in self.accelerator.trackers:
            pixels = (images_B3HW.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
            if tracker.name == "wandb":
                tracker.log_images({"samples": list(pixels)}, step=step)
            else:
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")


def grid(images_B3HW: Tensor, columns: int = 8) -> Image.Image:
    """Images side by side, row by row; places left over are white."""
    count, _, height, width = images_B3HW.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    white = images_B3HW.new_ones(rows * columns - count, 3, height, width)
    table = torch.cat([images_B3HW, white]).reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = (table.reshape(rows * height, columns * width, 3) * 255).round().byte().cpu().numpy()
    return Image.fromarray(pixels)


class Interruption:
    """Within, SIGINT and SIGTERM ask the trainer to finish its step, save and stop. A second one kills."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.requested = accelerator, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes call it, as one that stops alone hangs the others."""
        flag = torch.tensor(float(self.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _handle(self, number: int, frame: Any) -> None:
        if self.requested:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.requested = True


def load_prompts(config: TrainConfig) -> tuple[list[prompt_sets.Prompt], list[prompt_sets.Prompt]]:
    """(training prompts, held-out prompts)."""
    held_out = prompt_sets.load(config.eval_prompts) if config.eval_prompts else []
    return prompt_sets.load(config.prompts), held_out
