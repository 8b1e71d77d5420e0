"""The cost of guidance: what is kept and how near, the choice under a budget, and the command, at a tiny size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards import RewardMix
from rlg.benchmark import __main__, guidance, guidance_cost, guidance_figure
from rlg.benchmark.guidance_cost import Bench, CostSettings, Result, candidates, distance, pick, share
from rlg.benchmark.guidance_figure import front, picks_of
from rlg.benchmark.options import GUIDANCE
from rlg.diffusion.sampling import SampleId
from rlg.models.policy import Policy
from rlg.prompts import Prompt
from rlg.stats import Estimate
from tests.support.smooth_rewards import brightness

PROMPTS = [Prompt(text) for text in ("a red circle", "two blue crosses", "three green squares")]


def test_share_is_of_means_and_pairs_prompts() -> None:
    rng = np.random.default_rng(0)
    prompt = [i // 4 for i in range(200)]
    whole = 1 + np.repeat(rng.normal(size=50), 4)  # prompts differ, and so does what they gain
    kept = share(0.9 * whole, whole, prompt)
    assert (kept.mean, kept.low, kept.high) == pytest.approx((0.9, 0.9, 0.9))
    other = share(0.9 * whole + rng.normal(size=200), whole, prompt)
    assert other.low < other.mean < other.high
    assert other.mean == pytest.approx((0.9 * whole + 0).mean() / whole.mean(), abs=0.3)
    assert share(whole, whole - whole.mean(), prompt) is None  # a share of what may be nothing


def test_distance_is_of_that_of_the_tuned_model() -> None:
    full, generator = torch.zeros(6, 4, 2, 2), torch.Generator().manual_seed(0)
    tuned = torch.randn(full.shape, generator=generator)
    half = distance(tuned / 2, full, tuned, [0, 0, 1, 1, 2, 2])
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5))
    assert distance(full, full, tuned, [0, 0, 1, 1, 2, 2]).mean == 0
    one_off = torch.where(torch.arange(6).reshape(-1, 1, 1, 1) < 2, tuned, full)  # prompt 0 as the tuned model
    assert distance(one_off, full, tuned, [0, 0, 1, 1, 2, 2]).high > 0.8


def result(mode: str, cost: float, kept: float | None, far: float) -> Result:
    def of(value: float) -> Estimate:
        return Estimate(value, value, value)

    own = {} if kept is None else {"kept": of(kept)}
    return Result(mode, False, 1, 1, of(cost), of(2 * cost), None, of(far), **own)


def test_a_budget_picks_what_keeps_most_and_what_is_nearest() -> None:
    results = [result("base", 0.9, 0.0, 2), result("full", 1.0, 1.0, 0), result("reuse:2", 1.5, 1.0, 0.1)]
    results += [result("reuse:5", 1.2, 0.9, 0.2), result("scaled", 1.0, 1.3, 0.9), result("reuse:8", 1.1, 1.1, 0.3)]

    def picked(rows: list[Result], budget: float, clock: str = "cost") -> tuple[str, str]:
        most, nearest = pick(rows, budget, clock)
        return most.mode, nearest.mode

    assert picked(results, 1.25) == ("reuse:8", "reuse:5")  # more than all of the gain is no merit
    assert picked(results[::-1], 1.25) == ("reuse:8", "reuse:5")
    assert picked(results, 1.05) == ("scaled", "scaled")
    assert picked(results, 1.6) == ("reuse:2", "reuse:2")
    assert picked(results, 2.5, "cpu_cost") == ("reuse:8", "reuse:5")
    without = [result(r.mode, r.cost.mean, None, r.distance.mean) for r in results]
    assert picked(without, 1.25) == ("reuse:5", "reuse:5")
    with pytest.raises(ValueError, match=r"at most 0\.5 times"):
        pick(results, 0.5, "cost")


def test_the_table_marks_both_picks_and_older_results_have_one() -> None:
    both = {"mode": "scaled", "nearest": "reuse:5"}
    picks = picks_of({"choice": both, "reward": "composition"})
    assert list(picks.values()) == ["scaled", "reuse:5"] and picks_of({"choice": None, "reward": None}) == {}
    assert picks_of({"choice": {"mode": "scaled"}, "reward": "composition"}) == {"keeps most": "scaled"}
    assert picks_of({"choice": {"mode": "scaled"}, "reward": None}) == {"nearest": "scaled"}
    names = ("scaled", "reuse:5", "reuse:8")
    first = [guidance_figure._row(result(name, 1, None, 0.1).as_json(), picks, False)[0] for name in names]
    assert first == ["`scaled` (keeps most)", "`reuse:5` (nearest)", "`reuse:8`"]


def test_candidates_fit(tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy("sd3")
    ode, sde = (policy.schedule(10, sampler, 0.7) for sampler in ("ode", "sde"))
    names = candidates(ode, 1.0, 2.0, full=False, budget=1.25)
    assert {"reuse:5", "reuse_at:0,2", "scaled", "scaled_but:0"} <= set(names)
    assert not {"reuse:2", "random", "conditional", "interval:0.7:1"} & set(names)
    assert "reuse:2" in candidates(ode, 1.0, 2.0, full=False, budget=1.5)
    assert not [name for name in candidates(ode, 1.0, 2.0, full=True, budget=2) if name.startswith("scaled")]
    assert "conditional" in candidates(ode, 4.5, 2.0, full=False, budget=1.5)
    assert "random" in candidates(sde, 1.0, 0.5, full=False, budget=1.25)
    short = candidates(policy.schedule(2, "ode", 0.7), 1.0, 2.0, full=False, budget=2)
    assert "reuse_at:0,1" in short and "reuse_at:2" not in short


@pytest.mark.parametrize(
    ("up", "expected"), [(True, [(1, 0.5), (1.1, 0.9), (2, 1.0)]), (False, [(1, 0.5), (1.2, 0.2)])]
)
def test_the_front(up: bool, expected: list) -> None:
    points = [(2, 1.0), (1, 0.5), (1.1, 0.9), (1.2, 0.2), (1.1, 0.7), (2, 0.8)]
    assert front(points, up) == expected


def test_modes_share_their_noise_and_take_turns(
    tiny_policy: Callable[..., Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = CostSettings(2.0, 3, "sde", 0.7, 1.0, batch_size=2)
    bench = Bench(tiny_policy("sd3"), PROMPTS, settings, RewardMix({"brightness": brightness}, (1.0,)))
    ids = [SampleId(0, prompt, k) for prompt in range(3) for k in range(1)]
    order: list[str] = []
    plain = bench.denoise
    monkeypatch.setattr(bench, "denoise", lambda name, batch: (order.append(name), plain(name, batch))[1])
    names = ["base", "tuned", "full", "full+batch"]
    samples = bench.run(names, ids)
    assert sorted(order[:4]) == sorted(order[4:]) == sorted(names) and order[:4] != order[4:]
    results = {r.mode: r for r in guidance_cost.compare(samples, ids, {"full": 5})}
    assert [results[n].nfe for n in names] == [3, 3, 6, 6]
    assert [results[n].exact for n in names] == [False, False, True, True]
    assert results["full+batch"].distance.mean < 1e-3 and results["tuned"].distance.mean == 1
    assert results["full"].peak_bytes == 5 and results["tuned"].cost.mean == 1
    assert results["full"].reward == pytest.approx(
        brightness(bench.policy.decode(plain("full", ids)[0]), [], []).mean()
    )
    assert results["full+batch"].to_full.mean == pytest.approx(0, abs=1e-4)


def arguments(tiny_folder: Callable[[str], Path], folder: Path, *more: str) -> list[str]:
    sizes = {"num_prompts": 4, "k": 1, "batch_size": 2, "steps": 2, "batch_sizes": 1, "repeats": 1}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    return ["guidance", "--base", str(tiny_folder("sd3")), *options, "--output", str(folder), *more]


def test_the_command_writes_what_it_measured(
    tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = arguments(tiny_folder, tmp_path / "o", "--mode", "reuse:2", "--budget", "1.5", "--calibration_prompts", "2")
    __main__.main(argv)
    report = json.loads((tmp_path / "o" / "results.json").read_text())
    modes = [row["mode"] for row in report["results"]]
    assert {"base", "tuned", "full", "reuse:2", report["choice"]["mode"]} == set(modes)
    assert report["choice"]["nearest"] == report["choice"]["mode"]  # without a reward
    assert report["n"] == report["prompts"] == 2 and report["choice"]["n"] == 2  # other prompts than it was chosen on
    parts = {"batch", "seconds", "cost", "cpu_cost", "images_per_second", "utilisation"}
    assert report["batches"][0].keys() == parts and set(report["saturates"]) == {"tuned", "full", "full+batch"}
    text = (tmp_path / "o" / "table.md").read_text()
    assert (
        f"`{report['choice']['mode']}` (nearest)" in text and "first step shared" in text and "`full` (exact)" in text
    )
    assert (tmp_path / "o" / "cost.png").stat().st_size > 10_000
    out, err = capsys.readouterr()
    assert out.splitlines()[-1] == str(tmp_path / "o") and "--budget 1.5: nearest to full guidance: " in err
    with pytest.raises(SystemExit, match="2"):
        __main__.main(argv)  # nothing is overwritten
    assert "holds results; give --overwrite" in capsys.readouterr().err


def test_throughput_is_measured_eager_and_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[torch.nn.Module] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    (tmp_path / "prompts.txt").write_text("a red circle\n")  # all of a set are encoded
    sizes = {
        "k": 1,
        "steps": 2,
        "repeats": 1,
        "cfg": 4.5,
        "batch_size": 2,
        "output": tmp_path,
        "prompts": tmp_path / "prompts.txt",
    }
    options = [f"--{name}={value}" for name, value in sizes.items()]
    __main__.main(
        ["guidance", "--arch", "sd15-tiny", "--mode", "reuse:2", "--batch_sizes", "1", "2", "--compile", *options]
    )
    report = json.loads((tmp_path / "results.json").read_text())
    assert len(compiled) == 1  # a policy of its own: the other modes stay eager
    names = ["tuned", "full", "full+batch", "tuned, compiled", "full, compiled"]
    assert list(report["saturates"]) == names and set(report["saturates"].values()) <= {1, 2}
    for row in report["batches"]:
        work = {name: row["utilisation"][name] / row["images_per_second"][name] for name in names}  # of an image
        assert work["full+batch"] == pytest.approx(2 * work["tuned"]) == pytest.approx(2 * work["tuned, compiled"])
        assert 1.5 < work["full"] / work["tuned"] < 2  # the base's pass has no LoRA
        assert work["tuned"] == pytest.approx(
            report["batches"][0]["utilisation"]["tuned"] / report["batches"][0]["images_per_second"]["tuned"]
        )
    text = (tmp_path / "table.md").read_text()
    assert "| images a batch: images / s (FLOP utilisation) | tuned | full |" in text and "| saturates at | " in text


def test_prompts_that_choose_are_not_measured() -> None:
    options = GUIDANCE.parse(["--budget", "1.2", "--calibration_prompts", "3"])
    chosen, measured = guidance.split(range(0, 20, 2), options)
    assert len(chosen) == 3 and not set(chosen) & set(measured) and len(measured) == 7
    options = replace(options, calibration_prompts=10)
    with pytest.raises(ValueError, match="leave none to measure on"):
        guidance.split(range(0, 20, 2), options)


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ([], "--ckpt, --base or --arch"),
        (["--arch", "sd15-tiny", "--base", "tiny-sd3"], "leave it or"),
        (["--arch", "sd4"], "invalid choice"),
        (["--base", "tiny-sd3", "--reward", "composition"], "--reward needs --ckpt"),
        (["--base", "tiny-sd3", "--k", "0"], "--k must be at least 1"),
        (["--base", "tiny-sd3", "--batch_sizes", "2", "0"], "--batch_sizes must be"),
        (["--base", "tiny-sd3", "--budget", "0.8"], "nothing costs less"),
        (["--base", "tiny-sd3", "--mode", "fast", "--num_prompts", "1"], "unknown mode of guidance 'fast'"),
        (["--base", "/nowhere", "--num_prompts", "1"], "cannot load the base model"),
    ],
)
def test_mistakes_end_in_one_line(argv: list[str], error: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        guidance.main([*argv, "--output", str(tmp_path / "o")])
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("error: ") and error in err
    assert not (tmp_path / "o").exists()
