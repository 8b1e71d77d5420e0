"""The command `rlg`, the configs that it finds by name, the packages that it needs, and the distribution's name."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rlg import __main__ as command
from rlg import cli, config_files, extras, own_packages
from rlg.evaluation import options as evaluation_options
from rlg.evaluation.folder import command_line
from tests.support.paths import ROOT
from trainers.commands import TRAINERS
from trainers.core.config import parse_config
from trainers.spo import SPOConfig

ONLINE = "--base tiny-sd3 --name x --reward gravity --prompts tinyworld:composition/train --mixed_precision no"
TRY = """
import contextlib, io, json, sys
from rlg import __main__

found = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["rlg", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            __main__.main()
            code = 0
        except SystemExit as stopped:
            code = stopped.code or 0
    found.append([code, out.getvalue(), err.getvalue()])
    assert not {"torch", "transformers", "diffusers", "datasets", "matplotlib"} & set(sys.modules), words
print(json.dumps(found))
"""


def python(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with this clone on its path, started in a folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def as_rlg(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Run `rlg WORDS` in this process, and leave nothing of it."""
    monkeypatch.setattr(cli, "_started_as", None)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["/somewhere/bin/rlg", *words])
        command.main()

    yield run


def test_lists_help_and_typos_load_nothing_heavy(tmp_path: Path) -> None:
    asked = [
        ["configs", "tiny/demo"],
        ["configs", "tiny/dmo"],
        [],
        ["--help"],
        ["--version"],
        ["evaluat"],
        ["--no_such_option"],
        ["train"],
        ["train", "gprp"],
        ["evaluate", "--help"],
        ["serve", "--no_such_option"],
    ]
    done = python(tmp_path, "-c", TRY, json.dumps(asked))
    assert done.returncode == 0, done.stderr
    where, near, alone, told, version, typo, option, train, trainer, helped, serve = json.loads(done.stdout)
    assert alone == told
    code, listed, err = alone
    assert (code, err) == (0, "")
    assert "  average          Average the adapters of a run's checkpoints into one\n" in listed
    assert all(re.search(rf"^  {name} +[A-Z].{{10}}", listed, re.MULTILINE) for name in command.COMMANDS)
    assert version == [0, "rlg 0.1.0\n", ""]
    assert typo == [2, "", "error: no such command: rlg evaluat; did you mean rlg evaluate? `rlg` lists all\n"]
    assert option == [2, "", "error: no such command: rlg --no_such_option; `rlg` lists all\n"]
    assert train[0] == 0 and [line.split()[0] for line in train[1].splitlines()[2:]] == list(TRAINERS)
    expected = "error: no such command: rlg train gprp; did you mean rlg train grpo? `rlg train` lists all\n"
    assert trainer == [2, "", expected]
    assert helped[0] == 0 and helped[1].startswith("usage: rlg evaluate [-h]")
    assert serve[0] == 2 and serve[2].startswith("error: ") and serve[2].count("\n") == 1
    assert where == [0, f"{ROOT}/configs/tiny/demo.yaml\n", ""]
    assert near[0] == 2 and near[2].startswith("error: no such config: tiny/dmo; there is tiny/demo, ")


def test_every_module_that_is_a_command_is_listed() -> None:
    files = [file for package in ("rlg", "rewards", "trainers") for file in (ROOT / package).rglob("*.py")]
    modules = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for file in files
        if 'if __name__ == "__main__"' in file.read_text()
    }
    by_benchmark = {"rlg.benchmark.growth", "trainers.benchmark.grpo"}
    former = {"rlg.tinyworld.preferences", "rlg.tinyworld.show"}
    assert modules - by_benchmark - former - {"rlg"} == {
        name.removesuffix(".__main__") for name in command.COMMANDS.values() if name != "trainers.commands"
    }


def test_usage_lines_name_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.Parser(prog="python -m rlg.grid").format_usage().startswith("usage: python -m rlg.grid ")
    cli_name = {"python -m rlg.grid": "rlg grid", "python -m rlg.benchmark growth": "rlg benchmark growth"}
    cli_name |= {"python -m rewards": "rlg rewards", "python -m rlg.pretraining.show": "rlg show", "x": "x"}
    monkeypatch.setattr(cli, "_started_as", "rlg")
    assert {words: cli.called(words) for words in cli_name} == cli_name
    assert cli.Parser(prog="python -m rlg.grid").format_usage().startswith("usage: rlg grid ")
    monkeypatch.setattr(cli, "_started_as", "python -m rlg")
    assert cli.called("python -m rlg.grid") == "python -m rlg grid"
    assert cli.called("python -m rlg train grpo") == "python -m rlg train grpo"


