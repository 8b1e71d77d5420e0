"""Diffusion Blend: what each mode computes, what it costs, what is refused, and the command from end to end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rewards import RewardMix
from rlg import evaluate
from rlg.diffusion.sampling import SampleId
from rlg.evaluation import options as evaluation_options
from rlg.evaluation.blend import EXPERTS, BlendEvaluator, BlendSettings, load_experts
from rlg.evaluation.evaluator import EvalSettings, Evaluator, plan
from rlg.evaluation.folder import Job
from rlg.evaluation.methods import BLEND, BLEND_LS, EXPERT, MORL, RLG_LS, SOUP
from rlg.evaluation.naming import short_names
from rlg.evaluation.rows import read_rows
from rlg.guidance import blend
from rlg.guidance.guided import Guided
from rlg.models import adapter_files, lora
from rlg.models.policy import Policy
from rlg.models.tuned_model import resolve
from rlg.prompts import Prompt

PROMPTS = [Prompt("a red circle"), Prompt("two blue crosses"), Prompt("three green squares")]
REWARD = RewardMix({"bright": lambda images, prompts, metadata: images.mean(dim=(1, 2, 3))}, (1.0,))
SAMPLING = {"steps": 2, "sampler": "sde", "level": 0.7, "cfg": 1.0, "resolution": None}
SETTINGS = BlendSettings(scales=(0.0, 0.5, 1.0), methods=(BLEND,), k=2, seed=3, batch_size=64, **SAMPLING)


@pytest.fixture(scope="module")
def experts(tiny_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of the tiny sd3 network that differ in values, rank, alpha and layers."""
    root, folders = tmp_path_factory.mktemp("experts"), []
    for i, options in enumerate(
        ({"rank": 4, "alpha": 8}, {"rank": 2, "alpha": 6, "targets": ["attn.to_q", "proj_out"]})
    ):
        policy = Policy.load(tiny_policy("sd3", fresh=True).base)
        for parameter in policy.add_lora(**options):
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(parameter) + i))
        folders.append(root / f"run-{i}" / "checkpoint-1")
        policy.save_adapter(folders[-1])
    return folders


def single(experts: list[Path], i: int) -> Policy:
    """A policy that carries one expert alone."""
    policy = Policy.load(str(adapter_files.read(experts[i]).base))
    policy.load_adapter(experts[i])
    return policy


@pytest.fixture(scope="module")
def policy(experts: list[Path]) -> Policy:
    """Both experts in one network."""
    both = Policy.load(str(adapter_files.read(experts[0]).base))
    load_experts(both, list(map(resolve, experts)), [])
    return both


