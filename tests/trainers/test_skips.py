"""What is not finite: the update is skipped and counted, it changes nothing, and too many in a row end the run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import RewardError, RewardMix
from trainers.checkpoints.nonfinite import Skips
from trainers.core.advantages import group_advantages
from trainers.core.online import OnlineTrainer

Make = Callable[..., OnlineTrainer]
SPO = {"divert_start_step": 0, "divert_end_step": 2, "num_candidates": 2, "threshold": 0.0}
OPTIONS = {"spo": SPO, "nft": {"num_train_steps": 1}, "rwr": {"num_train_steps": 1}}


def everything(trainer: OnlineTrainer) -> list[Tensor]:
    """What an update moves: weights, moments and steps of Adam, the average."""
    moments = [v for slots in trainer.state.optimizer.state_dict()["state"].values() for v in slots.values()]
    average = [*trainer.state.ema.shadow, torch.tensor(trainer.state.ema.steps)] if trainer.state.ema else []
    return [t.detach().clone() for t in (*trainer.policy.trainable(), *moments, *average)]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(torch.equal, before, after))


def broken_loss(loss: Tensor, weights: list[Tensor]) -> Tensor:
    return loss + math.inf  # its gradient is finite


def broken_gradient(loss: Tensor, weights: list[Tensor]) -> Tensor:
    return loss + (weights[0].sum() * 0).sqrt()  # the loss is finite


@pytest.mark.parametrize("breaks", [broken_loss, broken_gradient])
def test_a_skipped_update_changes_nothing_and_the_next_one_does(breaks: Any, tiny_online: Make) -> None:
    trainer = tiny_online("grpo", num_updates=2, batch_size=2, ema_decay=0.9, ema_every=1)
    trainer.iteration()
    losses, before, loss = [], everything(trainer), trainer.pass_loss

    def breaking(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = loss(*arguments)
        losses.append(value)
        if len(losses) == 1:  # the first of the batches that an update accumulates
            value = breaks(value, trainer.policy.trainable())
            metrics["loss"] = value.detach()
        elif len(losses) == 3:
            assert same(before, everything(trainer)) and trainer.skips.in_a_row == 1
        return value, metrics

    trainer.pass_loss = breaking
    row = trainer.iteration()
    assert len(losses) == 4 and not same(before, everything(trainer))
    assert trainer.state.ema.steps == 3  # of four updates
    assert (trainer.skips.total, trainer.skips.in_a_row) == (1, 0)
    assert all(math.isfinite(value) for value in row.values()) and {"loss", "grad_norm"} <= row.keys()


def accelerator(other: tuple[float, float] = (0.0, 0.0), scale: float | None = None, kind: str = "NO") -> Any:
    """One of two processes, the other of which has these flags."""
    scaler = None if scale is None else SimpleNamespace(get_scale=lambda: scale)
    return SimpleNamespace(
        device="cpu",
        distributed_type=kind,
        scaler=scaler,
        reduce=lambda flags, how: flags + torch.tensor(other) if how == "sum" else None,
    )


def test_processes_skip_together(tmp_path: Path) -> None:
    for other in ((1.0, 0.0), (0.0, 1.0)):
        skips = Skips(accelerator(other), tmp_path, limit=2)
        skips.watch(torch.tensor(1.0))
        assert skips.must_skip(1.0) and skips.total == 1
    skips = Skips(accelerator(), tmp_path, limit=2)
    skips.watch(torch.tensor(math.nan))
    assert skips.must_skip(1.0)
    skips.watch(torch.tensor(1.0))
    assert not skips.must_skip(1.0)  # the broken loss was of another update


def test_a_scaler_may_search_but_not_forever(tmp_path: Path) -> None:
    skips = Skips(accelerator(scale=1024.0), tmp_path, limit=2)
    assert all(skips.must_skip(math.inf) for _ in range(5)) and skips.total == 5
    skips = Skips(accelerator(scale=0.5), tmp_path, limit=2)
    assert skips.must_skip(math.inf)
    with pytest.raises(ValueError, match="the gradient was not finite, 2 updates in a row"):
        skips.must_skip(math.inf)


def test_an_update_that_deepspeed_has_made_is_the_end(tmp_path: Path) -> None:
    skips = Skips(accelerator(kind="DEEPSPEED"), tmp_path, limit=9)
    assert not skips.must_skip(1.0)
    with pytest.raises(ValueError, match=r"the gradient was not finite, 1 updates .*; nothing is saved yet"):
        skips.must_skip(math.nan)


def test_a_run_that_diverges_stops_with_its_last_checkpoint(tiny_online: Make, tmp_path: Path) -> None:
    calls = 0

    def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        nonlocal calls
        calls += 1
        return images.mean(dim=(1, 2, 3)) * (math.nan if calls > 2 else 1.0)

    options = {"max_steps": 9, "save_steps": 1, "max_skipped": 3}
    with pytest.raises(ValueError) as stopped:
        tiny_online("grpo", reward=reward, **options).train()
    last = tmp_path / "run" / "checkpoint-4"
    said = f"not finite, 3 updates in a row (max_skipped = 3); the last whole checkpoint is {last}, which --resume"
    assert str(stopped.value).startswith("the reward of every group was ") and said in str(stopped.value)
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]
    assert [(row["step"], row["skipped"], row["unscored"]) for row in rows] == [
        (1, 0, 0),
        (2, 0, 0),
        (3, 1, 4),
        (4, 2, 4),
    ]
    assert "reward" in rows[1] and "reward" not in rows[2]
    again = tiny_online("grpo", reward=reward, resume=True, **options)
    with pytest.raises(ValueError, match=r"3 updates in a row .*checkpoint-4, "):  # it counts on
        again.train()
    assert again.state.step == 4 and again.skips.total == 3


def infinite(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    scores = images.mean(dim=(1, 2, 3))
    scores[0] = math.inf
    return scores


def raising(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """Fails on the darkest of four images, wherever it is asked about it."""
    means = images.mean(dim=(1, 2, 3))
    if len(means) > 1:
        raising.darkest = float(means.min())
    if bool((means == raising.darkest).any()):
        raise RuntimeError("too dark")
    return means


@pytest.mark.filterwarnings("ignore:reward 'brightness' failed on image")
@pytest.mark.parametrize("reward", [infinite, raising])
@pytest.mark.parametrize("algorithm", ["grpo", "nft", "online_dpo", "rwr", "spo"])
def test_one_image_without_a_score_is_no_end(algorithm: str, reward: Any, tiny_online: Make) -> None:
    trainer = tiny_online(algorithm, reward=reward, **OPTIONS.get(algorithm, {}))
    before = everything(trainer)
    row = trainer.iteration()
    assert row["unscored"] == 1 and all(math.isfinite(value) for value in row.values())
    after = everything(trainer)
    assert all(bool(t.isfinite().all()) for t in after) and not same(before, after)
    assert trainer.skips.total == 0


def test_a_group_with_a_broken_score_teaches_nothing_and_the_others_what_they_would(tiny_online: Make) -> None:
    total_B = torch.tensor([1.0, math.nan, 3.0, 7.0])
    mix = RewardMix({"brightness": lambda *_: total_B.clone(), "shown": lambda *_: total_B / 0}, (1.0, 0.0))
    for algorithm, neutral in (("grpo", 0.0), ("rwr", 1.0)):
        options = {"reward_aggregation": "advantage"} if algorithm == "grpo" else {}
        trainer = tiny_online(algorithm, num_generations=2, **options, **OPTIONS.get(algorithm, {}))
        samples = SimpleNamespace(images_B3HW=torch.zeros(4, 3, 8, 8), prompt_B=torch.tensor([0, 0, 1, 1]), early=None)
        trainer.reward = RewardMix(mix.rewards, mix.weights, lenient=True)
        advantage_B, metrics = trainer.score(samples)
        assert advantage_B[:2].tolist() == [neutral] * 2
        assert metrics["reward"] == 5.0 and metrics["unscored"] == 1
        if algorithm == "grpo":
            expected = group_advantages(torch.tensor([3.0, 7.0]).double(), torch.tensor([1, 1])).float()
            assert torch.equal(advantage_B[2:], expected)
    with pytest.raises(RewardError, match="returned nan for image 1 of 4"):  # evaluation has no use for such rows
        mix(samples.images_B3HW, ["x"] * 4, [{}] * 4)


def test_held_out_means_leave_out_what_is_not_finite(tiny_online: Make) -> None:
    def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        return torch.tensor([1.0, math.nan, 3.0][: len(images)])

    trainer = tiny_online("grpo", reward=reward)
    assert trainer.evaluate() == {"eval/brightness": 2.0}
