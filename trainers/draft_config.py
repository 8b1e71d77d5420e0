"""Options of DRaFT and its relatives; see `trainers.draft`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from rlg.choices import KERNELS
from trainers.core.config import RewardGradientConfig, require_choice, require_positive

# Options that one method alone has.
OWN = {
    "draft_k": ("num_grad_steps",),
    "draft_lv": ("noise_copies",),
    "refl": ("refl_from",),
    "alignprop": ("start_mean", "start_std"),
}


@dataclass(kw_only=True)
class DRaFTConfig(RewardGradientConfig):
    """Options of DRaFT-K, DRaFT-LV, ReFL and AlignProp."""

    method: str = field(default="draft_k", metadata={"help": f"where the gradient goes: {', '.join(OWN)}"})
    num_grad_steps: int = field(default=1, metadata={"help": "draft_k: K, the last steps that it goes through"})
    noise_copies: int = field(
        default=2, metadata={"help": "draft_lv: times that an image is noised for the last step"}
    )
    refl_from: float = field(
        default=0.75, metadata={"help": "refl: its step is drawn after this share of the steps (30 of 40)"}
    )
    start_mean: float = field(
        default=0.84, metadata={"help": "alignprop: mean share of the steps before the gradient begins (42 of 50)"}
    )
    start_std: float = field(default=0.1, metadata={"help": "alignprop: its standard deviation (5 of 50)"})
    margin: float | None = field(
        default=None,
        metadata={"help": "rewards above it teach nothing: relu(margin - reward) (ReFL: 2; default: none)"},
    )
    kl_coef: float = field(
        default=0.0, metadata={"help": "weight of |out - out_ref|^2 at the trained steps (DRaFT+: 1)"}
    )
    kernel: str = field(default="ode", metadata={"help": "sampler: ode, sde (flow SDE, or DDIM) or cps"})
    level: float = field(default=1.0, metadata={"help": "of a stochastic sampler; eta for DDIM (AlignProp: 1)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "method", tuple(OWN))
        require_choice(self, "kernel", KERNELS)
        require_positive(self, "num_grad_steps", "noise_copies", "start_std", "level")
        for name, default in self.idle_options().items():
            if getattr(self, name) != default:
                raise ValueError(f"{name} has no effect with method {self.method}; leave it out")
        if self.num_grad_steps > self.steps:
            raise ValueError(f"num_grad_steps = {self.num_grad_steps} is more than steps = {self.steps}")
        for name in ("refl_from", "start_mean"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}")
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}")

    def idle_options(self) -> Mapping[str, Any]:
        """Defaults of the other methods' options."""
        others = {name for method, names in OWN.items() if method != self.method for name in names}
        return {each.name: each.default for each in fields(self) if each.name in others}
