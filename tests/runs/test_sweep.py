"""Sweeps: the files of configs/sweeps, command lines as W&B's agent makes them, and the local runner on a stub."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlg import sweep
from rlg.evaluation.options import completed, settings_of
from rlg.io import folders
from rlg.runs import sweep_runner
from rlg.runs.sweep_folder import SWEEP, Sweep, SweepRun, history, read_sweep, write_sweep
from tests.support.paths import ROOT
from trainers.dpo import DPOConfig
from trainers.grpo import GRPOConfig
from trainers.spo import SPOConfig

FILES = sorted(ROOT.glob("configs/sweeps/*.yaml"))
TRAINERS = {"train_grpo.py": GRPOConfig, "train_dpo.py": DPOConfig, "train_spo.py": SPOConfig}
STUB = """
import json, os, pathlib, signal, sys, time
given = dict(text.removeprefix("--").split("=") for text in sys.argv[1:] if "=" in text)
folder = pathlib.Path(os.environ["RLG_SWEEP_DIR"], os.environ["RLG_SWEEP_RUN"])
folder.mkdir(exist_ok=True)
with (folder / "calls.jsonl").open("a") as file:
    file.write(json.dumps({"argv": sys.argv[1:], "slot": os.environ["RLG_SWEEP_SLOT"]}) + "\\n")
if given.get("a") == "2" and (folder.parent / "broken").exists():
    sys.exit("Traceback of some kind\\nValueError: two is too many")
if given.get("a") == "3" and (folder.parent / "slow").exists() and "--resume" not in sys.argv:
    stopped = []
    signal.signal(signal.SIGINT, lambda *_: stopped.append(1))
    (folder / "began").touch()
    deadline = time.monotonic() + 15
    while not stopped:
        time.sleep(0.01)
        if time.monotonic() > deadline:
            sys.exit("nobody stopped it")
    (folder / "checkpoint-1").mkdir()
    (folder / "checkpoint-1" / "state.json").write_text("{}")
    sys.exit(0)
