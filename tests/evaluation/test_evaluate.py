"""`python -m rlg.evaluate`: whose settings win, what it leaves behind, and that it goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rewards import REWARDS
from rlg import evaluate as evaluation
from rlg.evaluation.evaluator import Evaluator, Images
from rlg.evaluation.folder import Job
from rlg.evaluation.methods import LORA_SCALE, RLG, TWICE
from rlg.evaluation.options import completed
from rlg.evaluation.rows import read_rows
from rlg.models import adapter_files
from rlg.prompts import Prompt

PROMPTS = [Prompt("a red circle", {"tag": "colors"}), Prompt("two blue crosses"), Prompt("three green squares")]


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint in a run folder, whose config says how it was trained."""
    folder = tmp_path / "runs" / "demo" / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("sd3"), folder)
    (tmp_path / "prompts.txt").write_text("".join(p.text + "\n" for p in PROMPTS))
    row = {
        "eval_prompts": str(tmp_path / "prompts.txt"),
        "reward": ["jpeg_compressibility"],
        "held_out_reward": ["jpeg_incompressibility"],
        "steps": 2,
        "kernel": "sde",
        "level": 0.7,
        "cfg": 1.0,
        "resolution": None,
        "dtype": "float32",
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(row))
    return folder


def test_command_line_wins_over_yaml_and_yaml_over_the_run(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "eval.yaml"
    row = {"ckpt": str(checkpoint), "steps": 5, "scales": [0, 1.5], "modes": "rlg", "held_out": [], "overwrite": True}
    config.write_text(yaml.safe_dump(row | {"output": str(tmp_path / "out")}))
    asked = completed(["--config", str(config), "--w", "0", "-1", "--k", "7"])
    assert (asked.w, asked.k, asked.steps, asked.method) == ((0.0, -1.0), 7, 5, ("rlg",))
    assert (asked.level, asked.kernel, asked.reward, asked.held_out_reward) == (
        0.7,
        "sde",
        ("jpeg_compressibility",),
        (),
    )
    assert asked.output == tmp_path / "out" and asked.overwrite is True


def test_a_dry_run_counts_the_images(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Guidance at four w, the scaled LoRA at the two between and beyond, the tuned model with twice the steps."""
    evaluation.main(["--ckpt", str(checkpoint), "--w", "0", "0.5", "1", "2", "--k", "5", "--dry_run"])
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["kernel"] == "sde" and shown.endswith("\n")
    assert f"# {(4 + 2 + 1) * 3 * 5} images, 3 prompts of" in shown
    assert not (checkpoint.parent / "eval").exists()


def test_a_server_that_a_checkpoint_names_gets_no_image_unasked(checkpoint: Path) -> None:
    file = checkpoint / "config.yaml"
    elsewhere = yaml.safe_load(file.read_text()) | {"held_out_reward": ["remote=http://example.org:80"]}
    file.write_text(yaml.safe_dump(elsewhere))
    with pytest.raises(
        ValueError, match=r"would send images there; .* give --held_out_reward remote=http://example.org:80"
    ):
        completed(["--ckpt", str(checkpoint)])
    given = completed(["--ckpt", str(checkpoint), "--held_out_reward", "remote=http://example.org:80"])
    assert given.held_out_reward == ("remote=http://example.org:80",)
    file.write_text(yaml.safe_dump(elsewhere | {"held_out_reward": ["remote=http://127.0.0.1:80"]}))
    assert completed(["--ckpt", str(checkpoint)]).held_out_reward == ("remote=http://127.0.0.1:80",)


@pytest.mark.parametrize(
    "line", ["stepz: 3", "k: two", "k: 2.5", "scales: [a]", "sampler: dpm", "dtype: int8", "- steps", "steps: ["]
)
def test_a_yaml_file_with_mistakes_is_refused(line: str, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "eval.yaml").write_text(line + "\n")
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(["--config", str(tmp_path / "eval.yaml"), "--ckpt", str(checkpoint)])
    assert stopped.value.code == 2
    assert not (checkpoint.parent / "eval").exists()


def test_main_evaluates_goes_on_and_reports(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made: list[Job] = []
    generate = Evaluator.generate
    monkeypatch.setattr(Evaluator, "generate", lambda self, unit: made.extend(unit) or generate(self, unit))
    arguments = ["--ckpt", str(checkpoint), "--k", "1", "--num_prompts", "2", "--images", "1", "--batch_size", "4"]
    evaluation.main([*arguments, "--w", "0", "1"])
    folder = checkpoint.parent / "eval" / "checkpoint-3-sde2-cfg1-seed0"
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert {f.name for f in folder.iterdir()} >= {"scores.jsonl", "meta.json", "summary.json", "report.html", "images"}
    assert {f.name for f in (folder / "images").iterdir()} == {"0-0-0.png", "0-0-1.png"}
    assert len(made) == 6  # two prompts at w = 0 and 1, and with twice the steps
    before = {(row.method, row.w, row.prompt_id): row for row in read_rows(folder / "scores.jsonl")}
    assert before.keys() == {(mode, w, p) for p in (0, 1) for mode, w in ((RLG, 0.0), (RLG, 1.0), (TWICE, 1.0))}
    assert before[RLG, 1.0, 0].rewards.keys() == {"jpeg_compressibility", "jpeg_incompressibility"}
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["trained_rewards"] == ["jpeg_compressibility"] and meta["base"] == str(
        adapter_files.read(checkpoint).base
    )

    made.clear()
    evaluation.main([*arguments, "--w", "0", "1", "2"])
    assert {(job.method, job.w) for job in made} == {(RLG, 2.0), (LORA_SCALE, 2.0)} and len(made) == 4
    after = {(row.method, row.w, row.prompt_id): row for row in read_rows(folder / "scores.jsonl")}
    assert len(after) == 10 and all(after[key] == row for key, row in before.items())
    points = {(p["method"], p["w"]): p for p in json.loads((folder / "summary.json").read_text())["points"]}
    assert [points[RLG, w]["nfe_per_image"] for w in (0.0, 1.0, 2.0)] == [2, 2, 4]
    assert points[RLG, 0.0]["kl"] == 0 < points[RLG, 1.0]["kl"] < points[RLG, 2.0]["kl"]

    made.clear()
    for change in (["--seed", "1"], ["--held_out_reward"]):
        with pytest.raises(SystemExit) as stopped:
            evaluation.main([*arguments, "--w", "0", "1", *change, "--output", str(folder)])
        assert stopped.value.code == 2 and "give --output another folder" in capsys.readouterr().err
    assert not made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_unit_and_the_same_command_goes_on(
    number: int, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made: list[Job] = []
    generate = Evaluator.generate

    def interrupted(self: Evaluator, unit: list[Job]) -> Images:
        made.extend(unit)
        if len(made) == 2:  # in the first unit
            os.kill(os.getpid(), number)
        return generate(self, unit)

    monkeypatch.setattr(Evaluator, "generate", interrupted)
    arguments = ["--ckpt", str(checkpoint), "--k", "1", "--num_prompts", "2", "--method", "rlg", "--batch_size", "2"]
    arguments += ["--w", "0", "1", "--steps", "1"]
    with pytest.raises(SystemExit) as stopped:
        evaluation.main(arguments)
    assert stopped.value.code == 0
    said = capsys.readouterr()
    assert "interrupted; the same command goes on where it was" in said.err and not said.out
    (folder,) = (checkpoint.parent / "eval").iterdir()
    assert {file.name for file in folder.iterdir()} == {"meta.json", "plan.json", "scores.jsonl", "images"}
    assert len(read_rows(folder / "scores.jsonl")) == len(made) == 2
    evaluation.main(arguments)
    assert len(read_rows(folder / "scores.jsonl")) == len(made) == 4 and (folder / "report.html").is_file()


def test_a_trained_reward_with_a_source_is_not_taken_for_held_out(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REWARDS, "jpeg_compressibility", replace(REWARDS["jpeg_compressibility"], source="anything"))
    arguments = [
        "--ckpt",
        str(checkpoint),
        "--reward",
        "jpeg_compressibility=x",
        "--held_out_reward",
        "jpeg_incompressibility",
    ]
    evaluation.main([*arguments, "--k", "1", "--num_prompts", "1", "--w", "0", "1", "--output", str(tmp_path / "e")])
    summary = json.loads((tmp_path / "e" / "summary.json").read_text())
    assert summary["meta"]["trained_rewards"] == ["jpeg_compressibility"]
    assert summary["falls"].keys() == {"jpeg_incompressibility"}


def test_a_schedule_of_w_has_its_own_folder_and_no_base(checkpoint: Path) -> None:
    arguments = ["--ckpt", str(checkpoint), "--k", "1", "--num_prompts", "2", "--images", "1", "--method", "rlg"]
    evaluation.main([*arguments, "--w", "0", "1", "2", "--schedule", "interval:.0:0.990"])
    folder = checkpoint.parent / "eval" / "checkpoint-3-sde2-cfg1-seed0-interval_0_0.99"
    assert json.loads((folder / "meta.json").read_text())["schedule"] == "interval:0:0.99"
    points = {p["w"]: p for p in json.loads((folder / "summary.json").read_text())["points"]}
    assert [points[w]["nfe_per_image"] for w in (0.0, 1.0, 2.0)] == [2, 2, 3]
    reward = points[2.0]["rewards"]["jpeg_compressibility"]
    assert reward["delta_vs_base"] is None and reward["delta_vs_tuned"] is not None  # w = 0 is not the base here
    page = (folder / "report.html").read_text()
    assert "<dt>tuned</dt>" in page and "<dt>base</dt>" not in page and 'data-go="0"' not in page
