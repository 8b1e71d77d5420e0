"""List every reward with its range, what computes it, what it needs, and if that is here."""

from __future__ import annotations

from rewards.listing import COMMAND, table
from rlg.cli import fail_cleanly


def main() -> None:
    """Command line."""
    with fail_cleanly():
        COMMAND.parse()
        print(table())


if __name__ == "__main__":
    main()
