"""The report on several runs: what is read, joined and compared, by hand; hostile text; the files that are written."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rlg import report
from rlg.reports import comparison_data, comparison_figures, theme
from rlg.reports.comparison_data import best_of, collect, frontier, planes
from rlg.reports.comparison_page import write_runs_report
from rlg.runs.sweep_folder import SWEEP, Sweep, SweepRun, write_sweep
from tests.support.page_width import assert_fits

HOSTILE = "</script><img src=http://evil.test/x onerror=alert(1)> & 'b'"
META = {
    "base": "tiny",
    "adapter": "runs/a/checkpoint-1",
    "name": "a",
    "trained_rewards": ["fit"],
    "steps": 4,
    "cfg": 1.0,
    "sampler": "sde",
    "level": 0.7,
    "seed": 0,
    "k": 2,
}


def score(w: float, mean: float, kl: float | None = None, prompts: int = 4) -> list[dict[str, Any]]:
    """Two images of each prompt at a w; image (p, k) is 0.1 p + 0.01 k above the mean."""
    common = {
        "prompt": "x",
        "tag": None,
        "seed": 0,
        "w": w,
        "sampler": "sde",
        "method": "rlg",
        "nfe": 8,
        "seconds": 0.1,
    }
    return [
        common
        | {"prompt_id": p, "k": k, "rewards": {"held": -w, "fit": mean + 0.1 * p + 0.01 * k}}
        | {"kl": w**2 if kl is None else kl, "diversity": None}
        for p in range(prompts)
        for k in range(2)
    ]


def evaluation(folder: Path, rows: list[dict[str, Any]], **meta: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta.json").write_text(json.dumps(META | meta | {"command": str(folder), "created": folder.name}))
    return folder


def training(folder: Path, rewards: list[float], max_steps: int = 3, **config: Any) -> Path:
    folder.mkdir(parents=True)
    row = {"name": folder.name, "reward": ["fit"], "max_steps": max_steps, "beta": 0.0, "learning_rate": 1e-3}
    (folder / "config.yaml").write_text(yaml.safe_dump(row | config))
    lines = [{"step": i + 1, "reward": r, "reward/fit": r, "kl": 0.1 * i} for i, r in enumerate(rewards)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two training runs, the first of them evaluated."""
    first = training(tmp_path / "a", [1.0, 2.0, 3.0], beta=0.1)
    evaluation(first / "eval" / "one", score(0, 0.0) + score(1, 1.0) + score(2, 1.5))
    return [first, training(tmp_path / "b", [1.0, 1.5], learning_rate=1e-2)]


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs.csv").open() as file:
        return list(csv.DictReader(file))


def test_training_runs_and_their_evaluations(runs: list[Path]) -> None:
    page = write_runs_report(runs)
    assert page == runs[0].parent / "report" / "report.html"
    rows = table(page.parent)
    assert [(r["kind"], r["name"], r["status"], r["iterations"], r["reward/fit"]) for r in rows] == [
        ("run", "a", "finished", "3", "3.0"),
        ("run", "b", "interrupted", "2", "1.5"),
        ("evaluation", "a", "finished", "", ""),
    ]
    assert (rows[0]["beta"], rows[1]["learning_rate"]) == ("0.1", "0.01")
    assert "max_steps" not in rows[0]  # they do not differ in it
    best = rows[2]
    assert (best["trained_reward"], best["best_w"], best["n"]) == ("fit", "2.0", "4")
    assert float(best["mean"]) == pytest.approx(1.5 + 0.2 + 0.005)  # of prompts 1 and 3
    assert float(best["delta_vs_tuned"]) == pytest.approx(0.5)
    assert float(best["delta_low"]) == pytest.approx(0.5)  # paired: prompts cancel
    assert float(best["kl"]) == 4
    for name in ("frontier", "parameters", "best_w"):
        with Image.open(page.parent / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(2**24)) > 50
    html = page.read_text()
    assert len(re.findall("<svg(?! viewBox)", html)) == 3
    assert not re.search(r'(?:src|href)="(?!data:|#)', html)
    assert "2 runs, 1 evaluations" in html


