"""Run the commands of README.md and docs/ that docs/commands.yaml calls `run` and `dry` (`make test-docs`).

They run one after another in one process, in a scratch folder that has the repository's files and no runs, so that
libraries are loaded once. `accelerate launch` is read by accelerate's own parser, and its program runs as one process.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import yaml

from tests.support.commands import run as run_module
from tests.support.paths import ROOT

LIST = ROOT / "docs" / "commands.yaml"
KINDS = ("run", "dry", "fake", "ci", "not")
_DRY_RUN = "--dry_run"
_SHIPPED = re.compile(r"\$\(rlg configs ([\w/]+)\)")


@dataclass(frozen=True)
class Entry:
    """A command of the pages, and how it is tested."""

    command: str
    kind: str
    how: str  # options of run and dry; a test; a phase; a reason
    places: Mapping[str, str] = field(default_factory=dict)

    def words(self) -> list[str]:
        """The command as it is run."""
        text = self.command
        for name, place in self.places.items():
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", place, text)
        text = _SHIPPED.sub(lambda match: str(ROOT / "launch" / f"{match[1]}.yaml"), text)
        return [*shlex.split(text), *shlex.split(self.how), *([_DRY_RUN] if self.kind == "dry" else [])]


def entries() -> list[Entry]:
    """The list. Raises ValueError for an entry that has not one kind."""
    listed = yaml.safe_load(LIST.read_text(encoding="utf-8"))
    found = []
    for row in listed["commands"]:
        command, places = " ".join(row.pop("command").split()), row.pop("places", {})
        if len(row) != 1 or not row.keys() <= set(KINDS):
            raise ValueError(f"{LIST.name}: {command}: one of {', '.join(KINDS)} is needed, got {', '.join(row)}")
        ((kind, how),) = row.items()
        found.append(Entry(command, kind, how, {**places, **listed["places"]}))
    return found


def execute(words: Sequence[str]) -> None:
    """Run a command in this process, a script of bash beside it. Raises SystemExit, or what it raises."""
    if words[0] == "bash":
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        print(done.stdout)
        sys.exit(done.returncode)
    elif words[:2] == ["python", "-m"]:
        run_module(words[2], words[3:])
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        asked = launch_command_parser().parse_args(words[2:])
        assert asked.config_file is None or Path(asked.config_file).is_file(), asked.config_file
        if asked.module:
            run_module(asked.training_script, asked.training_script_args)
        else:
            with patch("sys.argv", [asked.training_script, *asked.training_script_args]):
                runpy.run_path(asked.training_script, run_name="__main__")
    else:
        assert words[0] == "rlg", words
        with patch("sys.argv", list(words)):
            from rlg.__main__ import main

            main()


def outcome(entry: Entry) -> str:
    """What went wrong; empty where nothing did."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
        try:
            execute(entry.words())
        except SystemExit as ended:
            return "" if ended.code in (None, 0) else f"{said.getvalue()}\nexit code {ended.code}"
        except Exception:
            return f"{said.getvalue()}\n{traceback.format_exc()}"
    return ""


def scratch(folder: Path) -> None:
    """Make a folder the repository's, without its runs, and with the prompts that a config of a large model names."""
    for name in ("configs", "launch", "rlg", "trainers", "rewards", *(file.name for file in ROOT.glob("train_*.py"))):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs" / "img").mkdir(parents=True)
    (folder / "data" / "ocr").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "data" / "ocr" / f"{split}.txt").write_text('a sign that says "hello"\n' * 64)


def main() -> None:
    """Run all; exit with 1 if one failed."""
    failed, asked = 0, [entry for entry in entries() if entry.kind in ("run", "dry")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # more of them wait for one another where other work runs
    with tempfile.TemporaryDirectory() as folder:
        scratch(Path(folder))
        os.chdir(folder)
        for entry in asked:
            started = time.perf_counter()
            problem = outcome(entry)
            print(
                f"{'failed' if problem else 'passed'} {time.perf_counter() - started:6.1f} s  {entry.command}",
                flush=True,
            )
            if problem:
                failed += 1
                print(f"  as: {shlex.join(entry.words())}\n{problem}", flush=True)
        os.chdir(ROOT)
    print(f"{len(asked) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
