"""The list of rewards as text: range, gradient, model, needs, packages."""

from __future__ import annotations

from dataclasses import dataclass

from rewards import REWARDS, RewardSpec
from rlg import extras
from rlg.config_parser import Command, option

_COLUMNS = ("name", "range", "gradient", "model", "needs", "pip install", "installed", "what it is")


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """Options of `python -m rewards`."""

    list: bool = option(True, "print a table of every reward; there is nothing else to do")


COMMAND = Command("python -m rewards", ListOptions, "The rewards that this version knows.")


def table() -> str:
    """The rewards as an aligned table in plain text.

    Below a header and a rule, each reward has a line.
    """
    rows = [
        (name, spec.range, _gradient(spec), spec.model, spec.needs, _extra(spec), _installed(spec), spec.summary)
        for name, spec in REWARDS.items()
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    lines = [_COLUMNS, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _gradient(spec: RewardSpec) -> str:
    return "yes" if spec.gradient else "-"


def _extra(spec: RewardSpec) -> str:
    return extras.requirement(spec.extra) if spec.extra else "-"


def _installed(spec: RewardSpec) -> str:
    return "no" if spec.missing() else "yes"
