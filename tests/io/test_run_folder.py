"""Names of a run's files: those that runs on disk have, written and read by one rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlg.io import run_folder


def test_names_are_those_of_the_files() -> None:
    """A changed name would make older runs unreadable."""
    assert run_folder.checkpoint_at(Path("runs/a"), 70) == Path("runs/a/checkpoint-70")
    assert run_folder.state_file(Path("c"), "lora_old") == Path("c/trainer_state/lora_old.safetensors")
    assert run_folder.sample_name(7, ".png") == "step-000007.png"
    assert [run_folder.image_name(3, 0, w) for w in (0.0, 1.5)] == ["3-0-0.png", "3-0-1.5.png"]
    assert run_folder.rows_name(2) == "scores-2.jsonl"


def test_the_rows_of_a_process_are_told_from_the_joined_ones() -> None:
    own, joined = Path(run_folder.rows_name(0)), Path(run_folder.ROWS)
    assert own.match(run_folder.ALL_ROWS) and joined.match(run_folder.ALL_ROWS)
    assert own.match(run_folder.UNJOINED_ROWS) and not joined.match(run_folder.UNJOINED_ROWS)


@pytest.mark.parametrize("name", ["checkpoint-", "checkpoint-7.tmp", "checkpoint-²", "checkpoint-1" + 18 * "0", "7"])
def test_what_is_no_checkpoint_has_no_step(name: str) -> None:
    assert run_folder.step_of(name) is None


def test_a_checkpoint_has_its_step() -> None:
    assert run_folder.step_of(run_folder.checkpoint_name(70)) == run_folder.step_of("checkpoint-0070") == 70
