"""Does guidance with w play the KL coefficient beta / w?

python -m rlg.equivalence --toy                        # laws that are known exactly
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rlg.cli import Parser, fail_cleanly


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.equivalence", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--toy", action="store_true", help="laws with known scores, against the exact tilted law")
    add("--samples", type=int, default=10_000, help="of each toy law")
    add("--steps", type=int, help="denoising steps (default: 250 for a toy)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("runs/equivalence"), help="folder to write to")
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the options say and print what was written."""
    from rlg import equivalence_toy

    for path in equivalence_toy.run(args.output, args.samples, args.steps or 250, args.seed):
        print(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    with fail_cleanly():
        run(args)


if __name__ == "__main__":
    main()
