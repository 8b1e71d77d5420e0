"""Out of memory, by a real limit of the process: one line with what to lower and what is kept, and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import RewardMix
from rlg import evaluate
from rlg.cli import fail_cleanly
from rlg.evaluation.evaluator import Evaluator
from rlg.io import out_of_memory
from tests.support.hostile import at_most
from tests.support.paths import ROOT
from tests.support.smooth_rewards import brightness
from trainers.grpo import GRPOTrainer

SCRATCH = 2**36  # bytes that a phase asks for; the limit is some 2**30 above what the process has


def hungry(*arguments: Any) -> None:
    """A hook of a module or a tensor: it needs memory that is not there."""
    torch.empty(SCRATCH, dtype=torch.uint8)


def starve_sampling(trainer: GRPOTrainer) -> None:
    trainer.policy.network.register_forward_pre_hook(hungry)


def starve_decoding(trainer: GRPOTrainer) -> None:
    trainer.policy.pipe.vae.decoder.register_forward_pre_hook(hungry)


def starve_backward(trainer: GRPOTrainer) -> None:
    backward = trainer.accelerator.backward
    trainer.accelerator.backward = lambda loss: [loss.register_hook(hungry), backward(loss)]


PHASES = {
    "while sampling: lower batch_size": starve_sampling,
    "while decoding images: lower batch_size": starve_decoding,
    "in a backward pass: set gradient_checkpointing, lower update_batch_size": starve_backward,
}


@pytest.mark.parametrize("said", PHASES)
def test_a_training_that_runs_out_of_memory_says_what_to_lower(
    said: str, tiny_trainer: Callable[..., GRPOTrainer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_trainer("sd3", max_steps=1).train()
    trainer = tiny_trainer("sd3", max_steps=2, resume=True)
    PHASES[said](trainer)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped, at_most(2**30), fail_cleanly():
        trainer.train()
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2
    assert line.startswith(f"error: out of memory {said}")
    checkpoint = tmp_path / "run" / "checkpoint-1"
    assert f"; the last whole checkpoint is {checkpoint}, which --resume goes on from (" in line
    assert "you tried to allocate" in line and "Traceback" not in line
    tiny_trainer("sd3", max_steps=2, resume=True, gradient_checkpointing=True).train()  # as it says


def test_an_evaluation_that_runs_out_of_memory_goes_on_with_smaller_batches(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue crosses\n")
    text = f"--ckpt {tiny_checkpoint('sd3')} --prompts {tmp_path / 'prompts.txt'} --output {tmp_path / 'eval'}"
    command = [*text.split(), *["--k", "1", "--w", "0", "1", "--method", "rlg", "--steps", "1", "--cfg", "1"]]
    generate = Evaluator.generate

    def second_unit(self: Evaluator, unit: Any) -> Any:
        with at_most(2**30):
            if unit[0].prompt_id:
                hungry()
            return generate(self, unit)

    monkeypatch.setattr(Evaluator, "generate", second_unit)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*command, "--batch_size", "2"])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2
    assert line.startswith("error: out of memory while sampling: lower --batch_size; what is scored is kept, and the")
    assert (tmp_path / "eval" / "scores-0.jsonl").read_text().count('"prompt"') == 2
    monkeypatch.undo()
    evaluate.main([*command, "--batch_size", "1"])
    assert (tmp_path / "eval" / "scores.jsonl").read_text().count('"prompt"') == 4


def test_any_other_command_ends_in_one_line_too() -> None:
    """In a process of its own: the limit is there before Python has memory to spare."""
    code = "import torch; from rlg.cli import fail_cleanly\nwith fail_cleanly(): torch.empty(2**36)"
    done = subprocess.run(
        ["bash", "-c", f"ulimit -v 8000000; exec {sys.executable} -c '{code}'"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("error: out of memory (can't allocate memory: you tried to")
    assert line.endswith("lower the batch size or the resolution, or use a smaller dtype")


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("The size of tensor a (3) must match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_a_shortage_is(error: Exception, short: bool) -> None:
    assert out_of_memory.is_shortage(error) == short


def test_a_reward_that_runs_out_of_memory_on_a_batch_is_asked_image_by_image() -> None:
    def reward(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        if len(images) > 1:
            torch.empty(SCRATCH)
        return brightness(images, prompts, metadata)

    images = torch.linspace(0, 1, 3)[:, None, None, None].expand(3, 3, 4, 4)
    with at_most(2**30), pytest.warns(UserWarning, match="failed on 3 images at once, and on none of them alone"):
        scores = RewardMix({"hungry": reward}, (1.0,))(images, ["a"] * 3, [{}] * 3)
    assert scores.total_B.tolist() == pytest.approx([0, 0.5, 1])
