"""One writer a folder: who is refused, what is said, and that a lock dies with its process."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rlg import evaluate, grid
from rlg.equivalence import __main__
from rlg.io import folders
from trainers.grpo import GRPOTrainer


@contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """Within, a child holds the folder; it is killed afterwards."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with folders.held(folder):
                os.write(writing, b"1")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(reading, 1) == b"1"
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


def test_a_lock_names_its_owner_and_dies_with_it(tmp_path: Path) -> None:
    with another_process(tmp_path) as child:
        before = (tmp_path / folders.LOCK).read_bytes()
        for attempt in (folders.check, lambda folder: folders.held(folder).__enter__()):
            with pytest.raises(ValueError, match=rf"{tmp_path} is in use: process {child} on .*; wait for it, or"):
                attempt(tmp_path)
        assert (tmp_path / folders.LOCK).read_bytes() == before
    assert (tmp_path / folders.LOCK).is_file()  # a kill leaves the file, which says nothing by itself
    folders.check(tmp_path)
    with folders.held(tmp_path):
        assert (tmp_path / folders.LOCK).read_text().split()[0] == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_a_lock_that_can_not_be_written_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes the empty file, and not the name in it."""

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = set(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match=r"cannot write to .*/a: No space left on device; give another folder"):
            folders.held(tmp_path / "a").__enter__()
    assert not list(tmp_path.iterdir()) and set(os.listdir("/proc/self/fd")) == before
    with folders.held(tmp_path / "a"):
        pass


def test_what_was_made_for_a_lock_goes_with_it(tmp_path: Path) -> None:
    with folders.held(tmp_path / "a" / "b"):
        assert not folders.content(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    with folders.held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_lock_on_a_file_that_its_last_owner_deleted_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not calls:
            (tmp_path / folders.LOCK).unlink()  # between opening the file and locking it
        calls.append(kind)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with folders.held(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is in use"):
            folders.check(tmp_path)


def test_a_file_system_without_locks_gets_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available."), folders.held(tmp_path):
        pass


def test_a_link_instead_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / folders.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="cannot write to"), folders.held(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_training_is_refused(tiny_trainer: Callable[..., GRPOTrainer], tmp_path: Path) -> None:
    trainer = tiny_trainer("sd3", max_steps=1)
    with folders.held(tmp_path / "run"), pytest.raises(ValueError, match="run is in use: process"):
        trainer.train()
    trainer.train()
    assert not (tmp_path / "run" / folders.LOCK).exists()
    again = tiny_trainer("sd3", max_steps=1, overwrite=True)
    with (
        folders.held(tmp_path / "run" / "eval" / "x"),
        pytest.raises(ValueError, match="eval/x is in use: process"),
    ):
        again.train()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def refused(command: Callable[[], object], folder: Path, capsys: pytest.CaptureFixture) -> None:
    with folders.held(folder), pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 2
    assert f"error: {folder} is in use: process {os.getpid()} on" in capsys.readouterr().err
    assert not folder.exists()


def test_evaluations_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = ["--num_prompts", "1", "--k", "1", "--steps", "1", "--method", "rlg", "--w", "0", "1"]
    argv = ["--ckpt", str(tiny_checkpoint("sd3")), *small, "--output", str(tmp_path / "out")]
    refused(lambda: evaluate.main(argv), tmp_path / "out", capsys)
    refused(lambda: grid.main([*argv, "--axis", "cfg", "--values", "1"]), tmp_path / "out", capsys)
    refused(lambda: __main__.main(["--toy", "--output", str(tmp_path / "toy")]), tmp_path / "toy", capsys)
