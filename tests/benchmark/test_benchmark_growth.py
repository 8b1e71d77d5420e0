"""Lines through costs, and evaluations that hold no more when there are more of them."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from rlg.benchmark import __main__, growth
from rlg.benchmark.growth import Growth, fit, shown, shown_processes
from rlg.benchmark.options import GROWTH

TINY = ["--arch", "sd15-tiny", "--device", "cpu", "--steps", "1", "--repeats", "1", "--lora_rank", "2"]


def test_a_line_is_found_and_how_far_costs_leave_it() -> None:
    line = fit([4, 8, 20, 40], [3 + 2 * x for x in (4, 8, 20, 40)])
    assert (line.fixed, line.per_unit, line.worst) == pytest.approx((3, 2, 0), abs=1e-9)
    assert line.linear
    near = fit([1, 2, 5, 10], [1.0, 2.0, 5.0, 10.4])
    assert near.linear and 0.01 < near.worst < 0.04
    square = fit([1, 2, 5, 10], [1, 4, 25, 100])
    assert not square.linear and square.worst > 0.5
    assert not fit([1, 2, 5, 10], [1.0, 2.0, 5.0, 12.5]).linear  # a tenfold that costs a quarter more


def test_errors_count_by_their_share_of_the_cost() -> None:
    assert fit([1, 2, 3, 100], [1, 2.3, 3, 100]).worst > 0.05  # 0.3 s is much of 2 s
    assert fit([1, 2, 3, 100], [1, 2, 3, 100.3]).worst < 0.01  # and nothing of 100 s


@pytest.mark.parametrize("sizes", [[1, 2], [3, 3, 3], [2]])
def test_two_sizes_make_no_line(sizes: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="at least three different sizes"):
        fit(sizes, [1.0] * len(sizes))
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["growth", *TINY, "--growth", *map(str, sizes)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_measures_prompts_and_scales_and_memory_is_flat(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--num_prompts", "1", "--growth", "2", "3", "5", "--num_w", "2", "4", "6", "--batch_size", "2"]
    file = tmp_path / "numbers.json"
    __main__.main(["growth", *TINY, *sizes, "--processes", "--output", str(file)])
    prompts, scales = json.loads(file.read_text())["growth"]
    assert (prompts["of"], prompts["sizes"]) == ("prompts", [2, 3, 5])
    assert (scales["of"], scales["sizes"]) == ("scales", [2, 4, 6])
    small, large = prompts["working_bytes"]
    assert small > 1e5 and large < 1.001 * small  # more images, in batches as large: one of them is 1.6% of this
    shown = capsys.readouterr().out
    assert "| prompts | 2 | 3 | 5 |" in shown and "| scales | 2 | 4 | 6 |" in shown and "processes |" not in shown


def test_what_is_not_linear_is_said_to_be_so() -> None:
    straight, bent = fit([1, 2, 4], [1, 2, 4]), fit([1, 2, 4], [1, 4, 16])
    texts = [shown(Growth("prompts", [1, 2, 4], [1, 2, 4], line, (0, 0), (None, None))) for line in (straight, bent)]
    assert "linear within 5%" in texts[0] and "NOT linear" in texts[1]


def test_processes_are_as_fast_as_the_last_of_them() -> None:
    text = shown_processes({1: [(10.0, 9.0)], 2: [(4.0, 4.5), (5.0, 4.75)]})
    assert text.splitlines()[2:] == ["| 1 | 10 | 9 | 1.00 |", "| 2 | 5 | 9.25 | 2.00 |"]


@pytest.mark.slow
def test_processes_share_the_work() -> None:
    args = GROWTH.parse([*TINY, "--num_prompts", "1", "--growth", "1", "2", "4"])
    found = growth.processes(args, [1, 2])
    assert [len(rows) for rows in found.values()] == [1, 2]


def test_too_many_prompts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        __main__.main(["growth", *TINY, "--growth", "1", "2", "100000", "--num_prompts", "9"])
    assert stopped.value.code == 2
    assert "prompts, and 900000 are asked for" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["growth", "grpo"])
def test_numbers_that_are_there_are_replaced_only_if_asked(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from trainers.benchmark import grpo as training

    file = tmp_path / "numbers.json"
    file.write_text("old")
    refused = "{} exists; give --overwrite, or --output another name\n"
    for options in (["--output", str(file)], ["--output", str(tmp_path), "--overwrite"]):
        with pytest.raises(SystemExit) as stopped:
            __main__.main([command, *options])
        assert (stopped.value.code, capsys.readouterr().err) == (2, "error: " + refused.format(options[1]))
    assert file.read_text() == "old"
    reached = ValueError("the work would begin")
    monkeypatch.setattr(growth, "Bench", Mock(side_effect=reached))
    monkeypatch.setattr(training, "Bench", Mock(side_effect=reached))
    monkeypatch.setattr(training.flops, "matmul_peak", lambda *_: 1.0)
    with pytest.raises(SystemExit):
        __main__.main([command, "--output", str(file), "--overwrite"])
    assert capsys.readouterr().err == "error: the work would begin\n"
