"""Adjoint Matching: its recursion and loss by hand, and the tilt that it reaches on Gaussian chains."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.sampling import times
from tests.support.gaussian_chains import FLOW, NOTHING, SD15, Affine, chain
from tests.support.smooth_rewards import brightness
from trainers.adjoint_matching import (
    Adjoint,
    AdjointMatchingConfig,
    AdjointMatchingTrainer,
    adjoint_matching_loss,
    below_quantile,
    lean_adjoint,
)
from trainers.checkpoints.checkpoint import resume, save_checkpoint

Make = Callable[..., AdjointMatchingTrainer]


@pytest.fixture
def tiny(tiny_online: Callable[..., AdjointMatchingTrainer]) -> Make:
    return partial(tiny_online, "adjoint_matching")


def fit(net: Affine, gradient: float, curvature: float = 0.0, rounds: int = 1) -> Tensor:
    """Train on-policy with the reward (gradient x - curvature x^2 / 2), over beta; return ends of the last model."""
    for _ in range(rounds):
        states = net.sample().x_TBCHW
        adjoint = lean_adjoint(net.base, net.schedule, states, NOTHING, curvature * states[-1] - gradient)
        for i in net.schedule.stochastic_steps():
            net.minimise(i, partial(loss_at, net, i, states[i], adjoint))
    return net.sample().x0


def loss_at(net: Affine, i: int, x: Tensor, adjoint: Adjoint) -> Tensor:
    out, ones = net.tuned(x, times(net.schedule, i, len(x)), NOTHING), torch.ones(len(x))
    return adjoint_matching_loss(net.schedule, i, out, adjoint.base[i], adjoint.after[i], ones)[0]


@pytest.mark.parametrize("noisy_end", [True, False])
@pytest.mark.parametrize("config", [FLOW, SD15], ids=["flow", "ddim"])
def test_a_linear_reward_shifts_the_end_by_the_chains_variance(config: dict, noisy_end: bool) -> None:
    """Shift (a / beta) Var(x_T | x_0), with the variance unchanged: exact on any chain."""
    net = Affine.of(chain(config, 12, noisy_end=noisy_end), mean=0.3, spread=0.8)
    before = net.sample().x0
    after = fit(net, gradient=0.7)
    assert float(after.mean() - before.mean()) == pytest.approx(0.7 * net.memory_variance(), abs=1e-4)
    assert float(after.std() - before.std()) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("config", [FLOW, SD15], ids=["flow", "ddim"])
def test_a_quadratic_reward_narrows_the_end_as_the_best_control_does(config: dict) -> None:
    net = Affine.of(chain(config, 12))
    end = fit(net, gradient=0.0, curvature=1.0, rounds=30)
    assert float(end.std(unbiased=False)) == pytest.approx(net.optimal_std(1.0), abs=1e-3)


def test_the_chain_tends_to_the_tilted_law() -> None:
    """For N(0, 1) data, reward -c x^2 / 2 and c / beta = 1: a spread of 1 / sqrt(2), up to the size of the steps."""
    gaps = [abs(Affine.of(chain(FLOW, steps)).optimal_std(1.0) - 0.5**0.5) for steps in (100, 400)]
    assert gaps[1] < gaps[0] / 3 < 0.01
    assert Affine.of(chain(FLOW, 400), spread=0.5).memory_variance() == pytest.approx(0.25, abs=0.01)


def test_the_adjoint_is_the_derivative_of_the_reward_along_the_path() -> None:
    """Of a network that is not linear, at its own samples: by autograd, and by finite differences."""
    schedule = chain(FLOW, 4, noisy_end=False)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, generator=generator)

    def network(x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        return torch.tanh(torch.einsum("ij,bchj->bchi", weight, x_BCHW)) + t_B[:, None, None, None] / 1000

    noise = torch.randn(5, 2, 1, 1, 3, generator=generator)

    def end(x: Tensor, first: int) -> Tensor:
        for i in range(first, 4):
            out = network(x, times(schedule, i, 2), NOTHING)
            x = process.step(schedule, i, x, out, noise[i + 1] if schedule.std[i] > 0 else None)
        return x

    states = torch.stack([noise[0], *(end(noise[0], 0),) * 4])
    for i in range(4):
        out = network(states[i], times(schedule, i, 2), NOTHING)
        states[i + 1] = process.step(schedule, i, states[i], out, noise[i + 1] if schedule.std[i] > 0 else None)
    adjoint = lean_adjoint(network, schedule, states, NOTHING, -2 * states[-1])  # of the reward |x|^2
    assert sorted(adjoint.after) == [0, 1, 2, 3]
    for i in range(1, 4):
        x = states[i].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(end(x, i).square().sum(), x)
        torch.testing.assert_close(adjoint.after[i - 1], -gradient, rtol=1e-4, atol=1e-5)
        bump = torch.zeros_like(states[i])
        bump[1, 0, 0, 2] = 1e-2
        up, down = (float(end(states[i] + sign * bump, i).square().sum()) for sign in (1, -1))
        assert float(adjoint.after[i - 1][1, 0, 0, 2]) == pytest.approx(-(up - down) / 2e-2, rel=1e-2, abs=1e-3)
        torch.testing.assert_close(adjoint.base[i], network(states[i], times(schedule, i, 2), NOTHING))
    assert lean_adjoint(network, schedule, states, NOTHING, -2 * states[-1], first=2).after.keys() == {2, 3}


def test_loss_by_hand() -> None:
    """Two latents, two samples: (C (f - f_base) / s + s a)^2 is summed over latents, its mean is over samples."""
    schedule = chain(FLOW, 4)
    scale, std = float(schedule.a_out[1]), float(schedule.std[1])
    out, base, after = (
        torch.tensor(v).view(2, 1, 1, 2) for v in ([[1.0, 2], [0, 0]], [[0.0, 0], [0, 1]], [[3.0, 0], [0, 4]])
    )
    loss, metrics = adjoint_matching_loss(schedule, 1, out, base, after, torch.tensor([1.0, 1.0]))
    first = (scale / std + 3 * std) ** 2 + (2 * scale / std) ** 2
    second = (-scale / std + 4 * std) ** 2
    assert float(loss) == pytest.approx((first + second) / 2, rel=1e-5)
    assert float(metrics["target"]) == pytest.approx((9 + 16) * std**2 / 2, rel=1e-5)
    assert float(metrics["kl"]) == pytest.approx((5 / 2 + 1 / 2) * scale**2 / (2 * std**2) / 2, rel=1e-5)
    assert metrics["masked"] == 0
    low, high = sorted((first, second))
    clipped, metrics = adjoint_matching_loss(schedule, 1, out, base, after, torch.ones(2), limit=(low + high) / 2)
    assert float(clipped) == pytest.approx(low / 2, rel=1e-5) and metrics["masked"] == 0.5
    alone, _ = adjoint_matching_loss(schedule, 1, out, base, after, torch.tensor([0.0, 1.0]))
    assert float(alone) == pytest.approx(second / 2, rel=1e-5)


def test_the_tail_above_a_quantile_is_masked() -> None:
    value, weight = torch.tensor([1.0, 2, 3, 4, 100]), torch.tensor([1.0, 1, 1, 1, 0])
    assert below_quantile(value, weight, 0.5).tolist() == [1, 1, 0, 0, 0]
    assert below_quantile(value, weight, 1.0).tolist() == weight.tolist()
    assert below_quantile(value, torch.zeros(5), 0.5).tolist() == [0] * 5


# --- the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg_in_loss", [True, False])
def test_loss_of_every_family_is_that_of_the_formula(family: str, cfg_in_loss: bool, tiny: Make) -> None:
    """Written out once more: guidance by hand, the adjoint by autograd through decoder and reward."""
    trainer = tiny(family, cfg=2.0, cfg_in_loss=cfg_in_loss, beta=0.5, mask_quantile=1.0)
    for parameter in trainer.policy.trainable():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    policy, schedule = trainer.policy, trainer.sampler(3)
    (batch,) = trainer.rollout().batches
    loss_at = trainer.losses(batch, torch.ones(4), [0, 1])
    states, negative = batch.trajectory.x_TBCHW, policy.encode([""]).expand(4)

    def network(bare: Callable[..., Tensor], x: Tensor, i: int) -> Tensor:
        t_B = schedule.t[i].expand(4)
        if not cfg_in_loss:
            return bare(x, t_B, batch.cond)
        without, with_text = bare(x, t_B, negative), bare(x, t_B, batch.cond)
        return without + 2.0 * (with_text - without)

    assert batch.end is not None and [bool(std) for std in schedule.std > 0] == [True, True, False]
    x1 = states[1].clone().requires_grad_()
    x2 = schedule.a_x[1] * x1 + schedule.a_out[1] * network(policy.reference, x1, 1)
    x2 = states[2] + (x2 - x2.detach())  # the path is the tuned model's, the Jacobian the base's
    x3 = schedule.a_x[2] * x2 + schedule.a_out[2] * network(policy.reference, x2, 2)
    x3 = states[3] + (x3 - x3.detach())
    images = policy.decode_with_grad(x3)
    (slope,) = torch.autograd.grad(images.mean(dim=(1, 2, 3)).sum() / 0.5, x1)
    x0 = states[0]
    control = schedule.a_out[0] * (network(policy.predict, x0, 0) - network(policy.reference, x0, 0)) / schedule.std[0]
    expected = (control - schedule.std[0] * slope).square().flatten(1).sum(dim=1).mean()
    loss, metrics = loss_at(0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    assert metrics["kl"] > 0 and float(loss_at(1)[0]) > 0


def test_two_iterations_move_the_lora_and_nothing_else(family: str, tiny: Make) -> None:
    trainer = tiny(family)
    before = {name: p.detach().clone() for name, p in trainer.policy.network.named_parameters()}
    rows = [trainer.iteration() for _ in range(2)]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    moved = {name for name, p in trainer.policy.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".lora_" in name for name in moved)


def test_the_reward_is_that_of_the_images(tiny: Make) -> None:
    """Its rollout scores them already; one that has no finite reward has no weight."""
    trainer = tiny()
    samples = trainer.rollout()
    weight_B, metrics = trainer.score(samples)
    assert weight_B is not None and weight_B.tolist() == [1.0] * 4
    assert metrics["reward"] == pytest.approx(
        float(trainer.reward(samples.images_B3HW, *[["x"] * 4, [{}] * 4]).total_B.mean())
    )


def test_resuming_goes_on_to_the_bit(tiny: Make, tmp_path: Path) -> None:
    options = {"num_train_steps": 1, "last_train_steps": 0, "steps": 4, "save_total_limit": None}
    whole = tiny(**options)
    (tmp_path / "run").mkdir()
    for _ in range(3):
        if whole.state.step == 2:
            save_checkpoint(whole.config, whole.accelerator, whole.state)
        whole.iteration()
    again = tiny(**options, resume=True)
    resume(again.config, again.accelerator, again.state)
    again.iteration()
    assert all(map(torch.equal, whole.policy.trainable(), again.policy.trainable()))


def test_a_reward_goes_up_and_the_loss_down(tiny: Make) -> None:
    """Over noise that was not trained on, in standard errors of the mean of 24 images."""
    trainer = tiny(num_generations=8, batch_size=16, lora_rank=4, beta=3e-4, learning_rate=5e-3)
    trainer.eval_prompts = trainer.prompts * 8
    before = trainer.evaluate()["eval/brightness"]
    first = trainer.iteration()
    for _ in range(8):
        last = trainer.iteration()
    assert trainer.evaluate()["eval/brightness"] - before > 6 * first["reward_std"] / math.sqrt(24)
    assert first["loss"] == pytest.approx(first["target"], rel=1e-4)  # nothing is learnt yet
    assert last["loss"] < 0.9 * last["target"]


def test_bad_settings_are_refused(tiny: Make) -> None:
    rest = {"base": "m", "name": "n", "reward": ["ink"], "prompts": "p"}
    wrong = {"beta": 0.0, "mask_quantile": 1.5, "loss_clip": -1.0, "level": 0.0, "steps": 1, "last_train_steps": -1}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name if name != "steps" else "at least 2 steps"):
            AdjointMatchingConfig(**rest, **{name: value})
    with pytest.raises(ValueError, match="last_train_steps = 3 is more than num_train_steps = 2"):
        AdjointMatchingConfig(**rest, num_train_steps=2, last_train_steps=3)
    with pytest.raises(ValueError, match="num_train_steps = 3, but only 2 steps can be trained at"):
        tiny(num_train_steps=3)
    with pytest.raises(ValueError, match="reward 'composition' has no gradient"):
        AdjointMatchingConfig(**rest | {"reward": ["ink", "composition"]}).check_inputs()
    AdjointMatchingConfig(**rest | {"reward": ["ink", "composition"]}, reward_weights=[1.0, 0.0]).check_inputs()
    with pytest.raises(ValueError, match="reward 'brightness' has no gradient"):
        tiny(reward=brightness)
