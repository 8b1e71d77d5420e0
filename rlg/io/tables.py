"""Tables in Markdown and CSV, and the format of measured numbers.

A file is written whole or not at all.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlg.io import atomic

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # spreadsheets compute a cell that begins so (OWASP, CSV injection)


def cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula.

    A text that would be one gets an apostrophe in front. Numbers stay numbers.
    """
    if isinstance(value, (int, float)) or value is None:
        return value
    text = str(value)
    return f"'{text}" if text.startswith(_FORMULA) and not _is_number(text) else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return text == text.strip()


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown.

    Cells are written as they are. The caller must escape foreign texts.
    """
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(path: Path, heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Replace a CSV file.

    Raises OSError that names the file.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([cell(value) for value in row] for row in (heads, *rows))
    atomic.write_text(path, text.getvalue())


def number(value: float, digits: int = 4, signed: bool = False) -> str:
    """A measured number with a given count of significant digits.

    Examples are 0.00704, 12.30 and 1560. Between 10^-6 and 10^9 there is no exponent, and no point at the end.
    """
    text = f"{value:{'+' if signed else ''}#.{digits}g}"
    if "e" in text and 1e-6 <= abs(value) <= 1e9:
        sign = "+" if signed and value > 0 else ""
        text = f"{sign}{Decimal(text):f}"
    return text.removesuffix(".")
