"""Reward-weighted regression: its weights, what its minimum is, and that its samples are the base's."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from rlg.diffusion import process
from rlg.equivalence.mixtures import PROCESSES, Mixture
from trainers.core.online import OnlineTrainer
from trainers.rwr import rwr_loss, tilted_weights


def test_weights_by_hand() -> None:
    reward_B = torch.tensor([1.0, 5.0, 2.0, 5.0, 0.0])
    group_B = torch.tensor([7, 3, 7, 3, 9])
    high = 2 * math.e / (1 + math.e)
    assert tilted_weights(reward_B, group_B, beta=1.0).tolist() == pytest.approx([2 - high, 1, high, 1, 1])
    far = tilted_weights(torch.tensor([0.0, 1e4, 1e4, -1e9]), torch.zeros(4), beta=1e-3)
    assert far.tolist() == [0, 2, 2, 0]  # no overflow


def test_loss_counts_samples_for_their_weight() -> None:
    out = torch.zeros(2, 1, 2, 2, requires_grad=True)
    target = torch.stack([torch.ones(1, 2, 2), 3 * torch.ones(1, 2, 2)])
    anchor = torch.full((2, 1, 2, 2), 2.0)
    loss, metrics = rwr_loss(out, target, anchor, torch.tensor([0.5, 1.5]))
    assert loss.item() == pytest.approx(0.5 * (-0.5 * 1 + 0.5 * 9) + 4)
    assert (metrics["error"].item(), metrics["moved"].item()) == pytest.approx((5.0, 4.0))


def test_equal_weights_leave_the_base_where_it_is() -> None:
    """Whatever the samples are: no sampler's images are quite those that the network was trained on."""
    out = torch.randn(3, 1, 2, 2, requires_grad=True)
    rwr_loss(out, torch.randn(3, 1, 2, 2), out.detach(), torch.ones(3))[0].backward()
    assert not out.grad.any()


@pytest.mark.parametrize("name", ["eps", "flow"])
def test_its_minimum_is_the_denoiser_of_the_tilted_law(name: str) -> None:
    """Base N(0, 1) and R = x: p exp(R / beta) is N(1 / beta, 1), whose predictor is known."""
    beta, count = 0.8, 500_000
    generator = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(count, 1, 1, 1, generator=generator) for _ in range(2))
    weight_B = tilted_weights(x0.flatten(), torch.zeros(count), beta)
    rows_B, table = torch.full((count,), 500), process.process_from_config(PROCESSES[name])
    x_t, target = process.noise(table, rows_B, x0, noise)
    t_B, base = table.time[rows_B], Mixture.of((1.0, 0.0, 1.0)).predictor(PROCESSES[name])
    fit = torch.zeros(2, dtype=torch.float64, requires_grad=True)  # out = fit[0] + fit[1] x_t; the loss is quadratic
    out = (fit[0] + fit[1] * x_t.double().flatten())[:, None, None, None]
    loss, _ = rwr_loss(out, target.double(), base(x_t, t_B, None).double(), weight_B.double())
    (slope,) = torch.autograd.grad(loss, fit, create_graph=True)
    curvature = torch.stack([torch.autograd.grad(s, fit, retain_graph=True)[0] for s in slope])
    fit = -torch.linalg.solve(curvature, slope.detach())
    at, t_B = torch.tensor([0.0, 1.0, 2.0]), t_B[:3]
    exact = Mixture.of((1.0, 1 / beta, 1.0)).predictor(PROCESSES[name])(at[:, None, None, None], t_B, None)
    assert (fit[0] + fit[1] * at).tolist() == pytest.approx(exact.flatten().tolist(), abs=0.03)


@pytest.mark.parametrize("on_policy", [False, True])
def test_samples_are_of_the_base_unless_on_policy(on_policy: bool, tiny_online: Callable[..., OnlineTrainer]) -> None:
    trainer = tiny_online("rwr", on_policy=on_policy, learning_rate=0.05, num_train_steps=1)
    first = trainer.rollout().latents
    trainer.iteration()
    trainer.state.step = 0  # the same noise again
    again = trainer.rollout().latents
    assert torch.equal(first[0], again[0]) != on_policy


def test_rewards_are_not_scaled(tiny_online: Callable[..., OnlineTrainer]) -> None:
    trainer = tiny_online("rwr", beta=0.01)
    samples = trainer.rollout()
    weight_B, metrics = trainer.score(samples)
    reward_B = trainer.reward(samples.images_B3HW, *trainer._texts(samples.prompt_B)).total_B.double()
    assert weight_B.tolist() == pytest.approx(tilted_weights(reward_B, samples.prompt_B, 0.01).tolist(), rel=1e-5)
    assert metrics["reward"] == pytest.approx(float(reward_B.mean()))
    assert trainer.update(samples, weight_B)["ess"] == pytest.approx(
        float(weight_B.double().sum() ** 2 / (len(weight_B) * weight_B.double().square().sum()))
    )


def test_it_learns(tiny_online: Callable[..., OnlineTrainer]) -> None:
    trainer = tiny_online("rwr", beta=0.002, learning_rate=6e-3, num_train_steps=4, num_generations=8)
    trainer.config.on_policy = True
    rewards = [trainer.iteration()["reward"] for _ in range(16)]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.005
