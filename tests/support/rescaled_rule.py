"""A rule of guidance, as someone outside would add it: RLG whose output keeps the spread of the tuned model's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from rlg.diffusion.conditioning import Conditioning, Outputs, Predictor
from rlg.guidance.guided import Guided, Weight


@dataclass(frozen=True)
class Rescaled(Guided):
    """guided * std(tuned) / std(guided), a sample at a time (arXiv 2305.08891, section 3.4, of RLG)."""

    def with_base(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Outputs:
        found = super().with_base(x_BCHW, t_B, cond)
        w_B = self.coefficients(float(t_B[0]), len(x_BCHW))[1][:, None, None, None]
        tuned = found.base_BCHW + (found.out_BCHW - found.base_BCHW) / w_B
        share = tuned.std(dim=(1, 2, 3), keepdim=True) / found.out_BCHW.std(dim=(1, 2, 3), keepdim=True)
        return replace(found, out_BCHW=found.out_BCHW * share)


def rescaled(base: Predictor, tuned: Predictor, w: Weight) -> Rescaled:
    return Rescaled(base, (tuned,), (w,))
