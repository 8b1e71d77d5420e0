"""DeepSpeed's ZeRO-2 and ZeRO-3, and FSDP2, on the CPU: they train as plain training does, and save the same.

One `accelerate launch` for each: two processes train GRPO and DPO for an iteration, and resume for a second.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from rlg.models.policy import Policy
from tests.conftest import PROMPTS
from tests.support.paths import ROOT
from tests.support.processes import DPO, EVERY_TRAINER, GRPO, assert_same_metrics, options, started, train
from trainers.checkpoints.engines import make_accelerator, require_plain
from trainers.core.log import Log
from trainers.core.zero_gradients import ADAPTER
from trainers.grpo import GRPOTrainer

ALGORITHMS = ("grpo", "dpo")


def worker(trained: dict[str, list[str]]) -> None:
    """One of the processes, which notes its share of what the engine shares out."""
    Accelerator.end_training = lambda self: None  # it would take the process group down
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":  # accelerate has FSDP for GPUs alone: these pass for some
        PartialState(cpu=True)
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    iteration = GRPOTrainer.iteration

    def noted(self: GRPOTrainer, log: Log | None = None) -> dict[str, float]:
        Path(self.config.output_dir, f"share-{os.environ['RANK']}").write_text(str(share(self)))
        return iteration(self, log)

    GRPOTrainer.iteration = noted
    for algorithm, arguments in trained.items():
        train(f"train_{algorithm}", [*arguments, "--max_steps", "1"])
        train(f"train_{algorithm}", [*arguments, "--max_steps", "2", "--resume"])


def share(trainer: GRPOTrainer) -> float:
    """The part that this process holds of the base's weights, or under ZeRO-2 of what AdamW steps from."""
    base = [p for name, p in trainer.policy.network.named_parameters() if ".lora_" not in name]
    if hasattr(base[0], "ds_tensor"):
        return sum(p.ds_tensor.numel() for p in base) / sum(p.ds_numel for p in base)
    if isinstance(base[0].data, DTensor):
        return sum(p.data.to_local().numel() for p in base) / sum(p.numel() for p in base)
    held = trainer.state.optimizer.optimizer.single_partition_of_fp32_groups
    return sum(flat.numel() for flat in held) / sum(p.numel() for p in trainer.policy.trainable())


Folder = Callable[[str], Path]


@pytest.fixture(scope="module")
def arguments(
    tiny_folder: Folder, pairs_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[Path, int], dict[str, list[str]]]:
    """Of each trainer, for a folder of runs and a number of processes, with the same batches in all."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))

    def make(folder: Path, processes: int) -> dict[str, list[str]]:
        every = EVERY_TRAINER | {"base": tiny_folder("sd3"), "output_dir": folder}
        data = {"data": pairs_folder, "batch_size": 4 // processes}
        return {
            "grpo": options(**every | GRPO | {"num_generations": 2}, prompts=prompts, name="grpo"),
            "dpo": options(**every | DPO | data, name="dpo"),
        }

    return make


@pytest.fixture(scope="module")
def plain(arguments: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs that one process made, without an engine and without a break."""
    folder = tmp_path_factory.mktemp("plain")
    for algorithm, argv in arguments(folder, 1).items():
        train(f"train_{algorithm}", [*argv, "--max_steps", "2"])
    return folder


class Sharded(NamedTuple):
    """What the processes of an engine made."""

    folder: Path
    processes: int
    unseen: tuple[str, ...]  # metrics that it cannot have


SLOW = pytest.mark.slow
ENGINES = ("zero2", "zero3", "fsdp2")  # one start for all tests of each
CASES = [pytest.param((name, 2), marks=pytest.mark.xdist_group(name)) for name in ENGINES]
CASES += [pytest.param((name, 1), marks=[pytest.mark.xdist_group(name), SLOW]) for name in ENGINES[:2]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def sharded(request: pytest.FixtureRequest, arguments: Callable, tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    """Runs under the engine's file in launch/."""
    engine, processes = request.param
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp(engine)
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate" / f"{engine}.yaml")]
    launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
    todo = [arguments(folder, processes)]
    with started(launcher, f"{__name__}:worker", todo, folder, CUDA_VISIBLE_DEVICES=""):
        pass
    return Sharded(folder, processes, (ADAPTER,) if engine.startswith("zero") else ())  # DeepSpeed shows no gradient


def test_each_process_holds_its_share(sharded: Sharded) -> None:
    shares = [float((sharded.folder / f"share-{rank}").read_text()) for rank in range(sharded.processes)]
    assert shares == pytest.approx([1 / sharded.processes] * sharded.processes, rel=0.02)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_training_and_resuming_are_the_same(algorithm: str, plain: Path, sharded: Sharded) -> None:
    assert_same_metrics(plain / algorithm, sharded.folder / algorithm, sharded.unseen)
    states = [folder / algorithm / "checkpoint-2" / "trainer_state" for folder in (plain, sharded.folder)]
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
        PeftModel.from_pretrained(policy.network, folder / "grpo" / "checkpoint-2" / "adapter")
        x = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
        condition, t_B = policy.encode([PROMPTS[0].text]), torch.tensor([500.0])
        outputs.append([policy.predict(x, t_B, condition), policy.reference(x, t_B, condition)])
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-4)
    assert (outputs[0][0] - outputs[0][1]).abs().max() > 1e-2


def test_plain_training_goes_on_from_a_sharded_checkpoint(
    plain: Path, sharded: Sharded, arguments: Callable, tmp_path: Path
) -> None:
    shutil.copytree(sharded.folder / "grpo", tmp_path / "grpo", ignore=shutil.ignore_patterns("checkpoint-2"))
    train("train_grpo", [*arguments(tmp_path, 1)["grpo"], "--max_steps", "2", "--resume"])
    assert_same_metrics(plain / "grpo", tmp_path / "grpo", sharded.unseen)


def test_mixed_precision_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match=r"mixed_precision is bf16, .* give --mixed_precision no"):
        make_accelerator("bf16")


def test_fsdp_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"FSDP on GPUs only; on CPUs launch with launch/accelerate/cpu2.yaml"):
        make_accelerator("no")


def test_what_deepspeed_cannot_train_is_refused() -> None:
    with pytest.raises(ValueError, match="DeepSpeed cannot train two models; launch with another file"):
        require_plain(SimpleNamespace(distributed_type=DistributedType.DEEPSPEED), "two models")
    require_plain(SimpleNamespace(distributed_type=DistributedType.MULTI_GPU), "two models")
