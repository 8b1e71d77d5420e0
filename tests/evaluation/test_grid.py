"""`python -m rlg.grid`: cells are those of plain evaluations, equal cost is equal, and work is not done twice."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rewards import lookup
from rlg import evaluate, grid
from rlg.evaluation.evaluator import Evaluator
from rlg.evaluation.folder import Job
from rlg.evaluation.methods import RLG, TWICE
from rlg.evaluation.rows import read_rows
from rlg.reports import heatmaps
from tests.support.page_width import assert_fits
from tests.support.paths import ROOT

pytestmark = pytest.mark.xdist_group("grid")  # one grid is made for all
CONFIGS = sorted((ROOT / "configs" / "eval").glob("grid_*.yaml"))
REWARD = "jpeg_compressibility"
SMALL = ["--num_prompts", "2", "--k", "1", "--cfg", "1", "--kernel", "ode", "--images", "1"]


def test_each_axis_has_its_config() -> None:
    axes = {yaml.safe_load(file.read_text())["axis"] for file in CONFIGS}
    assert axes == set(grid.AXES)


def test_help_lists_what_a_grid_takes() -> None:
    shown = grid.COMMAND.parser().format_help()
    assert "--axis" in shown and "--num_prompts" in shown
    assert not [name for name in grid.ELSEWHERE if f"  --{name} " in shown]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda f: f.stem)
def test_every_config_is_a_grid(config: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    plan = grid.parse(["--config", str(config), "--ckpt", str(tiny_checkpoint("sd3"))])
    written = yaml.safe_load(config.read_text())
    assert plan.scales == tuple(sorted(map(float, written["w"])))
    assert [heatmap_value(v) for v in plan.values] == [heatmap_value(v) for v in written.get("values", [None])]
    assert plan.output.name == f"sd3-{config.stem}-seed0"
    for value in plan.values:
        for w in plan.scales:
            source = plan.source(value, w)
            settings = plan.evaluations[source.folder].settings
            assert source.w in settings.scales and source.method in settings.methods
            passes = settings.steps * (2 if source.method == TWICE or w not in (0, 1) else 1)
            assert plan.axis != grid.STEPS or passes == 2 * value


def heatmap_value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


# --- the whole way


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A grid of steps x w on disk, and its arguments."""
    folder = tmp_path_factory.mktemp("grid") / "steps"
    arguments = ["--ckpt", str(tiny_checkpoint("sd3")), *SMALL, "--w", "0", "1", "2", "--output", str(folder)]
    arguments += ["--axis", "steps", "--values", "1", "2"]
    grid.main(arguments)
    return folder, arguments


def cells(folder: Path) -> dict[tuple[Any, float], dict]:
    table = json.loads((folder / grid.GRID).read_text())
    return {(row["value"], cell["w"]): cell for row in table["rows"] for cell in row["cells"]}


def test_a_grid_writes_its_files_and_a_folder_a_value(made: tuple[Path, list[str]]) -> None:
    folder, _ = made
    assert {f.name for f in folder.iterdir()} == {
        *("steps-1", "steps-2", "steps-4"),  # the last for the base at the cost of the row of 2
        *("grid.json", "grid.html", f"{REWARD}.png", f"{REWARD}.svg"),
    }
    for name in ("steps-1", "steps-2"):
        assert {f.name for f in (folder / name).iterdir()} >= {"scores.jsonl", "meta.json", "report.html"}
    only = {(row.method, row.w) for row in read_rows(folder / "steps-4" / "scores.jsonl")}
    assert only == {(RLG, 0.0)}
    page = (folder / "grid.html").read_text()
    assert page.count("<svg") == 1 and "<script" not in page and 'href="steps-2/report.html"' in page


def test_rows_of_steps_have_one_cost_and_the_right_images(made: tuple[Path, list[str]]) -> None:
    folder, _ = made
    found = cells(folder)
    assert found.keys() == {(s, w) for s in (1, 2) for w in (0.0, 1.0, 2.0)}
    for (steps, w), cell in found.items():
        assert cell["nfe_per_image"] == 2 * steps
        assert (cell["method"], cell["n"]) == (TWICE if w == 1 else RLG, 2)
        assert cell["folder"] == (f"steps-{2 * steps}" if w == 0 else f"steps-{steps}")


