"""What README.md and RESULTS.md say of results/ is what a command wrote there, and the demo keeps its promises."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlg.pool import readme
from rlg.pretraining import agreement
from rlg.stats import Estimate
from tests.support.paths import ROOT

DEMO = ROOT / "results" / "demo"


@pytest.fixture(scope="module")
def summary() -> dict[str, Any]:
    return json.loads((DEMO / "summary.json").read_text())


def _value(summary: dict[str, Any], reward: str, w: float, key: str, mode: str = "rlg") -> tuple[float, float, float]:
    (point,) = (point for point in summary["points"] if (point["method"], point["w"]) == (mode, w))
    values = point["rewards"][reward]
    return values[key], *values["ci95" if key == "mean" else f"{key}_ci95"]


def _minus(summary: dict[str, Any], reward: str, w: float) -> tuple[float, float, float]:
    """Guided minus LoRA x w."""
    (row,) = (row for row in summary["guided_minus_lora"] if (row["reward"], row["w"]) == (reward, w))
    return row["delta"], *row["delta_ci95"]


def _said(value: tuple[float, float, float], digits: int, sign: str = "+") -> str:
    mean, low, high = value
    return f"{mean:{sign}.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def test_the_tables_of_the_demo_are_those_of_its_summary(summary: dict[str, Any]) -> None:
    title, command = "The demo, three trainings", "bash launch/results.sh demo"
    assert (DEMO / "README.md").read_text() == readme(summary, title, command)
    assert command in (DEMO / "command.sh").read_text()


def test_readme_says_what_the_demo_came_to(summary: dict[str, Any]) -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    for reward, w, key, digits in (
        ("gravity", 1.0, "delta_vs_base", 1),
        ("gravity", 5.0, "delta_vs_tuned", 1),
        ("composition", 1.0, "delta_vs_base", 3),
        ("composition", 5.0, "delta_vs_base", 3),
    ):
        assert _said(_value(summary, reward, w, key), digits) in text
    assert f"n = {summary['points'][0]['n']}" in text
    twice = _value(summary, "gravity", 1.0, "delta_vs_tuned", "tuned_2x_steps")
    best = summary["best"]["gravity"]
    gain = (best["delta_vs_tuned"], *best["delta_vs_tuned_ci95"])
    for value, digits in ((twice, 1), (gain, 1), (_minus(summary, "gravity", 3.0), 1)):
        assert _said(value, digits) in text
    assert _said(_minus(summary, "composition", 3.0), 3) in text
    assert f"falls from w = {summary['falls']['composition']['w']:g} on" in text


def test_results_have_the_rows_of_the_demo(summary: dict[str, Any]) -> None:
    text = (ROOT / "RESULTS.md").read_text()
    names = {"rlg": "w = {:g}", "lora_scale": "LoRA x {:g}", "tuned_2x_steps": "tuned, twice the steps"}
    for point in summary["points"]:
        mode, w = point["method"], point["w"]
        if w == 0.5:
            continue
        cells = [names[mode].format(w)]
        for reward, digits in (("gravity", 1), ("composition", 3)):
            cells.append(_said(_value(summary, reward, w, "mean", mode), digits, ""))
            delta = _value(summary, reward, w, "delta_vs_base", mode)
            cells.append("" if (mode, w) == ("rlg", 0.0) else _said(delta, digits))
        row = " | ".join([*cells, f"{point['nfe_per_image']:g}"]).replace("|  |", "| |")
        assert f"| {row} |" in text
    for reward, digits in (("gravity", 1), ("composition", 3)):
        assert all(_said(_minus(summary, reward, w), digits) in text for w in (3.0, 5.0))


def test_the_demo_keeps_its_promises(summary: dict[str, Any]) -> None:
    """Seen at w = 1 at no cost in composition; more above; over-optimised at the last w, which the guard marks."""
    last = max(point["w"] for point in summary["points"])
    assert _value(summary, "composition", 1.0, "delta_vs_base")[1] > -0.03
    assert _value(summary, "gravity", 1.0, "delta_vs_base")[1] > 0
    assert summary["best"]["gravity"]["w"] > 1 and summary["best"]["gravity"]["delta_vs_tuned_ci95"][0] > 0
    assert _value(summary, "composition", last, "delta_vs_tuned")[2] < 0
    assert summary["falls"]["composition"]["w"] <= last
    for point in summary["points"]:
        trained = [training["delta_vs_base"] for training in point["rewards"]["gravity"]["by_training"]]
        assert len(trained) == 3
        assert point["w"] == 0 or all(value > 0 for value in trained)


def test_the_two_detectors_are_as_their_file_says() -> None:
    folder = ROOT / "results" / "emoji_detector"
    summary = json.loads((folder / "summary.json").read_text())
    command = "python -m rlg.pretraining.agreement --base tiny-sd3-emoji --output results/emoji_detector"
    assert (folder / "README.md").read_text() == agreement.readme(summary, command)
    text = (ROOT / "RESULTS.md").read_text()
    assert command in text and command in (folder / "command.sh").read_text()
    for row in summary["images"]:
        shares = (f"{Estimate.of(each['mean'], each['ci95']):.1%}" for each in row["strict"].values())
        assert f"| {row['cfg']:g} | {' | '.join(shares)} | {row['kappa']:.3f} |" in text
