"""Table and figure of `python -m rlg.benchmark guidance`.

python -m rlg.benchmark.guidance_figure runs/A/results.json runs/B/results.json --output docs/img/cost
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from rlg.benchmark.options import GuidanceOptions
from rlg.cli import fail_cleanly
from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class FigureOptions:
    """Options of `python -m rlg.benchmark.guidance_figure`."""

    results: tuple[Path, ...] = option(help="results.json, a panel each", metavar="RESULTS", place=0)
    output: Path = option(help="writes STEM.png and STEM.svg", metavar="STEM")


COMMAND = Command("python -m rlg.benchmark.guidance_figure", FigureOptions, __doc__)
if __name__ == "__main__":
    COMMAND.answer()

import json
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlg.io import tables
from rlg.io.spellings import canonical_keys
from rlg.reports.theme import INK, MUTED, PALETTE, STYLE, save
from rlg.stats import Estimate

Row = Mapping[str, Any]

_BASE = "base"


def _command(report: Row) -> dict[str, Any]:
    """The options of a results.json.

    Those of an older one have their present names.
    """
    names = [field.name for field in fields(GuidanceOptions)]
    return canonical_keys(report["command"], names, "results.json")


def table(report: Row) -> str:
    """The table in Markdown.

    It has a row for each mode, the cost of exact modes at small batches, and a sweep over w.
    """
    command, machine = _command(report), report["machine"]
    title = f"w = {command['w']:g}, {command['kernel'].upper()}, {command['steps']} steps, CFG {command['cfg']:g}"
    where = f"{machine['device']}, {machine['dtype']}, {machine['threads']} thread(s), load {machine['load']:g}, "
    where += f"torch {machine['torch']}, {machine['matmul_peak_gflops']:g} GFLOP/s at most"
    return (
        "\n\n".join([f"{title}; n = {report['n']} images of {report['prompts']} prompts; {where}", *_tables(report)])
        + "\n"
    )


def _tables(report: Row) -> list[str]:
    picks = picks_of(report)
    head = ["mode", "NFE", "s / image", "cost", "CPU cost", "peak MiB", "distance"]
    head += [report["reward"], "to full", "gain kept", "of that beyond w = 1"] if report["reward"] else []
    rows = [_row(result, picks, bool(report["reward"])) for result in report["results"]]
    parts = [tables.markdown(head, rows)]
    if report["batches"]:
        names = list(report["batches"][0]["cost"])
        rows = [[str(row["batch"]), *(_interval(row["cost"][name]) for name in names)] for row in report["batches"]]
        parts.append(tables.markdown(["images a batch: cost", *names], rows))
        parts.append(_throughput(report["batches"], report["saturates"]))
    sweep = report["sweep"]
    rows = [[name, f"{sweep['seconds'][name]:.3g}", _interval(sweep["cost"][name])] for name in sweep["cost"]]
    scales = ", ".join(f"{w:g}" for w in sweep["scales"])
    return [
        *parts,
        tables.markdown([f"sweep over w = {scales}; {sweep['images']} images each", "s / image", "cost"], rows),
    ]


def _throughput(batches: Sequence[Row], saturates: Mapping[str, int]) -> str:
    names = list(saturates)
    rows = [
        [str(row["batch"]), *(f"{row['images_per_second'][n]:.3g} ({row['utilisation'][n]:.0%})" for n in names)]
        for row in batches
    ]
    head = ["images a batch: images / s (FLOP utilisation)", *names]
    return tables.markdown(head, [*rows, ["saturates at", *(str(saturates[n]) for n in names)]])


def picks_of(report: Row) -> dict[str, str]:
    """The modes that a budget chose, by the aim of the choice.

    Without rewards, and in older results, there is one.
    """
    choice = report["choice"]
    if choice is None:
        return {}
    if not report["reward"]:
        return {"nearest": choice["mode"]}
    nearest = {"nearest": choice["nearest"]} if "nearest" in choice else {}
    return {"keeps most": choice["mode"], **nearest}


def _row(result: Row, picks: Mapping[str, str], scored: bool) -> list[str]:
    marks = [why for why, mode in picks.items() if mode == result["mode"]] or ["exact"] * result["exact"]
    mark = f" ({', '.join(marks)})" if marks else ""
    peak = "" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 2**20:.0f}"
    cells = [f"`{result['mode']}`{mark}", f"{result['nfe']:g}", f"{result['seconds']:.3g}"]
    cells += [_interval(result["cost"]), _interval(result["cpu_cost"]), peak, _interval(result["distance"])]
    if scored:
        cells += [f"{result['reward']:.3f}", _interval(result["to_full"], "+.3f")]
        cells += [_interval(result["kept"], ".0%"), _interval(result["beyond"], ".0%")]
    return cells


def _interval(estimate: Row | None, form: str = ".2f") -> str:
    return "-" if estimate is None else f"{Estimate(**estimate):{form}}"


def draw(*reports: Row) -> Figure:
    """Draw a panel for each report.

    It shows the gain kept (without rewards: the distance) against cost, and the front of the modes.
    """
    import matplotlib as mpl

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(6.5, 4.6 * len(reports)), 4.2), layout="constrained")
        for axes, report in zip(figure.subplots(1, len(reports), squeeze=False)[0], reports, strict=True):
            _panel(axes, report)
        return figure


def _panel(axes: Axes, report: Row) -> None:
    scored = any(result.get("kept") for result in report["results"])
    field, unit = ("kept", 100) if scored else ("distance", 1)
    clock = "cost" if "NVIDIA" in report["machine"]["device"] else "cpu_cost"
    command = report["command"]
    axes.set_title(f"{report['reward'] or 'distance to full guidance'}, w = {command['w']:g}")
    axes.set_xlabel("cost (the tuned model alone = 1)")
    axes.set_ylabel("% of the reward's gain kept" if scored else "distance (w = 1: 1)")
    shown = [r for r in report["results"] if r["mode"] != _BASE and r[field]]
    points = [(r[clock]["mean"], unit * r[field]["mean"]) for r in shown]
    best = front(points, up=scored)
    axes.plot(*zip(*best, strict=True), color=PALETTE[0], linewidth=1.2, drawstyle="steps-post", zorder=1)
    if scored:
        axes.axhline(97, color=MUTED, linewidth=0.7, linestyle=":")
    if command["budget"]:
        axes.axvline(command["budget"], color=MUTED, linewidth=0.7, linestyle=":")
    picks = set(picks_of(report).values())
    for (x, y), result in zip(points, shown, strict=True):
        low, high = (unit * result[field][end] for end in ("low", "high"))
        colour = PALETTE[1] if result["mode"] in picks else INK if result["exact"] else PALETTE[0]
        bars = [[max(0.0, y - low)], [max(0.0, high - y)]]
        axes.errorbar([x], [y], yerr=bars, fmt="o", color=colour, elinewidth=0.9, markersize=4.5)
        axes.annotate(result["mode"], (x, y), textcoords="offset points", xytext=(5, 4), fontsize=7, color=colour)


def front(points: Sequence[tuple[float, float]], up: bool) -> list[tuple[float, float]]:
    """The points that no cheaper one equals or beats, the cheapest first.

    up: whether more is better, or less.
    """
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda p: (p[0], -p[1] if up else p[1])):
        if not best or (y > best[-1][1] if up else y < best[-1][1]):
            best.append((x, y))
    return best


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line: one figure of several results.json."""
    with fail_cleanly():
        options = COMMAND.parse(argv)
        save(draw(*(json.loads(file.read_text(encoding="utf-8")) for file in options.results)), options.output)


if __name__ == "__main__":
    main()
