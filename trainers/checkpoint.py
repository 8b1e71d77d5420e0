"""Checkpoints: everything that a run needs to go on bit for bit, and the adapter that evaluation reads."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlg import model_card
from rlg.config import CONFIG
from rlg.policy import Policy
from rlg.state import load_optimizer, save_optimizer
from trainers.common import METRICS, TrainConfig, write_config

_STATE = "trainer_state"
_MAY_CHANGE = ("name", "output_dir", "max_steps", "save_steps", "save_total_limit", "sample_steps", "report_to")
_MAY_CHANGE += ("log_adapter", "push_to_hub", "hub_model_id", "hub_private_repo", "adapter_license")


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
    copies: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # adapters beside the trained one, by name
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
    for name, parameters in _adapters(state).items():
        tensors = {str(i): p.detach().cpu().clone() for i, p in enumerate(parameters)}
        save_file(tensors, folder / _STATE / f"{name}.safetensors")
    save_optimizer(state.optimizer, folder / _STATE / "optimizer.safetensors")
    if state.ema:
        average = {str(i): s.cpu().clone() for i, s in enumerate(state.ema.shadow)}
        save_file(average, folder / _STATE / "ema.safetensors")
    with state.averaged():
        state.policy.save_adapter(folder)
    write_config(config, folder)
    model_card.write(folder, f"checkpoint-{state.step}")
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


def _adapters(state: TrainState) -> dict[str, list[nn.Parameter]]:
    """Parameters by the name of their file."""
    return {"lora": state.policy.trainable()} | {f"lora_{name}": rows for name, rows in state.copies.items()}


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
        truncate_metrics(config.folder / METRICS, state.step)


def _restore(config: TrainConfig, accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    row = json.loads((folder / "state.json").read_text())
    for name, parameters in _adapters(state).items():
        saved = load_file(folder / _STATE / f"{name}.safetensors")
        if [tuple(saved[k].shape) for k in sorted(saved, key=int)] != [tuple(p.shape) for p in parameters]:
            raise ValueError(f"{folder} was made with another LoRA (rank or targets); resume with its {CONFIG}")
        for i, parameter in enumerate(parameters):
            parameter.data.copy_(saved[str(i)])
    options = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    load_optimizer(state.optimizer, folder / _STATE / "optimizer.safetensors")
    for group, ours in zip(state.optimizer.param_groups, options, strict=True):
        group.update(ours)  # the file brings its own learning rate
    if state.ema:
        file = folder / _STATE / "ema.safetensors"
        average = load_file(file if file.is_file() else folder / _STATE / "lora.safetensors")
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


def truncate_metrics(path: Path, step: int) -> None:
    """Forget the metrics of later steps, and a line that was cut off."""
    lines = path.read_text().splitlines() if path.is_file() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept))
    temporary.replace(path)
