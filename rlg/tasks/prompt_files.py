"""Readers for files of prompts.

They take text, tables (csv, tsv, parquet) and JSON, and give rows of columns.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlg.io.parsing import parse_json

PROMPT = "prompt"  # the default column
Row = tuple[str, dict[str, Any]]  # its place for messages, and its values by column


def read(path: Path, column: str | None = None) -> list[tuple[str, dict[str, Any]]]:
    """Each row of a file as `(prompt, metadata)`.

    The prompt is the text under `column` (default: prompt); the metadata is the other columns. A .txt file, or one
    without a suffix, has one prompt a line and no metadata. Blank lines are skipped. A missing value (null) is left
    out of the metadata, and so is a binary column of a parquet file, such as an image. The cells of a .csv or .tsv
    file are texts. Raises ValueError for an unknown suffix. For malformed content, the message names the line or row.
    """
    rows_of = _READERS.get(path.suffix.lower())
    if rows_of is None:
        raise ValueError(f"{path}: prompts are read from {', '.join(filter(None, _READERS))} files; rename or convert")
    name = PROMPT if column is None or rows_of is _lines else column
    return [_split(row, name, place) for place, row in rows_of(path)]


def has_columns(source: str) -> bool:
    """Tell whether a prompt set is a file with columns."""
    return _READERS.get(Path(source).suffix.lower(), _lines) is not _lines


def _split(row: dict[str, Any], column: str, place: str) -> tuple[str, dict[str, Any]]:
    text = row.get(column)
    if not isinstance(text, str):
        names = ", ".join(map(str, row)) or "nothing"
        raise ValueError(f"{place}: a row needs a text under `{column}`; it has {names} (--prompt_column chooses)")
    if any("\ud800" <= sign <= "\udfff" for sign in text):  # no tokenizer and no file accepts such a text
        raise ValueError(f"{place}: the prompt holds half a surrogate pair, which is no text")
    return text, {name: value for name, value in row.items() if name != column}


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error


def _numbered(path: Path) -> Iterator[tuple[str, str]]:
    # `splitlines` would also cut at other marks, which prompts may hold.
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line.strip()


def _lines(path: Path) -> Iterator[Row]:
    for place, line in _numbered(path):
        yield place, {PROMPT: line}


def _json_lines(path: Path) -> Iterator[Row]:
    for place, line in _numbered(path):
        yield place, _object(_parsed(line, place), place)


def _json(path: Path) -> Iterator[Row]:
    """Objects from a list, or from one object a line."""
    if not _text(path).lstrip().startswith("["):
        yield from _json_lines(path)
        return
    for number, row in enumerate(_parsed(_text(path), str(path)), start=1):
        yield f"{path}: row {number}", _object(row, f"{path}: row {number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{place}: not JSON: {error}") from error


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place}: a row needs a text under `{PROMPT}`, and is no object")
    return value


def _table(delimiter: str) -> Callable[[Path], Iterator[Row]]:
    def rows(path: Path) -> Iterator[Row]:
        reader = csv.reader(io.StringIO(_text(path), newline=""), delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise ValueError(f"{path}: a column is named twice: {', '.join(names)}")
            for cells in filter(None, reader):
                if len(cells) != len(names):
                    raise ValueError(f"{path}:{reader.line_num}: {len(cells)} cells under {len(names)} columns")
                yield f"{path}:{reader.line_num}", dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}:{reader.line_num}: not a table: {error}") from error

    return rows


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # `datasets` depends on it
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        names = [field.name for field in file.schema_arrow if not _is_binary(field.type)]
        rows = file.read(columns=names).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file: {' '.join(str(error).split())}") from error
    for number, row in enumerate(rows, start=1):
        yield f"{path}: row {number}", _without_nulls(row)


def _is_binary(kind: Any) -> bool:
    """Tell whether a type is bytes, or holds bytes.

    An image is a struct of bytes and a path.
    """
    from pyarrow import types

    inside = [kind.field(i).type for i in range(kind.num_fields)] if types.is_nested(kind) else []
    return types.is_binary(kind) or types.is_large_binary(kind) or any(map(_is_binary, inside))


def _without_nulls(value: Any) -> Any:
    """The same value without keys whose value is null.

    A table has a null where only other rows have the key. JSON would leave the key out.
    """
    if isinstance(value, dict):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_without_nulls(each) for each in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)  # dates, decimals


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    "": _lines,
    ".txt": _lines,
    ".csv": _table(","),
    ".tsv": _table("\t"),
    ".json": _json,
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