def test_every_usage_line_names_a_subcommand() -> None:
    files = [file for package in ("rlg", "rewards", "trainers") for file in (ROOT / package).rglob("*.py")]
    modules = {name for file in files for name in re.findall(r'Command\(\s*"python -m ([\w.]+)', file.read_text())}
    assert {"rlg.evaluate", "rlg.grid", "rewards.serve"} <= modules
    assert {name.rpartition(".")[2] for name in modules} <= set(command.COMMANDS)


def test_a_report_shows_the_command_as_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", SimpleNamespace(__spec__=SimpleNamespace(name="rlg.evaluate")))
    monkeypatch.setattr(sys, "argv", ["/x/rlg/evaluate.py", "--ckpt", "runs/a b"])
    assert command_line() == "python -m rlg.evaluate --ckpt 'runs/a b'"
    monkeypatch.setattr(cli, "_started_as", "rlg")
    assert command_line() == "rlg evaluate --ckpt 'runs/a b'"


def test_root_scripts_and_the_command_have_one_entry() -> None:
    scripts = {
        file.stem.removeprefix("train_"): importlib.import_module(file.stem) for file in ROOT.glob("train_*.py")
    }
    assert {name: script.main for name, script in scripts.items()} == TRAINERS


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["grpo", "--config", "tiny/grpo_sd3_composition"], {"name": "tiny-sd3-composition", "beta": 0.0}),
        (["dpo", "--config", "tiny/dpo_sd3"], {"data": "runs/preferences-sd3"}),
        (["dpo", "--online", *ONLINE.split()], {"prompts": "tinyworld:composition/train", "reward": ["gravity"]}),
    ],
    ids=["grpo", "dpo", "dpo --online"],
)
def test_trains_by_the_name_of_a_config_in_any_folder(
    words: list[str],
    shown: dict[str, object],
    as_rlg: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        as_rlg("train", *words, "--dry_run")
    assert stopped.value.code == 0
    resolved = yaml.safe_load(capfd.readouterr().out)
    assert {name: resolved[name] for name in shown} == shown


def test_a_training_that_is_refused_is_one_line(as_rlg: Callable[..., None], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        as_rlg("train", "spo", "--config", "tiny/spo_sd4")
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: no such config: tiny/spo_sd4; there is tiny/spo_sd") and said.count("\n") == 1


def test_configs_by_name_and_a_users_own_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    demo = ROOT / "configs" / "tiny" / "demo.yaml"
    (tmp_path / "tiny" / "demo").mkdir(parents=True)  # a folder is no config
    for name in ("tiny/demo", "tiny/demo.yaml", "configs/tiny/demo.yaml", Path("tiny/demo")):
        assert config_files.find(name) == demo
    assert config_files.find("launch/accelerate/cpu.yaml") == ROOT / "launch" / "accelerate" / "cpu.yaml"
    own = tmp_path / "tiny" / "demo.yaml"
    own.write_text("name: mine\n")
    assert config_files.find("tiny/demo.yaml") == Path("tiny/demo.yaml")
    assert config_files.find(str(own)) == own
    assert config_files.find("tiny/demo") == demo
    for name in ("demo", f"{ROOT}/configs/tiny/demo", "../configs/tiny/demo", ""):
        with pytest.raises(ValueError, match=f"^no such config: {re.escape(str(Path(name)))}.*`rlg configs` lists"):
            config_files.find(name)


def test_every_config_of_the_clone_has_a_name() -> None:
    files = {*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("launch/accelerate/*.yaml")}
    assert len(files) > 60
    assert set(config_files.shipped().values()) == files


def test_an_installed_package_has_its_own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_files.resources, "files", lambda _: tmp_path / "site-packages" / "rlg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site-packages" / "configs").mkdir(parents=True)  # somebody else's
    assert config_files.folders() == []
    inside = tmp_path / "site-packages" / "rlg" / "configs"
    (inside / "tiny").mkdir(parents=True)
    (inside / "tiny" / "demo.yaml").write_text("# One. Two.\nname: demo\n")
    assert config_files.find("configs/tiny/demo.yaml") == inside / "tiny" / "demo.yaml"
    assert config_files.table() == "tiny/demo  One"


def test_evaluations_and_trainings_take_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args = evaluation_options.COMMAND.parse(["--config", "eval/demo", "--ckpt", "x"])
    assert (args.cfg, args.batch_size) == (2.0, 144)
    config = parse_config(SPOConfig, ["--config", "tiny/demo", "--max_steps", "1"])
    assert (config.name, config.max_steps, config.divert_end_step) == ("demo", 1, 6)


def test_sentences_of_lists() -> None:
    assert cli.first_sentence("One thing.\n\nMore of it.") == "One thing"
    assert cli.first_sentence("One thing, on\ntwo lines. More.") == "One thing, on two lines"
    long = "A sentence that begins with some words: " + "and goes on " * 9
    assert cli.first_sentence(long) == "A sentence that begins with some words"
    assert cli.first_sentence(long.replace(":", "")).endswith(" ...")


@pytest.mark.parametrize("name", own_packages.PACKAGES)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_another_package_of_the_same_name_is_told_in_one_line(name: str, kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    else:
        (tmp_path / f"{name}.py").touch()
    place = tmp_path / (name if kind == "folder" else f"{name}.py")
    starts = {"rewards": [["rlg.evaluate"], ["rlg", "rewards"]], "trainers": [["rlg", "train", "grpo"]]}
    for start in starts[name]:
        done = python(tmp_path, "-m", *start, "--ckpt", "x")
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        fix = "rename it, or give the command as `rlg`, without `python -m`"
        assert done.stderr == f"error: {place} hides RLG's own package '{name}' ({ROOT / name}): {fix}\n"
    done = python(tmp_path, "-m", "rlg.status", ".")  # which needs neither
    assert done.returncode == 0, done.stderr
    done = python(tmp_path, "-c", f"import rlg, {name}; print({name}.__file__)")  # a program of the user's
    assert done.stdout.startswith(str(place)), done.stderr


def test_a_folder_of_data_hides_nothing_and_a_path_is_told_as_one(tmp_path: Path) -> None:
    (tmp_path / "rewards").mkdir()  # no package: Python takes ours, which comes later
    assert python(tmp_path, "-m", "rlg", "rewards").returncode == 0
    other = tmp_path / "other" / "rewards"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    code = f"import sys; sys.path.insert(0, {str(other.parent)!r}); sys.argv = ['rlg', 'rewards']\n"
    done = python(tmp_path, "-c", f"{code}import rlg.__main__; rlg.__main__.main()")
    assert done.returncode == 2
    assert done.stderr.endswith("rename it, or take it off Python's path\n")


@pytest.mark.parametrize(
    ("typed", "seen", "expected"),
    [
        (["python", "-m", "rlg.evaluate", "--ckpt", "x"], ["-m", "--ckpt", "x"], True),
        (["python", "-u", "-m", "rlg"], ["-m"], True),
        (["python", "-mrlg.evaluate"], ["-m"], True),
        (["python", "-m", "theirs.rlg", "rlg.evaluate"], ["-m", "rlg.evaluate"], False),
        (["python", "-c", "import rlg"], ["-c"], False),
        (["python", "their.py", "-m", "rlg"], ["their.py", "-m", "rlg"], False),
    ],
)
def test_what_is_a_command(typed: list[str], seen: list[str], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.setattr(sys, "argv", seen)
    assert own_packages.is_command() is expected


def test_the_distribution_has_one_name() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == extras.DISTRIBUTION != "rlg"
    own = [text for extra in project["optional-dependencies"].values() for text in extra if "[" in text]
    assert len(own) == 2 and all(text.startswith(f"{extras.DISTRIBUTION}[") for text in own)
    assert project["scripts"] == {"rlg": "rlg.__main__:main"}
    assert extras.install("app") == "pip install '.[app]' in a clone (rl-guidance is not on PyPI yet)"


def test_nobody_is_told_to_install_another_project() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    kinds = (".py", ".md", ".sh", ".toml", ".yaml", "Makefile")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name.endswith(kinds)]
    texts = {file.relative_to(ROOT).as_posix(): file.read_text() for file in files if file.is_file()}
    assert {"README.md", "Makefile", "rlg/app/__main__.py"} <= texts.keys()
    told = {name for name, text in texts.items() if re.search(r"(?<![\w.-])rlg\[[a-z]", text)}
    told -= {"CHANGELOG.md", f"tests/{Path(__file__).name}"}  # the past, and this
    assert not told
    wanted = {extra for text in texts.values() for extra in re.findall(r"'\.\[(\w+)\]'", text)} - {"thing"}
    known = tomllib.loads(texts["pyproject.toml"])["project"]["optional-dependencies"]
    assert {"app", "sweep", "wandb"} <= wanted <= known.keys()