time.sleep(float(given.get("wait", 0)))
score = float(given["a"]) * float(given.get("b", 1))
(folder / "metrics.jsonl").write_text('{"step": 1, "score": -9}\\n' + json.dumps({"step": 2, "score": score}) + "\\n")
"""
GRID = {
    "program": "stub.py",
    "method": "grid",
    "metric": {"name": "score", "goal": "maximize"},
    "parameters": {"a": {"values": [1, 2, 3]}, "flag": {"value": True}},
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stub program, which is the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / SWEEP).write_text(json.dumps({"config": GRID, "seed": 0, "runs": []}))
    return tmp_path


def write(config: dict[str, Any], name: str = "x.yaml") -> Path:
    file = Path(name)
    file.write_text(yaml.safe_dump(config))
    return file


def go(*options: object, config: dict[str, Any] = GRID) -> Sweep:
    return sweep.run([str(write(config)), "--output", "out", *map(str, options)])


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def calls(folder: Path) -> list[list[str]]:
    return [json.loads(line)["argv"] for line in (folder / "calls.jsonl").read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sweep.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert not out
    assert len(err.splitlines()) == 1
    return err.removeprefix("error: ").rstrip()


# The files that come with the project


def executed(config: dict[str, Any], parameters: dict[str, Any], tmp_path: Path) -> list[str]:
    """Arguments of the program itself, after bash, as a stub in place of Python and accelerate sees them."""
    for name in ("python", "accelerate"):
        stub = tmp_path / name
        stub.write_text('#!/bin/bash\nprintf "%s\\0" "$@"\n')
        stub.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_SWEEP_ID": "s1", "WANDB_RUN_ID": "r1"}
    line = sweep_runner.command_line(config, parameters)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_a_drawn_command_line_is_one_that_the_script_takes(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    config = sweep_runner.read_file(file)
    parameters = sweep_runner.draw(Sweep(config, 0), tmp_path)
    assert set(parameters) == set(config["parameters"])
    arguments = executed(config, parameters, tmp_path)
    if config["program"] == "rlg/evaluate.py":
        start = arguments.index("rlg.evaluate") + 1
        asked = completed(arguments[start:])
        settings = settings_of(asked, full=False)
        assert settings.scales == (parameters["w"],)
        assert (settings.cfg, settings.steps) == (parameters["cfg"], parameters["steps"])
        assert asked.output == Path("runs/sweeps/s1/r1")
        return
    known = {field.name for field in dataclasses.fields(TRAINERS[config["program"]])}
    assert set(parameters) <= known
    start = arguments.index(config["program"])
    script = importlib.import_module(config["program"].removesuffix(".py"))
    more = ["--dry_run", "--mixed_precision", "no", "--report_to", "none"]  # neither a GPU nor a tracker is needed
    assert arguments[-2:] == ["--report_to", "wandb"]
    monkeypatch.setattr(sys, "argv", [*arguments[start:-2], *more])
    with pytest.raises((SystemExit, ValueError), match=r"^0$|^not on this machine: .*data/"):  # the prompts, maybe
        script.main()
    resolved = yaml.safe_load(capfd.readouterr().out)
    for name, value in parameters.items():
        assert resolved[name] == ([value] if isinstance(resolved[name], list) else pytest.approx(value))
    assert (resolved["output_dir"], resolved["name"]) == ("runs/sweeps/s1", "r1")


@pytest.mark.parametrize("file", [f for f in FILES if "evaluate" not in f.stem], ids=lambda f: f.stem)
def test_every_point_of_a_file_is_a_sound_config(file: Path, tmp_path: Path) -> None:
    """Sizes divide on as many processes as the command starts, whatever is drawn."""
    from trainers.core.config import parse_config

    config = yaml.safe_load(file.read_text())
    chunk = config["command"][3]
    processes = {"num_processes 4": 4, "8gpu": 8, "python": 1}
    count = next(number for text, number in processes.items() if text in chunk)
    base = re.search(r"--config (configs/(?!.*accelerate)\S+)", chunk)[1]
    for name, entry in config["parameters"].items():
        for value in entry.get("values", [entry.get("value", entry.get("min"))]):
            arguments = ["--config", str(ROOT / base), f"--{name}={value}", "--mixed_precision=no"]
            if name != "batch_size":
                size = config["parameters"].get("batch_size", {}).get("value")
                arguments += [f"--batch_size={size}"] if size else []
            if name in ("eval_steps", "test_split"):
                arguments += ["--eval_prompts=x", "--eval_steps=1"]
            parse_config(TRAINERS[config["program"]], arguments).derived(count)


def test_command_lines_are_those_of_wandb_agent(monkeypatch: pytest.MonkeyPatch) -> None:
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    monkeypatch.setenv("PLACE", "there")
    parameters = {"a": 1, "b": 2.5e-5, "yes": True, "no": False, "text": "x y", "list": [1, 2], "none": None}
    theirs = utils.create_sweep_command_args({"args": {k: {"value": v} for k, v in parameters.items()}})
    for name in ("args", "args_no_hyphens", "args_no_boolean_flags", "args_no_equals", "args_json"):
        command = ["${env}", "--at=${envvar:PLACE}", "${program}", f"${{{name}}}"]
        ours = sweep_runner.command_line({"program": "p.py", "command": command}, parameters)
        assert ours == ["/usr/bin/env", utils.create_sweep_command(list(command))[1], "p.py", *theirs[name]]
        assert ours[1] == "--at=there"
    default = sweep_runner.command_line({"program": "p.py"}, {"a": 1}, ["--resume"])
    assert list(sweep_runner.DEFAULT_COMMAND) == utils.DEFAULT_SWEEP_COMMAND
    assert default == ["/usr/bin/env", sys.executable, "p.py", "--a=1", "--resume"]


# Drawing


def drawn(config: dict[str, Any], count: int, seed: int = 0) -> list[dict[str, Any]]:
    state = Sweep(config, seed)
    for _ in range(count):
        state.runs.append(SweepRun(f"run-{len(state.runs)}", sweep_runner.draw(state, Path("none")), "finished"))
    return [run.parameters for run in state.runs]


def test_draws_depend_on_the_seed_and_the_place_alone() -> None:
    space = {"x": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}, "n": {"min": 1, "max": 100}}
    config = {"program": "p", "method": "random", "parameters": space}
    first = drawn(config, 6)
    import random

    before = random.getstate()
    assert drawn(config, 6) == first
    assert random.getstate() == before
    assert drawn(config, 6, seed=1) != first
    assert len({row["x"] for row in first}) == 6
    assert all(1e-4 <= row["x"] <= 1e-1 and type(row["x"]) is float and type(row["n"]) is int for row in first)


def test_a_grid_visits_every_point_once_and_ends(tmp_path: Path) -> None:
    config = {"program": "p", "method": "grid", "parameters": {"a": {"values": [1, 2]}, "b": {"values": ["u", "v"]}}}
    points = drawn(config, 4)
    assert sorted((p["a"], p["b"]) for p in points) == [(1, "u"), (1, "v"), (2, "u"), (2, "v")]
    full = Sweep(config, 0, [SweepRun(str(i), p, "finished") for i, p in enumerate(points)])
    assert sweep_runner.draw(full, tmp_path) is None


def test_bayes_goes_where_the_metric_is_good(tmp_path: Path) -> None:
    config = {
        "program": "p",
        "method": "bayes",
        "metric": {"name": "score", "goal": "maximize"},
        "parameters": {"x": {"min": 0.0, "max": 1.0}},
    }
    state = Sweep(config, 0)
    for i in range(12):
        x = sweep_runner.draw(state, tmp_path)["x"]
        state.runs.append(SweepRun(f"run-{i}", {"x": x}, "finished"))
        (tmp_path / f"run-{i}").mkdir()
        (tmp_path / f"run-{i}" / "metrics.jsonl").write_text(json.dumps({"score": -((x - 0.3) ** 2)}) + "\n")
    late = [run.parameters["x"] for run in state.runs[-4:]]
    assert max(abs(x - 0.3) for x in late) < 0.1


# The runner


def test_one_row_a_run(here: Path, capsys: pytest.CaptureFixture) -> None:
    sweep.main([str(write(GRID)), "--output", "out"])
    assert capsys.readouterr().out == "out/sweep.csv\n"
    rows = table(here / "out")
    assert [(r["run"], r["a"], r["score"], r["status"], r["folder"]) for r in rows] == [
        ("run-000", "1", "1.0", "finished", "out/run-000"),
        ("run-001", "2", "2.0", "finished", "out/run-001"),
        ("run-002", "3", "3.0", "finished", "out/run-002"),
    ]
    assert calls(here / "out" / "run-001") == [["--a=2", "--flag=True"]]
    assert read_sweep(here / "out").best().name == "run-002"


def test_runs_of_an_edited_config_do_not_end_in_one_sweep(here: Path, capsys: pytest.CaptureFixture) -> None:
    """The sweep file is the same, what it names is not; until a run has finished, that is a correction."""
    Path("base.yaml").write_text("a: 1\n")
    config = GRID | {"command": ["${interpreter}", "${program}", "--config=base.yaml", "${args}"]}
    file = write(config)
    sweep.main([str(file), "--output", "other", "--runs", "1"])
    assert read_sweep(here / "other").files.keys() == {GRID["program"], "base.yaml"}
    Path("base.yaml").write_text("a: 2\n")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        sweep.main([str(file), "--output", "other"])
    assert stopped.value.code == 2
    assert "base.yaml has changed since runs of other have finished; give --output" in capsys.readouterr().err
    saved = read_sweep(here / "other")
    saved.runs[0].status = "failed"
    write_sweep(here / "other", saved)
    sweep.main([str(file), "--output", "other", "--runs", "2", "--retry_failed"])
    assert [row["status"] for row in table(here / "other")] == ["finished"] * 2


def test_finished_runs_are_not_run_again_and_more_can_be_asked_for(here: Path) -> None:
    go("--runs", 1)
    assert len(table(here / "out")) == 1
    go()
    go()
    assert [len(calls(here / "out" / f"run-00{i}")) for i in range(3)] == [1, 1, 1]
    assert len(table(here / "out")) == 3


def test_runs_are_parallel_each_with_a_slot_of_its_own(here: Path) -> None:
    config = GRID | {"parameters": GRID["parameters"] | {"wait": {"value": 3.0}}}
    (here / "out" / SWEEP).unlink()
    started = time.monotonic()
    go("--parallel", 3, config=config)
    assert time.monotonic() - started < 8.7  # not one after the other, on a machine that is busy, too
    slots = [json.loads((here / "out" / f"run-00{i}" / "calls.jsonl").read_text())["slot"] for i in range(3)]
    assert sorted(slots) == ["0", "1", "2"]


def test_a_failed_run_is_a_row_and_stops_no_other(here: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "out" / "broken").touch()
    sweep.main([str(write(GRID)), "--output", "out"])
    assert "1 of 3 runs failed: run-001: ValueError: two is too many" in capsys.readouterr().err
    rows = table(here / "out")
    assert [r["status"] for r in rows] == ["finished", "failed", "finished"]
    assert (rows[1]["score"], rows[1]["error"]) == ("", "ValueError: two is too many")
    go()
    assert len(calls(here / "out" / "run-001")) == 1
    (here / "out" / "broken").unlink()
    go("--retry_failed")
    assert len(calls(here / "out" / "run-001")) == 2
    assert [r["status"] for r in table(here / "out")] == ["finished"] * 3
    assert table(here / "out")[1]["error"] == ""


def test_all_runs_failed(here: Path) -> None:
    (here / "out" / SWEEP).unlink()
    (here / "out").rename("out2")
    Path("out2").rmdir()
    Path("stub.py").write_text("raise SystemExit(3)")
    with pytest.raises(SystemExit) as stopped:
        sweep.main([str(write(GRID | {"parameters": {"a": {"value": 2}}})), "--output", "out2"])
    assert stopped.value.code == 1
    assert table(Path("out2"))[0]["error"] == "exit code 3"


def test_ctrl_c_stops_in_order_and_the_same_command_resumes(here: Path) -> None:
    """The first two runs finish; the third is told to stop, saves, and is resumed by the second command."""
    (here / "out" / "slow").touch()
    command = [sys.executable, "-m", "rlg.sweep", str(write(GRID)), "--output", "out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    heard = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}  # a shell's background jobs are deaf
    process = subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **heard
    )
    deadline = time.monotonic() + 60
    while not (here / "out" / "run-002" / "began").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    said = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "run/s" not in line and "s/run" not in line]
    assert len(said) == 1 and said[0].startswith("interrupted; the same command goes on")
    assert not out
    assert [r["status"] for r in table(here / "out")] == ["finished", "finished", "interrupted"]
    go()
    assert calls(here / "out" / "run-002") == [["--a=3", "--flag=True"], ["--a=3", "--flag=True", "--resume"]]
    assert calls(here / "out" / "run-000") == [["--a=1", "--flag=True"]]
    assert [r["score"] for r in table(here / "out")] == ["1.0", "2.0", "3.0"]


def test_what_was_running_when_the_machine_went_down_is_taken_up_again(here: Path) -> None:
    state = {"config": GRID, "seed": 0, "runs": [dataclasses.asdict(SweepRun("run-000", {"a": 1, "flag": True}))]}
    (here / "out" / SWEEP).write_text(json.dumps(state))
    (here / "out" / "run-000").mkdir()
    (here / "out" / "run-000" / "config.yaml").write_text("")  # a trainer that had no checkpoint yet
    go()
    assert calls(here / "out" / "run-000") == [["--a=1", "--flag=True", "--overwrite"]]
    assert [r["status"] for r in table(here / "out")] == ["finished"] * 3


def test_a_metric_that_no_run_has_is_said(here: Path) -> None:
    (here / "out" / SWEEP).unlink()
    go("--runs", 1, config=GRID | {"metric": {"name": "scorre", "goal": "maximize"}})
    assert table(here / "out")[0]["error"] == "it left no scorre"


def test_the_metric_of_an_evaluation_is_that_of_the_best_w(tmp_path: Path) -> None:
    points = [
        {"method": mode, "w": w, "rewards": {"fit": {"mean": mean}}}
        for mode, w, mean in [("rlg", 0, 1.0), ("rlg", 2, 3.0), ("lora_scale", 2, 9.0)]
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"points": points}))
    assert history(tmp_path, "best/fit") == [3.0]
    assert history(tmp_path, "best/other") == history(tmp_path, "fit") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "gridd"}, "method must be one of grid, random, bayes, got 'gridd'"),
        ({"program": "none.py"}, "no such program: none.py"),
        ({"program": None}, "program is needed"),
        ({"parameters": {}}, "parameters is needed"),
        ({"parameters": {"a": {"content": [1]}}}, "invalid hyperparameter configuration: a"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "a: min 2 is not less than max 1"),
        ({"parameters": {"a": {"min": 0.0, "max": 1.0}}}, "Parameter a is a disallowed type with grid search"),
        ({"method": "random"}, "method random does not end by itself; give --runs, or run_cap"),
        ({"surprise": 1}, "'surprise' was unexpected"),
        ({"command": ["${interpretr}", "${program}"]}, "unknown macro ${interpretr} in command; known: env,"),
    ],
)
def test_bad_files(change: dict[str, Any], message: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(GRID | change)
    assert message in refused(capsys, file)
    assert not (here / "runs").exists()


def test_bad_command_lines(here: Path, capsys: pytest.CaptureFixture) -> None:
    file = write(GRID)
    assert refused(capsys, "none.yaml") == "no such config: none.yaml; `rlg configs` lists those that ship"
    assert "--runs must be at least 1, got 0" in refused(capsys, file, "--runs", 0)
    assert "holds no sweep" in refused(capsys, file, "--output", here)
    assert "another seed" in refused(capsys, file, "--output", "out", "--seed", 1)
    other = write(GRID | {"parameters": {"a": {"values": [1]}}}, "y.yaml")
    assert refused(capsys, other, "--output", "out") == (
        "out holds a sweep with another parameters; give --output another folder"
    )
    with folders.held(here / "out"):
        assert f"out is in use: process {os.getpid()} on" in refused(capsys, file, "--output", "out")


def test_a_real_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file's own command, through bash, Python and the trainer; --dry_run makes it end before it trains."""
    monkeypatch.chdir(ROOT)
    config = yaml.safe_load((ROOT / "configs" / "sweeps" / "grpo_tiny.yaml").read_text())
    config["parameters"]["dry_run"] = {"value": True}
    file = tmp_path / "dry.yaml"
    file.write_text(yaml.safe_dump(config))
    state = sweep.run([str(file), "--runs", "1", "--output", str(tmp_path / "out")])
    assert [run.status for run in state.runs] == ["finished"], state.runs[0].error
    printed = yaml.safe_load((tmp_path / "out" / "logs" / "run-000.out").read_text())
    assert (printed["output_dir"], printed["name"]) == (str(tmp_path / "out"), "run-000")
    assert printed["level"] == state.runs[0].parameters["level"]
