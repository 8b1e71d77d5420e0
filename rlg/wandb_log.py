"""What training and evaluation send to Weights & Biases. Each bit of it is also in a file; the keys: docs/wandb.md."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlg.eval_folder import IMAGES, Job, job_of
from rlg.prompts import spread
from rlg.stats import Row
from rlg.sweep_folder import best_metrics

MAX_ROWS, MAX_IMAGES = 256, 64  # of an evaluation: rows of its table, images beside it
POINTS, ROWS, SAMPLES, CURVES = (f"evaluation/{name}" for name in ("points", "rows", "images", "curves"))
AWAY = ("offline", "disabled", "dryrun")  # W&B's modes without a server
_RUN_ID = Path("wandb", "run_id")  # in a folder: the W&B run that goes on when the folder's work does
_MEASURES = ("n", "nfe_per_image", "seconds_per_image", "kl", "diversity", "ess")
_OF_REWARD = ("mean", "low", "high", "delta_vs_tuned", "win_vs_tuned", "win_vs_base")


@dataclass(frozen=True)
class Tracking:
    """Where an evaluation is mirrored to."""

    project: str
    adapters: tuple[Path, ...] = ()  # checkpoints to keep as artifacts


@contextmanager
def one_line() -> Iterator[None]:
    """Turn what W&B raises (no account, no network, a deleted run) into ValueError."""
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        hint = "`wandb login` signs in, WANDB_MODE=offline keeps the run here for `wandb sync`"
        raise ValueError(f"W&B: {str(error).rstrip('. ')}; {hint}") from error


def require(extra: str = "wandb") -> None:
    """Raise ValueError unless W&B is installed, and signed in where it is not offline; writes nothing here."""
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"report_to is wandb, which is not installed: pip install 'rlg[{extra}]'") from error
    with one_line():
        if wandb.setup().settings.mode not in AWAY:
            wandb.login()


def options(folder: Path, name: str, job_type: str, group: str) -> dict[str, Any]:
    """Arguments of wandb.init, besides project and config, for work whose files are in `folder`.

    The run's id is kept there, so that work which is resumed goes on in the same run; an agent's comes first.
    """
    common = {"name": name, "dir": str(folder), "resume": "allow", "job_type": job_type, "group": group}
    if "WANDB_RUN_ID" in os.environ:
        return common
    file = folder / _RUN_ID
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return common | {"id": file.read_text().strip()}


def forget(folder: Path) -> None:
    """What comes next in a folder is another run."""
    (folder / _RUN_ID).unlink(missing_ok=True)


def caption(prompt: str, scores: Mapping[str, float]) -> str:
    """One line below an image: its prompt and its rewards."""
    rewards = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return " ".join(f"{prompt} | {rewards}".split()) if rewards else " ".join(prompt.split())


def pictures(images_B3HW: Tensor, captions: Sequence[str]) -> list[Any]:
    """Images in [0, 1] for W&B, each with its caption."""
    import wandb

    pixels = (images_B3HW.permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()
    return [wandb.Image(image, caption=text) for image, text in zip(pixels, captions, strict=True)]


def log_adapter(run: Any, checkpoint: Path, name: str) -> None:
    """Keep an adapter as an artifact of type `model`: the files that are published too, see `model_card.files`."""
    import wandb

    from rlg import model_card

    model_card.write(checkpoint)
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"adapter-{name}")[:128], type="model")
    for inside in model_card.files(checkpoint):
        artifact.add_file(str(checkpoint / inside), name=inside)
    run.log_artifact(artifact, aliases=["latest", checkpoint.name])


@contextmanager
def evaluation_run(tracking: Tracking | None, folder: Path, meta: Mapping[str, Any]) -> Iterator[Any]:
    """Within, a W&B run is open for the evaluation in `folder`, None if there is no tracking. Raises ValueError."""
    if tracking is None:
        yield None
        return
    import wandb

    name = str(meta["name"])
    with one_line():
        run = wandb.init(project=tracking.project, **options(folder, f"{name}/{folder.name}", "evaluate", name))
    try:
        run.config.update(dict(meta), allow_val_change=True)
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()


def log_evaluation(run: Any, folder: Path, tracking: Tracking) -> None:
    """Send what the folder's files say: the curve, tables, figures, images with captions, the best w, the adapters."""
    import wandb

    from rlg.report import read_run

    read = read_run(folder)
    run.define_metric("w", hidden=True)
    run.define_metric("guided/*", step_metric="w")
    for point in read.curve(read.sweep):
        run.log({"w": point["w"], **{f"guided/{key}": value for key, value in _values(point).items()}})
    columns, cells = point_table(read.summary["points"])
    images = _images(folder, read.rows, {(point["mode"], point["w"]) for point in read.curve(read.sweep)})
    media: dict[str, Any] = {
        POINTS: wandb.Table(columns=columns, data=cells),
        ROWS: _row_table(read.rows, images),
        CURVES: wandb.Image(str(folder / "curves.png")),
    }
    for reward in dict.fromkeys(name for point in read.summary["points"] for name in point["rewards"]):
        table = wandb.Table(columns=columns, data=[row for row in cells if row[columns.index(reward)] is not None])
        media[f"evaluation/plot/{reward}"] = wandb.plot.line(table, "w", reward, stroke="mode", title=reward)
    shown = [row for row in read.rows if job_of(row) in images][:MAX_IMAGES]
    if shown:
        media[SAMPLES] = [_picture(row, images, f"w = {row.w:g}: ") for row in shown]
    run.log(media)
    run.summary.update(best_metrics(read.summary))
    for checkpoint in tracking.adapters:
        log_adapter(run, checkpoint, checkpoint.resolve().parent.name)


