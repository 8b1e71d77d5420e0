"""Refusal of another `rewards` or `trainers` that Python finds in place of ours.

`python -m rlg.NAME` looks in the working directory first, where a user may keep a folder of that name. Only commands
are guarded: beside `rlg.apply` a program may import packages of its own with these names.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

PACKAGES = ("rewards", "trainers")
_HOME = Path(__file__).resolve().parent.parent


class _Guard(MetaPathFinder):
    """A finder that finds nothing, and ends the command where a package is not ours."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Called by each import."""
        if fullname in PACKAGES:
            check(fullname)


def guard() -> None:
    """Have every later import of `rewards` and `trainers` in this process checked."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())


def is_command() -> bool:
    """Tell whether `python -m rlg` or `python -m rlg.NAME` is being started: Python looks for that module now."""
    if sys.argv[:1] != ["-m"]:
        return False
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.split(".")[0] == "rlg"


def check(name: str) -> None:
    """Print one line and exit with code 2 where Python finds another package of this name than ours."""
    from rlg.cli import stop

    found, ours = _find(name), _HOME / name
    if found is None or found.resolve() == ours:
        return
    here = found.resolve().parent == Path.cwd()
    fix = "give the command as `rlg`, without `python -m`" if here else "take it off Python's path"
    stop(f"{found} hides RLG's own package {name!r} ({ours}): rename it, or {fix}")


def _find(name: str) -> Path | None:
    for finder in sys.meta_path:
        spec = None if isinstance(finder, _Guard) else finder.find_spec(name, None)
        if spec is not None:
            inside = list(spec.submodule_search_locations or ())
            return Path(inside[0] if inside else spec.origin or name)
    return None
