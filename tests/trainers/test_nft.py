"""DiffusionNFT: the loss by hand, the old policy that follows, and that a reward goes up without log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlg.diffusion import process
from trainers.checkpoints.checkpoint import resume, save_checkpoint
from trainers.nft import OLD, NFTConfig, NFTTrainer, nft_loss, optimality

Make = Callable[..., NFTTrainer]


@pytest.fixture
def tiny_nft(tiny_online: Callable[..., NFTTrainer]) -> Make:
    def make(family: str = "sd3", **options: object) -> NFTTrainer:
        return tiny_online("nft", family, **{"num_train_steps": 2} | options)

    return make


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_loss_by_hand() -> None:
    x0 = torch.zeros(2, 1, 1, 2)
    plus = torch.tensor([[1.0, 3.0], [2.0, 2.0]]).view(2, 1, 1, 2)  # mean squares 5 and 4, mean absolutes 2 and 2
    minus = torch.tensor([[4.0, 0.0], [1.0, 1.0]]).view(2, 1, 1, 2)  # 8 and 1, 2 and 1
    loss, metrics = nft_loss(x0, plus, minus, torch.tensor([0.75, 0.0]), beta=0.5, scale=5.0)
    first, second = 0.75 * 5 / 2 + 0.25 * 8 / 2, 1 / 1
    assert float(loss) == pytest.approx(5.0 * (first + second) / 2 / 0.5)
    assert float(metrics["plus_error"]) == pytest.approx((2.5 + 2.0) / 2)


def test_optimality_is_a_half_at_the_mean_and_clipped() -> None:
    r = optimality(torch.tensor([0.0, 5.0, -5.0, 9.0, 1.0]), clip=5.0)
    assert r.tolist() == pytest.approx([0.5, 1.0, 0.0, 1.0, 0.6])


@pytest.mark.parametrize(("r", "direction"), [(1.0, 1), (0.0, -1), (0.5, 0)])
def test_good_samples_attract_and_bad_ones_repel(r: float, direction: int) -> None:
    """At the old policy (whose estimate is 0), towards a sample x0 = 1."""
    change = torch.zeros(1, 1, 1, 1, requires_grad=True)
    loss, _ = nft_loss(torch.ones(1, 1, 1, 1), change, -change, torch.tensor([r]), beta=1.0, scale=1.0)
    (gradient,) = torch.autograd.grad(loss, change)
    assert float(-gradient) == pytest.approx(2.0 * direction)


def test_loss_of_every_family_is_that_of_the_formula(family: str, tiny_nft: Make) -> None:
    """Written out once more, with the family's own x0: the old policy is half of the trained LoRA."""
    trainer = tiny_nft(family, nft_beta=0.3, kl_coef=0.2)
    for parameter, old in zip(trainer.policy.trainable(), trainer.state.copies[OLD], strict=True):
        parameter.data.normal_(std=0.1, generator=seeded(1))
        old.copy_(parameter / 2)
    samples = trainer.rollout()
    x0, cond, r = samples.latents[0], samples.conds[0], torch.tensor([0.9, 0.1, 0.5, 0.7])
    loss, metrics = trainer.loss(x0, cond, r, seeded(3))
    generator = seeded(3)
    rows = process.sample_t(trainer.process, 4, generator)
    alpha, sigma = (table[rows][:, None, None, None] for table in (trainer.process.alpha, trainer.process.sigma))
    x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)
    t = trainer.process.time[rows]
    with torch.no_grad():
        out, ref = trainer.policy.predict(x_t, t, cond), trainer.policy.reference(x_t, t, cond)
        old = trainer.policy.predict_as(OLD, x_t, t, cond)
    assert (out - old).abs().max() > 1e-4 and (ref - old).abs().max() > 1e-4
    total = 0.0
    for sign, weight in ((1, r), (-1, 1 - r)):
        mixed = old + sign * 0.3 * (out - old)
        error = ((x_t - sigma * mixed if family == "sd3" else (x_t - sigma * mixed) / alpha) - x0).flatten(1)
        total += 5.0 / 0.3 * (weight * error.square().mean(1) / error.abs().mean(1)).mean()
    kl = (out - ref).square().mean()
    assert loss.item() == pytest.approx(float(total + 0.2 * kl), rel=1e-3)
    assert float(metrics["kl"]) == pytest.approx(float(kl), rel=1e-3)


