"""Report of an evaluation: scores.jsonl + meta.json -> summary.json, curves.png, curves.svg, report.html.

A blend of two experts also gets pareto.png and pareto.svg, its w is lambda, and its ends are the experts.

    python -m rlg.report runs/NAME/eval/ID                     # files beside the scores
    python -m rlg.report runs/A/eval/ID runs/B/eval/ID         # one joint page, curves overlaid
    python -m rlg.report runs/A runs/B runs/sweeps/X           # training runs and sweeps: see rlg.report_runs

The page is one file that makes no network request. Its only script toggles a class on whatever carries the w under the
slider: images, readouts, table rows, cursors in the curves. The numbers come from `rlg.stats.summarise`.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from rlg import pareto
from rlg.cli import Parser, fail_cleanly
from rlg.config import check_links, check_type, read_json
from rlg.stats import BLEND_MODES, EXPERT, Row, has_base, read_rows, summarise
from rlg.style import COLOURS, FALL, INK, MARKS, MODE_NAMES, MUTED, PALETTE, STYLE, render, save

MAX_TILES, MAX_SIDE = 24, 384  # images of the page, and pixels of an embedded image's longer side
_MAX_PIXELS = 2**26  # of an image that is read: a PNG of a few kB may claim more
_META = {  # types of what the report uses of meta.json
    **{"base": str, "adapter": str, "trained_rewards": list[str], "schedule": str},
    **{"experts": list[str], "blend_scale": float},
}


@dataclass(frozen=True)
class Run:
    """An evaluation folder, read and summarised."""

    name: str
    folder: Path
    rows: list[Row]
    summary: dict[str, Any]  # the content of summary.json

    @property
    def sweep(self) -> str:
        """The mode that the slider runs over."""
        modes = {point["mode"] for point in self.summary["points"]}
        return next((mode for mode in BLEND_MODES if mode in modes), "rlg")

    @property
    def is_blend(self) -> bool:
        """Whether w is the weight of the last of two experts."""
        return "pareto" in self.summary

    @property
    def scale(self) -> float:
        """W of a blend, 1 for others."""
        return self.summary["meta"].get("blend_scale", 1.0)

    @property
    def named(self) -> dict[float, str]:
        """w -> what stands there: base and tuned model, or a blend's experts where its scale is 1."""
        meta = self.summary["meta"]
        if self.is_blend:
            return {float(w): name for w, name in enumerate(meta["experts"])} if self.scale == 1 else {}
        return {0.0: "base", 1.0: "tuned"} if has_base(meta) else {1.0: "tuned"}

    @property
    def formula(self) -> tuple[str, str]:
        """What guidance computes, before and after the w."""
        if not self.is_blend:
            return "guided = base + ", " * (tuned - base)"
        a, b = self.summary["meta"]["experts"]
        if self.scale == 1:
            return f"guided = ({a}) + ", f" * (({b}) - ({a}))"
        return f"guided = base + {self.scale:g} * (({a}) - base + ", f" * (({b}) - ({a})))"

    def points(self, mode: str) -> list[dict[str, Any]]:
        """The points of a mode, by w."""
        return [point for point in self.summary["points"] if point["mode"] == mode]

    def curve(self, mode: str) -> list[dict[str, Any]]:
        """The points of a mode's line; at w = 0 and 1 all are the base and the tuned model, and share their points."""
        points = self.points(mode)
        if mode in BLEND_MODES:
            keys = pareto.front([(point["mode"], point["w"]) for point in self.summary["points"]], mode, self.scale)
            points = [point for point in self.summary["points"] if (point["mode"], point["w"]) in keys]
        if mode in ("lora_scale", "corrected") and points:
            known = {point["w"] for point in points}
            points += [point for point in self.points("rlg") if point["w"] in self.named.keys() - known]
        return sorted(points, key=lambda point: point["w"])

    def best(self, reward: str) -> dict[str, Any]:
        """The guided point of the highest mean."""
        return max(self.curve(self.sweep), key=lambda point: point["rewards"][reward]["mean"])


