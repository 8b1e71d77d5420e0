"""Loading of base pipelines, from a folder or the hub.

This module also finds the base that a tuned model belongs to.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from rlg import choices
from rlg.io.parsing import read_json
from rlg.models.backbones import backbone_of
from rlg.models.tuned_model import TunedModel, resolve

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in choices.DTYPES}
_MOST_LAYERS, _LARGEST_SIZE = 1000, 2**20  # limits of a network; text encoders have vocabularies of up to 2^18


def device_of(asked: str | None) -> str:
    """The given device, or CUDA's if there is one, or the CPU."""
    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def warn_if_emulated(dtype: str, device: str | torch.device) -> None:
    """Warn of bfloat16 on a CPU that has no instructions for it."""
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu and dtype == "bfloat16" and not _cpu_has_bfloat16():
        warnings.warn("this CPU only emulates bfloat16, many times slower: give --dtype float32", stacklevel=3)


def _cpu_has_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def base_of(tuned: str | Path | TunedModel, base: str | None) -> str:
    """The base model to use: the given one, or the adapter's own.

    Raises ValueError if there is neither, if the tuned model is missing, or if it is a damaged adapter.
    """
    model = resolve(tuned)
    named = model.base  # read in any case, so that a damaged adapter is refused before the base is loaded
    base = base or named
    if not base:
        raise ValueError(f"{model.path} does not say what it was trained on; give --base")
    return base


def load_pipeline(base: str, dtype: torch.dtype) -> DiffusionPipeline:
    """Load a diffusers pipeline of any class, from safetensors only.

    base: a folder, a hub id or a tinyworld name. Raises ValueError if it is missing, incomplete, damaged or pickled.
    """
    with _loading(base):
        location = location_of(base)
        check_configs(Path(location))
        return DiffusionPipeline.from_pretrained(location, dtype=dtype, use_safetensors=True)


def check_configs(folder: Path) -> None:
    """Raise ValueError for configs that ask for an impossibly large model.

    folder: a local one. The check comes before the model is set up.
    """
    for pattern in ("model_index.json", "*/config.json", "*/scheduler_config.json"):
        for file in sorted(folder.glob(pattern)):
            waiting = list(read_json(file).items())
            while waiting:
                key, value = waiting.pop()
                if isinstance(value, (dict, list)):
                    if len(value) > _MOST_LAYERS and isinstance(value, list):
                        raise ValueError(f"{file}: {key} has {len(value)} entries")
                    waiting += value.items() if isinstance(value, dict) else [(key, each) for each in value]
                elif type(value) is int and value > (_MOST_LAYERS if "layer" in key else _LARGEST_SIZE):
                    raise ValueError(f"{file}: {key} is {value}")


def check_family(base: str) -> None:
    """Refuse a folder of an unknown family before gigabytes are read."""
    with _loading(base):
        location = location_of(base)
        name = DiffusionPipeline.load_config(location)["_class_name"] if Path(location).is_dir() else None
    if name is not None:
        backbone_of(name)


def location_of(base: str) -> str:
    """Folder or hub id of a base model.

    Raises ValueError for a name that is neither.
    """
    from rlg import tinyworld

    if base in tinyworld.NAMES:
        return str(tinyworld.path(base))
    if not Path(base).is_dir() and (base.count("/") != 1 or base.startswith(("/", ".", "~"))):
        raise ValueError(f"it is no folder, no hub id (NAME/MODEL) and none of {', '.join(tinyworld.NAMES)}")
    return base


@contextmanager
def _loading(base: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # diffusers and the hub do not say what they raise
        reason = textwrap.shorten(str(error), 240)
        raise ValueError(f"cannot load the base model {base!r}: {reason}") from error
