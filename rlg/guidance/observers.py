"""Observers of a guided trajectory: path KL and network passes.

Legend: B samples.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlg.diffusion import sampling
from rlg.diffusion.conditioning import Predictor
from rlg.diffusion.sampling import Observer, Step
from rlg.guidance.guided import Guided, on_rows


class PathKL(Observer):
    """KL(path || base path) of each sample.

    It is Girsanov's formula, with the variance that is really injected. base: the predictor for rows whose guided
    output was made without the base. is_guided_from: whether guidance starts from this same base, so that its outputs
    can be used here. now: a clock in seconds.
    """

    def __init__(self, base: Predictor, batch: int, is_guided_from: bool, now: Callable[[], float]):
        self.kl_B = torch.zeros(batch)  # nats
        self.seconds = 0.0  # time spent in this observer
        self._base, self._is_guided_from, self._now = base, is_guided_from, now

    def see(self, step: Step) -> None:
        """Add the nats of a stochastic step.

        Deterministic steps add none.
        """
        if step.is_stochastic:
            started = self._now()
            out, base = step.outputs.out_BCHW, self._base_out(step)
            self.kl_B += sampling.path_kl_step(step.schedule, step.i, out, base).cpu()
            self.seconds += self._now() - started

    def _base_out(self, step: Step) -> Tensor:
        base_BCHW, known_B = step.outputs.base_BCHW, step.outputs.known_B
        if base_BCHW is None or known_B is None or not self._is_guided_from:
            base_BCHW = torch.zeros_like(step.outputs.out_BCHW)
            known_B = torch.zeros(len(base_BCHW), dtype=torch.bool)
        if bool(known_B.all()):
            return base_BCHW
        return base_BCHW + on_rows(self._base, ~known_B, step.x_BCHW, step.t_B, step.cond)

    def gather(self, index_B: Tensor) -> None:
        """Let each row take the KL of this row's path."""
        self.kl_B = self.kl_B[index_B]


class PassCounter(Observer):
    """Count the network passes of each sample's path.

    Classifier-free guidance is not counted.
    """

    def __init__(self, guided: Guided, batch: int):
        self.passes_B = torch.zeros(batch, dtype=torch.long)
        self._guided = guided

    def see(self, step: Step) -> None:
        """Add the passes of a step."""
        self.passes_B += self._guided.passes(float(step.t_B[0]), len(self.passes_B))

    def gather(self, index_B: Tensor) -> None:
        """Let each row take the count of this row's path."""
        self.passes_B = self.passes_B[index_B]
