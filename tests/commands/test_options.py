"""One vocabulary: each option has one name in every command, and its other names work wherever options are read."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rlg.benchmark import options as benchmark
from rlg.config_parser import Command, as_yaml, option, parse
from rlg.evaluation.options import COMMAND as EVALUATE
from rlg.io.run_folder import run_settings
from rlg.io.spellings import SPELLINGS, canonical, canonical_keys, canonical_words
from rlg.pretraining import settings as pretraining
from rlg.sample import COMMAND as SAMPLE
from tests.support.paths import ROOT
from trainers.core.config import RunConfig, parse_config
from trainers.dpo_config import DPOConfig
from trainers.grpo_config import GRPOConfig
from trainers.nft_config import NFTConfig
from trainers.rwr_config import RWRConfig
from trainers.spm_config import SPMConfig
from trainers.spo_config import SPOConfig

HOMES = [
    *("rlg.app.options", "rlg.average", "rlg.contact_sheet", "rlg.equivalence.experiment", "rlg.evaluation.options"),
    *("rlg.grid", "rlg.pool", "rlg.preferences", "rlg.push", "rlg.report", "rlg.sample", "rlg.status", "rlg.sweep"),
    *("rlg.benchmark.guidance_figure", "rewards.listing", "rewards.serve"),
]
TRAININGS = [DPOConfig, GRPOConfig, NFTConfig, RWRConfig, SPMConfig, SPOConfig]
COMMANDS = [*(import_module(home).COMMAND for home in HOMES), benchmark.GROWTH, benchmark.GRPO, benchmark.GUIDANCE]
COMMANDS += [pretraining.PRETRAIN, pretraining.SHOW]


@dataclass(frozen=True, kw_only=True)
class Options:
    """One of each kind of field."""

    places: tuple[Path, ...] = option(help="words without a name", metavar="PLACE", place=0)
    ckpt: tuple[str, ...] = option((), "given one by one", repeat=True)
    w: tuple[float, ...] = option((0.0, 1.0), "values")
    held_out_reward: tuple[str, ...] | None = option(None, "may be none", may_be_empty=True)
    kernel: str | None = option(None, "a choice", choices=("ode", "sde"))
    kl: float | None = option(None, "a goal", excludes="goal")
    ess: float | None = option(None, "another goal", excludes="goal")
    rows: tuple[dict[str, Any], ...] = option((), "of a file", file_only=True)
    json: bool = option(False, "a switch")
    config: Path | None = None


COMMAND = Command("python -m rlg.some", Options, "A command.\n\nMore.")


@pytest.mark.parametrize("kind", TRAININGS, ids=lambda kind: kind.__name__)
def test_no_training_has_an_option_under_another_name(kind: type[RunConfig]) -> None:
    assert not {field.name for field in dataclasses.fields(kind)} & SPELLINGS.keys()


def test_a_training_takes_other_names_by_both_parsers(tmp_path: Path) -> None:
    former = ["--model", "m", "--guidance-scale=3", "--num_steps", "7", "--noise_level", "0.5"]
    former += ["--per_device_batch_size", "4"]
    (tmp_path / "c.yaml").write_text("name: n\nmodel: other\nguidance_scale: 2\nupdate_batch_size: 2\n")
    expected = GRPOConfig(name="n", base="m", cfg=3.0, steps=7, level=0.5, batch_size=4, update_batch_size=2)
    for read in (parse, parse_config):
        assert read(GRPOConfig, ["--config", str(tmp_path / "c.yaml"), *former]) == expected
    with pytest.raises(ValueError, match="--model and --base are one option; keep --base"):
        parse_config(GRPOConfig, ["--model", "m", "--base", "m"])


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.prog.removeprefix("python -m "))
def test_no_command_has_an_option_under_another_name(command: Command[Any]) -> None:
    names = {field.name for field in dataclasses.fields(command.kind)}
    assert not names & SPELLINGS.keys()
    shown = command.parser().format_help()
    assert command.doc and shown.startswith(f"usage: {command.prog}") and "--dry_run" in shown


def test_names_that_stand_for_several_things_take_the_one_that_is_there() -> None:
    assert canonical("modes", ("mode",)) == "mode"
    assert canonical("modes", ("method", "mode")) == "method"
    assert canonical("sampler", ("sampler",)) == "sampler" and canonical("sampler", ()) == "sampler"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("scales", "w", ["0", "2"]),
        ("guidance_scale", "cfg", ["3"]),
        ("cfg_scale", "cfg", ["3"]),
        ("num_inference_steps", "steps", ["7"]),
        ("num_steps", "steps", ["7"]),
        ("sampler", "kernel", ["sde"]),
        ("noise_level", "level", ["0.5"]),
        ("rewards", "reward", ["a", "b"]),
        ("held_out", "held_out_reward", ["c"]),
        ("modes", "method", ["rlg"]),
        ("blend_modes", "method", ["soup"]),
        ("model", "base", ["x"]),
        ("tuned", "ckpt", ["y"]),
    ],
)
def test_an_evaluation_takes_other_names_on_the_command_line_and_from_yaml(
    old: str, new: str, words: list[str], tmp_path: Path
) -> None:
    asked = EVALUATE.parse([f"--{new}", *words])
    assert asked != EVALUATE.parse([])
    assert EVALUATE.parse([f"--{old}", *words]) == asked
    assert EVALUATE.parse([f"--{old.replace('_', '-')}", *words]) == asked
    file = tmp_path / "c.yaml"
    file.write_text(f"{old}: [{', '.join(words)}]\n" if len(words) > 1 else f"{old}: {words[0]}\n")
    assert EVALUATE.parse(["--config", str(file)]) == asked


def test_one_option_under_two_names_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        SAMPLE.parse(["--ckpt", "x", "--prompt", "y", "--cfg", "1", "--guidance_scale", "2"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: --cfg and --guidance_scale are one option; keep --cfg; see --help\n"
    (tmp_path / "c.yaml").write_text("sampler: ode\nkernel: sde\n")
    with pytest.raises(ValueError, match=r"c\.yaml: sampler and kernel are one option; keep kernel"):
        EVALUATE.parse(["--config", str(tmp_path / "c.yaml")])


def test_the_command_line_wins_over_a_file_under_another_name(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("guidance_scale: 3\nsteps: 4\n")
    asked = EVALUATE.parse(["--config", str(tmp_path / "c.yaml"), "--cfg", "5"])
    assert (asked.cfg, asked.steps) == (5.0, 4)


def test_words_that_are_no_options_stay_as_they_are() -> None:
    words = ["grow", "--max-steps", "3", "--model=a--b", "model", "--", "-1", "--unknown"]
    assert canonical_words(words, {"base", "max_steps"}) == [
        *("grow", "--max_steps", "3", "--base=a--b", "model", "--", "-1", "--unknown")
    ]
    assert canonical_keys({"a": 1, "model": 2}, {"base"}, "f") == {"a": 1, "base": 2}


def test_a_run_of_before_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    row = "model: m\nnum_steps: 7\nguidance_scale: 3.5\nnoise_level: 0.6\nkernel: cps\nreward: [ocr]\nprompts: train\n"
    (tmp_path / "config.yaml").write_text(f"{row}eval_prompts: test\nheld_out_reward: []\n")
    assert run_settings(tmp_path) == {
        **{"prompts": "test", "steps": 7, "cfg": 3.5, "level": 0.6, "kernel": "cps"},
        **{"reward": ("ocr",), "held_out_reward": ()},
    }


def test_the_glossary_lists_all_names() -> None:
    table = (ROOT / "docs" / "concepts.md").read_text().partition("## Other names")[2]
    listed = {}
    for line in re.findall(r"^\| `.*", table, re.MULTILINE):
        here, others = (re.findall(r"`([a-z_]+)`", cell) for cell in line.strip("|").split("|"))
        for other in others:
            listed.setdefault(other, set()).update(here)
    assert listed == {other: set(names) for other, names in SPELLINGS.items()}


# --- the builder


def test_fields_of_each_kind_are_read() -> None:
    argv = ["a", "b", "--json", "--ckpt", "x", "--ckpt=y", "--w", "-1", "2", "--held_out_reward", "--ess", "1"]
    assert COMMAND.parse(argv) == Options(
        places=(Path("a"), Path("b")), json=True, ckpt=("x", "y"), w=(-1.0, 2.0), held_out_reward=(), ess=1.0
    )
    assert COMMAND.parse(["--json", "a"]).places == (Path("a"),)  # a switch takes no word


def test_a_file_gives_what_the_command_line_does_not(tmp_path: Path) -> None:
    file = tmp_path / "named.yaml"
    file.write_text("ckpt: [x, 2]\nw: 3\nkl: 1e-3\nheld_out_reward: []\nrows: [{a: 1}]\njson: yes\n")
    read = COMMAND.parse(["p", "--config", str(file)])
    expected = {"ckpt": ("x", "2"), "w": (3,), "kl": 1e-3, "held_out_reward": (), "rows": ({"a": 1},), "json": True}
    assert read == Options(places=(Path("p"),), config=file, **expected)
    over = COMMAND.parse(["p", "--config", str(file), "--ckpt", "z", "--w", "1", "2"])
    assert (over.ckpt, over.w, over.kl) == (("z",), (1.0, 2.0), 1e-3)


@pytest.mark.parametrize(
    ("text", "argv", "said"),
    [
        ("kl: 0\n", ["p", "--ess", "2"], "--kl and --ess exclude each other; give one of them"),
        ("kernel: euler\n", ["p"], "kernel must be one of ode, sde, got 'euler'"),
        ("{}\n", ["p", "--kernel", "euler"], "argument --kernel: invalid choice: 'euler'"),
        ("w: [1, .nan]\n", ["p"], "w must be"),
        ("{}\n", ["p", "--w", "nan"], "w must be finite, got nan"),
        ("places: [p]\n", ["p"], "unknown option places"),
        ("{}\n", [], "the following arguments are required"),
        ("w: [a]\n", ["p"], "w must be"),
        ("kl: many\n", ["p"], "argument --kl: invalid float value: 'many'"),
        ("{}\n", ["p", "--rows", "1"], "unrecognized arguments: --rows 1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    text: str, argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises((ValueError, SystemExit)) as caught:
        COMMAND.parse([*argv, "--config", str(tmp_path / "c.yaml")])
    told = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert said in told and told.count("\n") <= 1


def test_a_dry_run_prints_what_config_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--ckpt", "x", "--prompt", "a: b", "é", "--w", "0.5"]
    with pytest.raises(SystemExit) as stopped:
        SAMPLE.parse([*argv, "--dry_run"])
    assert stopped.value.code == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    read, asked = SAMPLE.parse(["--config", str(tmp_path / "c.yaml")]), SAMPLE.parse(argv)
    assert read == asked and as_yaml(read) == as_yaml(asked)
    shown = as_yaml(COMMAND.parse(["p", "--w", "1"]))
    assert "w:\n- 1.0\n" in shown and "places" not in shown and "config" not in shown
