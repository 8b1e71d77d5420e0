"""The resumable loop: its learning rate by hand, and a training that was stopped is the one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rlg.pretraining.stage import Stage, generator_of, learning_rate


def test_learning_rate_by_hand() -> None:
    """100 steps, peak 1, warm-up 10: up, flat until 60, and down over 40."""
    rates = [learning_rate(step, 100, 1.0, 10) for step in (0, 4, 9, 30, 60, 80, 99)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.025])
    assert [learning_rate(step, 100, 1.0, 10, decay=0.8) for step in (20, 60)] == pytest.approx([1.0, 0.5])


def stage_of(folder: Path, steps: int) -> Stage:
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    return Stage(folder, module, [torch.optim.AdamW(module.parameters(), weight_decay=0.1)], steps)


def go_on(stage: Stage) -> list[float]:
    losses = []
    while stage.step < stage.steps:
        x = torch.randn(5, 4, generator=generator_of(7, stage.step))
        loss = (stage.module(x) - x[:, :3]).square().mean()
        losses.append(loss.item())
        stage.update(loss, [learning_rate(stage.step, 8, 0.1, 2)])
    return losses


def test_a_training_that_was_stopped_is_the_one_that_was_not(tmp_path: Path) -> None:
    whole, first = stage_of(tmp_path / "whole", 8), stage_of(tmp_path / "parts", 3)
    losses = go_on(whole)
    before = go_on(first)
    assert sorted(file.name for file in (tmp_path / "parts").iterdir()) == [
        "optimizer0-3.safetensors",
        "stage.json",
        "weights-3.safetensors",
    ]
    second = stage_of(tmp_path / "parts", 8)
    assert second.step == 3
    assert before + go_on(second) == losses
    for stage in (whole, second):
        stage.finish()
    assert torch.equal(whole.module.weight, second.module.weight)


def test_a_look_leaves_the_weights_as_they_are(tmp_path: Path) -> None:
    stage = stage_of(tmp_path, 8)
    go_on(stage)
    weight = stage.module.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt), stage.averaged():
        assert torch.equal(stage.module.weight, stage.ema.shadow_params[0])
        assert not torch.equal(stage.module.weight, weight)
        raise KeyboardInterrupt
    assert torch.equal(stage.module.weight, weight)
