"""List every reward: range, gradient, model, needs, and whether it is installed."""

from __future__ import annotations

from rewards.listing import COMMAND, table
from rlg.cli import fail_cleanly


def main() -> None:
    """Run the command line."""
    with fail_cleanly():
        COMMAND.parse()
        print(table())


if __name__ == "__main__":
    main()
