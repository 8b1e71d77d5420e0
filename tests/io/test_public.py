"""What leaves this machine: every byte of it is looked at for paths, hosts and users of this one."""

from __future__ import annotations

import getpass
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlg import evaluate
from rlg.evaluation.folder import command_line
from rlg.io import public_names
from rlg.models import adapter_files
from rlg.models.policy import Policy
from rlg.publishing import hub_upload, model_card
from trainers.grpo import GRPOTrainer

SECRET = re.compile(rb"[^\s\"'`|<>]{0,80}(?:acme|10\.9\.8\.7|(?:\.\.|~)/[\w.-]{6})[^\s\"'`|<>]{0,80}")
SERVERS = {
    "reward": ["remote=http://10.9.8.7:8000", "pickscore=../private-acme/pick", "clipscore=/srv/acme/clip"],
    "held_out_reward": ["qwenvl=http://vlm.corp-acme.internal:8001/v1#Qwen/Qwen2.5-VL-7B-Instruct"],
    "prompts": "../../clients-acme/prompts.txt",
    "eval_prompts": "~/private-acme/held-out.txt",
    "data": "acme/pairs-2026/train.parquet",
    "image_root": "../acme-images",
}


def leaks(folder: Path, besides: str = r"\.\./eval/") -> dict[str, list[str]]:
    """What of this machine is in the files of a folder, by file."""
    found = {}
    for file in (path for path in folder.rglob("*") if path.is_file()):
        hits = {hit.decode("latin1") for hit in SECRET.findall(file.read_bytes())}
        found[str(file.relative_to(folder))] = sorted(hit for hit in hits if not re.search(besides, hit))
    return {name: hits for name, hits in found.items() if hits}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder, in which the test works, and names of the user and of the host, which all say acme."""
    folder = tmp_path / "home" / "acme-alice"
    folder.mkdir(parents=True)
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, "acme-alice")
    monkeypatch.setenv("HOME", str(folder))
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb"))
    for name in ("WANDB_API_KEY", "WANDB_SWEEP_ID", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "acme-host")
    monkeypatch.setattr("sys.argv", [str(folder / "train.py"), "--config", "../acme/x.yaml"])
    monkeypatch.chdir(folder)
    assert getpass.getuser() == "acme-alice" and Path.home() == folder
    return folder


@pytest.fixture
def checkpoint(home: Path, tiny_folder: Callable[[str], Path]) -> Path:
    """A checkpoint whose base, prompts and rewards are of this machine, saved as a trainer does."""
    base = home / "models" / "our-sd3"
    shutil.copytree(tiny_folder("sd3"), base)
    policy = Policy.load(str(base))
    torch.manual_seed(0)
    policy.add_lora(rank=2, alpha=4)
    folder = home / "acme-project" / "runs" / "demo" / "checkpoint-4"
    policy.save_adapter(folder)
    config = {"base": str(base), "name": "demo", "steps": 2, "kernel": "sde", "cfg": 1.0} | SERVERS
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("remote=http://10.9.8.7:8000", "remote"),
        ("pickscore=../private/pick", "pickscore"),
        ("pickscore=yuvalkirstain/PickScore_v1", "pickscore=yuvalkirstain/PickScore_v1"),
        ("ocr=rapidocr", "ocr=rapidocr"),
        ("/home/alice/prompts.txt", "prompts.txt"),
        ("../../clients/prompts.txt", "prompts.txt"),
        ("~/private/prompts.txt", "prompts.txt"),
        ("data/prompts.txt", "prompts.txt"),
        (r"C:\Users\alice\prompts.txt", "prompts.txt"),
        ("runs/demo/checkpoint-3", "checkpoint-3"),
        ("/a/b/one + c/d/two", "one + two"),
        ("hub:clients/acme/x:train:caption", "hub:x:train:caption"),
        ("hub:user/set:train:caption", "hub:user/set:train:caption"),
        ("tinyworld:composition/test", "tinyworld:composition/test"),
        ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-medium"),
        ("https://10.0.0.1/x?token=1", "(server)"),
        ("see '/home/alice/my notes.txt', or http://h:1/", "see 'my notes.txt', or (server)"),
        ("eval.py --ckpt=/x/y --reward remote=http://h:1", "eval.py --ckpt=y --reward remote"),
        ("attn.to_q", "attn.to_q"),
        ("~", "(local)"),
        (0.5, 0.5),
        (None, None),
        ([Path("/a/b"), {"k": ("/c/d",)}], ["b", {"k": ["d"]}]),
    ],
)
def test_what_a_value_becomes(text: Any, shown: Any) -> None:
    assert public_names.value(text) == shown


def test_a_folder_that_reads_like_a_hub_id_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "sd3").mkdir(parents=True)
    run = tmp_path / "runs" / "x" / "checkpoint-1"
    run.mkdir(parents=True)
    assert public_names.base("models/sd3") == "models/sd3" and public_names.base("models/sd3", near=run) is None
    monkeypatch.chdir(tmp_path)
    assert public_names.base("models/sd3") is None and public_names.base("tiny-sd3") == "tiny-sd3"


def test_nothing_of_this_machine_is_pushed(checkpoint: Path, tmp_path: Path) -> None:
    evaluated = checkpoint.parent / "eval" / "checkpoint-4-sde2"
    evaluated.mkdir(parents=True)
    (evaluated / "curves.png").write_bytes(b"png")
    meta = {"prompts": "../../clients-acme/test.txt", "origin": "../acme/origin.safetensors", "created": "2026"}
    (evaluated / "summary.json").write_text(json.dumps({"adapter": str(checkpoint), "meta": meta, "points": []}))
    model_card.write(checkpoint)
    staged = tmp_path / "staged"
    staged.mkdir()
    hub_upload.stage(checkpoint, staged)
    assert {str(file.relative_to(staged)) for file in staged.rglob("*") if file.is_file()} == {
        *model_card.files(checkpoint),
        "eval/checkpoint-4-sde2/curves.png",
    }
    assert not leaks(staged) and b"our-sd3" not in b"".join(p.read_bytes() for p in staged.rglob("*.*"))
    card = (staged / "README.md").read_text()
    assert "| base model | a local model |" in card and "| reward | remote, pickscore, clipscore |" in card
    assert "| held-out rewards | qwenvl |" in card and "? prompts of test.txt" in card
    here, there = (load_file(at / adapter_files.DIFFUSERS_FILE) for at in (checkpoint, staged))
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    assert adapter_files.read(staged).base is None  # and whoever loads it says which base
    assert adapter_files.read(checkpoint).base is not None  # here it is known


def test_a_header_from_before_loses_its_base_when_it_is_pushed(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / adapter_files.DIFFUSERS_FILE
    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["lora_adapter_metadata"])
    header["transformer.base_model_name_or_path"] = str(checkpoint)
    save_file(load_file(file), file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(header)})
    assert leaks(checkpoint)[adapter_files.DIFFUSERS_FILE]
    public_names.copy_adapter(file, tmp_path / file.name)
    with safe_open(tmp_path / file.name, framework="pt") as opened:
        found = opened.metadata()
    assert found["format"] == "pt"
    assert json.loads(found["lora_adapter_metadata"]) == header | {"transformer.base_model_name_or_path": None}


def test_a_public_base_is_named_and_its_files_are_pushed_bit_for_bit(checkpoint: Path, tmp_path: Path) -> None:
    file = checkpoint / "adapter" / "adapter_config.json"
    row = json.loads(file.read_text()) | {"base_model_name_or_path": "someone/sd3"}
    file.write_text(json.dumps(row))
    public_names.copy_adapter(file, tmp_path / "out.json")
    assert (tmp_path / "out.json").read_bytes() == file.read_bytes()


@pytest.fixture
def wandb_files() -> Iterator[Any]:
    pytest.importorskip("wandb")
    from tests.support import wandb_files

    yield wandb_files


def uploaded(run: Any) -> Path:
    """A run's folder without the logs that W&B keeps for itself."""
    shutil.rmtree(run.folder / "logs")
    return run.folder


