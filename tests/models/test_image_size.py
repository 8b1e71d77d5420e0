"""Schedules that follow the image's size: against diffusers' pipelines, and from every caller's own resolution."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from rewards import RewardMix
from rlg.app.generator import ImageGenerator
from rlg.benchmark.guidance_cost import Bench, CostSettings
from rlg.diffusion import process
from rlg.diffusion.sampling import SampleId, SampleNoise, sample
from rlg.evaluation.evaluator import EvalSettings, Evaluator
from rlg.models.policy import Policy
from tests.conftest import ONLINE, PROMPTS
from tests.support.smooth_rewards import brightness
from trainers.dpo import DPOConfig, DPOTrainer

KINDS = ("exponential", "linear")
# Of the tiny sd3: an image of 64 pixels has 16 tokens, one of 32 has 4; mu is 0.8 of the first and 0.5 of the second.
DYNAMIC = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 4,
    "max_image_seq_len": 16,
    "base_shift": 0.5,
    "max_shift": 0.8,
}
MU = {64: 0.8, 32: 0.5}
Folder = Callable[..., Path]


def scheduler(kind: str, **changes: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**DYNAMIC | {"time_shift_type": kind} | changes)


@pytest.fixture
def dynamic_folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Folder:
    """Folder of the tiny sd3, whose scheduler shifts by the image's size."""

    def make(kind: str) -> Path:
        folder = tmp_path / f"dynamic-{kind}"
        shutil.copytree(tiny_folder("sd3"), folder)
        scheduler(kind).save_pretrained(folder / "scheduler")
        assert json.loads((folder / "scheduler/scheduler_config.json").read_text())["use_dynamic_shifting"]
        return folder

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [64, 32])
def test_times_and_images_are_those_of_the_pipeline(dynamic_folder: Folder, kind: str, side: int) -> None:
    policy = Policy.load(str(dynamic_folder(kind)))
    noise = SampleNoise([SampleId(0, 0, 0)], policy.latent_shape(side))
    theirs = policy.pipe(
        "a red circle",
        height=side,
        width=side,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=noise.initial(),
        output_type="latent",
    ).images
    schedule = policy.schedule(4, "ode", 0.0, resolution=side)
    torch.testing.assert_close(schedule.t, policy.pipe.scheduler.timesteps, rtol=0, atol=0)
    torch.testing.assert_close(schedule.sigma, policy.pipe.scheduler.sigmas, rtol=0, atol=0)
    ours = sample(policy.predict, schedule, policy.encode(["a red circle"]), noise)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # we step in fp32 by another order of sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1024, 4096])  # of Flux at 512 and 1024 pixels
def test_a_pipelines_own_levels_are_shifted(kind: str, tokens: int) -> None:
    """As Flux and Qwen-Image call their scheduler: with noise levels, and with mu, of `calculate_shift`."""
    own = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=0.02)
    mu, sigmas = calculate_shift(tokens), np.linspace(1.0, 1 / 6, 6)
    assert process.linear_mu(process.config_of(own), tokens) == pytest.approx(mu, rel=1e-12)
    own.set_timesteps(sigmas=sigmas, mu=mu)
    schedule = process.make_schedule(process.config_of(own), 6, mu=mu, sigmas=sigmas.tolist())
    torch.testing.assert_close(schedule.t, own.timesteps, rtol=0, atol=0)
    torch.testing.assert_close(schedule.sigma, own.sigmas, rtol=0, atol=0)


def test_mu_by_hand() -> None:
    """Flux: 0.5 at 256 tokens and 1.15 at 4096, so 0.63 at 1024; the middle level 1/2 goes to e^mu / (e^mu + 1)."""
    config = process.config_of(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
    mu = process.linear_mu(config, 1024)
    assert mu == pytest.approx(0.5 + 0.65 * (1024 - 256) / (4096 - 256)) == pytest.approx(0.63)
    schedule = process.make_schedule(config, 2, mu=mu, sigmas=[1.0, 0.5])
    assert schedule.sigma.tolist() == pytest.approx([1.0, math.exp(0.63) / (math.exp(0.63) + 1), 0.0])


def test_training_times_are_drawn_as_the_size_shifts_them() -> None:
    """A shift of 3 is mu = log 3, or mu = 3 where the time shift is linear; without a size there is no density."""
    fixed = process.process_from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    for kind, mu in (("exponential", math.log(3.0)), ("linear", 3.0)):
        config = process.config_of(scheduler(kind))
        torch.testing.assert_close(process.process_from_config(config, mu).density, fixed.density)
        with pytest.raises(ValueError, match="image's size"):
            process.process_from_config(config)


@pytest.mark.parametrize(
    ("changes", "mu", "message"),
    [
        ({}, None, "use_dynamic_shifting depends on the image's size"),
        ({"time_shift_type": "linear"}, -0.1, "mu = -0.1 .* must be > 0"),
        ({"invert_sigmas": True}, 0.5, "invert_sigmas"),
    ],
)
def test_what_has_no_table_is_refused(changes: dict, mu: float | None, message: str) -> None:
    config = process.config_of(scheduler("exponential")) | changes
    with pytest.raises(ValueError, match=message):
        process.make_schedule(config, 4, mu=mu)


@pytest.mark.parametrize("changes", [{"max_image_seq_len": 4}, {"base_shift": None}])
def test_a_line_through_one_point_is_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="that is no line"):
        process.linear_mu(process.config_of(scheduler("linear")) | changes, 16)


