"""Sampling: noise that belongs to a sample, log-probabilities that can be computed again, path KL in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.sampling import SampleId, SampleNoise, Trajectory, path_kl_step, rollout, sample, times
from rlg.guidance.guided import with_cfg
from rlg.models.policy import Policy

SHAPE = (4, 8, 8)
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 1.0}
IDS = [SampleId(3, prompt, k) for prompt in range(3) for k in range(2)]


def noise_of(ids: list[SampleId], steps: int = 3) -> tuple[Tensor, Tensor]:
    """(initial, (steps, ...)) noise of these samples as one batch."""
    noise = SampleNoise(ids, SHAPE)
    return noise.initial(), torch.stack([noise.step() for _ in range(steps)])


@pytest.mark.numerics
def test_noise_depends_on_the_sample_alone() -> None:
    initial, steps = noise_of(IDS)
    reversed_initial, reversed_steps = noise_of(IDS[::-1])
    assert torch.equal(initial, reversed_initial.flip(0))
    assert torch.equal(steps, reversed_steps.flip(1))
    for i, sample_id in enumerate(IDS):  # batches of one, as on many processes
        alone, alone_steps = noise_of([sample_id])
        assert torch.equal(initial[i], alone[0])
        assert torch.equal(steps[:, i], alone_steps[:, 0])


def test_initial_noise_is_the_same_whether_or_not_the_sampler_is_stochastic() -> None:
    noise, other = SampleNoise(IDS, SHAPE), SampleNoise(IDS, SHAPE)
    before = noise.initial()
    first = [noise.step() for _ in range(2)]
    assert torch.equal(noise.initial(), before)  # reading steps doesn't move it, nor does reading it move the steps
    assert torch.equal(torch.stack(first), torch.stack([other.step() for _ in range(2)]))


def test_other_samples_and_other_steps_have_other_noise() -> None:
    one = SampleId(3, 1, 1)
    others = [SampleId(4, 1, 1), SampleId(3, 2, 1), SampleId(3, 1, 2), SampleId(31, 1, 1), SampleId(3, 11, 1)]
    initial, steps = noise_of([one, *others])
    draws = torch.cat([initial[None], steps]).flatten(2).reshape(-1, math.prod(SHAPE))
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlation.abs().max() < 0.3  # 256 dimensions: one standard error is 0.06


def test_same_start_is_the_noise_of_a_prompts_first_image() -> None:
    shared, own = SampleNoise(IDS, SHAPE, same_start=True), SampleNoise(IDS, SHAPE)
    starts, initial = shared.initial(), own.initial()
    assert torch.equal(starts[0::2], initial[0::2])
    assert torch.equal(starts[1::2], initial[0::2])
    assert not torch.equal(starts[0], starts[2])
    assert torch.equal(shared.step(), own.step())  # what is injected later stays each image's own


def test_noise_is_standard_normal() -> None:
    initial, steps = noise_of([SampleId(0, i, k) for i in range(16) for k in range(8)])
    for draws in (initial, steps):
        count = draws.numel()
        assert abs(float(draws.mean())) < 4 / math.sqrt(count)
        assert abs(float(draws.var()) - 1) < 4 * math.sqrt(2 / count)
        assert abs(float((draws**4).mean()) - 3) < 4 * math.sqrt(96 / count)


@pytest.mark.numerics
def test_noise_is_the_same_in_every_version() -> None:
    """Rows of an evaluation are paired with those of earlier ones: the recipe is part of the format."""
    initial, steps = noise_of([SampleId(42, 7, 1)])
    assert initial.flatten()[:3].tolist() == pytest.approx([-0.585663, 1.542082, -0.84177], abs=1e-5)
    assert steps.flatten()[:3].tolist() == pytest.approx([1.342264, -0.178401, 0.167026], abs=1e-5)


def policy_and_inputs(make: Callable[..., Policy], family: str) -> tuple[Policy, Conditioning, list[SampleId]]:
    policy = make(family)
    return policy, policy.encode(["a red circle", "two blue crosses"]), IDS[:2]


@pytest.mark.numerics
def test_rollout_keeps_what_gives_a_ratio_of_exactly_one(family: str, tiny_policy: Callable[..., Policy]) -> None:
    policy, cond, ids = policy_and_inputs(tiny_policy, family)
    predict = with_cfg(policy.predict, policy.encode([""]), 2.0)
    schedule = policy.schedule(4, "sde", 0.7)
    trajectory = rollout(predict, schedule, cond, SampleNoise(ids, policy.latent_shape()), keep_means=True)
    assert trajectory.x_TBCHW.shape == (5, 2, *policy.latent_shape())
    assert trajectory.logp_TB.shape == (4, 2)
    assert schedule.stochastic_steps() == [0, 1, 2, 3]
    for i in range(4):
        x, x_next = trajectory.x_TBCHW[i], trajectory.x_TBCHW[i + 1]
        with torch.no_grad():
            out = predict(x, times(schedule, i, 2), cond)
        logp = process.log_prob(schedule, i, x, out, x_next)
        assert torch.equal(logp - trajectory.logp_TB[i], torch.zeros(2))
        assert torch.equal(process.mean(schedule, i, x, out), trajectory.mean_TBCHW[i])
        # what was injected is the sample's own noise, so the density is that of a standard normal draw
        noise = (x_next - trajectory.mean_TBCHW[i]) / schedule.std[i]
        expected = -(noise**2).flatten(1).mean(1) / 2 - math.log(schedule.std[i]) - 0.5 * math.log(2 * math.pi)
        torch.testing.assert_close(logp, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernel", ["ode", "sde"])
def test_rollout_ends_where_sample_does(family: str, kernel: str, tiny_policy: Callable[..., Policy]) -> None:
    policy, cond, ids = policy_and_inputs(tiny_policy, family)
    schedule = policy.schedule(3, kernel, 0.7)
    trajectory = rollout(policy.predict, schedule, cond, SampleNoise(ids, policy.latent_shape()))
    final = sample(policy.predict, schedule, cond, SampleNoise(ids, policy.latent_shape()))
    assert torch.equal(trajectory.x0, final)
    assert torch.equal(trajectory.x_TBCHW[0], SampleNoise(ids, policy.latent_shape()).initial())
    assert trajectory.mean_TBCHW is None
    assert not final.requires_grad


def test_deterministic_steps_have_no_log_probability_and_take_no_noise() -> None:
    """In a window the stochastic steps use a sample's step noise in order, from its first."""
    schedule = process.make_schedule(FLOW, 6, "sde", 0.7, window=(2, 4))
    cond = Conditioning({"row": torch.arange(2)})
    trajectory = rollout(lambda x, t, c: 0.5 * x, schedule, cond, SampleNoise(IDS[:2], SHAPE), keep_means=True)
    stochastic = trajectory.logp_TB.abs().sum(dim=1) > 0
    assert stochastic.tolist() == [False, False, True, True, False, False]
    injected = trajectory.x_TBCHW[1:] - trajectory.mean_TBCHW
    assert injected.flatten(1).any(dim=1).tolist() == stochastic.tolist()
    _, steps = noise_of(IDS[:2], steps=2)
    torch.testing.assert_close(injected[2:4], schedule.std[2:4, None, None, None, None] * steps, rtol=1e-4, atol=1e-5)


