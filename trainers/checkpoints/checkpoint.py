"""Checkpoints: write and restore everything that a run needs.

A run that resumes goes on to the bit on the same CPU. The adapter in a checkpoint is the one that evaluation reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlg.distributed import together
from rlg.io import atomic, run_folder
from rlg.io.optimizer_state import check_shapes, read_optimizer_state, save_optimizer_state
from rlg.io.parsing import check_type, parse_json, read_json
from rlg.io.run_folder import CONFIG, METRICS, STATE, TRAINER_STATE, state_file
from rlg.models.fingerprint import Record
from rlg.models.policy import Policy
from rlg.publishing import model_card
from trainers.checkpoints import checkpoint_folder, engines, provenance
from trainers.core.config import TrainConfig
from trainers.core.run_folder import write_config

# Errors of reading damaged files. Errors of settings are plain ValueErrors.
DAMAGED = (SafetensorError, KeyError, OSError, TypeError, AttributeError, IndexError, RuntimeError)


class Ema:
    """Exponential moving average of the LoRA, with Flow-GRPO's warm-up (flow_grpo/ema.py).

        average <- d average + (1 - d) LoRA,   d = min((1 + n) / (10 + n), decay)

    It is taken `repeats` times after optimizer step n if `every` divides n + 1. Flow-GRPO takes it after a batch, not
    after a step: `repeats` is the number of batches of a step on each process, so that weights count as much as there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, every: int, repeats: int = 1):
        self.parameters = list(parameters)
        self.decay, self.every, self.repeats, self.steps = decay, every, repeats, 0
        with engines.whole(self.parameters):
            self.shadow = [p.detach().clone() for p in self.parameters]

    def update(self) -> None:
        """Count an optimizer step; every `every` steps, average in the parameters."""
        self.steps += 1
        if (self.steps + 1) % self.every:
            return
        decay = min((1 + self.steps) / (10 + self.steps), self.decay) ** self.repeats
        with engines.whole(self.parameters):
            for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
                shadow.lerp_(parameter.detach(), 1 - decay)

    def swap(self) -> None:
        """Exchange average and parameters; a second call undoes it."""
        with engines.whole(self.parameters, write=True):
            for shadow, parameter in zip(self.shadow, self.parameters, strict=True):
                value = parameter.detach().clone()
                parameter.data.copy_(shadow)
                shadow.copy_(value)


class Reader(Protocol):
    """Protocol of data that is read in order."""

    def save_place(self, step: int, folder: Path) -> None:
        """Write how far the data is read before iteration `step`."""

    def load_place(self, step: int, folder: Path) -> None:
        """Read on from the place in a checkpoint."""