def test_a_cell_is_that_of_a_plain_evaluation(
    made: tuple[Path, list[str]], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, _ = made
    plain = ["--ckpt", str(tiny_checkpoint("sd3")), *SMALL, "--output", str(tmp_path / "plain"), "--method", RLG]
    evaluate.main([*plain, "--steps", "4", "--w", "0"])
    guided = ["--ckpt", str(tiny_checkpoint("sd3")), *SMALL, "--output", str(tmp_path / "guided")]
    evaluate.main([*guided, "--steps", "2", "--w", "1", "2"])
    scores = {
        (row.method, row.w, row.prompt_id): row.rewards[REWARD]
        for name in ("plain", "guided")
        for row in read_rows(tmp_path / name / "scores.jsonl")
    }
    ids = sorted({key[2] for key in scores})
    found = cells(folder)
    for w, mode in ((0.0, RLG), (1.0, TWICE), (2.0, RLG)):
        reward = found[2, w]["rewards"][REWARD]
        differences = [scores[mode, w, p] - scores[TWICE, 1.0, p] for p in ids]
        assert reward["mean"] == pytest.approx(sum(scores[mode, w, p] for p in ids) / 2, abs=1e-6)
        assert reward["delta_vs_tuned"] == pytest.approx(sum(differences) / 2, abs=1e-6)
        middle, half = sum(differences) / 2, abs(differences[0] - differences[1]) / 2
        expected = [middle - 12.706205 * half, middle + 12.706205 * half]  # t of one degree of freedom
        assert reward["delta_vs_tuned_ci95"] == pytest.approx(expected, abs=1e-6)
        assert not reward["differs"]  # two prompts never show
        assert reward["delta_vs_tuned"] != 0 or w == 1


def test_a_grid_goes_on_where_it_was(
    made: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, arguments = made
    before = (folder / "grid.json").read_text()
    jobs: list[Job] = []
    generate = Evaluator.generate
    monkeypatch.setattr(Evaluator, "generate", lambda self, unit: jobs.extend(unit) or generate(self, unit))
    grid.main(arguments)
    assert not jobs and (folder / "grid.json").read_text() == before
    assert capsys.readouterr().out.split() == [str(folder / "grid.html")]
    scores = folder / "steps-1" / "scores.jsonl"
    lines = scores.read_text().splitlines(keepends=True)
    lost = json.loads(lines[-1])
    scores.write_text("".join(lines[:-1]))
    grid.main(arguments)
    assert [(job.method, job.w, job.prompt_id) for job in jobs] == [(lost["method"], lost["w"], lost["prompt_id"])]
    assert scores.read_text().splitlines(keepends=True)[:-1] == lines[:-1]


# --- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--axis is needed: cfg, kernel, steps, schedule, none"),
        (["--axis", "beta"], "axis must be one of cfg, kernel, steps, schedule, none, got 'beta'"),
        (["--axis", "cfg"], "axis cfg needs --values, a row each"),
        (["--axis", "none", "--values", "1"], "axis none takes no --values"),
        (["--axis", "cfg", "--values", "much"], "argument --cfg: invalid float value: 'much'"),
        (["--axis", "sampler", "--values", "ode", "dpm"], "argument --kernel: invalid choice: 'dpm'"),
        (["--axis", "steps", "--values", "2.5"], "argument --steps: invalid int value: '2.5'"),
        (["--axis", "steps", "--values", "4", "0"], "--k, --steps and --batch_size must be at least 1"),
        (["--axis", "schedule", "--values", "cosine"], "unknown schedule of w 'cosine'"),
        (["--axis", "cfg", "--values", "1", "--cfg", "3"], "--cfg is the axis of the grid"),
        (["--axis", "cfg", "--values", "1", "--w", "0", "2"], "--w needs 1"),
        (["--axis", "none", "--origin", "x"], "a grid has no --origin"),
        (["--axis", "none", "--kl_budget", "2"], "a grid has no --kl_budget"),
        (["--axis", "none", "--blend", "0:1:0.5"], "a grid has no --blend"),
        (["--axis", "none", "--morl", "x"], "a grid has no --morl"),
        (["--axis", "none", "--ckpt", "x"], "a grid is of one tuned model, got 2 --ckpt"),
        (["--axis", "schedule", "--values", "linear_up", "--method", "corrected"], "method corrected is for a w that"),
        (["--axis", "steps", "--values", "4", "--schedule", "linear_up"], "axis steps compares at equal cost"),
        (["--axis", "none", "--schedule", "linear"], "unknown schedule of w 'linear'"),
        (["--config", "CONFIG"], "unknown option axes, did you mean axis?"),
    ],
)
def test_mistakes_are_one_line(
    options: list[str],
    message: str,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    config, output = tmp_path / "grid.yaml", tmp_path / "out"
    config.write_text("axes: cfg\n")
    options = [str(config) if text == "CONFIG" else text for text in options]
    with pytest.raises(SystemExit) as stopped:
        grid.main(["--ckpt", str(tiny_checkpoint("sd3")), "--output", str(output), *options])
    err = capsys.readouterr().err
    assert stopped.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert message in err and not output.exists()


def test_a_value_that_does_not_fit_the_model_is_refused_before_any_image(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--ckpt", str(tiny_checkpoint("sd")), "--output", str(tmp_path / "out"), "--axis", "sampler"]
    with pytest.raises(SystemExit):
        grid.main([*arguments, "--values", "ode", "cps"])
    assert "kernel 'cps' is for flow-matching models" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(made: tuple[Path, list[str]], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no grid of this axis"):
        grid.run(grid.parse([*made[1], "--output", str(tmp_path)]))
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


# --- the figures


def table(hostile: str = "fit", **changes: Any) -> dict[str, Any]:
    """A grid of two rows and three columns; at w = 2 the first row gains surely, the second on its own alone."""
    reward = {"mean": 0.5, "ci95": [0.4, 0.6], "delta_vs_tuned": 0.0, "delta_vs_tuned_ci95": [0.0, 0.0]}
    reward |= {"differs": False}
    cell = {"method": RLG, "folder": "f", "n": 6, "nfe_per_image": 8}
    rows = [
        {
            "value": value,
            "folder": f"cfg-{value}",
            "cells": [cell | {"w": w, "rewards": {hostile: deepcopy(reward)}} for w in (0.0, 1.0, 2.0)],
        }
        for value in (1.0, 3.0)
    ]
    for row, low, differs in zip(rows, (0.1, 0.05), (True, False), strict=True):
        delta = {"delta_vs_tuned": 0.25, "delta_vs_tuned_ci95": [low, 0.4], "differs": differs}
        row["cells"][2]["rewards"][hostile] |= delta
    meta = {"name": hostile, "base": "b", "adapter": "a", "trained_rewards": [hostile], "schedule": "constant"}
    return {
        "axis": "cfg",
        "scales": [0.0, 1.0, 2.0],
        "meta": meta,
        "units": {hostile: hostile},
        "rows": rows,
    } | changes


def texts(grid_table: dict[str, Any], reward: str = "fit") -> list[str]:
    axes = heatmaps.draw(grid_table, reward).axes[0]
    return [text.get_text() for text in axes.texts]


def test_cells_say_their_mean_and_mark_what_is_sure() -> None:
    found = texts(table())
    assert found.count("+0.25 ▲") == 1 and found.count("+0.25") == 1  # the second row's is sure on its own alone
    assert found.count("0.50") == 6 and found.count("+0.00") == 2  # w = 0 twice; w = 1 has no difference
    lower = table()
    lower["rows"][0]["cells"][2]["rewards"]["fit"] |= {"delta_vs_tuned": -0.25, "delta_vs_tuned_ci95": [-0.4, -0.1]}
    assert "-0.25 ▼" in texts(lower)


def test_rows_are_in_order_from_the_top_and_columns_are_named() -> None:
    axes = heatmaps.draw(table(), "fit").axes[0]
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["1", "3"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0\nbase", "1\ntuned", "2"]
    scheduled = heatmaps.draw(table(axis="schedule"), "fit").axes[0]
    assert [label.get_text() for label in scheduled.get_xticklabels()] == ["0", "1\ntuned", "2"]  # not the base
    steps = heatmaps.draw(table(axis="steps"), "fit").axes[0]
    assert [label.get_text() for label in steps.get_yticklabels()] == ["8", "8"]  # evaluations, not steps


def test_colours_are_symmetric_around_w_1() -> None:
    mesh = heatmaps.draw(table(), "fit").axes[0].collections[0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (-0.25, 0.25)
    assert mesh.get_array().tolist() == [[0, 0, 0.25], [0, 0, 0.25]]


@pytest.mark.parametrize(("largest", "decimals"), [(0.25, 2), (0.031, 3), (2.5, 1), (40, 0), (0, 2), (1e-12, 6)])
def test_two_digits_of_the_largest_difference(largest: float, decimals: int) -> None:
    assert heatmaps.decimals_of(largest) == decimals


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script><img src=http://evil.test/x> & a$b$/../.."
    page = heatmaps.write(table(hostile), tmp_path).read_text()
    assert "<script" not in page and "<img" not in page and "&lt;script&gt;" in page
    assert all(f.parent == tmp_path for f in tmp_path.rglob("*")) and len(list(tmp_path.iterdir())) == 3
    links = set(re.findall(r'\shref="([^"]*)"', page.partition("</head>")[2].replace("xlink:href", "")))
    assert {link for link in links if not link.startswith("#")} == {"cfg-1.0/report.html", "cfg-3.0/report.html"}


def test_units_are_the_rewards_own(made: tuple[Path, list[str]]) -> None:
    assert json.loads((made[0] / "grid.json").read_text())["units"] == {REWARD: lookup(REWARD).summary}


@pytest.mark.browser
def test_nothing_scrolls_sideways(made: tuple[Path, list[str]], browser: Any) -> None:
    """A map is one panel: on a phone it scrolls in its own box, and the page does not."""
    assert_fits(browser, made[0] / heatmaps.PAGE, stacked=0)
