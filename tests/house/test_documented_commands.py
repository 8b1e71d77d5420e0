"""docs/commands.yaml and the commands of README.md and docs/: each has an entry, and an entry names what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.documented import PAGES, commands
from tests.support.documented_commands import Entry, entries
from tests.support.paths import ROOT


def test_every_command_has_one_entry_and_every_entry_a_command() -> None:
    listed = [entry.command for entry in entries()]
    assert len(set(listed)) == len(listed)
    shown = {command: page.name for page in PAGES for command in commands(page)}
    assert {command: page for command, page in shown.items() if command not in listed} == {}
    assert [command for command in listed if command not in shown] == []


def test_what_an_entry_names_is_there() -> None:
    phases = set(re.findall(r"^phase (\w+) ", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    for entry in entries():
        if entry.kind == "ci":
            assert entry.how in phases, entry
        elif entry.kind == "fake":
            file, _, test = entry.how.partition("::")
            assert f"\ndef {test}(" in (ROOT / file).read_text(), entry
        elif entry.kind == "not":
            assert entry.how, entry


def test_commands_of_a_page_by_hand(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "Run `rlg status` or `rlg.apply`, or\n`python -m\nrlg.sample`; not `rlg NAME`.\n\n"
        "```bash\nrlg train grpo \\\n    --seed 1    # a comment\n\nls '#1'\n```\n\n```python\nrlg configs\n```\n"
    )
    assert commands(page) == ["rlg train grpo --seed 1", "ls '#1'", "rlg status", "python -m rlg.sample"]
    page.write_text("    make test\n")
    with pytest.raises(ValueError, match=r"page\.md: .* not indented: make test"):
        commands(page)


def test_a_command_as_it_is_run() -> None:
    places = {"runs/NAME": "runs/first", "checkpoint-N": "checkpoint-2"}
    entry = Entry('rlg sample --ckpt runs/NAME/checkpoint-N --prompt "a b"', "dry", "--k 1", places)
    assert entry.words() == [
        *("rlg", "sample", "--ckpt", "runs/first/checkpoint-2", "--prompt", "a b", "--k", "1", "--dry_run")
    ]
