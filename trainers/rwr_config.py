"""Options of reward-weighted regression; see `trainers.rwr`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlg.choices import KERNELS
from trainers.core.config import AdvantageConfig, SamplingConfig, own_options, require_choice, require_positive


@dataclass(kw_only=True)
class RWRConfig(SamplingConfig):
    """Options of reward-weighted regression."""

    # weights are not advantages, so options of advantages have no effect
    RETIRED: ClassVar[Mapping[str, Any]] = own_options(AdvantageConfig, SamplingConfig)

    beta: float = field(default=0.1, metadata={"help": "KL coefficient: samples count for exp(reward / beta)"})
    num_train_steps: int = field(default=4, metadata={"help": "noise levels that each sample is trained at"})
    on_policy: bool = field(default=False, metadata={"help": "samples of the trained model instead of the base"})
    kernel: str = field(default="ode", metadata={"help": "sampler: ode, sde (flow SDE, or DDIM) or cps"})
    level: float = field(default=0.7, metadata={"help": "of a stochastic sampler; eta for DDIM"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta", "num_train_steps", "level")
        require_choice(self, "kernel", KERNELS)
