"""Show the images of an evaluation side by side.

    python -m rlg.contact_sheet runs/NAME/eval/ID --w 0 1 2 --output sheet.png

A column is a prompt, and a row is a w. The images of a column have the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class SheetOptions:
    """Options of `python -m rlg.contact_sheet`."""

    folder: Path = option(help="an evaluation", metavar="DIR", place=0)
    w: tuple[float, ...] | None = option(None, "values of w, a row each (default: all)")
    columns: int = option(8, "prompts")
    output: Path = option(help="a .png")


COMMAND = Command(
    "python -m rlg.contact_sheet",
    SheetOptions,
    "The images of an evaluation side by side: a column a prompt, from one noise, and a row a w.",
)
if __name__ == "__main__":
    COMMAND.answer()

import textwrap
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from rlg.cli import fail_cleanly
from rlg.io.run_folder import IMAGES, image_name
from rlg.reports.evaluation_data import Run, read_run
from rlg.reports.theme import GRID, INK, STYLE

_INCHES = 1.05  # side of a cell, in inches
_WRAP = 18  # characters of a prompt in a line


def _image(run: Run, prompt: int, w: float) -> Path:
    return run.folder / IMAGES / image_name(prompt, 0, w)


def draw(run: Run, scales: Sequence[float], columns: int) -> Figure:
    """The first images of the first prompts at each w.

    Raises ValueError for an image that the folder lacks.
    """
    prompts = {row.prompt_id: row.prompt for row in run.rows}
    kept = {row.prompt_id for row in run.rows if row.k == 0 and _image(run, row.prompt_id, row.w).is_file()}
    chosen = sorted(kept)[:columns]
    if not chosen:
        raise ValueError(f"{run.folder} has no images; `rlg.evaluate --images N` keeps some")
    figure = Figure(figsize=(_INCHES * (len(chosen) + 0.7), _INCHES * (len(scales) + 0.45)), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    table = figure.subplots(len(scales), len(chosen), squeeze=False)
    for line, w in zip(table, scales, strict=True):
        for axes, prompt in zip(line, chosen, strict=True):
            _show(axes, _image(run, prompt, w))
        name = f"\n{run.named[w]}" if w in run.named else ""
        line[0].set_ylabel(f"w = {w:g}{name}", rotation=0, ha="right", va="center", color=INK, fontsize=9)
    for axes, prompt in zip(table[0], chosen, strict=True):
        axes.set_title(textwrap.fill(prompts[prompt], _WRAP), loc="center", fontsize=7, fontweight="normal", pad=4)
    return figure


def _show(axes: Axes, file: Path) -> None:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; --w are those of the evaluation")
    with Image.open(file, formats=["PNG"]) as image:
        axes.imshow(image.convert("RGB"), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set(visible=True, color=GRID)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; prints the path of the picture."""
    with fail_cleanly(), matplotlib.rc_context(STYLE):
        options = COMMAND.parse(argv)
        run = read_run(options.folder)
        scales = options.w or sorted({row.w for row in run.rows if row.method == run.sweep})
        draw(run, scales, options.columns).savefig(options.output, dpi=150)
        print(options.output)


if __name__ == "__main__":
    main()
