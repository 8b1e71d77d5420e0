"""Guidance over a second axis besides w: heat maps and a page.

    python -m rlg.grid --config configs/eval/grid_cfg.yaml --ckpt runs/NAME/checkpoint-N

The axis is CFG, sampler, steps at equal cost, or schedule of w. The config is that of an evaluation, with an `axis`
and its `values`. Each value gets an ordinary evaluation folder inside the grid's, with its own report. All have the
same prompts and noises. The same command continues a grid that was cut off. The results show every cell's mean reward,
and its paired difference to w = 1 of the same row.

    results       grid.json, REWARD.png, REWARD.svg, grid.html
    axis steps    a row is a budget of network evaluations; w = 0 and w = 1 take one pass a step and all others two,
                  so in the row of S steps these two have 2 S: w = 1 is `tuned_2x_steps`, w = 0 the base of 2 S steps
    other axes    w = 0 and w = 1 cost half of the other cells in their row
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.choices import AXES
from rlg.config_parser import Command, option
from rlg.evaluation import options as evaluation
from rlg.evaluation.choose_w import GOALS
from rlg.io.spellings import canonical

ELSEWHERE = ("origin", "blend", *evaluation.OF_BLENDS, *GOALS)  # a grid refuses these options of an evaluation


@dataclass(frozen=True, kw_only=True)
class GridOptions(evaluation.EvalOptions):
    """Options of `python -m rlg.grid`: those of an evaluation, and an axis.

    Raises ValueError for an unknown axis.
    """

    config: Path | None = None  # its name becomes part of the folder's name
    axis: str | None = option(None, f"what varies besides w: {', '.join(AXES)}; steps: at equal network evaluations")
    values: tuple[str, ...] = option((), "its values, a row of the heat maps each")

    def __post_init__(self) -> None:
        axis = self.axis and canonical(self.axis, AXES)
        if axis is not None and axis not in AXES:
            raise ValueError(f"axis must be one of {', '.join(AXES)}, got {axis!r}")
        object.__setattr__(self, "axis", axis)


COMMAND = Command(
    "python -m rlg.grid", GridOptions, "Guidance over a second axis besides w: heat maps and a page.", ELSEWHERE
)
if __name__ == "__main__":
    COMMAND.answer()

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from rlg import evaluate
from rlg.choices import CONSTANT
from rlg.cli import fail_cleanly
from rlg.distributed import together
from rlg.evaluation import naming
from rlg.evaluation.methods import RLG, TWICE
from rlg.evaluation.request import EvalRequest
from rlg.evaluation.rows import Row, pair, read_rows
from rlg.evaluation.summary import columns_of, difference, named
from rlg.guidance.weight_schedule import WeightSchedule
from rlg.io import atomic, folders
from rlg.io.folders import check_links
from rlg.io.parsing import read_json
from rlg.io.run_folder import EVALUATIONS, META, ROWS
from rlg.reports import heatmaps
from rlg.stats import Estimate, family, grouped_mean

CFG, KERNEL, STEPS, SCHEDULE, NONE = AXES
GRID = "grid.json"
_META_KEY = {KERNEL: "sampler"}  # key of an axis in meta.json, if it has another name there


@dataclass(frozen=True)
class Source:
    """The place of a cell's images."""

    folder: str  # name inside the grid's folder
    method: str
    w: float


@dataclass(frozen=True)
class Plan:
    """A grid with its evaluations."""

    axis: str
    values: tuple[Any, ...]  # values of the axis, one a row; (None,) for axis `none`
    scales: tuple[float, ...]  # values of w, one a column
    output: Path
    evaluations: dict[str, EvalRequest]  # keys are names of folders inside the output

    def source(self, value: Any, w: float) -> Source:
        """The place of the images of a cell.

        value: the row's value of the axis.
        """
        if self.axis == STEPS and w == 1:
            return Source(folder_of(STEPS, value), TWICE, 1.0)
        return Source(folder_of(self.axis, 2 * value if self.axis == STEPS and w == 0 else value), RLG, w)


