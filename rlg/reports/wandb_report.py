"""The report on several runs as a W&B Report, through wandb-workspaces.

    python -m rlg.report runs/A runs/sweeps/X --wandb ENTITY/PROJECT

Text and tables are those of `rlg.reports.comparison_page`. Its figures are images of a run of job type `report`.
Panels read the project's runs of the same names and groups, if training and evaluation were mirrored there
(docs/wandb.md).
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlg import extras
from rlg.io import tables
from rlg.publishing import wandb_runs
from rlg.publishing.model_card import text
from rlg.reports import wandb_mirror
from rlg.reports.comparison_data import BestOf, Comparison, PlanePoint
from rlg.stats import PERCENT, Estimate

MAX_TITLE = 128  # W&B's limit
MAX_ROWS = 200  # rows of a table; the csv has them all
_TARGET = re.compile(r"[\w.-]+/[\w .-]+")


@dataclass(frozen=True)
class Content:
    """The content of a W&B Report."""

    title: str
    comparison: Comparison
    bests: Sequence[BestOf]
    # (base, reward) -> (points, settings that differ)
    fronts: Mapping[tuple[str, str], tuple[Sequence[PlanePoint], Sequence[str]]]
    figures: Mapping[str, Path]  # name -> png


def check(target: str) -> None:
    """Raise ValueError if nothing can be published.

    The cause is a wrong name, a missing package, no account or no network.
    """
    if not _TARGET.fullmatch(target):
        raise ValueError(f"--wandb takes ENTITY/PROJECT, got {target!r}")
    try:
        import wandb
        import wandb_workspaces.reports.v2  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--wandb needs {error.name or error}: {extras.install('wandb')}") from error
    if wandb.setup().settings.mode in wandb_runs.AWAY:
        raise ValueError(f"--wandb publishes to W&B's server, and WANDB_MODE is {wandb.setup().settings.mode}")
    wandb_runs.require()


def publish(content: Content, target: str) -> str:
    """Upload the figures, save the report, and return its address.

    Raises ValueError if W&B refuses.
    """
    import wandb_workspaces.reports.v2 as wr

    entity, project = target.split("/", 1)
    try:
        with wandb_runs.one_line():
            images = _upload(content, entity, project)
            blocks = build(content, entity, project, images)
            report = wr.Report(project=project, entity=entity, title=content.title[:MAX_TITLE], blocks=blocks)
            report.width = "fluid"
            report.save()
    except ValueError:
        raise
    except Exception as error:  # the package may raise anything in its queries
        raise ValueError(
            f"cannot publish to {target}: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
    return report.url


def _upload(content: Content, entity: str, project: str) -> str | None:
    """Log the figures as images; return the run's id.

    Returns None if there is no figure.
    """
    import wandb

    if not content.figures:
        return None
    quiet = wandb_runs.quiet_settings(x_disable_stats=True, silent=True)
    with tempfile.TemporaryDirectory(prefix="rlg-report-") as place:
        options = {"name": f"report: {content.title}"[:MAX_TITLE], "job_type": "report", "dir": place}
        run = wandb.init(entity=entity, project=project, settings=quiet, reinit="create_new", **options)
        run.log({f"report/{name}": wandb.Image(str(file)) for name, file in content.figures.items()})
        run.finish()
    return run.id


def build(content: Content, entity: str, project: str, images: str | None) -> list[Any]:
    """Blocks of the report.

    images: the run that has the figures.
    """
    import wandb_workspaces.reports.v2 as wr

    comparison = content.comparison
    counts = f"{len(comparison.entries)} runs, {len(comparison.evaluations)} evaluations"
    blocks: list[Any] = [wr.P(f"{counts}. Written by rlg from the runs' files."), wr.TableOfContents()]
    if images:
        shown = wr.Runset(entity, project, name="figures", filters=f"Metric('ID') == '{images}'")
        keys = [f"report/{name}" for name in content.figures]
        panels = [
            wr.MediaBrowser(title=key, media_keys=[key], num_columns=1, layout=_place(i, 12, 16))
            for i, key in enumerate(keys)
        ]
        blocks += [wr.H2("Figures"), wr.PanelGrid(runsets=[shown], panels=panels, hide_run_sets=True)]
    if comparison.entries:
        blocks += [
            wr.H2("Runs"),
            wr.MarkdownBlock(_runs_table(comparison)),
            *_training_panels(comparison, entity, project),
        ]
    if content.bests:
        blocks += [wr.H2("Best w"), wr.MarkdownBlock(_best_table(content.bests))]
    for (base, reward), (points, mixed) in content.fronts.items():
        blocks += [wr.H2(f"Frontier of {reward} on {base}"), wr.MarkdownBlock(_front_table(points, mixed))]
    if comparison.evaluations:
        blocks += [wr.H2("Evaluations"), *_evaluation_panels(content, entity, project)]
    return blocks


def _place(index: int, width: int, height: int) -> Any:
    """The index-th place of a grid of 24 columns.

    It is filled row by row.
    """
    import wandb_workspaces.reports.v2 as wr

    columns = 24 // width
    return wr.Layout(x=index % columns * width, y=index // columns * height, w=width, h=height)


def _training_panels(comparison: Comparison, entity: str, project: str) -> list[Any]:
    """Panels of the trainings: curves and parallel coordinates.

    They read the project's own runs.
    """
    import wandb_workspaces.reports.v2 as wr

    names = [entry.name.rpartition("/")[2] for entry in comparison.entries if entry.metrics]
    if not names or comparison.metric is None:
        return []
    runs = wr.Runset(
        entity, project, name="training", filters=f"Metric('JobType') == 'train' and {_among('Name', names)}"
    )
    panels: list[Any] = [
        wr.LinePlot(title=comparison.metric, x="Step", y=[comparison.metric], layout=_place(0, 12, 8)),
        wr.LinePlot(title="reward against KL", x="kl", y=["reward"], layout=_place(1, 12, 8)),
    ]
    if comparison.swept:
        axes = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(name)) for name in comparison.swept]
        axes.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric(comparison.metric)))
        panels.append(wr.ParallelCoordinatesPlot(columns=axes, layout=wr.Layout(x=0, y=8, w=24, h=9)))
    return [wr.PanelGrid(runsets=[runs], panels=panels)]


def _evaluation_panels(content: Content, entity: str, project: str) -> list[Any]:
    """Panels of the evaluations: curves along w, images and tables.

    They read the project's own runs.
    """
    import wandb_workspaces.reports.v2 as wr

    groups = list(dict.fromkeys(str(run.summary["meta"].get("name")) for run in content.comparison.evaluations))
    chosen = f"Metric('JobType') == 'evaluate' and {_among('Group', groups)}"
    points = [point for run in content.comparison.evaluations for point in run.summary["points"]]
    rewards = list(dict.fromkeys(name for point in points for name in point["rewards"]))
    panels: list[Any] = [wr.LinePlot(title=name, x="w", y=[f"guided/{name}"]) for name in rewards]
    panels += [wr.LinePlot(title=f"{name} against KL", x="guided/kl", y=[f"guided/{name}"]) for name in rewards]
    panels += [wr.BarPlot(title=f"highest {name}", metrics=[wr.SummaryMetric(f"best/{name}")]) for name in rewards]
    panels.append(wr.MediaBrowser(title="images", media_keys=[wandb_mirror.SAMPLES]))
    panels.append(wr.WeavePanelSummaryTable(table_name=wandb_mirror.POINTS))
    for i, panel in enumerate(panels):
        panel.layout = _place(i, 8, 8)
    runs = wr.Runset(entity, project, name="evaluations", filters=chosen)
    return [wr.PanelGrid(runsets=[runs], panels=panels)]


def _among(field: str, values: Sequence[str]) -> str:
    """W&B's expression for a field that has one of some values.

    Quotes and backslashes are Python's.
    """
    return f"Metric({field!r}) in {list(values)!r}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    table = tables.markdown(
        [text(head) for head in heads], [[_cell(value) for value in row] for row in rows[:MAX_ROWS]]
    )
    return table + (f"\n\n{len(rows) - MAX_ROWS} more rows are in runs.csv." if len(rows) > MAX_ROWS else "")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return text(f"{value:.4g}" if isinstance(value, (float, Estimate)) else value)


def _runs_table(comparison: Comparison) -> str:
    heads = ["run", "status", "iterations", comparison.metric or "metric", *comparison.swept]
    rows = [
        [entry.name, entry.status, entry.metrics[-1].get("step") if entry.metrics else None, entry.metric]
        + [entry.parameters[name] for name in comparison.swept]
        for entry in comparison.ranked()
    ]
    return _table(heads, rows)


def _best_table(bests: Sequence[BestOf]) -> str:
    heads = [
        "evaluation",
        "reward",
        "best w (none surely beats)",
        f"mean on other prompts, {PERCENT}",
        f"difference to the tuned model, {PERCENT}",
        "KL (nats)",
        "n",
    ]
    rows = []
    for best in bests:
        mean, delta = best.found.mean, best.found.delta
        rows.append(
            [
                best.run.name,
                best.reward,
                Estimate.of(best.found.w, best.found.between),
                mean,
                delta,
                best.kl,
                best.found.n,
            ]
        )
    return _table(heads, rows)


def _front_table(points: Sequence[PlanePoint], mixed: Sequence[str]) -> str:
    rows = [
        [
            point.run.name,
            point.row["w"],
            point.row["kl"],
            Estimate.of(point.mean, point.row["rewards"][point.reward]["ci95"]),
        ]
        for point in points
    ]
    note = f"\n\nThe evaluations also differ in {text(', '.join(mixed))}." if mixed else ""
    return _table(["evaluation", "w", "KL (nats)", f"mean, {PERCENT}"], rows) + note
