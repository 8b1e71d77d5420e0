"""Evaluation rows: the lines of scores.jsonl.

They are checked when they are read, and paired by their noise.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlg.choices import KERNELS
from rlg.evaluation.methods import METHODS, method_of
from rlg.io.parsing import parse_json

OPTIONAL = ("kl", "diversity", "log_weight")  # numbers that a row may lack


@dataclass(frozen=True, slots=True)  # slots save memory, because a report holds all rows of an evaluation
class Row:
    """One scored image: a line of scores.jsonl."""

    prompt_id: int
    prompt: str
    tag: str | None
    k: int  # index among the prompt's images; (prompt_id, k, seed) decides the initial noise
    seed: int
    w: float  # guidance weight, with the 6 digits of an image's file name; for a blend, the last expert's weight
    sampler: str  # one of KERNELS
    method: str  # one of METHODS; the base is "rlg" at w=0, the tuned model "rlg" at w=1
    rewards: dict[str, float]
    kl: float | None  # path KL to the base in nats; None for a deterministic sampler
    diversity: float | None
    nfe: int  # network evaluations spent on the image
    seconds: float
    log_weight: float | None = None  # the corrector's weight in nats, if guidance kept it; older files lack it

    @property
    def noise(self) -> tuple[int, int, int]:
        """The key of a row's prompt and noise.

        Rows with the same key started from the same noise.
        """
        return self.prompt_id, self.k, self.seed

    @classmethod
    def from_json(cls, record: Any) -> Row:
        """A row from a decoded line of scores.jsonl.

        Keys that are not fields are ignored. Raises ValueError for a missing field, a wrong type, NaN or infinity, or
        an unknown method or sampler.
        """
        if not isinstance(record, dict):
            raise ValueError(f"expected an object, got {type(record).__name__}")
        record = {"log_weight": None, **record}
        if "method" not in record and "mode" in record:
            record["method"] = method_of(record)
        missing = [name for name in cls.__dataclass_fields__ if name not in record]
        if missing:
            raise ValueError(f"missing {', '.join(missing)}")
        if not isinstance(record["rewards"], dict) or not record["rewards"]:
            raise ValueError("rewards must be an object with at least one entry")
        return cls(
            prompt=_text(record, "prompt"),
            tag=None if record["tag"] is None else _text(record, "tag"),
            sampler=_choice(record, "sampler", KERNELS),
            method=_choice(record, "method", tuple(METHODS)),
            w=float(f"{_number(record, 'w'):g}"),
            rewards={sys.intern(name): _number(record["rewards"], name) for name in record["rewards"]},
            seconds=_number(record, "seconds"),
            **{name: None if record[name] is None else _number(record, name) for name in OPTIONAL},
            **{name: _integer(record, name) for name in ("prompt_id", "k", "seed", "nfe")},
        )


def _text(record: Mapping[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name} must be a string, got {record[name]!r}")
    return sys.intern(record[name])  # the rows of a prompt share one string


def _choice(record: Mapping[str, Any], name: str, known: Sequence[str]) -> str:
    if record[name] not in known:
        raise ValueError(f"unknown {name} {record[name]!r}; known: {', '.join(known)}")
    return sys.intern(record[name])


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return float(value)


def _integer(record: Mapping[str, Any], name: str) -> int:
    if type(record[name]) is not int:  # True and 1.0 are refused as well
        raise ValueError(f"{name} must be an integer, got {record[name]!r}")
    return record[name]


def read_rows(path: Path) -> list[Row]:
    """The rows of a scores.jsonl, in file order.

    A crash may have cut off the last line. If it has no newline and does not parse, it is left out with a warning.
    Raises ValueError with the file and the line for any other bad or repeated line, and for a file without rows.
    """
    with path.open("rb") as lines:  # lines are read one by one, because all bytes need as much memory as the rows
        return _rows_of(path, lines)


def _rows_of(path: Path, lines: Iterable[bytes]) -> list[Row]:
    rows: dict[tuple[Any, ...], Row] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:  # not JSON, or not UTF-8
            if line.endswith(b"\n"):
                raise ValueError(f"{path}:{number}: not JSON: {error}") from error
            warnings.warn(f"{path}:{number}: the last line is cut off and was ignored", stacklevel=2)
            continue
        try:
            row = Row.from_json(record)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        key = (*row.noise, row.w, row.sampler, row.method)
        if key in rows:
            raise ValueError(f"{path}:{number}: a second row for (prompt_id, k, seed, w, sampler, method) = {key}")
        rows[key] = row
    if not rows:
        raise ValueError(f"{path} has no rows")
    return list(rows.values())


def pair(rows: Sequence[Row], reference: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of rows with the same prompt, k and seed.

    Each pair is (row, its partner in the reference), in the order of `rows`. Rows without a partner are left out.
    Raises ValueError when two rows of the reference have the same noise.
    """
    partner = {row.noise: row for row in reference}
    if len(partner) < len(reference):
        raise ValueError("the reference has several rows for one (prompt_id, k, seed)")
    return [(row, partner[row.noise]) for row in rows if row.noise in partner]
