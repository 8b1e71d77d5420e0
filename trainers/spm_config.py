"""Options of training the step-aware preference model; see `trainers.spm`."""

from __future__ import annotations

from dataclasses import dataclass, field

from trainers.core.config import require_positive
from trainers.data.pair_config import PairConfig


@dataclass(kw_only=True)
class SPMConfig(PairConfig):
    """Options of training the step-aware preference model.

    The defaults are those of the official model for Stable Diffusion 1.5 (4 GPUs).
    """

    test_split: str | None = field(default="test", metadata={"help": "held-out split (none: no measurement)"})
    clip: str = field(
        default="yuvalkirstain/PickScore_v1", metadata={"help": "CLIP to start from: hub id, folder, or tiny"}
    )
    cfg: float = field(default=5.0, metadata={"help": "classifier-free guidance of x0_hat"})
    compare: bool = field(default=True, metadata={"help": "also train the time-blind scorer, on clean images"})
    accumulation_steps: int = field(default=16, metadata={"help": "batches an optimizer step, on each process"})
    batch_size: int = field(default=2, metadata={"help": "pairs a batch"})
    max_steps: int = field(default=8000, metadata={"help": "optimizer steps"})
    learning_rate: float = field(default=3e-6, metadata={"help": "of AdamW"})
    weight_decay: float = field(default=0.3, metadata={"help": "of AdamW"})
    test_bins: int = field(default=10, metadata={"help": "noise levels at which they are compared"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "test_bins")
