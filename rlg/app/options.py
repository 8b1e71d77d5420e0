"""Options of `python -m rlg.app`."""

from __future__ import annotations

from dataclasses import dataclass

from rlg.choices import DTYPES
from rlg.cli import TUNED_HELP
from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class AppOptions:
    """Options of the page; None stands for the run's own setting.

    Raises ValueError for options that make no page.
    """

    ckpt: tuple[str, ...] = option((), TUNED_HELP + "; several blend", metavar="TUNED", repeat=True)
    base: str | None = option(None, "base model (default: the one that the adapter was trained on)")
    reward: tuple[str, ...] = option((), "rewards to show below each image (see python -m rewards)")
    prompts: str | None = option(
        None, "prompt set of the examples, and of metadata for rewards (default: the run's tinyworld set)"
    )
    prompt_column: str | None = option(None, "of a prompt file with columns (default: prompt)")
    max_w: float = option(4.0, "end of the slider")
    max_steps: int = option(50, "most denoising steps that the page lets one choose")
    level: float | None = option(None, "noise level of a stochastic sampler (default: the run's own)")
    resolution: int | None = option(None, "side of the images in pixels (default: the run's own)")
    dtype: str | None = option(None, "default: the run's own", choices=DTYPES)
    device: str | None = option(None, "default: cuda if there is one, else cpu")
    host: str = option("127.0.0.1", "address to listen on; beyond loopback, others get in, without password")
    port: int = option(7860, "of the address")

    def __post_init__(self) -> None:
        if not self.ckpt:
            raise ValueError(f"--ckpt is needed (or --tuned): {TUNED_HELP}")
        if not 1 <= self.max_w <= 100 or self.max_steps < 1:
            raise ValueError(
                f"--max_w ({self.max_w:g}) must be between 1 and 100, --max_steps ({self.max_steps}) positive"
            )


COMMAND = Command(
    "python -m rlg.app",
    AppOptions,
    "A page with a slider over w: the same noise under several w, side by side, in the browser.",
)