def point_table(points: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """(columns, rows) of summary.json's points; of a reward NAME the mean is `NAME`, the rest `NAME low` and so on."""
    rewards = list(dict.fromkeys(name for point in points for name in point["rewards"]))
    of_rewards = [name if key == "mean" else f"{name} {key}" for name in rewards for key in _OF_REWARD]
    rows = []
    for point in points:
        row = [point["mode"], point["w"], *(point.get(key) for key in _MEASURES)]
        for name in rewards:
            fields = point["rewards"].get(name, {})
            ends = dict(zip(("low", "high"), fields.get("ci95") or (), strict=False))
            row += [(fields | ends).get(key) for key in _OF_REWARD]
        rows.append(row)
    return ["mode", "w", *_MEASURES, *of_rewards], rows


def _values(point: Mapping[str, Any]) -> dict[str, float]:
    """What a point of guidance has, as numbers: measures, and the mean of each reward."""
    means = {name: fields["mean"] for name, fields in point["rewards"].items()}
    return {k: v for k, v in ({key: point.get(key) for key in _MEASURES} | means).items() if v is not None}


def _row_table(rows: Sequence[Row], images: Mapping[Job, Path]) -> Any:
    """A table of rows: those whose image is kept, filled up to MAX_ROWS with others, evenly spread."""
    import wandb

    with_image = [row for row in rows if job_of(row) in images][:MAX_ROWS]
    others = [row for row in rows if job_of(row) not in images]
    chosen = with_image + [others[i] for i in spread(others, min(MAX_ROWS - len(with_image), len(others)))]
    names = list(dict.fromkeys(name for row in rows for name in row.rewards))
    columns = ["image", "prompt", "prompt_id", "k", "seed", "mode", "w", "kl", *names]
    cells = [
        [_picture(row, images), row.prompt, row.prompt_id, row.k, row.seed, row.mode, row.w, row.kl]
        + [row.rewards.get(name) for name in names]
        for row in chosen
    ]
    return wandb.Table(columns=columns, data=cells)


def _images(folder: Path, rows: Sequence[Row], stops: Collection[tuple[str, float]]) -> dict[Job, Path]:
    """The files of the images that were kept, of the curve's points (mode, w)."""
    at = {job_of(r): folder / IMAGES / f"{r.prompt_id}-{r.k}-{r.w:g}.png" for r in rows if (r.mode, r.w) in stops}
    return {job: file for job, file in at.items() if file.is_file()}


def _picture(row: Row, images: Mapping[Job, Path], before: str = "") -> Any:
    import wandb

    file = images.get(job_of(row))
    return wandb.Image(str(file), caption=before + caption(row.prompt, row.rewards)) if file else None