def test_nothing_of_this_machine_is_tracked(
    home: Path, tiny_trainer: Callable[..., GRPOTrainer], wandb_files: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    base = home / "our-sd3"
    options = {"max_steps": 1, "report_to": "wandb", "log_adapter": True}
    trainer = tiny_trainer("sd3", name="run", output_dir=str(home / "runs"), **options)
    shutil.copytree(trainer.config.base, base)
    trainer.config.base = trainer.policy.base = str(base)
    for option in ("reward", "prompts", "eval_prompts"):
        setattr(trainer.config, option, SERVERS[option])
    trainer.train()
    (run,) = wandb_files.find(home / "runs" / "run")
    assert run.config["reward"] == ["remote", "pickscore", "clipscore"] and run.config["prompts"] == "prompts.txt"
    assert not leaks(uploaded(run))
    (artifact,) = run.artifacts
    stored = [Path(entry.local_path) for entry in artifact.manifest.contents]
    assert len(stored) == 4
    for file in stored:
        assert not [hit for hit in SECRET.findall(file.read_bytes()) if b"../eval/" not in hit], file


def test_nothing_of_this_machine_is_in_what_an_evaluation_hands_on(
    checkpoint: Path, home: Path, wandb_files: Any
) -> None:
    (home / "prompts.txt").write_text("a red circle\n")
    options = f"--prompts {home / 'prompts.txt'} --reward jpeg_compressibility --held_out_reward --k 1 --w 0 1"
    command = ["--ckpt", str(checkpoint), *options.split(), "--steps", "1", "--cfg", "1", "--method", "rlg"]
    evaluate.main([*command, "--report_to", "wandb"])
    (folder,) = (checkpoint.parent / "eval").iterdir()
    (run,) = wandb_files.find(folder)
    assert not leaks(uploaded(run))
    assert run.config["prompts"] == "prompts.txt"
    page = folder / "report.html"
    assert not SECRET.findall(page.read_bytes())
    assert b"checkpoint-4 on our-sd3" in page.read_bytes()


def test_the_command_of_a_report_can_be_pasted_and_says_nothing_private(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Recorded where it was given: paths below stay, as they are typed; those elsewhere keep their last part."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name="rlg.evaluate")))
    typed = ["--ckpt", "runs/a b/checkpoint-3", "--prompts", str(tmp_path / "data" / "p.csv"), "--output=runs/x"]
    elsewhere = [
        "--base",
        "/srv/acme/sd3",
        "--origin",
        "../acme/old.safetensors",
        "--reward",
        "remote=http://10.9.8.7",
    ]
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "acme" / "rlg" / "evaluate.py"), *typed, *elsewhere])
    shown = public_names.command(command_line())
    start = "python -m rlg.evaluate --ckpt 'runs/a b/checkpoint-3' --prompts data/p.csv --output=runs/x"
    assert shown == f"{start} --base sd3 --origin old.safetensors --reward remote"
    assert (
        public_names.command("/srv/acme/rlg/evaluate.py --ckpt runs/x") == "evaluate.py --ckpt runs/x"
    )  # of older files
    assert not SECRET.search(public_names.command("it's ~/acme/unbalanced").encode())
