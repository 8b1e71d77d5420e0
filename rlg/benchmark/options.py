"""Options of the benchmarks' commands."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.choices import ARCHITECTURES, BATCH, DTYPES, GUIDANCE_MODES, KERNELS
from rlg.cli import TUNED_HELP
from rlg.config_parser import Command, option

ORIGIN = "tinyworld:composition/test"  # prompts of a benchmark without a run


@dataclass(frozen=True, kw_only=True)
class RandomModelOptions:
    """Options of a model with an untrained LoRA, and of the output.

    See `rlg.benchmark.growth.policy_with_lora`.
    """

    base: str = option("tiny-sd3", "tiny-sd, tiny-sd3, tiny-sdxl, a folder or a hub id")
    arch: str | None = option(None, "instead: an architecture with random weights", choices=ARCHITECTURES)
    no_t5: bool = option(False, "an architecture without its third text encoder")
    device: str | None = option(None, "default: cuda if there is one, else cpu")
    dtype: str = option("float32", "of the weights", choices=DTYPES)
    resolution: int | None = option(None, "image side in pixels (default: the model's own)")
    lora_rank: int = option(32, "of the random LoRA")
    output: Path | None = option(None, "a .json file for the numbers")
    overwrite: bool = option(False, "replace the file that is there")


@dataclass(frozen=True, kw_only=True)
class GrowthOptions(RandomModelOptions):
    """Options of `python -m rlg.benchmark growth`."""

    reward: str = option("jpeg_compressibility", "of the images")
    prompts: str = option(ORIGIN, "prompt set")
    num_prompts: int = option(4, "of the smallest evaluation")
    growth: tuple[int, ...] = option((1, 2, 5, 10), "how many times as many prompts")
    num_w: tuple[int, ...] = option((2, 4, 8), "how many w; the first is for prompts")
    batch_size: int = option(8, "images a batch")
    steps: int = option(10, "denoising steps")
    cfg: float = option(1.0, "classifier-free guidance scale; 1 is off")
    processes: tuple[int, ...] = option((1, 2), "numbers of processes to compare", may_be_empty=True)
    repeats: int = option(3, "rounds")


@dataclass(frozen=True, kw_only=True)
class GRPOOptions(RandomModelOptions):
    """Options of `python -m rlg.benchmark grpo`."""

    reward: str = option("jpeg_compressibility", "of the images")
    prompts: str = option("tinyworld:composition/train", "prompt set")
    num_prompts: int = option(4, "prompts an iteration")
    num_generations: int = option(8, "images a prompt: the group")
    batch_sizes: tuple[int, ...] = option((8,), "images a batch")
    steps: int = option(10, "denoising steps")
    num_train_steps: int | None = option(None, "steps that are trained (default: all but the last)")
    cfg: float = option(4.5, "classifier-free guidance scale; 1 is off")
    beta: float = option(0.04, "KL coefficient")
    gradient_checkpointing: bool = option(False, "trade compute for memory")
    compile: bool = option(False, "also the trainer under torch.compile")
    repeats: int = option(5, "rounds")


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """Options of `python -m rlg.benchmark guidance`.

    None stands for the run's own setting, or else for a default.
    """

    ckpt: str | None = option(None, TUNED_HELP, metavar="TUNED")
    base: str | None = option(None, "base model (default: the one that --ckpt was trained on)")
    arch: str | None = option(
        None, "a published architecture with random weights, instead of a model", choices=ARCHITECTURES
    )
    w: float = option(2.0, "guidance weight")
    mode: tuple[str, ...] | None = option(
        None, f"of {', '.join(GUIDANCE_MODES)}; {BATCH} behind those that run both models"
    )
    budget: float | None = option(
        None, "choose the modes that keep most, and are nearest, at this cost (1: the tuned model)"
    )
    calibration_prompts: int = option(24, "prompts that the mode is chosen on, not measured on")
    prompts: str | None = option(None, f"prompt set (default: the held-out set of the run, or {ORIGIN})")
    prompt_column: str | None = option(None, "of a prompt file with columns (default: the run's own, or prompt)")
    num_prompts: int | None = option(None, "how many of them, spread evenly (default: all)")
    k: int = option(2, "images a prompt")
    reward: tuple[str, ...] | None = option(
        None, "the first is what guidance gains (default: the run's own); needs --ckpt"
    )
    steps: int | None = option(None, "denoising steps (default: those of the run, or 10)")
    kernel: str | None = option(None, "sampler (default: the run's own, or ode)", choices=KERNELS)
    level: float | None = option(None, "noise level of a stochastic sampler (default: the run's own, or 0.7)")
    cfg: float | None = option(None, "classifier-free guidance scale (default: the run's own, or 1)")
    resolution: int | None = option(None, "side of the images in pixels (default: the model's own)")
    seed: int = option(0, "decides the noise")
    batch_size: int = option(16, "images a batch")
    batch_sizes: tuple[int, ...] = option(
        (1, 2, 4, 8), "batches that exact modes are timed at, too", may_be_empty=True
    )
    compile: bool = option(False, "time full guidance under torch.compile, too (minutes more)")
    repeats: int = option(7, "rounds of those timings")
    dtype: str | None = option(None, "of the weights (default: float32)", choices=DTYPES)
    vae_dtype: str | None = option(None, "of the autoencoder (default: the run's own, or --dtype)", choices=DTYPES)
    t5_length: int | None = option(None, "tokens of a prompt that T5 is given (default: the run's own, or 256)")
    device: str | None = option(None, "default: cuda if there is one, else cpu")
    lora_rank: int = option(16, "of the random LoRA, where no --ckpt is given")
    output: Path | None = option(None, "default: runs/benchmarks/ID")
    overwrite: bool = option(False, "replace the results that are in the output folder")


GUIDANCE = Command("python -m rlg.benchmark guidance", GuidanceOptions, "What guidance costs, and what it keeps.")
GROWTH = Command(
    "python -m rlg.benchmark growth",
    GrowthOptions,
    "How the cost of an evaluation grows: with prompts, with the number of w, and with processes.",
)
GRPO = Command(
    "python -m rlg.benchmark grpo",
    GRPOOptions,
    "What a GRPO iteration costs, by phase, beside one that is written the plain way.",
)
