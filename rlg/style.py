"""How figures and pages look: one palette and one set of rules for every panel, and how they are written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

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
MODE_NAMES = {
    "rlg": "guided (RLG)",
    "lora_scale": "LoRA × w",
    "tuned_2x_steps": "tuned, 2× steps",
    "rlg_ls": "base or tuned at random",
    "corrected": "guided, corrected",
    "blend": "blend (DB-MPA)",
    "blend_ls": "one expert a step (DB-MPA-LS)",
    "soup": "weights averaged (soup)",
    "expert": "expert alone",
    "morl": "trained on a mix (MORL)",
}
HOLLOW = {"markerfacecolor": "white"}
MARKS = {
    "rlg": {"linestyle": "-", "marker": "o", "zorder": 3.2},
    "lora_scale": {"linestyle": (0, (4, 2)), "marker": "s", **HOLLOW, "zorder": 3.0},
    "tuned_2x_steps": {"linestyle": "none", "marker": "D", "zorder": 3.1},
    "rlg_ls": {"linestyle": (0, (1, 1.5)), "marker": "^", **HOLLOW, "zorder": 3.0},
    "corrected": {"linestyle": (0, (1, 1.5)), "marker": "v", "zorder": 3.15},
    "blend": {"linestyle": "-", "marker": "o", "zorder": 3.2},
    "blend_ls": {"linestyle": (0, (1, 1.5)), "marker": "^", **HOLLOW, "zorder": 3.1},
    "soup": {"linestyle": (0, (4, 2)), "marker": "s", **HOLLOW, "zorder": 3.0},
    "expert": {"linestyle": "none", "marker": "*", "zorder": 3.4},
    "morl": {"linestyle": "none", "marker": "D", "zorder": 3.3},
}
_PLACE = dict(rlg=0, lora_scale=1, tuned_2x_steps=2, rlg_ls=3, corrected=4, blend=0, blend_ls=3, soup=1, morl=2)
COLOURS = {mode: PALETTE[place] for mode, place in _PLACE.items()} | {"expert": INK}


def save(figure: Figure, stem: Path) -> str:
    """Write STEM.png and STEM.svg; returns the SVG as `inline_svg` does. The same numbers make the same files."""
    png, svg = (stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg"))
    figure.savefig(png, dpi=150)
    figure.savefig(svg, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")), transparent=True)
    return inline_svg(svg.read_text(encoding="utf-8"))


def inline_svg(svg: str) -> str:
    """The <svg> element, its colours as CSS variables (it follows the page into the dark), its cursors left to CSS."""
    svg = re.sub(r'; stroke-opacity: 0(?=[;"])', "", svg[svg.index("<svg") :])
    names = {INK: "ink", MUTED: "muted", GRID: "line", FALL: "bad", "#ffffff": "panel"}
    names |= {colour: f"c{i}" for i, colour in enumerate(PALETTE)}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def render(template: str, **values: Any) -> str:
    """A page from a template beside this file; what is missing is an error, and text stays text."""
    options = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), **options)
    return environment.get_template(template).render(**values)