def folder_of(axis: str, value: Any) -> str:
    """Name of a row's evaluation folder."""
    return "all" if axis == NONE else f"{axis}-{_text(value)}".replace(":", "_")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(argv: Sequence[str] | None) -> Plan:
    """The grid that a command line requests.

    The command line overrides a YAML file, which overrides the run's own settings. Raises ValueError.
    """
    options = evaluation.read(COMMAND, argv)
    scales = tuple(sorted({float(f"{w:g}") for w in options.w}))
    if options.axis is None:
        raise ValueError(f"--axis is needed: {', '.join(AXES)}")
    if bool(options.values) == (options.axis == NONE):
        raise ValueError(
            f"axis {options.axis} " + ("takes no --values" if options.values else "needs --values, a row each")
        )
    if options.axis != NONE and getattr(options, options.axis) is not None:
        raise ValueError(f"--{options.axis} is the axis of the grid: give its --values, and no {options.axis} besides")
    if 1.0 not in scales:
        raise ValueError("--w needs 1: every cell is compared with w = 1 of its row")
    if given := evaluation.given_of(options, ELSEWHERE):
        raise ValueError(f"a grid has no --{given[0]}; evaluate it on its own")
    if len(options.ckpt) > 1:
        raise ValueError(f"a grid is of one tuned model, got {len(options.ckpt)} --ckpt")
    if options.axis == STEPS and str(WeightSchedule.parse(options.schedule or CONSTANT)) != CONSTANT:
        raise ValueError(f"axis {STEPS} compares at equal cost, which a --schedule of w changes; leave it out")
    values = tuple(dict.fromkeys(_typed(options.axis, value) for value in options.values)) or (None,)
    models = evaluation.models_of(options)
    home, stem = naming.home_of(models[0])[1], options.config.stem if options.config else f"grid_{options.axis}"
    output = options.output or home / EVALUATIONS / f"{Path(models[0].path).resolve().name}-{stem}-seed{options.seed}"
    rows = _rows(options.axis, values, scales, options.method or ())
    evaluations = {
        name: evaluation.varied(options, row | {"output": output / name}, models) for name, row in rows.items()
    }
    return Plan(options.axis, values, scales, output, evaluations)


def _typed(axis: str, text: str) -> Any:
    """A value of the axis, converted as by the evaluator's command line."""
    value = getattr(evaluation.COMMAND.parse([f"--{axis}={text}"]), axis)
    return str(WeightSchedule.parse(value)) if axis == SCHEDULE else value


