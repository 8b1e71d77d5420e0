"""The tables of docs/adapters.md: each row says tested, refused or unknown, and the first two name a test."""

from __future__ import annotations

import re

import pytest

from tests.support.paths import ROOT, TESTS

PAGE = ROOT / "docs" / "adapters.md"
STATES = ("tested", "refused", "unknown")
NODE = re.compile(r"`(test_\w+\.py::\w+(?:\[[^\]`]+\])?)`")


def rows() -> list[list[str]]:
    """Cells of the rows of all tables that have a state."""
    found, inside = [], False
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[:2] == ["what", "state"]:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and set(cells[0]) != {"-"}:
            found.append(cells)
    return found


class Ids:
    """A plugin of pytest that keeps what is collected."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.found |= {f"{item.path.name}::{item.name}" for item in items}


@pytest.fixture(scope="module")
def known() -> set[str]:
    """Ids of the tests in the files that the page names, with parameters and without."""
    files = sorted({node.partition("::")[0] for node in NODE.findall(PAGE.read_text(encoding="utf-8"))})
    ids, quiet = Ids(), ("--collect-only", "-qq", "--no-summary", "-p", "no:xdist", "-p", "no:cacheprovider")
    assert pytest.main([*quiet, *(str(path) for file in files for path in TESTS.rglob(file))], plugins=[ids]) == 0
    return ids.found | {name.partition("[")[0] for name in ids.found}


def test_every_row_says_its_state_and_names_its_test(known: set[str]) -> None:
    table = rows()
    assert len(table) >= 140
    assert len({cells[0] for cells in table}) == len(table)  # nothing is said twice
    named = {}
    for what, state, reason in table:
        assert state in STATES, what
        nodes = NODE.findall(reason)
        assert reason and (nodes or state == "unknown"), what
        named[what] = nodes
    for what, nodes in named.items():
        assert set(nodes) <= known, what


def test_every_pipeline_and_scheduler_that_is_tested_is_in_the_table(known: set[str]) -> None:
    named = {node for _, _, reason in rows() for node in NODE.findall(reason)}
    tests = ("test_apply_pipelines.py::test_by_hand[", "test_apply_schedulers.py::test_a_scheduler_by_hand[")
    there = {name for name in known if name.startswith(tests)}
    assert there and there <= named
