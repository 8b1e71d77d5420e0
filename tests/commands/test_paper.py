"""The paper's tables: every evaluation config parses and fits its rewards, and every script leads where it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rewards import REWARDS, lookup
from rlg import evaluate
from rlg.evaluation import options as evaluation_options
from rlg.evaluation.folder import ROWS
from tests.support.paths import ROOT

CONFIGS = [file for file in sorted((ROOT / "configs" / "eval").glob("*.yaml")) if not file.stem.startswith("grid_")]
TINY = [file for file in CONFIGS if file.stem.startswith("tiny_")]
TASKS = ("human_preference", "composition", "text_rendering", "compressibility")
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))


def commands(task: str, *options: str) -> list[list[str]]:
    """What a script of the paper would run."""
    script = ["bash", str(ROOT / "launch" / "paper" / f"{task}.sh"), "--dry_run", *options]
    done = subprocess.run(script, capture_output=True, text=True, check=True)
    assert not done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def after(command: list[str], option: str) -> str:
    return command[command.index(option) + 1]


def evaluations(task: str, *options: str) -> list[list[str]]:
    """Arguments of each `rlg.evaluate` that a script would run."""
    rows = [command for command in commands(task, *options) if "rlg.evaluate" in command]
    return [row[row.index("rlg.evaluate") + 1 :] for row in rows]


def test_each_table_has_its_configs() -> None:
    assert {file.stem.removeprefix("tiny_") for file in TINY} == set(TASKS)
    full = {re.sub("_(sd15|sdxl|sd35m)$", "", file.stem) for file in CONFIGS} - {file.stem for file in TINY}
    assert full == {*TASKS, "demo", "emoji", "blend_tiny_sd3"}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda f: f.stem)
def test_every_config_is_an_evaluation(config: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    args = evaluation_options.completed(["--config", str(config), "--ckpt", str(tiny_checkpoint("sd3"))])
    settings = evaluation_options.settings_of(args, full=False)
    assert {0, 1} < set(settings.scales)
    written = yaml.safe_load(config.read_text())
    assert args.base == written.get("base")
    for name in [*(args.reward or []), *(args.held_out_reward or [])]:
        lookup(name)
    if "prompts" in written:
        assert re.match(r"tinyworld:|data/\w+/\w+\.(txt|jsonl)$|hub:[\w.-]+/[\w.-]+:\w+:\w+$", args.prompts)


@pytest.mark.parametrize("config", TINY, ids=lambda f: f.stem)
def test_tiny_configs_run(
    config: Path, tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    row = yaml.safe_load(config.read_text())
    names = [*row["reward"], *row["held_out_reward"]]
    if missing := [module for name in names for module in REWARDS[name].missing()]:
        pytest.skip(f"{', '.join(missing)} not installed")
    few = ["--num_prompts", "1", "--k", "1", "--steps", "1", "--output", str(tmp_path / "eval")]
    evaluate.main(["--config", str(config), "--ckpt", str(tiny_checkpoint("sd3")), *few])
    rows = [json.loads(line) for line in (tmp_path / "eval" / ROWS).read_text().splitlines()]
    assert [r["w"] for r in rows] == [float(w) for w in row["w"]]
    assert all(set(r["rewards"]) == set(names) for r in rows)
    assert (tmp_path / "eval" / "report.html").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda f: f.stem)
def test_scripts_are_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("task", TASKS)
def test_a_script_evaluates_its_configs_on_what_it_fetched(task: str) -> None:
    rows = commands(task)
    fetched = {after(row, "-o") for row in rows if row[0] == "curl"}
    fetched |= {row[2].split("w ")[1] for row in rows if row[0] == "sed"}
    downloaded = {row[2] for row in rows if row[:2] == ["hf", "download"]}
    (loaded,) = [set(row[3:]) for row in rows if row[:2] == ["python", "-c"]]
    found = evaluations(task)
    assert {Path(after(row, "--config")).stem for row in found} == {
        file.stem for file in CONFIGS if file.stem.startswith(task)
    }
    for row in found:
        args = evaluation_options.completed([text.replace("configs/", f"{ROOT}/configs/") for text in row])
        assert args.prompts in fetched or args.prompts.startswith("hub:")
        assert {args.base, "/".join(args.ckpt[0].split("/")[:2])} - downloaded <= {"runs/sd15-compressibility"}
        models = {name for name in [*args.reward, *args.held_out_reward] if REWARDS[name].needs != "-"}
        assert models - loaded <= {"geneval"}  # which has the models of geneval_strict
        assert args.output == Path("runs/paper") / Path(after(row, "--config")).stem


def test_compressibility_is_trained_on_what_was_fetched() -> None:
    rows = commands("compressibility")
    (training,) = [row for row in rows if "train_grpo.py" in row]
    config = yaml.safe_load((ROOT / after(training, "--config")).read_text())
    assert any(f"w {config['prompts']}" in text for row in rows for text in row)
    assert after(evaluations("compressibility")[0], "--ckpt") == f"runs/{config['name']}/checkpoint-N"


@pytest.mark.parametrize("task", TASKS)
def test_a_smoke_run_needs_no_network(task: str) -> None:
    rows = commands(task, "--smoke")
    assert [row[:2] for row in rows] == [["python", "train_grpo.py"], ["python", "-m"]]
    assert (ROOT / after(rows[0], "--config")).is_file()
    (row,) = evaluations(task, "--smoke")
    args = evaluation_options.completed([text.replace("configs/", f"{ROOT}/configs/") for text in row])
    assert args.prompts.startswith("tinyworld:")
    assert str(Path(args.ckpt[0]).parent) == f"runs/{after(rows[0], '--name')}"
    assert all(REWARDS[name].needs == "-" for name in [*args.reward, *args.held_out_reward])


def test_unknown_options_are_refused() -> None:
    script = ["bash", str(ROOT / "launch" / "paper" / "composition.sh"), "--smok"]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --smok; known: --smoke, --dry_run\n"
