"""Code and commands of README.md and docs/, as the tests read them."""

from __future__ import annotations

import re
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType

from tests.support.paths import ROOT

EXTENDING = ROOT / "docs" / "extending.md"
_PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def python_blocks(page: Path) -> list[str]:
    """The blocks of Python of a page, in its order."""
    return _PYTHON.findall(page.read_text(encoding="utf-8"))


@lru_cache
def module(path: str) -> ModuleType:
    """The module that docs/extending.md shows under `# PATH`, as if the file were there."""
    (code,) = (code for code in python_blocks(EXTENDING) if code.startswith(f"# {path}\n"))
    name = path.removesuffix(".py").replace("/", ".")
    found = ModuleType(name)
    sys.modules[name] = found
    exec(compile(code, f"docs/extending.md: {path}", "exec"), found.__dict__)
    return found


# --- commands


PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
_BASH = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
_BLOCK = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_STARTS = ("python -m ", "python train_", "accelerate launch ", "bash launch/", "rlg ", "make ")
_COMMENT = re.compile(r"\s+# .*$", re.MULTILINE)
_PATTERN = re.compile(r"^(?:python -m \S*|accelerate launch train_|rlg (?:train )?)NAME")  # of many commands, and none


def commands(page: Path) -> list[str]:
    """The commands of a page, spaces made one: the lines of its blocks of bash, and what is set as code in its text.

    Raises ValueError for a command in a block of another kind, which would escape.
    """
    text = page.read_text(encoding="utf-8")
    lines = [line for block in _BASH.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    prose = _BLOCK.sub("", text)
    if hidden := [line for line in prose.splitlines() if line.startswith(tuple(f"    {start}" for start in _STARTS))]:
        raise ValueError(f"{page.name}: a command stands in a block of bash, and not indented: {hidden[0].strip()}")
    inline = [" ".join(code.split()) for code in _INLINE.findall(prose)]
    found = [" ".join(_COMMENT.sub("", line).split()) for line in lines]
    found += [code for code in inline if code.startswith(_STARTS) and not _PATTERN.match(code)]
    return [command for command in found if command]
