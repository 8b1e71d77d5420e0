"""File names in a run's folder, and the settings for its evaluations.

All other modules take the names from here.

    runs/NAME/           config.yaml metrics.jsonl samples/step-N.png checkpoint-N/ eval/ID/
    checkpoint-N/        adapter/ config.yaml state.json trainer_state/ README.md
    eval/ID/             meta.json plan.json scores.jsonl images/P-K-W.png summary.json curves.png report.html
    average.json         marks an adapter that is the mean of several
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rlg.io.parsing import check_type, read_yaml
from rlg.io.spellings import canonical_keys

CONFIG, METRICS, SAMPLES, EVALUATIONS = "config.yaml", "metrics.jsonl", "samples", "eval"
ADAPTER, STATE, TRAINER_STATE, CARD = "adapter", "state.json", "trainer_state", "README.md"
AVERAGE = "average.json"
META, ROWS, IMAGES = "meta.json", "scores.jsonl", "images"
PLAN = "plan.json"  # {"images": the final number of rows}, which `rlg.status` reads
SUMMARY, CURVES, PAGE = "summary.json", "curves.png", "report.html"
ALL_ROWS = "scores*.jsonl"  # pattern of joined rows and of the rows of single processes
UNJOINED_ROWS = "scores-*.jsonl"  # pattern of the rows of single processes alone
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
_FROM_RUN = {  # option that an evaluation takes from a training: its type
    "prompts": str,
    "prompt_column": str,
    "reward": list[str],
    "held_out_reward": list[str],
    "steps": int,
    "kernel": str,
    "level": float,
    "cfg": float,
    "resolution": int,
    "dtype": str,
    "vae_dtype": str,
    "t5_length": int,
}
_RENAMED = ("base", "batch_size", "cfg", "level", "steps", "train_cfg")  # older files have other names of these
_HELD_OUT = "eval_prompts"  # an evaluation takes these prompts, because the training never saw them


def read_config(file: Path) -> dict[str, Any]:
    """The options of a run's config.yaml, by their present names.

    Raises ValueError for a file that is damaged.
    """
    return canonical_keys(read_yaml(file), _RENAMED, str(file))


def run_settings(ckpt: Path) -> dict[str, Any]:
    """Options that an evaluation takes from a training run's config.

    The result is empty for an adapter that is no checkpoint of this project. Raises ValueError for a damaged config.
    """
    file = ckpt / CONFIG
    if not file.is_file():
        return {}
    row = read_config(file)
    row["prompts"] = row.get(_HELD_OUT)
    for name, kind in _FROM_RUN.items():
        check_type(f"{file}: {_HELD_OUT if name == 'prompts' else name}", row.get(name), kind | None)
    found = {name: row[name] for name in _FROM_RUN if row.get(name) is not None}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def is_of_run(config: Path) -> bool:
    """Tell whether a config.yaml belongs to a run or a checkpoint.

    A config that a user wrote does not.
    """
    return config.name == CONFIG and any((config.parent / name).is_file() for name in (METRICS, STATE))


def checkpoint_name(step: int | str) -> str:
    """Name of the checkpoint after so many iterations.

    "*" gives the pattern of all checkpoints.
    """
    return f"checkpoint-{step}"


def checkpoint_at(run: Path, step: int) -> Path:
    """The checkpoint of a run after so many iterations."""
    return run / checkpoint_name(step)


def step_of(checkpoint: str) -> int | None:
    """The iteration of a checkpoint, by its name.

    Returns None if this is not the name of a checkpoint.
    """
    match = _CHECKPOINT.fullmatch(checkpoint)
    return int(match[1]) if match else None


def state_file(checkpoint: Path, name: str) -> Path:
    """A file of tensors that only resuming needs."""
    return checkpoint / TRAINER_STATE / f"{name}.safetensors"


def sample_name(step: int, suffix: str) -> str:
    """Name of a file of samples after so many iterations.

    The suffix tells the grid of images from its captions.
    """
    return f"step-{step:06d}{suffix}"


def image_name(prompt_id: int, k: int, w: float) -> str:
    """Name of an evaluation's image: the k-th of a prompt, at w."""
    return f"{prompt_id}-{k}-{w:g}.png"


def rows_name(rank: int) -> str:
    """Name of the rows that one process has scored.

    They are joined at the end of an evaluation.
    """
    return f"scores-{rank}.jsonl"
