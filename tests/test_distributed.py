"""Two processes on the CPU train and evaluate as one does: one start of torchrun for the whole file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from conftest import brightness
from safetensors.torch import load_file

import train_grpo
from rewards import RewardMix
from rlg import evaluate
from rlg.stats import Row, read_rows
from trainers.grpo import GRPOTrainer

ROOT = Path(__file__).parent.parent
TIMEOUT = 400  # seconds; it takes some 30 on two free cores
SETTINGS = {
    "reward": "jpeg_compressibility",
    "dtype": "float32",
    "lora_rank": 2,
    "lora_alpha": 4,
    "learning_rate": 3e-3,
    "adam_epsilon": 1e-4,  # large, for what test_golden.py says
    "num_prompts": 2,
    "num_generations": 4,
    "per_device_batch_size": 2,
    "num_steps": 3,
    "guidance_scale": 1.0,
    "beta": 1.0,
    "ema_every": 1,
    "sample_steps": 0,
    "eval_steps": 1,
    "eval_num_prompts": 3,  # over two processes: one of them makes an image twice
}


def train(argv: list[str]) -> None:
    """What `train_grpo.py` does with these arguments, for a reward that is smooth (a JPEG's size comes in bytes)."""
    smooth = RewardMix({"brightness": brightness}, (1.0,))
    with patch("sys.argv", ["train_grpo.py", *argv]), patch("rewards.build", return_value=smooth):
        train_grpo.main()


def worker(trained: list[str], evaluated: list[str]) -> None:
    """One of two processes: an evaluation, two iterations, a third one that a signal to one process makes the last."""
    evaluate.main(evaluated)  # first, so that it finds the other process without a trainer's accelerator
    Accelerator.end_training = lambda self: None  # it would take the process group down
    train([*trained, "--max_steps", "2"])
    score = GRPOTrainer.score
    if os.environ["RANK"] == "1":
        GRPOTrainer.score = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or score(*args)
    train([*trained, "--max_steps", "9", "--resume"])


Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(
    tiny_folder: Folder, tiny_checkpoint: Folder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Folders in which one process and two processes did the same."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    (one / "prompts.txt").write_text("a red circle\ntwo blue crosses\nthree green squares\n")
    common = [item for name, value in SETTINGS.items() for item in (f"--{name}", str(value))]
    for name in ("prompts", "eval_prompts"):
        common += [f"--{name}", str(one / "prompts.txt")]
    common += ["--model", str(tiny_folder("sd3")), "--name", "run", "--output_dir"]
    judged = f"--ckpt {tiny_checkpoint('sd3')} --prompts {one}/prompts.txt --steps 2 --sampler sde --cfg 1"
    judged = [*judged.split(), "--k", "2", "--scales", "0", "1", "2", "--batch_size", "6", "--output"]

    arguments = json.dumps([[*common, str(two)], [*judged, str(two / "eval")]])
    code = "import json, sys; from test_distributed import worker; worker(*json.loads(sys.argv[1]))"
    (two / "worker.py").write_text(code)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with (two / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [*launcher, str(two / "worker.py"), arguments], cwd=two, env=environment, stdout=log, stderr=log
        )
        train([*common, str(one), "--max_steps", "3"])
        evaluate.main([*judged, str(one / "eval")])
        try:
            assert process.wait(TIMEOUT) == 0, (two / "log.txt").read_text()[-5000:]
        finally:
            process.terminate()  # torchrun ends its workers
            process.wait(60)
    return one, two


def test_training_is_the_same(folders: tuple[Path, Path]) -> None:
    states, metrics, adapters = [], [], []
    for folder in folders:
        run = folder / "run"
        states.append(json.loads((run / "checkpoint-3" / "state.json").read_text()))
        metrics.append([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()])
        adapters.append(load_file(run / "checkpoint-3" / "adapter" / "adapter_model.safetensors"))
    assert [state["processes"] for state in states] == [1, 2]
    assert [state["counters"]["images"] for state in states] == [24, 24]
    assert [len(rows) for rows in metrics] == [4, 4]  # the evaluation before the first iteration, and three
    for one, two in zip(*metrics, strict=True):
        assert one.keys() == two.keys()
        for name in one.keys() - {n for n in one if n.startswith("seconds")}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6), name
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, rtol=0, atol=1e-5)
    assert max(float(tensor.abs().max()) for name, tensor in adapters[0].items() if "lora_B" in name) > 1e-3


def test_a_signal_to_one_process_stops_both_and_each_leaves_its_generator(folders: tuple[Path, Path]) -> None:
    _, two = folders
    assert sorted(p.name for p in (two / "run").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    states = sorted(p.name for p in (two / "run" / "checkpoint-3" / "trainer_state").glob("rng-*"))
    assert states == ["rng-0.safetensors", "rng-1.safetensors"]


def test_evaluation_is_the_same(folders: tuple[Path, Path]) -> None:
    def rows(folder: Path) -> list[Row]:
        return [replace(row, seconds=0.0) for row in read_rows(folder / "eval" / "scores.jsonl")]

    one, two = map(rows, folders)
    assert len(one) == 3 * 2 * (3 + 1 + 1)
    for ours, theirs in zip(one, two, strict=True):
        assert theirs.rewards == pytest.approx(ours.rewards, abs=2e-3)
        assert theirs.kl == pytest.approx(ours.kl, rel=1e-4)
        assert theirs.diversity == pytest.approx(ours.diversity, rel=1e-4)
        assert replace(theirs, rewards=ours.rewards, kl=ours.kl, diversity=ours.diversity) == ours
    assert (folders[1] / "eval" / "report.html").is_file()
    assert not list((folders[1] / "eval").glob("scores-*.jsonl"))
    names = [{f.name for f in (folder / "eval" / "images").iterdir()} for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 9