def test_trajectory_rows_and_cat_undo_each_other() -> None:
    schedule = process.make_schedule(FLOW, 3, "sde", 0.7)
    cond = Conditioning({"row": torch.arange(4)})
    for keep_means in (True, False):
        whole = rollout(lambda x, t, c: 0.5 * x, schedule, cond, SampleNoise(IDS[:4], SHAPE), keep_means)
        parts = [whole.rows(torch.tensor(rows)) for rows in ([2, 0], [1, 3])]
        assert torch.equal(parts[0].x0, whole.x0[[2, 0]])
        back = Trajectory.cat(parts).rows(torch.tensor([1, 2, 0, 3]))
        assert torch.equal(back.x_TBCHW, whole.x_TBCHW)
        assert torch.equal(back.logp_TB, whole.logp_TB)
        assert (back.mean_TBCHW is None) == (not keep_means)
        if keep_means:
            assert torch.equal(back.mean_TBCHW, whole.mean_TBCHW)


def test_path_kl_of_equal_outputs_is_zero_and_otherwise_gaussian() -> None:
    schedule = process.make_schedule(FLOW, 5, "sde", 0.7)
    out, base = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    x = torch.zeros_like(out)
    for i in schedule.stochastic_steps():
        assert torch.equal(path_kl_step(schedule, i, out, out), torch.zeros(3))
        kernels = [
            torch.distributions.Normal(process.mean(schedule, i, x, o), schedule.std[i].expand(o.shape))
            for o in (out, base)
        ]
        expected = torch.distributions.kl_divergence(*kernels).flatten(1).sum(dim=1)
        torch.testing.assert_close(path_kl_step(schedule, i, out, base), expected, rtol=1e-4, atol=1e-4)


def test_path_kl_of_a_constant_shift() -> None:
    """Flow SDE: with outputs c apart in each of D dimensions, a step adds D c^2 a_out^2 / (2 std^2) nats."""
    schedule = process.make_schedule(FLOW, 10, "sde", 0.7)
    zero = torch.zeros(1, *SHAPE)
    for i in (1, 5, 8):
        sigma, dt = schedule.sigma[i], schedule.sigma[i] - schedule.sigma[i + 1]
        g2 = 0.49 * sigma / (1 - sigma)
        drift = 1 + g2 * (1 - sigma) / (2 * sigma)
        nats = 256 * 0.1**2 * drift**2 * dt / (2 * g2)
        torch.testing.assert_close(path_kl_step(schedule, i, zero + 0.1, zero), nats[None], rtol=1e-4, atol=1e-5)
