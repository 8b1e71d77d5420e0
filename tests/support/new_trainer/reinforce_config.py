"""Options of REINFORCE."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainers.core.config import AdvantageConfig, require_positive


@dataclass(kw_only=True)
class ReinforceConfig(AdvantageConfig):
    """Options of REINFORCE."""

    level: float = field(default=0.7, metadata={"help": "of the sampler; eta for DDIM"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "level")
