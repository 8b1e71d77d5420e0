"""Page of an evaluation: curves, and its images by w.

A slider moves w. summary.json is written, too.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
from PIL import Image

from rlg.evaluation.methods import METHODS, RLG
from rlg.evaluation.rows import Row
from rlg.io.folders import check_links
from rlg.io.run_folder import CURVES, IMAGES, PAGE, SUMMARY, image_name
from rlg.reports import front_figure, stacked
from rlg.reports.evaluation_data import Run, read_run, reward_names
from rlg.reports.evaluation_figures import draw_curves, method_names
from rlg.reports.theme import STYLE, render, save

MAX_TILES, MAX_SIDE = 24, 384  # images of the page; pixels of the longer side of an embedded image
_MAX_PIXELS = 2**26  # pixels of an image that is read: a PNG of a few kB may claim more


@dataclass(frozen=True)
class Tile:
    """A prompt and a noise, seen at each w."""

    prompt: str
    tag: str | None
    k: int
    small: bool  # set if it has too few pixels to be smoothed when it is enlarged
    frames: dict[float, str]  # w -> data URI
    scores: dict[float, dict[str, float]]  # w -> rewards; empty where several seeds share the image's name


def read_tiles(run: Run) -> list[Tile]:
    """Up to MAX_TILES (prompt, k) with images, different prompts first.

    It is empty without an images folder.
    """
    images: dict[tuple[int, int], list[Row]] = defaultdict(list)
    stops = {(point["method"], point["w"]) for point in run.curve(run.sweep)}
    for row in run.rows:
        if (row.method, row.w) in stops and _is_here(run.folder, _image(run.folder, row)):
            images[row.k, row.prompt_id].append(row)
    chosen = sorted(sorted(images)[:MAX_TILES], key=lambda key: key[::-1])
    one_seed = len({row.seed for row in run.rows}) == 1
    return [_tile(run.folder, images[key], one_seed) for key in chosen]


def _tile(folder: Path, rows: Sequence[Row], one_seed: bool) -> Tile:
    rows = sorted(rows, key=lambda row: row.w)
    with _opened(_image(folder, rows[0])) as image:
        small = max(image.size) <= 160
    frames = {row.w: _data_uri(_image(folder, row)) for row in rows}
    scores = {row.w: row.rewards for row in rows} if one_seed else {}
    return Tile(rows[0].prompt, rows[0].tag, rows[0].k, small, frames, scores)


def _image(folder: Path, row: Row) -> Path:
    return folder / IMAGES / image_name(row.prompt_id, row.k, row.w)


def _is_here(folder: Path, image: Path) -> bool:
    """Tell whether there is such an image in the folder.

    A link may lead outside of the folder, and the page would give away that file.
    """
    return image.is_file() and image.resolve().is_relative_to(folder.resolve())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a PNG.

    Raises ValueError for anything else, as soon as it is read.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            yield image
    except Exception as error:  # Pillow raises many types, some of which are not even ValueError or OSError
        raise ValueError(f"{path} is no image that can be shown: {error}") from error


def _data_uri(path: Path) -> str:
    """The PNG as it is, or a WebP of a large one.

    The WebP has at most MAX_SIDE pixels a side.
    """
    with _opened(path) as image:
        if max(image.size) <= MAX_SIDE:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=86)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the four files of one evaluation; return the page.

    They go beside its scores, or into `output`. Raises ValueError for a folder that `rlg.evaluate` did not write.
    """
    run = read_run(folder)
    return _write(output or folder, [run], read_tiles(run), run.summary)


def write_joint_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page on several evaluations; return the page.

    It goes into `output` (default: `report` beside the first).
    """
    runs = [read_run(folder) for folder in folders]
    count = Counter(run.name for run in runs)
    runs = [replace(run, name=f"{run.name} ({run.folder})") if count[run.name] > 1 else run for run in runs]
    return _write(output or folders[0].parent / "report", runs, [], {"runs": {run.name: run.summary for run in runs}})


def _write(output: Path, runs: Sequence[Run], tiles: Sequence[Tile], summary: Mapping[str, Any]) -> Path:
    check_links(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / SUMMARY).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    with matplotlib.rc_context(STYLE):
        figure = draw_curves(runs)
        curves = stacked.both(figure, save(figure, (output / CURVES).with_suffix("")), "all-curves")
        front = (
            save(front_figure.draw_front(summary), output / "pareto") if len(runs) == 1 and runs[0].is_blend else None
        )
    swept = runs[0].curve(runs[0].sweep)
    stops = sorted({w for tile in tiles for w in tile.frames}) or [point["w"] for point in swept]
    html = render(
        "report.html.template",
        runs=runs,
        tiles=tiles,
        stops=stops if len(runs) == 1 else [],
        rewards=reward_names(runs),
        methods=METHODS,
        guided=RLG,
        named=method_names(runs),
        swept=swept,
        symbol="λ" if runs[0].is_blend else "w",
        curves=curves,
        front=front,
    )
    page = output / PAGE
    page.write_text(html, encoding="utf-8", errors="replace")  # JSON can hold half a surrogate pair, UTF-8 cannot
    return page
