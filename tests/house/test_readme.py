"""README.md is short, its links lead somewhere, and what it names is there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.support.documented import PAGES
from tests.support.paths import ROOT

README = ROOT / "README.md"
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_readme_is_short() -> None:
    text = README.read_text(encoding="utf-8")
    lines = [_LINK.sub("]", line) for line in text.splitlines()]
    assert len(lines) <= 120
    assert len(text.split()) <= 1000
    assert [line for line in lines if len(line) > 119] == []


def anchors(name: str) -> set[str]:
    """Anchors of a page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.*)$", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for link in _LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target)), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    """As code: `rlg/stats.py`, `configs/tiny/*.yaml`, `rlg.guidance.modes`; not what stands for many (NAME)."""
    for code in re.findall(r"`([^`\s]+)`", page.read_text(encoding="utf-8")):
        if "NAME" in code:
            continue
        if re.fullmatch(r"(rlg|trainers|rewards|configs|launch|tests|docs)/[\w/.*{},-]+", code):
            assert any(list(ROOT.glob(each)) for each in _braces(code.rstrip("/"))), code
        elif re.fullmatch(r"(rlg|trainers|rewards)(\.[a-z_]+)+", code):
            names = code.split(".")  # of a module, or of something in one
            places = [ROOT.joinpath(*names[:end]) for end in (len(names), len(names) - 1)]
            assert any(place.is_dir() or place.with_suffix(".py").is_file() for place in places), code


def _braces(pattern: str) -> list[str]:
    """a/{b,c}/d as a/b/d and a/c/d."""
    found = re.search(r"\{([^}]*)\}", pattern)
    return [pattern.replace(found[0], each) for each in found[1].split(",")] if found else [pattern]


def test_the_tree_names_every_folder() -> None:
    named = set(re.findall(r"^    (\w+)/ ", README.read_text(encoding="utf-8"), re.MULTILINE))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {name.partition("/")[0] for name in listed.stdout.splitlines() if "/" in name}
    assert named == {folder for folder in folders if not folder.startswith(".")}


def test_every_figure_is_shown_somewhere() -> None:
    pages = (*PAGES, *sorted((ROOT / "docs" / "archive").glob("*.md")))
    shown = " ".join(page.read_text(encoding="utf-8") for page in pages)
    assert {file.name for file in (ROOT / "docs" / "img").iterdir()} == set(re.findall(r"img/([\w-]+\.png)\)", shown))
