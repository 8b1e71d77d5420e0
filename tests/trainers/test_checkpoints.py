"""Run folders and checkpoints: resuming changes nothing, a checkpoint is whole or not there, nothing is a pickle."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from rlg.distributed import Interruption
from rlg.io.run_folder import run_settings
from rlg.models import adapter_files, fingerprint
from rlg.models.policy import Policy
from rlg.prompts import Prompt
from trainers.checkpoints.checkpoint import resume, save_checkpoint
from trainers.checkpoints.checkpoint_folder import checkpoints
from trainers.core import config as train_config
from trainers.core import setup
from trainers.core.log import grid
from trainers.core.run_folder import prepare_folder
from trainers.grpo import GRPOConfig, GRPOTrainer

Make = Callable[..., GRPOTrainer]

# What has a state of its own: a moving average, random steps, several updates with a KL to the base.
AVERAGE = {"ema_decay": 0.9, "ema_every": 1}
VERSIONED = ("torch", "diffusers", "transformers", "peft", "accelerate", "trl", "datasets")
RICH = AVERAGE | {"num_train_steps": 1, "beta": 0.5, "num_updates": 2, "batch_size": 2}


def metrics_of(folder: Path) -> list[dict[str, float]]:
    """metrics.jsonl without clock times."""
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    files = sorted(checkpoint.rglob("*.safetensors"))
    return {f"{file.relative_to(checkpoint)}:{k}": v for file in files for k, v in load_file(file).items()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def saved(trainer: GRPOTrainer, step: int) -> Path:
    """A checkpoint of the trainer as it is, called `step`."""
    trainer.state.step = step
    return save_checkpoint(trainer.config, trainer.accelerator, trainer.state)


def started(make: Make, **options: Any) -> GRPOTrainer:
    """A trainer whose run folder is there."""
    trainer = make("sd3", **options)
    prepare_folder(trainer.config, trainer.accelerator)
    return trainer


@pytest.mark.numerics
@pytest.mark.parametrize("kind", ["sd3", "sd"])
def test_a_resumed_run_is_the_uninterrupted_one(kind: str, tiny_trainer: Make, tmp_path: Path) -> None:
    tiny_trainer(kind, name="whole", max_steps=3, save_steps=2, **RICH).train()
    tiny_trainer(kind, name="parts", max_steps=2, save_steps=2, **RICH).train()
    torch.manual_seed(99)  # another process has another global generator
    tiny_trainer(kind, name="parts", max_steps=3, save_steps=2, resume=True, **RICH).train()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert metrics_of(whole) == metrics_of(parts) and len(metrics_of(whole)) == 3
    expected, found = tensors_of(whole / "checkpoint-3"), tensors_of(parts / "checkpoint-3")
    assert expected.keys() == found.keys()
    different = [name for name in expected if "rng" not in name and not torch.equal(expected[name], found[name])]
    assert not different
    before = tensors_of(whole / "checkpoint-2")
    assert any(not torch.equal(before[k], v) for k, v in expected.items() if "trainer_state/lora" in k)


def test_checkpoint_holds_everything_in_open_formats(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = tiny_trainer("sd3", max_steps=1, **AVERAGE)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert {str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file()} == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
        "trainer_state/lora.safetensors",
        "trainer_state/ema.safetensors",
        "trainer_state/optimizer.safetensors",
        "trainer_state/rng-0.safetensors",
        "README.md",
        "config.yaml",
        "state.json",
        "manifest.json",
    }
    assert {f.suffix for f in (tmp_path / "run").rglob("*") if f.is_file()} == {
        ".safetensors",
        ".json",
        ".jsonl",
        ".md",
        ".yaml",
    }
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["step"] == 1 and state["base"] == trainer.config.base and state["counters"]["images"] == 4
    assert adapter_files.read(checkpoint).base == trainer.config.base
    again = train_config.parse_config(GRPOConfig, ["--config", str(checkpoint / "config.yaml")])
    assert again == trainer.config
    assert run_settings(checkpoint)["steps"] == trainer.config.steps


def test_both_formats_hold_the_average_and_the_state_holds_the_parameters(tiny_trainer: Make) -> None:
    trainer = started(tiny_trainer, ema_decay=0.9)
    for shadow, parameter in zip(trainer.state.ema.shadow, trainer.policy.trainable(), strict=True):
        shadow.fill_(0.25)
        parameter.data.fill_(0.5)
    checkpoint = saved(trainer, 1)
    for file in ("adapter/adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        tensors = load_file(checkpoint / file)
        assert tensors and all(t.dtype == torch.float32 and (t == 0.25).all() for t in tensors.values())
    assert all((t == 0.5).all() for t in load_file(checkpoint / "trainer_state" / "lora.safetensors").values())
    assert all((p == 0.5).all() for p in trainer.policy.trainable())  # training goes on from where it was
    policy = Policy.load(trainer.config.base)
    policy.load_adapter(checkpoint)
    assert all((p == 0.25).all() for p in policy.trainable())


def test_older_checkpoints_make_room(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = started(tiny_trainer, save_total_limit=2)
    for step in (8, 9, 10):
        saved(trainer, step)
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-9", "checkpoint-10"]
    trainer.config.save_total_limit = None
    saved(trainer, 11)
    assert [p.name for p in checkpoints(tmp_path / "run")] == [
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-11",
    ]


def test_only_whole_checkpoints_count(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = started(tiny_trainer)
    whole = saved(trainer, 1)
    (tmp_path / "run" / ".checkpoint-3.tmp" / "adapter").mkdir(parents=True)  # killed while writing
    (tmp_path / "run" / "checkpoint-4" / "adapter").mkdir(parents=True)  # copied in part
    (tmp_path / "run" / "checkpoint-5-mine").mkdir()
    (tmp_path / "run" / "checkpoint-5-mine" / "state.json").write_text("{}")
    assert checkpoints(tmp_path / "run") == [whole]
    again = tiny_trainer("sd3", resume=True)
    resume(again.config, again.accelerator, again.state)
    assert again.state.step == 1


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    tiny_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = started(tiny_trainer, save_total_limit=1)
    before = files_of(saved(trainer, 1))

    def full(*args: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("trainers.checkpoints.checkpoint.save_optimizer_state", full)
    for step in (1, 2):  # also where it would be replaced
        with pytest.raises(OSError, match="no space left"):
            saved(trainer, step)
        assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-1"]
        assert files_of(tmp_path / "run" / "checkpoint-1") == before


def test_a_checkpoint_of_another_lora_is_refused(tiny_trainer: Make) -> None:
    saved(started(tiny_trainer), 1)
    again = tiny_trainer("sd3", resume=True, lora_rank=3, allow_changes=True)
    warned = pytest.warns(UserWarning, match="lora_rank = 3, and not 2")
    with warned, pytest.raises(ValueError, match="made with another LoRA"):
        resume(again.config, again.accelerator, again.state)


def test_another_setting_is_another_run_unless_it_is_allowed(tiny_trainer: Make, tmp_path: Path) -> None:
    tiny_trainer("sd3", max_steps=1).train()
    before = files_of(tmp_path)
    changes = {"learning_rate": 0.125, "ema_decay": 0.9, "seed": 7}
    with pytest.raises(ValueError) as refused:
        tiny_trainer("sd3", resume=True, max_steps=2, **changes).train()
    assert str(refused.value) == (
        f"resuming {tmp_path / 'run' / 'checkpoint-1'} with seed = 7, and not 42; learning_rate = 0.125, "
        "and not 0.01; ema_decay = 0.9, and not 0.0; that is another run: take that back, or give --allow_changes"
    )
    assert files_of(tmp_path) == before
    again = tiny_trainer("sd3", resume=True, allow_changes=True, max_steps=2, **changes)
    with pytest.warns(UserWarning, match="with seed = 7, and not 42; learning_rate = 0.125, and not 0.01; ema_decay"):
        resume(again.config, again.accelerator, again.state)
    assert [group["lr"] for group in again.state.optimizer.param_groups] == [0.125]
    assert len(again.state.optimizer.state_dict()["state"]) == len(again.policy.trainable())  # Adam's moments came
    for shadow, parameter in zip(again.state.ema.shadow, again.policy.trainable(), strict=True):
        assert torch.equal(shadow, parameter)  # a new average starts where the run is


def test_config_yaml_holds_what_is_true_and_keeps_what_was(tiny_trainer: Make, tmp_path: Path) -> None:
    def lines(*places: str) -> list[str]:
        text = tmp_path.joinpath("run", *places, "config.yaml").read_text()
        return [re.sub(r", \S+T\S+\+00:00", "", line) for line in text.splitlines() if line[0] == "#"]

    tiny_trainer("sd3", max_steps=1).train()
    assert lines() == []
    tiny_trainer("sd3", resume=True, max_steps=2).train()
    with pytest.warns(UserWarning, match="resuming"):
        tiny_trainer("sd3", resume=True, max_steps=3, seed=7, allow_changes=True).train()
    tiny_trainer("sd3", resume=True, max_steps=3, seed=7).train()  # nothing new
    history = ["# changed at step 1: max_steps 1 -> 2", "# changed at step 2: seed 42 -> 7; max_steps 2 -> 3"]
    assert lines() == lines("checkpoint-3") == history and lines("checkpoint-2") == history[:1]
    again = train_config.parse_config(GRPOConfig, ["--config", str(tmp_path / "run" / "config.yaml")])
    assert (again.seed, again.max_steps, again.allow_changes) == (7, 3, False)
    tiny_trainer("sd3", max_steps=1, overwrite=True).train()
    assert lines() == []  # another run's
    with pytest.raises(ValueError, match="--allow_changes says how to go on with a run; it needs --resume"):
        tiny_trainer("sd3", allow_changes=True)


def test_a_run_goes_on_with_the_files_that_it_began_with(
    tiny_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny_trainer("sd3", max_steps=1)
    trainer.train()
    state = json.loads((tmp_path / "run" / "checkpoint-1" / "state.json").read_text())
    assert state["versions"].keys() == {*VERSIONED, "rlg"} and state["digests"].keys() == {
        "base",
        "prompts",
        "eval_prompts",
    }
    assert all(state["versions"][name] == importlib.metadata.version(name) for name in VERSIONED)
    again = tiny_trainer("sd3", max_steps=2, resume=True)
    again.prompts = [Prompt("something else"), *again.prompts[1:]]
    with pytest.raises(ValueError, match=r"checkpoint-1 with prompts is not what it was \(sha256 .*--allow_changes"):
        again.train()
    monkeypatch.setattr(fingerprint, "versions", lambda more=(): state["versions"] | {"torch": "1.0"})
    with pytest.warns(UserWarning, match="checkpoint-1 was written by other versions: torch was .*, and is 1.0"):
        tiny_trainer("sd3", max_steps=2, resume=True).train()


def test_metrics_of_steps_that_are_not_in_the_checkpoint_are_forgotten(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = started(tiny_trainer)
    saved(trainer, 2)
    file = tmp_path / "run" / "metrics.jsonl"
    file.write_text("".join(json.dumps({"step": i, "reward": 0.5}) + "\n" for i in range(5)) + '{"step": 5, "rew')
    again = tiny_trainer("sd3", resume=True)
    resume(again.config, again.accelerator, again.state)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [0, 1, 2]


@pytest.mark.parametrize("place", ["start", "middle", "end"])
def test_nuls_of_a_lost_power_stop_no_resume(place: str, tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = started(tiny_trainer)
    saved(trainer, 2)
    rows = [json.dumps({"step": i}) + "\n" for i in range(1, 4)]
    rows.insert({"start": 0, "middle": 1, "end": 3}[place], "\0" * 4096)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(rows))
    again = tiny_trainer("sd3", resume=True)
    resume(again.config, again.accelerator, again.state)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1, 2]


def test_nothing_is_overwritten_unasked(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = started(tiny_trainer)
    saved(trainer, 1)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="run exists; give --resume, --overwrite or another --name"):
        tiny_trainer("sd3").train()
    with pytest.raises(ValueError, match="'cps' is for flow-matching models"):
        tiny_trainer("sd", overwrite=True, kernel="cps").train()  # a mistake that shows late
    with pytest.raises(ValueError, match="give --resume or --overwrite, not both"):
        tiny_trainer("sd3", overwrite=True, resume=True)
    assert files_of(tmp_path) == before
    tiny_trainer("sd3", overwrite=True, max_steps=1).train()
    assert json.loads((tmp_path / "run" / "checkpoint-1" / "state.json").read_text())["counters"]["images"] == 4


def test_overwriting_refuses_a_folder_that_is_no_run(tiny_trainer: Make, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="is no run folder"):
        tiny_trainer("sd3", overwrite=True).train()
    assert files_of(tmp_path) == {"run/thesis.tex": b"years of work"}


def test_resuming_needs_something_to_resume(tiny_trainer: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing to resume: .*run does not exist"):
        tiny_trainer("sd3", resume=True).train()
    started(tiny_trainer)
    with pytest.raises(ValueError, match="run holds no whole checkpoint"):
        tiny_trainer("sd3", resume=True).train()


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/x"])
def test_a_run_has_a_plain_name(name: str, tiny_trainer: Make) -> None:
    with pytest.raises(ValueError, match="name must be a plain folder name"):
        tiny_trainer("sd3", name=name)


def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(tiny_trainer: Make, tmp_path: Path) -> None:
    calls = 0

    def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return images.mean(dim=(1, 2, 3))

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trainer = tiny_trainer("sd3", reward=reward, max_steps=5, save_steps=50)
    trainer.train()
    assert trainer.state.step == 2 and len(metrics_of(tmp_path / "run")) == 2
    assert [p.name for p in checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers


def test_the_first_signal_says_what_happens_and_a_second_kills(
    tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sent = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    tiny_trainer("sd3")  # so that there is an accelerator
    with Interruption() as interruption:
        assert not interruption.agreed()
        interruption._handle(signal.SIGINT, None)
        assert interruption.agreed() and not sent
        assert "SIGINT: this step is finished and kept, then it ends; once more ends it now" in capfd.readouterr().err
        interruption._handle(signal.SIGINT, None)
        assert sent == [(os.getpid(), signal.SIGINT)] and signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_lora_stays_in_float32_over_a_half_precision_base(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = tiny_trainer("sd3", dtype="bfloat16", max_steps=1)
    trainer.train()
    again = tiny_trainer("sd3", dtype="bfloat16", resume=True)
    resume(again.config, again.accelerator, again.state)
    for policy in (trainer.policy, again.policy):
        dtypes = {("lora_" in name, p.dtype) for name, p in policy.network.named_parameters()}
        assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    file = tmp_path / "run" / "checkpoint-1" / "adapter" / "adapter_model.safetensors"
    assert all(t.dtype == torch.float32 for t in load_file(file).values())
    assert all(s["exp_avg"].dtype == torch.float32 for s in again.state.optimizer.state_dict()["state"].values())


def test_tensorboard_follows(tiny_trainer: Make, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_trainer("sd3", max_steps=2, sample_steps=2, report_to="tensorboard").train()
    found, images = {}, {}
    for file in (tmp_path / "run" / "logs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        found |= {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
        images |= {tag: [(e.step, e.width, e.height) for e in events.Images(tag)] for tag in events.Tags()["images"]}
    assert found["reward"] == pytest.approx([row["reward"] for row in metrics_of(tmp_path / "run")])
    assert images == {"samples": [(2, 256, 64)]}  # four images side by side


def test_a_tracker_that_is_not_installed_is_refused(tiny_trainer: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="report_to is wandb, which is not installed: pip install wandb"):
        tiny_trainer("sd3", report_to="wandb")


def test_grid_shows_every_image(tmp_path: Path) -> None:
    images = torch.stack([torch.full((3, 2, 2), i / 10) for i in range(5)])
    picture = grid(images, columns=3)
    assert picture.size == (6, 4)
    corners = [picture.getpixel((2 * (i % 3), 2 * (i // 3)))[0] for i in range(6)]
    assert corners == [0, 26, 51, 76, 102, 255]


def test_a_config_file_with_a_misspelt_key_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    row = {"base": "tiny-sd3", "name": "x", "reward": ["r"], "prompts": "p", "learning_rat": 1.0e-3}
    file.write_text(yaml.safe_dump(row))
    with pytest.raises(ValueError, match="learning_rat"):
        train_config.parse_config(GRPOConfig, ["--config", str(file)])
    row.pop("learning_rat")
    file.write_text(yaml.safe_dump(row | {"beta": 0.5, "epsilon": 0.25}))
    config = train_config.parse_config(GRPOConfig, ["--config", str(file), "--beta", "0.125"])
    assert (config.beta, config.epsilon) == (0.125, 0.25)  # the command line wins
    with pytest.raises(ValueError, match="no such config"):
        train_config.parse_config(GRPOConfig, ["--config", str(tmp_path / "none.yaml")])
