"""Options of Diffusion-DPO, offline and online; see `trainers.dpo`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from trainers.core.config import AdvantageConfig, RunConfig, TrainConfig, own_options, require_choice, require_positive
from trainers.data.pair_config import PairConfig

LOSSES = ("sigmoid", "hinge", "ipo")


@dataclass(kw_only=True)
class LossOptions(TrainConfig):
    """Options of the loss; the defaults are the paper's."""

    beta: float = field(default=5000.0, metadata={"help": "strength of the KL, with the factor 1/2 of the paper"})
    loss_type: str = field(default="sigmoid", metadata={"help": "sigmoid, hinge or ipo"})
    min_noise: float = field(
        default=0.0, metadata={"help": "noise levels are drawn from this share of the process on; 0: from all of it"}
    )
    caption_dropout: float = field(default=0.2, metadata={"help": "share of pairs trained with an empty caption"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "loss_type", LOSSES)
        require_positive(self, "beta")
        if not 0 <= self.min_noise < 1:
            raise ValueError(f"min_noise must be at least 0 and less than 1, got {self.min_noise}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout must be between 0 and 1, got {self.caption_dropout}")

    def trained_at_once(self) -> int:
        """Rows of the batch that get a gradient: winners and losers."""
        return 2 * self.batch_size


@dataclass(kw_only=True)
class OfflineOptions(PairConfig):
    """Options of training a diffusion model on existing pairs."""

    random_crop: bool = field(default=False, metadata={"help": "crop at a random place instead of the centre"})
    true_sizes: bool = field(
        default=False, metadata={"help": "condition on each image's own size and crop, where the model can"}
    )
    cache: bool = field(default=False, metadata={"help": "keep latents and encoded captions in memory"})
    test_draws: int = field(default=16, metadata={"help": "noise levels, with a noise each, that a margin averages"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "test_draws")
        if self.cache and (self.random_crop or self.streaming):
            raise ValueError("cache keeps latents of one crop of a set that fits; leave out random_crop and streaming")


@dataclass(kw_only=True)
class DPOConfig(LossOptions, OfflineOptions, AdvantageConfig):
    """Options of DPO, on existing pairs or, online, on own samples.

    An online pair is the best and the worst of a group under the reward. Options of the other kind are refused.
    """

    online: bool = field(
        default=False, metadata={"help": "train on its own samples, by prompts and reward, and not on data"}
    )
    reward: list[str] = field(default_factory=list, metadata={"help": "rewards to evaluate; online: to train on"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.test_split and not self.eval_steps:
            raise ValueError("test_split is read at evaluations; give eval_steps")
        idle = [name for name, value in self.idle_options().items() if getattr(self, name) != value]
        if idle:
            fix = "leave it out, or leave out online" if self.online else "it needs online (--online)"
            raise ValueError(f"{', '.join(idle)} is of the other kind of DPO: {fix}")

    def idle_options(self) -> dict[str, Any]:
        """Default by name of the options of the other kind of DPO."""
        if self.online:
            return own_options(OfflineOptions, RunConfig)
        return own_options(AdvantageConfig, TrainConfig)

    def check_inputs(self, given: Collection[str] = ()) -> None:
        """Raise ValueError without pairs or, online, without reward or prompts."""
        if self.online:
            AdvantageConfig.check_inputs(self, given)
        else:
            TrainConfig.check_inputs(self, given)
            self.check_pairs(given)

    def derived(self, processes: int) -> dict[str, int]:
        """Counts that follow from the sizes.

        Online, all samples of a group lie on one process.
        """
        if not self.online:
            return PairConfig.derived(self, processes)
        if self.num_prompts % (processes * self.num_updates):
            raise ValueError(
                f"num_prompts = {self.num_prompts} groups are not divisible by processes * num_updates = "
                f"{processes * self.num_updates}"
            )
        counts = AdvantageConfig.derived(self, processes)
        return counts | {"pairs_per_update": self.num_prompts // self.num_updates}
