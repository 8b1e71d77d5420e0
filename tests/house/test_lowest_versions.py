"""The versions that pyproject.toml allows: each range has a floor, and holds the version that was tested."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from tests.support.lowest_versions import ROOT, lowest, pinned, ranges

PROJECT = """
[project]
name = "own"
dependencies = ["torch>=2.6", "trl>=1.0"]
[project.optional-dependencies]
serve = ["uvicorn[standard]>=0.30,<1"]
all = ["own[serve]"]
"""
CONSTRAINTS = "# tested\ntorch==2.13.0\ntrl==1.16.0\nuvicorn==0.54.0\n"


@pytest.fixture
def allowed() -> dict[str, str]:
    return ranges((ROOT / "pyproject.toml").read_text())


@pytest.fixture
def tested() -> dict[str, str]:
    return pinned((ROOT / "constraints.txt").read_text())


def test_the_lowest_of_a_project_by_hand() -> None:
    assert ranges(PROJECT) == {"torch": ">=2.6", "trl": ">=1.0", "uvicorn": ">=0.30,<1"}
    assert lowest(ranges(PROJECT), pinned(CONSTRAINTS)) == ["torch==2.13.0", "trl==1.0", "uvicorn==0.30"]


def test_a_dependency_without_a_floor_is_named() -> None:
    with pytest.raises(ValueError, match=r"no lowest version \(>=\) of trl, uvicorn"):
        lowest(ranges(PROJECT.replace("trl>=1.0", "trl").replace(">=0.30,<1", "<1")), pinned(CONSTRAINTS))


def test_each_dependency_has_a_floor(allowed: dict[str, str], tested: dict[str, str]) -> None:
    assert {line.partition("==")[0] for line in lowest(allowed, tested)} == allowed.keys() > {"torch", "gradio"}


def test_the_tested_versions_are_allowed(allowed: dict[str, str], tested: dict[str, str]) -> None:
    outside = [
        f"{name}=={tested.get(name)} and not {range_}"
        for name, range_ in allowed.items()
        if name not in tested or tested[name] not in SpecifierSet(range_)
    ]
    assert not outside


def test_one_lowest_python_everywhere() -> None:
    """The versions of constraints.txt ask for it."""
    assert 'requires-python = ">=3.11"' in (ROOT / "pyproject.toml").read_text()
    assert "Python 3.11 or newer" in (ROOT / "README.md").read_text()
    assert "They need Python 3.11 or newer" in (ROOT / "constraints.txt").read_text()
