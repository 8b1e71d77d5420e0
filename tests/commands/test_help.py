"""--help and a typo are answered before torch and its like are loaded: at once, that is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rlg import choices
from rlg.benchmark.architectures import ARCHITECTURES
from rlg.models.loading import DTYPES
from tests.support.paths import ROOT

HEAVY = ("torch", "transformers", "diffusers", "datasets", "matplotlib", "accelerate", "trl")
COMMANDS = [
    *(f"rlg.{name}" for name in ("app", "average", "equivalence", "evaluate", "grid", "push", "report", "sample")),
    *(f"rlg.benchmark{name}" for name in ("", " guidance", " growth", " grpo")),
    *("rlg.contact_sheet", "rlg.benchmark.guidance_figure", "rlg.status", "rlg.sweep", "rewards", "rewards.serve"),
    *("rlg.preferences", "rlg.pretraining", "rlg.pretraining.show", "rlg.tinyworld.show"),
    "rlg.pretraining.sprites",
    *(
        f"train_{name}"
        for name in (
            "adjoint_matching",
            "dpo",
            "dpo --online",
            "draft",
            "grpo",
            "nft",
            "rwr",
            "spm",
            "spo",
            "vgg_flow",
        )
    ),
]
TRY = """
import contextlib, io, json, runpy, sys

heavy, commands, found = json.loads(sys.argv[1]), json.loads(sys.argv[2]), {}
for command in commands:
    module, *rest = command.split()
    for option in ("--help", "--no_such_option"):
        sys.argv = [module, *rest, option]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as stopped:
                code = stopped.code or 0
        loaded = sorted(set(heavy) & set(sys.modules))
        found[f"{command} {option}"] = [code, out.getvalue(), err.getvalue(), loaded]
        assert not loaded, (command, option, loaded)
print(json.dumps(found))
"""


def test_help_and_a_typo_load_nothing_heavy() -> None:
    words = [sys.executable, "-W", "ignore", "-c", TRY, json.dumps(HEAVY), json.dumps(COMMANDS)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(COMMANDS)
    for said, (code, out, err, loaded) in found.items():
        assert not loaded
        if said.endswith("--help"):
            assert (code, err) == (0, ""), said
            assert len(out) > 100, said
        else:
            assert (code, out) == (2, ""), said
            assert err.startswith("error: ") and err.count("\n") == 1, err


def test_names_that_are_offered_are_those_that_exist() -> None:
    assert tuple(ARCHITECTURES) == choices.ARCHITECTURES
    assert tuple(DTYPES) == choices.DTYPES


def test_what_readme_and_model_cards_say_works_after_import_rlg_alone() -> None:
    code = """
import json, sys
import rlg
public = dir(rlg)
place = str(rlg.tinyworld.path("tiny-sd3"))
light = not {"torch", "diffusers"} & set(sys.modules)
print(json.dumps([public, place, light, all(getattr(rlg, name) for name in public)]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    public, place, light, all_there = json.loads(done.stdout)
    assert public == ["Guide", "__version__", "apply", "tinyworld"]
    assert (Path(place) / "model_index.json").is_file()
    assert light and all_there


def test_a_missing_model_is_said_before_torch_is_loaded() -> None:
    """`rlg.app` took seconds to say it."""
    asked = "import runpy, sys; sys.argv = ['app']\ntry: runpy.run_module('rlg.app', run_name='__main__')\n"
    asked += "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules)"
    words = [sys.executable, "-W", "ignore", "-c", asked]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.startswith("error: --ckpt is needed (or --tuned)") and done.stderr.count("\n") == 1
