"""Cost of guidance and training, side by side, with intervals.

    python -m rlg.benchmark guidance --base tiny-sd3     # cost against fidelity, for every way to run guidance
    python -m rlg.benchmark grpo --base tiny-sd3         # an iteration by phase, against a plain reference
    python -m rlg.benchmark growth                        # evaluation: more prompts, more scales, more processes

A benchmark is a command, never a test. Each is a module of its own, imported on demand, because the second one needs a
trainer.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from rlg.benchmark import options

COMMANDS = {
    "guidance": (options.GUIDANCE, "rlg.benchmark.guidance"),
    "grpo": (options.GRPO, "trainers.benchmark.grpo"),
    "growth": (options.GROWTH, "rlg.benchmark.growth"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; each command has its own --help."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in COMMANDS:
        command, module = COMMANDS[argv[0]]
        command.answer(argv[1:])  # answer --help before torch is loaded
        import_module(module).main(argv[1:])
    elif argv and argv[0] in ("-h", "--help"):
        print(__doc__)
    else:
        print(f"error: rlg.benchmark takes a command: {', '.join(COMMANDS)}; got {argv[:1]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
