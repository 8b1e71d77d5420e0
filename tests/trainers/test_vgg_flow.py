"""VGG-Flow: its loss by hand, and where it takes Gaussian data, which is not to the tilt."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.sampling import times
from tests.support.gaussian_chains import FLOW, NOTHING, SD15, Affine
from trainers.vgg_flow import VGGFlowConfig, VGGFlowTrainer, clip_norms, vgg_flow_loss

Make = Callable[..., VGGFlowTrainer]


@pytest.fixture
def tiny(tiny_online: Callable[..., VGGFlowTrainer]) -> Make:
    return partial(tiny_online, "vgg_flow")


def loss_at(net: Affine, i: int, x: Tensor, gradient: Tensor, power: int) -> Tensor:
    t_B = times(net.schedule, i, len(x))
    out, base = net.tuned(x, t_B, NOTHING), net.base(x, t_B, NOTHING)
    return vgg_flow_loss(net.schedule, i, out, base, gradient, torch.ones(len(x)), power)[0]


def fit(net: Affine, slope: float, curvature: float, power: int, rounds: int = 1) -> None:
    """Train on-policy with the reward (slope x - curvature x^2 / 2), over beta."""
    for _ in range(rounds):
        states = net.sample(60).x_TBCHW
        for i in range(len(net.schedule)):
            out = net.tuned(states[i], times(net.schedule, i, 60), NOTHING)
            estimate = process.predict_x0(net.schedule, i, states[i], out)
            net.minimise(i, partial(loss_at, net, i, states[i], slope - curvature * estimate, power))


@pytest.mark.parametrize("config", [FLOW, SD15], ids=["flow", "noise"])
@pytest.mark.parametrize("power", [0, 1, 2])
def test_a_linear_reward_moves_the_end_by_a_known_sum(config: dict, power: int) -> None:
    """The reward's pull of each step times the decay behind it; the spread does not change."""
    net = Affine.of(process.make_schedule(config, 8), mean=0.2, spread=0.7)
    before = net.sample(60).x0
    fit(net, 0.5, 0.0, power)
    after, schedule, decay = net.sample(60).x0, net.schedule, net.decay_T.tolist()
    sigma = schedule.sigma[:-1] / (schedule.alpha + schedule.sigma)[:-1]
    pull = (schedule.a_out / schedule.x0_out * sigma * (1 - sigma) ** power).tolist()
    shift = sum(0.5 * pull[i] * math.prod(decay[i + 1 :]) for i in range(8))
    assert float(after.mean() - before.mean()) == pytest.approx(shift, rel=1e-4)
    assert float(after.std() / before.std()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("power", "shift"), [(0, 1.2465), (1, 0.6232), (2, 0.4058)])
def test_the_law_is_not_the_tilt(power: int, shift: float) -> None:
    """N(0, 1) and the reward x, beta 1: the tilt would move the mean by 1, and the exact control by pi / 2."""
    net = Affine.of(process.make_schedule(FLOW, 2000))
    decay_behind_T = net.decay_T.flip(0).cumprod(0).flip(0) / net.decay_T
    pull_T = (-net.schedule.a_out * (1 - net.schedule.sigma[:-1]) ** power).double()
    assert float((pull_T * decay_behind_T).sum()) == pytest.approx(shift, abs=1e-3)


@pytest.mark.parametrize("power", [0, 2])
def test_a_quadratic_reward_has_the_known_fixed_point(power: int) -> None:
    """v = (v_base + eta b c x) / (1 + eta b c sigma), with b c = 1."""
    net = Affine.of(process.make_schedule(FLOW, 6))
    fit(net, 0.0, 1.0, power, rounds=40)
    sigma = net.schedule.sigma[:-1]
    eta = (1 - sigma) ** power
    expected = (net.slope_T + eta) / (1 + eta * sigma) - net.slope_T
    live = slice(1, None) if power == 0 else slice(None)  # eta sigma = 1 at the first step: it swings for ever
    torch.testing.assert_close(net.change_T2[live, 0], expected[live], rtol=1e-3, atol=1e-3)


