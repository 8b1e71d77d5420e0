"""Ways to run guidance: exact ones are exact, approximations are what they say, and none mixes up two trajectories."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from rlg.choices import GUIDANCE_MODES
from rlg.diffusion import sampling
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.guidance.guided import rlg
from rlg.guidance.modes import Mode, Models, sweep
from rlg.models import lora
from rlg.models.policy import Policy

IDS = [SampleId(0, prompt, 0) for prompt in range(2)]
TEXTS = ["a red circle", "two blue crosses"]


@pytest.fixture(scope="module")
def loaded(tiny_policy: Callable[..., Policy]) -> Callable[[str], Policy]:
    """The policy of a family, made once: nothing here may change it."""
    return lru_cache(tiny_policy)


@pytest.fixture
def policy(loaded: Callable[[str], Policy], family: str) -> Policy:
    return loaded(family)


@pytest.fixture
def sd3(loaded: Callable[[str], Policy]) -> Policy:
    return loaded("sd3")


def models_of(policy: Policy, cfg: float = 1.0) -> Models:
    return Models(policy, policy.encode([""]), cfg)


def sampled(policy: Policy, predict: object, schedule: Schedule, ids: list[SampleId] = IDS) -> Tensor:
    cond = policy.encode([TEXTS[each.prompt] for each in ids])
    return sampling.sample(predict, schedule, cond, SampleNoise(ids, policy.latent_shape()))


def latents(policy: Policy, text: str, w: float, cfg: float = 1.0, steps: int = 4, sampler: str = "ode") -> tuple:
    """(latents, evaluations an image)."""
    models, schedule = models_of(policy, cfg), policy.schedule(steps, sampler, 0.7)
    x = sampled(policy, Mode.parse(text).begin(models, w, schedule, IDS), schedule)
    return x, models.evaluations / len(IDS)


def reference(policy: Policy, w: float, cfg: float = 1.0, steps: int = 4) -> Tensor:
    models = models_of(policy, cfg)
    return sampled(policy, rlg(models.base, models.tuned, w), policy.schedule(steps, "ode", 0.7))


@pytest.mark.numerics
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_one_batch_is_full_guidance(policy: Policy, cfg: float) -> None:
    expected = reference(policy, 2.0, cfg)
    assert (expected - reference(policy, 1.0, cfg)).abs().max() > 1e-2
    for text in ("full", "full+batch"):
        x, evaluations = latents(policy, text, 2.0, cfg)
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-4)
        assert evaluations == 8 * (2 if cfg != 1 else 1)


@pytest.mark.parametrize("text", [form.replace("LOW:HIGH", "0.3:0.9") for form in GUIDANCE_MODES if "[" not in form])
@pytest.mark.parametrize("w", [0.0, 1.0])
def test_base_and_tuned_model_are_themselves(sd3: Policy, text: str, w: float) -> None:
    x, evaluations = latents(sd3, text, w, sampler="sde")
    assert text in ("tuned", "interval:0.3:0.9") or evaluations == 4
    if text not in ("tuned", "interval:0.3:0.9"):  # an interval at w = 0 is the tuned model outside
        models = models_of(sd3)
        one = models.base if w == 0 else models.tuned
        assert torch.equal(x, sampled(sd3, one, sd3.schedule(4, "sde", 0.7)))


@pytest.mark.parametrize(
    "text", ["reuse:1", "reuse:1:linear+batch", "reuse_at:0,1,2,3", "interval:0:1", "scaled_but:0,1,2,3:carry"]
)
def test_approximations_that_leave_nothing_out_are_full_guidance(sd3: Policy, text: str) -> None:
    torch.testing.assert_close(latents(sd3, text, 2.5)[0], reference(sd3, 2.5), rtol=1e-3, atol=1e-4)


def by_hand(policy: Policy, w: float, d_of: Callable[[int, Tensor, list[Tensor]], Tensor], steps: int = 5) -> Tensor:
    """tuned + (w - 1) d with a d that may look at the differences along this very trajectory."""
    models, schedule = models_of(policy), policy.schedule(steps, "ode", 0.7)
    seen: list[Tensor] = []

    def predict(x: Tensor, t_B: Tensor, cond: object) -> Tensor:
        tuned = models.tuned(x, t_B, cond)
        seen.append(tuned - models.base(x, t_B, cond))
        return tuned + (w - 1) * d_of(len(seen) - 1, t_B[0], seen)

    return sampled(policy, predict, schedule)


def test_what_is_kept_between_refreshes(sd3: Policy) -> None:
    t = sd3.schedule(5, "ode", 0.7).t

    def line(i: int, now: Tensor, d: list[Tensor]) -> Tensor:
        if i % 2 == 0:
            return d[i]
        last, before = i - 1, i - 3
        return d[0] if i == 1 else d[last] + (d[last] - d[before]) * (now - t[last]) / (t[last] - t[before])

    cases = {
        "reuse:2": (lambda i, now, d: d[i - i % 2], 8),
        "reuse:3+batch": (lambda i, now, d: d[i - i % 3], 7),
        "reuse:2:linear": (line, 8),
        "reuse_at:1,3": (lambda i, now, d: d[min(3, i - (i + 1) % 2)] if i else 0 * d[0], 7),
        "interval:0.8:1": (lambda i, now, d: d[i] if 0.8 < now / 1000 <= 1 else 0 * d[0], None),
    }
    full = reference(sd3, 2.0, steps=5)
    for text, (rule, evaluations) in cases.items():
        x, spent = latents(sd3, text, 2.0, steps=5)
        torch.testing.assert_close(x, by_hand(sd3, 2.0, rule), rtol=1e-3, atol=1e-4, msg=lambda m, t=text: f"{t}: {m}")
        assert evaluations is None or spent == evaluations
        assert (x - full).abs().max() > 1e-3


def test_a_scaled_lora_is_right_to_first_order(sd3: Policy) -> None:
    models, schedule = models_of(sd3), sd3.schedule(4, "ode", 0.7)
    x = SampleNoise(IDS, sd3.latent_shape()).initial()
    call = x, sampling.times(schedule, 1, 2), sd3.encode(TEXTS)
    missed = []
    with torch.no_grad():
        for size in (0.1, 0.05):
            with lora.scaled(sd3.network, size):
                scaled = Mode.parse("scaled").begin(models, 2.0, schedule, IDS)(*call)
                missed.append((scaled - rlg(models.base, models.tuned, 2.0)(*call)).norm())
        with lora.scaled(sd3.network, 1.5):
            expected = models.tuned(*call)
        assert torch.equal(Mode.parse("scaled:0.5").begin(models, 2.0, schedule, IDS)(*call), expected)
    assert 3 < missed[0] / missed[1] < 5  # second order: a quarter at half the size
    assert latents(sd3, "scaled_but:0,2", 2.0)[1] == 6


def test_what_a_scaled_lora_missed_is_carried(sd3: Policy) -> None:
    models, schedule = models_of(sd3), sd3.schedule(4, "ode", 0.7)
    missed: list[Tensor] = []

    def predict(x: Tensor, t_B: Tensor, cond: object) -> Tensor:
        scaled = models.scaled(2.0, x, t_B, cond)
        missed.append(rlg(models.base, models.tuned, 2.0)(x, t_B, cond) - scaled)
        return scaled + missed[min(1, len(missed) - 1)]

    x, evaluations = latents(sd3, "scaled_but:0,1:carry", 2.0)
    torch.testing.assert_close(x, sampled(sd3, predict, schedule), rtol=1e-3, atol=1e-4)
    assert evaluations == 2 + 3 + 1 + 1  # the pass that is compared with runs only where its result is used


def test_one_branch_under_cfg(policy: Policy) -> None:
    models, schedule = models_of(policy, 3.0), policy.schedule(4, "ode", 0.7)
    cond, empty = policy.encode(TEXTS), policy.encode([""]).expand(2)
    x, t_B = SampleNoise(IDS, policy.latent_shape()).initial(), sampling.times(schedule, 0, 2)
    with torch.no_grad():
        d, d_empty = (policy.predict(x, t_B, c) - policy.reference(x, t_B, c) for c in (cond, empty))
        tuned, full = models.tuned(x, t_B, cond), rlg(models.base, models.tuned, 2.0)(x, t_B, cond)
        torch.testing.assert_close(full, tuned + 3 * d - 2 * d_empty, rtol=1e-3, atol=1e-4)
        for text, expected in (("conditional", tuned + 3 * d), ("conditional:equal", tuned + d)):
            models.evaluations = 0
            out = Mode.parse(text).begin(models, 2.0, schedule, IDS)(x, t_B, cond)
            torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
            assert models.evaluations == 3 * 2
    with pytest.raises(ValueError, match="CFG scale is 1"):
        latents(policy, "conditional", 2.0)


def test_one_model_a_step_is_drawn_by_the_sample(sd3: Policy) -> None:
    x, evaluations = latents(sd3, "random", 0.5, sampler="sde", steps=6)
    assert evaluations == 6
    assert torch.equal(latents(sd3, "random", 0.5, sampler="sde", steps=6)[0], x)
    for w in (0.0, 1.0):
        assert not torch.equal(latents(sd3, "random", w, sampler="sde", steps=6)[0], x)
    for w, sampler in ((2.0, "sde"), (0.5, "ode")):
        with pytest.raises(ValueError, match="random"):
            latents(sd3, "random", w, sampler=sampler)


@pytest.mark.parametrize("text", ["reuse:2", "reuse_at:0", "scaled_but:0:carry"])
def test_a_memory_is_of_one_trajectory(sd3: Policy, text: str) -> None:
    schedule = sd3.schedule(4, "ode", 0.7)
    predict = Mode.parse(text).begin(models_of(sd3), 2.0, schedule, IDS)
    first = sampled(sd3, predict, schedule)
    assert torch.equal(sampled(sd3, predict, schedule), first)  # a call at the first time begins anew
    assert torch.equal(sampled(sd3, predict, schedule, IDS[:1]), latents_of_one(sd3, text, schedule))
    x, cond = SampleNoise(IDS, sd3.latent_shape()).initial(), sd3.encode(TEXTS)
    with torch.no_grad():
        predict(x, sampling.times(schedule, 0, 2), cond)
        predict(x, sampling.times(schedule, 1, 2), cond)
        with pytest.raises(ValueError, match="evaluates a step several times"):  # Heun: the same time again
            predict(x, sampling.times(schedule, 1, 2), cond)
        predict(x, sampling.times(schedule, 0, 2), cond)
        with pytest.raises(ValueError, match="batch of 1"):
            predict(x[:1], sampling.times(schedule, 1, 1), cond[:1])


def latents_of_one(policy: Policy, text: str, schedule: Schedule) -> Tensor:
    return sampled(policy, Mode.parse(text).begin(models_of(policy), 2.0, schedule, IDS[:1]), schedule, IDS[:1])


@pytest.mark.parametrize("one_batch", [False, True])
def test_a_sweep_shares_its_first_step(policy: Policy, one_batch: bool) -> None:
    scales, schedule = [0.0, 0.5, 1.0, 2.0], policy.schedule(3, "ode", 0.7)
    ids = [each for each in IDS for _ in scales]
    w_B = torch.tensor(scales * 2)
    counts, made = [], []
    for shared in (True, False):
        models = models_of(policy)
        predict = sweep(models, w_B, schedule, ids, one_batch) if shared else rlg(models.base, models.tuned, w_B)
        made.append(sampled(policy, predict, schedule, ids))
        counts.append(models.evaluations)
    torch.testing.assert_close(made[0], made[1], rtol=1e-3, atol=1e-4)
    assert counts == [2 * 2 + 2 * 12, 3 * 12]  # two images, both models; then 2 + 4 + ... by weight, at two steps


@pytest.mark.numerics
def test_rows_of_a_batch_have_their_own_lora(policy: Policy) -> None:
    x, cond, t_B = SampleNoise(IDS, policy.latent_shape()).initial(), policy.encode(TEXTS), torch.full((2,), 500.0)
    with torch.no_grad():
        with lora.rows(policy.network, torch.tensor([0.0, 1.5])):
            out = policy.predict(x, t_B, cond)
        with lora.scaled(policy.network, 1.5):
            scaled = policy.predict(x, t_B, cond)
        torch.testing.assert_close(out[0], policy.reference(x, t_B, cond)[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(out[1], scaled[1], rtol=1e-3, atol=1e-4)
        with (
            pytest.raises(ValueError, match="3 factors of the LoRA for a batch of 2"),
            lora.rows(policy.network, torch.ones(3)),
        ):
            policy.predict(x, t_B, cond)
        assert torch.equal(policy.predict(x, t_B, cond), policy.predict(x, t_B, cond))


@pytest.mark.parametrize(
    "text",
    [
        *("full", "tuned", "full+batch", "reuse:4", "reuse:2:linear+batch", "reuse_at:0,3", "reuse_at:1,2:linear"),
        *("scaled", "scaled:0.85", "scaled_but:0", "scaled_but:0,2:carry", "interval:0.5:1", "conditional:equal"),
    ],
)
def test_names_are_read_and_written(text: str) -> None:
    assert str(Mode.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "fast",
        "reuse",
        "reuse:0",
        "reuse:x",
        "reuse_at:-1",
        "reuse_at:",
        "scaled:nan",
        "tuned+batch",
        "full+batch+batch",
        "interval:2:3",
        "conditional:linear",
        "reuse:2:carry",
        "scaled_but",
        "full:2",
    ],
)
def test_bad_names(text: str) -> None:
    with pytest.raises(ValueError, match=r"mode") as error:
        Mode.parse(text)
    assert text in str(error.value)


def test_modes_that_do_not_fit(sd3: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no step 4, the 4 steps"):
        latents(sd3, "reuse_at:0,4", 2.0)
    with pytest.raises(ValueError, match="must be finite"):
        latents(sd3, "full", float("nan"))
    monkeypatch.setattr(sd3, "tuned", sd3.network)  # stands for a full network
    for text in ("full+batch", "scaled", "scaled_but:0"):
        with pytest.raises(ValueError, match="full network"):
            latents(sd3, text, 2.0)
