"""Feynman-Kac corrector: samples of base^(1-w) tuned^w (arXiv 2503.02819).

Guidance follows the score of this product at every noise level, but its samples do not have the product's law. The
difference is a weight for each sample:

    log W = integral of  w (w-1)  1/2 g^2 |s_tuned - s_base|^2 dt

The weight is the same for an ODE and an SDE. It costs no network pass. A step counts by both of its ends
(`process.tilt`), so its weight is known at the next step. The sum is exact for two Gaussians of one variance. With
several modes, its error is up to 27% at 10 steps and 7% at 40. Under classifier-free guidance the weights are
heuristic. A group (the images of one prompt at one w) is resampled when its share of effective samples falls under a
threshold. Without resampling, the weights are a diagnostic: `summary.effective_share`.

Legend: B samples, K samples of a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import pick
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import Move, Moved, Step
from rlg.stats import ess

RESAMPLE_BELOW = 0.5  # the usual threshold of the effective share


def systematic(log_weight_K: Tensor, u: float) -> Tensor:
    """(K,) indices drawn by systematic resampling, with one uniform u.

    u lies in [0, 1). Index k comes floor or ceil of K W_k / sum W times.
    """
    edges_K = torch.softmax(log_weight_K.double(), dim=0).cumsum(dim=0)
    points_K = (torch.arange(len(edges_K), dtype=torch.float64) + u) / len(edges_K)
    return torch.searchsorted(edges_K, points_K).clamp(max=len(edges_K) - 1)


class Corrector(Move):
    """The weights of a batch while it is sampled, and its resampling.

    w_B: the guidance weight of each sample. groups: the group of each sample; a group has one w. threshold: a group is
    resampled when its effective share falls under it. 0 never resamples and leaves `log_weight_B` as a diagnostic.
    seed: the resampling draws depend only on it, the group and the step.
    """

    def __init__(self, w_B: Tensor, groups: Sequence[Any], threshold: float = 0.0, seed: int = 0):
        if not 0 <= threshold <= 1:
            raise ValueError(f"the threshold of the effective share must be in [0, 1], got {threshold}")
        self.w_B, self.threshold = w_B.cpu(), threshold
        self.log_weight_B = torch.zeros(len(w_B), dtype=torch.float64)  # since the group's last resampling
        self._gap_B: Tensor | None = None  # gap of the previous step
        members: dict[Any, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        self._members = [torch.tensor(rows) for rows in members.values()]
        digests = [hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8).digest() for group in members]
        self._generators = [torch.Generator().manual_seed(int.from_bytes(d, "big") >> 1) for d in digests]

    def update(self, schedule: Schedule, i: int, guided_BCHW: Tensor, base_BCHW: Tensor) -> None:
        """Take in the predictions of step i, before the step is made.

        This adds to log W up to the step's noise level. At the last step it adds the rest, up to the end. guided =
        base + w (tuned - base), so w (w-1) |tuned - base|^2 = (w-1)/w |guided - base|^2. At w = 0 and w = 1 that is 0,
        and base may be anything.
        """
        gap_B = process.score_gap(schedule, i, guided_BCHW, base_BCHW).cpu()
        before_B = gap_B if self._gap_B is None else self._gap_B
        if i > 0:
            self._add(process.tilt(schedule, i - 1, before_B, gap_B))
        if i == len(schedule) - 1:
            end_B = process.gap_at_end(schedule, before_B, gap_B) if i > 0 else gap_B
            self._add(process.tilt(schedule, i, gap_B, end_B))
        self._gap_B = gap_B

    def _add(self, tilt_B: Tensor) -> None:
        factor_B = torch.where((self.w_B == 0) | (self.w_B == 1), 0.0, (self.w_B - 1) / self.w_B).double()
        self.log_weight_B += torch.where(factor_B == 0, 0.0, factor_B * tilt_B)

    def move(self, step: Step) -> Moved:
        """Take in a step, and resample groups under the threshold."""
        outputs = step.outputs
        assert outputs.base_BCHW is not None, "the weights need the base's output"
        self.update(step.schedule, step.i, outputs.out_BCHW, outputs.base_BCHW)
        source_B = self.resample(step.is_last)
        return Moved(step.x_next_BCHW if source_B is None else pick(step.x_next_BCHW, source_B), source_B)

    def resample(self, last: bool = False) -> Tensor | None:
        """(B,) the row that each row goes on from.

        Returns None if every row goes on from itself. Groups under the threshold are resampled; after the last step,
        all groups are.
        """
        if not self.threshold:
            return None
        own_B = torch.arange(len(self.log_weight_B))
        source_B = own_B.clone()
        for rows, generator in zip(self._members, self._generators, strict=True):
            u = float(torch.rand((), generator=generator, dtype=torch.float64))
            share = ess(self.log_weight_B[rows].numpy())
            if share < (1 - 1e-12 if last else self.threshold):
                source_B[rows] = rows[systematic(self.log_weight_B[rows], u)]
                self.log_weight_B[rows] = 0.0
        return None if torch.equal(source_B, own_B) else source_B

    def gather(self, index_B: Tensor) -> None:
        """Let each row take the weight and the gap of this row.

        An index stays within groups.
        """
        self.log_weight_B = self.log_weight_B[index_B]
        self._gap_B = None if self._gap_B is None else self._gap_B[index_B]
