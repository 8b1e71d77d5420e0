"""Make images from a base model and a tuned one, guided with w.

    python -m rlg.sample --ckpt runs/NAME/checkpoint-N --prompt "two red circles" --scales 0 1 2 --output grid.png

A row for each prompt and image number, a column for each w, all columns from the same noise. Plain diffusers does the
sampling: `rlg.apply` wraps the pipeline's denoiser, so any pipeline and any scheduler will do. With `--correct` the
project's own sampler does, and resamples each prompt's images towards base^(1-w) tuned^w (`rlg.corrector`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from rlg import attach, attach_mode
from rlg.cli import TUNED_HELP, Parser, fail_cleanly
from rlg.eval_folder import Job, to_pil
from rlg.evaluator import CORRECTED, RLG, EvalSettings, Evaluator
from rlg.guidance_modes import FULL
from rlg.policy import DTYPES, Policy, base_of, load_pipeline
from rlg.process import KERNELS
from rlg.prompts import Prompt
from rlg.sampling import SampleId
from rlg.stats import ess


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.sample", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", "--tuned", required=True, metavar="TUNED", help=TUNED_HELP)
    add("--base", help="base model (default: the one that the adapter was trained on)")
    add("--prompt", nargs="+", required=True)
    add("--scales", type=float, nargs="+", default=[0.0, 0.5, 1.0, 1.5, 2.0], help="values of w, a column each")
    add("--k", type=int, default=4, help="images a prompt")
    add("--steps", type=int, default=20, help="denoising steps")
    add("--cfg", type=float, default=1.0, help="classifier-free guidance scale; 1 is off")
    add("--guidance_mode", default=FULL, metavar="MODE", help="a cheaper way to run it (see rlg.guidance_modes)")
    add("--correct", action="store_true", help="Feynman-Kac corrector among the --k images of a prompt")
    add("--sampler", choices=KERNELS, default="sde", help="of --correct")
    add("--level", type=float, default=1.0, help="noise level of a stochastic sampler, with --correct")
    add("--seed", type=int, default=0)
    add("--dtype", choices=sorted(DTYPES), default="float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("samples.png"))
    return parser


@torch.no_grad()
def columns(pipe: Any, guide: attach.Guide, args: argparse.Namespace) -> list[list[Image.Image]]:
    """Images by scale; each list holds the images of all prompts in order."""
    prompts = [text for text in args.prompt for _ in range(args.k)]
    ids = [SampleId(args.seed, prompt, k) for prompt in range(len(args.prompt)) for k in range(args.k)]
    result = []
    for w in tqdm(args.scales, desc="w", disable=None):
        guide.scale = w
        generators = [sample.generator("initial") for sample in ids]
        options = {"num_inference_steps": args.steps, "guidance_scale": args.cfg, "generator": generators}
        result.append(pipe(prompts, **options).images)
    return result


def corrected_columns(policy: Policy, args: argparse.Namespace) -> list[list[Image.Image]]:
    """As `columns`, by the project's own sampler with its corrector; prints each column's effective share."""
    settings = EvalSettings(
        scales=tuple(args.scales),
        modes=(CORRECTED,),
        steps=args.steps,
        sampler=args.sampler,
        level=args.level,
        cfg=args.cfg,
        resolution=None,
        k=args.k,
        seed=args.seed,
        batch_size=args.k,
    )
    evaluator = Evaluator(policy, None, [Prompt(text) for text in args.prompt], settings)
    result = []
    for w in tqdm(args.scales, desc="w", disable=None):
        column, shares = [], []
        for prompt in range(len(args.prompt)):
            jobs = [Job(prompt, k, w, CORRECTED) for k in range(args.k)]
            guided = evaluator.generate([replace(job, mode=RLG) for job in jobs])
            shares.append(ess(guided.log_weight_B.numpy()))
            column += [to_pil(pixels) for pixels in evaluator.generate(jobs).pixels_B3HW]
        tqdm.write(f"w = {w:g}: effective share of guidance without correction {sum(shares) / len(shares):.0%}")
        result.append(column)
    return result


def run(args: argparse.Namespace) -> Path:
    """Sample and save the grid; returns its path. Raises ValueError for an existing output file."""
    if args.output.exists():
        raise ValueError(f"{args.output} exists; give --output another name")
    if args.k < 1 or args.steps < 1:
        raise ValueError("--k and --steps must be at least 1")
    for w in args.scales:
        attach.check_finite(w)
    if args.correct and args.guidance_mode != FULL:
        raise ValueError(f"--correct needs full guidance; leave out --guidance_mode {args.guidance_mode}")
    attach_mode.parse(args.guidance_mode, full_network=False)
    base = base_of(args.ckpt, args.base)
    if args.correct:
        policy = Policy.load(base, args.dtype, args.device)
        policy.load_tuned(args.ckpt)
        table = corrected_columns(policy, args)
    else:
        pipe = load_pipeline(base, DTYPES[args.dtype]).to(args.device)
        pipe.set_progress_bar_config(disable=True)
        table = columns(pipe, attach.apply(pipe, args.ckpt, mode=args.guidance_mode), args)
    width, height = table[0][0].size
    sheet = Image.new("RGB", (width * len(table), height * len(table[0])))
    for x, column in enumerate(table):
        for y, image in enumerate(column):
            sheet.paste(image, (x * width, y * height))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(args.output)
    print(args.output)
    return args.output


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    with fail_cleanly():
        run(args)


if __name__ == "__main__":
    main()
