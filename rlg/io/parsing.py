"""Strict reading of YAML and JSON, whoever wrote the file.

The readers refuse two things that the libraries accept: a key that is given twice, and nesting beyond reason. Both
raise ValueError. A YAML alias may stand for a single value only, because nine lists of nine aliases each become
gigabytes when they are printed.
"""

from __future__ import annotations

import json
import math
import mmap
import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml

_MAX_YAML = 10**6  # bytes; PyYAML reads about 10^5 in a second
_MAX_DIGITS = 20  # a JSON integer of 64 bits has no more digits
# Strings are matched as well, because they may hold brackets that do not count.
_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{\]}]', re.DOTALL)
_TOO_DEEP = "lists and mappings are nested too deeply"
_MAX_DEPTH = 64  # levels of lists and mappings; printing and copying them is recursive


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with two more checks.

    It refuses aliases of lists and mappings, and keys that are given twice.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            if isinstance(self.anchors.get(event.anchor), yaml.CollectionNode):
                raise ValueError(f"*{event.anchor} stands for a list or a mapping; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        _once((key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping with text keys, safely loaded.

    Raises ValueError if the file is missing or malformed, or holds anything else.
    """
    if not path.is_file():
        raise ValueError(f"no such config: {path}")
    if path.stat().st_size > _MAX_YAML:
        raise ValueError(f"{path} is no config: it is over {_MAX_YAML / 1e6:g} MB")
    try:
        row = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        _check_depth(row)
    except OSError:
        raise
    except RecursionError as error:
        raise ValueError(f"{path} is not valid YAML: {_TOO_DEEP}") from error
    except Exception as error:  # PyYAML raises its own errors, and those of a tag's constructor
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} must be a mapping of options to values")
    if odd := [key for key in row if not isinstance(key, str)]:
        raise ValueError(f"{path}: the key {odd[0]!r} is no text; write it in quotes")
    return row


def parse_json(text: str | bytes, finite: bool = True) -> Any:
    """A JSON value.

    Raises ValueError for malformed JSON, a key that is given twice, nesting beyond reason and, if `finite`, for NaN
    and infinities.
    """
    number = _finite if finite else float
    checks: dict[str, Any] = {"parse_constant": number, "parse_float": number, "parse_int": _integer}
    try:
        value = json.loads(text, object_pairs_hook=_once, **checks)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    _check_depth(value)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, read by `parse_json`.

    Raises ValueError that names the file.
    """
    try:
        row = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{path} must hold an object, got {_shown(row)}")
    return row


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, (list, dict)) else []
    for _ in range(_MAX_DEPTH):
        inside = (each for row in level for each in (row.values() if isinstance(row, dict) else row))
        level = [each for each in inside if isinstance(each, (list, dict))]
    if level:
        raise ValueError(_TOO_DEEP)


def check_nesting(file: Path) -> None:
    """Raise ValueError for JSON, or JSON lines, nested beyond reason.

    Arrow's reader crashes the process on such a file.
    """
    depth = 0
    with file.open("rb") as opened:
        if not file.stat().st_size:
            return
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for match in _BRACKETS.finditer(data):
                depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(match[0], 0)
                if depth > _MAX_DEPTH:
                    raise ValueError(f"{file}: {_TOO_DEEP}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise ValueError(f"a whole number of {len(text)} digits")
    return int(text)


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, value in pairs:
        if key in row:
            raise ValueError(f"the key {_shown(key)} is given twice")
        row[key] = value
    return row


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def check_type(where: str, value: Any, kind: Any) -> None:
    """Raise ValueError unless a value has a dataclass field's type.

    A float must be finite. It may be written as a whole number.
    """
    if not _is(value, kind):
        name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind).replace("typing.", "")
        raise ValueError(f"{where} must be {name.replace('NoneType', 'None')}, got {_shown(value)}")


def _is(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_is(value, each) for each in inner)
    if origin in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_is(each, inner[0]) for each in value)
    if kind is float:
        return type(value) is int or (type(value) is float and math.isfinite(value))
    if kind in (int, bool):
        return type(value) is kind
    return kind is Any or isinstance(value, origin or kind)