@dataclass(frozen=True)
class Panel:
    """One set of axes: `reward`, or the points' field if None, against `x` ("w" or "kl")."""

    title: str
    x: str
    reward: str | None
    field: str = "diversity"


@dataclass(frozen=True)
class Tile:
    """A prompt and a noise, seen at each w."""

    prompt: str
    tag: str | None
    k: int
    small: bool  # too few pixels to be smoothed when it is blown up
    frames: dict[float, str]  # w -> data URI
    scores: dict[float, dict[str, float]]  # w -> rewards; empty where several seeds share the image's name


def read_run(folder: Path) -> Run:
    """Read and summarise an evaluation. Raises ValueError naming the file that is missing or wrong."""
    scores, meta_path = folder / "scores.jsonl", folder / "meta.json"
    for path in (scores, meta_path):
        if not path.is_file():
            raise ValueError(f"{path} does not exist; `python -m rlg.evaluate` writes it")
    meta = read_json(meta_path)
    missing = {"base", "adapter", "trained_rewards"} - meta.keys()
    if missing:
        raise ValueError(f"{meta_path}: missing {', '.join(sorted(missing))}")
    for name in _META.keys() & meta.keys():
        check_type(f"{meta_path}: {name}", meta[name], _META[name])
    if "blend_scale" in meta and len(meta.get("experts", ())) != 2:
        raise ValueError(f"{meta_path}: a blend has two experts")
    rows = read_rows(scores)
    summary = summarise(rows, meta)
    if "blend_scale" in meta:
        summary["pareto"] = pareto.summarise_front(rows, meta["trained_rewards"], meta["blend_scale"])
    return Run(str(meta.get("name", folder.name)), folder, rows, summary)


def reward_names(runs: Sequence[Run]) -> list[tuple[str, bool]]:
    """(name, whether a run was trained on it) for every reward of the runs, the trained ones first."""
    trained = {name for run in runs for name in run.summary["meta"]["trained_rewards"]}
    names = dict.fromkeys(name for run in runs for point in run.summary["points"] for name in point["rewards"])
    return sorted(((name, name in trained) for name in names), key=lambda entry: not entry[1])


def draw_curves(runs: Sequence[Run]) -> Figure:
    """All panels. One run: a colour for each mode. Several: a colour for each run, its modes told apart by marks."""
    panels = _panels(runs)
    columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(max(4.1 * columns, 6), 3.1 * lines + 0.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    handles: dict[str, Any] = {}
    for i, panel in enumerate(panels):
        axes = figure.add_subplot(lines, columns, i + 1)
        _dress(axes, panel, runs)
        for r, run in enumerate(runs):
            for mode in MODE_NAMES:
                if run.is_blend and (mode in ("rlg", "morl") or (mode == EXPERT and run.scale == 1)):
                    continue  # no point along lambda, or the end of every curve
                colour = PALETTE[r % len(PALETTE)] if len(runs) > 1 else COLOURS[mode]
                label = MODE_NAMES[mode] if len(runs) == 1 else f"{run.name}: {MODE_NAMES[mode]}"
                line = _draw(axes, panel, run.curve(mode), MARKS[mode], colour)
                handles |= {label: line} if line else {}
        if len(runs) == 1:
            _draw_cursors(axes, panel, runs[0].curve(runs[0].sweep), i)
            _draw_fall(axes, panel, runs[0].summary["falls"])
    columns = min(len(handles) if len(runs) == 1 else len(runs), 4)  # a legend fills its columns first
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=columns, frameon=False)
    return figure


