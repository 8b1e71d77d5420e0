"""Names of the choices that command lines offer.

Torch and diffusers are not imported, so that --help is fast.
"""

from __future__ import annotations

DTYPES = ("float32", "bfloat16", "float16")
AXES = ("cfg", "kernel", "steps", "schedule", "none")  # axes of a grid
WORLD_MODELS = ("tiny-sd", "tiny-sd3", "tiny-sdxl", "tiny-sd3-emoji", "tiny-sd-emoji")  # base models of the tinyworld
KERNELS = ("ode", "sde", "cps")
ARCHITECTURES = ("sd35-medium", "sd15", "sdxl", "sd35-medium-tiny", "sd15-tiny", "sdxl-tiny")

CONSTANT, INTERVAL, DOWN, UP = "constant", "interval", "linear_down", "linear_up"
SCHEDULES = (CONSTANT, f"{INTERVAL}:LOW:HIGH", DOWN, UP)  # schedules of w over the steps

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
    """Rows of the network's batch that one sample takes.

    There are two under classifier-free guidance, and one at a scale of 1, which turns it off.
    """
    return 1 if scale == 1 else 2
