"""Feynman-Kac corrector: samples of base^(1-w) tuned^w, which guidance claims and misses (arXiv 2503.02819).

The guided score (1-w) s_base + w s_tuned is that of the product of the noised laws at every noise level, but a sampler
that follows it does not carry that product along. What it misses is a weight per sample,

    log W = integral of  w (w-1)  1/2 g^2 |s_tuned - s_base|^2 dt

whatever noise the sampler injects: an ODE and an SDE get the same one. Both predictions are there already, so that it
costs no network pass. Samples compete within their group (the images of one prompt at one w): where the weights' share
of effective samples falls under a threshold, the group is resampled. Without resampling the weights say how far the
samples of this w are from what w claims: `stats.ess` of a group.

Legend: B samples, K samples of a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlg import process
from rlg.process import Schedule
from rlg.stats import ess

RESAMPLE_BELOW = 0.5  # the usual threshold of the effective share


def increment(schedule: Schedule, i: int, w_B: Tensor, guided_BCHW: Tensor, base_BCHW: Tensor) -> Tensor:
    """(B,) nats that step i adds to log W, fp64 on the CPU; 0 at w = 0 and w = 1, where base may be anything.

    guided = base + w (tuned - base), so w (w-1) |tuned - base|^2 = (w-1)/w |guided - base|^2.
    """
    factor_B = torch.where((w_B == 0) | (w_B == 1), 0.0, (w_B - 1) / w_B).double()
    tilt_B = process.tilt(schedule, i, guided_BCHW, base_BCHW).double().cpu()
    return torch.where(factor_B == 0, 0.0, factor_B * tilt_B)


def systematic(log_weight_K: Tensor, u: float) -> Tensor:
    """(K,) indices drawn with one uniform number u in [0, 1): index k comes floor or ceil of K W_k / sum W times."""
    edges_K = torch.softmax(log_weight_K.double(), dim=0).cumsum(dim=0)
    points_K = (torch.arange(len(edges_K), dtype=torch.float64) + u) / len(edges_K)
    return torch.searchsorted(edges_K, points_K).clamp(max=len(edges_K) - 1)


class Corrector:
    """The weights of a batch while it is sampled, and its resampling.

    w_B: the guidance weight of each sample. groups: whom it competes with; a group has one w. threshold: a group is
    resampled when its effective share falls under it; 0 never resamples and leaves `log_weight_B` as a diagnostic.
    seed: of the resampling draws, which depend on it, the group and the step alone.
    """

    def __init__(self, w_B: Tensor, groups: Sequence[Any], threshold: float = 0.0, seed: int = 0):
        if not 0 <= threshold <= 1:
            raise ValueError(f"the threshold of the effective share must be in [0, 1], got {threshold}")
        self.w_B, self.threshold = w_B.cpu(), threshold
        self.log_weight_B = torch.zeros(len(w_B), dtype=torch.float64)  # since the group's last resampling
        members: dict[Any, list[int]] = {}
        for row, group in enumerate(groups):
            members.setdefault(group, []).append(row)
        self._members = [torch.tensor(rows) for rows in members.values()]
        digests = [hashlib.blake2b(f"{seed}/{group}".encode(), digest_size=8).digest() for group in members]
        self._generators = [torch.Generator().manual_seed(int.from_bytes(d, "big") >> 1) for d in digests]

    def update(self, schedule: Schedule, i: int, guided_BCHW: Tensor, base_BCHW: Tensor) -> None:
        """Take in step i, before it is made."""
        self.log_weight_B += increment(schedule, i, self.w_B, guided_BCHW, base_BCHW)

    def resample(self, x_BCHW: Tensor, last: bool = False) -> Tensor:
        """The batch after a step, groups resampled that have fallen under the threshold; all of them at the last."""
        if not self.threshold:
            return x_BCHW
        source_B = torch.arange(len(x_BCHW))
        for rows, generator in zip(self._members, self._generators, strict=True):
            u = float(torch.rand((), generator=generator, dtype=torch.float64))
            share = ess(self.log_weight_B[rows].numpy())
            if share < (1 - 1e-12 if last else self.threshold):
                source_B[rows] = rows[systematic(self.log_weight_B[rows], u)]
                self.log_weight_B[rows] = 0.0
        return x_BCHW[source_B.to(x_BCHW.device)]