@pytest.fixture(scope="module")
def call(policy: Policy) -> tuple[Tensor, Tensor, Any]:
    """Inputs of a network call for two prompts."""
    x = torch.randn(2, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    return x, torch.full((2,), 500.0), policy.encode(["a red circle", "two blue crosses"])


def jobs(w: float, mode: str) -> list[Job]:
    return [Job(p, k, w, mode) for p in range(2) for k in range(2)]


def evaluator(policy: Policy, **changes: Any) -> BlendEvaluator:
    return BlendEvaluator(policy, REWARD, PROMPTS, replace(SETTINGS, **changes))


# --- experts in one network


@pytest.mark.numerics
def test_an_expert_is_the_adapter_that_it_would_be_alone(policy: Policy, experts: list[Path], call: tuple) -> None:
    with torch.no_grad():
        for i, name in enumerate(EXPERTS):
            assert torch.equal(policy.predict_as(name, *call), single(experts, i).predict(*call))
        assert torch.equal(policy.reference(*call), single(experts, 0).reference(*call))
        assert torch.equal(policy.predict(*call), policy.predict_as(EXPERTS[0], *call))
        assert (policy.predict_as(EXPERTS[1], *call) - policy.predict(*call)).abs().max() > 1e-3
    assert not any(p.requires_grad for p in policy._adapter(EXPERTS[1]))


def test_an_expert_may_be_a_diffusers_file(policy: Policy, experts: list[Path], call: tuple) -> None:
    other = single(experts, 0)
    other.load_expert("more", experts[1] / adapter_files.DIFFUSERS_FILE)
    with torch.no_grad():
        torch.testing.assert_close(other.predict_as("more", *call), policy.predict_as(EXPERTS[1], *call))
        assert torch.equal(other.predict(*call), policy.predict(*call))


def test_what_does_not_fit_is_refused_and_changes_nothing(
    experts: list[Path], tiny_checkpoint: Callable[[str], Path], tmp_path: Path, call: tuple
) -> None:
    policy = single(experts, 0)
    with torch.no_grad():
        before = policy.predict(*call)
        for path, message in ((tiny_checkpoint("sd"), "does not fit this base model"), (tmp_path / "no", "no such")):
            with pytest.raises(ValueError, match=message):
                policy.load_expert("other", path)
            assert torch.equal(policy.predict(*call), before)
    policy.load_expert("other", experts[1])
    with pytest.raises(ValueError, match="already carries a LoRA"):
        policy.load_expert("other", experts[1])


# --- blend, soup


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_lambda_0_and_1_are_the_experts(policy: Policy, experts: list[Path], cfg: float) -> None:
    for i, w in enumerate((0.0, 1.0)):
        alone = Evaluator(single(experts, i), REWARD, PROMPTS, plain(cfg=cfg, scales=(1.0,)))
        expected = alone.generate(jobs(1.0, "rlg"))
        for mode in (BLEND, EXPERT, BLEND_LS):
            found = evaluator(policy, cfg=cfg).generate(jobs(w, mode))
            assert torch.equal(found.pixels_B3HW, expected.pixels_B3HW), mode
            assert found.nfe_B.tolist() == expected.nfe_B.tolist()
            torch.testing.assert_close(found.kl_B, expected.kl_B)
        soup = evaluator(policy, cfg=cfg).generate(jobs(w, SOUP))
        torch.testing.assert_close(soup.pixels_B3HW, expected.pixels_B3HW, rtol=0, atol=1e-5)


def plain(**changes: Any) -> EvalSettings:
    own = {f.name: getattr(SETTINGS, f.name) for f in fields(EvalSettings)}
    return EvalSettings(**own | {"methods": ("rlg",)} | changes)


@pytest.mark.parametrize("scale", [1.0, 0.5, 2.0])
def test_the_blend_is_its_formula(scale: float, policy: Policy, call: tuple) -> None:
    lambda_B = torch.tensor([0.3, 0.8])
    judge = evaluator(policy, blend_scale=scale)
    unit = [Job(0, 0, 0.3, BLEND), Job(1, 0, 0.8, BLEND)]
    guided = judge.guided(unit, policy.schedule(2, "sde", 0.7))
    with torch.no_grad():
        base, a, b = policy.reference(*call), *(policy.predict_as(name, *call) for name in EXPERTS)
        weight = lambda_B[:, None, None, None]
        expected = base + scale * ((1 - weight) * (a - base) + weight * (b - base))
        torch.testing.assert_close(guided(*call), expected, rtol=1e-4, atol=1e-5)
    assert guided.passes(500.0, 2).tolist() == [2 if scale == 1 else 3] * 2


def merged(experts: list[Path], weights: tuple[float, float]) -> Policy:
    """A network whose dense weights are base + the weighted sum of the experts' updates, without any adapter."""
    target = Policy.load(str(adapter_files.read(experts[0]).base))
    for i, weight in enumerate(weights):
        for name, layer in single(experts, i).network.named_modules():
            if layer in set(lora.layers(layer)):
                dense = target.network.get_parameter(f"{name}.weight")
                dense.data += weight * layer.get_delta_weight(adapter_files.NAME).detach()
    return target


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_the_soup_is_the_network_with_merged_weights(
    scale: float, policy: Policy, experts: list[Path], call: tuple
) -> None:
    guided = evaluator(policy, blend_scale=scale).guided(jobs(0.3, SOUP), policy.schedule(2, "sde", 0.7))
    with torch.no_grad():
        before = [policy.predict_as(name, *call) for name in EXPERTS]
        found = guided(*call)
        dense = merged(experts, (0.7 * scale, 0.3 * scale))
        torch.testing.assert_close(found, dense.backbone.forward(dense.network, *call), rtol=1e-4, atol=1e-5)
        blended = (1 - scale) * policy.reference(*call) + scale * (0.7 * before[0] + 0.3 * before[1])
        assert (found - blended).abs().max() > 1e-4  # the network is not linear in its weights
        assert all(torch.equal(policy.predict_as(name, *call), x) for name, x in zip(EXPERTS, before, strict=True))
    assert guided.passes(500.0, 2).tolist() == [1, 1]


def test_the_soup_is_no_average_of_factors(tiny_policy: Callable[..., Policy], tmp_path: Path, call: tuple) -> None:
    """Of an adapter and of its negated factors, whose updates are equal: factors cancel, updates do not."""
    policy = tiny_policy("sd3")
    policy.save_adapter(tmp_path / "plus")
    for parameter in policy.trainable():
        parameter.data.neg_()
    policy.save_adapter(tmp_path / "minus")
    both = Policy.load(policy.base)
    load_experts(both, [resolve(tmp_path / "plus"), resolve(tmp_path / "minus")], [])
    with torch.no_grad():
        soup = both.predict_mixed(dict.fromkeys(EXPERTS, 0.5), *call)
        torch.testing.assert_close(soup, both.predict(*call), rtol=1e-4, atol=1e-5)
        assert (soup - both.reference(*call)).abs().max() > 1e-3


# --- one expert at a time


def drawn(policy: Policy, weights: list[list[float]], ids: list[SampleId], steps: int = 4) -> Tensor:
    """(B, S, E): the weights that `one_at_a_time` gives."""
    schedule = policy.schedule(steps, "sde", 0.7)
    functions = blend.one_at_a_time(torch.tensor(weights), schedule, ids)
    return torch.stack([torch.stack([f(float(t)) for t in schedule.t], dim=1) for f in functions], dim=2)


def test_experts_are_drawn_as_often_as_they_weigh(policy: Policy) -> None:
    ids = [SampleId(0, i // 50, i % 50) for i in range(2000)]
    for weights in ([0.2, 0.3], [0.9, 0.1], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.7, 0.1 + 0.2]):
        found_BSE = drawn(policy, [weights] * 2000, ids)
        assert set(found_BSE.unique().tolist()) <= {0.0, 1.0} and found_BSE.sum(dim=2).max() <= 1
        rate_SE = found_BSE.mean(dim=0)
        assert (rate_SE - torch.tensor(weights)).abs().max() < 0.04  # 4 sigma of 2000 draws
        if sum(weights) == 1:
            assert (found_BSE.sum(dim=2) == 1).all()  # never the base
    steps = drawn(policy, [[0.5, 0.5]] * 2000, ids)[:, :, 0]
    both = (steps[:, 0] * steps[:, 1]).mean()
    assert abs(both - 0.25) < 0.04  # steps are independent


def test_a_draw_depends_on_seed_prompt_and_k_alone(policy: Policy) -> None:
    ids = [SampleId(0, 1, 2), SampleId(0, 2, 1), SampleId(1, 1, 2), SampleId(0, 1, 3)]
    found = drawn(policy, [[0.5, 0.5]] * 4, ids, steps=30)
    assert torch.equal(drawn(policy, [[0.5, 0.5]] * 2, ids[2:], steps=30), found[2:])
    assert len({tuple(row.flatten().tolist()) for row in found}) == 4
    less = drawn(policy, [[0.6, 0.4]] * 4, ids, steps=30)
    assert (less[..., 1] <= found[..., 1]).all() and not torch.equal(less, found)  # paired along lambda
    first = evaluator(policy, steps=4).generate(jobs(0.5, BLEND_LS)).pixels_B3HW
    alone = torch.cat([evaluator(policy, steps=4).generate([job]).pixels_B3HW for job in jobs(0.5, BLEND_LS)])
    torch.testing.assert_close(alone, first, rtol=0, atol=1e-4)


def test_a_drawn_expert_costs_one_pass(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    forward = policy.backbone.forward

    def counted(network: Any, x: Tensor, *rest: Any) -> Tensor:
        made.append(len(x))
        return forward(network, x, *rest)

    monkeypatch.setattr(policy, "backbone", replace(policy.backbone, forward=counted))
    unit = [*jobs(0.5, BLEND_LS), *jobs(0.2, BLEND_LS)]
    judge = evaluator(policy, steps=3)
    schedule = policy.schedule(3, "sde", 0.7)
    guided = judge.guided(unit, schedule)
    x = torch.zeros(8, *policy.latent_shape())
    cond = policy.encode(["a red circle"] * 8)
    for t in schedule.t:
        made.clear()
        with torch.no_grad():
            guided(x, t.expand(8), cond)
        assert sum(made) == 8
    for mode, passes in ((BLEND_LS, 1), (SOUP, 1), (BLEND, 2)):
        assert judge.generate(jobs(0.5, mode)).nfe_B.tolist() == [3 * passes] * 4


def test_drawn_experts_drift_as_the_blend_in_expectation(policy: Policy, call: tuple) -> None:
    """Over many draws at one (x, t), the mean output is the blend's; W < 1 draws the base with the rest."""
    x, t, cond = (part[:1] for part in call)
    schedule = policy.schedule(1, "sde", 0.7)
    many = 4000
    for scale in (1.0, 0.6):
        weights = blend.pair_weights(torch.full((many,), 0.3), scale)
        functions = blend.one_at_a_time(weights, schedule, [SampleId(0, i, 0) for i in range(many)])
        share = torch.stack([f(float(schedule.t[0])) for f in functions]).mean(dim=1)
        with torch.no_grad():
            outs = [policy.predict_as(name, x, t, cond) for name in EXPERTS]
            base = policy.reference(x, t, cond)
            mean = base + sum(s * (out - base) for s, out in zip(share, outs, strict=True))
            exact = Guided(policy.reference, tuple(lambda *_, o=o: o for o in outs), (scale * 0.7, scale * 0.3))(
                x, t, cond
            )
        spread = max(float((out - base).abs().max()) for out in outs)
        assert (mean - exact).abs().max() < 0.04 * spread
        assert spread > 1e-3


def test_rlg_by_draws(policy: Policy) -> None:
    """RLG by draws: at w = 0 and 1 it is the base and the tuned model, and it takes one pass in between."""
    judge = Evaluator(policy, REWARD, PROMPTS, plain(methods=("rlg", RLG_LS), scales=(0.0, 0.5, 1.0)))
    assert [sweep for sweep in judge.settings.sweeps() if sweep[0] == RLG_LS] == [(RLG_LS, (0.5,))]
    for w in (0.0, 1.0):
        expected = judge.generate(jobs(w, "rlg"))
        found = judge.generate(jobs(w, RLG_LS))
        assert torch.equal(found.pixels_B3HW, expected.pixels_B3HW)
    half = judge.generate(jobs(0.5, RLG_LS))
    assert half.nfe_B.tolist() == [2] * 4 and (half.kl_B >= 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "ode", "methods": (BLEND_LS,)}, "only a stochastic sampler averages out"),
        ({"level": 0.0, "methods": (BLEND_LS,)}, "only a stochastic sampler averages out"),
        ({"blend_scale": 1.5, "methods": (BLEND_LS,)}, "needs probabilities"),
        ({"blend_scale": -0.5, "methods": (BLEND_LS,)}, "needs probabilities"),
        ({"blend_scale": float("nan")}, "must be finite"),
        ({"methods": ("rlg",)}, "unknown method 'rlg'; known: blend, blend_ls, soup"),
        ({"origin": "x"}, "does not go with --blend"),
        ({"schedule": "linear_up"}, "--schedule linear_up does not go with --blend"),
    ],
)
def test_settings_are_checked(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


@pytest.mark.parametrize("scales", [(0.5, 1.5), (-0.1,)])
def test_rlg_by_draws_needs_a_probability(scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="method rlg_ls needs probabilities"):
        plain(methods=(RLG_LS,), scales=scales)
    with pytest.raises(ValueError, match="only a stochastic sampler"):
        plain(methods=(RLG_LS,), scales=(0.5,), sampler="ode")


def test_grids() -> None:
    assert blend.grid("0:1:0.1") == tuple(i / 10 for i in range(11))
    assert blend.grid("0.25:0.75:0.25") == (0.25, 0.5, 0.75)
    assert blend.grid("0.5:0.5:1") == (0.5,)
    assert blend.grid("0:1:0.3") == (0.0, 0.3, 0.6, 0.9)
    for text in ("0:1", "a:b:c", "0:1:0", "0:2:0.5", "-1:1:0.5", "1:0:0.1", "0:1:1e-9", "nan:1:1", "0:1:inf"):
        with pytest.raises(ValueError, match="--blend"):
            blend.grid(text)


def test_plan_makes_the_shared_ends_once() -> None:
    settings = replace(SETTINGS, methods=(BLEND, BLEND_LS, SOUP), morl=1)
    made = [job for unit in plan(settings, [0], set()) for job in unit]
    points = {(job.method, job.w) for job in made}
    assert len(made) == len(set(made)) == 2 * len(points)
    assert points == {
        ("rlg", 0.0),
        *((EXPERT, w) for w in (0.0, 1.0)),
        *((mode, 0.5) for mode in (BLEND, BLEND_LS, SOUP)),
        (MORL, 0.0),
    }
    scaled = {(job.method, job.w) for unit in plan(replace(settings, blend_scale=0.5), [0], set()) for job in unit}
    assert scaled - points == {(mode, w) for mode in (BLEND, BLEND_LS, SOUP) for w in (0.0, 1.0)}


# --- names


def test_names_lose_what_they_share() -> None:
    assert short_names(["tiny-sd3-composition", "tiny-sd3-spo-size"]) == ["composition", "spo-size"]
    assert short_names(["a", "b"]) == ["a", "b"]
    assert short_names(["run/checkpoint-1", "run/checkpoint-2"]) == ["1", "2"]
    assert short_names(["a-b", "a-b"]) == ["b", "b"]


# --- the command


@pytest.fixture
def command(experts: list[Path], tmp_path: Path) -> list[str]:
    """Arguments of a small blend of the two experts, with a model trained on a mix."""
    (tmp_path / "prompts.txt").write_text("".join(p.text + "\n" for p in PROMPTS))
    text = f"--ckpt {experts[0]} --ckpt {experts[1]} --blend 0:1:0.5 --morl {experts[1]} --steps 2 --cfg 1 --k 2"
    text += f" --reward jpeg_compressibility jpeg_incompressibility --prompts {tmp_path}/prompts.txt --num_prompts 2"
    return [*text.split(), "--batch_size", "8", "--output", str(tmp_path / "out")]


def test_the_command_draws_the_front_and_goes_on(
    command: list[str], experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Job] = []
    generate = Evaluator.generate
    monkeypatch.setattr(Evaluator, "generate", lambda self, unit: made.extend(unit) or generate(self, unit))
    folder = tmp_path / "out"
    evaluate.main([*command, "--kernel", "sde", "--method", "blend", "soup"])
    assert len(made) == 4 * 6  # base, two experts, two blends in the middle, and the mix
    files = {f.name for f in folder.iterdir()}
    assert files >= {"pareto.png", "pareto.svg", "curves.svg", "summary.json", "report.html", "scores.jsonl"}
    assert {f.name for f in (folder / "images").iterdir()} == {
        f"{p}-0-{w}.png" for p in (0, 1) for w in ("0", "0.5", "1")
    }

    before = {(row.method, row.w, row.prompt_id, row.k): row for row in read_rows(folder / "scores.jsonl")}
    assert before[MORL, 0, 0, 0].rewards == before[EXPERT, 1, 0, 0].rewards  # the same file, here
    made.clear()
    evaluate.main([*command, "--kernel", "sde"])
    assert {job.method for job in made} == {BLEND_LS} and len(made) == 4
    made.clear()
    evaluate.main([*command[:6], "--morl", *[str(experts[1])] * 2, *command[8:], "--kernel", "sde"])
    assert {(job.method, job.w) for job in made} == {(MORL, 1.0)} and len(made) == 4
    after = {(row.method, row.w, row.prompt_id, row.k): row for row in read_rows(folder / "scores.jsonl")}
    assert len(after) == 32 and all(after[key] == row for key, row in before.items())

    summary = json.loads((folder / "summary.json").read_text())
    front = summary["pareto"]
    assert front["methods"].keys() == {BLEND, BLEND_LS, SOUP, EXPERT, MORL}
    assert {mode: row["nfe_per_image"] for mode, row in front["methods"].items()} == {
        BLEND: 4,
        BLEND_LS: 2,
        SOUP: 2,
        EXPERT: 2,
        MORL: 2,
    }
    assert all(row["images_per_second"] > 0 and row["hypervolume"] >= 0 for row in front["methods"].values())
    assert [front["methods"][mode]["points"] for mode in (BLEND, BLEND_LS, SOUP, EXPERT)] == [3, 3, 3, 2]
    for i, name in enumerate(front["rewards"]):
        means = [point["rewards"][name]["mean"] for point in summary["points"]]
        assert front["reference"][i] == pytest.approx(min(means) - 0.1 * (max(means) - min(means)))
    low, high = front["methods"][SOUP]["delta_vs_blend_ci95"]
    assert low <= front["methods"][SOUP]["delta_vs_blend"] <= high
    assert "hypervolume_ci95" not in front["methods"][BLEND]  # of noisy means an area is too large
    assert summary["meta"]["experts"] == ["0", "1"]
    page = (folder / "report.html").read_text()
    assert len(re.findall("<svg(?! viewBox)", page)) == 2 and "hypervolume" in page and "guided = (" in page


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kernel", "ode", "--method", "blend_ls"], "method blend_ls draws one model at each step"),
        (["--kernel", "sde", "--reward", "jpeg_compressibility"], "draws a front over two rewards"),
        (["--kernel", "sde", "--method", "rlg"], "--method rlg is of a sweep over w; with --blend there is blend"),
        (["--kernel", "sde", "--blend", "0:1"], "takes START:STOP:STEP"),
        (["--kernel", "sde", "--ckpt", "none"], "no such checkpoint|got 3 --ckpt"),
    ],
)
def test_what_is_refused_is_one_line(
    options: list[str], message: str, command: list[str], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*command, *options])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and len(lines) == 1
    assert re.search(message, lines[0])
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_needs_no_blend_and_two_do(command: list[str], experts: list[Path], tmp_path: Path) -> None:
    (model,) = evaluation_options.parse(["--ckpt", str(experts[0])]).models
    assert model.path == str(experts[0])
    with pytest.raises(ValueError, match="2 --ckpt are given: --blend"):
        evaluation_options.parse(command[:4])
    with pytest.raises(ValueError, match="--morl does nothing without --blend"):
        evaluation_options.parse([*command[:2], "--morl", "x"])
    config = tmp_path / "eval.yaml"
    config.write_text(f"ckpt: [{experts[0]}, {experts[1]}]\nblend: '0:1:0.5'\n")
    assert evaluation_options.completed(["--config", str(config)]).ckpt == tuple(map(str, experts))
    assert evaluation_options.completed(["--config", str(config), "--ckpt", "x"]).ckpt == (
        "x",
    )  # the command line wins