def test_known_spreads() -> None:
    """The same fixed point on a fine grid, for b c = 1 and 3."""
    schedule = process.make_schedule(FLOW, 2000)
    slope, sigma, step = Affine.of(schedule).slope_T.double(), schedule.sigma[:-1].double(), schedule.a_out.double()
    for power, curvature, spread in ((0, 1, 0.5535), (1, 1, 0.6502), (2, 1, 0.7230), (0, 3, 0.2848), (2, 3, 0.4375)):
        pull = (1 - sigma) ** power * curvature
        found = (1 + step * (slope + pull) / (1 + pull * sigma)).prod()
        assert float(found) == pytest.approx(spread, abs=1e-3)


def test_loss_by_hand() -> None:
    schedule = process.make_schedule(FLOW, 4)
    eta = (1 - float(schedule.sigma[1])) ** 2
    out, base, gradient = (
        torch.tensor([[values]]).view(1, 1, 1, 2) for values in ([1.0, 2.0], [0.0, 4.0], [4.0, 8.0])
    )
    loss, metrics = vgg_flow_loss(schedule, 1, out, base, gradient, torch.ones(1), power=2)
    assert float(loss) == pytest.approx(((1 + 4 * eta) ** 2 + (-2 + 8 * eta) ** 2) / 2)
    assert float(metrics["target"]) == pytest.approx(((4 * eta) ** 2 + (8 * eta) ** 2) / 2)
    assert float(metrics["kl"]) == pytest.approx((1 + 4) / 4)
    clipped = clip_norms(torch.tensor([3.0, 4.0, 10.0, 0.0]).view(4, 1, 1, 1), 0.5)
    assert clipped.flatten().tolist() == pytest.approx([3.0, 3.5, 3.5, 0.0])


# --- the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["estimate", "end"])
def test_loss_of_every_family_is_that_of_the_formula(family: str, place: str, tiny: Make) -> None:
    """Written out once more, in velocities for the flow and in noise for the others."""
    trainer = tiny(family, beta=0.01, gradient_at=place, clip_quantile=1.0, eta="linear")
    for parameter in trainer.policy.trainable():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    (batch,) = trainer.rollout().batches
    policy, schedule = trainer.policy, trainer.sampler(3)
    x, t_B = batch.trajectory.x_TBCHW[1], schedule.t[1].expand(4)
    with torch.no_grad():
        out, base = policy.predict(x, t_B, batch.cond), policy.reference(x, t_B, batch.cond)
    alpha, noise = float(schedule.alpha[1]), float(schedule.sigma[1])
    flow = family == "sd3"
    clean = x - noise * out if flow else (x - noise * out) / alpha
    point = (batch.trajectory.x0 if place == "end" else clean).requires_grad_()
    (slope,) = torch.autograd.grad(policy.decode_with_grad(point).mean(dim=(1, 2, 3)).sum(), point)
    sigma = noise / (alpha + noise)
    change = base - out if flow else (base - out) * noise / alpha / sigma
    expected = (change - (1 - sigma) * slope / 0.01).square().mean()
    loss, _ = trainer.losses(batch, torch.ones(4), [1])(1)
    assert loss.item() == pytest.approx(float(expected), rel=1e-3)
    row = trainer.iteration()
    assert math.isfinite(row["loss"]) and row["grad_norm"] > 0


def test_bad_settings_are_refused() -> None:
    rest = {"base": "m", "name": "n", "reward": ["ink"], "prompts": "p"}
    for name, value in {"beta": 0.0, "eta": "cubic", "gradient_at": "x", "clip_quantile": 0.0}.items():
        with pytest.raises(ValueError, match=name):
            VGGFlowConfig(**rest, **{name: value})
