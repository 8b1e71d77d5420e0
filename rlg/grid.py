"""Guidance over a second axis besides w: CFG, sampler, steps at equal cost, or schedule of w. Heat maps and a page.

    python -m rlg.grid --config configs/eval/grid_cfg.yaml --ckpt runs/NAME/checkpoint-N

The config is that of an evaluation with an `axis` and its `values`. Each value gets an ordinary evaluation folder
inside the grid's, from the same prompts and noises, so the same command goes on where it was cut off, and each folder
has its own report. grid.json, REWARD.png, REWARD.svg and grid.html then show every cell's mean reward beside its
paired difference to w = 1 of the same row.

Axis `steps` compares at equal cost: a row is a budget of network evaluations. w = 0 and w = 1 take one pass a step and
every other w two, so in the row of S steps these two have 2 S: w = 1 is the evaluator's mode `tuned_2x_steps`, w = 0
the base in the folder of 2 S steps. In the other grids w = 0 and w = 1 cost half of what their row's other cells do.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlg import durable, eval_arguments, evaluate, heatmap, run_lock
from rlg.choose import GOALS
from rlg.cli import Parser, fail_cleanly
from rlg.config import check_links, read_json
from rlg.eval_folder import META, ROWS
from rlg.evaluator import RLG, TWICE
from rlg.stats import Row, bootstrap_mean, pair, paired_difference, read_rows
from rlg.together import together
from rlg.weight_schedule import CONSTANT, WeightSchedule

CFG, SAMPLER, STEPS, SCHEDULE, NONE = AXES = ("cfg", "sampler", "steps", "schedule", "none")
GRID = "grid.json"
ELSEWHERE = ("origin", "blend", *eval_arguments.OF_BLENDS, *GOALS)  # options of an evaluation on its own


@dataclass(frozen=True)
class Source:
    """Where the images of a cell are."""

    folder: str  # inside the grid's
    mode: str
    w: float


@dataclass(frozen=True)
class Plan:
    """What a grid is made of."""

    axis: str
    values: tuple[Any, ...]  # of the axis, a row each; (None,) for axis `none`
    scales: tuple[float, ...]  # values of w, a column each
    output: Path
    evaluations: dict[str, argparse.Namespace]  # folder inside the output -> arguments of rlg.evaluate

    def source(self, value: Any, w: float) -> Source:
        """The images of the cell of a row and a w."""
        if self.axis == STEPS and w == 1:
            return Source(folder_of(STEPS, value), TWICE, 1.0)
        return Source(folder_of(self.axis, 2 * value if self.axis == STEPS and w == 0 else value), RLG, w)


def folder_of(axis: str, value: Any) -> str:
    """Name of a row's evaluation folder."""
    return "all" if axis == NONE else f"{axis}-{_text(value)}".replace(":", "_")


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def build_parser() -> Parser:
    """The evaluator's command line, with an axis."""
    parser = eval_arguments.build_parser()
    parser.prog, parser.description = "python -m rlg.grid", __doc__.split("\n")[0]
    parser.usage = "%(prog)s --ckpt TUNED --axis AXIS --values VALUE [VALUE ...] [options]"
    for action in parser._actions:
        if action.dest in ELSEWHERE:  # parsed all the same, so that a YAML file that names one is told why not
            action.help = argparse.SUPPRESS
    parser.add_argument("--axis", choices=AXES, help="what varies besides w; steps: at equal network evaluations")
    parser.add_argument("--values", nargs="+", default=[], help="its values, a row of the heat maps each")
    return parser


def parse(argv: Sequence[str] | None) -> Plan:
    """The grid of a command line over a YAML file over the run's own settings. Raises ValueError."""
    args = eval_arguments.read_arguments(build_parser(), argv)
    scales = tuple(sorted({float(f"{w:g}") for w in args.scales}))
    if args.axis is None:
        raise ValueError(f"--axis is needed: {', '.join(AXES)}")
    if bool(args.values) == (args.axis == NONE):
        raise ValueError(f"axis {args.axis} " + ("takes no --values" if args.values else "needs --values, a row each"))
    if args.axis != NONE and getattr(args, args.axis) is not None:
        raise ValueError(f"--{args.axis} is the axis of the grid: give its --values, and no {args.axis} besides")
    if 1.0 not in scales:
        raise ValueError("--scales needs 1: every cell is compared with w = 1 of its row")
    if given := eval_arguments.given_of(args, ELSEWHERE):
        raise ValueError(f"a grid has no --{given[0]}; evaluate it on its own")
    if len(args.ckpts) > 1:
        raise ValueError(f"a grid is of one tuned model, got {len(args.ckpts)} --ckpt")
    if args.axis == STEPS and str(WeightSchedule.parse(args.schedule or CONSTANT)) != CONSTANT:
        raise ValueError(f"axis {STEPS} compares at equal cost, which a --schedule of w changes; leave it out")
    values = tuple(dict.fromkeys(_typed(args.axis, value) for value in args.values)) or (None,)
    home, stem = evaluate.home_of(args.ckpt)[1], args.config.stem if args.config else f"grid_{args.axis}"
    output = args.output or home / "eval" / f"{Path(args.ckpt).resolve().name}-{stem}-seed{args.seed}"
    rows = _rows(args, values, scales)
    evaluations = {name: _arguments(args, changes | {"output": output / name}) for name, changes in rows.items()}
    return Plan(args.axis, values, scales, output, evaluations)


