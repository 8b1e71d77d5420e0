"""CSV files: formulas stay text, numbers stay numbers, and a file is whole or the one before."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest

from rlg.io import tables
from rlg.runs.sweep_folder import TABLE, Sweep, SweepRun, write_sweep


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ('=HYPERLINK("http://evil.test")', '\'=HYPERLINK("http://evil.test")'),
        ("+1+cmd|' /C calc'!A0", "'+1+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        ("@SUM(1)", "'@SUM(1)"),
        ("\t=1", "'\t=1"),
        ("-1e-3", "-1e-3"),
        ("+5", "+5"),
        (-0.5, "-0.5"),
        (None, ""),
        ("a = b", "a = b"),
        (Path("-x"), "'-x"),
        (True, "True"),
    ],
)
def test_what_a_cell_becomes(value: Any, shown: str, tmp_path: Path) -> None:
    tables.write(tmp_path / "t.csv", ["=head", "end"], [[value, "x"]])
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        assert list(csv.reader(file)) == [["'=head", "end"], [shown, "x"]]


def test_a_sweeps_table_has_no_formula(tmp_path: Path) -> None:
    runs = [SweepRun("run-000", {"=p": "=1+1", "lr": -1e-3}, "failed", None, 1.0, "@error")]
    write_sweep(tmp_path, Sweep({}, 0, runs))
    with (tmp_path / TABLE).open(newline="", encoding="utf-8") as file:
        heads, row = list(csv.reader(file))
    assert heads[3:5] == ["'=p", "lr"] and row[3:5] == ["'=1+1", "-0.001"] and row[-1] == "'@error"


def test_a_table_that_can_not_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    tables.write(tmp_path / "t.csv", ["a"], [[1]])

    def rows() -> Any:
        yield [2]
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left"):
        tables.write(tmp_path / "t.csv", ["a"], rows())
    assert (tmp_path / "t.csv").read_bytes() == b"a\r\n1\r\n" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (235.0, 3, "235"),
        (1560.4, 3, "1560"),
        (0.007042, 3, "0.00704"),
        (0.00001234, 3, "0.0000123"),
        (12.3, 4, "12.30"),
        (-83.52, 3, "-83.5"),
        (0.0, 3, "0.00"),
        (123456.0, 4, "123500"),
        (1e-9, 3, "1.00e-09"),
        (math.nan, 3, "nan"),
    ],
)
def test_numbers_have_one_format(value: float, digits: int, shown: str) -> None:
    assert tables.number(value, digits) == shown
    if value > 0:
        assert tables.number(value, digits, signed=True) == f"+{shown}"
        assert tables.number(-value, digits, signed=True) == f"-{shown}"


def test_a_markdown_table_has_its_rule_below_the_heads() -> None:
    assert tables.markdown(["a", ""], [["1", "x y"], ["", "2"]]) == "| a |  |\n| --- | --- |\n| 1 | x y |\n|  | 2 |"
