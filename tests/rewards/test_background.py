"""Scoring while sampling: that it overlaps, changes no number, and neither hides an error nor holds up the exit."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import REWARDS, Reward, RewardError, RewardMix, build
from rewards.background import DaemonExecutor, EarlyScores
from rlg.diffusion.sampling import SampleNoise
from tests.support.paths import ROOT
from trainers.core.online import OnlineTrainer

PATIENCE = 100  # seconds until a test gives up; none waits for so long unless it fails
QUICK: dict[str, dict[str, Any]] = {
    "grpo": {},
    "nft": {"num_train_steps": 1},
    "online_dpo": {},
    "spo": {"divert_start_step": 1, "threshold": 0.0, "num_candidates": 2},
}

Make = Callable[..., OnlineTrainer]


def brightness(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def contrast(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    return images.std(dim=(1, 2, 3))


def waiting(reward: Reward) -> RewardMix:
    return RewardMix({"contrast": contrast, "far": reward}, (0.5, 2.0), frozenset({"far"}))


def make(tiny_online: Make, algorithm: str, mix: RewardMix, **options: Any) -> OnlineTrainer:
    """A trainer of two batches an iteration; SPO's candidates are judged by something that does not wait."""
    trainer = tiny_online(algorithm, batch_size=2, **QUICK[algorithm] | options)
    trainer.reward = mix
    if algorithm == "spo":
        trainer.scorer = SimpleNamespace(score=lambda images, prompts, metadata, t: brightness(images, [], []))
    return trainer


