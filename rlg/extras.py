"""The distribution's name, and the installation of its extras.

The import is `rlg`, and not the distribution's name.
"""

from __future__ import annotations

DISTRIBUTION = "rl-guidance"  # pyproject.toml has the same; `rlg` on PyPI is another project since 2016


def requirement(extra: str) -> str:
    """The argument of pip that installs an extra in a clone.

    It is quoted for a shell.
    """
    return f"'.[{extra}]'"


def install(extra: str) -> str:
    """Instructions to install an extra, for an error message."""
    return f"pip install {requirement(extra)} in a clone ({DISTRIBUTION} is not on PyPI yet)"
