"""GRPO without a model: advantages, losses and the moving average worked out by hand, and what a config refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from trainers.checkpoints.checkpoint import Ema
from trainers.core.advantages import group_advantages
from trainers.grpo import GRPOConfig, grpo_loss, guard_log_ratio

REWARD = torch.tensor([1.0, 3.0, 2.0, 6.0], dtype=torch.float64)
GROUP = torch.tensor([7, 7, 9, 9])


def config(**options: Any) -> GRPOConfig:
    needed = {"base": "tiny-sd3", "name": "run", "reward": ["r"], "prompts": "tinyworld:composition/train"}
    return GRPOConfig(**needed | options)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("none", [-1, 1, -2, 2]),
        ("group", [-1 / 1.0001, 1 / 1.0001, -2 / 2.0001, 2 / 2.0001]),  # the groups' std: 1 and 2
        ("batch", [a / (math.sqrt(3.5) + 1e-4) for a in (-1, 1, -2, 2)]),  # of 1, 3, 2, 6 about 3
    ],
)
def test_group_advantages_by_hand(scale: str, expected: list[float]) -> None:
    assert group_advantages(REWARD, GROUP, scale).tolist() == pytest.approx(expected, rel=1e-9)
    order = torch.tensor([2, 0, 3, 1])  # samples come shuffled
    shuffled = group_advantages(REWARD[order], GROUP[order], scale)
    assert shuffled.tolist() == pytest.approx([expected[i] for i in order], rel=1e-9)


def test_advantages_are_clipped() -> None:
    assert group_advantages(REWARD, GROUP, "none", clip=1.5).tolist() == [-1, 1, -1.5, 1.5]


def test_a_group_without_differences_teaches_nothing() -> None:
    reward, group = torch.tensor([5.0, 5.0, 1.0, 3.0]), torch.tensor([0, 0, 1, 1])
    for scale in ("group", "batch", "none"):
        advantage = group_advantages(reward, group, scale)
        assert advantage[:2].tolist() == [0, 0]
        assert advantage[2] < 0 < advantage[3]
        assert not group_advantages(torch.full((4,), 5.0), group, scale).any()
        thirds = torch.tensor([0.1, 0.1, 0.1, 0.9], dtype=torch.float64)  # whose mean is not 0.1, by rounding
        assert (thirds[:3].sum() / 3 != 0.1) and not group_advantages(thirds, torch.tensor([0, 0, 0, 1]), scale).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.05, 2.0, -2.1, -2.1),  # inside the clip range
        (1.3, 2.0, -2.2, 0.0),  # good enough already
        (0.5, 2.0, -1.0, -1.0),  # a good sample that became rare is not held back
        (1.05, -2.0, 2.1, 2.1),
        (1.3, -2.0, 2.6, 2.6),  # nor is a bad one that became frequent
        (0.5, -2.0, 1.8, 0.0),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    """epsilon 0.1; the gradient is in the log-ratio, where that of ratio * advantage is ratio * advantage again."""
    log_ratio = torch.tensor([math.log(ratio)], requires_grad=True)
    value, metrics = grpo_loss(log_ratio, torch.tensor([advantage]), epsilon=0.1)
    value.backward()
    assert float(value.detach()) == pytest.approx(loss, rel=1e-5)
    assert float(log_ratio.grad) == pytest.approx(gradient, rel=1e-5)
    assert float(metrics["clip_fraction"]) == (abs(ratio - 1) > 0.1)
    assert "kl" not in metrics


def test_loss_and_metrics_of_a_batch_by_hand() -> None:
    log_ratio = torch.tensor([1.05, 1.3, 0.5, 0.5]).log().requires_grad_()
    kl = torch.tensor([0.1, 0.2, 0.3, 0.6], requires_grad=True)
    loss, metrics = grpo_loss(log_ratio, torch.tensor([2.0, 2.0, 2.0, -2.0]), 0.1, kl, beta=0.5)
    loss.backward()
    assert float(loss.detach()) == pytest.approx((-2.1 - 2.2 - 1.0 + 1.8) / 4 + 0.5 * 0.3, rel=1e-5)
    assert kl.grad.tolist() == pytest.approx([0.125] * 4)
    expected = {
        "loss": float(loss.detach()),
        "policy_loss": -3.5 / 4,
        "kl": 0.3,
        "approx_kl": 0.5 * (math.log(1.05) ** 2 + math.log(1.3) ** 2 + 2 * math.log(0.5) ** 2) / 4,
        "clip_fraction": 0.75,
        "ratio_max": 1.3,
    }
    assert {k: float(v) for k, v in metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())


def test_guard_log_ratio_is_linear_in_the_shift_of_the_mean() -> None:
    """x is N(0, s^2) under the old policy, N(m, s^2) under the new: log-ratio (2xm - m^2) / 2s^2, guarded xm / s."""
    std, shift = 0.5, 0.3
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    old, new = torch.zeros_like(x), torch.full_like(x, shift)
    log_ratio = ((2 * x * shift - shift**2) / (2 * std**2)).mean(dim=(1, 2, 3))
    guarded = guard_log_ratio(log_ratio, new, old, std)
    torch.testing.assert_close(guarded, x.mean(dim=(1, 2, 3)) * shift / std, rtol=1e-4, atol=1e-5)
    assert not guard_log_ratio(torch.zeros(5), old, old, std).any()


@pytest.mark.parametrize(
    ("processes", "options", "numbers"),
    [
        (2, {"num_prompts": 3, "num_generations": 5, "batch_size": 4}, ("15", "8")),
        (1, {"num_prompts": 4, "num_generations": 4, "batch_size": 4, "num_updates": 3}, ("4", "3")),
    ],
)
def test_indivisible_sizes_are_refused_with_both_numbers(processes: int, options: dict, numbers: tuple) -> None:
    with pytest.raises(ValueError, match="not divisible") as error:
        config(**options).derived(processes)
    assert all(number in str(error.value).replace("=", " ").split() for number in numbers)


def test_derived_counts() -> None:
    sizes = {"num_prompts": 48, "num_generations": 24, "batch_size": 8, "num_updates": 2}
    assert config(**sizes, num_iterations=3, max_steps=10).derived(processes=4) == {
        "processes": 4,
        "images_per_iteration": 1152,
        "batches_per_process": 36,
        "images_per_update": 576,
        "updates_per_iteration": 6,
        "images_in_total": 11520,
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_generations": 1}, "at least 2 images, got num_generations 1"),
        ({"kernel": "ode"}, "kernel must be one of sde, cps, got 'ode'"),
        ({"scale_rewards": "std"}, "scale_rewards must be one of group, batch, none"),
        ({"kl_convention": "true"}, "kl_convention must be one of gaussian, flow_grpo"),
        ({"ratio": "dpo"}, "ratio must be one of ppo, guard"),
        ({"reward_aggregation": "mean"}, "reward_aggregation must be one of sum, advantage"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"num_train_steps": 0}, "num_train_steps must be positive, got 0"),
        ({"level": 0.0}, "level must be positive"),
        ({"beta": -1.0}, "must not be negative"),
        ({"window_size": 6}, "a window of 6 steps from 0 on must end by window_end = 5"),
        ({"window_size": 3, "window_start": 3}, "a window of 3 steps from 3 on must end by window_end = 5"),
        ({"window_size": 3, "window_end": 10}, "window_end = 10, and that by the last step that is trained, 9 of 10"),
        ({"ema_decay": 1.0}, "ema_decay must be at least 0 and less than 1"),
        ({"save_total_limit": 0}, "save_total_limit must be positive"),
        ({"resolution": 0}, "resolution must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_inputs_are_named_or_given() -> None:
    named = config(eval_steps=5)
    with pytest.raises(ValueError, match="eval_steps = 5 needs eval_prompts"):
        named.check_inputs()
    named.check_inputs({"eval_prompts"})
    nothing = GRPOConfig(base="m", name="n")
    with pytest.raises(ValueError, match="nothing to train on without reward and prompts"):
        nothing.check_inputs()
    with pytest.raises(ValueError, match="nothing to train on without prompts"):
        nothing.check_inputs({"reward"})
    nothing.check_inputs({"reward", "prompts"})


def flow_grpo_average(batches: int, weights: list[float]) -> list[float]:
    """The average after each iteration of Flow-GRPO's loop (scripts/train_sd3.py, flow_grpo/ema.py), by its rules.

    An iteration has two optimizer steps, after half of its batches each. After every batch, step or not, the average
    is looked after with the number of steps so far, n: it moves if 8 divides n + 1.
    """
    average, steps, trace = 0.0, 0, []
    for _ in range(len(weights) // 2):
        for batch in range(batches):
            steps += (batch + 1) % (batches // 2) == 0
            if (steps + 1) % 8 == 0:
                keep = min((1 + steps) / (10 + steps), 0.9)
                average = keep * average + (1 - keep) * weights[steps - 1]
        trace.append(average)
    return trace


@pytest.mark.parametrize(("gpus", "batches"), [(32, 4), (8, 16)])
def test_moving_average_is_flow_grpos(gpus: int, batches: int) -> None:
    """With as many repeats as a step has batches on each GPU, of a curve of weights."""
    weights = torch.randn(400, generator=torch.Generator().manual_seed(0)).cumsum(0).tolist()
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema, trace = Ema([parameter], decay=0.9, every=8, repeats=batches // 2), []
    for step, weight in enumerate(weights, start=1):
        parameter.data.fill_(weight)
        ema.update()
        if step % 2 == 0:
            trace.append(float(ema.shadow[0]))
    assert trace == pytest.approx(flow_grpo_average(batches, weights), abs=1e-3)


def test_moving_average_by_hand() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    ema = Ema([parameter], decay=0.9, every=2)
    parameter.data.fill_(1.0)
    ema.update()
    assert float(ema.shadow[0]) == pytest.approx(1 - 2 / 11)  # n = 1: decay (1 + 1) / (10 + 1)
    ema.update()
    assert float(ema.shadow[0]) == pytest.approx(1 - 2 / 11)  # not at n = 2
    ema.shadow[0].fill_(0.75)
    ema.steps = 200
    ema.update()
    assert float(ema.shadow[0]) == pytest.approx(0.9 * 0.75 + 0.1)  # 202 / 211 > 0.9
    average = float(ema.shadow[0])
    ema.swap()
    assert float(parameter) == average and ema.shadow[0] == 1
    ema.swap()
    assert float(parameter) == 1 and float(ema.shadow[0]) == average
