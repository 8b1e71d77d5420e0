"""What evaluations of random models leave behind, against recorded scores.jsonl and summaries.

    pytest tests/*/test_golden*.py --record-golden       writes tests/golden/ anew; only for a reason (CONTRIBUTING.md)
    pytest tests/*/test_golden*.py --golden-rtol 1e-5    where they were recorded: a move of code changes no bit

Commands are given as a user gives them, so that no test here knows where the code is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlg.models.policy import Policy
from tests.support.commands import options, run
from tests.support.golden import Golden, columns, read_json, read_lines

pytestmark = [pytest.mark.numerics, pytest.mark.xdist_group("golden_evaluations")]
TEXTS = ("a red circle", "two blue crosses", "three green squares", "a yellow triangle above a red square")
SMALL = {"steps": 3, "kernel": "sde", "level": 0.7, "cfg": 1.0, "k": 2, "num_prompts": 4, "images": 0}
REWARDS = {"reward": ["brightness"], "held_out_reward": ["contrast"]}
ALL = ["rlg", "lora_scale", "tuned_2x_steps", "corrected"]
SWEEPS: dict[str, tuple[str, dict[str, Any]]] = {  # family, and what differs from SMALL
    # Four draws with this seed take both models for every image: one by the tuned model alone would tie with it.
    "modes_sd": ("sd", {"w": [0, 0.5, 1], "method": [*ALL, "rlg_ls"], "cfg": 2.0, "steps": 4, "seed": 4}),
    "beyond_sd3": ("sd3", {"w": [-0.5, 0, 1, 2], "method": ALL, "kernel": "cps"}),
    "guided_sdxl": ("sdxl", {"w": [0, 1, 2], "method": ["rlg"], "steps": 2}),
    "schedule_sd3": ("sd3", {"w": [0, 1, 2], "method": ["rlg"], "kernel": "ode", "schedule": "interval:0.2:0.9"}),
    "kl_budget_sd": ("sd", {"method": ["rlg"], "kl_budget": 0.5, "calibration_prompts": 1}),
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(text + "\n" for text in TEXTS))
    return file


@pytest.fixture(scope="module")
def experts(tiny_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the tiny sd3 network, and one that stands for a model trained on the mix."""
    root, folders = tmp_path_factory.mktemp("experts"), []
    for i in range(3):
        policy = tiny_policy("sd3", fresh=True)
        for parameter in policy.trainable():
            parameter.data.normal_(std=0.15, generator=torch.Generator().manual_seed(len(parameter) + i))
        folders.append(root / f"run-{i}" / "checkpoint-1")
        policy.save_adapter(folders[-1])
    return folders


def left_in(folder: Path) -> dict[str, Any]:
    """The rows and the summary of an evaluation."""
    return {"scores": columns(read_lines(folder / "scores.jsonl")), "summary": read_json(folder / "summary.json")}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep(
    name: str, tiny_checkpoint: Callable[[str], Path], prompts: Path, tmp_path: Path, golden: Golden
) -> None:
    family, changes = SWEEPS[name]
    settings = SMALL | REWARDS | changes | {"prompts": prompts, "output": tmp_path / "out"}
    run("rlg.evaluate", ["--ckpt", tiny_checkpoint(family), *options(**settings)])
    golden.check(f"evaluation_{name}", left_in(tmp_path / "out"))


def test_a_blend(experts: list[Path], prompts: Path, tmp_path: Path, golden: Golden) -> None:
    first, second, mixed = experts
    settings = SMALL | {"reward": ["brightness", "contrast"], "prompts": prompts, "output": tmp_path / "out"}
    settings |= {"blend": "0:1:0.5", "blend_scale": 0.8, "morl": mixed}
    run("rlg.evaluate", ["--ckpt", first, "--ckpt", second, *options(**settings)])
    golden.check("blend", left_in(tmp_path / "out"))


def test_a_grid(tiny_checkpoint: Callable[[str], Path], prompts: Path, tmp_path: Path, golden: Golden) -> None:
    settings = SMALL | REWARDS | {"prompts": prompts, "output": tmp_path / "out", "w": [0, 1, 2]}
    del settings["steps"]
    run("rlg.grid", ["--ckpt", tiny_checkpoint("sd3"), *options(**settings, axis="steps", values=[1, 2])])
    rows = {folder.name: columns(read_lines(folder / "scores.jsonl")) for folder in (tmp_path / "out").glob("steps-*")}
    golden.check("grid", {"grid": read_json(tmp_path / "out" / "grid.json"), "scores": rows})


def test_an_equivalence_run(
    tiny_folder: Callable[[str], Path],
    experts: list[Path],
    prompts: Path,
    tmp_path: Path,
    golden: Golden,
) -> None:
    (tmp_path / "small.yaml").write_text(
        f"base: {tiny_folder('sd3')}\nreward: contrast\nckpt: {experts[0]}\nbeta: 0.02\n"
        f"prompts: {prompts}\nnum_prompts: 2\nsamples: 144\nk: 2\nscales: [0, 1, 2]\nsteps: 2\ndtype: float32\n"
    )
    run("rlg.equivalence", options(config=tmp_path / "small.yaml", output=tmp_path / "out"))
    found = read_json(tmp_path / "out" / "equivalence.json")
    golden.check("equivalence", found, amplified=10)  # a miss is a share of the gap, which is small here


def test_the_toy_of_the_equivalence(tmp_path: Path, golden: Golden) -> None:
    run("rlg.equivalence", ["--toy", *options(samples=100, steps=5, output=tmp_path)])
    golden.check("equivalence_toy", read_json(tmp_path / "toy.json"))
