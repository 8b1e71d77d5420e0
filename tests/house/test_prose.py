"""Docstrings that a reader can parse: rules for first sentences, and for the length of a module's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.support.paths import ROOT

PACKAGES = ("rlg", "trainers", "rewards")
MOST_WORDS = 12  # words in a docstring's first sentence
MOST_LINES = 8  # lines of prose in a module's docstring
FORBIDDEN = ("What", "Whether", "Of", "As", "That")  # no docstring begins with these

_END = re.compile(r"[.!?](?=\s|$)")
_CODE = re.compile(r"``.*?``|`[^`]*`")
_SHAPE = re.compile(r"\([A-Z0-9][A-Z0-9, ]*\)")
_NUMBERED = re.compile(r"\d+[.)] ")


def first_sentence(docstring: str) -> str:
    """The docstring up to its first full stop, or its first paragraph where that has none."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    end = _END.search(_CODE.sub(lambda code: "x" * len(code[0]), paragraph))
    return paragraph[: end.start()] if end else paragraph


def count_words(sentence: str) -> int:
    """Words of a sentence. Code in backticks is one word, and so is a shape as (B, 3, H, W)."""
    plain = _SHAPE.sub("shape", _CODE.sub("code", sentence))
    return sum(any(map(str.isalnum, word)) for word in plain.split())


def count_prose(docstring: str) -> int:
    """Lines of a docstring, without formulas and usage (they are indented), legends and numbered items."""
    paragraphs = [paragraph for paragraph in docstring.split("\n\n") if not paragraph.startswith("Legend:")]
    lines = [line for line in "\n".join(paragraphs).splitlines() if line.strip()]
    return sum(not line.startswith(" ") and not _NUMBERED.match(line) for line in lines)


def faults(docstring: str, is_module: bool) -> Iterator[str]:
    """Say what a docstring does wrong."""
    sentence = first_sentence(docstring)
    if (words := count_words(sentence)) > MOST_WORDS:
        yield f"{words} words in its first sentence, at most {MOST_WORDS}: {sentence}"
    if sentence.split(" ")[0].rstrip(",:") in FORBIDDEN:
        yield f"begins with one of {', '.join(FORBIDDEN)}: {sentence}"
    if is_module and (lines := count_prose(docstring)) > MOST_LINES:
        yield f"{lines} lines of prose, at most {MOST_LINES}; the rest belongs in docs/"


@cache
def found() -> dict[str, list[str]]:
    """Faults of each package, without those of the packages in it."""
    packages: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            own = packages.setdefault(".".join(parts[: 2 if len(parts) > 2 else 1]), [])
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                    is_module = isinstance(node, ast.Module)
                    line = 1 if isinstance(node, ast.Module) else node.lineno
                    for fault in faults(ast.get_docstring(node) or "x", is_module):
                        own.append(f"{path.relative_to(ROOT)}:{line}: {fault}")
    return packages


@pytest.mark.parametrize("package", sorted(found()))
def test_docstrings_can_be_parsed(package: str) -> None:
    assert not found()[package], "\n".join(found()[package])


@pytest.mark.parametrize(
    ("docstring", "fault"),
    [
        ("Whether a row is whole.", "begins with"),
        ("One two three four five six seven eight nine ten eleven twelve\nthirteen.", "13 words"),
        ("A formula, `a b c d e f g h i j k l m n`, and (B, 3, H, W) count as two.", None),
        ("Sum.\n\n    y = x\n\nLegend: B batch,\nT steps.\n\n1. No offset.\n2. No scale.\n" + "A line.\n" * 7, None),
        ("Sum.\n" + "A line.\n" * 8, "9 lines"),
    ],
)
def test_the_rules(docstring: str, fault: str | None) -> None:
    said = list(faults(docstring, is_module=True))
    assert not said if fault is None else len(said) == 1 and fault in said[0]
