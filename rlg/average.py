"""Average the adapters of a run's checkpoints into one.

    python -m rlg.average runs/NAME/checkpoint-70 runs/NAME/checkpoint-80 --output runs/NAME/average

A policy gradient leaves noise in the weights. Guidance with w > 1, base + w * (tuned - base), amplifies it together
with the signal. Checkpoints share the signal and not the noise, so their mean is a cleaner direction. The mean is
exact: the mean of n updates B A of rank r is one update of rank n r, with the same alpha / rank:

    [B_1 ... B_n] / n  times the stacked A_i
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Options of `python -m rlg.average`."""

    checkpoints: tuple[str, ...] = option(help="checkpoints of one run, or PEFT folders", metavar="CKPT", place=0)
    base: str | None = option(None, "base model (default: the one that the adapters were trained on)")
    output: Path = option(help="new folder for the adapter")
    overwrite: bool = option(False, "replace the average that is there")


COMMAND = Command("python -m rlg.average", AverageOptions, "Average the adapters of a run's checkpoints into one.")
if __name__ == "__main__":
    COMMAND.answer()

import json
import shutil
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from rlg.cli import fail_cleanly
from rlg.io import atomic, manifest
from rlg.io.run_folder import AVERAGE, CONFIG
from rlg.models import adapter_files, fingerprint
from rlg.models.adapter_files import AdapterFile
from rlg.models.loading import base_of
from rlg.models.policy import Policy
from rlg.models.tuned_model import TunedModel, resolve
from rlg.publishing import model_card


def mean_update(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """LoRA matrices whose update is the mean of the parts' updates.

    They are given by PEFT's names.
    """
    stacked = {}
    for name in parts[0]:
        tensors = [part[name].float() for part in parts]
        down = ".lora_A." in name
        stacked[name] = torch.cat(tensors, dim=0) if down else torch.cat(tensors, dim=1) / len(parts)
    return stacked


def check_alike(files: Sequence[AdapterFile]) -> None:
    """Raise ValueError unless all adapters can be averaged.

    They must be PEFT adapters of one base, with matrices of the same shapes.
    """
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


def average(checkpoints: Sequence[str | Path], output: Path, base: str | None = None, overwrite: bool = False) -> None:
    """Write the mean of adapters to a new folder.

    It is a PEFT folder and a diffusers file, with the first adapter's config. The folder is written whole or not at
    all. average.json in it has the digests of the adapters and of the base. Raises ValueError if the adapters do not
    belong together. Raises ValueError also if the output exists, unless it is an average and `overwrite` is set.
    """
    if output.exists() and not (output / AVERAGE).is_file():
        raise ValueError(f"{output} exists, and is no average (no {AVERAGE}); give --output another folder")
    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists; give --overwrite, or --output another folder")
    models = [resolve(path) for path in checkpoints]
    files = [model.adapter for model in tqdm(models, desc="read", unit="adapter", disable=None)]
    check_alike(files)
    bases = {path: fingerprint.base_of(path) for path in checkpoints}
    if len(known := {digest for digest in bases.values() if digest}) > 1:
        raise ValueError(f"{', '.join(map(str, bases))} were trained on {len(known)} different bases of one name")
    config, count = files[0].config, len(files)
    policy = Policy.load(base_of(models[0], base))
    policy.add_lora(count * config.r, count * config.lora_alpha, sorted(config.target_modules))
    for name, tensor in mean_update([file.tensors for file in files]).items():
        parameter = policy.network.get_parameter(name.replace(".weight", f".{adapter_files.NAME}.weight"))
        parameter.data.copy_(tensor)
    output.parent.mkdir(parents=True, exist_ok=True)
    place = atomic.temporary_of(output)
    atomic.discard(place)
    try:
        _write(policy, models, place, output.name)
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    atomic.publish(output)


def _write(policy: Policy, models: Sequence[TunedModel], folder: Path, name: str) -> None:
    policy.save_adapter(folder)
    settings = Path(models[0].path) / CONFIG
    if settings.is_file():  # evaluations take their defaults from the run's config
        shutil.copy(settings, folder / CONFIG)
    tuned = {f"adapter {number}": model.digest for number, model in enumerate(models, 1)}
    atomic.write_text(folder / AVERAGE, json.dumps(fingerprint.record(tuned, policy.base, {}), indent=1) + "\n")
    model_card.write(folder, name)
    manifest.seal(folder)


def run(options: AverageOptions) -> None:
    """Average the adapters, and print the output folder."""
    average(options.checkpoints, options.output, options.base, options.overwrite)
    print(options.output)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(COMMAND.parse(argv))


if __name__ == "__main__":
    main()
