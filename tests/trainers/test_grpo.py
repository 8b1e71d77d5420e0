"""The GRPO trainer on random models: what must hold for every family, and that a reward goes up."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import RewardError, RewardMix
from rlg.diffusion import process, sampling
from rlg.diffusion.sampling import SampleId, SampleNoise
from trainers.checkpoints.checkpoint_folder import checkpoints
from trainers.grpo import GRPOTrainer, Pass, Rollout

Make = Callable[..., GRPOTrainer]

ADVANTAGE = torch.tensor([1.0, -1.0, 0.5, -0.5])  # of an iteration's 4 images


def loss_of(
    trainer: GRPOTrainer, roll: Rollout, b: int, i: int, advantage_B: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of batch b at denoising step i."""
    return trainer.pass_loss(roll, Pass(b, (i,), 0, len(advantage_B)), advantage_B)


def test_settings_that_do_not_fit_the_model_are_refused_before_anything_is_written(
    tiny_trainer: Make, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="'cps' is for flow-matching models"):
        tiny_trainer("sd", kernel="cps")
    with pytest.raises(ValueError, match="num_train_steps = 3, but 2 steps are stochastic and trained"):
        tiny_trainer("sd3", num_train_steps=3)
    with pytest.raises(ValueError, match=r"num_prompts = 4, but .* holds 3 prompts"):
        tiny_trainer("sd3", num_prompts=4)
    assert not list(tmp_path.iterdir())


