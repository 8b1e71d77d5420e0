"""Skipped updates: a loss, gradient or reward that is not finite.

Such a value costs one step, and not the run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from trainers.checkpoints import checkpoint_folder, engines

SKIPPED, _IN_A_ROW = "skipped", "skipped_in_a_row"  # counters of a run
_LEAST_SCALE = 1.0  # a gradient scaler below this does not overflow because of its scale


class Skips:
    """Counter of skipped updates.

    It stops the run after `limit` of them in a row.

    All processes count alike. DeepSpeed makes an update within the backward pass, where none can be skipped:
    there, the first one stops the run.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, limit: int):
        self.accelerator, self.folder = accelerator, folder
        self.limit = 1 if engines.is_deepspeed(accelerator) else limit
        self.total = self.in_a_row = 0
        self._broken: Tensor | None = None  # true if a loss since the last update was not finite

    def watch(self, loss: Tensor) -> None:
        """Check a loss that goes into the next update."""
        broken = ~loss.detach().isfinite()
        self._broken = broken if self._broken is None else self._broken | broken

    def must_skip(self, grad_norm: Any) -> bool:
        """Tell whether to skip the due update, and count it if so.

        The update is skipped if one process has to. Raises ValueError where too many were. A gradient scaler (fp16)
        looks for its scale by overflows: those count as skipped, but not against the limit.
        """
        loss_broken = self._broken is not None and bool(self._broken)
        gradient_broken = not math.isfinite(float(grad_norm))
        self._broken = None
        flags = torch.tensor([float(loss_broken), float(gradient_broken)], device=self.accelerator.device)
        losses, gradients = self.accelerator.reduce(flags, "sum").tolist()
        scaler = self.accelerator.scaler
        if losses == gradients == 0:
            self.in_a_row = 0
            return False
        searching = scaler is not None and not losses and scaler.get_scale() >= _LEAST_SCALE
        self.count("the loss" if losses else "the gradient", searching)
        return True

    def count(self, what: str, searching: bool = False) -> None:
        """Count one more skip, because `what` was not finite.

        Raises ValueError if there are too many in a row.
        """
        self.total += 1
        self.in_a_row += not searching
        if self.in_a_row >= self.limit:
            raise ValueError(
                f"{what} was not finite, {self.in_a_row} updates in a row (max_skipped = {self.limit}); "
                f"{checkpoint_folder.last_of(self.folder)}; lower the learning rate, or see what the reward returns"
            )

    def counters(self) -> dict[str, float]:
        """The counters that a checkpoint keeps."""
        return {SKIPPED: self.total, _IN_A_ROW: self.in_a_row}

    def restore(self, counters: Mapping[str, float]) -> None:
        """Restore the counters of a checkpoint."""
        self.total, self.in_a_row = int(counters.get(SKIPPED, 0)), int(counters.get(_IN_A_ROW, 0))


def finite_mean(values: Tensor) -> Tensor:
    """Mean over the finite values; NaN if there are none."""
    return values[values.isfinite()].mean()
