"""Options of Adjoint Matching; see `trainers.adjoint_matching`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainers.core.config import TrainedStepsConfig, require_positive


@dataclass(kw_only=True)
class AdjointMatchingConfig(TrainedStepsConfig):
    """Options of Adjoint Matching."""

    cfg: float = field(default=1.0, metadata={"help": "classifier-free guidance of samples; 1: off, as in the paper"})
    cfg_in_loss: bool = field(
        default=True, metadata={"help": "guide control and adjoint, too; false is as in the official code for SD1.5"}
    )
    beta: float = field(default=0.1, metadata={"help": "KL coefficient: the target is p_base exp(reward / beta)"})
    level: float | None = field(
        default=None, metadata={"help": "of the sampler's noise; eta for DDIM (default: the memoryless one)"}
    )
    noisy_end: bool = field(default=False, metadata={"help": "the last step has noise, too; the paper's has none"})
    loss_clip: float | None = field(
        default=None, metadata={"help": "leave out terms above loss_clip / beta^2 (paper: 1.6)"}
    )
    mask_quantile: float = field(
        default=0.9, metadata={"help": "at each step, leave out samples whose target is above it; 1: none"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta", "level", "loss_clip")
        if not 0 < self.mask_quantile <= 1:
            raise ValueError(f"mask_quantile must be above 0 and at most 1, got {self.mask_quantile}")
        if not self.noisy_end and self.steps < 2:
            raise ValueError(f"the last step has no noise, so there must be at least 2 steps, got {self.steps}")
