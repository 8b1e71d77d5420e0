"""Runs of before: options that were retired since, and online DPO before it was a field."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml

from rlg.io.run_folder import is_of_run, run_settings
from rlg.publishing import model_card
from rlg.runs import status
from tests.support.commands import options, run
from trainers.core.config import RunConfig, parse_config
from trainers.dpo_config import DPOConfig
from trainers.rwr_config import RWRConfig
from trainers.spo_config import SPOConfig

TINY = {"name": "run", "dtype": "float32", "per_device_batch_size": 4, "guidance_scale": 1.0, "max_steps": 1}
TINY |= {"lora_rank": 2, "lora_alpha": 4, "num_steps": 3, "ema_decay": 0.0, "sample_steps": 0}
TINY |= {"reward": "jpeg_compressibility", "prompts": "tinyworld:composition/train", "num_prompts": 2}
TINY |= {"num_generations": 2}
OWN = {
    "rwr": {"num_train_steps": 1},
    "spo": {"divert_start_step": 0, "threshold": 0.0, "num_candidates": 2},
    "dpo": {"beta": 20.0, "online": True},
}
DEFAULTS = {"scale_rewards": "batch", "reward_aggregation": "sum", "advantage_clip": 5.0}
FORMER = {"base": "model", "batch_size": "per_device_batch_size", "cfg": "guidance_scale", "steps": "num_steps"}
FORMER |= {"level": "noise_level"}
Begin = Callable[..., Path]


def as_before(row: dict[str, Any]) -> None:
    """Change a config.yaml into one that an older version wrote."""
    row.update(DEFAULTS)
    for name, former in FORMER.items():
        row[former] = row.pop(name)


@pytest.fixture
def begin(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Begin:
    """A run of one step, whose config.yaml files are then as an older version wrote them."""

    def make(algorithm: str, change: Callable[[dict[str, Any]], Any]) -> Path:
        settings = TINY | OWN[algorithm] | {"model": tiny_folder("sd3"), "output_dir": tmp_path}
        run(f"train_{algorithm}", options(**settings))
        for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-1"):
            row = yaml.safe_load((folder / "config.yaml").read_text())
            change(row)
            (folder / "config.yaml").write_text(yaml.safe_dump(row))
            if (folder / "manifest.json").exists():
                (folder / "manifest.json").unlink()
                state = json.loads((folder / "state.json").read_text())
                (folder / "state.json").write_text(json.dumps({k: v for k, v in state.items() if k != "sealed"}))
        return tmp_path / "run"

    return make


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("place", ["", "checkpoint-1"])
@pytest.mark.parametrize(("algorithm", "kind"), [("rwr", RWRConfig), ("spo", SPOConfig)])
def test_an_old_run_goes_on_without_what_never_did_anything(
    algorithm: str, kind: type[RunConfig], place: str, begin: Begin
) -> None:
    folder = begin(algorithm, as_before)
    file = folder / place / "config.yaml"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*(is left out|resuming)")
        config = parse_config(kind, ["--config", str(file), "--resume"])
        assert type(config) is kind and config.num_prompts == 2 and not DEFAULTS.keys() & vars(config).keys()
        run(f"train_{algorithm}", ["--config", file, "--resume", "--max_steps", 2])
    assert steps(folder) == [1, 2]
    for written in (folder, folder / "checkpoint-2"):
        row = yaml.safe_load((written / "config.yaml").read_text())
        assert row["max_steps"] == 2 and not {*DEFAULTS, *FORMER.values()} & row.keys()
    (said,) = [line for line in (folder / "config.yaml").read_text().splitlines() if line.startswith("#")]
    assert said.endswith(": max_steps 1 -> 2")  # a former name is no change


def test_what_was_set_and_did_nothing_is_told_in_one_line(begin: Begin) -> None:
    folder = begin("rwr", lambda row: row.update(DEFAULTS | {"scale_rewards": "group", "advantage_clip": 3.0}))
    with pytest.warns(UserWarning) as said:
        run("train_rwr", ["--config", folder / "config.yaml", "--resume", "--max_steps", 2])
    (line,) = [str(w.message) for w in said if "left out" in str(w.message)]
    expected = "config.yaml: scale_rewards = 'group', advantage_clip = 3.0 is left out, as it never did anything there"
    assert line.endswith(expected)
    assert steps(folder) == [1, 2]
    assert run_settings(folder / "checkpoint-1")["reward"] == ("jpeg_compressibility",)
    assert model_card.render(folder / "checkpoint-1", "checkpoint-1")
    ((row,),) = status.collect(folder)
    assert (row.step, row.total, row.reward_name) == (2, 2, "reward")


@pytest.mark.parametrize("algorithm", ["rwr", "spo"])
def test_a_new_file_and_a_command_line_know_it_no_longer(
    algorithm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = TINY | OWN[algorithm] | {"base": "tiny-sd3", "reward": ["jpeg_compressibility"]}
    for name in ("mine.yaml", "config.yaml"):  # the name alone does not make it a run's
        file = tmp_path / name
        file.write_text(yaml.safe_dump(row | {"scale_rewards": "batch"}))
        assert not is_of_run(file)
        with pytest.raises(SystemExit) as stopped:
            run(f"train_{algorithm}", ["--config", file])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.startswith(f"error: {file}: unknown option scale_rewards")
    file.write_text(yaml.safe_dump(row))
    (tmp_path / "metrics.jsonl").write_text("")
    assert is_of_run(file)
    with pytest.raises(SystemExit) as stopped:
        run(f"train_{algorithm}", ["--config", file, "--scale_rewards", "batch"])
    assert stopped.value.code == 2
    assert "unrecognized arguments: --scale_rewards batch" in capsys.readouterr().err


def test_any_config_may_retire_an_option(tmp_path: Path) -> None:
    @dataclass(kw_only=True)
    class Config(RunConfig):
        RETIRED: ClassVar[dict[str, Any]] = {"shine": True, "width": 3}

        depth: int = field(default=1)

    (tmp_path / "state.json").write_text("{}")
    file = tmp_path / "config.yaml"
    file.write_text("model: m\nname: n\ndepth: 2\nshine: false\nwidth: 3\n")
    with pytest.warns(UserWarning, match="shine = False is left out"):
        assert parse_config(Config, ["--config", str(file)]) == Config(base="m", name="n", depth=2)
    file.write_text("model: m\nname: n\nwidth: wide\n")
    with pytest.raises(SystemExit):  # it is read as it was
        parse_config(Config, ["--config", str(file)])


def test_online_is_a_field(tmp_path: Path) -> None:
    words = ["--model", "m", "--name", "n", "--prompts", "p", "--reward", "r"]
    for spelling in (["--online"], ["--online", "true"]):
        assert parse_config(DPOConfig, [*words, *spelling]).online
        assert parse_config(DPOConfig, [*spelling, *words]).online
    (tmp_path / "c.yaml").write_text("model: m\nname: n\nprompts: p\nreward: [r]\nonline: true\n")
    assert parse_config(DPOConfig, ["--config", str(tmp_path / "c.yaml")]).online
    with pytest.raises(ValueError, match="prompts is of the other kind of DPO: it needs online"):
        parse_config(DPOConfig, words)
    with pytest.raises(ValueError, match="data, cache is of the other kind of DPO: leave it out"):
        parse_config(DPOConfig, [*words, "--online", "--data", "d", "--cache"])


def test_online_dpo_of_before_goes_on(begin: Begin) -> None:
    """Its config.yaml did not say that it is online; the command line did, and does."""
    folder = begin("dpo", lambda row: row.pop("online"))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*resuming")
        run("train_dpo", ["--online", "--config", folder / "config.yaml", "--resume", "--max_steps", 2])
    row = yaml.safe_load((folder / "config.yaml").read_text())
    assert steps(folder) == [1, 2] and row["online"] is True
    assert "online None" not in (folder / "config.yaml").read_text()
    run("train_dpo", ["--config", folder / "config.yaml", "--resume", "--max_steps", 3])  # it says so now
    assert steps(folder) == [1, 2, 3]
