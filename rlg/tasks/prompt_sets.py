"""Loading of prompts with their metadata.

Sources are files, columns of datasets, and the tinyworld's own sets.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlg.io.parsing import check_nesting
from rlg.prompts import Prompt
from rlg.tasks import prompt_files

_TINYWORLD = "tinyworld:"
HUB = "hub:"
ELSEWHERE = (HUB, _TINYWORLD)  # prefixes of prompt sets that are no files
_HUB_FORM = f"{HUB}OWNER/NAME:SPLIT:COLUMN"
_SIGNS = 256  # prompts in each of the tinyworld's text sets


def load(source: str, column: str | None = None) -> list[Prompt]:
    """Prompts of a source, in a fixed order.

    source is one of these:

        tinyworld:KIND/SPLIT           KIND: composition, text, all or emoji; SPLIT: train or test
        hub:OWNER/NAME:SPLIT:COLUMN    texts of a dataset: hub:yuvalkirstain/pickapic_v1_no_images:test_unique:caption
        FILE.txt                       one prompt a line
        FILE                           .csv, .tsv, .json, .jsonl or .parquet, with the prompt under `column`

    A folder with a dataset's files may stand for OWNER/NAME. The default of `column` is "prompt"; the other columns
    become metadata, as in GenEval's file (`rlg.tasks.prompt_files`). Raises ValueError if the source is missing, empty
    or malformed.
    """
    if source.startswith(HUB):
        return _dataset(source)
    if source.startswith(_TINYWORLD):
        return _tinyworld(source.removeprefix(_TINYWORLD))
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no such prompt file: {source} (or use {_TINYWORLD}composition/test or {_HUB_FORM})")
    prompts = [Prompt(text, metadata) for text, metadata in prompt_files.read(path, column)]
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    return prompts


def load_each(sources: Sequence[str | None], column: str | None) -> list[list[Prompt]]:
    """Prompts of each source; a source that is None has none.

    column: the column of prompts, for sources that are files with columns. Raises ValueError as `load` does, and for a
    column where no source has any.
    """
    asked = [source for source in sources if source]
    if column is not None and not asked:
        raise ValueError(f"--prompt_column {column} does nothing without a file of prompts (--prompts)")
    if column is not None and not any(map(prompt_files.has_columns, asked)):
        raise ValueError(f"--prompt_column {column} does nothing: there are no columns in {' and '.join(asked)}")
    return [load(source, column) if source else [] for source in sources]


def _dataset(source: str) -> list[Prompt]:
    """Texts of a column, in the dataset's order.

    The other columns are not used as metadata.
    """
    parts = source.removeprefix(HUB).rsplit(":", 2)
    if len(parts) != 3 or not all(parts):
        raise ValueError(f"a prompt set of the hub is named {_HUB_FORM}, got {source!r}")
    name, split, column = parts
    rows = _rows(name, split, column)
    if column not in rows.column_names:
        raise ValueError(f"{source}: no column {column!r}; it has {', '.join(rows.column_names)}")
    texts = rows[column]
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{source}: row {index} holds no text but {textwrap.shorten(repr(text), 80)}")
    prompts = [Prompt(text.strip()) for text in texts if text.strip()]
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    return prompts


def _rows(name: str, split: str, column: str) -> Any:
    import datasets

    try:
        for file in Path(name).rglob("*.json*") if Path(name).is_dir() else ():
            check_nesting(file)
        return datasets.load_dataset(name, split=split)
    except Exception as error:  # `datasets` and the hub do not say what they raise
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        message = f"cannot read the prompts {HUB}{name}:{split}:{column} ({reason})"
        if not Path(name).is_dir():
            message += f"; `hf download --repo-type dataset {name} --local-dir DIR` where there is a network, then "
            message += f"{HUB}DIR:{split}:{column}"
        raise ValueError(message) from error


def _tinyworld(name: str) -> list[Prompt]:
    from rlg.tinyworld import emoji, scenes

    kind, _, split = name.partition("/")
    if kind not in ("composition", "text", "all", "emoji") or split not in ("train", "test"):
        known = "composition, text or all of the shapes, or emoji, each with /train or /test"
        raise ValueError(f"unknown prompt set {_TINYWORLD}{name}; known: {known}")
    if kind == "emoji":
        return list(emoji.composition_prompts(split))
    shapes = list(scenes.composition_prompts(split))
    signs = scenes.sign_prompts(split, _SIGNS, torch.Generator().manual_seed(0))
    return {"composition": shapes, "text": signs, "all": shapes + signs}[kind]
