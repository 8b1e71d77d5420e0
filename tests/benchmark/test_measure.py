"""Measurement: who runs when, intervals of medians, and the peak of memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlg import stats
from rlg.benchmark import timing


def test_contenders_take_turns_in_another_order_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    contenders = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = timing.interleaved(contenders, repeats=6, warmup=1)
    rounds = ["".join(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(rounds) == 7 and all(sorted(each) == list("abc") for each in rounds)
    for place in range(3):  # over the six rounds that count, each is twice at each place
        assert sorted(each[place] for each in rounds[1:]) == list("aabbcc")
    assert {len(t.wall_R) for t in times.values()} == {6} and list(times) == list("abc")
    assert set(times["a"].wall_R) == {1.0} and all(s >= 0 for s in times["a"].cpu_R)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        timing.interleaved(contenders, repeats=0)


def test_the_interval_of_a_median_covers_it() -> None:
    rng = np.random.default_rng(1)
    inside = [(e := stats.median(rng.exponential(size=15))).low <= np.log(2) <= e.high for _ in range(200)]
    assert 0.88 <= np.mean(inside) <= 0.99
    one = stats.median([3.0])
    assert (one.mean, one.low, one.high) == (3, 3, 3)
    assert stats.median([9.0, 1.0, 2.0, 4.0]).mean == 3


def test_ratios_are_taken_within_rounds() -> None:
    slow_machine = np.array([1.0, 10.0, 2.0, 5.0, 1.5])  # the same contenders, on a machine that comes and goes
    result = timing.ratio(1.5 * slow_machine, slow_machine)
    assert (result.mean, result.low, result.high) == pytest.approx((1.5, 1.5, 1.5))
    with pytest.raises(ValueError, match="same rounds"):
        timing.ratio([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="at least one"):
        stats.median([])


@pytest.mark.skipif(not timing._CLEAR.exists(), reason="the peak of a process is read from Linux's /proc")
def test_peak_memory_is_of_this_call() -> None:
    def take(mib: int) -> None:
        torch.ones(mib * 2**18).sum()

    large, small = timing.peak_memory(lambda: take(400)), timing.peak_memory(lambda: take(40))
    assert 300 * 2**20 < large - small < 420 * 2**20  # and the first peak is forgotten
    assert small > 2**26


def test_machine_says_where() -> None:
    assert timing.machine().keys() >= {"device", "threads", "torch", "load"}
