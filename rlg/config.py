"""Run folders and their configuration files, as every command reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

CONFIG, METRICS = "config.yaml", "metrics.jsonl"
_FROM_RUN = {  # evaluation option: training option that it defaults to
    "prompts": "eval_prompts",
    "rewards": "reward",
    "held_out": "held_out_reward",
    "steps": "num_steps",
    "sampler": "kernel",
    "level": "noise_level",
    "cfg": "guidance_scale",
    "resolution": "resolution",
    "dtype": "dtype",
}


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, safely loaded. Raises ValueError if it is missing, malformed or no mapping."""
    try:
        row = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"no such config: {path}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} must be a mapping of options to values")
    return row


def run_settings(ckpt: Path) -> dict[str, Any]:
    """What a training run's config says of evaluation; empty for an adapter that is no checkpoint of ours."""
    file = ckpt / CONFIG
    if not file.is_file():
        return {}
    row = read_yaml(file)
    return {ours: row[theirs] for ours, theirs in _FROM_RUN.items() if row.get(theirs) is not None}
