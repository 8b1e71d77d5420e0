"""The evaluator: what a row says, that rows are paired, and that finished work is neither lost nor done again."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rewards import RewardMix
from rlg.diffusion import process, sampling
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.evaluation import evaluator as evaluation
from rlg.evaluation.evaluator import EvalSettings, Evaluator, Images, diversity, plan
from rlg.evaluation.folder import Job, merge
from rlg.evaluation.methods import CORRECTED, LORA_SCALE, RLG, TWICE
from rlg.guidance.guided import with_cfg
from rlg.models.policy import Policy
from rlg.prompts import Prompt

PROMPTS = [Prompt("a red circle", {"tag": "colors"}), Prompt("two blue crosses"), Prompt("three green squares")]
SETTINGS = EvalSettings(
    scales=(0.0, 0.5, 1.0, 2.0),
    methods=(RLG,),
    steps=2,
    sampler="sde",
    level=0.7,
    cfg=1.0,
    resolution=None,
    k=2,
    seed=3,
    batch_size=64,
)
REWARD = RewardMix({"bright": lambda images, prompts, metadata: images.mean(dim=(1, 2, 3))}, (1.0,))


@pytest.fixture(scope="module")
def policies(tiny_policy: Callable[..., Policy]) -> Callable[[str], Policy]:
    """A policy of a family with a LoRA that is not zero, made once."""
    return cache(tiny_policy)


def evaluator(policy: Policy, **changes: Any) -> Evaluator:
    return Evaluator(policy, REWARD, PROMPTS, replace(SETTINGS, **changes))


def jobs(w: float, mode: str = RLG, prompts: int = 2, k: int = 2) -> list[Job]:
    return [Job(p, i, w, mode) for p in range(prompts) for i in range(k)]


def plain(policy: Policy, tuned: bool, unit: list[Job], steps: int = 2, cfg: float = 1.0, **sampler: Any) -> Tensor:
    """Images of a unit, by the base or the tuned model on its own, from the batches that the evaluator makes."""
    schedule = policy.schedule(steps, sampler.get("sampler", "sde"), 0.7)
    noise = SampleNoise([SampleId(SETTINGS.seed, job.prompt_id, job.k) for job in unit], policy.latent_shape())
    ids = sorted({job.prompt_id for job in unit})  # encoded together, once each
    cond = policy.encode([PROMPTS[i].text for i in ids])[torch.tensor([ids.index(job.prompt_id) for job in unit])]
    predict = with_cfg(policy.predict if tuned else policy.reference, policy.encode([""]), cfg)
    return policy.decode(sampling.sample(predict, schedule, cond, noise))


# --- the plan


@pytest.mark.parametrize("batch_size", [1, 4, 16, 1000])
def test_plan_makes_every_image_once(batch_size: int) -> None:
    settings = replace(SETTINGS, methods=(RLG, LORA_SCALE, TWICE), batch_size=batch_size)
    units = plan(settings, [4, 7, 9], set())
    made = [job for unit in units for job in unit]
    expected = {Job(p, k, w, RLG) for p in (4, 7, 9) for k in (0, 1) for w in (0.0, 0.5, 1.0, 2.0)}
    expected |= {Job(p, k, 1.0, TWICE) for p in (4, 7, 9) for k in (0, 1)}
    expected |= {Job(p, k, w, LORA_SCALE) for p in (4, 7, 9) for k in (0, 1) for w in (0.5, 2.0)}
    assert len(made) == len(expected) and set(made) == expected
    for unit in units:
        assert len({job.method for job in unit}) == 1
        assert unit[0].method != LORA_SCALE or len({job.w for job in unit}) == 1
        groups = {(job.prompt_id, job.w) for job in unit}
        assert len(unit) == 2 * len(groups)  # whole groups of k
        assert len(unit) <= max(batch_size, 2 * len({w for _, w in groups}))


def test_plan_leaves_out_what_is_done_and_redoes_groups_that_were_cut_off() -> None:
    settings = replace(SETTINGS, scales=(0.0, 1.0))
    everything = {job for unit in plan(settings, [0, 1], set()) for job in unit}
    assert plan(settings, [0, 1], everything) == []
    (rest,) = plan(settings, [0, 1], everything - {Job(1, 0, 1.0, RLG)})
    assert rest == [Job(1, 0, 1.0, RLG), Job(1, 1, 1.0, RLG)]
    more = plan(replace(settings, scales=(0.0, 0.5, 1.0)), [0, 1], everything)
    assert {job for unit in more for job in unit} == {Job(p, k, 0.5, RLG) for p in (0, 1) for k in (0, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scales": (0.0, math.nan)}, "must be finite"),
        ({"scales": ()}, "must be finite"),
        ({"methods": ("rlg", "magic")}, "unknown method 'magic'; known: rlg, lora_scale, tuned_2x_steps"),
        ({"k": 0}, "must be at least 1"),
        ({"steps": 0}, "must be at least 1"),
        ({"schedule": "linear"}, "unknown schedule of w 'linear'"),
        ({"schedule": "linear_up", "methods": ("corrected",)}, "method corrected is for a w that stays"),
        ({"schedule": "linear_up", "methods": ("rlg_ls",), "scales": (0.5,)}, "method rlg_ls is for a w that stays"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


# --- images


@pytest.mark.numerics
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_w_0_is_the_base_and_w_1_the_tuned_model(family: str, cfg: float, policies: Callable[[str], Policy]) -> None:
    policy = policies(family)
    judge = evaluator(policy, cfg=cfg)
    base, tuned = (plain(policy, tuned, jobs(0.0), cfg=cfg) for tuned in (False, True))
    assert torch.equal(judge.generate(jobs(0.0)).pixels_B3HW, base)
    assert torch.equal(judge.generate(jobs(1.0)).pixels_B3HW, tuned)
    assert (base - tuned).abs().max() > 0.01
    together = judge.generate([*jobs(0.0), *jobs(1.0), *jobs(2.0)]).pixels_B3HW
    torch.testing.assert_close(together[:8], torch.cat([base, tuned]), rtol=0, atol=1e-3)


@pytest.mark.numerics
def test_other_modes_are_other_ways_to_run_the_tuned_model(policies: Callable[[str], Policy]) -> None:
    policy = policies("sd3")
    judge = evaluator(policy)
    base, tuned = (plain(policy, tuned, jobs(0.0)) for tuned in (False, True))
    assert torch.equal(judge.generate(jobs(1.0, LORA_SCALE)).pixels_B3HW, tuned)
    torch.testing.assert_close(judge.generate(jobs(0.0, LORA_SCALE)).pixels_B3HW, base, rtol=0, atol=1e-4)
    half = judge.generate(jobs(0.5, LORA_SCALE)).pixels_B3HW
    assert min(float((half - other).abs().max()) for other in (base, tuned)) > 1e-3
    assert torch.equal(judge.generate(jobs(1.0)).pixels_B3HW, tuned)  # the scale was put back
    assert torch.equal(judge.generate(jobs(1.0, TWICE)).pixels_B3HW, plain(policy, True, jobs(1.0), steps=4))


@pytest.mark.numerics
@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_rows_do_not_depend_on_the_batch(sampler: str, policies: Callable[[str], Policy]) -> None:
    """All scales in one batch, a scale at a time, batches of three, and every image alone."""
    policy = policies("sd3")
    unit = [job for w in SETTINGS.scales for job in jobs(w)]
    whole = dict(zip(unit, (row for row, _ in evaluator(policy, sampler=sampler).run(unit)), strict=True))
    one_scale = evaluator(policy, sampler=sampler, scales=(2.0,))
    parts = [row for w in SETTINGS.scales for row, _ in one_scale.run(jobs(w))]
    parts += [row for row, _ in evaluator(policy, sampler=sampler, batch_size=3).run(unit)]
    parts += [replace(next(one_scale.run([job]))[0], diversity=whole[job].diversity) for job in unit[::3]]
    for row in parts:
        expected = whole[Job(row.prompt_id, row.k, row.w, row.method)]
        assert row.rewards == pytest.approx(expected.rewards, abs=1e-5)
        assert row.diversity == pytest.approx(expected.diversity, abs=1e-4)
        assert row.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-6) if sampler == "sde" else row.kl is None
        assert (row.nfe, row.prompt, row.tag) == (expected.nfe, expected.prompt, expected.tag)


def test_batches_are_no_larger_than_asked(policies: Callable[[str], Policy], monkeypatch: pytest.MonkeyPatch) -> None:
    judge, sizes = evaluator(policies("sd3"), batch_size=3), []
    generate = judge.generate
    monkeypatch.setattr(judge, "generate", lambda unit: sizes.append(len(unit)) or generate(unit))
    assert len(list(judge.run([job for w in (0.0, 2.0) for job in jobs(w)]))) == 8
    assert sizes == [3, 3, 2]


def test_noise_is_paired_across_scales_and_not_across_images(policies: Callable[[str], Policy]) -> None:
    judge = evaluator(policies("sd3"), sampler="ode")
    images = judge.generate([*jobs(0.0), *jobs(1e-3)]).pixels_B3HW
    paired = (images[:4] - images[4:]).abs().flatten(1).mean(dim=1)
    assert paired.max() < 1e-3  # nearly the same w: nearly the same images
    other = torch.stack([(images[i] - images[j]).abs().mean() for i in range(4) for j in range(i)])
    assert other.min() > 0.01
    again = evaluator(policies("sd3"), sampler="ode", seed=4).generate(jobs(0.0)).pixels_B3HW
    assert (again - images[:4]).abs().flatten(1).mean(dim=1).min() > 0.01


def test_guidance_may_start_from_another_adapter(tiny_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """From a copy of the tuned model no w changes anything; from a zero LoRA it is guidance from the base."""
    tuned = [p.detach().clone() for p in tiny_policy("sd3").trainable()]
    plain_rows = evaluator(tiny_policy("sd3")).generate(unit := jobs(2.0) + jobs(1.0))
    for name, factor in (("tuned", 1.0), ("zero", 0.0)):
        save_file({str(i): factor * p for i, p in enumerate(tuned)}, tmp_path / name)
        found = evaluator(tiny_policy("sd3"), origin=str(tmp_path / name)).generate(unit)
        torch.testing.assert_close(found.pixels_B3HW[4:], plain_rows.pixels_B3HW[4:], rtol=0, atol=1e-5)
        same = found.pixels_B3HW[4:] if name == "tuned" else plain_rows.pixels_B3HW[:4]
        torch.testing.assert_close(found.pixels_B3HW[:4], same, rtol=0, atol=1e-5)
        expected = plain_rows.kl_B[4:] if name == "tuned" else plain_rows.kl_B[:4]  # the KL is the base's still
        torch.testing.assert_close(found.kl_B[:4], expected, rtol=1e-4, atol=1e-6)
    save_file({"0": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no second adapter of the one that is loaded"):
        evaluator(tiny_policy("sd3"), origin=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="none is missing or damaged"):
        evaluator(tiny_policy("sd3"), origin=str(tmp_path / "none"))


# --- what a row says


@pytest.mark.numerics
def test_path_kl_by_hand(policies: Callable[[str], Policy]) -> None:
    """Of the tuned model: sum over its own path of |mean - base mean|^2 / (2 std^2)."""
    policy = policies("sd3")
    unit, schedule = jobs(1.0), policy.schedule(2, "sde", 0.7)
    noise = SampleNoise([SampleId(SETTINGS.seed, job.prompt_id, job.k) for job in unit], policy.latent_shape())
    cond = policy.encode([p.text for p in PROMPTS])[torch.tensor([job.prompt_id for job in unit])]
    path = sampling.rollout(policy.predict, schedule, cond, noise, keep_means=True)
    expected = torch.zeros(4)
    with torch.no_grad():
        for i in range(2):
            base = policy.reference(path.x_TBCHW[i], sampling.times(schedule, i, 4), cond)
            gap = path.mean_TBCHW[i] - process.mean(schedule, i, path.x_TBCHW[i], base)
            expected += gap.square().sum(dim=(1, 2, 3)) / (2 * schedule.std[i] ** 2)
    found = evaluator(policy).generate(unit).kl_B
    assert expected.min() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    assert evaluator(policy).generate(jobs(1.0, LORA_SCALE)).kl_B.tolist() == pytest.approx(found.tolist(), rel=1e-4)


def test_path_kl_is_zero_at_the_base_and_quadratic_near_it(family: str, policies: Callable[[str], Policy]) -> None:
    judge = evaluator(policies(family))
    at = {w: judge.generate(jobs(w)).kl_B for w in (0.0, 0.01, 0.02, -0.01, 1.0, 2.0)}
    assert not at[0.0].any()
    torch.testing.assert_close(at[0.02] / at[0.01], torch.full((4,), 4.0), rtol=0.1, atol=0)
    torch.testing.assert_close(at[-0.01] / at[0.01], torch.ones(4), rtol=0.1, atol=0)
    assert (at[2.0] > at[1.0]).all() and (at[1.0] > 0).all()
    assert evaluator(policies(family), sampler="ode").generate(jobs(1.0)).kl_B is None


@pytest.mark.parametrize(("cfg", "factor"), [(1.0, 1), (2.0, 2)])
def test_network_evaluations_are_counted_as_they_are_made(
    cfg: float, factor: int, policies: Callable[[str], Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, made = policies("sd3"), []
    forward = policy.backbone.forward

    def counted(network: Any, x: Tensor, *rest: Any) -> Tensor:
        made.append(len(x))
        return forward(network, x, *rest)

    monkeypatch.setattr(policy, "backbone", replace(policy.backbone, forward=counted))
    judge = evaluator(policy, cfg=cfg, sampler="ode", steps=3)
    units = {
        3: [*jobs(0.0), *jobs(1.0)],
        6: [*jobs(0.5), *jobs(2.0), *jobs(-1.0)],
    }
    for passes, unit in units.items():
        made.clear()
        assert judge.generate(unit).nfe_B.tolist() == [passes * factor] * len(unit)
        assert sum(made) == passes * factor * len(unit)
    assert judge.generate(jobs(1.0, TWICE)).nfe_B.tolist() == [6 * factor] * 4
    assert judge.generate(jobs(2.0, LORA_SCALE)).nfe_B.tolist() == [3 * factor] * 4
    made.clear()
    stochastic = evaluator(policy, cfg=cfg, steps=3).generate(jobs(1.0))
    assert stochastic.nfe_B.tolist() == [3 * factor] * 4  # what the image costs;
    assert sum(made) == 6 * factor * 4  # its KL needs the base too


@pytest.mark.numerics
def test_an_interval_without_steps_is_the_tuned_model_and_one_with_all_is_constant(
    policies: Callable[[str], Policy],
) -> None:
    policy, unit = policies("sd3"), [*jobs(0.5), *jobs(2.0)]
    tuned, constant = evaluator(policy).generate(jobs(1.0)), evaluator(policy).generate(unit)
    none, everywhere = (evaluator(policy, schedule=f"interval:0:{high}").generate(unit) for high in (0, 1))
    torch.testing.assert_close(none.pixels_B3HW, tuned.pixels_B3HW.repeat(2, 1, 1, 1), rtol=0, atol=1e-5)
    assert torch.equal(everywhere.pixels_B3HW, constant.pixels_B3HW)
    assert (none.nfe_B.tolist(), everywhere.nfe_B.tolist()) == ([2] * 8, [4] * 8)  # outside: one pass
    some = evaluator(policy, schedule="interval:0:0.99", sampler="ode").generate(unit)
    assert some.nfe_B.tolist() == [3] * 8
    torch.testing.assert_close(none.kl_B, tuned.kl_B.repeat(2), rtol=1e-3, atol=1e-6)


def test_a_linear_schedule_is_neither_constant_nor_the_tuned_model(policies: Callable[[str], Policy]) -> None:
    policy, unit = policies("sd3"), jobs(3.0)
    forms = ("constant", "linear_down", "linear_up", "interval:0:0")
    found = [evaluator(policy, schedule=form, steps=4, sampler="ode").generate(unit) for form in forms]
    assert [images.nfe_B.tolist() for images in found] == [[8] * 4, [8] * 4, [7] * 4, [4] * 4]  # up starts at w = 1
    assert [images.log_weight_B is None for images in found] == [False, True, True, True]  # the formula's w stays
    pixels = [images.pixels_B3HW for images in found]
    assert min(float((a - b).abs().max()) for i, a in enumerate(pixels) for b in pixels[:i]) > 1e-3


def test_diversity_by_hand() -> None:
    grey = torch.tensor([0.0, 0.5, 1.0, 0.3, 0.7, 0.2])[:, None, None, None].expand(6, 3, 32, 32)
    groups = [(0, 1.0), (0, 1.0), (0, 1.0), (1, 1.0), (1, 2.0), (1, 1.0)]
    expected = [0.75, 0.5, 0.75, 0.1, None, 0.1]  # distances 0.5, 1, 0.5; a group of one has none
    for found, value in zip(diversity(grey, groups), expected, strict=True):
        assert found == (None if value is None else pytest.approx(value, abs=1e-6))
    same = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).expand(30, 3, 64, 64)
    assert diversity(same, [(0, 0.0)] * 30) == [0.0] * 30  # exactly, in large groups too


# --- resuming


class Fake(Evaluator):
    """Grey images that depend on their job alone; dies when its budget of units is spent."""

    def __init__(self, settings: EvalSettings, budget: int = 1000):
        self.reward, self.prompts, self.settings, self.budget = REWARD, PROMPTS, settings, budget
        self.made: list[Job] = []

    def generate(self, unit: list[Job]) -> Images:
        if not self.budget:
            raise KeyboardInterrupt
        self.budget -= 1
        self.made += unit
        grey = torch.tensor([(1 + 3 * job.prompt_id + 5 * job.k + 7 * job.w) % 11 / 11 for job in unit])
        ones = torch.ones(len(unit))
        return Images(grey[:, None, None, None].expand(-1, 3, 16, 16), None, ones, ones)


def evaluated(fake: Fake, folder: Path, rank: int = 0, world: int = 1) -> None:
    evaluation.evaluate(fake, folder, range(3), lambda job: job.k == 0, rank, world)


SMALL = replace(SETTINGS, scales=(0.0, 1.0, 2.0), batch_size=6)  # a unit a prompt


@pytest.mark.filterwarnings("ignore:.*cut off")
@pytest.mark.parametrize("cut", [0, 20, 700, 1000, 1500])
def test_a_killed_evaluation_goes_on_where_it_was(cut: int, tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    evaluated(Fake(SMALL), tmp_path / "whole")
    assert merge(tmp_path / "whole") == 18
    with pytest.raises(KeyboardInterrupt):
        evaluated(Fake(SMALL, budget=2), tmp_path / "killed")
    file = tmp_path / "killed" / "scores-0.jsonl"
    left = file.read_bytes()[: -cut or None]  # the last write got this far
    file.write_bytes(left)
    complete = 6 * left.count(b"\n\n")  # of the unit at work, nothing
    assert merge(tmp_path / "killed") == complete
    again = Fake(SMALL)
    evaluated(again, tmp_path / "killed")
    assert merge(tmp_path / "killed") == 18
    assert (tmp_path / "killed" / "scores.jsonl").read_text() == (tmp_path / "whole" / "scores.jsonl").read_text()
    assert len(again.made) == 18 - complete
    idle = Fake(SMALL, budget=0)
    evaluated(idle, tmp_path / "killed")
    assert merge(tmp_path / "killed") == 18 and not idle.made


def test_a_file_that_was_cut_off_in_its_first_line_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "scores-0.jsonl").write_text('{"prompt_id": 0, "pro')
    (tmp_path / "scores-1.jsonl").write_text("")
    assert merge(tmp_path) == 0
    evaluated(Fake(SMALL), tmp_path)
    assert merge(tmp_path) == 18


@pytest.mark.parametrize("world", [2, 3, 5])
def test_processes_share_the_work_even_if_one_is_early(world: int, tmp_path: Path) -> None:
    made: list[Job] = []
    for rank in reversed(range(world)):  # the last one is done before the first looks
        fake = Fake(SMALL)
        evaluated(fake, tmp_path, rank, world)
        made += fake.made
    assert len(made) == len(set(made)) == 18
    assert merge(tmp_path) == 18
    assert not list(tmp_path.glob("scores-*.jsonl"))


def test_images_are_kept_as_asked(tmp_path: Path) -> None:
    evaluated(Fake(replace(SMALL, scales=(0.0, 0.25))), tmp_path)
    found = {f.name for f in (tmp_path / "images").iterdir()}
    assert found == {f"{p}-0-{w}.png" for p in range(3) for w in ("0", "0.25")}


# --- the corrector


def test_guided_rows_carry_the_weights_and_the_others_none(policies: Callable[[str], Policy]) -> None:
    judge = evaluator(policies("sd3"), scales=(0.0, 1.0, 2.0))
    weights = {w: [row.log_weight for row, _ in judge.run(jobs(w))] for w in (0.0, 1.0, 2.0)}
    assert weights[0.0] == weights[1.0] == [0.0] * 4
    assert min(weights[2.0]) > 0 and len(set(weights[2.0])) == 4
    for mode, w in ((TWICE, 1.0), (LORA_SCALE, 2.0), (CORRECTED, 2.0)):
        assert [row.log_weight for row, _ in judge.run(jobs(w, mode))] == [None] * 4


def test_weights_between_base_and_tuned_are_negative(policies: Callable[[str], Policy]) -> None:
    rows = [row for row, _ in evaluator(policies("sd")).run(jobs(0.5))]
    assert max(row.log_weight for row in rows) < 0


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_corrected_images_are_guided_ones_of_the_heavier_paths(
    sampler: str, policies: Callable[[str], Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = evaluator(policies("sd3"), k=4, sampler=sampler)
    guided = [image for _, image in judge.run(jobs(2.0, RLG, k=4))]
    monkeypatch.setattr(evaluation, "RESAMPLE_BELOW", 1e-9)  # at the last step alone
    rows, corrected = zip(*judge.run(jobs(2.0, CORRECTED, k=4)), strict=True)
    assert all(row.kl is None for row in rows)  # what resampling leaves is no path of the sampler's
    sources = [[torch.equal(image, other) for other in guided].index(True) for image in corrected]
    assert all(source // 4 == i // 4 for i, source in enumerate(sources))  # within the prompt
    weights = torch.tensor([row.log_weight for row, _ in judge.run(jobs(2.0, RLG, k=4))])
    for prompt in range(2):
        share = 4 * weights[4 * prompt :][:4].softmax(dim=0)
        counts = torch.bincount(torch.tensor(sources[4 * prompt :][:4]) - 4 * prompt, minlength=4)
        assert bool(((counts - share).abs() < 1).all())


def test_corrected_units_keep_a_prompts_images_in_one_batch() -> None:
    settings = replace(SETTINGS, methods=(CORRECTED,), batch_size=5)
    units = plan(settings, range(3), set())
    assert {job.w for unit in units for job in unit} == {0.5, 2.0}
    assert all(len({job.w for job in unit}) == 1 and len(unit) <= 5 for unit in units)
    with pytest.raises(ValueError, match="raise --batch_size"):
        replace(settings, k=6)
