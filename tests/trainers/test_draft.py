"""DRaFT, ReFL and AlignProp: parts of a trajectory, gradients on Gaussian chains, and the loss by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.sampling import rollout, trajectory
from tests.support.gaussian_chains import FLOW, NOTHING, SD15, Affine, Moments, chain
from tests.support.smooth_rewards import brightness
from trainers.checkpoints.checkpoint import resume, save_checkpoint
from trainers.core.reward_gradient import Batch
from trainers.draft import DRaFTConfig, DRaFTTrainer, output_distance, parts, reward_loss

Make = Callable[..., DRaFTTrainer]
REST = {"base": "m", "name": "n", "reward": ["ink"], "prompts": "p"}
METHODS = {
    "draft_k": {"num_grad_steps": 2},
    "draft_lv": {"noise_copies": 2},
    "refl": {"refl_from": 0.5},
    "alignprop": {"start_mean": 0.5, "start_std": 0.3},
}


@pytest.fixture
def tiny(tiny_online: Callable[..., DRaFTTrainer]) -> Make:
    return partial(tiny_online, "draft")


def gradients(net: Affine, slope: float, **options: object) -> Tensor:
    """d E[slope x] / d (intercept of each step): as the trainer has it, with `Affine` for its network."""
    schedule, config = net.schedule, DRaFTConfig(**REST, steps=len(net.schedule), **options)
    noise = Moments(400, 2 * len(schedule) + 2)
    path = rollout(net.tuned, schedule, NOTHING, noise)
    batch = Batch(path, NOTHING, torch.zeros(400, dtype=torch.long), noise, None)
    net.change_T2.requires_grad_()
    found = []
    for part in parts(batch, schedule, config, torch.Generator().manual_seed(0)):
        steps = list(trajectory(net.tuned, schedule, NOTHING, noise, start=part.start, stop=part.stop, x=part.x_BCHW))
        end = steps[-1].x0_BCHW if part.estimates else steps[-1].x_next_BCHW
        loss = reward_loss(end, slope * end.flatten().detach(), torch.full_like(end, slope), torch.ones(400))
        found.append(-torch.autograd.grad(loss, net.change_T2)[0][:, 1])
    return torch.stack(found).mean(dim=0)


@pytest.mark.parametrize("config", [FLOW, SD15], ids=["flow", "ddim"])
def test_gradients_on_a_gaussian_chain(config: dict) -> None:
    """An offset of the output at step i moves the end by C_i times the decay of the steps behind it."""
    net = Affine.of(process.make_schedule(config, 10), spread=0.7)
    decay, scale = net.decay_T.tolist(), net.schedule.a_out.tolist()
    moves = [scale[i] * math.prod(decay[i + 1 :]) for i in range(10)]
    whole = gradients(net, 0.5, num_grad_steps=10)
    assert whole.tolist() == pytest.approx([0.5 * move for move in moves], rel=1e-4, abs=1e-7)
    three = gradients(net, 0.5, num_grad_steps=3)
    assert three.tolist() == pytest.approx([0.0] * 7 + [0.5 * move for move in moves[7:]], rel=1e-4)
    one = gradients(net, 0.5, method="draft_lv", noise_copies=3)
    assert one.tolist() == pytest.approx([0.0] * 9 + [0.5 * moves[9]], rel=1e-4)
    (step,) = gradients(net, 0.5, method="refl").nonzero().flatten().tolist()
    assert step >= 7
    assert gradients(net, 0.5, method="refl")[step] == pytest.approx(0.5 * float(net.schedule.x0_out[step]), rel=1e-4)
    late = gradients(net, 0.5, method="alignprop", start_mean=0.8, start_std=0.01)
    assert late.tolist() == pytest.approx([0.0] * 8 + [0.5 * move for move in moves[8:]], rel=1e-4)


def test_known_gradients_of_a_flow() -> None:
    """For N(0, 1) data and one offset at all times: the integral of 1 / s_t; DRaFT-1 has the last step, ReFL sigma."""
    net = Affine.of(process.make_schedule(FLOW, 1000))
    assert -float(gradients(net, 1.0, num_grad_steps=1000).sum()) == pytest.approx(1.2465, abs=1e-3)
    assert -float(gradients(net, 1.0).sum()) == pytest.approx(float(net.schedule.sigma[-2]), rel=1e-4)
    found = gradients(net, 1.0, method="refl")
    (step,) = found.nonzero().flatten().tolist()
    assert -float(found[step]) == pytest.approx(float(net.schedule.sigma[step]), rel=1e-4)


def test_with_a_kl_term_a_linear_reward_has_an_optimum() -> None:
    """The offset a C / (2 kl_coef) of the last step, of DRaFT-1."""
    net = Affine.of(process.make_schedule(FLOW, 8))
    states, slope = net.sample().x_TBCHW, 0.6
    t_B = net.schedule.t[7].expand(400)

    def loss() -> Tensor:
        out = net.tuned(states[7], t_B, NOTHING)
        end = process.mean(net.schedule, 7, states[7], out)
        reward = reward_loss(end, slope * end.flatten().detach(), torch.full_like(end, slope), torch.ones(400))
        return reward + 0.25 * output_distance([out], [net.base(states[7], t_B, NOTHING)]).mean()

    for _ in range(400):
        net.change_T2.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(), net.change_T2)
        net.change_T2 = net.change_T2.detach() - 0.5 * gradient
    expected = slope * float(net.schedule.a_out[7]) / (2 * 0.25)
    assert net.change_T2[7].tolist() == pytest.approx([0.0, expected], abs=1e-3)
    assert net.change_T2[:7].abs().max() == 0


def test_loss_by_hand() -> None:
    end = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).view(3, 1, 1, 2).requires_grad_()
    slope = torch.tensor([[0.5, 0.0], [1.0, 2.0], [7.0, 7.0]]).view(3, 1, 1, 2)
    loss = reward_loss(end, torch.tensor([1.0, 3.0, math.nan]), slope, torch.tensor([1.0, 1.0, 0.0]))
    assert loss.item() == pytest.approx(-(1.0 + 3.0) / 3)
    (gradient,) = torch.autograd.grad(loss, end)
    assert gradient.flatten().tolist() == pytest.approx([-0.5 / 3, 0, -1 / 3, -2 / 3, 0, 0])
    loss = reward_loss(end, torch.tensor([1.0, 3.0, 0.0]), slope, torch.ones(3), margin=2.0)
    assert loss.item() == pytest.approx((1.0 + 0.0 + 2.0) / 3)
    (gradient,) = torch.autograd.grad(loss, end)
    assert gradient.flatten().tolist() == pytest.approx([-0.5 / 3, 0, 0, 0, -7 / 3, -7 / 3])
    outs, bases = ([torch.full((2, 1, 1, 2), value) for value in values] for values in ([1.0, 3.0], [0.0, 1.0]))
    assert output_distance(outs, bases).tolist() == [2.5, 2.5]


def test_a_stochastic_sampler_draws_its_last_steps_again() -> None:
    net = Affine.of(chain(FLOW, 6), spread=0.7)
    decay, scale = net.decay_T.tolist(), net.schedule.a_out.tolist()
    found = gradients(net, 1.0, num_grad_steps=2, kernel="sde")
    assert found.tolist() == pytest.approx([0.0] * 4 + [scale[4] * decay[5], scale[5]], rel=1e-4)


# --- the trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_every_family(method: str, family: str, tiny: Make) -> None:
    trainer = tiny(family, method=method, kl_coef=0.1, steps=4, **METHODS[method])
    before = {name: p.detach().clone() for name, p in trainer.policy.network.named_parameters()}
    rows = [trainer.iteration() for _ in range(2)]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-9) and rows[1]["kl"] > 0
    moved = {name for name, p in trainer.policy.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".lora_" in name for name in moved)


def test_the_gradient_is_that_of_the_whole_chain(tiny: Make) -> None:
    """K = T under guidance: decoder, reward and all steps by one backward pass, and by finite differences."""
    trainer = tiny(cfg=2.0, num_grad_steps=3)
    for parameter in trainer.policy.trainable():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    policy, schedule = trainer.policy, trainer.sampler(3)
    (batch,) = trainer.rollout().batches
    (part,) = parts(batch, schedule, trainer.config, torch.Generator())

    def reward() -> Tensor:
        x, negative = part.x_BCHW, policy.encode([""]).expand(4)
        for i in range(3):
            t_B = schedule.t[i].expand(4)
            without, with_text = policy.predict(x, t_B, negative), policy.predict(x, t_B, batch.cond)
            x = process.mean(schedule, i, x, without + 2.0 * (with_text - without))
        return policy.decode_with_grad(x).mean()

    loss, metrics = trainer.loss(batch, schedule, part, torch.ones(4))
    found = torch.autograd.grad(loss, policy.trainable())
    expected = torch.autograd.grad(-reward(), policy.trainable())
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))
    assert float(metrics["loss"]) == pytest.approx(-reward().item(), abs=1e-4)
    parameter, slope = policy.trainable()[1], expected[1]
    values, step = parameter.data.clone(), 1e-2 * slope / slope.norm()
    rewards = []
    for sign in (1, -1):
        parameter.data = values + sign * step
        rewards.append(reward().item())
    assert (rewards[1] - rewards[0]) / 2e-2 == pytest.approx(float(slope.norm()), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_resuming_goes_on_to_the_bit(method: str, tiny: Make, tmp_path: Path) -> None:
    options = METHODS[method] | {"method": method, "kernel": "sde", "steps": 4, "save_total_limit": None}
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


def test_a_reward_goes_up(tiny: Make) -> None:
    """Over noise that was not trained on, in standard errors of the mean of 12 images."""
    trainer = tiny(num_generations=4, batch_size=8, lora_rank=4)
    trainer.eval_prompts = trainer.prompts * 4
    before = trainer.evaluate()["eval/brightness"]
    spread = trainer.iteration()["reward_std"]
    for _ in range(5):
        trainer.iteration()
    assert trainer.evaluate()["eval/brightness"] - before > 6 * spread / math.sqrt(12)


def test_bad_settings_are_refused(tiny: Make) -> None:
    wrong = {"kl_coef": -1.0, "method": "x", "num_grad_steps": 11, "refl_from": 1.0, "noise_copies": 3}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=name):
            DRaFTConfig(**REST, **{name: value} | ({"method": "refl"} if name == "refl_from" else {}))
    with pytest.raises(ValueError, match="num_grad_steps has no effect with method refl"):
        DRaFTConfig(**REST, method="refl", num_grad_steps=2)
    assert set(DRaFTConfig(**REST, method="refl").idle_options()) == {
        *("num_grad_steps", "noise_copies", "start_mean", "start_std"),
    }
    with pytest.raises(ValueError, match="reward 'brightness' has no gradient"):
        tiny(reward=brightness)
