"""`rlg.equivalence`: what the analysis says of guidance that is right, or wrong by a known amount; both commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from rewards import RewardMix
from rlg.equivalence import __main__, tables
from rlg.equivalence.analysis import Result, analyse
from rlg.equivalence.experiment import Experiment
from rlg.evaluation.rows import Row
from tests.support.smooth_rewards import brightness

PROMPTS, BETA, STD = 8, 0.8, 0.5


def rows(w: float, shift: float, count: int, seed: int) -> list[Row]:
    """Images of a law whose rewards are N(prompt + shift, STD^2), with path KL shift^2."""
    reward_PK = np.random.default_rng(seed).normal(size=(PROMPTS, count)) * STD + shift
    return [
        Row(p, "", None, k, 0, w, "sde", "rlg", {"fit": p + reward_PK[p, k]}, shift**2, None, 1, 0.0)
        for p in range(PROMPTS)
        for k in range(count)
    ]


@cache  # an analysis takes seconds, and several tests look at one
def result(
    miss: float = 0.0,
    trained_at: float = BETA,
    scales: tuple[float, ...] = (0, 0.5, 1, 2),
    others: tuple[float, ...] = (),
    gap: float | None = None,
) -> Result:
    """An experiment in which guidance with w > 1 overshoots the oracle by `miss` of the gap.

    others: betas of models that were trained to the exact optimum.
    """
    trained = tuple({"ckpt": "", "beta": beta, "name": f"{beta:g}"} for beta in others)
    experiment = Experiment(base="b", reward="fit", ckpt="c", beta=BETA, w=tuple(map(float, scales)), trained=trained)
    gap = gap or STD**2 / trained_at
    guided = [row for w in experiment.w for row in rows(w, gap * (w + (miss if w > 1 else 0)), 400, seed=1)]
    other = [rows(1.0, STD**2 / beta, 400, seed=1) for beta in others]
    return analyse(experiment, rows(0.0, 0.0, 2000, seed=0), guided, other)


def test_guidance_that_is_the_tilted_law_misses_nothing() -> None:
    for point in result().points:
        if point.w:
            assert point.miss.low <= 0 <= point.miss.high
            assert point.miss.high - point.miss.low < 0.5
        assert point.reward.mean == pytest.approx(3.5 + point.w * STD**2 / BETA, abs=0.04)
        assert point.path_kl.mean == pytest.approx((point.w * STD**2 / BETA) ** 2)
        if point.w in (0, 1):  # 0 by definition, and no evidence
            assert point.matched is None and point.effective_w is None
        else:
            assert point.effective_w.low <= point.w <= point.effective_w.high
            assert point.effective_w.high - point.effective_w.low < 0.5


def test_a_known_miss_is_found() -> None:
    found = {point.w: point for point in result(miss=0.5).points}
    assert found[2.0].miss.mean == pytest.approx(0.5, abs=0.12) and found[2.0].miss.low > 0
    assert found[2.0].matched.mean == pytest.approx(0.5, abs=0.15)
    assert found[2.0].effective_w.low <= 2.5 <= found[2.0].effective_w.high < 3
    assert found[2.0].effective_w.low > 2.2
    assert abs(found[0.5].miss.mean) < 0.1


def test_training_that_missed_its_beta_is_told_apart_from_guidance_that_does() -> None:
    """Trained to twice the beta it was meant for: off at w = 1 by -100% of its gap, and by nothing once matched."""
    found = {point.w: point for point in result(trained_at=2 * BETA).points}
    assert found[1.0].miss.mean == pytest.approx(-1, abs=0.15)
    assert result(trained_at=2 * BETA).matched_beta.mean == pytest.approx(2 * BETA, rel=0.1)
    for w in (0.5, 2.0):
        assert found[w].matched.low <= 0 <= found[w].matched.high


def test_the_slope_of_guidance_is_taken_between_neighbours() -> None:
    """Rewards w g and path KLs (w g)^2 of the synthetic rows: between a and b the slope is 1 / (g (a + b))."""
    gap = STD**2 / BETA
    for slope, middle in zip(result().guided_slopes, (0.25, 0.75, 1.5), strict=True):
        assert slope.beta == pytest.approx(BETA / middle)
        assert slope.slope.mean == pytest.approx(1 / (2 * gap * middle), rel=0.15)


# --- the commands


def test_guidance_against_models_trained_at_beta_over_w() -> None:
    half, other = result(miss=0.5, others=(BETA / 2, BETA / 3)).trained
    assert half.w == pytest.approx(2) and half.miss.mean == pytest.approx(0.5, abs=0.05) and half.miss.low > 0.3
    assert half.ess > 100 and half.reward.mean == pytest.approx(3.5 + 2 * STD**2 / BETA, abs=0.04)
    assert other.w == pytest.approx(3) and other.miss is None  # no image was guided with w = 3


def test_a_model_beyond_the_samples_of_the_base_has_no_matched_beta() -> None:
    found = result(gap=20 * STD)
    assert found.matched_beta is None
    assert all(point.matched is None and point.effective_w is None for point in found.points)
    text = tables.markdown(Experiment(base="b", reward="fit", ckpt="c", beta=BETA), found)
    assert (
        "nan" not in text and "no beta of the oracle with 100 effective samples a prompt scores what it does" in text
    )
    assert all(np.isfinite(point.miss.mean) for point in found.points if point.w)


def test_an_oracle_of_too_few_samples_is_left_out() -> None:
    """At beta / 5 the law lies 3.1 standard deviations up: of 2000 base samples about a dozen are there."""
    found = {point.w: point for point in result(scales=(0, 1, 5)).points}
    far = found[5.0]
    assert far.ess < 100 and far.oracle is far.oracle_kl is far.miss is far.matched is far.effective_w is None
    assert found[1.0].oracle and far.reward.mean == pytest.approx(3.5 + 5 * STD**2 / BETA, abs=0.04)


@pytest.mark.numerics
def test_an_experiment_end_to_end_and_again(
    tiny_folder: Callable[[str], Path],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    smooth = RewardMix({"jpeg_compressibility": brightness}, (1.0,))  # a JPEG's size comes in bytes
    monkeypatch.setattr("rewards.build", lambda *_, **__: smooth)
    config, prompts = tmp_path / "small.yaml", tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue crosses\n")
    ckpt = tiny_checkpoint("sd3")
    config.write_text(
        f"base: {tiny_folder('sd3')}\nreward: jpeg_compressibility\nckpt: {ckpt}\nbeta: 0.5\nprompts: {prompts}\n"
        "num_prompts: 2\nsamples: 6\nk: 2\nw: [0, 1, 2]\nsteps: 2\ndtype: float32\n"
        f"trained:\n  - {{ckpt: {ckpt}, beta: 0.25, name: again}}\n"
    )
    output = tmp_path / "out"
    __main__.main(["--config", str(config), "--output", str(output)])
    record = json.loads((output / "equivalence.json").read_text())
    assert [point["w"] for point in record["points"]] == [0, 1, 2]
    assert record["points"][2]["beta"] == 0.25 and record["trained"][0]["name"] == "again"
    guided, again = record["points"][1], record["trained"][0]
    # One model twice, beside other w and alone: two layouts, equal to rounding (docs/reproducibility.md).
    assert again["path_kl"] == pytest.approx(guided["path_kl"], rel=1e-3)
    assert again["reward"]["mean"] == pytest.approx(guided["reward"]["mean"], abs=1e-5)
    assert min(abs(record["points"][i]["reward"]["mean"] - again["reward"]["mean"]) for i in (0, 2)) > 1e-4
    assert (output / "equivalence.png").stat().st_size > 10_000
    text = (output / "equivalence.md").read_text()
    assert (
        "| again | 0.25 |" in text
        and record["trained"][0]["miss"]
        and "2 prompts, 2 images at each w, 6 of the base" in text
    )
    times = {file: file.stat().st_mtime_ns for file in output.glob("*/meta.json")}
    scores = {file: file.read_bytes() for file in output.glob("*/scores.jsonl")}
    __main__.main(["--config", str(config), "--output", str(output)])
    assert scores == {file: file.read_bytes() for file in output.glob("*/scores.jsonl")}  # nothing made twice
    assert times == {file: file.stat().st_mtime_ns for file in output.glob("*/meta.json")}
    prompts.write_text("a red circle\nsomething else\n")
    with pytest.raises(SystemExit):  # the oracle's samples are of other prompts than the same file holds now
        __main__.main(["--config", str(config), "--output", str(output)])
    assert "made of something else: prompts is not what it was" in capsys.readouterr().err
    assert scores == {file: file.read_bytes() for file in output.glob("*/scores.jsonl")}


def test_the_toy_end_to_end(tmp_path: Path) -> None:
    __main__.main(["--toy", "--samples", "200", "--steps", "10", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "toy.json").read_text())
    assert record["settings"] == {"samples": 200, "steps": 10, "seed": 0}
    assert {row["case"] for row in record["rows"]} == {"linear", "narrow", "wide", "modes", "plane"}
    assert "| reward that narrows | 2 | exact | 1.333 | 0.333 |" in (tmp_path / "toy.md").read_text()
    assert (tmp_path / "toy.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x\nreward: r\nckpt: c\nbeta: 0", "beta must be positive"),
        ("base: x\nreward: r\nckpt: c\nbeta: 1\nscales: [0, 2]", "w must hold 0 and 1"),
        ("base: x\nreward: r\nckpt: c\nbeta: 1\nbetas: 2", "unknown option betas"),
        ("base: x\nreward: r\nbeta: 1", "ckpt"),
        ("base: x\nreward: r\nckpt: c\nbeta: 1\ntrained: [{ckpt: c}]", "has ckpt, beta and name"),
    ],
)
def test_bad_configs_are_one_line(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.yaml").write_text(text)
    for arguments in (["--config", str(tmp_path / "c.yaml")],):
        with pytest.raises(SystemExit) as stopped:
            __main__.main([*arguments, "--output", str(tmp_path / "out")])
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_of_toy_and_config_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        __main__.main([])
    assert "either --toy or --config" in capsys.readouterr().err
