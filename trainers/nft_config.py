"""Options of DiffusionNFT; see `trainers.nft`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainers.core.config import AdvantageConfig, require_positive


@dataclass(kw_only=True)
class NFTConfig(AdvantageConfig):
    """Options of DiffusionNFT; the defaults are the official code's."""

    LORA_COPIES = 1  # the policy that samples is a copy

    cfg: float = field(default=1.0, metadata={"help": "classifier-free guidance of samples; 1: off"})
    num_train_steps: int = field(default=10, metadata={"help": "noise levels that each sample is trained at"})
    nft_beta: float = field(default=1.0, metadata={"help": "how far plus and minus lie from the old policy"})
    kl_coef: float = field(default=1e-4, metadata={"help": "weight of |out - out_ref|^2"})
    old_decay_start: int = field(default=0, metadata={"help": "iterations during which old is a copy of the trained"})
    old_decay_rate: float = field(default=0.001, metadata={"help": "then d grows by this with each iteration ..."})
    old_decay_max: float = field(default=0.5, metadata={"help": "... up to this"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "num_train_steps", "nft_beta")
        for name in ("kl_coef", "old_decay_start", "old_decay_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.old_decay_max < 1:
            raise ValueError(f"old_decay_max must be at least 0 and less than 1, got {self.old_decay_max}")

    def old_decay(self, step: int) -> float:
        """The decay d of the old policy after iteration `step`."""
        return min(self.old_decay_rate * max(step - self.old_decay_start, 0), self.old_decay_max)
