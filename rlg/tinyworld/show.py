"""Look at a tinyworld base model: a grid of images, and its composition accuracy on prompts that it never saw.

python -m rlg.tinyworld.show --model tiny-sd3 --output tiny-sd3.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from rlg import sampling, stats
from rlg.cli import Parser, fail_cleanly
from rlg.guidance import with_cfg
from rlg.policy import Policy
from rlg.prompts import Prompt, spread
from rlg.sampling import SampleId, SampleNoise
from rlg.tinyworld import NAMES, scenes

_COLUMNS, _ROWS = 12, 5


def generate(policy: Policy, prompts: Sequence[Prompt], args: argparse.Namespace) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] of the base model, by the ODE, `args.batch` at a time."""
    schedule = policy.schedule(args.steps, "ode", 0.0)
    predict = with_cfg(policy.reference, policy.encode([""]), args.cfg)
    parts = []
    for start in tqdm(range(0, len(prompts), args.batch), desc="images", disable=None):
        batch = prompts[start : start + args.batch]
        ids = [SampleId(args.seed, start + i, 0) for i in range(len(batch))]
        noise = SampleNoise(ids, policy.latent_shape(), policy.device)
        latents = sampling.sample(predict, schedule, policy.encode([p.text for p in batch]), noise)
        parts.append(policy.decode(latents).cpu())
    return torch.cat(parts)


def sheet(images_B3HW: Tensor, columns: int) -> Image.Image:
    """Images in a table, row by row, with a thin gap."""
    padded = torch.nn.functional.pad(images_B3HW, (1, 1, 1, 1), value=0.8)
    count, _, height, width = padded.shape
    table = padded.reshape(count // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    pixels = table.reshape(count // columns * height, columns * width, 3)
    return Image.fromarray((pixels * 255).round().byte().numpy())


def run(args: argparse.Namespace) -> None:
    """Print accuracies with 95% intervals and save the grid."""
    import rewards

    policy = Policy.load(args.model, device=args.device)
    prompts = [p for p in scenes.composition_prompts("test") for _ in range(args.k)]
    images = generate(policy, prompts, args)
    score = rewards.build(["composition_strict"])
    strict_B = score(images, [p.text for p in prompts], [p.metadata for p in prompts]).total_B.numpy()
    groups = [p.text for p in prompts]
    total = stats.bootstrap_mean(strict_B, groups)
    print(
        f"{args.model}, CFG {args.cfg:g}, {args.steps} ODE steps, {len(prompts)} images of {len(set(groups))} prompts"
    )
    print(f"composition (strict): {total.mean:.1%}  [{total.low:.1%}, {total.high:.1%}]")
    for tag in scenes.COMPOSITION_TAGS:
        rows = [i for i, p in enumerate(prompts) if p.metadata["tag"] == tag]
        print(f"  {tag:14s} {strict_B[rows].mean():6.1%}  ({len(rows)} images)")
    if args.output:
        signs = scenes.sign_prompts("test", _COLUMNS, torch.Generator().manual_seed(args.seed))
        shown = [images[i] for i in spread(prompts, _COLUMNS * (_ROWS - 1))]
        shown += list(generate(policy, signs, args))
        sheet(torch.stack(shown), _COLUMNS).save(args.output)
        print(args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(prog="python -m rlg.tinyworld.show", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", default="tiny-sd3", help=f"{', '.join(NAMES)}, or a folder that the pretraining wrote")
    add("--cfg", type=float, default=1.0, help="classifier-free guidance scale; 1 is off")
    add("--steps", type=int, default=20)
    add("--k", type=int, default=4, help="images a prompt")
    add("--seed", type=int, default=0)
    add("--batch", type=int, default=96)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, help="save a grid of composition prompts and, in the last row, signs")
    args = parser.parse_args(argv)
    with fail_cleanly():
        run(args)


if __name__ == "__main__":
    main()