def test_two_iterations_move_the_lora_and_nothing_else(family: str, tiny_nft: Make) -> None:
    trainer = tiny_nft(family, old_decay_rate=0.25, old_decay_max=0.9)
    before = {name: p.detach().clone() for name, p in trainer.policy.network.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(trainer.state.copies[OLD], trainer.policy.trainable(), strict=True))
    for step in range(2):
        old = [p.clone() for p in trainer.state.copies[OLD]]
        metrics = trainer.iteration()
        assert math.isfinite(metrics["loss"]) and metrics["grad_norm"] > 0
        for was, now, trained in zip(old, trainer.state.copies[OLD], trainer.policy.trainable(), strict=True):
            torch.testing.assert_close(now, was.lerp(trained.detach(), 1 - 0.25 * step))
    moved = {name for name, p in trainer.policy.network.named_parameters() if not torch.equal(p, before[name])}
    assert all(".lora_" in name for name in moved)
    assert any(".default." in name for name in moved) and any(f".{OLD}." in name for name in moved)
    assert not any(p.requires_grad for p in trainer.state.copies[OLD])


def test_samples_come_from_the_old_policy(tiny_nft: Make) -> None:
    trainer = tiny_nft()
    before = trainer.rollout().images_B3HW
    for parameter in trainer.policy.trainable():
        parameter.data.normal_(std=0.3, generator=seeded())
    assert torch.equal(trainer.rollout().images_B3HW, before)
    for parameter in trainer.state.copies[OLD]:
        parameter.data.normal_(std=0.3, generator=seeded())
    assert (trainer.rollout().images_B3HW - before).abs().max() > 0.01


@pytest.mark.parametrize(("step", "decay"), [(0, 0.0), (75, 0.0), (76, 0.0075), (140, 0.4875), (1000, 0.999)])
def test_decay_of_the_old_policy(step: int, decay: float) -> None:
    """The official code's second kind."""
    rest = {"base": "m", "name": "n", "reward": ["r"], "prompts": "p"}
    config = NFTConfig(**rest, old_decay_start=75, old_decay_rate=0.0075, old_decay_max=0.999)
    assert config.old_decay(step) == pytest.approx(decay)


def test_resuming_restores_the_old_policy(tiny_nft: Make, tmp_path: Path) -> None:
    options = {"old_decay_rate": 0.3, "save_total_limit": None}
    whole = tiny_nft(**options)
    (tmp_path / "run").mkdir()
    for _ in range(3):
        if whole.state.step == 2:
            save_checkpoint(whole.config, whole.accelerator, whole.state)
        whole.iteration()
    again = tiny_nft(**options, resume=True)
    resume(again.config, again.accelerator, again.state)
    assert again.state.step == 2
    again.iteration()
    for name in ("old", "trained"):
        rows = [t.state.copies[OLD] if name == "old" else t.policy.trainable() for t in (whole, again)]
        assert all(torch.equal(a, b) for a, b in zip(*rows, strict=True)), name
    assert not all(torch.equal(a, b) for a, b in zip(again.state.copies[OLD], again.policy.trainable(), strict=True))


def test_a_reward_goes_up(tiny_nft: Make) -> None:
    """Brightness over noise that was not trained on, in standard errors of the mean of 24 images."""
    trainer = tiny_nft(num_generations=8, batch_size=16, lora_rank=4, kl_coef=0.0)
    trainer.eval_prompts = trainer.prompts * 8
    before = trainer.evaluate()["eval/brightness"]
    spread = trainer.iteration()["reward_std"]
    for _ in range(6):
        trainer.iteration()
    assert trainer.evaluate()["eval/brightness"] - before > 6 * spread / math.sqrt(24)


def test_bad_settings_are_refused() -> None:
    rest = {"base": "m", "name": "n", "reward": ["r"], "prompts": "p"}
    for name, value in (("nft_beta", 0.0), ("kl_coef", -1.0), ("old_decay_max", 1.0), ("num_train_steps", 0)):
        with pytest.raises(ValueError, match=name):
            NFTConfig(**rest, **{name: value})
