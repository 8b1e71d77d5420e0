"""Options of training on existing preference pairs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from trainers.core.config import RunConfig, require_inputs, require_positive


@dataclass(kw_only=True)
class PairConfig(RunConfig):
    """Options of preference pairs, for any training on them."""

    data: str | None = field(default=None, metadata={"help": "preference pairs: hub id, .parquet, .jsonl or a folder"})
    data_split: str = field(default="train", metadata={"help": "split to train on"})
    image_root: str | None = field(default=None, metadata={"help": "where relative image paths begin"})
    streaming: bool = field(default=False, metadata={"help": "read pairs when they are needed: sets larger than disk"})
    accumulation_steps: int = field(default=1, metadata={"help": "batches an optimizer step, on each process"})
    test_split: str | None = field(
        default=None, metadata={"help": "held-out pairs, for the implicit accuracy of every evaluation"}
    )
    test_pairs: int = field(default=500, metadata={"help": "how many of them"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "accumulation_steps", "test_pairs")

    def check_inputs(self, given: Collection[str] = ()) -> None:
        """Raise ValueError without pairs."""
        super().check_inputs(given)
        self.check_pairs(given)

    def check_pairs(self, given: Collection[str]) -> None:
        """Raise ValueError without pairs, or for a held-out split of unnamed pairs."""
        require_inputs(self, given, "data")
        if self.test_split and not self.data:
            raise ValueError(f"test_split {self.test_split} is a split of data: name data, or leave test_split out")

    def derived(self, processes: int) -> dict[str, int]:
        """Counts that follow from the sizes."""
        pairs = processes * self.batch_size * self.accumulation_steps
        return {"processes": processes, "pairs_per_update": pairs, "pairs_in_total": pairs * self.max_steps}
