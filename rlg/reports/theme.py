"""Look of figures and pages: one palette, and one set of rules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from rlg.evaluation.methods import METHODS
from rlg.io import public_names
from rlg.io.tables import number
from rlg.stats import CONFIDENCE, PERCENT, interval_text

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito, safe for colour-blind eyes
INK, MUTED, GRID, FALL = "#1d232b", "#6b7583", "#e3e7ec", "#b04a00"
STYLE = {
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), MUTED),
    **dict.fromkeys(("text.color", "axes.titlecolor"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("font.size", "axes.titlesize"), 10),
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 16,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "rlg",
    "text.parse_math": False,  # a reward may be called a$b$
}
HOLLOW = {"markerfacecolor": "white"}
MARKS = {
    name: {"linestyle": mark.line, "marker": mark.marker, "zorder": mark.order} | (HOLLOW if mark.hollow else {})
    for name, mark in ((name, method.mark) for name, method in METHODS.items())
}
COLOURS = {name: INK if m.mark.place is None else PALETTE[m.mark.place] for name, m in METHODS.items()}


def save(figure: Figure, stem: Path) -> str:
    """Write STEM.png and STEM.svg; return the SVG as `inline_svg` does.

    The same numbers make the same files.
    """
    png, svg = (stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg"))
    figure.savefig(png, dpi=150)
    figure.savefig(svg, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    return inline_svg(svg.read_text(encoding="utf-8"))


def inline_svg(svg: str) -> str:
    """The <svg> element for a page.

    Its colours are CSS variables, so that it follows the page into the dark. CSS shows its cursors.
    """
    svg = re.sub(r'; stroke-opacity: 0(?=[;"])', "", svg[svg.index("<svg") :])
    names = {INK: "ink", MUTED: "muted", GRID: "line", FALL: "bad", "#ffffff": "panel"}
    names |= {colour: f"c{i}" for i, colour in enumerate(PALETTE)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, folder: Path = TEMPLATES, **values: Any) -> str:
    """Render a template of a folder.

    A missing value is an error, and text stays text. The filters `public` and `command` are for settings, which may
    hold paths and servers of this machine. `number` is the one format of measured numbers, `ends` that of their
    intervals.
    """
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), **options)
    environment.filters |= {"public": public_names.value, "command": public_names.command}
    environment.filters |= {"number": number, "ends": _ends, "plain_ends": _plain_ends}
    error = 100 * (1 - CONFIDENCE)
    environment.globals |= {"confidence": PERCENT, "error": f"{error:g}%", "half_error": f"{error / 2:g}%"}
    return environment.get_template(template).render(**values)


def _ends(interval: Sequence[float], digits: int = 4) -> str:
    return interval_text(interval, lambda end: number(end, digits))


def _plain_ends(interval: Sequence[float], form: str, unit: float = 1) -> str:
    return interval_text(interval, lambda end: format(unit * end, form))
