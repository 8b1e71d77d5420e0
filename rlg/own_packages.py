"""A guard against other packages named `rewards` or `trainers`.

`python -m rlg.NAME` looks in the working directory first, where a user may have a folder of that name. Only commands
are guarded. A program that uses `rlg.apply` may import its own packages of these names.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any

PACKAGES = ("rewards", "trainers")
_HOME = Path(__file__).resolve().parent.parent


class _Guard(MetaPathFinder):
    """An import finder that ends the command for a foreign package.

    It finds nothing itself.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        """Check the package; each import calls this."""
        if fullname in PACKAGES:
            check(fullname)


def guard() -> None:
    """Check every later import of `rewards` and `trainers`."""
    if not any(isinstance(finder, _Guard) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Guard())


def is_command() -> bool:
    """Tell whether `python -m rlg` or `python -m rlg.NAME` is starting.

    It is true while Python looks for that module.
    """
    if sys.argv[:1] != ["-m"]:
        return False
    module = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    return module.split(".")[0] == "rlg"


def check(name: str) -> None:
    """Exit with code 2 if Python finds another package of this name.

    One line explains it.
    """
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
