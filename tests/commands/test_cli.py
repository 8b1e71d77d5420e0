"""Every command meets bad input with one line, exit code 2 and nothing written; --dry_run writes nothing either."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import train_grpo
from rlg import config_parser, evaluate, sample
from rlg.cli import Parser, fail_cleanly
from tests.support.paths import ROOT
from trainers.core.config import parse_config
from trainers.grpo import GRPOConfig

WEIGHTS = "adapter/adapter_model.safetensors"
Command = Callable[..., str]


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() if f.is_file() else b"" for f in folder.rglob("*")}


@pytest.fixture
def refused(
    tmp_path: Path, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]
) -> Command:
    """Run a command that must end in exit code 2 and one line on stderr, which is returned, and change no file."""
    before_all = {family: snapshot(tiny_folder(family)) for family in ("sd", "sd3")}

    def run(command: Callable[[], None]) -> str:
        monkeypatch.chdir(tmp_path)  # where a default output folder would appear
        before = snapshot(tmp_path)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command()
        out, err = capfd.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
        said = [line for line in lines if not re.match(r"(Loading|\[transformers\]|\S+:\s+\d+%)", line)]
        assert stopped.value.code == 2
        assert len(said) == 1, err
        assert said[0].startswith("error: ")
        assert not out
        assert snapshot(tmp_path) == before
        assert {family: snapshot(tiny_folder(family)) for family in before_all} == before_all
        return said[0].removeprefix("error: ")

    return run


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Path:
    """A checkpoint of a tiny sd model that a test may damage."""
    folder = tmp_path / "run" / "checkpoint-3"
    shutil.copytree(tiny_checkpoint("sd"), folder)
    return folder


def evaluating(checkpoint: Path | str, *options: object) -> Callable[[], None]:
    small = ["--num_prompts", "1", "--k", "1", "--steps", "1", "--method", "rlg", "--w", "0", "1"]
    return lambda: evaluate.main(["--ckpt", str(checkpoint), *small, *map(str, options)])


def sampling(checkpoint: Path | str, *options: object) -> Callable[[], None]:
    small = ["--prompt", "a red circle", "--k", "1", "--steps", "1", "--w", "0", "1"]
    return lambda: sample.main(["--ckpt", str(checkpoint), *small, *map(str, options)])


@pytest.fixture
def training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Callable[[str], Path]
) -> Callable[..., Callable[[], None]]:
    """train_grpo.py on a tiny sd model, as the command line runs it; options win over these by coming later."""
    row = {
        "base": tiny_folder("sd"),
        "name": "run",
        "output_dir": tmp_path / "runs",
        "reward": "jpeg_compressibility",
        "prompts": "tinyworld:composition/train",
        "dtype": "float32",
        "num_prompts": 2,
        "num_generations": 2,
        "batch_size": 4,
        "steps": 2,
        "max_steps": 1,  # were a bad input let through
    }
    given = [text for name, value in row.items() for text in (f"--{name}", str(value))]

    def make(*options: object) -> Callable[[], None]:
        def command() -> None:
            monkeypatch.setattr(sys, "argv", ["train_grpo.py", *given, *map(str, options)])
            with fail_cleanly():
                train_grpo.main()

        return command

    return make


COMMANDS = {"evaluate": evaluating, "sample": sampling}


@pytest.mark.parametrize("command", COMMANDS)
def test_checkpoints_that_cannot_be_used(
    command: str, refused: Command, checkpoint: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    run = COMMANDS[command]
    assert refused(run(tmp_path / "none")) == f"no such checkpoint: {tmp_path / 'none'}"
    for name in ("checkpoint-20", "checkpoint-100", "checkpoint-x"):
        (tmp_path / "run" / name).mkdir()
    said = f"{tmp_path / 'run'} is a run's folder; give a checkpoint of it: {tmp_path / 'run' / 'checkpoint-100'}"
    assert refused(run(tmp_path / "run")) == f"{said} (or checkpoint-3, checkpoint-20)"
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no adapter" in refused(run(tmp_path / "empty"))
    other = refused(run(checkpoint, "--base", tiny_folder("sd3")))
    assert f"{checkpoint / WEIGHTS} (trained on {tiny_folder('sd')}) does not fit this base model" in other
    assert "cannot load the base model '/none'" in refused(run(checkpoint, "--base", "/none"))
    file = checkpoint / "pytorch_lora_weights.safetensors"
    assert refused(run(file)) == f"{file} does not say what it was trained on; give --base"
    (checkpoint / WEIGHTS).write_bytes((checkpoint / WEIGHTS).read_bytes()[:-50])
    assert f"{checkpoint / WEIGHTS} is damaged or cut short" in refused(run(checkpoint))
    (checkpoint / "adapter.pt").write_bytes(b"")
    assert f"{checkpoint / 'adapter.pt'} is a pickle" in refused(run(checkpoint / "adapter.pt"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("w", ["nan", "inf"])
def test_a_scale_that_is_not_finite(command: str, w: str, refused: Command, checkpoint: Path) -> None:
    assert "finite" in refused(COMMANDS[command](checkpoint, "--w", "0.5", w))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "jpeg_compresibility"], "unknown reward 'jpeg_compresibility'; did you mean 'jpeg_compress"),
        (["--held_out_reward", "beauty"], "unknown reward 'beauty'"),
        (["--reward", "remote"], "reward 'remote' needs its server: remote=http://HOST:PORT"),
        (["--method", "best"], "unknown method 'best'; known: rlg, lora_scale, tuned_2x_steps"),
        (["--prompts", "none.txt"], "no such prompt file: none.txt"),
        (["--prompts", "tinyworld:composition"], "unknown prompt set tinyworld:composition"),
        (["--config", "none.yaml"], "no such config: none.yaml"),
        (["--k", "0"], "--k, --steps and --batch_size must be at least 1"),
        (["--kernel", "dpm"], "argument --kernel: invalid choice: 'dpm'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--w", "much"], "argument --w: invalid float value: 'much'"),
        (["--strength", "1"], "unrecognized arguments: --strength 1"),
        (["--kernel", "cps", "--level", "0.5"], "kernel 'cps' is for flow-matching models"),
        (["--resolution", "63"], "image size 63x63 is not a multiple of 8"),
    ],
)
def test_evaluate_options(options: list[str], message: str, refused: Command, checkpoint: Path) -> None:
    assert message in refused(evaluating(checkpoint, *options))


def test_evaluate_files(refused: Command, checkpoint: Path, tmp_path: Path) -> None:
    assert "--ckpt is needed" in refused(lambda: evaluate.main([]))
    empty, config = tmp_path / "empty.txt", tmp_path / "eval.yaml"
    empty.write_text("\n \n")
    assert refused(evaluating(checkpoint, "--prompts", empty)) == f"{empty} holds no prompts"
    for content, message in {
        "dtyp: float32": f"{config}: unknown option dtyp, did you mean dtype?",
        "scales: [1": f"{config} is not valid YAML",
        "- scales": f"{config} must be a mapping",
        "sampler: dpm": "kernel must be one of ode, sde, cps, got 'dpm'",
    }.items():
        config.write_text(content)
        assert message in refused(evaluating(checkpoint, "--config", config))


def test_evaluate_does_not_mix_with_another_evaluation(refused: Command, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({"base": "another"}))
    (folder / "scores.jsonl").write_text("")
    message = refused(evaluating(checkpoint, "--output", folder))
    assert f"{folder} holds an evaluation with another" in message
    assert "give --output another folder, or --overwrite" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--k", "0"], "--k and --steps must be at least 1"),
        (["--w", "much"], "argument --w: invalid float value: 'much'"),
        (["--strength", "1"], "unrecognized arguments: --strength 1"),
    ],
)
def test_sample_options(options: list[str], message: str, refused: Command, checkpoint: Path) -> None:
    assert message in refused(sampling(checkpoint, *options))
    assert "the following arguments are required: --ckpt, --prompt" in refused(lambda: sample.main([]))


def test_sample_does_not_overwrite(refused: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.png").write_text("mine")
    message = refused(sampling(checkpoint, "--output", tmp_path / "mine.png"))
    assert message == f"{tmp_path / 'mine.png'} exists; give --overwrite, or --output another name"
    sampling(checkpoint, "--output", tmp_path / "mine.png", "--overwrite")()
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["x.bmpx", "x", "x.safetensors", "x.mp4"])
def test_an_image_of_no_kind_is_refused_before_sampling(
    name: str, refused: Command, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "load_pipeline", lambda *_: pytest.fail("the model was loaded"))
    message = refused(sampling(checkpoint, "--output", tmp_path / name))
    assert message.startswith(f"--output {tmp_path / name}: the name ends in none of ") and ".png" in message


def test_the_help_of_no_x_is_not_that_of_x(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config_parser.parse(GRPOConfig, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "turn --skip_last_step off" in shown and "turn --tf32 off" in shown
    assert shown.count("never train on the last step") == 1
    options = ["--base", "tiny-sd3", "--name", "x", "--reward", "a", "--prompts", "b"]
    assert parse_config(GRPOConfig, options).skip_last_step
    assert not parse_config(GRPOConfig, [*options, "--no_skip_last_step"]).skip_last_step


def test_sample_writes_a_column_for_each_scale(checkpoint: Path, tmp_path: Path) -> None:
    """The base comes from the adapter; a row for each prompt and k."""
    output = tmp_path / "new" / "grid.png"
    sampling(checkpoint, "--k", "2", "--w", "0", "1", "2", "--output", output)()
    from PIL import Image

    with Image.open(output) as sheet:
        assert sheet.size == (3 * 64, 2 * 64)
        tiles = [sheet.crop((64 * x, 0, 64 * x + 64, 64)).tobytes() for x in range(3)]
        second = sheet.crop((0, 64, 64, 128)).tobytes()
    assert len({*tiles, second}) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reward", "composition", "beauty"], "unknown reward 'beauty'"),
        (["--reward", "unifiedreward"], "reward 'unifiedreward' needs its server"),
        (["--held_out_reward", "beauty"], "unknown reward 'beauty'"),
        (["--reward_weights", "1", "2"], "1 rewards (jpeg_compressibility) but 2 weights"),
        (["--reward_weights", "nan"], "reward_weights must be finite, got nan"),
        (["--prompts", "none.txt"], "no such prompt file: none.txt"),
        (["--config", "none.yaml"], "no such config: none.yaml"),
        (["--base", "/none"], "cannot load the base model '/none': it is no folder"),
        (["--kernel", "dpm"], "kernel must be one of sde, cps, got 'dpm'"),
        (["--kernel", "cps"], "kernel 'cps' is for flow-matching models"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--learning_rate", "nan"], "learning_rate must be positive, got nan"),
        (["--lora_targets", "nothing"], "nothing"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--lora_rnk", "4"], "--lora_rnk"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--overwrite"], "give --resume or --overwrite, not both"),
        (["--name", "../up"], "name must be a plain folder name, got '../up'"),
        (["--report_to", "paper"], "report_to must be wandb, tensorboard or none, got 'paper'"),
        (["--batch_size", "3"], "= 4 images are not divisible by processes * batch_size = 3"),
        (["--batch_size", "1", "--num_updates", "3"], "4 batches are not divisible by num_updates = 3"),
    ],
)
def test_train_options(
    options: list[str], message: str, refused: Command, training: Callable[..., Callable[[], None]]
) -> None:
    assert message in refused(training(*options))


def test_train_files(refused: Command, training: Callable[..., Callable[[], None]], tmp_path: Path) -> None:
    empty, config = tmp_path / "empty.txt", tmp_path / "grpo.yaml"
    empty.write_text("\n \n")
    assert refused(training("--prompts", empty)) == f"{empty} holds no prompts"
    for content, message in {
        "lora_rnk: 4": "lora_rnk",
        "lora_rank: [4": "grpo.yaml is not valid YAML",
        "- lora_rank": "must be a mapping of options to values",
        "lora_rank: four": "invalid int value: 'four'",
    }.items():
        config.write_text(content)
        assert message in refused(training("--config", config))


def test_train_keeps_what_is_there(
    refused: Command, training: Callable[..., Callable[[], None]], tmp_path: Path
) -> None:
    run = tmp_path / "runs" / "run"
    (run / "checkpoint-5").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("{}\n")
    assert refused(training()) == f"{run} exists; give --resume, --overwrite or another --name"
    assert refused(training("--overwrite")) == f"{run} is no run folder (it has no config.yaml); it is not overwritten"
    assert refused(training("--resume")) == f"nothing to resume: {run} holds no whole checkpoint"
    (run / "config.yaml").write_text("{}")  # a run of ours now, which only a sound command may discard
    assert "unknown reward 'beauty'" in refused(training("--overwrite", "--reward", "beauty"))
    assert "cannot load the base model" in refused(training("--overwrite", "--base", "/none"))
    assert "kernel 'cps'" in refused(training("--overwrite", "--kernel", "cps"))


def odd_model(folder: Path, change: Callable[[dict, dict], None]) -> Path:
    """A pipeline folder with another index or scheduler config."""
    index_file, scheduler_file = folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"
    index, scheduler = (json.loads(file.read_text()) for file in (index_file, scheduler_file))
    change(index, scheduler)
    index_file.write_text(json.dumps(index))
    scheduler_file.write_text(json.dumps(scheduler))
    return folder


def other_family(index: dict, scheduler: dict) -> None:
    index["_class_name"] = "FluxPipeline"


def no_class(index: dict, scheduler: dict) -> None:
    index["scheduler"] = ["diffusers", "DreamScheduler"]


def no_table(index: dict, scheduler: dict) -> None:
    index["scheduler"] = ["diffusers", "CMStochasticIterativeScheduler"]
    scheduler.clear()
    scheduler["_class_name"] = "CMStochasticIterativeScheduler"


def clipping(index: dict, scheduler: dict) -> None:
    scheduler["thresholding"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_family, "no backbone for FluxPipeline; known: StableDiffusionPipeline, StableDiffusionXLPipeline"),
        (no_class, "DreamScheduler"),
        (no_table, "scheduler CMStochasticIterativeScheduler has no beta schedule"),
        (clipping, "scheduler DDIMScheduler has thresholding=True"),
    ],
)
def test_families_and_schedulers_without_a_table(
    change: Callable[[dict, dict], None],
    message: str,
    refused: Command,
    training: Callable[..., Callable[[], None]],
    checkpoint: Path,
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_folder("sd"), tmp_path / "odd")
    model = odd_model(tmp_path / "odd", change)
    assert message in refused(training("--base", model))
    assert message in refused(evaluating(checkpoint, "--base", model))


def test_dry_run_prints_everything_and_writes_nothing(
    training: Callable[..., Callable[[], None]],
    refused: Command,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--dry_run", "--num_prompts", "6", "--num_updates", "3", "--num_iterations", "2", "--max_steps", "10"]
    with pytest.raises(SystemExit) as stopped:
        training(*options, "--reward", "unifiedreward", "--base", "stabilityai/stable-diffusion-3.5-medium")()
    assert stopped.value.code == 0
    out, err = capfd.readouterr()
    config = yaml.safe_load(out)  # the counts are comments
    assert config["reward"] == ["unifiedreward"]  # neither its server is asked, nor the model downloaded
    assert config["lora_rank"] == 32
    counts = dict(line.removeprefix("# ").split(": ") for line in out.splitlines() if line.startswith("# images"))
    assert counts["images_per_iteration"] == "12"
    assert "# updates_per_iteration: 6\n" in out
    assert counts["images_per_update"] == "4"
    assert counts["images_in_total"] == "120"
    assert "error" not in err
    assert not list(tmp_path.iterdir())
    assert "are not divisible by" in refused(training("--dry_run", "--batch_size", "3"))


TRAINERS = ("grpo", "dpo", "spo", "nft", "rwr", "adjoint_matching", "draft", "vgg_flow")
CONFIGS = [file for folder in (*TRAINERS, "tiny") for file in sorted(ROOT.glob(f"configs/{folder}/*.yaml"))]


def trainer_of(config: Path) -> str:
    """The trainer of a config: its folder's, or among the tiny ones that of its name; the demo is SPO."""
    named = config.parent.name if config.parent.name != "tiny" else config.stem
    return "spo" if named == "demo" else next(name for name in (*TRAINERS, "spm") if named.startswith(name))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda f: f"{f.parent.name}-{f.stem}")
