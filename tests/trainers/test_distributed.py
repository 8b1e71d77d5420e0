"""Several processes on the CPU train and evaluate as one does: one start, by cpu2.yaml, for the whole file."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from rlg import evaluate
from rlg.cli import fail_cleanly
from rlg.evaluation.rows import Row, read_rows
from rlg.tasks import prompt_sets
from tests.conftest import PROMPTS
from tests.support.paths import ROOT
from tests.support.processes import DPO, EVERY_TRAINER, GRPO, assert_same_metrics, options, started, train
from trainers.dpo import LatentPairs, PairLoss
from trainers.grpo import GRPOTrainer

SPO = {"divert_start_step": 0, "num_candidates": 3, "threshold": 0.0, "num_prompts": 2, "num_generations": 2}
pytestmark = pytest.mark.xdist_group("distributed")  # one start for all
HELD_OUT = {"eval_steps": 1, "eval_num_prompts": 3}  # over two processes: one of them makes an image twice


def worker(trained: dict[str, list[str]], evaluated: list[str]) -> None:
    """One of several processes: an evaluation, DPO, SPO, and GRPO, which a signal to one process ends."""
    evaluate.main(evaluated)  # first, so that it finds the other process without a trainer's accelerator
    Accelerator.end_training = lambda self: None  # it would take the process group down
    train("train_dpo", trained["dpo"])
    train("train_spo", trained["spo"])
    train("train_grpo", [*trained["grpo"], "--max_steps", "2"])
    score = GRPOTrainer.score
    if os.environ["RANK"] == "1":
        GRPOTrainer.score = lambda *args: os.kill(os.getpid(), signal.SIGTERM) or score(*args)
    train("train_grpo", [*trained["grpo"], "--max_steps", "9", "--resume"])
    disagree(trained["grpo"])


def disagree(argv: list[str]) -> None:
    """Start with what differs between processes: all must leave at once, before anything is sampled or written."""
    rank, folder = int(os.environ["RANK"]), Path(argv[argv.index("--output_dir") + 1])
    load = prompt_sets.load
    edited = patch.object(
        prompt_sets,
        "load",
        lambda source, *column: [replace(p, text=f"{p.text} {rank}") for p in load(source, *column)],
    )
    cases = {"seed": nullcontext(), "max_steps": nullcontext(), "prompts": edited}
    with (folder / f"disagree-{rank}.txt").open("w") as file:
        for name, case in cases.items():
            option = [] if name == "prompts" else [f"--{name}", str(5 + rank)]
            with case, redirect_stderr(file):
                try:
                    with fail_cleanly():
                        train("train_grpo", [*argv, "--max_steps", "9", "--name", f"not-{name}", *option])
                except SystemExit as stopped:
                    print("exit", stopped.code, file=file)


Folder = Callable[[str], Path]


class Folders(NamedTuple):
    """In which one process and several processes did the same."""

    one: Path
    many: Path
    world: int


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def folders(
    request: pytest.FixtureRequest,
    tiny_folder: Folder,
    tiny_checkpoint: Folder,
    pairs_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Folders:
    """One run of everything."""
    world = request.param
    one, many = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp(f"of{world}")
    prompts = one / "prompts.txt"
    prompts.write_text("".join(f"{prompt.text}\n" for prompt in PROMPTS))

    def trained(folder: Path, processes: int) -> dict[str, list[str]]:
        every = EVERY_TRAINER | {"base": tiny_folder("sd3"), "output_dir": folder}
        data = {"data": pairs_folder, "batch_size": 4 // processes}
        return {
            "grpo": options(**every | GRPO | HELD_OUT, prompts=prompts, eval_prompts=prompts, name="grpo"),
            "dpo": options(**every | DPO | data, name="dpo", max_steps=3),
            "spo": options(**every | SPO, prompts=prompts, batch_size=1, name="spo", max_steps=2),
        }

    judged = f"--ckpt {tiny_checkpoint('sd3')} --prompts {prompts} --steps 2 --kernel sde --cfg 1"
    judged = [*judged.split(), "--k", "2", "--w", "0", "1", "2", "--batch_size", "6", "--output"]
    launcher = ["accelerate.commands.launch", "--config_file", str(ROOT / "launch" / "accelerate" / "cpu2.yaml")]
    launcher += ["--main_process_port", "0"]  # a free one
    if world > 2:
        launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    todo = [trained(many, world), [*judged, str(many / "eval")]]
    with started(launcher, f"{__name__}:worker", todo, many, ACCELERATE_USE_CPU=str(world > 2).lower()):
        for name, arguments in trained(one, 1).items():
            train(f"train_{name}", [*arguments, *(["--max_steps", "3"] if name == "grpo" else [])])
        evaluate.main([*judged, str(one / "eval")])
    return Folders(one, many, world)


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", "spo"])
def test_training_is_the_same(algorithm: str, folders: Folders) -> None:
    one, many = folders.one / algorithm, folders.many / algorithm
    assert_same_metrics(one, many)
    last = max(one.glob("checkpoint-*")).name
    states = [json.loads((run / last / "state.json").read_text()) for run in (one, many)]
    assert [state["processes"] for state in states] == [1, folders.world]
    assert states[0]["counters"].get("images") == states[1]["counters"].get("images")
    ours, theirs = (load_file(run / last / "adapter" / "adapter_model.safetensors") for run in (one, many))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    assert max(float(tensor.abs().max()) for name, tensor in ours.items() if "lora_B" in name) > 1e-3


def test_a_signal_to_one_process_stops_both_and_each_leaves_its_generator(folders: Folders) -> None:
    many = folders.many
    assert sorted(p.name for p in (many / "grpo").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    states = sorted(p.name for p in (many / "grpo" / "checkpoint-3" / "trainer_state").glob("rng-*"))
    assert states == [f"rng-{rank}.safetensors" for rank in range(folders.world)]


def test_processes_that_disagree_stop_before_anything_is_done(folders: Folders) -> None:
    said = [(folders.many / f"disagree-{rank}.txt").read_text().splitlines() for rank in range(folders.world)]
    errors = [line for line in said[0] if line.startswith("error: ")]
    first, second, third = (line.partition("the processes disagree on ")[2] for line in errors)
    assert first.startswith("seed: 5 on process 0, 6 on process 1") and first.endswith("the same config and options")
    assert second.startswith("max_steps: 5 on process 0, 6 on process 1")
    assert third.startswith("prompts: '") or third.startswith("eval_prompts: '")
    assert all([line for line in lines if line.startswith("exit")] == ["exit 2"] * 3 for lines in said)
    assert not [line for lines in said[1:] for line in lines if line.startswith("error: ")]  # it is said once
    assert not list(folders.many.glob("not-*/checkpoint-*"))


def test_evaluation_is_the_same(folders: Folders) -> None:
    def rows(folder: Path) -> list[Row]:
        return [replace(row, seconds=0.0) for row in read_rows(folder / "eval" / "scores.jsonl")]

    one, many = map(rows, folders[:2])
    assert len(one) == 3 * 2 * (3 + 1 + 1)
    for ours, theirs in zip(one, many, strict=True):
        assert theirs.rewards == pytest.approx(ours.rewards, abs=2e-3)
        assert theirs.kl == pytest.approx(ours.kl, rel=1e-4)
        assert theirs.diversity == pytest.approx(ours.diversity, rel=1e-4)
        assert replace(theirs, rewards=ours.rewards, kl=ours.kl, diversity=ours.diversity) == ours
    assert (folders.many / "eval" / "report.html").is_file()
    assert not list((folders.many / "eval").glob("scores-*.jsonl"))
    names = [{f.name for f in (folder / "eval" / "images").iterdir()} for folder in folders[:2]]
    assert names[0] == names[1] and len(names[0]) == 9


def as_process(rank: int, world: int) -> SimpleNamespace:
    """What a trainer asks accelerate for."""
    return SimpleNamespace(process_index=rank, num_processes=world, device="cpu", autocast=nullcontext)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("whole_groups", [False, True])
def test_processes_share_one_iterations_groups_and_noise(
    whole_groups: bool, world: int, tiny_online: Callable[..., GRPOTrainer]
) -> None:
    trainer = tiny_online("grpo", num_prompts=2, num_generations=4, batch_size=1)

    def drawn(processes: int, ranks: range) -> list[tuple[int, int, torch.Tensor]]:
        found = []
        for rank in ranks:
            trainer.accelerator = as_process(rank, processes)
            for part in trainer.parts(torch.Generator().manual_seed(trainer.iteration_seed()), whole_groups):
                noise = torch.cat([part.noise.initial(), part.noise.step()])
                found.append((part.noise.ids[0].prompt, part.noise.ids[0].k, noise))
        return found

    alone, shared = drawn(1, range(1)), drawn(world, range(world))
    assert [row[:2] for row in shared] == [row[:2] for row in alone]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(alone, shared, strict=True))
    prompts = [{row[0] for row in drawn(world, range(rank, rank + 1))} for rank in range(world)]
    assert not whole_groups or all(len(found) == 1 for found in prompts)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_one_batchs_noise_levels(world: int, tiny_online: Callable[..., GRPOTrainer]) -> None:
    trainer = tiny_online("online_dpo", beta=20.0)
    x0 = torch.randn(4, *trainer.shape, generator=torch.Generator().manual_seed(0))
    cond = trainer.policy.encode([prompt.text for prompt in PROMPTS] + [""])

    def errors(rank: int, processes: int) -> tuple[list[str], torch.Tensor]:
        trainer.accelerator = as_process(rank, processes)
        loss, generator = PairLoss(trainer, trainer.config), torch.Generator().manual_seed(1)
        own = torch.arange(4).chunk(processes)[rank]
        captions = loss.drop_captions([PROMPTS[i % 3].text for i in own.tolist()], generator)
        found = loss.errors(LatentPairs(x0[own], -x0[own], cond[own], cond[own]), generator)
        return captions, torch.stack([found.winner_B, found.ref_loser_B]).detach()

    with patch.object(trainer.config, "caption_dropout", 0.5):
        captions, expected = errors(0, 1)
        parts = [errors(rank, world) for rank in range(world)]
    assert [text for part in parts for text in part[0]] == captions and "" in captions
    torch.testing.assert_close(torch.cat([part[1] for part in parts], dim=1), expected)
