"""Page of several trainings, sweeps and evaluations: runs.csv, figures and report.html."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from rlg.io import tables
from rlg.io.folders import check_links
from rlg.io.run_folder import PAGE
from rlg.reports import stacked
from rlg.reports.comparison_data import BestOf, Comparison, best_of, collect, frontier, mixed, planes
from rlg.reports.theme import STYLE, render, save
from rlg.runs.sweep_folder import FINISHED

TABLE = "runs.csv"


def write_table(comparison: Comparison, bests: Sequence[BestOf], file: Path) -> None:
    """Write runs.csv: a row a run, then a row an evaluation.

    A cell is empty where it does not apply.
    """
    swept = comparison.swept
    of_runs = ["kind", "name", "folder", "status", "iterations", comparison.metric or "metric", *swept]
    of_evaluations = ["trained_reward", "best_w", "best_w_low", "best_w_high", "mean", "low", "high"]
    of_evaluations += ["delta_vs_tuned", "delta_low", "delta_high", "kl", "n"]
    columns = [*of_runs, *of_evaluations]
    rows: list[dict[str, Any]] = []
    for entry in comparison.ranked():
        row = {"kind": "run", "name": entry.name, "folder": entry.folder, "status": entry.status}
        row |= {"iterations": entry.metrics[-1].get("step", "") if entry.metrics else ""}
        row |= {comparison.metric or "metric": entry.metric}
        rows.append(row | {name: entry.parameters[name] for name in swept})
    for best in bests:
        row = {"kind": "evaluation", "name": best.run.name, "folder": best.run.folder, "status": FINISHED}
        rows.append(row | dict(zip(of_evaluations, _numbers(best), strict=True)))
    tables.write(file, columns, [[row.get(name, "") for name in columns] for row in rows])


def _numbers(best: BestOf) -> list[Any]:
    mean, delta = best.found.mean, best.found.delta
    weights = [best.found.w, *best.found.between]
    differences = [delta.mean, delta.low, delta.high] if delta else [None] * 3
    return [best.reward, *weights, mean.mean, mean.low, mean.high, *differences, best.kl, best.found.n]


def write_runs_report(
    folders: Sequence[Path], output: Path | None = None, metric: str | None = None, wandb: str | None = None
) -> Path:
    """Write the report into a folder; return the page.

    output: by default `report` in a single folder, or beside the first. metric: key of metrics.jsonl by which training
    runs are compared. wandb: ENTITY/PROJECT to publish it in as well. Raises ValueError for a folder that holds
    nothing, and where W&B can't be reached.
    """
    from rlg.reports import comparison_figures, wandb_report

    if wandb is not None:
        wandb_report.check(wandb)

    comparison = collect(folders, metric)
    if metric is not None and all(entry.metric is None for entry in comparison.entries):
        raise ValueError(f"no run has the metric {metric!r}")
    output = output or (folders[0] if len(folders) == 1 else folders[0].parent) / "report"
    check_links(output)
    output.mkdir(parents=True, exist_ok=True)
    bests = [best for run in comparison.evaluations if (best := best_of(run)) is not None]
    write_table(comparison, bests, output / TABLE)
    drawn: dict[str, Callable[[], Any]] = {
        "frontier": lambda: comparison_figures.draw_frontier(comparison),
        "parameters": lambda: comparison_figures.draw_parameters(comparison),
        "best_w": lambda: comparison_figures.draw_best(bests),
    }
    figures: dict[str, str] = {}
    with matplotlib.rc_context(STYLE):
        for name, draw in drawn.items():
            if (figure := draw()) is not None:
                svg = save(figure, output / name)
                figures[name] = stacked.both(figure, svg, f"all-{name}") if name == "frontier" else svg
    fronts = {place: (frontier(s), mixed(s)) for place, s in planes(comparison.evaluations).items()}
    title = " · ".join(folder.resolve().name for folder in folders)
    html = render(
        "runs.html.template",
        title=title,
        comparison=comparison,
        figures=figures,
        bests=bests,
        fronts=fronts,
        table=TABLE,
    )
    (output / PAGE).write_text(html, encoding="utf-8", errors="replace")
    if wandb is not None:
        images = {name: output / f"{name}.png" for name in figures}
        print(wandb_report.publish(wandb_report.Content(title, comparison, bests, fronts, images), wandb))
    return output / PAGE
