"""Recorded values: what a golden file holds, how it is written, and how close a new value must be.

A file holds what a command left behind, parsed, without what differs between two equal runs: times, paths, versions.
Numbers agree to a relative and an absolute tolerance, everything else exactly.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import GOLDEN

DIGITS = 7  # of a recorded number
RTOL = 1e-3  # of another CPU; see docs/reproducibility.md
# Keys whose values name a place or a moment, are a duration, or count what rounding decides
LEFT_OUT = (
    *("seconds", "images_per_second"),
    *("base", "adapter", "ckpt", "morl", "name", "origin", "folder", "prompts", "output"),
    *("created", "command", "digests", "versions", "machine"),
    *(f"{part}zero_gradient" for part in ("", "step_aware/", "time_blind/")),  # exact zeros, which kernels decide
    *(f"win_vs_{other}{end}" for other in ("base", "tuned") for end in ("", "_ci95")),  # a near tie falls either way
)


@dataclass(frozen=True)
class Golden:
    """Compares with the recorded files, or records them."""

    record: bool
    rtol: float

    def check(self, name: str, found: Any, amplified: float = 1.0) -> None:
        """Compare with tests/golden/NAME.json; an AssertionError names the first values that differ.

        amplified: how many times larger the relative tolerance is, for values that divide by a small difference.
        """
        file = GOLDEN / f"{name}.json"
        found = rounded(lasting(found))
        if self.record:
            file.parent.mkdir(exist_ok=True)
            file.write_text(shown(found) + "\n")
        expected = dict(leaves(json.loads(file.read_text())))
        now = dict(leaves(json.loads(json.dumps(found))))
        assert now.keys() == expected.keys(), sorted(now.keys() ^ expected.keys())[:10]
        differ = {
            path: (now[path], value) for path, value in expected.items() if not self.close(now[path], value, amplified)
        }
        assert not differ, f"{len(differ)} of {len(expected)}, (now, recorded): {dict(list(differ.items())[:10])}"

    def close(self, now: Any, recorded: Any, amplified: float = 1.0) -> bool:
        """Whether a value is the recorded one; only floats may differ, as a count that does is no rounding."""
        if isinstance(now, float) and isinstance(recorded, float):
            return now == pytest.approx(recorded, rel=self.rtol * amplified, abs=self.rtol / 100)
        return type(now) is type(recorded) and now == recorded


def lasting(value: Any) -> Any:
    """A parsed JSON value without the keys that differ between two equal runs."""
    if isinstance(value, Mapping):
        return {k: lasting(v) for k, v in value.items() if k not in LEFT_OUT and not k.startswith("seconds")}
    return list(map(lasting, value)) if isinstance(value, (list, tuple)) else value


def rounded(value: Any) -> Any:
    """A parsed JSON value with floats of DIGITS digits."""
    if isinstance(value, Mapping):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return list(map(rounded, value))
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """("key/0/key", value) of everything in a parsed JSON value that is no container, and of empty ones."""
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    if not inner:
        yield path, value
    for key, each in inner:
        yield from leaves(each, f"{path}/{key}")


def shown(value: Any, indent: str = "") -> str:
    """JSON in which a container of plain values takes one line: short, and a change is a line of a diff."""
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    if not any(isinstance(each, (Mapping, list)) for each in inner):
        return json.dumps(value)
    if isinstance(value, Mapping):
        parts, ends = [f"{json.dumps(k)}: {shown(v, indent + ' ')}" for k, v in value.items()], "{}"
    else:
        parts, ends = [shown(each, indent + " ") for each in inner], "[]"
    return f"{ends[0]}\n" + ",\n".join(f"{indent} {part}" for part in parts) + f"\n{indent}{ends[1]}"


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of JSON lines by column; one value for a column in which all are the same."""
    flat = [{path.strip("/"): value for path, value in leaves(lasting(row))} for row in rows]
    assert all(row.keys() == flat[0].keys() for row in flat), "rows differ in their keys"
    table = {name: [row[name] for row in flat] for name in flat[0]}
    return {name: cells if any(cell != cells[0] for cell in cells) else cells[0] for name, cells in table.items()}


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_json(file: Path) -> Any:
    """The value of a .json file."""
    return json.loads(file.read_text())