def _rows(axis: str, values: Sequence[Any], scales: Sequence[float], more: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The own options of each folder's evaluation.

    more: methods that the user requested.
    """
    methods = tuple(dict.fromkeys([RLG, *more, *([TWICE] if axis == STEPS else [])]))
    if axis == NONE:
        return {folder_of(NONE, None): {"method": methods}}
    rows = {folder_of(axis, value): {axis: value, "method": methods} for value in values}
    if axis == STEPS and 0.0 in scales:
        for value in values:  # the base of the same cost may already be in another row's folder
            rows.setdefault(folder_of(STEPS, 2 * value), {STEPS: 2 * value, "method": (RLG,), "w": (0.0,)})
    return rows


def check_output(plan: Plan) -> None:
    """Raise ValueError if the grid's folder holds something else.

    A link that leads out of it is refused as well.
    """
    check_links(plan.output)
    present = {file.name for file in folders.content(plan.output)}
    if present and not present & {GRID, *plan.evaluations}:
        raise ValueError(f"{plan.output} is not empty and holds no grid of this axis; give --output another folder")


def tabulate(plan: Plan) -> dict[str, Any]:
    """The content of grid.json, from the evaluations' rows.

        {"axis", "scales": [w], "meta": meta.json without the axis, "units": {REWARD: what it measures},
         "rows": [{"value", "folder", "cells": [{"w", "method", "folder", "n", "nfe_per_image", "rewards": {REWARD:
         {"mean", "ci95": [lo, hi], "delta_vs_tuned", "delta_vs_tuned_ci95": [lo, hi], "differs": bool}}}]}]}

    Intervals are of 95%, for each cell alone. `differs` judges all cells of a reward together. If no cell differs in
    truth, some cell is said to differ in 5% of grids (`stats.family`).
    """
    import rewards

    found: dict[Source, list[Row]] = defaultdict(list)
    for name in plan.evaluations:
        for row in read_rows(plan.output / name / ROWS):
            found[Source(name, row.method, row.w)].append(row)
    differs = _judge(plan, found)
    first = read_json(plan.output / folder_of(plan.axis, plan.values[0]) / META)
    varied = {"created", "command", _META_KEY.get(plan.axis, plan.axis)}
    return {
        "axis": plan.axis,
        "scales": list(plan.scales),
        "meta": {key: value for key, value in first.items() if key not in varied},
        "units": {name.partition("=")[0]: rewards.lookup(name).summary for name in first["rewards"]},
        "rows": [_line(plan, value, found, differs) for value in plan.values],
    }


def _judge(plan: Plan, found: Mapping[Source, list[Row]]) -> set[tuple[Source, str]]:
    """`(cell, reward)` for cells that surely differ from their row's w = 1.

    All cells of a reward are judged together.
    """
    cells = [(value, w) for value in plan.values for w in plan.scales if w != 1]
    matched = {
        plan.source(value, w): pair(found[plan.source(value, w)], found[plan.source(value, 1.0)]) for value, w in cells
    }
    if not matched:
        return set()
    names = next(iter(matched.values()))[0][0].rewards
    differs = set()
    for name in names:
        columns = (columns_of(rows, name) for rows in matched.values())
        sure_P = family([(np.subtract(ours, theirs), prompts) for ours, theirs, prompts in columns]).sure_P
        differs |= {(source, name) for source, sure in zip(matched, sure_P, strict=True) if sure}
    return differs


def _line(
    plan: Plan, value: Any, found: Mapping[Source, list[Row]], differs: set[tuple[Source, str]]
) -> dict[str, Any]:
    reference = found[plan.source(value, 1.0)]
    cells = [_cell(plan.source(value, w), found, reference, differs) for w in plan.scales]
    costs = {cell["nfe_per_image"] for cell in cells}
    assert plan.axis != STEPS or len(costs) == 1, f"a row of equal cost has {costs} network evaluations"
    return {"value": value, "folder": folder_of(plan.axis, value), "cells": cells}


def _cell(
    source: Source, found: Mapping[Source, list[Row]], reference: Sequence[Row], differs: set[tuple[Source, str]]
) -> dict[str, Any]:
    rows = found[source]
    return {
        "w": source.w,
        "method": source.method,
        "folder": source.folder,
        "n": len(rows),
        "nfe_per_image": sum(row.nfe for row in rows) / len(rows),
        "rewards": {
            name: _reward(name, rows, reference) | {"differs": (source, name) in differs} for name in rows[0].rewards
        },
    }


def _reward(name: str, rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, Any]:
    mean = grouped_mean([row.rewards[name] for row in rows], [row.prompt_id for row in rows])
    delta = Estimate(0.0, 0.0, 0.0) if rows is reference else difference(pair(rows, reference), name)
    return {"mean": mean.mean, "ci95": [mean.low, mean.high], **named("delta_vs_tuned", delta)}


def run(plan: Plan) -> Path:
    """Evaluate every missing cell and write the heat maps.

    Returns the page. Raises ValueError for settings of any row that do not fit the model, before the first image is
    made.
    """
    check_output(plan)
    loaded = evaluate.load(next(iter(plan.evaluations.values())))
    evaluations = [evaluate.begin(each, loaded) for each in plan.evaluations.values()]
    with ExitStack() as stack:
        with together():
            if loaded.state.is_main_process:
                stack.enter_context(folders.held(plan.output))
        evaluate.finish(evaluations, loaded)
        if loaded.state.is_main_process:
            grid = tabulate(plan)
            atomic.write_text(plan.output / GRID, json.dumps(grid, indent=1, allow_nan=False) + "\n")
            print(heatmaps.write(grid, plan.output))
    return plan.output / heatmaps.PAGE


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; prints the page's path."""
    with fail_cleanly():
        run(parse(argv))


if __name__ == "__main__":
    main()