def test_a_family_may_shift_by_a_rule_of_its_own(dynamic_folder: Folder) -> None:
    """As FLUX.2, by the number of steps as well; and its pipeline may choose the levels."""
    policy = Policy.load(str(dynamic_folder("exponential")))
    policy.backbone = replace(
        policy.backbone,
        image_tokens=lambda network, shape: math.prod(shape),
        mu=lambda config, tokens, steps: math.log(tokens / steps),
        sigmas=lambda steps: [1 - i / (2 * steps) for i in range(steps)],
    )
    schedule = policy.schedule(
        2, "ode", 0.0, resolution=32
    )  # 16 x 4 x 4 numbers over 2 steps: odds of 3 to 1 times 128
    assert schedule.sigma.tolist() == pytest.approx([1.0, 3 * 128 / (1 + 3 * 128), 0.0])


# --- callers ------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float | None]]:
    """mu of each table that is made."""
    seen: list[float | None] = []
    for name in ("make_schedule", "process_from_config"):
        plain = getattr(process, name)

        def spy(*args: Any, plain: Callable[..., Any] = plain, **options: Any) -> Any:
            seen.append(options["mu"] if "mu" in options else args[1])
            return plain(*args, **options)

        monkeypatch.setattr(process, name, spy)
    yield seen
    assert seen and None not in seen


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("algorithm", ONLINE)
def test_an_online_training_goes_by_its_resolution(
    tiny_online: Callable[..., Any], dynamic_folder: Folder, asked: list[float], algorithm: str, side: int
) -> None:
    own = {"divert_start_step": 0} if algorithm == "spo" else {}
    folder = str(dynamic_folder("exponential"))
    trainer = tiny_online(algorithm, base=folder, resolution=side, eval_num_prompts=1, **own)
    trainer.iteration()
    trainer.evaluate()
    assert asked == pytest.approx([MU[side]] * len(asked))


def test_a_training_on_pairs_goes_by_its_resolution(
    dynamic_folder: Folder, pairs_folder: Path, tmp_path: Path, asked: list[float]
) -> None:
    config = DPOConfig(
        base=str(dynamic_folder("exponential")),
        name="run",
        output_dir=str(tmp_path),
        data=str(pairs_folder),
        dtype="float32",
        lora_rank=2,
        lora_alpha=4,
        resolution=32,
        steps=3,
        eval_num_prompts=1,
    )
    DPOTrainer(config, held_out=RewardMix({"brightness": brightness}, (1.0,)), eval_prompts=PROMPTS).evaluate()
    assert asked == pytest.approx([MU[32]] * len(asked))


def test_evaluation_app_and_benchmark_go_by_their_resolution(dynamic_folder: Folder, asked: list[float]) -> None:
    policy = Policy.load(str(dynamic_folder("exponential")))
    settings = EvalSettings((0.0, 1.0), ("rlg", "tuned_2x_steps"), 2, "ode", 0.7, 1.0, 32, k=1, seed=0, batch_size=2)
    evaluator = Evaluator(policy, RewardMix({"brightness": brightness}, (1.0,)), PROMPTS, settings)
    evaluator.rows_at([0], 1.0, 1)
    ImageGenerator(policy, [policy.predict], resolution=32)
    Bench(policy, PROMPTS, CostSettings(w=2.0, steps=2, kernel="ode", level=0.7, cfg=1.0, resolution=32), None)
    assert asked == pytest.approx([MU[32]] * len(asked))
    assert len(asked) >= 2 + 3 + 1
