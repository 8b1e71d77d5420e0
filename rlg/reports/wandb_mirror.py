"""Mirror of an evaluation on Weights & Biases.

Everything that it sends is in a file, too. docs/wandb.md has the keys.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlg.evaluation.folder import Job, job_of
from rlg.evaluation.rows import Row
from rlg.io import public_names
from rlg.io.run_folder import CURVES, IMAGES, image_name
from rlg.prompts import spread
from rlg.publishing.wandb_runs import Tracking, caption, log_adapter, one_line, options
from rlg.runs.sweep_folder import best_metrics

MAX_ROWS, MAX_IMAGES = 256, 64  # most rows of an evaluation's table, most images beside it
POINTS, ROWS, SAMPLES, FIGURE = (f"evaluation/{name}" for name in ("points", "rows", "images", "curves"))
_MEASURES = ("n", "nfe_per_image", "seconds_per_image", "kl", "diversity", "ess_at_most")
_OF_REWARD = ("mean", "low", "high", "delta_vs_tuned", "win_vs_tuned", "win_vs_base")


@contextmanager
def evaluation_run(tracking: Tracking | None, folder: Path, meta: Mapping[str, Any]) -> Iterator[Any]:
    """Open a W&B run for the evaluation in `folder`, for the block.

    Yields None if there is no tracking. Raises ValueError if W&B refuses.
    """
    if tracking is None:
        yield None
        return
    import wandb

    name = str(meta["name"])
    with one_line():
        run = wandb.init(project=tracking.project, **options(folder, f"{name}/{folder.name}", "evaluate", name))
    try:
        run.config.update(public_names.value(meta), allow_val_change=True)
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def log_evaluation(run: Any, folder: Path, tracking: Tracking) -> None:
    """Send the content of an evaluation's folder.

    It is the curve, tables, figures, images with captions, the best w, and the adapters.
    """
    import wandb

    from rlg.reports.evaluation_data import read_run

    read = read_run(folder)
    run.define_metric("w", hidden=True)
    run.define_metric("guided/*", step_metric="w")
    for point in read.curve(read.sweep):
        run.log({"w": point["w"], **{f"guided/{key}": value for key, value in _values(point).items()}})
    columns, cells = point_table(read.summary["points"])
    images = _images(folder, read.rows, {(point["method"], point["w"]) for point in read.curve(read.sweep)})
    media: dict[str, Any] = {
        POINTS: wandb.Table(columns=columns, data=cells),
        ROWS: _row_table(read.rows, images),
        FIGURE: wandb.Image(str(folder / CURVES)),
    }
    for reward in dict.fromkeys(name for point in read.summary["points"] for name in point["rewards"]):
        table = wandb.Table(columns=columns, data=[row for row in cells if row[columns.index(reward)] is not None])
        media[f"evaluation/plot/{reward}"] = wandb.plot.line(table, "w", reward, stroke="method", title=reward)
    shown = [row for row in read.rows if job_of(row) in images][:MAX_IMAGES]
    if shown:
        media[SAMPLES] = [_picture(row, images, f"w = {row.w:g}: ") for row in shown]
    run.log(media)
    run.summary.update(best_metrics(read.summary))
    for checkpoint in tracking.adapters:
        log_adapter(run, checkpoint, checkpoint.resolve().parent.name)


def point_table(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of summary.json's points.

    For a reward NAME the mean is in `NAME`, and the rest in `NAME low` and so on.
    """
    rewards = list(dict.fromkeys(name for point in points for name in point["rewards"]))
    of_rewards = [name if key == "mean" else f"{name} {key}" for name in rewards for key in _OF_REWARD]
    rows = []
    for point in points:
        row = [point["method"], point["w"], *(point.get(key) for key in _MEASURES)]
        for name in rewards:
            fields = point["rewards"].get(name, {})
            ends = dict(zip(("low", "high"), fields.get("ci95") or (), strict=False))
            row += [(fields | ends).get(key) for key in _OF_REWARD]
        rows.append(row)
    return ["method", "w", *_MEASURES, *of_rewards], rows


def _values(point: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a point of guidance: measures, and means of rewards."""
    means = {name: fields["mean"] for name, fields in point["rewards"].items()}
    return {k: v for k, v in ({key: point.get(key) for key in _MEASURES} | means).items() if v is not None}


def _row_table(rows: Sequence[Row], images: Mapping[Job, Path]) -> Any:
    """A table of rows, at most MAX_ROWS.

    Rows with an image come first. Others fill it up, evenly spread.
    """
    import wandb

    with_image = [row for row in rows if job_of(row) in images][:MAX_ROWS]
    others = [row for row in rows if job_of(row) not in images]
    chosen = with_image + [others[i] for i in spread(others, min(MAX_ROWS - len(with_image), len(others)))]
    names = list(dict.fromkeys(name for row in rows for name in row.rewards))
    columns = ["image", "prompt", "prompt_id", "k", "seed", "method", "w", "kl", *names]
    cells = [
        [_picture(row, images), row.prompt, row.prompt_id, row.k, row.seed, row.method, row.w, row.kl]
        + [row.rewards.get(name) for name in names]
        for row in chosen
    ]
    return wandb.Table(columns=columns, data=cells)


def _images(folder: Path, rows: Sequence[Row], stops: Collection[tuple[str, float]]) -> dict[Job, Path]:
    """Files of the kept images of the curve's points (method, w)."""
    at = {job_of(r): folder / IMAGES / image_name(r.prompt_id, r.k, r.w) for r in rows if (r.method, r.w) in stops}
    return {job: file for job, file in at.items() if file.is_file()}


def _picture(row: Row, images: Mapping[Job, Path], before: str = "") -> Any:
    import wandb

    file = images.get(job_of(row))
    return wandb.Image(str(file), caption=before + caption(row.prompt, row.rewards)) if file else None
