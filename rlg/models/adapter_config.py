"""Checks of a LoRA's settings, before PEFT or diffusers act on them.

Only a plain LoRA passes. Settings come with the weights, from any author. They decide how much memory is allocated
before a weight is read (the rank), and which regular expressions run over the network's names. Some change the base's
own weights (PiSSA, OLoRA, LoftQ, CorDA and LoRA-GA split them), so that guidance would lose its base.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from peft import LoraConfig
from torch import Tensor

# These may differ from PEFT's defaults. `bias` and `modules_to_save` are refused where they are read.
_PLAIN = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "r",
        "rank_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_dora",
        "use_rslora",
    }
)
_KEEPS_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva")  # values of init_lora_weights
_NAME = re.compile(r"\^?[\w.\\-]+\$?")  # a pattern without quantifiers, so that it needs no search


@lru_cache
def _defaults() -> dict[str, Any]:
    return LoraConfig().to_dict()


def check_plain(row: Mapping[str, Any]) -> None:
    """Raise ValueError for settings that a plain LoRA does not have.

    row: names and values as in adapter_config.json. PEFT drops settings that it does not know, so these pass.
    """
    defaults = _defaults()
    for name, value in row.items():
        if name in defaults and name not in _PLAIN and value and value != defaults[name]:
            raise ValueError(f"{name} is set, which a plain LoRA has not")
    if row.get("init_lora_weights", True) not in _KEEPS_THE_BASE:
        raise ValueError(f"init_lora_weights = {row['init_lora_weights']!r} changes the base's own weights")


def check_ranks(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for ranks, alphas or patterns that cannot be right.

    No rank is larger than the largest matrix, alphas are finite numbers, and a pattern matches without a search.
    """
    ranks = {"r": row.get("r", 8), **_pattern(row, "rank_pattern")}
    alphas = {"lora_alpha": row.get("lora_alpha", 8), **_pattern(row, "alpha_pattern")}
    largest = max((len(tensor) for key, tensor in tensors.items() if "lora_A" in key and tensor.ndim), default=0)
    for name, value in ranks.items():
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be a positive whole number, got {value!r}")
        if largest and value > largest:
            raise ValueError(f"size mismatch: {name} is {value}, and no matrix has a rank over {largest}")
    for name, value in alphas.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {value!r}")


def _pattern(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    patterns = row.get(name) or {}
    if not isinstance(patterns, dict) or not all(isinstance(key, str) and _NAME.fullmatch(key) for key in patterns):
        raise ValueError(f"{name} must give a value by a module's name, got {str(patterns)[:80]}")
    return patterns


def named(config: LoraConfig, tensors: Mapping[str, Tensor]) -> LoraConfig:
    """The config, with module names instead of regular expressions.

    The names are those of the weights.
    """
    if not (isinstance(config.target_modules, str) or config.exclude_modules or config.layers_pattern):
        return config
    modules = sorted({key.partition(".lora_")[0] for key in tensors})
    changes = {"target_modules": modules, **dict.fromkeys(("exclude_modules", "layers_pattern"))}
    return dataclasses.replace(config, layers_to_transform=None, **changes)
