"""Prompts and their metadata: text files, GenEval jsonl, columns of datasets, and the tinyworld's own sets."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlg.config import check_nesting, parse_json

_TINYWORLD = "tinyworld:"
_HUB = "hub:"
_HUB_FORM = f"{_HUB}OWNER/NAME:SPLIT:COLUMN"
_SIGNS = 256  # how many signs the tinyworld's text sets hold


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a reward needs to know of it."""

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)  # GenEval format; empty for plain text prompts


def load(source: str) -> list[Prompt]:
    """Prompts of a source, in a fixed order.

    source: `tinyworld:composition/train` (or text, all; or test), a .txt file with a prompt a line, a .jsonl file with
    a `prompt` and GenEval metadata in each row, or a column of texts of a dataset, `hub:OWNER/NAME:SPLIT:COLUMN`, as
    hub:yuvalkirstain/pickapic_v1_no_images:test_unique:caption; a folder with its files may stand for OWNER/NAME.
    Raises ValueError if it is missing, empty or malformed.
    """
    if source.startswith(_HUB):
        return _dataset(source)
    if source.startswith(_TINYWORLD):
        return _tinyworld(source.removeprefix(_TINYWORLD))
    path = Path(source)
    if not path.is_file():
        raise ValueError(f"no such prompt file: {source} (or use {_TINYWORLD}composition/test or {_HUB_FORM})")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: prompts may hold other separators
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error}") from error
    numbered = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    parse = _parse_json if path.suffix in (".jsonl", ".json") else _parse_text
    prompts = [parse(line, f"{source}:{number}") for number, line in numbered]
    if not prompts:
        raise ValueError(f"{source} holds no prompts")
    return prompts


def _parse_text(line: str, place: str) -> Prompt:
    return Prompt(line)


def _parse_json(line: str, place: str) -> Prompt:
    try:
        row = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
        raise ValueError(f"{place}: a row needs a text under `prompt`")
    if any("\ud800" <= sign <= "\udfff" for sign in row["prompt"]):  # no tokenizer takes it, and no file
        raise ValueError(f"{place}: the prompt holds half a surrogate pair, which is no text")
    return Prompt(row.pop("prompt"), row)


def _dataset(source: str) -> list[Prompt]:
    """Texts of a column, in the dataset's order; the other columns are not metadata."""
    parts = source.removeprefix(_HUB).rsplit(":", 2)
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
    except Exception as error:  # datasets and the hub raise whatever they meet
        reason = f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
        message = f"cannot read the prompts {_HUB}{name}:{split}:{column} ({reason})"
        if not Path(name).is_dir():
            message += f"; `hf download --repo-type dataset {name} --local-dir DIR` where there is a network, then "
            message += f"{_HUB}DIR:{split}:{column}"
        raise ValueError(message) from error


def _tinyworld(name: str) -> list[Prompt]:
    from rlg.tinyworld import scenes

    kind, _, split = name.partition("/")
    if kind not in ("composition", "text", "all") or split not in ("train", "test"):
        raise ValueError(f"unknown prompt set {_TINYWORLD}{name}; known: composition, text or all, /train or /test")
    shapes = list(scenes.composition_prompts(split))
    signs = scenes.sign_prompts(split, _SIGNS, torch.Generator().manual_seed(0))
    return {"composition": shapes, "text": signs, "all": shapes + signs}[kind]


def spread(prompts: Sequence[Prompt], count: int | None) -> list[int]:
    """Indices of `count` prompts spread evenly over a set (None: all of them), so that every tag keeps its share."""
    if count is None or count >= len(prompts):
        return list(range(len(prompts)))
    return [i * len(prompts) // count for i in range(count)]
