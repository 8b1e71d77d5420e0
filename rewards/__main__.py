"""`python -m rewards --list`: every reward with its range, what computes it, what it needs, and if that is here."""

from __future__ import annotations

import argparse

from rewards import REWARDS, RewardSpec

_COLUMNS = ("name", "range", "model", "needs", "pip install", "installed", "what it is")


def table() -> str:
    """The rewards as an aligned plain-text table, one a line below a header and a rule."""
    rows = [
        (name, spec.range, spec.model, spec.needs, _extra(spec), _installed(spec), spec.summary)
        for name, spec in REWARDS.items()
    ]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]
    lines = [_COLUMNS, tuple("-" * width for width in widths), *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _extra(spec: RewardSpec) -> str:
    return f"'rlg[{spec.extra}]'" if spec.extra else "-"


def _installed(spec: RewardSpec) -> str:
    return "no" if spec.missing() else "yes"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m rewards", description="The rewards that this version knows.")
    parser.add_argument("--list", action="store_true", required=True, help="print a table of every reward")
    parser.parse_args()
    print(table())


if __name__ == "__main__":
    main()
