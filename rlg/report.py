"""Report of an evaluation, or of several, as figures and a page.

    python -m rlg.report runs/NAME/eval/ID                     # files beside the scores
    python -m rlg.report runs/A/eval/ID runs/B/eval/ID         # one joint page, curves overlaid
    python -m rlg.report runs/A runs/B runs/sweeps/X           # trainings and sweeps: rlg.reports.comparison_data

It reads scores.jsonl and meta.json, and writes summary.json, curves.png, curves.svg and report.html. A blend of two
experts also gets pareto.png and pareto.svg. Its w is lambda, and its ends are the experts. The page is one file that
makes no network request. Its only script shows the elements that carry the slider's w: images, readouts, table rows,
cursors in the curves. The numbers come from `rlg.evaluation.summary.summarise`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Options of `python -m rlg.report`."""

    folders: tuple[Path, ...] = option(
        help="evaluations; or training runs, sweeps, with evaluations", metavar="DIR", place=0
    )
    output: Path | None = option(
        None, "where to write (default: an evaluation's folder, or `report` in or beside the first)"
    )
    metric: str | None = option(
        None, "key of metrics.jsonl that training runs are compared by (default: the sweep's, or the reward)"
    )
    wandb: str | None = option(
        None, "publish the report on several runs there too, as a W&B Report", metavar="ENTITY/PROJECT"
    )


COMMAND = Command(
    "python -m rlg.report",
    ReportOptions,
    "Report of an evaluation, or of several runs, from the files that they left.",
)
if __name__ == "__main__":
    COMMAND.answer()

from collections.abc import Sequence

from rlg.cli import fail_cleanly
from rlg.reports.evaluation_page import write_joint_report, write_report


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; prints the page's path."""
    with fail_cleanly():
        options = COMMAND.parse(argv)
        from rlg.reports.comparison_data import is_run
        from rlg.reports.comparison_page import write_runs_report
        from rlg.runs.sweep_folder import is_sweep

        if options.wandb or any(is_run(folder) or is_sweep(folder) for folder in options.folders):
            print(write_runs_report(options.folders, options.output, options.metric, options.wandb))
        elif options.metric is not None:
            raise ValueError("--metric compares training runs, and only evaluations are given")
        elif len(options.folders) == 1:
            print(write_report(options.folders[0], options.output))
        else:
            print(write_joint_report(options.folders, options.output))


if __name__ == "__main__":
    main()