def _panels(runs: Sequence[Run]) -> list[Panel]:
    points = [point for run in runs for point in run.summary["points"]]
    names = reward_names(runs)
    panels = [Panel(f"{name}  ({'trained' if trained else 'held out'})", "w", name) for name, trained in names]
    if any(point["kl"] is not None for point in points):
        panels += [Panel(f"{name}  against KL", "kl", name) for name, trained in names if trained]
    for field, title in (("diversity", "diversity"), ("ess", "effective share of the claim's samples")):
        if any(point[field] is not None for point in points):
            panels.append(Panel(title, "w", None, field))
    return panels


def _named(runs: Sequence[Run]) -> dict[float, str]:
    """What a w is in all the runs."""
    return {w: name for w, name in runs[0].named.items() if all(run.named.get(w) == name for run in runs)}


def _dress(axes: Axes, panel: Panel, runs: Sequence[Run]) -> None:
    axes.set_title(panel.title)
    axes.tick_params(length=0)
    axes.margins(x=0.06, y=0.12)
    one_blend = len(runs) == 1 and runs[0].is_blend
    weight = f"weight λ of {runs[0].summary['meta']['experts'][1]}" if one_blend else "guidance weight w"
    axes.set_xlabel(weight if panel.x == "w" else "path KL to the base (nats)")
    if panel.x == "w":
        for w, name in _named(runs).items():
            axes.axvline(w, color=MUTED, linewidth=0.7, zorder=1)
            above = axes.get_xaxis_transform()
            axes.text(w, 1.02, name, transform=above, ha="center", va="bottom", fontsize=8.5, color=MUTED)


def _measured(points: Iterable[Mapping[str, Any]], panel: Panel) -> NDArray[np.float64]:
    """(P, 6): x, its low and high, y, its low and high, for the points that have both."""
    table = []
    for point in points:
        held = (point, panel.field) if panel.reward is None else (point["rewards"].get(panel.reward), "mean")
        x, y = _interval(point, panel.x), _interval(*held)
        if x and y:
            table.append(x + y)
    return np.array(table, dtype=np.float64).reshape(-1, 6)


def _interval(fields: Mapping[str, Any] | None, key: str) -> tuple[float, ...]:
    """(value, low, high), empty if unknown; a value without an interval is exact."""
    if fields is None or fields[key] is None:
        return ()
    ci = "ci95" if key == "mean" else f"{key}_ci95"
    return fields[key], *fields.get(ci, [fields[key]] * 2)


def _draw(axes: Axes, panel: Panel, points: list[dict[str, Any]], marks: Mapping[str, Any], colour: str) -> Any:
    """Draw one mode of one run; returns its line for the legend, or None if it has no points here."""
    x, x_low, x_high, y, y_low, y_high = _measured(points, panel).T
    if not len(x):
        return None
    if panel.x == "w" and len(x) > 1:
        axes.fill_between(x, y_low, y_high, color=colour, alpha=0.16, linewidth=0)
    else:
        axes.hlines(y, x_low, x_high, color=colour, alpha=0.55, linewidth=1.2)
        axes.vlines(x, y_low, y_high, color=colour, alpha=0.55, linewidth=1.2)
    return axes.plot(x, y, color=colour, linewidth=1.8, markersize=4.8, **marks)[0]


def _draw_cursors(axes: Axes, panel: Panel, sweep: Sequence[dict[str, Any]], index: int) -> None:
    """Transparent marks that the page's slider makes visible: element `cursor-INDEX-W` of the SVG."""
    for point in sweep:
        for x, _, _, y, _, _ in _measured([point], panel):
            look = {"gid": f"cursor-{index}-{point['w']:g}", "color": INK, "alpha": 0, "zorder": 4}
            axes.plot([x], [y], "o", markersize=11, markerfacecolor="none", **look)


def _draw_fall(axes: Axes, panel: Panel, falls: Mapping[str, Any]) -> None:
    """Mark the w from which a held-out reward falls."""
    if panel.x == "w" and (fall := falls.get(panel.reward)):
        axes.axvline(fall["w"], color=FALL, linewidth=1.2, linestyle=":", zorder=1)
        above = axes.get_xaxis_transform()
        axes.text(fall["w"], 0.02, " falls", transform=above, ha="left", va="bottom", fontsize=8.5, color=FALL)


