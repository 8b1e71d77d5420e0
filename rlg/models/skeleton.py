"""A policy without weights.

Its modules are on the meta device, and are set up from config files alone.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from torch import nn

from rlg.models.loading import DTYPES, check_configs, location_of
from rlg.models.policy import Policy

_LOCAL = {"local_files_only": True}


def load(base: str, dtype: str, t5_length: int | None = None, vae_dtype: str | None = None) -> Policy:
    """Load a policy without weights and without a download.

    The arguments are those of `Policy.load`. Raises OSError where the config files are not on this machine, and
    ValueError for a folder that is no model.
    """
    location = location_of(base)
    check_configs(Path(location))
    index = DiffusionPipeline.load_config(location, **_LOCAL)
    kind = getattr(diffusers, index["_class_name"])
    known = inspect.signature(kind.__init__).parameters
    values = {name: _value(location, name, value, DTYPES[dtype]) for name, value in index.items() if name in known}
    policy = Policy(kind(**values), base, t5_length)
    if vae_dtype:
        policy.pipe.vae.to(DTYPES[vae_dtype])
    return policy


def _value(location: str, name: str, value: Any, dtype: torch.dtype) -> Any:
    """One argument of the pipeline's constructor.

    It is a part, None for a part that the pipeline does not have, or a plain setting.
    """
    if not isinstance(value, (list, tuple)):
        return value
    library, class_name = value
    return None if class_name is None else _part(location, name, _class_of(library, class_name), dtype)


def _class_of(library: str, name: str) -> Any:
    homes = {"diffusers": diffusers, "transformers": transformers}
    return getattr(homes.get(library) or getattr(diffusers.pipelines, library), name)


def _part(location: str, name: str, kind: Any, dtype: torch.dtype) -> Any:
    if not issubclass(kind, nn.Module):
        return kind.from_pretrained(location, subfolder=name, **_LOCAL)
    with torch.device("meta"):
        if issubclass(kind, diffusers.ModelMixin):
            module = kind.from_config(kind.load_config(location, subfolder=name, **_LOCAL))
        else:
            module = kind(kind.config_class.from_pretrained(location, subfolder=name, **_LOCAL))
    nn.Module.to(module, dtype)
    if dtype == torch.float16:  # the products of these T5 layers overflow in float16
        for path, inner in module.named_modules():
            if path.rpartition(".")[2] in (getattr(kind, "_keep_in_fp32_modules", None) or ()):
                inner.float()
    return module
