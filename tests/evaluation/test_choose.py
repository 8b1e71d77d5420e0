"""Choosing w: the bisection, what each goal measures, and the command that chooses and records it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from rlg import evaluate
from rlg.evaluation.choose_w import LARGEST, Goal, bisect, choose
from rlg.evaluation.rows import Row, read_rows


def row(w: float, prompt: int = 0, k: int = 0, **changes: object) -> Row:
    fields = {"rewards": {"fit": w}, "kl": w**2, "diversity": None, "nfe": 1, "seconds": 0.0, "log_weight": 0.0}
    return Row(prompt, "a", None, k, 0, w, "sde", "rlg", **(fields | changes))


@pytest.mark.parametrize("answer", [0.0, 0.37, 1.0, 2.5, 7.9])
def test_bisection_finds_where_a_rising_function_reaches_its_bound(answer: float) -> None:
    asked: list[float] = []
    found = bisect(lambda w: asked.append(w) or w**3, answer**3, start=0.0)
    assert answer - 0.02 <= found <= answer
    assert len(asked) < 14 and len(set(asked)) == len(asked)


def test_a_bound_that_is_never_or_always_met_is_an_error() -> None:
    with pytest.raises(ValueError, match=f"at w = {LARGEST:g} it is"):
        bisect(lambda w: w, 100.0, start=0.0)
    with pytest.raises(ValueError, match=r"at w = 1 it is 0\.2 already"):
        bisect(lambda w: -0.2, -0.5, start=1.0)


@pytest.mark.parametrize(
    ("goal", "expected"),
    [(Goal("kl_budget", 4.0), 2.0), (Goal("target_reward", 1.5), 1.5), (Goal("min_ess", 0.7), 2.567)],
)
def test_each_goal_reads_its_own_column(goal: Goal, expected: float) -> None:
    """Weights 1 and e^(w-1) in turn: their effective share is (1 + e)^2 / (2 (1 + e^2)) with e of w - 1."""
    asked: set[int] = set()

    def rows_at(w: float, k: int) -> list[Row]:
        asked.add(k)
        return [row(w, k=i, log_weight=(w - 1) * (i % 2)) for i in range(k)]

    found = choose(goal, rows_at, "fit", k=2)
    assert found.w == pytest.approx(expected, abs=0.03)
    weighed = goal.option == "min_ess"
    assert asked == ({32} if weighed else {2})  # 16 images and twice as many, whatever the evaluation's own
    assert found.images == (32 if weighed else None)
    assert found.share == (pytest.approx(0.7, abs=0.01) if weighed else None)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [("kl_budget", 0.0, "must be positive"), ("min_ess", 1.0, "between 0 and 1"), ("min_ess", 0.0, "between 0 and 1")],
)
def test_impossible_goals_are_refused(option: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Goal(option, value)


def test_goals_that_the_rows_do_not_know_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="--kl_budget 1: --kl_budget needs a stochastic sampler"):
        choose(Goal("kl_budget", 1.0), lambda w, k: [row(w, kl=None)], "fit", k=1)


def test_the_command_chooses_w_and_says_so(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue cross\ntwo blue crosses\na sign\nthree green squares\na green circle\n")
    shared = ["--prompts", str(prompts), "--k", "2", "--steps", "2", "--cfg", "1", "--images", "0", "--method", "rlg"]
    arguments = ["--ckpt", str(tiny_checkpoint("sd3")), "--reward", "jpeg_compressibility", *shared]
    folder = tmp_path / "eval"
    evaluate.main([*arguments, "--kernel", "sde", "--w", "1", "2", "--output", str(tmp_path / "plain")])
    kl = {w: [r.kl for r in read_rows(tmp_path / "plain" / "scores.jsonl") if r.w == w] for w in (1.0, 2.0)}
    low, high = (sum(values) / len(values) for values in kl.values())
    budget = (low + high) / 2
    chosen_on = ["--calibration_prompts", "3"]
    evaluate.main([*arguments, *chosen_on, "--kernel", "sde", "--kl_budget", str(budget), "--output", str(folder)])
    meta = json.loads((folder / "meta.json").read_text())
    w = meta["chosen"]["w"]
    assert 1 < w < 2 and meta["chosen"]["option"] == "kl_budget"
    assert f"w = {w:g}, by 3 prompts" in capsys.readouterr().err
    rows = read_rows(folder / "scores.jsonl")
    assert {r.w for r in rows} == {0.0, 1.0, w}
    assert {r.prompt_id for r in rows} == {1, 3, 5}  # w was chosen on 0, 2 and 4
    assert meta["num_prompts"] == 3 and meta["chosen"]["calibration_prompts"] == 3
    spent = [r.kl for r in rows if r.w == w]
    assert 0.75 * budget < sum(spent) / len(spent) < 1.25 * budget  # of other prompts
    arguments = [*arguments, *chosen_on]
    scheduled = [*arguments, "--kernel", "sde", "--schedule", "linear_down", "--output", str(tmp_path / "down")]
    evaluate.main([*scheduled, "--kl_budget", str(budget)])
    points = {p["w"]: p for p in json.loads((tmp_path / "down" / "summary.json").read_text())["points"]}
    chosen = json.loads((tmp_path / "down" / "meta.json").read_text())["chosen"]["w"]
    assert points.keys() == {0.0, 1.0, chosen} and chosen > w and points[0.0]["kl"] > 0  # w = 0 is not the base
    assert 0.75 * budget < points[chosen]["kl"] < 1.25 * budget
    with pytest.raises(SystemExit):
        evaluate.main([*scheduled, "--min_ess", "0.5"])
    assert "leave out --schedule linear_down" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate.main(
            [*arguments, "--calibration_prompts", "6", "--kl_budget", "1", "--output", str(tmp_path / "none")]
        )
    assert "6 of 6 leave none to report on" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*arguments, "--kernel", "ode", "--kl_budget", "1", "--output", str(tmp_path / "ode")])
    assert stopped.value.code == 2 and "needs a stochastic sampler" in capsys.readouterr().err
    assert not (tmp_path / "ode").exists()
