"""One resumable training: parameters, their moving average, checkpoints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlg.io.optimizer_state import load_optimizer, save_optimizer

_CHECKPOINT_SECONDS = 180.0


def learning_rate(step: int, steps: int, peak: float, warmup: int, decay: float = 0.4) -> float:
    """Learning rate: linear warm-up, constant, linear decay to zero.

    decay: share of the steps, at the end, over which it falls.
    """
    return peak * min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))


def generator_of(seed: int, step: int) -> torch.Generator:
    """Generator of everything random in a step.

    A resumed training so draws what an uninterrupted one draws.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def autocast(device: str, dtype: str) -> torch.autocast:
    """The forward pass in bfloat16, or as it is."""
    return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


class Stage:
    """Parameters, optimizers, EMA and a step counter, saved to a folder."""

    def __init__(self, folder: Path, module: nn.Module, optimizers: Sequence[torch.optim.Optimizer], steps: int):
        self.folder, self.module, self.optimizers, self.steps = folder, module, optimizers, steps
        self.ema = EMAModel(module.parameters(), decay=0.9995, use_ema_warmup=True, power=0.75)
        self.step = 0
        if (folder / "stage.json").exists():
            self._load()
        self._saved = time.monotonic()

    def _load(self) -> None:
        state = json.loads((self.folder / "stage.json").read_text())
        self.step = state["step"]
        tensors = load_file(self.folder / f"weights-{self.step}.safetensors")
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(tensors[name])
            for shadow, (name, _) in zip(self.ema.shadow_params, self.module.named_parameters(), strict=True):
                shadow.copy_(tensors[f"ema.{name}"])
        self.ema.optimization_step = self.step
        for rank, optimizer in enumerate(self.optimizers):
            load_optimizer(optimizer, self.folder / f"optimizer{rank}-{self.step}.safetensors")

    def save(self) -> None:
        """Write a checkpoint; stage.json names the last whole one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        named = list(self.module.named_parameters())
        tensors = {name: p.detach().contiguous().clone() for name, p in named}
        tensors |= {f"ema.{name}": s.contiguous() for s, (name, _) in zip(self.ema.shadow_params, named, strict=True)}
        save_file(tensors, self.folder / f"weights-{self.step}.safetensors")
        for rank, optimizer in enumerate(self.optimizers):
            save_optimizer(optimizer, self.folder / f"optimizer{rank}-{self.step}.safetensors")
        temporary = self.folder / "stage.json.tmp"
        temporary.write_text(json.dumps({"step": self.step}))
        os.replace(temporary, self.folder / "stage.json")
        for old in self.folder.glob("*.safetensors"):
            if not old.stem.endswith(f"-{self.step}"):
                old.unlink()
        self._saved = time.monotonic()

    def update(self, loss: Tensor, rates: Sequence[float]) -> None:
        """One optimizer step; checkpoints when it is time."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.ema.step(self.module.parameters())
        self.step += 1
        if time.monotonic() - self._saved > _CHECKPOINT_SECONDS or self.step == self.steps:
            self.save()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the module has the moving average of its weights."""
        self.ema.store(self.module.parameters())
        self.ema.copy_to(self.module.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.module.parameters())

    def finish(self) -> None:
        """Put the moving average into the module."""
        self.ema.copy_to(self.module.parameters())
