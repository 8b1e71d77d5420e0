"""A figure as a whole, and as a stack of its panels.

The first is for wide pages, the second for narrow ones.

The narrow one shows the parts of the whole one again, so that a mark of the page in one is a mark in the other. A page
hides one of the two, by the classes `whole` and `stacked`.
"""

from __future__ import annotations

from matplotlib.figure import Figure
from matplotlib.transforms import BboxBase

_POINTS = 72  # points of an inch
_MARGIN = 3.0  # points around a part
_HANDLE = 2.9  # width of a legend's line and the gap to its text, in font sizes: matplotlib's 2 + 0.8


def both(figure: Figure, svg: str, name: str) -> str:
    """HTML of a figure that `rlg.reports.theme.save` wrote as this SVG.

    name: an id that the page has once.
    """
    figure.draw_without_rendering()
    keys = "".join(_part(box, name, f' width="{box[2]:.0f}pt"') for box in _keys(figure))
    panels = "".join(_part(_box(figure, axes.get_tightbbox()), name) for axes in figure.axes if axes.get_visible())
    whole = svg.replace('id="figure_1"', f'id="{name}"', 1)
    return f'<div class="whole">{whole}</div><div class="stacked"><div>{keys}</div>{panels}</div>'


def _keys(figure: Figure) -> list[tuple[float, float, float, float]]:
    """Places of the entries of the figure's legends."""
    found = []
    for legend in figure.legends:
        for text in legend.get_texts():
            x, y, width, height = _box(figure, text.get_window_extent())
            reach = _HANDLE * text.get_fontsize()
            found.append((x - reach, y, width + reach, height))
    return found


def _box(figure: Figure, box: BboxBase) -> tuple[float, float, float, float]:
    """(x, y, width, height) in points from the top left.

    Those of matplotlib are in pixels from the bottom left.
    """
    scale = _POINTS / figure.dpi
    top = figure.get_figheight() * _POINTS - box.y1 * scale
    size = (box.width * scale + 2 * _MARGIN, box.height * scale + 2 * _MARGIN)
    return box.x0 * scale - _MARGIN, top - _MARGIN, *size


def _part(box: tuple[float, float, float, float], name: str, more: str = "") -> str:
    return f'<svg viewBox="{" ".join(f"{each:.1f}" for each in box)}"{more}><use href="#{name}"/></svg>'
