"""Checkpoints on disks that fail: damage is found and passed over, nothing whole is lost, and one line says so."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import save_file

import train_grpo
from rlg.cli import fail_cleanly
from rlg.distributed import together
from rlg.evaluation.folder import merge
from rlg.io import atomic, folders, manifest
from rlg.models import adapter_files
from tests.evaluation.test_evaluator import SMALL, Fake, evaluated
from trainers.checkpoints import checkpoint_folder
from trainers.checkpoints.checkpoint import resume
from trainers.grpo import GRPOTrainer

Make = Callable[..., GRPOTrainer]


def save(folder: Path, step: int, limit: int | None = None, numbers: int = 100) -> Path:
    """A checkpoint of some numbers."""
    config = SimpleNamespace(folder=folder, save_total_limit=limit)
    with checkpoint_folder.written(config, Accelerator(cpu=True), step) as new:
        save_file({"x": torch.full((numbers,), float(step))}, new / "x.safetensors")
        (new / "adapter").mkdir()
        (new / "adapter" / "y.json").write_text("{}")
        checkpoint_folder.write_state(new, {"step": step})
    return folder / f"checkpoint-{step}"


def cut(checkpoint: Path) -> None:
    os.truncate(checkpoint / "x.safetensors", 50)


def flip(checkpoint: Path) -> None:
    content = bytearray((checkpoint / "x.safetensors").read_bytes())
    content[-1] ^= 1
    (checkpoint / "x.safetensors").write_bytes(content)


def lose(checkpoint: Path) -> None:
    (checkpoint / "adapter" / "y.json").unlink()


def lose_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def garble_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text('{"files": ["x"]}')


DAMAGES = {
    cut: r"x\.safetensors has 50 bytes, not \d+",
    flip: r"x\.safetensors is not what manifest\.json says \(sha256\)",
    lose: r"adapter/y\.json is missing",
    lose_manifest: r"manifest\.json is missing",
    garble_manifest: r"manifest\.json is unreadable",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_both_are_named(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    (two / "README.md").write_text("a file that came later does no harm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint_folder.to_resume(tmp_path, Accelerator(cpu=True)) == two
    damage(two)
    with pytest.warns(UserWarning, match=rf"{two} is damaged \({DAMAGES[damage]}.*; going on from {one}, the last"):
        assert checkpoint_folder.to_resume(tmp_path, Accelerator(cpu=True)) == one
    damage(one)
    with pytest.raises(ValueError, match=f"nothing to resume: {tmp_path} holds no whole checkpoint; .*{two}.*{one}"):
        checkpoint_folder.to_resume(tmp_path, Accelerator(cpu=True))


def test_a_checkpoint_from_before_manifests_counts(tmp_path: Path) -> None:
    old = save(tmp_path, 1)
    (old / "manifest.json").unlink()
    (old / "state.json").write_text('{"step": 1}')
    assert checkpoint_folder.newest_whole(tmp_path) == (old, [])
    (old / "state.json").write_text('{"step": ')
    assert checkpoint_folder.newest_whole(tmp_path)[0] is None


def test_making_room_never_takes_the_newest_whole_one(tmp_path: Path) -> None:
    two, four = save(tmp_path, 2), save(tmp_path, 4)
    cut(four)
    three = save(tmp_path, 3, limit=1)  # after going on from 2
    assert checkpoint_folder.newest_whole(tmp_path)[0] == three and four.exists() and not two.exists()
    assert save(tmp_path, 4, limit=1) == four
    assert checkpoint_folder.newest_whole(tmp_path) == (four, []) and checkpoint_folder.checkpoints(tmp_path) == [four]


def test_leftovers_of_a_kill_go(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-7.tmp" / "adapter").mkdir(parents=True)
    (tmp_path / ".metrics.jsonl.tmp").write_text("x")
    (tmp_path / ".mine").write_text("x")
    save(tmp_path, 8)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine", "checkpoint-8"]


def test_the_manifest_is_written_last_and_the_disk_has_all_of_it_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = atomic.sync, os.replace
    monkeypatch.setattr(atomic, "sync", lambda path: done.append(path.name) or sync(path))
    monkeypatch.setattr(os, "replace", lambda old, new: done.append(f"-> {Path(new).name}") or replace(old, new))
    save(tmp_path, 1)
    sealed = done.index("-> manifest.json")
    assert {"x.safetensors", "y.json", "state.json", "adapter", ".manifest.json.tmp"} <= set(done[:sealed])
    assert done[sealed:] == ["-> manifest.json", ".checkpoint-1.tmp", "-> checkpoint-1", tmp_path.name]


def test_a_trainer_goes_on_from_the_one_before(tiny_trainer: Make, tmp_path: Path) -> None:
    tiny_trainer("sd3", max_steps=3, save_steps=1).train()
    file = tmp_path / "run" / "checkpoint-3" / "trainer_state" / "optimizer.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    again = tiny_trainer("sd3", resume=True)
    with pytest.warns(UserWarning, match=r"checkpoint-3 is damaged \(trainer_state/o.* going on from .*checkpoint-2"):
        resume(again.config, again.accelerator, again.state)
    assert again.state.step == 2
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [1, 2]


def test_evaluation_refuses_weights_that_are_not_those_of_the_manifest(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    for source in tiny_checkpoint("sd3").rglob("*"):
        target = tmp_path / source.relative_to(tiny_checkpoint("sd3"))
        target.mkdir() if source.is_dir() else target.write_bytes(source.read_bytes())
    manifest.seal(tmp_path)
    assert adapter_files.read(tmp_path).tensors
    file = adapter_files.find(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged or cut short: .*sha256"):
        adapter_files.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    assert adapter_files.read(tmp_path).tensors


def test_a_card_that_is_brought_up_to_date_leaves_a_checkpoint_whole(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("not evaluated yet")
    (tmp_path / "adapter.safetensors").write_bytes(b"weights")
    manifest.seal(tmp_path)
    (tmp_path / "README.md").write_text("a curve")
    assert manifest.fault(tmp_path) is None
    (tmp_path / "adapter.safetensors").write_bytes(b"Weights")
    assert "adapter.safetensors" in manifest.fault(tmp_path)


# --- disks that are full, and places where nothing can be written


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", ["trainers.checkpoints.checkpoint.save_optimizer_state", "trainers.core.log.Log.metrics"]
)
def test_a_disk_that_fills_up_ends_in_a_line_that_names_the_checkpoint(
    where: str, tiny_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    tiny_trainer("sd3", max_steps=1).train()
    again = tiny_trainer("sd3", max_steps=2, resume=True)
    monkeypatch.setattr(where, full)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, fail_cleanly():
        again.train()
    assert stopped.value.code == 2
    run = tmp_path / "run"
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said == (
        f"error: cannot go on with {run}: No space left on device; the last whole checkpoint is {run}/checkpoint-1, "
        "which --resume goes on from"
    )
    assert not [path for path in run.iterdir() if path.name.startswith(".")]
    assert checkpoint_folder.newest_whole(run) == (run / "checkpoint-1", [])


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """A small file system of its own; skips without the right to mount one."""
    made = []

    def mount(*options: str) -> Path:
        folder = tmp_path / f"mount-{len(made)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        if not sys.platform.startswith("linux") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs is not allowed here")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_real_disk_that_is_full_keeps_the_last_checkpoint(mounted: Callable[..., Path]) -> None:
    disk = mounted("size=256k")
    one = save(disk, 1, numbers=20_000)  # 80 kB
    line = f"No space left on device.*; the last whole checkpoint is {one}, which --resume"
    with pytest.raises(OSError, match=line), checkpoint_folder.explaining(disk):
        save(disk, 2, numbers=60_000)
    with pytest.raises(OSError, match=f"No space left on device: '{disk}/x'"):
        atomic.write_text(disk / "x", "x" * 300_000)
    assert [path.name for path in disk.iterdir()] == ["checkpoint-1"]
    assert checkpoint_folder.newest_whole(disk) == (one, [])


def test_an_evaluation_on_a_full_disk_keeps_its_units_and_goes_on(
    mounted: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    evaluated(Fake(SMALL), tmp_path / "whole")
    merge(tmp_path / "whole")
    disk = mounted("size=64k")
    filler = disk / "filler"
    filler.write_bytes(b"x" * (64 - 28) * 1024)  # room for images and a unit's rows or two
    (disk / "eval").mkdir()
    with pytest.raises(OSError, match=f"cannot write to {disk}/eval: No space left on device; what is scored is kept"):
        for _ in range(9):
            evaluated(Fake(SMALL), disk / "eval")
            filler.write_bytes(filler.read_bytes() + b"x" * 8192)
    filler.unlink()
    merge(disk / "eval")
    evaluated(Fake(SMALL), disk / "eval")
    merge(disk / "eval")
    assert (disk / "eval" / "scores.jsonl").read_text() == (tmp_path / "whole" / "scores.jsonl").read_text()


def test_a_folder_that_cannot_be_written_to_is_refused_before_slow_work(
    mounted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    disk, file = mounted("size=64k", "ro"), tmp_path / "file"
    file.write_text("x")
    for place, reason in ((disk, f"{disk} is not writable"), (file, f"{file} is no folder")):
        argv = ["train_grpo.py", "--model", "/none", "--name", "run", "--reward", "jpeg_compressibility"]
        argv += ["--prompts", "tinyworld:composition/train", "--output_dir", str(place)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped, fail_cleanly():
            train_grpo.main()
        assert stopped.value.code == 2
        assert capsys.readouterr().err == f"error: cannot write to {place}/run: {reason}\n"
        with pytest.raises(OSError, match=f"cannot write to {place}/run: (Read-only|Not a dir|File exists)"):
            folders.held(place / "run").__enter__()


def test_processes_fail_together(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[list[bool]] = []

    def gathered(other: bool) -> Callable[[list[bool]], list[bool]]:
        return lambda mine: said.append(mine) or [*mine, other]

    monkeypatch.setattr("rlg.distributed.gather_object", gathered(other=True))
    with pytest.raises(SystemExit) as stopped, together():
        pass
    assert stopped.value.code == 2 and said == [[False]]
    monkeypatch.setattr("rlg.distributed.gather_object", gathered(other=False))
    for error in (OSError("a"), ValueError("b"), SafetensorError("c")):
        with pytest.raises(type(error), match=str(error)), together():
            raise error
    assert said[1:] == [[True]] * 3
    with together():
        pass
