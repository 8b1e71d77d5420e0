"""Diffusion Blend (arXiv 2505.18547): guidance with several experts.

An expert is one LoRA, trained on one reward r_i. Its output is e_i, and lambda lies on the simplex:

    guided = base + W sum_i lambda_i (e_i - base)

    W = 1          DB-MPA, sum_i lambda_i e_i, in which the base drops out
    one expert     DB-KLA, which is RLG
    both           aims at p_base exp(W sum_i lambda_i r_i / beta)
    DB-MPA-LS      draws one expert a step and sample, i ~ Categorical(lambda), and runs it alone: one pass

`guidance.Guided` takes one pass for each expert. DB-MPA-LS has the right drift in expectation. With many small steps,
the marginals of an SDE are right as well (Proposition 2 there); an ODE has no such guarantee. Its weights must be
probabilities: W lambda_i >= 0 and W <= 1, and the base has the rest. An evaluation reports the path KL given the
draws, which is no less than that of the mixture.

Legend: B batch, E experts, S denoising steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import SampleId

_ROUNDING = 1e-6  # rounding may bring a sum of probabilities so far from 1
_MOST = 1001  # points of a grid; a longer one is a typing error


def grid(text: str) -> tuple[float, ...]:
    """The numbers of START:STOP:STEP within [0, 1], to 6 digits.

    Both ends are included. Raises ValueError for anything else.
    """
    try:
        start, stop, step = map(float, text.split(":"))
    except ValueError:
        raise ValueError(f"--blend takes START:STOP:STEP such as 0:1:0.1, got {text!r}") from None
    if not 0 <= start <= stop <= 1 or not (step > 0 and math.isfinite(step)):
        raise ValueError(
            f"--blend needs 0 <= START <= STOP <= 1 and STEP > 0, got {text!r}; --blend_scale goes beyond"
        )
    count = math.floor((stop - start) / step + 1e-6) + 1
    if count > _MOST:
        raise ValueError(f"--blend {text} has {count} points; at most {_MOST}")
    return tuple(float(f"{start + i * step:g}") for i in range(count))


def pair_weights(lambda_B: Tensor, scale: float = 1.0) -> Tensor:
    """(B, 2) weights of two experts: `scale` times (1 - lambda, lambda)."""
    return scale * torch.stack([1 - lambda_B, lambda_B], dim=1)


def check_drawn(method: str, weights: Sequence[Sequence[float]], sampler: str, level: float) -> None:
    """Raise ValueError unless experts may be drawn at each step.

    The sampler must be stochastic, and the weights must be probabilities. weights: those of the experts, for each
    point; the base has the rest.
    """
    if sampler == "ode" or level == 0:
        raise ValueError(
            f"method {method} draws one model at each step, which only a stochastic sampler averages out; "
            f"give --kernel sde instead of {sampler} at level {level:g}, or leave the method out"
        )
    for row in weights:
        if min(row) < 0 or sum(row) > 1 + _ROUNDING:
            shown = ", ".join(f"{w:g}" for w in row)
            raise ValueError(f"method {method} needs probabilities, weights >= 0 with a sum of at most 1, got {shown}")


def one_at_a_time(
    weights_BE: Tensor, schedule: Schedule, ids: Sequence[SampleId]
) -> tuple[Callable[[float], Tensor], ...]:
    """Weights for `guidance.Guided` that choose one model at each step.

    The chosen expert has the weight 1. If all weights are 0, the base is chosen. A sample draws one uniform number a
    step from its own generator. Its draws depend only on (seed, prompt, k) and on its weights, so that they are paired
    along a sweep over the weights.

    weights_BE: probabilities on the CPU; the base has the rest. Returns a function t -> (B,) for each expert. It takes
    the times of this schedule, and raises KeyError for others.
    """
    uniform_BS = torch.stack([torch.rand(len(schedule), generator=sample.generator("experts")) for sample in ids])
    edges_BE = weights_BE.double().cumsum(dim=1)
    # Rounding must not give the base a share, so a sum next to 1 is 1.
    edges_BE = torch.where((edges_BE - 1).abs() < _ROUNDING, torch.ones_like(edges_BE), edges_BE)
    drawn_BS = torch.searchsorted(edges_BE, uniform_BS.double(), right=True)  # the index E stands for the base
    step_of = {float(t): i for i, t in enumerate(schedule.t)}
    assert len(step_of) == len(schedule), "two steps at the same time"

    def weight(expert: int) -> Callable[[float], Tensor]:
        return lambda t: (drawn_BS[:, step_of[t]] == expert).float()

    return tuple(weight(expert) for expert in range(weights_BE.shape[1]))