@pytest.mark.parametrize("algorithm", QUICK)
def test_a_batch_is_scored_while_the_next_is_sampled(
    algorithm: str, tiny_online: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reward answers for the first batch when the second is begun: one after the other would wait forever."""
    second_begun, scored_by, inner = threading.Event(), [], SampleNoise.initial
    starts: list[SampleNoise] = []

    def initial(noise: SampleNoise) -> Tensor:
        starts.append(noise)
        if len(starts) == 2:
            second_begun.set()
        return inner(noise)

    def far(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        scored_by.append(threading.current_thread())
        assert second_begun.wait(PATIENCE), "the second batch was not begun"
        return brightness(images, prompts, metadata)

    monkeypatch.setattr(SampleNoise, "initial", initial)
    metrics = make(tiny_online, algorithm, waiting(far)).iteration()
    assert len(scored_by) == 2 and threading.main_thread() not in scored_by
    assert metrics["reward/far"] > 0


@pytest.mark.parametrize("algorithm", QUICK)
def test_numbers_are_the_same_to_the_bit(algorithm: str, tiny_online: Make) -> None:
    found = []
    for mix in (waiting(brightness), replace(waiting(brightness), waits=frozenset())):
        trainer = make(tiny_online, algorithm, mix)
        metrics = {k: v for k, v in trainer.iteration().items() if not k.startswith("seconds")}
        found.append((metrics, [p.detach().clone() for p in trainer.policy.trainable()]))
    (ours, ours_p), (theirs, theirs_p) = found
    assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(ours_p, theirs_p, strict=True))


def test_a_run_that_is_resumed_is_the_same_to_the_bit(tiny_online: Make) -> None:
    found = []
    for name, stops in (("whole", [2]), ("resumed", [1, 2])):
        for number, max_steps in enumerate(stops):
            options = {"name": name, "max_steps": max_steps, "save_steps": 1, "resume": number > 0}
            trainer = make(tiny_online, "grpo", waiting(brightness), **options)
            trainer.train()
        found.append(trainer.policy.trainable())
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_was_not_begun_early_is_scored_by_the_calling_thread_in_one_call() -> None:
    calls: list[tuple[str, int, threading.Thread]] = []

    def spy(name: str) -> Reward:
        def reward(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
            calls.append((name, len(images), threading.current_thread()))
            return brightness(images, prompts, metadata)

        return reward

    images, texts, metadata = torch.rand(4, 3, 8, 8), ["a", "b", "c", "d"], [{}] * 4
    mix = RewardMix({"far": spy("far"), "near": spy("near")}, (1.0, 3.0), frozenset({"far"}), seconds=0.0)
    early = EarlyScores(mix)
    for part in (slice(0, 3), slice(3, 4)):
        early.add(images[part], texts[part], metadata[part])
    scores = early.finish(images, texts, metadata)
    main = threading.main_thread()
    assert sorted((name, size) for name, size, _ in calls) == [("far", 1), ("far", 3), ("near", 4)]
    assert all((thread is main) == (name == "near") for name, _, thread in calls)
    expected = mix(images, texts, metadata)
    assert torch.equal(scores.total_B, expected.total_B) and list(scores.parts) == ["far", "near"]
    assert all(torch.equal(scores.parts[name], expected.parts[name]) for name in mix.names)
    alone = EarlyScores(replace(mix, waits=frozenset()))
    alone.add(images, texts, metadata)
    calls.clear()
    alone.finish(images, texts, metadata)
    assert [(name, size) for name, size, _ in calls] == [("far", 4), ("near", 4)]


def test_a_mix_knows_which_of_its_rewards_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "composition", replace(REWARDS["composition"], waits=True))
    assert build(["composition", "jpeg_compressibility"]).waits == {"composition"}


@pytest.mark.parametrize("broken", ["nan", "raises"])
def test_an_error_in_the_background_is_the_same_line(broken: str, tiny_online: Make) -> None:
    def far(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        if broken == "raises":
            raise RuntimeError("out\nof luck")
        return torch.full((len(prompts),), torch.nan)

    trainer = make(tiny_online, "grpo", waiting(far))
    said = (
        "failed on image 0 of 2 .*: RuntimeError: out of luck$" if broken == "raises" else "returned nan for image 0"
    )
    with pytest.raises(RewardError, match=f"^reward 'far' {said}"):
        trainer.iteration()
    assert trainer.state.step == 0


def test_executor_keeps_the_order_and_lets_its_threads_end() -> None:
    gate = threading.Event()
    with DaemonExecutor(3) as pool:
        late = pool.submit(gate.wait, PATIENCE)
        assert list(pool.map(lambda n: n * n, range(20))) == [n * n for n in range(20)]
        assert all(thread.daemon for thread in pool._threads)
    assert not late.done(), "leaving the block does not wait"
    gate.set()
    assert late.result(PATIENCE)
    for thread in pool._threads:
        thread.join(PATIENCE)
    assert not any(thread.is_alive() for thread in pool._threads)


def test_executor_drops_what_an_error_makes_pointless() -> None:
    done: list[int] = []
    failed = threading.Event()

    def work(n: int) -> None:
        if n == 1:
            raise KeyError(n)
        assert n == 0 or failed.wait(PATIENCE)
        done.append(n)

    with DaemonExecutor(1) as pool, pytest.raises(KeyError):
        list(pool.map(work, range(5)))
    failed.set()
    for thread in pool._threads:
        thread.join(PATIENCE)
    assert 0 in done and not {1, 3, 4} & set(done)  # 2 may have been begun


def test_an_interruption_does_not_wait_for_a_request() -> None:
    """While a reward hangs in the background and the main thread waits for it."""
    code = """
import os, signal, threading, torch
from rewards import RewardMix
from rewards.background import EarlyScores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
asked = threading.Event()
def hangs(images, prompts, metadata):
    asked.set()
    threading.Event().wait()
early = EarlyScores(RewardMix({"far": hangs}, (1.0,), frozenset({"far"})))
images = torch.zeros(1, 3, 8, 8)
early.add(images, [""], [{}])
asked.wait()
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    early.finish(images, [""], [{}])
except KeyboardInterrupt:
    raise SystemExit(130)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE, check=False)
    assert done.returncode == 130
