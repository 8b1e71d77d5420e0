"""Choices of command lines, as names alone, so that --help loads neither torch nor diffusers."""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
AXES = ("cfg", "kernel", "steps", "schedule", "none")  # of a grid
WORLD_MODELS = ("tiny-sd", "tiny-sd3", "tiny-sdxl")  # base models of the tinyworld
KERNELS = ("ode", "sde", "cps")
ARCHITECTURES = ("sd35-medium", "sd15", "sdxl", "sd35-medium-tiny", "sd15-tiny", "sdxl-tiny")

CONSTANT, INTERVAL, DOWN, UP = "constant", "interval", "linear_down", "linear_up"
SCHEDULES = (CONSTANT, f"{INTERVAL}:LOW:HIGH", DOWN, UP)  # of w over the steps

FULL, TUNED, REUSE, REUSE_AT, SCALED, SCALED_BUT = "full", "tuned", "reuse", "reuse_at", "scaled", "scaled_but"
CONDITIONAL, RANDOM = "conditional", "random"
BATCH = "+batch"
GUIDANCE_MODES = (
    FULL,
    TUNED,
    f"{INTERVAL}:LOW:HIGH",
    "reuse:N[:linear]",
    "reuse_at:I,J[:linear]",
    "scaled[:F]",
    "scaled_but:I,J[:carry]",
    "conditional[:equal]",
    RANDOM,
)


def cfg_rows(scale: float) -> int:
    """Rows of the network's batch that a sample takes: two under classifier-free guidance, which 1 switches off."""
    return 1 if scale == 1 else 2
