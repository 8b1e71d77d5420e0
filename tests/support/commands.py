"""Commands as a user gives them, in the tests' own process: no name of a module but the public ones."""

from __future__ import annotations

import runpy
import warnings
from collections.abc import Sequence
from unittest.mock import patch


def run(module: str, argv: Sequence[object]) -> None:
    """Run `python -m MODULE ARGV`; SystemExit where it fails."""
    with patch("sys.argv", [module, *map(str, argv)]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # other tests import it
        runpy.run_module(module, run_name="__main__", alter_sys=True)


def options(**settings: object) -> list[str]:
    """Settings as arguments of a command; a list gives all its values to one option."""
    return [
        str(word)
        for name, value in settings.items()
        for word in (f"--{name}", *(value if isinstance(value, (list, tuple)) else [value]))
    ]
