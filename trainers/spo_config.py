"""Options of SPO; see `trainers.spo`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rlg.choices import cfg_rows
from trainers.core.config import AdvantageConfig, SamplingConfig, own_options, require_choice, require_positive


@dataclass(kw_only=True)
class SPOConfig(SamplingConfig):
    """Options of SPO.

    The defaults are those of the official run on Stable Diffusion 1.5 (4 GPUs).
    """

    MIN_GENERATIONS = 1
    # SPO has no advantages, so these options have no effect
    RETIRED: ClassVar[Mapping[str, Any]] = own_options(AdvantageConfig, SamplingConfig)

    reward: list[str] = field(
        default_factory=list, metadata={"help": "rewards that judge candidates, if preference_model does not"}
    )
    preference_model: str | None = field(
        default=None, metadata={"help": "step-aware model that judges candidates: a folder, or .safetensors"}
    )
    num_prompts: int = field(default=40, metadata={"help": "prompts an iteration, over all processes"})
    num_generations: int = field(default=1, metadata={"help": "chains a prompt"})
    batch_size: int = field(default=10, metadata={"help": "chains, or pairs, a batch"})
    steps: int = field(default=20, metadata={"help": "denoising steps of a sample"})
    kernel: str = field(default="sde", metadata={"help": "sde (flow SDE, or DDIM) or cps"})
    level: float = field(default=1.0, metadata={"help": "of the kernel; eta for DDIM"})
    cfg: float = field(default=5.0, metadata={"help": "classifier-free guidance of a sample"})
    train_cfg: float | None = field(
        default=None, metadata={"help": "guidance of policy and reference in the loss (default: cfg)"}
    )
    divert_start_step: int = field(default=4, metadata={"help": "first step with candidates"})
    divert_end_step: int | None = field(default=None, metadata={"help": "steps from here on have none (default: all)"})
    compare_every: int = field(default=1, metadata={"help": "steps that candidates go before they are compared"})
    num_candidates: int = field(default=4, metadata={"help": "candidates drawn from one x"})
    threshold: float = field(default=0.3, metadata={"help": "least difference of the softmax of the two scores"})
    score_scale: float = field(default=1.0, metadata={"help": "scores are multiplied by this before the softmax"})
    pairs_per_update: int | None = field(
        default=40, metadata={"help": "pairs an optimizer step, over all processes (none: those of an iteration)"}
    )
    beta: float = field(default=10.0, metadata={"help": "strength of the preference"})
    epsilon: float = field(default=0.1, metadata={"help": "clip range of the ratios"})
    learning_rate: float = field(default=6e-5, metadata={"help": "of AdamW"})
    lora_rank: int = field(default=4, metadata={"help": "rank of the LoRA, whose weights are always float32"})
    lora_alpha: int = field(default=4, metadata={"help": "LoRA alpha"})
    ema_decay: float = field(default=0.0, metadata={"help": "moving average of the LoRA; 0 turns it off"})

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "kernel", ("sde", "cps"))
        require_positive(self, "level", "compare_every", "score_scale", "pairs_per_update", "beta")
        if self.num_candidates < 2:
            raise ValueError(f"a pair needs at least 2 candidates, got num_candidates {self.num_candidates}")
        if not 0 <= self.divert_start_step < self.last_step <= self.steps:
            raise ValueError(
                f"no step has candidates: divert_start_step {self.divert_start_step} and divert_end_step "
                f"{self.last_step} must lie in this order within the {self.steps} steps"
            )
        for name in ("threshold", "epsilon"):
            if not 0 <= getattr(self, name) < 1 or (name == "epsilon" and self.epsilon == 0):
                raise ValueError(f"{name} must lie between 0 and 1, got {getattr(self, name)}")
        if self.num_updates != 1:
            raise ValueError(f"SPO counts updates by pairs: give pairs_per_update, not num_updates {self.num_updates}")

    def check_inputs(self, given: Collection[str] = ()) -> None:
        """Raise ValueError without a scorer, or without prompts."""
        if not self.reward and not self.preference_model:
            raise ValueError("nothing judges the candidates: give reward, or preference_model")
        super().check_inputs({*given, "reward"})

    def trained_at_once(self) -> int:
        """Rows of the batch that the network sees with a gradient.

        Winner and loser share a row, unless they went apart. Guidance doubles the rows.
        """
        scale = self.cfg if self.train_cfg is None else self.train_cfg
        return self.batch_size * (1 if self.compare_every == 1 else 2) * cfg_rows(scale)

    @property
    def last_step(self) -> int:
        """The end of the steps that may have candidates."""
        return self.steps if self.divert_end_step is None else self.divert_end_step

    def derived(self, processes: int) -> dict[str, int]:
        """Counts of an online trainer, but with updates counted by pairs.

        These counts of pairs are upper bounds.
        """
        counts = super().derived(processes)
        del counts["images_per_update"], counts["updates_per_iteration"]
        pairs = counts["images_per_iteration"] * (self.last_step - self.divert_start_step)
        updates = -(-pairs // self.pairs_per_update) if self.pairs_per_update else 1
        return counts | {"pairs_per_iteration_at_most": pairs, "updates_per_iteration_at_most": updates}
