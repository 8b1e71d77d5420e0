"""Diffusion-DPO: the loss by hand and its sign, what is trained on, offline and online, and that it learns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rewards import RewardMix
from rlg.diffusion import process
from tests.conftest import PROMPTS
from tests.support.smooth_rewards import brightness
from trainers.checkpoints.checkpoint import resume, save_checkpoint
from trainers.dpo import (
    DPOConfig,
    DPOTrainer,
    Errors,
    LatentPairs,
    OnlineDPOTrainer,
    best_and_worst,
    dpo_loss,
)

Make = Callable[..., DPOTrainer]


@pytest.fixture
def tiny_dpo(tiny_folder: Callable[[str], Path], pairs_folder: Path, tmp_path: Path) -> Make:
    def make(family: str = "sd3", **options: Any) -> DPOTrainer:
        tiny = {
            "base": str(tiny_folder(family)),
            "name": "run",
            "output_dir": str(tmp_path),
            "data": str(pairs_folder),
            "dtype": "float32",
            "lora_rank": 2,
            "lora_alpha": 4,
            "learning_rate": 3e-3,
            "beta": 20.0,
            "batch_size": 4,
            "steps": 3,
            "cfg": 1.0,
            "ema_decay": 0.0,
            "max_steps": 8,
        }
        mix = RewardMix({"brightness": brightness}, (1.0,))
        return DPOTrainer(DPOConfig(**tiny | options), reward=mix, eval_prompts=PROMPTS)

    return make


@pytest.fixture
def tiny_online_dpo(tiny_online: Callable[..., OnlineDPOTrainer]) -> Callable[..., OnlineDPOTrainer]:
    def make(**options: Any) -> OnlineDPOTrainer:
        return tiny_online("online_dpo", "sd3", **{"beta": 20.0, "caption_dropout": 0.0} | options)

    return make


def errors(**changed: list[float]) -> Errors:
    row = {"winner_B": [0.2, 0.3], "loser_B": [0.5, 0.3], "ref_winner_B": [0.3, 0.3], "ref_loser_B": [0.4, 0.3]}
    return Errors(**{name: torch.tensor(value) for name, value in (row | changed).items()})


def test_loss_by_hand() -> None:
    loss, metrics = dpo_loss(errors(), beta=10.0)
    margin = -0.5 * 10 * ((0.2 - 0.5) - (0.3 - 0.4))  # = 1: the model fits the winner better than the reference does
    assert margin == pytest.approx(1.0)
    assert float(loss) == pytest.approx((-math.log(1 / (1 + math.exp(-1.0))) + math.log(2)) / 2)
    assert float(metrics["accuracy"]) == pytest.approx((1 + 0.5) / 2)  # a margin of 0 counts half
    assert float(metrics["margin"]) == pytest.approx(0.5)
    assert float(metrics["model_mse"]) == pytest.approx((0.7 + 0.6) / 4)
    assert float(metrics["winner_gain"]) == pytest.approx(0.05) and float(metrics["loser_gain"]) == pytest.approx(
        -0.05
    )


@pytest.mark.parametrize(("kind", "expected"), [("hinge", (0 + 1) / 2), ("ipo", (0.5**2 + 0.5**2) / 2)])
def test_other_losses_by_hand(kind: str, expected: float) -> None:
    assert float(dpo_loss(errors(), 10.0, kind)[0]) == pytest.approx(expected)


@pytest.mark.parametrize("beta", [0.1, 100.0, 5000.0])
def test_ipo_aims_at_a_log_ratio_of_half_of_one_over_beta(beta: float) -> None:
    """arXiv 2310.12036, eq. 17: (h - 1 / (2 tau))^2, with h the log-ratio of the policies; DPO's margin is beta h.

    diffusers' script has (logits - 1 / (2 beta_dpo))^2, its logits being 2 h and its beta_dpo beta / 2: the same up to
    a factor.
    """
    generator = torch.Generator().manual_seed(0)
    ref = [0.1 + 0.1 * torch.rand(8, generator=generator, dtype=torch.float64) for _ in range(2)]
    winner, loser = (r.clone().requires_grad_(True) for r in ref)
    loss, metrics = dpo_loss(Errors(winner, loser, *ref), beta, "ipo")
    log_ratio = 0.5 * ((ref[0] - winner) - (ref[1] - loser))
    paper = ((log_ratio - 1 / (2 * beta)) ** 2).mean()
    script = ((2 * log_ratio - 1 / beta) ** 2).mean()
    for other, factor in ((paper, beta**2), (script, beta**2 / 4)):
        torch.testing.assert_close(loss, factor * other)
        (ours,), (theirs,) = (torch.autograd.grad(value, winner, retain_graph=True) for value in (loss, other))
        torch.testing.assert_close(ours, factor * theirs)
    assert float(metrics["margin"]) == 0
    best = Errors(ref[0] - 1 / beta, ref[1], *ref)  # h = 1 / (2 beta): the margin is 1/2 whatever beta is
    assert float(dpo_loss(best, beta, "ipo")[0]) == pytest.approx(0, abs=1e-12)
    assert float(dpo_loss(best, beta, "ipo")[1]["margin"]) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_every_loss_lowers_the_winners_error_and_raises_the_losers(kind: str) -> None:
    winner, loser = (torch.tensor([0.3], requires_grad=True) for _ in range(2))
    loss, _ = dpo_loss(Errors(winner, loser, torch.tensor([0.3]), torch.tensor([0.3])), 10.0, kind)
    up, down = torch.autograd.grad(loss, (winner, loser))
    assert float(up) > 0 > float(down)


def test_loss_of_every_family_is_that_of_the_formula(family: str, tiny_dpo: Make) -> None:
    """One t and one noise for both; the reference is the network with its adapter off."""
    trainer = tiny_dpo(family)
    for parameter in trainer.policy.trainable():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    shape = (2, *trainer.shape)
    winner, loser = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    cond = trainer.policy.encode(["a red circle", "a cross"])
    loss, metrics = trainer.pair_loss(LatentPairs(winner, loser, cond, cond), torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    table = trainer.policy.process()
    rows = process.sample_t(table, 2, generator)
    noise = torch.randn(shape, generator=generator)
    found = []
    for x0 in (winner, loser):
        alpha, sigma = (values[rows][:, None, None, None] for values in (table.alpha, table.sigma))
        x_t, target = alpha * x0 + sigma * noise, (noise - x0 if family == "sd3" else noise)
        with torch.no_grad():
            outs = (
                predict(x_t, table.time[rows], cond) for predict in (trainer.policy.predict, trainer.policy.reference)
            )
        found.append([(out - target).square().mean(dim=(1, 2, 3)) for out in outs])
    margin = -10.0 * ((found[0][0] - found[1][0]) - (found[0][1] - found[1][1]))
    assert margin.abs().min() > 1e-4
    assert loss.item() == pytest.approx(torch.log1p(torch.exp(-margin)).mean().item(), rel=1e-4)
    assert float(metrics["margin"]) == pytest.approx(margin.mean().item(), rel=1e-3)


def test_two_iterations_move_the_lora_and_nothing_else(family: str, tiny_dpo: Make) -> None:
    trainer = tiny_dpo(family, accumulation_steps=2, batch_size=2, true_sizes=True)
    before = {name: p.detach().clone() for name, p in trainer.policy.network.named_parameters()}
    first, second = trainer.iteration(), trainer.iteration()
    assert first["accuracy"] == 0.5 and first["margin"] == 0 and first["loss"] == pytest.approx(math.log(2))
    assert second["accuracy"] != 0.5 and second["grad_norm"] > 0 and second["pairs"] == 8
    moved = {name for name, p in trainer.policy.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(".lora_" in name for name in moved)


def test_preferences_are_learnt(tiny_dpo: Make) -> None:
    trainer = tiny_dpo(caption_dropout=0.0, max_steps=30)
    rows = [trainer.iteration() for _ in range(30)]
    late = {name: sum(row[name] for row in rows[-10:]) / 10 for name in ("accuracy", "winner_gain", "loser_gain")}
    assert late["accuracy"] > 0.9 and late["winner_gain"] > late["loser_gain"]


def test_only_the_noisier_levels_are_drawn(family: str, tiny_dpo: Make) -> None:
    loss = tiny_dpo(family, min_noise=0.6).pair_loss
    whole, drawn = loss.policy.process(), process.sample_t(loss.process, 2000, torch.Generator().manual_seed(0))
    noise_to_signal = whole.sigma / whole.alpha.clamp(min=1e-6)
    assert noise_to_signal[drawn].min() >= noise_to_signal.quantile(0.59)
    assert noise_to_signal[drawn].max() > noise_to_signal.quantile(0.95)
    assert float(loss.process.density.sum()) == pytest.approx(1)
    with pytest.raises(ValueError, match="min_noise must be at least 0 and less than 1, got 1"):
        tiny_dpo(min_noise=1.0)


def test_held_out_pairs_are_measured_the_same_way_each_time(tiny_dpo: Make) -> None:
    evaluation = {"eval_steps": 1, "eval_prompts": "tinyworld:composition/test", "test_split": "train"}
    trainer = tiny_dpo(max_steps=30, ema_decay=0.0, caption_dropout=0.0, test_pairs=7, test_draws=4, **evaluation)
    before = trainer.evaluate()
    assert before["test/accuracy"] == 0.5 and before["test/margin"] == 0
    assert before["test/loss"] == pytest.approx(math.log(2))
    for _ in range(30):
        trainer.iteration()
    after = trainer.evaluate()
    assert after == trainer.evaluate()
    assert after["test/accuracy"] > 0.9 and after["test/margin"] > 0 and after["test/loss"] < before["test/loss"]
    assert round(after["test/accuracy"] * 14) == pytest.approx(after["test/accuracy"] * 14, abs=1e-4)  # of 7 pairs
    with pytest.raises(ValueError, match="give eval_steps"):
        tiny_dpo(test_split="train")


def test_cached_pairs_train_as_fresh_ones(tiny_dpo: Make) -> None:
    rows = []
    for cache in (False, True):
        trainer = tiny_dpo(cache=cache, caption_dropout=0.5)
        rows.append([trainer.iteration() for _ in range(4)])  # more than an epoch of 8 pairs
        assert len(trainer.encode._latents) == (8 if cache else 0)
    for fresh, cached in zip(*rows, strict=True):
        assert fresh["loss"] == pytest.approx(cached["loss"], rel=1e-4)


@pytest.mark.numerics
@pytest.mark.parametrize("streaming", [False, True])
def test_resume_equals_uninterrupted(streaming: bool, tiny_dpo: Make, tmp_path: Path) -> None:
    whole = tiny_dpo(save_total_limit=None, streaming=streaming)
    (tmp_path / "run").mkdir()
    losses = [whole.iteration()["loss"] for _ in range(2)]
    save_checkpoint(whole.config, whole.accelerator, whole.state)
    losses.append(whole.iteration()["loss"])
    assert (tmp_path / "run/checkpoint-2/trainer_state/stream-0.json").is_file() == streaming
    again = tiny_dpo(save_total_limit=None, streaming=streaming, resume=True)
    resume(again.config, again.accelerator, again.state)
    assert again.iteration()["loss"] == losses[2] != losses[1]
    assert all(torch.equal(a, b) for a, b in zip(whole.policy.trainable(), again.policy.trainable(), strict=True))


def test_true_sizes_reach_the_family_that_takes_them(family: str, tiny_dpo: Make) -> None:
    trainer = tiny_dpo(family)
    cond = trainer.policy.encode(["a red circle"])
    told = trainer.policy.with_sizes(cond, torch.tensor([[80, 64]]), torch.tensor([[8, 0]]), 64)
    if family == "sdxl":
        assert told.tensors["time_ids"].tolist() == [[80, 64, 8, 0, 64, 64]]
        assert "time_ids" not in cond.tensors  # the image's own, whatever its size
    else:
        assert told is cond


def test_captions_are_dropped_at_their_rate(tiny_dpo: Make) -> None:
    drop = tiny_dpo(caption_dropout=0.25).pair_loss.drop_captions
    texts = drop(["a"] * 2000, torch.Generator().manual_seed(0))
    assert set(texts) == {"a", ""} and 0.2 < texts.count("") / 2000 < 0.3


def test_best_and_worst_of_each_group() -> None:
    best, worst, differ = best_and_worst(torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.3, 0.3], [2.0, -1.0, 0.0]]))
    assert best.tolist() == [1, 3, 6] and worst.tolist() == [0, 3, 7]
    assert differ.tolist() == [True, False, True]


def test_online_pairs_are_the_best_and_the_worst_of_their_prompt(
    tiny_online_dpo: Callable[..., OnlineDPOTrainer],
) -> None:
    trainer = tiny_online_dpo(num_prompts=2, num_generations=3, batch_size=3)
    samples = trainer.rollout()
    assert samples.prompt_B.tolist() in (
        [0] * 3 + [1] * 3,
        [1] * 3 + [0] * 3,
        *([a] * 3 + [b] * 3 for a in range(3) for b in range(3) if a != b),
    )
    advantage, _ = trainer.score(samples)
    seen: list[LatentPairs] = []
    inner = trainer.pair_loss
    trainer.pair_loss = lambda pairs, generator: seen.append(pairs) or inner(pairs, generator)
    trainer.pair_loss.drop_captions = inner.drop_captions
    trainer.update(samples, advantage)
    shade = samples.images_B3HW.mean(dim=(1, 2, 3)).view(2, 3)
    x0 = torch.cat(samples.latents).view(2, 3, *trainer.shape)
    (pairs,) = seen
    for group in range(2):
        assert torch.equal(pairs.winner_BCHW[group], x0[group, int(shade[group].argmax())])
        assert torch.equal(pairs.loser_BCHW[group], x0[group, int(shade[group].argmin())])


def test_a_reward_goes_up_online(tiny_online_dpo: Callable[..., OnlineDPOTrainer]) -> None:
    trainer = tiny_online_dpo(num_prompts=3, num_generations=8, batch_size=24, lora_rank=4)
    trainer.eval_prompts = trainer.prompts * 8
    before = trainer.evaluate()["eval/brightness"]
    spread = trainer.iteration()["reward_std"]
    for _ in range(11):
        trainer.iteration()
    assert trainer.evaluate()["eval/brightness"] - before > 6 * spread / math.sqrt(24)


def test_ties_are_counted_and_not_trained_on(tiny_dpo: Make, capsys: pytest.CaptureFixture) -> None:
    trainer = tiny_dpo()
    counts = trainer.batches.data.counts
    assert (counts.rows, counts.kept, counts.ties) == (9, 8, 1)
    assert str(counts) in capsys.readouterr().out


def test_training_writes_what_every_run_has(tiny_dpo: Make, tmp_path: Path) -> None:
    tiny_dpo(max_steps=2, eval_steps=2, eval_prompts="-").train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and "eval/brightness" in rows[2]
    assert {"accuracy", "margin", "model_mse", "ref_mse", "pairs", "seconds_per_pair"} <= rows[1].keys()
    assert (tmp_path / "run" / "checkpoint-2" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"beta": 0.0}, "beta must be positive"),
        ({"loss_type": "kto"}, "loss_type must be one of sigmoid, hinge, ipo"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"cache": True, "random_crop": True}, "leave out random_crop and streaming"),
        ({"data": "/none.parquet"}, "none.parquet"),
    ],
)
def test_bad_settings_are_refused(option: dict, message: str, tiny_dpo: Make) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_dpo(**option)