@dataclass
class TrainState:
    """Everything that a checkpoint restores."""

    policy: Policy
    optimizer: Any
    ema: Ema | None
    copies: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # adapters beside the trained one, by name
    data: Reader | None = None  # data that keeps a place of its own on each process
    step: int = 0
    counters: dict[str, float] = field(default_factory=dict)  # images made, seconds spent
    record: Record = field(default_factory=dict)  # digests and versions of what the run is made of

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving average into the network for the block.

        Nothing happens if there is none.
        """
        if self.ema:
            self.ema.swap()
        try:
            yield
        finally:
            if self.ema:
                self.ema.swap()


def save_checkpoint(config: TrainConfig, accelerator: Accelerator, state: TrainState) -> Path:
    """Write checkpoint-N, whole or not at all.

    `adapter/` and the diffusers file hold the moving average where there is one, because evaluation should use it.
    """
    with checkpoint_folder.written(config, accelerator, state.step) as folder:
        (folder / TRAINER_STATE).mkdir(exist_ok=True)
        save_file({"cpu": torch.get_rng_state()}, state_file(folder, f"rng-{accelerator.process_index}"))
        if state.data:
            state.data.save_place(state.step, folder / TRAINER_STATE)
        _write(config, accelerator, state, folder)
    return run_folder.checkpoint_at(config.folder, state.step)


def _write(config: TrainConfig, accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    """Write all but the states of the generators.

    Every process calls it, because parts of a state are gathered. The main process writes.
    """
    main, adapters = accelerator.is_main_process, _adapters(state)
    optimizer = engines.optimizer_state(state.optimizer, adapters["lora"])
    with engines.whole([p for parameters in adapters.values() for p in parameters]):
        if main:
            _write_state(config, accelerator, state, folder)
            save_optimizer_state(optimizer, state_file(folder, "optimizer"))
    with state.averaged(), engines.whole(adapters["lora"]):
        if main:
            state.policy.save_adapter(folder)
            model_card.write(folder, run_folder.checkpoint_name(state.step))


def _write_state(config: TrainConfig, accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    for name, parameters in _adapters(state).items():
        tensors = {str(i): p.detach().cpu().clone() for i, p in enumerate(parameters)}
        save_file(tensors, state_file(folder, name))
    if state.ema:
        average = {str(i): s.cpu().clone() for i, s in enumerate(state.ema.shadow)}
        save_file(average, state_file(folder, "ema"))
    write_config(config, folder, provenance.changes_of(config.folder))
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else None
    row = {
        "step": state.step,
        "base": config.base,
        "ema_steps": state.ema.steps if state.ema else 0,
        "counters": state.counters,
        "processes": accelerator.num_processes,
        "scaler": scaler,
        **state.record,
    }
    checkpoint_folder.write_state(folder, row)


def _adapters(state: TrainState) -> dict[str, list[nn.Parameter]]:
    """Parameters by the name of their file."""
    return {"lora": state.policy.trainable()} | {f"lora_{name}": rows for name, rows in state.copies.items()}


def resume(config: TrainConfig, accelerator: Accelerator, state: TrainState) -> None:
    """Restore the last whole checkpoint, and forget the metrics of later steps.

    Settings are those of `config`; see `provenance.check_changes`. Raises ValueError if there is no whole checkpoint.
    """
    found = checkpoint_folder.to_resume(config.folder, accelerator)
    with together():
        provenance.check_changes(config, state.record, found, read_state(found))
    try:
        _restore(config, accelerator, state, found)
    except DAMAGED as error:  # a checkpoint without a manifest may be damaged
        raise ValueError(f"{found} is damaged ({error}); remove it to resume from an earlier one") from error
    if accelerator.is_main_process:
        truncate_metrics(config.folder / METRICS, state.step)
        provenance.note_changes(config, state.step)


def _restore(config: TrainConfig, accelerator: Accelerator, state: TrainState, folder: Path) -> None:
    row = read_state(folder)
    for name, parameters in _adapters(state).items():
        saved = load_file(state_file(folder, name))
        if [tuple(saved[k].shape) for k in sorted(saved, key=int)] != engines.shapes(parameters):
            raise ValueError(f"{folder} was made with another LoRA (rank or targets); resume with its {CONFIG}")
        with engines.whole(parameters, write=True):
            for i, parameter in enumerate(parameters):
                parameter.data.copy_(saved[str(i)])
    options = [{k: v for k, v in group.items() if k != "params"} for group in state.optimizer.param_groups]
    saved = read_optimizer_state(state_file(folder, "optimizer"))
    check_shapes(saved, engines.shapes(state.policy.trainable()), folder)
    engines.load_optimizer_state(state.optimizer, state.policy.trainable(), saved)
    for group, ours in zip(state.optimizer.param_groups, options, strict=True):
        group.update(ours)  # keep the learning rate of the config, not that of the file
    if state.ema:
        file = state_file(folder, "ema")
        average = load_file(file if file.is_file() else state_file(folder, "lora"))
        for i, shadow in enumerate(state.ema.shadow):
            shadow.copy_(average[str(i)])
        state.ema.steps = row["ema_steps"]
    rng = state_file(folder, f"rng-{accelerator.process_index}")
    if rng.is_file():
        torch.set_rng_state(load_file(rng)["cpu"])
    if accelerator.scaler and row["scaler"]:
        accelerator.scaler.load_state_dict(row["scaler"])
    state.step, state.counters = row["step"], row["counters"]
    if state.data:
        state.data.load_place(state.step, folder / TRAINER_STATE)


def read_state(folder: Path) -> dict[str, Any]:
    """Read the state.json of a checkpoint.

    Raises ValueError for content that no trainer wrote.
    """
    file = folder / STATE
    row = read_json(file)
    for name, kind in {"step": int, "ema_steps": int | None, "counters": dict | None}.items():
        check_type(f"{file}: {name}", row.get(name), kind)
    for name, value in (row.get("counters") or {}).items():
        check_type(f"{file}: {name}", value, float)
    if row["step"] < 0:
        raise ValueError(f"{file}: step must not be negative, got {row['step']}")
    return row


def _step_in(line: str, path: Path) -> int:
    try:
        step = parse_json(line, finite=False)["step"]
        check_type("step", step, int)
        return step
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a line that is no row of metrics: {line[:80]}") from error


def truncate_metrics(path: Path, step: int) -> None:
    """Forget the metrics of later steps, and damaged lines.

    A line may be cut off, and a loss of power leaves NULs.
    """
    text = path.read_text(errors="replace").replace("\0", "") if path.is_file() else ""
    lines = text.splitlines()
    kept = [line for line in lines if line.endswith("}") and _step_in(line, path) <= step]
    atomic.write_text(path, "".join(line + "\n" for line in kept))
