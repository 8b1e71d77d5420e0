"""The distribution's name, and how its optional dependencies are installed. The import is `rlg`, whatever its name."""

from __future__ import annotations

DISTRIBUTION = "rl-guidance"  # as in pyproject.toml; `rlg` on PyPI has been another project's since 2016


def requirement(extra: str) -> str:
    """What pip is given in a clone for an extra, quoted for a shell."""
    return f"'.[{extra}]'"


def install(extra: str) -> str:
    """How to install an extra, for an error message."""
    return f"pip install {requirement(extra)} in a clone ({DISTRIBUTION} is not on PyPI yet)"
