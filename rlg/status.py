"""Show the trainings, evaluations and sweeps of a folder.

    python -m rlg.status runs/               # a line each, the most recent first; --watch 10 refreshes it
    python -m rlg.status runs/ --json        # a list of objects, the fields of `Status`

A line says how far a run is, and whether it still goes on. Everything is read from files. Of metrics.jsonl, only the
end is read. The step time is that of the last steps, as the run measured it. It does not include evaluations and
checkpoints, so the time left is a little short. A run goes on if a process holds its lock file. Without a lock file, a
run counts as running while its last line is younger than five of its steps, or two minutes. A folder that cannot be
read is one line, too.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlg.cli import fail_cleanly
from rlg.config_parser import Command, option
from rlg.runs.status import collect, printable, table


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """Options of `python -m rlg.status`."""

    folder: Path = option(Path("runs"), "folder of runs, or one run", place=0)
    json: bool = option(False, "a JSON list for programs; a line each time with --watch")
    watch: float | None = option(None, "show it again and again, until Ctrl-C", metavar="SECONDS")


COMMAND = Command("python -m rlg.status", StatusOptions, __doc__)


def show(options: StatusOptions) -> None:
    """Print the runs of a folder once."""
    groups = collect(options.folder)
    if options.json:
        text = json.dumps([asdict(status) for group in groups for status in group])
    else:
        text = table(groups) if groups else f"no runs in {printable(str(options.folder))}"
    if options.watch and sys.stdout.isatty():
        print("\x1b[H\x1b[2J", end="")
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def run(options: StatusOptions) -> None:
    """Print the runs of a folder, once or until Ctrl-C.

    Raises ValueError for options that make no sense.
    """
    if options.watch is not None and not 0 < options.watch < math.inf:
        raise ValueError(f"--watch needs a positive number of seconds, got {options.watch:g}")
    show(options)
    try:
        while options.watch is not None:
            time.sleep(options.watch)
            show(options)
    except KeyboardInterrupt:
        return


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    with fail_cleanly():
        run(COMMAND.parse(argv))


if __name__ == "__main__":
    main()
