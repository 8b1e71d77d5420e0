"""DeepSpeed's ZeRO-2 and ZeRO-3, on the CPU, train as plain training does, and leave the same checkpoints.

One `accelerate launch` for each stage: two processes train GRPO and DPO for two iterations, and resume for a third.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from conftest import PROMPTS
from peft import PeftModel
from processes import DPO, EVERY_TRAINER, GRPO, ROOT, assert_same_metrics, options, started, train
from safetensors.torch import load_file

from rlg.policy import Policy
from trainers.grpo import GRPOConfig, GRPOTrainer
from trainers.spm import SPMConfig, SPMTrainer

pytest.importorskip("deepspeed")
ALGORITHMS = ("grpo", "dpo")


def worker(trained: dict[str, list[str]]) -> None:
    """One of the processes."""
    Accelerator.end_training = lambda self: None  # it would take the process group down
    for algorithm, arguments in trained.items():
        train(f"train_{algorithm}", [*arguments, "--max_steps", "2"])
        train(f"train_{algorithm}", [*arguments, "--max_steps", "3", "--resume"])


Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def arguments(
    tiny_folder: Folder, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, int], dict[str, list[str]]]:
    """Of each trainer, for a folder of runs and a number of processes, with the same batches in all."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))

    def make(folder: Path, processes: int) -> dict[str, list[str]]:
        every = EVERY_TRAINER | {"model": tiny_folder("sd3"), "output_dir": folder}
        data = {"data": pairs_folder, "per_device_batch_size": 4 // processes, "accumulation_steps": 2}
        return {
            "grpo": options(**every | GRPO, prompts=prompts, name="grpo"),
            "dpo": options(**every | DPO | data, name="dpo"),
        }

    return make


@pytest.fixture(scope="module")
def plain(arguments: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that one process made, without an engine and without a break."""
    folder = tmp_path_factory.mktemp("plain")
    for algorithm, argv in arguments(folder, 1).items():
        train(f"train_{algorithm}", [*argv, "--max_steps", "3"])
    return folder


class Sharded(NamedTuple):
    """What the processes of an engine made."""

    folder: Path
    processes: int


SLOW = pytest.mark.slow
CASES = [("zero2", 2), ("zero3", 2), pytest.param(("zero2", 1), marks=SLOW), pytest.param(("zero3", 1), marks=SLOW)]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def sharded(
    request: pytest.FixtureRequest, arguments: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Sharded:
    """Runs under the engine's file in launch/."""
    engine, processes = request.param
    folder = tmp_path_factory.mktemp(engine)
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate" / f"{engine}.yaml")]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    with started(launcher, "test_distributed_deepspeed:worker", [arguments(folder, processes)], folder):
        pass
    return Sharded(folder, processes)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_and_resuming_are_the_same(algorithm: str, plain: Path, sharded: Sharded) -> None:
    assert_same_metrics(plain / algorithm, sharded.folder / algorithm)
    states = [folder / algorithm / "checkpoint-3" / "trainer_state" for folder in (plain, sharded.folder)]
    for name in ("lora", "ema", "optimizer"):
        ours, theirs = (load_file(state / f"{name}.safetensors") for state in states)
        assert ours.keys() == theirs.keys() and ours
        for key, tensor in ours.items():
            torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-5)
    generators = sorted(file.name for file in states[1].glob("rng-*"))
    assert generators == [f"rng-{rank}.safetensors" for rank in range(sharded.processes)]


@torch.no_grad()
def test_the_adapter_is_whole(plain: Path, sharded: Sharded, tiny_folder: Folder) -> None:
    outputs = []
    for folder in (plain, sharded.folder):
        policy = Policy.load(str(tiny_folder("sd3")))
        policy.network.requires_grad_(False)
        PeftModel.from_pretrained(policy.network, folder / "grpo" / "checkpoint-3" / "adapter")
        x = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
        condition, t_B = policy.encode([PROMPTS[0].text]), torch.tensor([500.0])
        outputs.append([policy.predict(x, t_B, condition), policy.reference(x, t_B, condition)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-2


def test_plain_training_goes_on_from_a_sharded_checkpoint(
    plain: Path, sharded: Sharded, arguments: Callable, tmp_path: Path
) -> None:
    shutil.copytree(sharded.folder / "grpo", tmp_path / "grpo", ignore=shutil.ignore_patterns("checkpoint-3"))
    train("train_grpo", [*arguments(tmp_path, 1)["grpo"], "--max_steps", "3", "--resume"])
    assert_same_metrics(plain / "grpo", tmp_path / "grpo")
