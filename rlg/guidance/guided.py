"""Guidance as wrappers with the signature of a network.

    (x_BCHW, t_B, conditioning) -> out_BCHW

    guided = base + w (tuned - base) = (1 - w) base + w tuned            Reinforcement Learning Guidance
    guided = base + sum_k w_k (expert_k - base)                          several experts

    w = 0 base      w = 1 tuned model      0 < w < 1 interpolates      w > 1 extrapolates: beta -> beta / w

The rule is that of arXiv 2508.21016. DB-KLA (arXiv 2505.18547) and DeRaDiff (arXiv 2601.20198) use the same update.
With weights on the simplex, the base drops out of the rule for several experts, which is then DB-MPA (arXiv
2505.18547). Classifier-free guidance comes first, inside each model. Kernels of base and tuned model share their
variance. The guided kernel is therefore the normalised geometric mean of the two, for every process in
`rlg.diffusion.process`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlg.diffusion.conditioning import Conditioning, Outputs, Predictor

# A number, a tensor (B,) with one number a sample, or a function of the network's t that returns either.
Weight = float | Tensor | Callable[[float], float | Tensor]

_ZERO = 1e-6  # weights may sum to one only up to rounding, some ulps in fp32; the base's pass is then skipped


def with_cfg(
    predict: Predictor, negative: Conditioning, scale: float, detach_unconditional: bool = False
) -> Predictor:
    """Classifier-free guidance, `uncond + scale (cond - uncond)`, in one batch of 2B.

    At scale 1, the predictor is returned as it is. negative: the conditioning of one prompt (usually ""), used for
    every sample. detach_unconditional: no gradient goes through `uncond`.
    """
    if scale == 1.0:
        return predict

    def predictor(x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        both = Conditioning.cat([negative.expand(len(cond)), cond])
        uncond, conditional = predict(torch.cat([x_BCHW] * 2), torch.cat([t_B] * 2), both).chunk(2)
        uncond = uncond.detach() if detach_unconditional else uncond
        return uncond + scale * (conditional - uncond)

    return predictor


@dataclass(frozen=True)
class Guided:
    """The predictor `base + sum_k w_k (expert_k - base)`.

    A pass is skipped for those samples for which its weight is 0.
    """

    base: Predictor
    experts: tuple[Predictor, ...]
    weights: tuple[Weight, ...]

    def __post_init__(self) -> None:
        if len(self.experts) != len(self.weights):
            raise ValueError(f"{len(self.experts)} experts need as many weights, got {len(self.weights)}")
        for weight in self.weights:
            check_finite(weight)

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        return self.with_base(x_BCHW, t_B, cond).out_BCHW

    def with_base(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Outputs:
        """The guided output with the base's output."""
        coefficients = self.coefficients(float(t_B[0]), len(x_BCHW))
        guided = base = torch.zeros(x_BCHW.shape, device=x_BCHW.device)
        for predict, c_B in zip((self.base, *self.experts), coefficients, strict=True):
            if bool((c_B != 0).any()):
                out = on_rows(predict, c_B != 0, x_BCHW, t_B, cond)
                guided = guided + _column(c_B, out) * out
                base = out if predict is self.base else base
        return Outputs(guided, base, coefficients[0] != 0)

    def coefficients(self, t: float, batch: int) -> list[Tensor]:
        """(B,) coefficients of the base and of each expert at time t.

        They sum to one.
        """
        weights = [_at(weight, t, batch) for weight in self.weights]
        rest = 1 - torch.stack(weights).sum(dim=0)
        rest = torch.where(rest.abs() < _ZERO, torch.zeros_like(rest), rest)
        return [rest, *weights]

    def passes(self, t: float, batch: int) -> Tensor:
        """(B,) number of network passes for each sample at time t.

        Classifier-free guidance is not counted.
        """
        return torch.stack([(c_B != 0).long() for c_B in self.coefficients(t, batch)]).sum(dim=0)


def rlg(base: Predictor, tuned: Predictor, w: Weight) -> Guided:
    """Reinforcement Learning Guidance: one expert."""
    return Guided(base, (tuned,), (w,))


def interval(w: float, low: float, high: float) -> Callable[[float], float]:
    """The weight w where low < t <= high, and 1 elsewhere.

    t is the network's own time. A weight of 1 takes one pass (arXiv 2404.07724).
    """
    return lambda t: w if low < t <= high else 1.0


def as_weight(value: Any) -> Weight:
    """A guidance weight from the value that a user gives.

    value: a number, a list or array with one number an image, or a function of t. Returns a float, an fp32 tensor (B,)
    on the CPU, or the function. Raises ValueError for anything else.
    """
    if callable(value):
        return value
    if isinstance(value, (str, bytes, bool)):
        raise ValueError(f"the guidance weight w must be a number, got {value!r}")
    try:
        weight = torch.as_tensor(value, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the guidance weight w must be a number, a list of them or a function of t, got {value!r}"
        ) from error
    if weight.ndim > 1 or not weight.numel():
        raise ValueError(f"the guidance weights must be a number an image, got the shape {tuple(weight.shape)}")
    check_finite(weight)
    return weight if weight.ndim else float(value)


def check_finite(weight: Weight) -> None:
    """Raise ValueError for a weight that is not a finite number.

    Functions of t are checked when they are called.
    """
    if callable(weight):
        return
    if not bool(torch.isfinite(torch.as_tensor(weight)).all()):
        raise ValueError(f"the guidance weight w must be finite, got {weight}")


def _at(weight: Weight, t: float, batch: int) -> Tensor:
    value = weight(t) if callable(weight) else weight
    if not isinstance(value, Tensor):
        if not math.isfinite(value):
            raise ValueError(f"the guidance weight w must be finite, got {value} at t={t:g}")
        return torch.full((batch,), float(value))
    if value.ndim and len(value) != batch:
        raise ValueError(f"{len(value)} guidance weights for a batch of {batch}")
    return value.float().cpu().expand(batch)


def on_rows(predict: Predictor, mask_B: Tensor, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
    """The prediction in fp32 for some samples, and 0 for others.

    mask_B: the samples to predict, on the CPU.
    """
    if bool(mask_B.all()):
        return predict(x_BCHW, t_B, cond).float()
    rows = mask_B.nonzero().flatten().to(x_BCHW.device)
    full = torch.zeros(x_BCHW.shape, device=x_BCHW.device)
    full[rows] = predict(x_BCHW[rows], t_B[rows], cond[rows]).float()
    return full


def _column(c_B: Tensor, like: Tensor) -> Tensor:
    return c_B.to(like.device).reshape(-1, *[1] * (like.ndim - 1))
