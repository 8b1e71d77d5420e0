"""Make images from base and tuned model, guided with w.

    python -m rlg.sample --ckpt runs/NAME/checkpoint-N --prompt "two red circles" --w 0 1 2 --output grid.png

The image has a row for each prompt and image number, and a column for each w. All columns have the same noise. Plain
diffusers samples: `rlg.apply` wraps the pipeline's denoiser, so that any pipeline and any scheduler work. With
`--correct`, the project's own sampler resamples each prompt's images towards base^(1-w) tuned^w
(`rlg.guidance.corrector`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.choices import DTYPES, FULL, KERNELS
from rlg.cli import TUNED_HELP
from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Options of `python -m rlg.sample`."""

    ckpt: str = option(help=TUNED_HELP, metavar="TUNED")
    base: str | None = option(None, "base model (default: the one that the adapter was trained on)")
    prompt: tuple[str, ...] = option(help="texts, a group of rows each")
    w: tuple[float, ...] = option((0.0, 0.5, 1.0, 1.5, 2.0), "values of w, a column each")
    k: int = option(4, "images a prompt")
    steps: int = option(20, "denoising steps")
    cfg: float = option(1.0, "classifier-free guidance scale; 1 is off")
    mode: str = option(FULL, "a cheaper way to run guidance (see rlg.guidance.modes)")
    correct: bool = option(False, "Feynman-Kac corrector among the --k images of a prompt")
    kernel: str = option("sde", "sampler of --correct", choices=KERNELS)
    level: float = option(1.0, "noise level of a stochastic sampler, with --correct")
    seed: int = option(0, "decides the noise")
    dtype: str = option("float32", "of the weights", choices=DTYPES)
    device: str | None = option(None, "default: cuda if there is one, else cpu")
    output: Path = option(Path("samples.png"), "an image; its suffix says of what kind")
    overwrite: bool = option(False, "replace the image that is there")


COMMAND = Command("python -m rlg.sample", SampleOptions, __doc__)
if __name__ == "__main__":
    COMMAND.answer()

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from rlg.cli import check_new, fail_cleanly
from rlg.diffusion.sampling import SampleId
from rlg.evaluation.evaluator import EvalSettings, Evaluator
from rlg.evaluation.folder import Job
from rlg.evaluation.methods import CORRECTED, RLG
from rlg.guidance.guided import check_finite
from rlg.integrations import diffusers, diffusers_modes
from rlg.io.pixels import to_pil
from rlg.models.backbones import pipeline_cfg
from rlg.models.loading import DTYPES as TORCH_DTYPES
from rlg.models.loading import base_of, device_of, load_pipeline
from rlg.models.policy import Policy
from rlg.models.tuned_model import resolve
from rlg.prompts import Prompt
from rlg.stats import ess, normalised
from rlg.tinyworld import worlds

_KINDS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP")  # image formats of --output


@torch.no_grad()
def columns(pipe: Any, guide: diffusers.Guide, options: SampleOptions) -> list[list[Image.Image]]:
    """Images by w, in a list for each w.

    Each list holds the images of all prompts in order.
    """
    prompts = [text for text in options.prompt for _ in range(options.k)]
    ids = [SampleId(options.seed, prompt, k) for prompt in range(len(options.prompt)) for k in range(options.k)]
    result = []
    for w in tqdm(options.w, desc="w", disable=None):
        guide.scale = w
        generators = [sample.generator("initial") for sample in ids]
        call = {"num_inference_steps": options.steps, "generator": generators}
        result.append(pipe(prompts, **call, **pipeline_cfg(pipe, options.cfg)).images)
    return result


def corrected_columns(policy: Policy, options: SampleOptions) -> list[list[Image.Image]]:
    """Images by w, made by the project's own sampler with its corrector.

    It prints the effective share of each column's images.
    """
    settings = EvalSettings(
        scales=tuple(options.w),
        methods=(CORRECTED,),
        steps=options.steps,
        sampler=options.kernel,
        level=options.level,
        cfg=options.cfg,
        resolution=None,
        k=options.k,
        seed=options.seed,
        batch_size=options.k,
    )
    evaluator = Evaluator(policy, None, [Prompt(text) for text in options.prompt], settings)
    result = []
    for w in tqdm(options.w, desc="w", disable=None):
        column, weights = [], []
        for prompt in range(len(options.prompt)):
            jobs = [Job(prompt, k, w, CORRECTED) for k in range(options.k)]
            guided = evaluator.generate([replace(job, method=RLG) for job in jobs])
            weights.append(guided.log_weight_B.numpy())
            column += [to_pil(pixels) for pixels in evaluator.generate(jobs).pixels_B3HW]
        tqdm.write(f"w = {w:g}: {_shares(weights, options)}")
        result.append(column)
    return result


def check_output(file: Path, overwrite: bool) -> None:
    """Raise ValueError for an output that cannot be written.

    The image exists already, or its name has no known suffix.
    """
    check_new(file, overwrite)
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in _KINDS}
    if file.suffix.lower() not in suffixes:
        raise ValueError(f"--output {file}: the name ends in none of {', '.join(sorted(suffixes))}")


def _shares(weights: Sequence[np.ndarray], options: SampleOptions) -> str:
    """The effective share of guidance without correction, as text.

    weights: the log-weights of each prompt's images.
    """
    share = float(np.mean([ess(log_K) for log_K in weights]))
    heaviest = float(np.mean([normalised(log_K).max() for log_K in weights]))
    text = f"without correction {options.k} images a prompt show an effective share of {share:.0%} (never under "
    text += f"1/{options.k}), the heaviest {heaviest:.0%} of the weight; {options.steps} steps"
    return text + ("; heuristic under CFG" if options.cfg != 1 else "")


def run(options: SampleOptions) -> Path:
    """Sample and save the grid.

    Returns its path. Raises ValueError for an existing output file.
    """
    check_output(options.output, options.overwrite)
    if options.k < 1 or options.steps < 1:
        raise ValueError("--k and --steps must be at least 1")
    for w in options.w:
        check_finite(w)
    if options.correct and options.mode != FULL:
        raise ValueError(f"--correct needs full guidance; leave out --mode {options.mode}")
    diffusers_modes.parse(options.mode, full_network=False)
    tuned = resolve(options.ckpt)
    base, device = base_of(tuned, options.base), device_of(options.device)
    if options.correct:
        policy = Policy.load(base, options.dtype, device)
        worlds.check_words(policy.pipe.tokenizer.get_vocab(), options.prompt)
        policy.load_tuned(tuned)
        table = corrected_columns(policy, options)
    else:
        pipe = load_pipeline(base, TORCH_DTYPES[options.dtype]).to(device)
        worlds.check_words(pipe.tokenizer.get_vocab(), options.prompt)
        pipe.set_progress_bar_config(disable=True)
        table = columns(pipe, diffusers.apply(pipe, tuned, mode=options.mode), options)
    width, height = table[0][0].size
    sheet = Image.new("RGB", (width * len(table), height * len(table[0])))
    for x, column in enumerate(table):
        for y, image in enumerate(column):
            sheet.paste(image, (x * width, y * height))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(options.output)
    print(options.output)
    return options.output


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(COMMAND.parse(argv))


if __name__ == "__main__":
    main()
