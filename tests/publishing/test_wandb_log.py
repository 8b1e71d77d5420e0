"""W&B offline: its files are opened, and hold what docs/wandb.md says; what it refuses ends in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from rlg import evaluate as evaluation
from rlg.io import public_names
from rlg.prompts import Prompt
from rlg.publishing import wandb_runs
from rlg.reports import wandb_mirror
from tests.support.paths import ROOT
from trainers.core import start
from trainers.grpo import GRPOTrainer

wandb = pytest.importorskip("wandb")
from tests.support import wandb_files  # noqa: E402  it needs wandb

DOCS = (ROOT / "docs" / "wandb.md").read_text()
Make = Callable[..., GRPOTrainer]
HOSTILE = "</script><b>*bold*</b> | 'x' ✓ end"


@pytest.fixture(autouse=True)
def away_from_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key, no agent, and W&B's copies of artifacts in a folder of the test."""
    for name in ("WANDB_API_KEY", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name in ("DATA_DIR", "CACHE_DIR", "CONFIG_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path_factory.mktemp("wandb")))


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def documented(keys: set[str], *sections: str) -> set[str]:
    """Those of some keys that docs/wandb.md does not list: `NAME` there stands for a reward's name."""
    parts = re.split(r"^## ", DOCS, flags=re.MULTILINE)
    named = {key for part in parts if part.startswith(sections) for key in re.findall(r"`([^`\s]+)`", part)}
    patterns = [re.escape(key).replace("NAME", "[^/]+") for key in named]
    return {key for key in keys if not any(re.fullmatch(pattern, key) for pattern in patterns)}


def test_training_is_mirrored(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = tiny_trainer("sd3", max_steps=2, sample_steps=1, eval_steps=2, eval_prompts="x", report_to="wandb")
    trainer.prompts = [Prompt(HOSTILE), Prompt("a red circle"), Prompt("two\nlines")]
    trainer.train()
    folder = tmp_path / "run"
    (run,) = wandb_files.find(folder)
    assert (run.project, run.name, run.job_type, run.exit_code) == ("rlg", "run", "train", 0)
    own = public_names.value(yaml.safe_load((folder / "config.yaml").read_text()))
    assert {k: v for k, v in run.config.items() if k != "_wandb"} == own
    rows = rows_of(folder / "metrics.jsonl")
    logged = [{k: v for k, v in row.items() if k != "samples" and k[0] != "_"} for row in run.history]
    assert [row["_step"] for row in run.history] == [row.pop("step") for row in rows] == [0, 1, 2]
    assert logged == [pytest.approx(row) for row in rows]
    assert run.summary["eval/brightness"] == pytest.approx(rows[-1]["eval/brightness"])
    captions = (folder / "samples" / "step-000002.txt").read_text().splitlines()
    assert [caption for _, caption in run.images("samples")] == captions and len(captions) == 4
    score = re.fullmatch(r".* \| brightness (0\.\d+)", captions[0])
    assert score and all("\n" not in caption for caption in captions)
    with Image.open(run.images("samples")[0][0]) as image:
        pixels = image.convert("RGB").resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))
    assert sum(pixels) / 3 / 255 == pytest.approx(float(score[1]), abs=0.01)  # its own reward
    assert not run.artifacts
    assert not documented({*rows[1], "samples"}, "Training")


def test_what_is_resumed_goes_on_in_its_run(tiny_trainer: Make, tmp_path: Path) -> None:
    tiny_trainer("sd3", max_steps=1, report_to="wandb").train()
    tiny_trainer("sd3", max_steps=2, report_to="wandb", resume=True, log_adapter=True).train()
    first, second = wandb_files.find(tmp_path)
    assert first.id == second.id
    assert [row["_step"] for row in second.history] == [2]
    (artifact,) = second.artifacts  # only the last adapter
    assert (artifact.type, artifact.name, sorted(artifact.aliases)) == (
        "model",
        "adapter-run",
        ["checkpoint-2", "latest"],
    )
    assert {entry.path for entry in artifact.manifest.contents} == {
        *("README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"),
        "pytorch_lora_weights.safetensors",
    }
    tiny_trainer("sd3", max_steps=1, report_to="wandb", overwrite=True).train()
    assert first.id not in {run.id for run in wandb_files.find(tmp_path)}


def test_a_training_that_fails_says_so_and_leaves_no_tracker(tiny_trainer: Make, tmp_path: Path) -> None:
    def reward(*_: Any) -> Any:
        raise RuntimeError("out of luck")

    trainer = tiny_trainer("sd3", reward=reward, report_to="wandb")
    with pytest.raises(ValueError, match="out of luck"):
        trainer.train()
    (run,) = wandb_files.find(tmp_path / "run")
    assert run.exit_code == 1 and wandb.run is None and not trainer.accelerator.trackers


@pytest.fixture
def checkpoint(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A checkpoint in a run folder, and prompts of which one is hostile."""
    folder = tmp_path / "runs" / "demo" / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("sd3"), folder)
    lines = [json.dumps({"prompt": text}) for text in ("a red circle", HOSTILE, "three green squares")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    row = {"eval_prompts": str(tmp_path / "prompts.jsonl"), "reward": ["jpeg_compressibility"], "steps": 2}
    row |= {"held_out_reward": ["jpeg_incompressibility"], "kernel": "sde", "cfg": 1.0, "dtype": "float32"}
    (folder / "config.yaml").write_text(yaml.safe_dump(row))
    return folder


def evaluate(checkpoint: Path, *more: str) -> Path:
    arguments = ["--ckpt", str(checkpoint), "--k", "1", "--images", "2", "--batch_size", "8", "--report_to", "wandb"]
    evaluation.main([*arguments, "--w", "0", "1", "2", "--method", "rlg", "lora_scale", *more])
    return checkpoint.parent / "eval" / "checkpoint-3-sde2-cfg1-seed0"


def test_an_evaluation_is_mirrored(checkpoint: Path) -> None:
    folder = evaluate(checkpoint, "--log_adapter", "--project", "mine")
    (run,) = wandb_files.find(folder)
    assert (run.project, run.job_type, run.exit_code) == ("mine", "evaluate", 0)
    assert run.name == f"demo/{folder.name}"
    meta = json.loads((folder / "meta.json").read_text())
    assert {k: run.config[k] for k in ("cfg", "steps", "sampler", "rewards", "base")} == {
        k: public_names.value(meta[k]) for k in ("cfg", "steps", "sampler", "rewards", "base")
    }
    points = json.loads((folder / "summary.json").read_text())["points"]
    guided = [p for p in points if p["method"] == "rlg"]

    columns, rows = run.table("evaluation/points")
    assert [(row[columns.index("method")], row[columns.index("w")]) for row in rows] == [
        (p["method"], p["w"]) for p in points
    ]
    for name in ("jpeg_compressibility", "jpeg_incompressibility"):
        place = columns.index(name)
        assert columns[place : place + 6] == [name, *(f"{name} {k}" for k in wandb_mirror._OF_REWARD[1:])]
        for row, fields in zip(rows, (p["rewards"][name] for p in points), strict=True):
            known = [fields["mean"], *fields["ci95"], fields["delta_vs_tuned"]]
            assert row[place : place + 4] == pytest.approx(known)
    curve = [(row["w"], row["guided/jpeg_compressibility"], row["guided/kl"]) for row in run.history if "w" in row]
    assert curve == [pytest.approx((p["w"], p["rewards"]["jpeg_compressibility"]["mean"], p["kl"])) for p in guided]

    best = max(guided, key=lambda p: p["rewards"]["jpeg_compressibility"]["mean"])
    assert run.summary["best/jpeg_compressibility"] == pytest.approx(best["rewards"]["jpeg_compressibility"]["mean"])
    assert run.summary["best_w/jpeg_compressibility"] == best["w"]

    columns, rows = run.full_table("evaluation/rows")
    scores = {(r["prompt_id"], r["method"], r["w"]): r for r in rows_of(folder / "scores.jsonl")}
    assert len(rows) == len(scores) == 12  # 3 prompts: three w, and one of them scaled
    for row in (dict(zip(columns, cells, strict=True)) for cells in rows):
        known = scores[row["prompt_id"], row["method"], row["w"]]
        assert row["prompt"] == known["prompt"]
        assert row["jpeg_compressibility"] == pytest.approx(known["rewards"]["jpeg_compressibility"])
        kept = folder / "images" / f"{row['prompt_id']}-0-{row['w']:g}.png"
        assert (row["image"] is not None) == (row["method"] == "rlg" and kept.is_file())
        if row["image"]:
            assert row["image"] == kept.read_bytes()

    captions = [caption for file, caption in run.images("evaluation/images") if file.is_file()]
    assert len(captions) == 6
    first = scores[0, "rlg", 0.0]["rewards"]
    told = ", ".join(f"{name} {value:.4g}" for name, value in first.items())
    assert captions[0] == f"w = 0: a red circle | {told}"
    assert run.images("evaluation/curves")[0][0].read_bytes() == (folder / "curves.png").read_bytes()
    tables = [json.loads(f.read_text()) for f in run.folder.glob("files/media/table/evaluation/plot/*.table.json")]
    assert len(tables) == 2 and all(len(table["data"]) == len(points) for table in tables)
    plots = [entry["panel_config"] for entry in run.config["_wandb"]["visualize"].values()]
    assert {(p["fieldSettings"]["x"], p["fieldSettings"]["y"], p["fieldSettings"]["stroke"]) for p in plots} == {
        ("w", "jpeg_compressibility", "method"),
        ("w", "jpeg_incompressibility", "method"),
    }
    assert [artifact.name for artifact in run.artifacts if artifact.type == "model"] == ["adapter-demo"]
    logged = {key for row in run.history for key in row if key[0] != "_"} | {k for k in run.summary if k[0] != "_"}
    assert not documented({key for key in logged if not key.endswith("_table")}, "Evaluation")


def test_an_evaluation_that_goes_on_stays_in_its_run_and_a_new_one_does_not(checkpoint: Path) -> None:
    folder = evaluate(checkpoint, "--num_prompts", "1", "--method", "rlg")
    evaluate(checkpoint, "--num_prompts", "1", "--method", "rlg")
    evaluate(checkpoint, "--num_prompts", "1", "--method", "rlg", "--overwrite")
    ids = [run.id for run in wandb_files.find(folder)]
    assert len(ids) == 3 and len(set(ids)) == 2


def test_an_evaluation_that_fails_says_so_there_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("the server is gone")

    monkeypatch.setattr(evaluation, "evaluate", fail)
    with pytest.raises(SystemExit):
        evaluate(checkpoint)
    (run,) = wandb_files.find(checkpoint.parent)
    assert run.exit_code == 1


def test_an_agent_chooses_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(wandb_runs.options(tmp_path, "a", "train", "a")["id"]) == 8
    monkeypatch.setenv("WANDB_RUN_ID", "r1")
    assert "id" not in wandb_runs.options(tmp_path, "a", "train", "a")  # wandb.init takes it from the environment


def training_config(parameters: dict[str, Any], command: str) -> dict[str, Any]:
    """The file under configs/ that a sweep trains with, or that trained the checkpoint that it evaluates."""
    if given := re.search(r"--config (configs/(?!.*accelerate)\S+)", command):
        return yaml.safe_load((ROOT / given[1]).read_text())
    run = Path(str(parameters.get("ckpt", {}).get("value", ""))).parent.name
    configs = (yaml.safe_load(path.read_text()) for path in (ROOT / "configs").rglob("*.yaml"))
    return next((config for config in configs if config.get("name") == run), {})


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "sweeps").glob("*.yaml")), ids=lambda file: file.stem)
def test_a_sweep_looks_at_what_is_logged(file: Path) -> None:
    config = yaml.safe_load(file.read_text())
    metric, command = config["metric"]["name"], config["command"][3]
    assert not documented({metric}, "Evaluation" if "evaluate" in config["program"] else "Training")
    given = {key: parameter.get("value") for key, parameter in config["parameters"].items()}
    trained_with = training_config(config["parameters"], command)
    rewards = {str(given.get(key)) for key in ("reward", "rewards", "held_out_reward")}
    rewards |= {*trained_with.get("reward", []), *trained_with.get("held_out_reward", []), "accuracy"}
    assert metric.partition("/")[2] in rewards
    assert "--report_to" in command
    if metric.startswith("eval/"):  # only evaluations while training have it
        assert {**trained_with, **config["parameters"]}.get("eval_steps")


def test_no_account_is_one_line_before_anything_is_made(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr(wandb, "login", lambda: (_ for _ in ()).throw(wandb.errors.UsageError("No API key.")))
    monkeypatch.setattr(wandb, "setup", lambda: type("S", (), {"settings": wandb.Settings(mode="online")}))
    with pytest.raises(SystemExit) as stopped:
        evaluate(checkpoint)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith("error: W&B: No API key; `wandb login` signs in")
    assert not (checkpoint.parent / "eval").exists()


def test_a_run_that_w_and_b_refuses_is_one_line(tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("run r1 was deleted")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match="W&B: run r1 was deleted; `wandb login`"):
        tiny_trainer("sd3", max_steps=1, report_to="wandb").train()


def test_an_artifact_needs_the_tracker(tiny_trainer: Make, checkpoint: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ValueError, match="log_adapter keeps the adapter as an artifact of W&B"):
        tiny_trainer("sd3", log_adapter=True)
    with pytest.raises(SystemExit):
        evaluation.main(["--ckpt", str(checkpoint), "--log_adapter"])
    assert "add --report_to wandb" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluation.main(["--ckpt", str(checkpoint / "adapter"), "--log_adapter", "--report_to", "wandb"])
    assert f"--log_adapter: {checkpoint / 'adapter'} is no checkpoint" in capsys.readouterr().err


def test_samples_without_rewards_have_their_prompt_alone() -> None:
    assert wandb_runs.caption("a\nred circle", {}) == "a red circle"
    assert wandb_runs.caption("x", {"a": 0.5, "b": 12345.6}) == "x | a 0.5, b 1.235e+04"
    assert start.wandb_runs is wandb_runs
