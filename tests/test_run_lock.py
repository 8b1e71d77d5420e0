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

from rlg import equivalence, evaluate, grid, run_lock
from trainers.grpo import GRPOTrainer


@contextmanager
def another_process(folder: Path) -> Iterator[int]:
    """Within, a child holds the folder; it is killed afterwards."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with run_lock.held(folder):
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
        before = (tmp_path / run_lock.LOCK).read_bytes()
        for attempt in (run_lock.check, lambda folder: run_lock.held(folder).__enter__()):
            with pytest.raises(ValueError, match=rf"{tmp_path} is in use: process {child} on .*; wait for it, or"):
                attempt(tmp_path)
        assert (tmp_path / run_lock.LOCK).read_bytes() == before
    assert (tmp_path / run_lock.LOCK).is_file()  # a kill leaves the file, which says nothing by itself
    run_lock.check(tmp_path)
    with run_lock.held(tmp_path):
        assert (tmp_path / run_lock.LOCK).read_text().split()[0] == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_what_was_made_for_a_lock_goes_with_it(tmp_path: Path) -> None:
    with run_lock.held(tmp_path / "a" / "b"):
        assert not run_lock.content(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    with run_lock.held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "mine").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_lock_on_a_file_that_its_last_owner_deleted_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def late(descriptor: int, kind: int) -> None:
        if not calls:
            (tmp_path / run_lock.LOCK).unlink()  # between opening the file and locking it
        calls.append(kind)
        flock(descriptor, kind)

    monkeypatch.setattr(fcntl, "flock", late)
    with run_lock.held(tmp_path):
        assert len(calls) == 2
        with pytest.raises(ValueError, match="is in use"):
            run_lock.check(tmp_path)


def test_a_file_system_without_locks_gets_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available."), run_lock.held(tmp_path):
        pass


def test_a_link_instead_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / run_lock.LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="cannot write to"), run_lock.held(tmp_path / "run"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_training_is_refused(tiny_trainer: Callable[..., GRPOTrainer], tmp_path: Path) -> None:
    trainer = tiny_trainer("sd3", max_steps=1)
    with run_lock.held(tmp_path / "run"), pytest.raises(ValueError, match="run is in use: process"):
        trainer.train()
    trainer.train()
    assert not (tmp_path / "run" / run_lock.LOCK).exists()
    again = tiny_trainer("sd3", max_steps=1, overwrite=True)
    with (
        run_lock.held(tmp_path / "run" / "eval" / "x"),
        pytest.raises(ValueError, match="eval/x is in use: process"),
    ):
        again.train()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def refused(command: Callable[[], object], folder: Path, capsys: pytest.CaptureFixture) -> None:
    with run_lock.held(folder), pytest.raises(SystemExit) as stopped:
        command()
    assert stopped.value.code == 2
    assert f"error: {folder} is in use: process {os.getpid()} on" in capsys.readouterr().err
    assert not folder.exists()


def test_evaluations_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    small = ["--num_prompts", "1", "--k", "1", "--steps", "1", "--modes", "rlg", "--scales", "0", "1"]
    argv = ["--ckpt", str(tiny_checkpoint("sd3")), *small, "--output", str(tmp_path / "out")]
    refused(lambda: evaluate.main(argv), tmp_path / "out", capsys)
    refused(lambda: grid.main([*argv, "--axis", "cfg", "--values", "1"]), tmp_path / "out", capsys)
    refused(lambda: equivalence.main(["--toy", "--output", str(tmp_path / "toy")]), tmp_path / "toy", capsys)
