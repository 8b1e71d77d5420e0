"""Classifier-free guidance is applied exactly once in every trainer that samples, against a network made by hand.

The trainer at CFG 3 is held against one at CFG 1 whose network is the guided one: u + 3 (c - u), two passes that share
nothing with `guidance.with_cfg`. What is guided twice is at CFG 9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlg.diffusion.conditioning import Conditioning
from rlg.models.policy import Policy
from trainers.core.online import OnlineTrainer

Make = Callable[..., OnlineTrainer]
SCALE = 3.0
SPO = {"divert_start_step": 0, "num_candidates": 2, "threshold": 0.0, "pairs_per_update": 4, "level": 0.7}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"beta": 1.0}),
    "nft": ("nft", {}),
    "rwr": ("rwr", {}),
    "rwr on policy": ("rwr", {"on_policy": True}),
    "online dpo": ("online_dpo", {}),
    "spo": ("spo", SPO),
}


def guided_by_hand(bare: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A method of `Policy` under CFG; its last arguments are x, t and the conditioning."""

    def call(policy: Policy, *args: Any) -> Tensor:
        *first, cond = args
        empty: Conditioning = policy.encode([""]).expand(len(cond))
        without, with_text = bare(policy, *first, empty), bare(policy, *first, cond)
        return without + SCALE * (with_text - without)

    return call


def made(make: Make, case: str, family: str, **options: Any) -> OnlineTrainer:
    """A trainer whose LoRA is not zero, the old policy's of NFT included."""
    algorithm, own = CASES[case]
    trainer = make(algorithm, family, eval_prompts="tinyworld:composition/test", **own | options)
    generator = torch.Generator().manual_seed(5)
    copies = [parameter for rows in trainer.state.copies.values() for parameter in rows]
    for parameter in [*trainer.policy.trainable(), *copies]:
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return trainer


@pytest.mark.parametrize("family", ["sd", "sd3"])
@pytest.mark.parametrize("case", CASES)
def test_guidance_is_applied_once(case: str, family: str, tiny_online: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = made(tiny_online, case, family, cfg=SCALE)
    samples, evaluation = ours.rollout(), ours.evaluate()
    for name in ("predict", "reference", "predict_as"):
        monkeypatch.setattr(Policy, name, guided_by_hand(getattr(Policy, name)))
    by_hand = made(tiny_online, case, family, cfg=1.0)
    expected = by_hand.rollout()
    torch.testing.assert_close(samples.images_B3HW, expected.images_B3HW, rtol=0, atol=2e-3)
    assert evaluation == pytest.approx(by_hand.evaluate(), abs=1e-3)
    if case in ("grpo", "spo"):  # they also train under guidance
        rows = [
            trainer.update(roll, torch.tensor([1.0, -1.0, 0.5, -0.5]))
            for trainer, roll in ((ours, samples), (by_hand, expected))
        ]
        assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=2e-2)
        assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-2, abs=1e-4)
    monkeypatch.undo()
    plain = made(tiny_online, case, family, cfg=1.0).rollout()
    assert (plain.images_B3HW - samples.images_B3HW).abs().max() > 0.02  # else the test would see nothing


def test_the_unconditional_branch_can_be_detached(tiny_online: Make) -> None:
    """The same loss; its gradient is the one of a loss whose unconditional output is a constant."""
    found = {}
    for detached in (False, True):
        trainer = made(tiny_online, "grpo", "sd3", cfg=SCALE, detach_unconditional=detached, beta=0.0)
        roll = trainer.rollout()
        part = trainer_pass(roll)
        loss, _ = trainer.pass_loss(roll, part, torch.tensor([1.0, -1.0, 0.5, -0.5]))
        found[detached] = (float(loss), gradient(loss, trainer))
    trainer = made(tiny_online, "grpo", "sd3", cfg=SCALE, beta=0.0)

    def by_hand(x: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        with torch.no_grad():
            without = trainer.policy.predict(x, t_B, trainer.negative.expand(len(cond)))
        return without + SCALE * (trainer.policy.predict(x, t_B, cond) - without)

    trainer.trained_with_cfg = by_hand
    roll = trainer.rollout()
    loss, _ = trainer.pass_loss(roll, trainer_pass(roll), torch.tensor([1.0, -1.0, 0.5, -0.5]))
    expected = gradient(loss, trainer)
    assert found[True][0] == pytest.approx(found[False][0], abs=1e-6)
    assert (found[True][1] - expected).norm() < 1e-2 * expected.norm()
    assert (found[False][1] - expected).norm() > 0.1 * expected.norm()


def trainer_pass(roll: Any) -> Any:
    """All samples at the first trained step."""
    from trainers.grpo import Pass

    return Pass(0, (roll.train_steps[0],), 0, len(roll.prompt_B))


def gradient(loss: Tensor, trainer: OnlineTrainer) -> Tensor:
    """With respect to the LoRA."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, trainer.policy.trainable())])


def test_detaching_needs_guidance(tiny_online: Make) -> None:
    with pytest.raises(ValueError, match="detach_unconditional does nothing at cfg 1"):
        tiny_online("grpo", detach_unconditional=True)