def losses(trainer: GRPOTrainer, roll: Rollout) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Loss and metrics of every batch at every trained step."""
    parts = ADVANTAGE.split(trainer.config.batch_size)
    return [loss_of(trainer, roll, b, i, parts[b]) for b in range(len(roll.batches)) for i in roll.train_steps]


def move(trainer: GRPOTrainer, scale: float = 0.02, along: Tensor | None = None) -> None:
    """Add noise, or a vector, to the LoRA."""
    parameters = trainer.policy.trainable()
    if along is None:
        along = scale * torch.randn(sum(p.numel() for p in parameters), generator=torch.Generator().manual_seed(5))
    for parameter, part in zip(parameters, along.split([p.numel() for p in parameters]), strict=True):
        parameter.data += part.view_as(parameter)


def gradient(trainer: GRPOTrainer, loss: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.policy.trainable())])


@pytest.mark.numerics
def test_ratio_is_exactly_one_before_the_first_update_and_not_after(family: str, tiny_trainer: Make) -> None:
    trainer = tiny_trainer(family, cfg=2.0, batch_size=2, beta=1.0)
    roll = trainer.rollout()
    before = [metrics for _, metrics in losses(trainer, roll)]
    assert len(before) == 4  # two batches, two steps: the last step is not trained
    for metrics in before:
        assert metrics["ratio_max"] == 1 and metrics["clip_fraction"] == 0 and metrics["approx_kl"] == 0
        assert metrics["kl"] == 0  # B = 0 in a fresh LoRA: it is the base
    move(trainer)
    for _, metrics in losses(trainer, roll):
        assert metrics["ratio_max"] != 1 and metrics["approx_kl"] > 0 and metrics["kl"] > 0
    again = trainer.rollout()  # off the base, but on policy
    assert all(metrics["ratio_max"] == 1 and metrics["kl"] > 0 for _, metrics in losses(trainer, again))


def test_kl_pulls_towards_the_base(family: str, tiny_trainer: Make) -> None:
    trainer = tiny_trainer(family, beta=0.5)
    move(trainer)
    roll = trainer.rollout()
    i = roll.train_steps[0]
    loss, metrics = loss_of(trainer, roll, 0, i, ADVANTAGE)
    pull = gradient(trainer, loss)
    trainer.config.beta = 0.0
    pull -= gradient(trainer, loss_of(trainer, roll, 0, i, ADVANTAGE)[0])
    assert metrics["kl"] > 0 and pull.norm() > 0
    trainer.config.beta = 0.5
    penalty = 0.5 * float(metrics["kl"])
    move(trainer, along=-0.1 * penalty / pull.square().sum() * pull)  # first order: a tenth less
    assert float(loss_of(trainer, roll, 0, i, ADVANTAGE)[1]["kl"]) == pytest.approx(0.9 * penalty / 0.5, rel=0.03)


def test_conventions_of_the_kl_differ_by_the_length_of_the_step(family: str, tiny_trainer: Make) -> None:
    trainer = tiny_trainer(family, beta=1.0)
    move(trainer)
    roll = trainer.rollout()
    for i in roll.train_steps:
        true = loss_of(trainer, roll, 0, i, ADVANTAGE)[1]["kl"]
        trainer.config.kl_convention = "flow_grpo"
        published = loss_of(trainer, roll, 0, i, ADVANTAGE)[1]["kl"]
        trainer.config.kl_convention = "gaussian"
        dt = float(roll.schedule.sigma[i] - roll.schedule.sigma[i + 1])
        expected = dt if family == "sd3" else 1.0  # DDIM's steps have no length
        assert float(published / true) == pytest.approx(expected, rel=1e-5)


def test_kl_is_that_of_the_kernels_that_were_sampled(tiny_trainer: Make) -> None:
    """Monte Carlo: E_pi[log pi - log pi_ref] over the noise of one step, times latent dimensions."""
    trainer = tiny_trainer("sd3", beta=1.0)
    move(trainer, 0.1)
    roll = trainer.rollout()
    i, x, dimensions = roll.train_steps[0], roll.batches[0].x_TBCHW[roll.train_steps[0]], math.prod(trainer.shape)
    t_B, cond = sampling.times(roll.schedule, i, len(x)), roll.conds[0]
    with torch.no_grad():
        ours, theirs = trainer.tuned_with_cfg(x, t_B, cond), trainer.base_with_cfg(x, t_B, cond)
    generator, samples = torch.Generator().manual_seed(0), []
    for _ in range(200):
        x_next = process.step(roll.schedule, i, x, ours, torch.randn(x.shape, generator=generator))
        samples.append(
            process.log_prob(roll.schedule, i, x, ours, x_next) - process.log_prob(roll.schedule, i, x, theirs, x_next)
        )
    measured = dimensions * torch.stack(samples)
    stated = dimensions * float(loss_of(trainer, roll, 0, i, ADVANTAGE)[1]["kl"])
    assert stated > 0
    assert abs(float(measured.mean()) - stated) < 4 * float(measured.std()) / math.sqrt(measured.numel())


def test_guard_divides_the_policy_loss_by_dt_and_not_the_kl(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", ratio="guard", beta=2.0, epsilon=1e3)
    roll = trainer.rollout()
    move(trainer)
    i = roll.train_steps[0]
    x, dt, std = roll.batches[0].x_TBCHW[i], float(roll.schedule.dt[i]), float(roll.schedule.std[i])
    out = trainer.tuned_with_cfg(x, sampling.times(roll.schedule, i, len(x)), roll.conds[0]).detach()
    shift = process.mean(roll.schedule, i, x, out) - roll.batches[0].mean_TBCHW[i]
    noise = (roll.batches[0].x_TBCHW[i + 1] - roll.batches[0].mean_TBCHW[i]) / std
    ratio = (noise * shift).mean(dim=(1, 2, 3)).exp()  # see guard_log_ratio's test, times std
    loss, metrics = loss_of(trainer, roll, 0, i, ADVANTAGE)
    assert float(metrics["policy_loss"]) == pytest.approx(float(-(ADVANTAGE * ratio).mean()) / dt, rel=1e-3)
    assert float(loss) == pytest.approx(float(metrics["policy_loss"] + 2.0 * metrics["kl"]), rel=1e-5)
    trainer.config.ratio = "ppo"
    assert float(loss_of(trainer, roll, 0, i, ADVANTAGE)[1]["kl"]) == float(metrics["kl"]) > 0


def test_guard_trains_every_family(family: str, tiny_trainer: Make) -> None:
    trainer = tiny_trainer(family, ratio="guard", num_iterations=2)
    metrics = trainer.iteration()
    assert metrics["grad_norm"] > 0 and metrics["ratio_max"] != 1


def test_window_is_stochastic_and_trained_and_nothing_else_is(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", steps=6, window_size=2, window_end=5, batch_size=4)
    seen = set()
    for step in range(12):
        trainer.state.step = step
        schedule, train_steps = trainer._schedule(torch.Generator().manual_seed(step))
        assert train_steps == schedule.stochastic_steps() == [train_steps[0], train_steps[0] + 1]
        seen.add(train_steps[0])
    assert seen == {0, 1, 2, 3}  # windows end before step 5
    trainer.config.window_start = 2
    drawn = [trainer._schedule(torch.Generator().manual_seed(step))[1] for step in range(12)]
    assert {steps[0] for steps in drawn} == {2, 3}
    trained = []
    trainer.pass_loss = spy(trainer.pass_loss, lambda roll, part, advantage: trained.extend(part.steps))
    roll = trainer.rollout()
    trainer.update(roll, ADVANTAGE)
    assert trained == roll.train_steps
    silent = [i for i in range(6) if i not in roll.train_steps]
    assert not roll.batches[0].logp_TB[silent].any() and roll.batches[0].logp_TB[roll.train_steps].all()


def spy(function: Callable, see: Callable) -> Callable:
    def call(*args: Any) -> Any:
        see(*args)
        return function(*args)

    return call


def test_random_steps_are_trained_and_differ_between_iterations(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", steps=8, num_train_steps=3, skip_last_step=True)
    drawn = [trainer._schedule(torch.Generator().manual_seed(seed))[1] for seed in range(30)]
    assert all(len(set(steps)) == 3 and steps == sorted(steps) for steps in drawn)
    assert {i for steps in drawn for i in steps} == set(range(7))  # the last step never
    trainer.config.skip_last_step = False
    drawn = [trainer._schedule(torch.Generator().manual_seed(seed))[1] for seed in range(30)]
    assert {i for steps in drawn for i in steps} == set(range(8))


def test_cps_kernel_trains_all_but_its_deterministic_last_step(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", kernel="cps", level=0.8, skip_last_step=False)
    roll = trainer.rollout()
    assert roll.train_steps == [0, 1]
    assert all(metrics["ratio_max"] == 1 for _, metrics in losses(trainer, roll))
    assert trainer.iteration()["grad_norm"] > 0


@contextmanager
def applied_gradients(trainer: GRPOTrainer) -> Iterator[list[Tensor]]:
    """The gradient of every optimizer step, one vector each."""
    found: list[Tensor] = []

    def keep(*_: Any) -> None:
        found.append(torch.cat([p.grad.flatten().clone() for p in trainer.policy.trainable()]))

    handle = trainer.state.optimizer.optimizer.register_step_pre_hook(keep)
    yield found
    handle.remove()


@pytest.mark.numerics
def test_two_small_batches_are_one_large_batch(family: str, tiny_trainer: Make) -> None:
    gradients = []
    for size in (4, 2):
        trainer = tiny_trainer(family, batch_size=size, beta=1.0, max_grad_norm=1e9)
        move(trainer)
        with applied_gradients(trainer) as found:
            trainer.iteration()
        gradients += found
    assert len(gradients) == 2  # one step each
    assert float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 1e-3


def test_gradients_are_clipped_to_max_grad_norm(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", max_grad_norm=1e-5)
    with applied_gradients(trainer) as found:
        norm = trainer.iteration()["grad_norm"]
    assert norm > 1e-4 and float(found[0].norm()) == pytest.approx(1e-5, rel=1e-2)


def test_every_update_accumulates_its_own_batches(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", batch_size=1, num_updates=2, num_iterations=2, ema_decay=0.5, ema_every=1)
    trainer.accelerator.step = 3  # as an earlier iteration of another length would leave it
    seen: list[tuple[int, float]] = []
    inner = trainer.pass_loss

    def watched(roll: Rollout, part: Pass, advantage: Tensor) -> Any:
        loss, metrics = inner(roll, part, advantage)
        seen.append((part.batch, float(metrics["approx_kl"])))
        return loss, metrics

    trainer.pass_loss = watched
    with applied_gradients(trainer) as found:
        trainer.iteration()
    assert len(found) == trainer.counts["updates_per_iteration"] == trainer.state.ema.steps == 4
    first, second = seen[:8], seen[8:]  # an epoch: 4 batches of 2 steps
    for epoch in (first, second):
        assert sorted({b for b, _ in epoch}) == [0, 1, 2, 3]
    assert all(value == 0 for _, value in first[:4])  # before the first update the ratio is 1
    assert all(value > 0 for _, value in first[4:] + second)  # and never again


def test_each_batch_meets_its_own_advantages(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", batch_size=2)
    roll, seen = trainer.rollout(), {}
    trainer.pass_loss = spy(
        trainer.pass_loss, lambda roll, part, advantage: seen.update({part.batch: advantage.tolist()})
    )
    trainer.update(roll, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert seen == {0: [1, 2], 1: [3, 4]}


def test_rollouts_are_a_function_of_seed_and_iteration(tiny_trainer: Make) -> None:
    one, other = (tiny_trainer("sd3", num_prompts=3, batch_size=size) for size in (6, 2))
    one.state.step = other.state.step = 3
    ours, theirs = one.rollout(), other.rollout()
    assert ours.prompt_B.tolist() == theirs.prompt_B.tolist() and sorted(ours.prompt_B.tolist()) == [0, 0, 1, 1, 2, 2]
    torch.testing.assert_close(
        ours.images_B3HW, theirs.images_B3HW, rtol=0, atol=1e-4
    )  # batches differ, noise doesn't
    other.state.step = 4
    assert (other.rollout().images_B3HW - ours.images_B3HW).abs().max() > 0.01


def test_images_belong_to_their_prompts_and_noise(tiny_trainer: Make) -> None:
    """Every (prompt, k) is drawn once, and an image is what its prompt and its noise give alone."""
    trainer = tiny_trainer("sd3")
    roll = trainer.rollout()
    drawn = []
    for i, prompt in enumerate(roll.prompt_B.tolist()):
        seeds = [SampleId(trainer.config.seed * 1_000_003, prompt, k) for k in range(2)]
        starts = SampleNoise(seeds, trainer.shape).initial()
        (k,) = [k for k in range(2) if torch.equal(starts[k], roll.batches[0].x_TBCHW[0, i])]
        drawn.append((prompt, k))
        cond = trainer.policy.encode([trainer.prompts[prompt].text])
        alone = sampling.sample(trainer.tuned_with_cfg, roll.schedule, cond, SampleNoise([seeds[k]], trainer.shape))
        torch.testing.assert_close(roll.batches[0].x0[i], alone[0], rtol=0, atol=1e-3)
    assert sorted(drawn) == [(p, k) for p in sorted(set(roll.prompt_B.tolist())) for k in range(2)] and len(drawn) == 4


def scored(trainer: GRPOTrainer, aggregation: str) -> Tensor:
    """Advantages of four grey images, of brightness 1, 3, 2, 6 tenths, under two rewards."""
    trainer.config.reward_aggregation = aggregation
    images = torch.tensor([0.1, 0.3, 0.2, 0.6])[:, None, None, None].expand(4, 3, 8, 8)
    rewards = {
        "bright": lambda images, prompts, metadata: images.mean(dim=(1, 2, 3)),
        "dark": lambda images, prompts, metadata: -1000 * images.mean(dim=(1, 2, 3)) ** 2,
    }
    trainer.reward = RewardMix(rewards, (1.0, 0.5))
    roll = Rollout([], [], images, torch.tensor([0, 0, 1, 1]), None, [])
    advantage_B, metrics = trainer.score(roll)
    assert metrics["reward/bright"] == pytest.approx(0.3) and metrics["reward/dark"] == pytest.approx(-125)
    assert metrics["reward"] == pytest.approx(0.3 - 62.5) and metrics["zero_std_ratio"] == 0
    return advantage_B


def test_rewards_mix_as_their_sum_or_as_advantages(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", scale_rewards="group")
    bright, dark = torch.tensor([-1.0, 1, -1, 1]), torch.tensor([1.0, -1, 1, -1])  # pairs: one std below, one above
    torch.testing.assert_close(scored(trainer, "sum"), dark, rtol=0, atol=1e-3)  # the large scale wins
    torch.testing.assert_close(scored(trainer, "advantage"), bright + 0.5 * dark, rtol=0, atol=3e-3)


def test_evaluation_uses_the_average_and_puts_the_parameters_back(tiny_trainer: Make) -> None:
    trainer = tiny_trainer("sd3", ema_decay=0.5, eval_steps=1, eval_prompts="-", batch_size=2)
    trainer.held_out = RewardMix({"dark": lambda images, prompts, metadata: -images.mean(dim=(1, 2, 3))}, (1.0,))
    at_average = trainer.evaluate()
    assert at_average["eval/dark"] == pytest.approx(-at_average["eval/brightness"])
    move(trainer, 0.1)
    moved = [p.detach().clone() for p in trainer.policy.trainable()]
    assert trainer.evaluate() == at_average  # the average did not move
    assert all(torch.equal(a, b) for a, b in zip(trainer.policy.trainable(), moved, strict=True))
    trainer.state.ema = None
    elsewhere = trainer.evaluate()
    assert abs(elsewhere["eval/brightness"] - at_average["eval/brightness"]) > 1e-4
    trainer.config.batch_size = 4  # three prompts: one batch instead of two
    assert trainer.evaluate() == pytest.approx(elsewhere, abs=1e-5)


def test_evaluations_have_denoising_steps_of_their_own(tiny_trainer: Make) -> None:
    """`eval_steps` counts iterations between evaluations, and no denoising steps, of which `tiny_trainer` has 3."""
    for own, expected in (({}, 3), ({"eval_num_steps": 2}, 2), ({"eval_num_steps": 5, "eval_kernel": "ode"}, 5)):
        schedule = tiny_trainer(eval_steps=7, **own).evaluation_schedule()
        assert len(schedule.t) == expected
        assert bool(schedule.stochastic_steps()) == ("eval_kernel" not in own)


@pytest.mark.parametrize("processes", [2, 4])
def test_every_process_evaluates_as_many_batches(processes: int, tiny_trainer: Make) -> None:
    """Three prompts over two processes, and over more than there are prompts: no process may wait for another."""
    trainer = tiny_trainer("sd3", eval_steps=1, eval_prompts="-", batch_size=1)
    whole, columns, made, inner = trainer.evaluate(), [], [], trainer._evaluate_batch
    for rank in range(processes):
        fake = SimpleNamespace(
            process_index=rank,
            num_processes=processes,
            is_main_process=rank == 0,
            device="cpu",
            autocast=nullcontext,
        )
        fake.gather = lambda column: columns.append(column) or column
        trainer.accelerator = fake
        trainer._evaluate_batch = spy(inner, lambda *_, rank=rank: made.append(rank))
        trainer.evaluate()
    assert made == [rank for rank in range(processes) for _ in range(-(-3 // processes))]
    assert float(torch.cat(columns)[:3].mean()) == pytest.approx(whole["eval/brightness"], abs=1e-6)


def test_a_reward_that_fails_is_named_and_leaves_the_last_checkpoint(tiny_trainer: Make, tmp_path: Path) -> None:
    calls = 0

    def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise RuntimeError("out of luck")
        return images.mean(dim=(1, 2, 3))

    trainer = tiny_trainer("sd3", reward=reward, max_steps=4, save_steps=1)
    with pytest.raises(RewardError, match=r"reward 'brightness' .* image [01] of 4 \(prompt '(a red|two|three)"):
        trainer.train()
    folder = tmp_path / "run"
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-1", "checkpoint-2"]
    assert json.loads((folder / "checkpoint-2" / "state.json").read_text())["step"] == 2
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    again = tiny_trainer("sd3", max_steps=3, resume=True)
    again.train()
    assert again.state.step == 3


def test_metrics_are_what_the_issue_asks_for(tiny_trainer: Make, tmp_path: Path) -> None:
    trainer = tiny_trainer("sd3", beta=1.0, max_steps=1, sample_steps=1, eval_steps=1, eval_prompts="-")
    trainer.train()
    before, after = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert before.keys() == {"step", "eval/brightness"} and before["step"] == 0
    named = {"reward", "reward/brightness", "reward_std", "group_std", "zero_std_ratio", "loss", "policy_loss", "kl"}
    named |= {"approx_kl", "clip_fraction", "ratio_max", "grad_norm", "images", "seconds", "seconds_per_image"}
    assert named | {"eval/brightness"} <= after.keys()
    assert after["images"] == 4 and after["step"] == 1
    assert (tmp_path / "run" / "samples" / "step-000001.png").is_file()
    captions = (tmp_path / "run" / "samples" / "step-000001.txt").read_text().splitlines()
    assert len(captions) == 4 and {c.partition(" | ")[0] for c in captions} <= {p.text for p in trainer.prompts}


def test_a_reward_goes_up(tiny_trainer: Make) -> None:
    """Brightness over noise that was not trained on, in standard errors of the mean of 24 images."""
    trainer = tiny_trainer("sd3", num_generations=8, batch_size=16, lora_rank=4, epsilon=1e-2)
    trainer.eval_prompts = trainer.prompts * 8
    before = trainer.evaluate()["eval/brightness"]
    spread = trainer.iteration()["reward_std"]
    for _ in range(6):
        trainer.iteration()
    assert trainer.evaluate()["eval/brightness"] - before > 6 * spread / math.sqrt(24)