def _typed(axis: str, text: str) -> Any:
    """A value of the axis, as the evaluator's command line reads it."""
    value = getattr(eval_arguments.build_parser().parse_args([f"--{axis}={text}"]), axis)
    return str(WeightSchedule.parse(value)) if axis == SCHEDULE else value


def _rows(args: argparse.Namespace, values: Sequence[Any], scales: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Folder -> what its arguments are besides those of all."""
    modes = list(dict.fromkeys([RLG, *(args.modes or []), *([TWICE] if args.axis == STEPS else [])]))
    if args.axis == NONE:
        return {folder_of(NONE, None): {"modes": modes}}
    rows = {folder_of(args.axis, value): {args.axis: value, "modes": modes} for value in values}
    if args.axis == STEPS and 0.0 in scales:
        for value in values:  # the base of the same cost, where it is not in another row's folder
            rows.setdefault(folder_of(STEPS, 2 * value), {STEPS: 2 * value, "modes": [RLG], "scales": [0.0]})
    return rows


def _arguments(args: argparse.Namespace, changes: Mapping[str, Any]) -> argparse.Namespace:
    return eval_arguments.complete(argparse.Namespace(**vars(args) | changes))


def check_output(plan: Plan) -> None:
    """Raise ValueError if the grid's folder holds something else, or a link that leads out of it."""
    check_links(plan.output)
    present = {file.name for file in run_lock.content(plan.output)}
    if present and not present & {GRID, *plan.evaluations}:
        raise ValueError(f"{plan.output} is not empty and holds no grid of this axis; give --output another folder")


def tabulate(plan: Plan) -> dict[str, Any]:
    """The content of grid.json, from the evaluations' rows.

    {"axis", "scales": [w], "meta": meta.json without the axis, "units": {REWARD: what it measures},
     "rows": [{"value", "folder", "cells": [{"w", "mode", "folder", "n", "nfe_per_image", "rewards": {REWARD:
     {"mean", "ci95": [lo, hi], "delta_vs_tuned", "delta_vs_tuned_ci95": [lo, hi]}}}]}]}; intervals are of 95%.
    """
    import rewards

    found: dict[Source, list[Row]] = defaultdict(list)
    for name in plan.evaluations:
        for row in read_rows(plan.output / name / ROWS):
            found[Source(name, row.mode, row.w)].append(row)
    first = read_json(plan.output / folder_of(plan.axis, plan.values[0]) / META)
    varied = {"created", "command", plan.axis}
    return {
        "axis": plan.axis,
        "scales": list(plan.scales),
        "meta": {key: value for key, value in first.items() if key not in varied},
        "units": {name.partition("=")[0]: rewards.lookup(name).summary for name in first["rewards"]},
        "rows": [_line(plan, value, found) for value in plan.values],
    }


def _line(plan: Plan, value: Any, found: Mapping[Source, list[Row]]) -> dict[str, Any]:
    reference = found[plan.source(value, 1.0)]
    cells = [_cell(plan.source(value, w), found, reference) for w in plan.scales]
    costs = {cell["nfe_per_image"] for cell in cells}
    assert plan.axis != STEPS or len(costs) == 1, f"a row of equal cost has {costs} network evaluations"
    return {"value": value, "folder": folder_of(plan.axis, value), "cells": cells}


def _cell(source: Source, found: Mapping[Source, list[Row]], reference: Sequence[Row]) -> dict[str, Any]:
    rows = found[source]
    return {
        "w": source.w,
        "mode": source.mode,
        "folder": source.folder,
        "n": len(rows),
        "nfe_per_image": sum(row.nfe for row in rows) / len(rows),
        "rewards": {name: _reward(name, rows, reference) for name in rows[0].rewards},
    }


def _reward(name: str, rows: Sequence[Row], reference: Sequence[Row]) -> dict[str, Any]:
    mean = bootstrap_mean([row.rewards[name] for row in rows], [row.prompt_id for row in rows])
    ours, theirs = zip(*pair(rows, reference), strict=True)
    values = ([row.rewards[name] for row in side] for side in (ours, theirs))
    delta = paired_difference(*values, [row.prompt_id for row in ours])
    return {
        "mean": mean.mean,
        "ci95": [mean.low, mean.high],
        "delta_vs_tuned": delta.mean,
        "delta_vs_tuned_ci95": [delta.low, delta.high],
    }


def run(plan: Plan) -> Path:
    """Evaluate every cell that is missing and write the heat maps; returns the page.

    Raises ValueError for settings of any row that do not fit the model, before the first image is made.
    """
    check_output(plan)
    for arguments in plan.evaluations.values():
        eval_arguments.settings_of(arguments)
    loaded = evaluate.load(next(iter(plan.evaluations.values())))
    evaluations = [evaluate.begin(arguments, loaded) for arguments in plan.evaluations.values()]
    with ExitStack() as stack:
        with together():
            if loaded.state.is_main_process:
                stack.enter_context(run_lock.held(plan.output))
        evaluate.finish(evaluations, loaded)
        if loaded.state.is_main_process:
            grid = tabulate(plan)
            durable.write_text(plan.output / GRID, json.dumps(grid, indent=1, allow_nan=False) + "\n")
            print(heatmap.write(grid, plan.output))
    return plan.output / heatmap.PAGE


def main(argv: Sequence[str] | None = None) -> None:
    """Command line; prints the page's path."""
    with fail_cleanly():
        run(parse(argv))


if __name__ == "__main__":
    main()