def read_tiles(run: Run) -> list[Tile]:
    """Up to MAX_TILES (prompt, k) with images, different prompts first; empty without an images folder."""
    images: dict[tuple[int, int], list[Row]] = defaultdict(list)
    stops = {(point["mode"], point["w"]) for point in run.curve(run.sweep)}
    for row in run.rows:
        if (row.mode, row.w) in stops and _is_here(run.folder, _image(run.folder, row)):
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
    return folder / "images" / f"{row.prompt_id}-{row.k}-{row.w:g}.png"


def _is_here(folder: Path, image: Path) -> bool:
    """Whether there is such an image, and no link to one outside of the folder, which the page would give away."""
    return image.is_file() and image.resolve().is_relative_to(folder.resolve())


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A PNG. Raises ValueError for anything else, as soon as it is read."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise ValueError(f"it has {image.width} x {image.height} pixels")
            yield image
    except Exception as error:  # Pillow raises many types, some of which are not even ValueError or OSError
        raise ValueError(f"{path} is no image that can be shown: {error}") from error


def _data_uri(path: Path) -> str:
    """The PNG as it is, or a WebP of at most MAX_SIDE pixels if it is larger."""
    with _opened(path) as image:
        if max(image.size) <= MAX_SIDE:
            return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "WEBP", quality=86)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the four files of one evaluation beside its scores, or into `output`; returns the page.

    Raises ValueError for a folder that `rlg.evaluate` did not write.
    """
    run = read_run(folder)
    return _write(output or folder, [run], read_tiles(run), run.summary)


def write_joint_report(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Write one page on several evaluations into `output` (default: `report` beside the first); returns the page."""
    runs = [read_run(folder) for folder in folders]
    count = Counter(run.name for run in runs)
    runs = [replace(run, name=f"{run.name} ({run.folder})") if count[run.name] > 1 else run for run in runs]
    return _write(output or folders[0].parent / "report", runs, [], {"runs": {run.name: run.summary for run in runs}})


def _write(output: Path, runs: Sequence[Run], tiles: Sequence[Tile], summary: Mapping[str, Any]) -> Path:
    check_links(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    with matplotlib.rc_context(STYLE):
        curves = save(draw_curves(runs), output / "curves")
        front = save(pareto.draw_front(summary), output / "pareto") if len(runs) == 1 and runs[0].is_blend else None
    swept = runs[0].curve(runs[0].sweep)
    stops = sorted({w for tile in tiles for w in tile.frames}) or [point["w"] for point in swept]
    html = render(
        "report.html.template",
        runs=runs,
        tiles=tiles,
        stops=stops if len(runs) == 1 else [],
        rewards=reward_names(runs),
        mode_names=MODE_NAMES,
        named=_named(runs),
        swept=swept,
        symbol="λ" if runs[0].is_blend else "w",
        curves=curves,
        front=front,
    )
    page = output / "report.html"
    page.write_text(html, encoding="utf-8", errors="replace")  # JSON can hold half a surrogate pair, UTF-8 cannot
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints the page's path."""
    parser = Parser(prog="python -m rlg.report", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="DIR", help="evaluations; or training runs, sweeps, with evaluations")
    add(
        "--output",
        type=Path,
        help="where to write (default: an evaluation's folder, or `report` in or beside the first)",
    )
    add(
        "--metric",
        help="key of metrics.jsonl that training runs are compared by (default: the sweep's, or the reward)",
    )
    add("--wandb", metavar="ENTITY/PROJECT", help="publish the report on several runs there too, as a W&B Report")
    options = parser.parse_args(arguments)
    with fail_cleanly():
        from rlg.report_runs import is_run, write_runs_report  # which reads evaluations by this module
        from rlg.sweep_folder import is_sweep

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