def test_the_command_line_tells_runs_from_evaluations(
    runs: list[Path], capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    report.main([str(runs[0])])
    assert capsys.readouterr().out == f"{runs[0] / 'report' / 'report.html'}\n"
    one = runs[0] / "eval" / "one"
    report.main([str(one)])
    assert capsys.readouterr().out == f"{one / 'report.html'}\n"
    assert (one / "curves.png").is_file()
    report.main([str(runs[1]), str(one), "--output", str(tmp_path / "joint"), "--metric", "kl"])
    assert table(tmp_path / "joint")[0]["kl"]
    for arguments, message in {
        (runs[0], tmp_path / "none"): "holds no sweep, no training run and no evaluation",
        (runs[0], "--metric", "none"): "no run has the metric 'none'",
        (one, "--metric", "kl"): "only evaluations are given",
        (tmp_path / "none",): "scores.jsonl does not exist",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            report.main([*map(str, arguments)])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


def test_evaluations_that_differ_by_w_alone_are_one_curve(tmp_path: Path) -> None:
    """As an evaluation's sweep over w leaves them; an evaluation with other steps is another curve."""
    names = {0: 0.0, 1: 1.0, 3: 0.5}
    folders = [evaluation(tmp_path / f"w{w}", score(w, mean)) for w, mean in names.items()]
    folders.append(evaluation(tmp_path / "other", score(1, 5.0), steps=8))
    found = collect(folders).evaluations
    assert [run.name for run in found] == ["a, steps 4", "a, steps 8"]
    assert [point["w"] for point in found[0].points("rlg")] == [0, 1, 3]
    assert best_of(found[0]).found.w == 1
    last = found[0].points("rlg")[-1]["rewards"]["fit"]
    assert last["delta_vs_tuned"] == pytest.approx(-0.5)  # paired across folders


def test_the_frontier_by_hand(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a", score(0, 0.0, 0) + score(1, 1.0, 2) + score(2, 2.0, 9))
    b = evaluation(tmp_path / "b", score(0, 0.0, 0) + score(1, 1.5, 3) + score(2, 1.4, 4), adapter="b")
    c = evaluation(tmp_path / "c", score(1, 9.0, 1), base="another")
    found = planes(collect([a, b, c]).evaluations)
    assert sorted(found) == [("another", "fit"), ("tiny", "fit")]
    front = frontier(found["tiny", "fit"])
    assert [(point.run.summary["adapter"], point.row["w"], point.row["kl"]) for point in front] == [
        (META["adapter"], 0, 0),
        (META["adapter"], 1, 2),
        ("b", 1, 3),
        (META["adapter"], 2, 9),
    ]
    assert comparison_data.mixed(found["tiny", "fit"]) == []


def test_a_sweep(tmp_path: Path) -> None:
    config = {"program": "x", "method": "random", "metric": {"name": "loss"}, "parameters": {}}  # less is better
    made = [
        SweepRun("run-000", {"beta": 0.1, "kind": "u", "fixed": 1}, "finished", 0.5),
        SweepRun("run-001", {"beta": 10.0, "kind": "v", "fixed": 1}, "finished", 0.2),
        SweepRun("run-002", {"beta": 1.0, "kind": "v", "fixed": 1}, "failed", None, error="boom"),
    ]
    write_sweep(tmp_path / "s", Sweep(config, 0, made))
    comparison = collect([tmp_path / "s"])
    assert (comparison.metric, comparison.maximise, comparison.swept) == ("loss", False, ["beta", "kind"])
    assert [entry.name for entry in comparison.ranked()] == ["run-001", "run-000", "run-002"]
    page = write_runs_report([tmp_path / "s"])
    assert page.parent == tmp_path / "s" / "report"
    assert [r["loss"] for r in table(page.parent)] == ["0.2", "0.5", ""]
    assert not (page.parent / "frontier.png").exists()
    assert "less is better" in page.read_text()
    write_sweep(tmp_path / "t", Sweep(config, 0, made[:1]))
    names = [entry.name for entry in collect([tmp_path / "s", tmp_path / "t"]).entries]
    assert names == ["s/run-000", "run-001", "run-002", "t/run-000"]


def test_scales_of_parallel_coordinates() -> None:
    log = comparison_figures.Scale([1e-4, 1e-2, 1e-3])
    assert log.is_log
    assert [log.at(v) for v in (1e-4, 1e-3, 1e-2)] == pytest.approx([0, 0.5, 1])
    line = comparison_figures.Scale([2, 4, 6])
    assert not line.is_log
    assert (line.at(2), line.at(4), line.at(6)) == (0, 0.5, 1)
    named = comparison_figures.Scale(["sde", "ode", True])
    assert [label for _, label in named.ticks()] == ["True", "ode", "sde"]
    assert comparison_figures.Scale([3, 3]).at(3) == 0.5
    assert len(comparison_figures.Scale(list(range(1, 30))).ticks()) == 3


def test_colours_rank_runs() -> None:
    low, high, absent = comparison_figures.ranked([1.0, 2.0, None])
    assert (low, high, absent) == ("#8fb0cc", "#d55e00", theme.MUTED)


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    a = training(tmp_path / "a", [1.0, 2.0], note=HOSTILE)
    b = training(tmp_path / "b", [1.0, 2.5], note="plain")
    evaluation(a / "eval" / "x", score(1, 1.0) + score(2, 2.0), name=HOSTILE, base=HOSTILE)
    html = write_runs_report([a, b]).read_text()
    assert "<img" not in html and "<script" not in html
    assert "&lt;/script&gt;" in html


def test_an_evaluation_that_has_only_begun_is_left_out(runs: list[Path]) -> None:
    evaluation(runs[0] / "eval" / "two", [])
    with pytest.warns(UserWarning, match="has scored nothing yet"):
        assert len(collect(runs).evaluations) == 1


def test_a_damaged_sweep_is_named(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / SWEEP).write_text(json.dumps({"config": {}, "runs": [dataclasses.asdict(SweepRun("r", {}))]}))
    with pytest.raises(ValueError, match=r"sweep\.json is no sweep's"):
        collect([tmp_path / "s"])


@pytest.mark.browser
def test_nothing_scrolls_sideways_and_the_figure_stacks(runs: list[Path], tmp_path: Path, browser: Any) -> None:
    """Its panels: the frontier, KL of the training, and the reward while training."""
    assert_fits(browser, write_runs_report(runs, tmp_path / "report"), stacked=3)
