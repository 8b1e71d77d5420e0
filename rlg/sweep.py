"""Run a W&B sweep file on this machine, without an account.

    python -m rlg.sweep configs/sweeps/grpo_tiny.yaml --runs 8                 # in turn
    python -m rlg.sweep configs/sweeps/evaluate.yaml --parallel 8              # eight at a time, as on eight GPUs
    wandb sweep FILE && wandb agent ID                                         # the same file with an account

W&B's own library draws the parameters (`sweeps`: grid, random, bayes). The command line is that of `wandb agent`. The
same command continues a sweep. Finished runs are kept, and one that was cut off is continued (with --resume, if its
trainer left a checkpoint). Failed runs stay failed without --retry_failed. `early_terminate` is ignored with a
warning, and bayes cannot use `probabilities`. sweeps 0.3.0 asks for numpy<2, which the other packages cannot use;
0.2.0 has the same search, and works with numpy 2.4.

    RLG_SWEEP_DIR     the sweep's folder, for the command
    RLG_SWEEP_RUN     the run's name; its folder is RLG_SWEEP_DIR/RLG_SWEEP_RUN
    RLG_SWEEP_SLOT    0 to parallel - 1, different for runs at the same time; it may choose a GPU
    RLG_REPORT_TO     `none` unless it is set; `wandb agent` sets WANDB_SWEEP_ID and WANDB_RUN_ID instead
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlg import config_files
from rlg.cli import fail_cleanly
from rlg.config_parser import Command, option
from rlg.io import folders
from rlg.io.folders import check_links
from rlg.runs.sweep_folder import (
    FAILED,
    TABLE,
    Sweep,
    open_sweep,
    write_sweep,
)
from rlg.runs.sweep_runner import Runner, command_line, draw, files_of, read_file


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Options of `python -m rlg.sweep`."""

    file: Path = option(help="sweep file, in W&B's format (configs/sweeps/*.yaml)", place=0)
    runs: int | None = option(None, "runs in all (default: the file's run_cap, or the whole grid)")
    parallel: int = option(1, "runs at a time")
    output: Path | None = option(None, "where the runs go (default: runs/sweeps/NAME, the file's name)")
    seed: int = option(0, "decides what is drawn")
    retry_failed: bool = option(False, "run failed runs again")


COMMAND = Command("python -m rlg.sweep", SweepOptions, __doc__)


def run(argv: Sequence[str] | None = None) -> Sweep:
    """Execute the sweep of a command line, and print the table's path.

    Raises ValueError for a sweep that cannot be run.
    """
    options = COMMAND.parse(argv)
    for name in ("runs", "parallel"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    config = read_file(config_files.find(options.file))
    limit = options.runs or config.get("run_cap")
    if limit is None and config["method"] != "grid":
        raise ValueError(
            f"method {config['method']} does not end by itself; give --runs, or run_cap in {options.file}"
        )
    folder = options.output or Path("runs") / "sweeps" / options.file.stem
    # A bad config raises here, before anything is written.
    command_line(config, draw(Sweep(config, options.seed), folder) or {})
    check_links(folder)
    with folders.held(folder):
        sweep = open_sweep(folder, config, options.seed, files_of(config))
        write_sweep(folder, sweep)
        Runner(sweep, folder, limit, options.parallel, options.retry_failed).execute()
    print(folder / TABLE)
    return sweep


def main(argv: Sequence[str] | None = None) -> None:
    """The command line.

    The exit code is 1 if no run has finished.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM acts as Ctrl-C
    try:
        with fail_cleanly():
            sweep = run(argv)
    finally:
        signal.signal(signal.SIGTERM, before)
    failed = [run for run in sweep.runs if run.status == FAILED]
    if failed:
        print(f"{len(failed)} of {len(sweep.runs)} runs failed: {failed[0].name}: {failed[0].error}", file=sys.stderr)
    if len(failed) == len(sweep.runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
