"""Options of VGG-Flow; see `trainers.vgg_flow`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainers.core.config import TrainedStepsConfig, require_choice, require_positive

# eta is the share of the image in the latents, to this power.
POWERS = {"constant": 0, "linear": 1, "quadratic": 2}
POINTS = ("estimate", "end")


@dataclass(kw_only=True)
class VGGFlowConfig(TrainedStepsConfig):
    """Options of VGG-Flow."""

    cfg: float = field(default=5.0, metadata={"help": "classifier-free guidance of samples and of the loss"})
    beta: float = field(
        default=0.1, metadata={"help": "weight of the control's energy (lambda of the paper); no KL coefficient"}
    )
    eta: str = field(default="quadratic", metadata={"help": f"schedule of the reward: {', '.join(POWERS)}"})
    gradient_at: str = field(
        default="estimate", metadata={"help": "where the reward's gradient is taken: estimate (of the end), or end"}
    )
    clip_quantile: float = field(
        default=0.8, metadata={"help": "gradients are clipped to this quantile of their norms; 1: not"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")
        require_choice(self, "eta", tuple(POWERS))
        require_choice(self, "gradient_at", POINTS)
        if not 0 < self.clip_quantile <= 1:
            raise ValueError(f"clip_quantile must be above 0 and at most 1, got {self.clip_quantile}")