def test_every_config_resolves(
    config: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, tmp_path: Path
) -> None:
    script = f"train_{trainer_of(config)}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [f"{script}.py", "--config", str(config), "--dry_run", "true", "--mixed_precision", "no"]
    )
    with pytest.raises(SystemExit) as stopped, fail_cleanly():
        importlib.import_module(script).main()
    written = yaml.safe_load(config.read_text())
    files = {name: written.get(name, "") for name in ("prompts", "eval_prompts")}
    absent = [f"{name} {file}" for name, file in files.items() if file.startswith("data/")]  # which a user brings
    assert stopped.value.code == (2 if absent else 0)
    out, err = capfd.readouterr()
    assert err.endswith(f"error: not on this machine: {', '.join(absent)}\n" if absent else "")
    resolved = yaml.safe_load(out)
    assert {k: resolved[k] for k in written if k != "mixed_precision"} == {
        k: v for k, v in written.items() if k != "mixed_precision"
    }
    assert not list(tmp_path.iterdir())


def test_errors_of_the_system_are_one_line_too(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped, fail_cleanly():
        raise FileNotFoundError(2, "No such\nfile", "x")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 2] No such file: 'x'\n"
    with pytest.raises(ZeroDivisionError), fail_cleanly():  # a bug of ours keeps its traceback
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as stopped, fail_cleanly():
        raise KeyboardInterrupt
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted; ")
    with pytest.raises(SystemExit):
        Parser(prog="x").parse_args(["--nothing"])
    assert capsys.readouterr().err == "error: unrecognized arguments: --nothing; see --help\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["-m", "rlg.sample", "--ckpt", "none", "--prompt", "x"],
        ["-m", "rlg.evaluate", "--ckpt", "none"],
        ["train_grpo.py", "--config", "none.yaml"],
    ],
    ids=["sample", "evaluate", "train_grpo"],
)
def test_the_real_commands(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2
    assert not done.stdout
    said = [line for line in done.stderr.splitlines() if "[transformers]" not in line]
    assert len(said) == 1
    assert said[0].startswith("error: no such c")
