"""Modes of guidance on pipelines of plain diffusers: those that leave nothing out are exact, none remembers a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import HeunDiscreteScheduler

import rlg
from rlg import sample
from rlg.diffusion import sampling
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.guidance.modes import Mode, Models
from rlg.models.policy import Policy
from tests.integrations.test_attach import PROMPTS, STEPS, plain, recorded_passes, run

Guided = Callable[..., Any]


@pytest.fixture(scope="module")
def pipes(tiny_folder: Callable[[str], Path]) -> dict[str, Any]:
    return {family: plain(tiny_folder(family)) for family in ("sd", "sd3")}


@pytest.fixture
def guided(pipes: dict[str, Any], tiny_checkpoint: Callable[[str], Path], request: pytest.FixtureRequest) -> Guided:
    """`rlg.apply` on a pipeline that is clean again after the test."""

    def make(family: str, **options: Any) -> Any:
        pipe = pipes[family]
        guide = rlg.apply(pipe, tiny_checkpoint(family), **options)
        request.addfinalizer(pipe.unload_lora_weights)
        request.addfinalizer(guide.remove)
        return guide

    return make


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_modes_that_leave_nothing_out_are_full_guidance(guided: Guided, family: str, tiny_checkpoint: Any) -> None:
    guide = guided(family, scale=2.0)
    expected = run(guide.pipe)
    guide.remove()
    guide.pipe.unload_lora_weights()
    for mode in ("full", "reuse:1", "reuse_at:0,1,2", "scaled_but:0,1,2"):
        guide = rlg.apply(guide.pipe, tiny_checkpoint(family), scale=2.0, mode=mode)
        assert torch.equal(run(guide.pipe), expected), mode
        guide.remove()
        guide.pipe.unload_lora_weights()


@pytest.mark.parametrize(
    ("mode", "passes"),
    [("reuse:2", 5), ("reuse_at:1:linear", 4), ("scaled:0.7", 3), ("scaled_but:1:carry", 5), ("tuned", 3)],
)
def test_a_mode_is_that_of_our_sampler(
    mode: str, passes: int, guided: Guided, tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    policy = Policy.load(str(tiny_folder("sd3")))
    policy.load_adapter(tiny_checkpoint("sd3"))
    ids = [SampleId(7, i, 0) for i in range(2)]
    schedule, noise = policy.schedule(STEPS, "ode", 0.0), SampleNoise(ids, policy.latent_shape())
    predict = Mode.parse(mode).begin(Models(policy, policy.encode([""]), 4.5), 2.0, schedule, ids)
    expected = sampling.sample(predict, schedule, policy.encode(PROMPTS), noise)
    guide = guided("sd3", scale=2.0, mode=mode)
    with recorded_passes(guide.networks["transformer"]) as seen:
        first = run(guide.pipe, noise.initial(), 4.5)
        assert len(seen) == passes
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["reuse:2", "reuse:2:linear", "scaled_but:0:carry"])
def test_a_call_remembers_nothing_of_the_one_before(mode: str, guided: Guided) -> None:
    guide = guided("sd3", scale=2.0, mode=mode)
    first = run(guide.pipe)

    def stop(pipe: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # a call that ends on its way
        guide.pipe(["another"], num_inference_steps=STEPS, callback_on_step_end=stop)
    assert torch.equal(run(guide.pipe), first)
    guide.scale = 1.0
    tuned = run(guide.pipe)
    guide.scale = lambda t: 2.0
    assert torch.equal(run(guide.pipe), first) and not torch.equal(tuned, first)


def test_a_weight_for_each_row(guided: Guided) -> None:
    guide = guided("sd", scale=2.0, mode="reuse:2")
    at_two = run(guide.pipe, cfg=1.0)
    guide.scale = torch.tensor([2.0, 1.0])
    mixed = run(guide.pipe, cfg=1.0)
    torch.testing.assert_close(mixed[0], at_two[0], rtol=1e-4, atol=1e-4)
    guide.scale = 1.0
    torch.testing.assert_close(mixed[1], run(guide.pipe, cfg=1.0)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["random", "conditional", "interval:0:1", "reuse:2+batch", "fast"])
def test_modes_that_a_pipeline_does_not_run(mode: str, pipes: dict[str, Any], tiny_checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="mode"):
        rlg.apply(pipes["sd"], tiny_checkpoint("sd"), mode=mode)
    assert not hasattr(pipes["sd"].unet, "peft_config")  # refused before anything was attached


def test_calls_that_a_mode_can_not_follow(guided: Guided, pipes: dict[str, Any]) -> None:
    guide = guided("sd", scale=2.0, mode="reuse:2")
    plain_scheduler = guide.pipe.scheduler
    guide.pipe.scheduler = HeunDiscreteScheduler.from_config(plain_scheduler.config)
    try:
        with pytest.raises(ValueError, match="HeunDiscreteScheduler calls the network 2 times a step"):
            run(guide.pipe)
    finally:
        guide.pipe.scheduler = plain_scheduler
    run(guide.pipe)
    last = guide.pipe.scheduler.timesteps[-1]
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(ValueError, match="several times a step"):
        guide.networks["unet"](x, last, torch.zeros(1, 5, 32))
    guide.remove()
    guide.pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="no step 3, the 3 steps"):
        run(guided("sd", scale=2.0, mode="reuse_at:3").pipe)


def test_the_command_takes_a_mode(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--ckpt", str(tiny_checkpoint("sd3")), "--prompt", "a", "--k", "1", "--steps", "2", "--w", "0", "2"]
    files = {}
    for mode in ("full", "reuse:1", "reuse:2"):
        file = tmp_path / f"{mode[-1]}.png"
        sample.main([*argv, "--mode", mode, "--output", str(file)])
        files[mode] = file.read_bytes()
    assert files["full"] == files["reuse:1"] != files["reuse:2"]
    for more in (["--mode", "random"], ["--mode", "reuse:2", "--correct"]):
        with pytest.raises(SystemExit, match="2"):
            sample.main([*argv, *more, "--output", str(tmp_path / "no.png")])
        assert "mode" in capsys.readouterr().err.splitlines()[-1]
