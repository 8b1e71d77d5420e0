"""Average the adapters of a run's checkpoints into one: a cleaner direction, which guidance with w > 1 extrapolates.

    python -m rlg.average runs/NAME/checkpoint-70 runs/NAME/checkpoint-80 --output runs/NAME/average

A policy gradient leaves noise in the weights, and guided = base + w * (tuned - base) amplifies it with everything
else; checkpoints share the signal and not the noise. The mean is exact: the mean of n updates B A of rank r is one
update of rank n r, [B_1 ... B_n] / n times the stacked A_i, with the same alpha / rank.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from rlg import adapters, model_card
from rlg.adapters import AdapterFile
from rlg.cli import Parser, fail_cleanly
from rlg.config import CONFIG
from rlg.policy import Policy, base_of


def mean_update(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """LoRA matrices, by PEFT's names, whose update is the mean of the parts' updates."""
    stacked = {}
    for name in parts[0]:
        tensors = [part[name].float() for part in parts]
        down = ".lora_A." in name
        stacked[name] = torch.cat(tensors, dim=0) if down else torch.cat(tensors, dim=1) / len(parts)
    return stacked


def check_alike(files: Sequence[AdapterFile]) -> None:
    """Raise ValueError unless all are PEFT adapters of one base with matrices of one shape."""
    first = files[0]
    for file in files:
        if file.config is None:
            raise ValueError(f"{file.path} is no PEFT adapter; average checkpoints, or their adapter folders")
        if file.base != first.base:
            raise ValueError(f"{file.path} was trained on {file.base}, and {first.path} on {first.base}")
        shapes = [{name: tuple(t.shape) for name, t in f.tensors.items()} for f in (first, file)]
        scales = [(f.config.r, f.config.lora_alpha, f.config.use_rslora) for f in (first, file)]
        if shapes[0] != shapes[1] or scales[0] != scales[1]:
            raise ValueError(f"{file.path} has another rank, alpha or set of layers than {first.path}")
        if file.config.rank_pattern or file.config.alpha_pattern or file.config.use_rslora or file.config.use_dora:
            raise ValueError(f"{file.path} is no plain LoRA of one rank and one alpha")


def average(checkpoints: Sequence[str | Path], output: Path, base: str | None = None) -> None:
    """Write the mean of adapters to a new folder, as a PEFT folder and a diffusers file, with the first one's config.

    Raises ValueError if the output is there already, or the adapters do not belong together.
    """
    if output.exists():
        raise ValueError(f"{output} exists; give --output another folder")
    files = [adapters.read(path) for path in tqdm(checkpoints, desc="read", unit="adapter", disable=None)]
    check_alike(files)
    config, count = files[0].config, len(files)
    policy = Policy.load(base_of(checkpoints[0], base))
    policy.add_lora(count * config.r, count * config.lora_alpha, sorted(config.target_modules))
    for name, tensor in mean_update([file.tensors for file in files]).items():
        parameter = policy.network.get_parameter(name.replace(".weight", f".{adapters.NAME}.weight"))
        parameter.data.copy_(tensor)
    policy.save_adapter(output)
    settings = Path(checkpoints[0]) / CONFIG
    if settings.is_file():  # what the run was sampled with, which evaluation takes as its defaults
        shutil.copy(settings, output / CONFIG)
    model_card.write(output)


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.average", description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT", help="checkpoints of one run, or PEFT folders")
    parser.add_argument("--base", help="base model (default: the one that the adapters were trained on)")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the adapter")
    return parser


def run(args: argparse.Namespace) -> None:
    """Average, and say where."""
    average(args.checkpoints, args.output, args.base)
    print(args.output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(build_parser().parse_args(argv))


if __name__ == "__main__":
    main()
