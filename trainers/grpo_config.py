"""Options of GRPO; see `trainers.grpo`."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlg.choices import cfg_rows
from trainers.core.config import AdvantageConfig, require_choice, require_positive

KL_CONVENTIONS = ("gaussian", "flow_grpo")
RATIOS = ("ppo", "guard")


@dataclass(kw_only=True)
class GRPOConfig(AdvantageConfig):
    """Options of GRPO; the defaults are Flow-GRPO's."""

    num_iterations: int = field(default=1, metadata={"help": "passes over an iteration's images (inner epochs)"})
    kernel: str = field(default="sde", metadata={"help": "sde (flow SDE, or DDIM) or cps"})
    level: float = field(default=0.7, metadata={"help": "of the kernel; eta for DDIM"})
    window_size: int = field(default=0, metadata={"help": "stochastic steps, in one random window; 0: all steps"})
    window_start: int = field(default=0, metadata={"help": "windows do not begin before this step"})
    window_end: int | None = field(default=None, metadata={"help": "windows lie before this step (default: half)"})
    num_train_steps: int | None = field(
        default=None, metadata={"help": "random stochastic steps trained (default: all)"}
    )
    skip_last_step: bool = field(default=True, metadata={"help": "never train on the last step (Flow-GRPO's 0.99)"})
    epsilon: float = field(default=1e-4, metadata={"help": "clip range of the ratio"})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient"})
    kl_convention: str = field(default="gaussian", metadata={"help": "gaussian (true KL) or flow_grpo (without dt)"})
    detach_unconditional: bool = field(
        default=False, metadata={"help": "no gradient through the unconditional branch (Flow-GRPO since July 2025)"}
    )
    ratio: str = field(default="ppo", metadata={"help": "ppo, or guard (GRPO-Guard's normalised ratio)"})
    update_batch_size: int | None = field(
        default=None,
        metadata={"help": "samples times steps in a pass of the update: part of a batch, or several steps of it"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "kernel", ("sde", "cps"))
        require_choice(self, "kl_convention", KL_CONVENTIONS)
        require_choice(self, "ratio", RATIOS)
        require_positive(self, "num_iterations", "level", "num_train_steps", "window_end", "epsilon")
        require_positive(self, "update_batch_size")
        self._check_update_batch_size()
        for name in ("beta", "window_size", "window_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.detach_unconditional and self.cfg == 1:
            raise ValueError("detach_unconditional does nothing at cfg 1, which has no unconditional branch")
        end = self.window_start + self.window_size
        if self.window_size and not end <= self.last_window_step <= self.trained_steps:
            raise ValueError(
                f"a window of {self.window_size} steps from {self.window_start} on must end by window_end = "
                f"{self.last_window_step}, and that by the last step that is trained, {self.trained_steps} of "
                f"{self.steps}"
            )

    def _check_update_batch_size(self) -> None:
        size, batch = self.update_batch_size or self.batch_size, self.batch_size
        if size % batch and batch % size:
            raise ValueError(f"update_batch_size = {size} must divide batch_size = {batch}, or be its multiple")

    @property
    def last_window_step(self) -> int:
        """The end of the range in which windows lie.

        By default they lie in the first half, as in Flow-GRPO-Fast.
        """
        return self.window_end or self.steps // 2

    @property
    def trained_steps(self) -> int:
        """The end of the steps that may be trained."""
        return self.steps - self.skip_last_step

    def trained_at_once(self) -> int:
        """Rows of the batch of one pass, which guidance doubles."""
        return (self.update_batch_size or self.batch_size) * cfg_rows(self.cfg)

    def derived(self, processes: int) -> dict[str, int]:
        """Counts of an online trainer, with the inner epochs among the updates."""
        counts = super().derived(processes)
        return counts | {"updates_per_iteration": self.num_updates * self.num_iterations}
