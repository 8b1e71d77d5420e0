"""Guidance: what w = 0 and w = 1 are, which passes are really made, and the formula for one expert and for several."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import make_schedule
from rlg.diffusion.sampling import SampleId, SampleNoise, sample
from rlg.guidance.guided import Guided, check_finite, interval, rlg, with_cfg
from rlg.guidance.weight_schedule import WeightSchedule
from rlg.models.policy import Policy

PROMPTS = ("a red circle", "two blue crosses", "a green square")


class Recorder:
    """A predictor of a fixed gain that keeps the rows it was called with (a row's first condition names it)."""

    def __init__(self, gain: float):
        self.gain = gain
        self.calls: list[list[int]] = []

    def __call__(self, x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
        assert len(x_BCHW) == len(t_B) == len(cond)
        self.calls.append(cond.tensors["row"].tolist())
        return self.gain * x_BCHW + cond.tensors["row"].reshape(-1, 1, 1, 1)


def batch(size: int = 4) -> tuple[Tensor, Tensor, Conditioning]:
    x = torch.randn(size, 2, 3, 3, generator=torch.Generator().manual_seed(size))
    return x, torch.full((size,), 7.0), Conditioning({"row": torch.arange(size)})


def latents(policy: Policy, predict: Callable) -> Tensor:
    """Final latents of three stochastic steps."""
    noise = SampleNoise([SampleId(0, i, 0) for i in range(len(PROMPTS))], policy.latent_shape())
    return sample(predict, policy.schedule(3, "sde", 0.7), policy.encode(PROMPTS), noise)


@pytest.mark.numerics
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_w0_is_the_base_and_w1_is_the_tuned_model_bitwise(
    family: str, cfg: float, tiny_policy: Callable[..., Policy]
) -> None:
    policy = tiny_policy(family)
    negative = policy.encode([""])
    base, tuned = (with_cfg(predict, negative, cfg) for predict in (policy.reference, policy.predict))
    expected = [latents(policy, predict) for predict in (base, tuned)]
    assert (expected[0] - expected[1]).abs().max() > 1e-3  # else the test would show nothing
    for w, latents_BCHW in zip((0, 1), expected, strict=True):
        for weight in (w, float(w), torch.tensor(float(w)), torch.full((3,), float(w)), lambda t, w=w: w):
            assert torch.equal(latents(policy, rlg(base, tuned, weight)), latents_BCHW)


def test_weights_between_and_beyond_follow_the_formula(family: str, tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy(family)
    x = SampleNoise([SampleId(0, i, 0) for i in range(3)], policy.latent_shape()).initial()
    t_B, cond = torch.full((3,), 500.0), policy.encode(PROMPTS)
    with torch.no_grad():
        base, tuned = policy.reference(x, t_B, cond), policy.predict(x, t_B, cond)
        for w in (-0.5, 0.3, 2.0):
            guided = rlg(policy.reference, policy.predict, w)(x, t_B, cond)
            torch.testing.assert_close(guided, base + w * (tuned - base), rtol=1e-5, atol=1e-5)


def test_a_weight_per_sample_equals_one_run_per_weight(family: str, tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy(family)
    weights = [0.0, 0.4, 1.0]
    together = latents(policy, rlg(policy.reference, policy.predict, torch.tensor(weights)))
    alone = [latents(policy, rlg(policy.reference, policy.predict, w)) for w in weights]
    for i in range(3):
        torch.testing.assert_close(together[i], alone[i][i], rtol=1e-4, atol=1e-4)
        assert (alone[i][i] - alone[i - 1][i]).abs().max() > 1e-3  # else the test would show nothing


@pytest.mark.parametrize(("w", "base_rows", "tuned_rows"), [(0.0, [0, 1, 2, 3], None), (1.0, None, [0, 1, 2, 3])])
def test_one_pass_at_w0_and_at_w1(w: float, base_rows: list[int] | None, tuned_rows: list[int] | None) -> None:
    base, tuned = Recorder(1.0), Recorder(3.0)
    guided = rlg(base, tuned, w)
    guided(*batch())
    assert base.calls == ([] if base_rows is None else [base_rows])
    assert tuned.calls == ([] if tuned_rows is None else [tuned_rows])
    assert guided.passes(7.0, 4).tolist() == [1, 1, 1, 1]


def test_passes_are_made_for_the_samples_that_need_them() -> None:
    base, tuned = Recorder(1.0), Recorder(3.0)
    guided = rlg(base, tuned, torch.tensor([0.0, 1.0, 2.0, 0.0]))
    x, t_B, cond = batch()
    outputs = guided.with_base(x, t_B, cond)
    out, base_out, known_B = outputs.out_BCHW, outputs.base_BCHW, outputs.known_B
    assert base.calls == [[0, 2, 3]]
    assert tuned.calls == [[1, 2]]
    assert guided.passes(7.0, 4).tolist() == [1, 1, 2, 1]
    made = len(base.calls[0]) + len(tuned.calls[0])
    assert int(guided.passes(7.0, 4).sum()) == made
    rows = torch.arange(4.0).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(out, x * torch.tensor([1.0, 3.0, 5.0, 1.0]).reshape(-1, 1, 1, 1) + rows)
    assert known_B.tolist() == [True, False, True, True]
    torch.testing.assert_close(base_out[known_B], (x + rows)[known_B])
    assert not base_out[~known_B].any()


def test_w_as_a_function_of_t() -> None:
    weight = interval(2.0, low=100.0, high=400.0)
    assert [weight(t) for t in (100.0, 100.5, 400.0, 401.0)] == [1.0, 2.0, 2.0, 1.0]
    base, tuned = Recorder(1.0), Recorder(3.0)
    guided = rlg(base, tuned, weight)
    x, _, cond = batch()
    inside, outside = (guided(x, torch.full((4,), t), cond) for t in (300.0, 500.0))
    rows = torch.arange(4.0).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(inside, 5.0 * x + rows)
    torch.testing.assert_close(outside, 3.0 * x + rows)
    assert (len(base.calls), len(tuned.calls)) == (1, 2)
    assert guided.passes(300.0, 4).tolist() == [2] * 4
    assert guided.passes(500.0, 4).tolist() == [1] * 4


def test_several_experts_follow_the_formula() -> None:
    gains, weights = (3.0, -2.0), (0.8, 1.5)
    base, experts = Recorder(1.0), tuple(Recorder(gain) for gain in gains)
    guided = Guided(base, experts, weights)
    x, t_B, cond = batch()
    expected = x + sum(w * (gain - 1.0) * x for w, gain in zip(weights, gains, strict=True))
    torch.testing.assert_close(guided(x, t_B, cond), expected + torch.arange(4.0).reshape(-1, 1, 1, 1))
    assert guided.passes(7.0, 4).tolist() == [3] * 4
    assert len(base.calls) == 1


@pytest.mark.parametrize("weights", [(0.25, 0.75), (0.7, 0.2, 0.1), (0.1,) * 10, (1 / 3,) * 3, (0.9, 0.05, 0.05)])
def test_the_base_drops_out_on_the_simplex(weights: tuple[float, ...]) -> None:
    """DB-MPA: weights that sum to one, up to rounding, need no base pass."""
    base, experts = Recorder(1.0), tuple(Recorder(float(k)) for k in range(len(weights)))
    guided = Guided(base, experts, weights)
    x, t_B, cond = batch()
    out = guided(x, t_B, cond)
    assert base.calls == []
    assert guided.passes(7.0, 4).tolist() == [len(weights)] * 4
    mixed = sum(w * k for k, w in enumerate(weights)) * x
    torch.testing.assert_close(out, mixed + torch.arange(4.0).reshape(-1, 1, 1, 1), rtol=1e-5, atol=1e-5)


def test_an_expert_of_weight_zero_is_not_called() -> None:
    base, experts = Recorder(1.0), (Recorder(2.0), Recorder(3.0))
    guided = Guided(base, experts, (0.0, 0.5))
    guided(*batch())
    assert [len(r.calls) for r in (base, *experts)] == [1, 0, 1]
    assert guided.passes(7.0, 4).tolist() == [2] * 4


@pytest.mark.parametrize("w", [float("nan"), float("inf"), -float("inf"), torch.tensor([1.0, float("nan")])])
def test_a_weight_that_is_not_finite_is_refused(w: float | Tensor) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        rlg(Recorder(1.0), Recorder(2.0), w)
    with pytest.raises(ValueError, match="must be finite"):
        check_finite(w)


def test_a_function_whose_value_is_not_finite_is_refused_when_it_is_called() -> None:
    guided = rlg(Recorder(1.0), Recorder(2.0), lambda t: float("nan"))
    with pytest.raises(ValueError, match=r"must be finite, got nan at t=7"):
        guided(*batch())


def test_a_wrong_number_of_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="2 experts need as many weights, got 1"):
        Guided(Recorder(1.0), (Recorder(2.0), Recorder(3.0)), (0.5,))
    with pytest.raises(ValueError, match="3 guidance weights for a batch of 4"):
        rlg(Recorder(1.0), Recorder(2.0), torch.ones(3))(*batch())


def test_cfg_is_one_call_of_twice_the_batch_and_equals_two_calls() -> None:
    network = Recorder(2.0)
    negative = Conditioning({"row": torch.tensor([-5])})
    x, t_B, cond = batch()
    out = with_cfg(network, negative, 4.0)(x, t_B, cond)
    assert network.calls == [[-5] * 4 + [0, 1, 2, 3]]
    conditional, unconditional = network(x, t_B, cond), network(x, t_B, negative.expand(4))
    torch.testing.assert_close(out, unconditional + 4.0 * (conditional - unconditional))


def test_cfg_equals_two_calls_of_the_network(family: str, tiny_policy: Callable[..., Policy]) -> None:
    policy = tiny_policy(family)
    x = SampleNoise([SampleId(0, i, 0) for i in range(3)], policy.latent_shape()).initial()
    t_B, cond, negative = torch.full((3,), 500.0), policy.encode(PROMPTS), policy.encode([""])
    with torch.no_grad():
        out = with_cfg(policy.predict, negative, 3.0)(x, t_B, cond)
        conditional, unconditional = policy.predict(x, t_B, cond), policy.predict(x, t_B, negative.expand(3))
    assert (conditional - unconditional).abs().max() > 1e-4
    torch.testing.assert_close(out, unconditional + 3.0 * (conditional - unconditional), rtol=1e-4, atol=1e-5)


def test_cfg_of_scale_one_is_the_bare_predictor() -> None:
    network = Recorder(2.0)
    predict = with_cfg(network, Conditioning({"row": torch.tensor([-5])}), 1.0)
    predict(*batch())
    assert network.calls == [[0, 1, 2, 3]]


# --- schedules of w (rlg.guidance.weight_schedule)

FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
ALPHAS = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}


def weights(text: str, config: dict, w: float, steps: int = 5) -> list[float]:
    """w at each step."""
    schedule = make_schedule(config, steps)
    weight = WeightSchedule.parse(text).over(schedule, torch.tensor([w]))
    return [float(weight(t)) if callable(weight) else float(weight) for t in schedule.t.tolist()]


@pytest.mark.parametrize("config", [FLOW, ALPHAS], ids=["flow", "ddim"])
def test_schedules_of_w_follow_their_formulas(config: dict) -> None:
    t, w = make_schedule(config, 5).t.tolist(), 3.0
    share = [time / t[0] for time in t]
    assert weights("constant", config, w) == [3.0] * 5
    assert weights("linear_down", config, w) == pytest.approx([1 + s * 2 for s in share])
    assert weights("linear_up", config, w) == pytest.approx([3 - s * 2 for s in share])
    assert weights("linear_down", config, w)[0] == 3.0 and weights("linear_up", config, w)[0] == 1.0  # exactly
    assert weights("linear_down", config, w) == sorted(weights("linear_down", config, w), reverse=True)
    for text in ("constant", "linear_down", "linear_up", "interval:0.2:0.7"):
        assert weights(text, config, 1.0) == [1.0] * 5


def test_an_interval_is_open_below_and_closed_above() -> None:
    """A step at each thousandth; fp32 stores 0.6 and 0.2 a little too large."""
    even = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}
    schedule = make_schedule(even, 1000)
    sigma = schedule.sigma[:-1].tolist()
    shares = WeightSchedule.parse("interval:0.2:0.6").shares(schedule)
    inside = [round(s, 3) for s, share in zip(sigma, shares, strict=True) if share]
    assert (inside[0], inside[-1], len(inside)) == (0.6, 0.201, 400)
    assert weights("interval:0.5:0.5", even, 3.0) == [1.0] * 5  # empty
    assert weights("interval:0:1", even, 3.0) == [3.0] * 5


def test_an_interval_of_noise_levels_reads_sigma_and_not_t() -> None:
    sigma = make_schedule(ALPHAS, 5).sigma[:-1].tolist()
    assert weights("interval:0.5:0.9", ALPHAS, 3.0) == [3.0 if 0.5 < s <= 0.9 else 1.0 for s in sigma]
    assert len(set(weights("interval:0.5:0.9", ALPHAS, 3.0))) == 2


def test_samples_of_a_batch_keep_their_own_w_under_a_schedule() -> None:
    schedule, w_B = make_schedule(FLOW, 4), torch.tensor([0.0, 1.0, 3.0, -1.0])
    base, tuned = Recorder(1.0), Recorder(3.0)
    guided = rlg(base, tuned, WeightSchedule.parse("interval:0:0.9").over(schedule, w_B))
    first, last = schedule.t[0].item(), schedule.t[-1].item()
    x, _, cond = batch()
    guided(x, torch.full((4,), first), cond)
    assert (base.calls, tuned.calls) == ([], [[0, 1, 2, 3]])  # outside: the tuned model alone
    assert guided.passes(first, 4).tolist() == [1] * 4
    out = guided(x, torch.full((4,), last), cond)
    assert base.calls == [[0, 2, 3]] and guided.passes(last, 4).tolist() == [1, 1, 2, 2]
    rows = torch.arange(4.0).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(out, x * (1 + 2 * w_B).reshape(-1, 1, 1, 1) + rows)


@pytest.mark.parametrize("text", ["constant", "linear_up", "linear_down", "interval:0.25:0.8"])
def test_a_schedule_reads_back_as_it_is_written(text: str) -> None:
    assert str(WeightSchedule.parse(text)) == text
    assert str(WeightSchedule.parse("interval:.250:0.80")) == "interval:0.25:0.8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear", "unknown schedule of w 'linear'; known: constant, interval:LOW:HIGH, linear_down, linear_up"),
        ("constant:2", "unknown schedule"),
        ("interval", "unknown schedule"),
        ("interval:0.5", "unknown schedule"),
        ("interval:a:b", "must be numbers"),
        ("interval:0.8:0.2", "0 <= LOW <= HIGH <= 1"),
        ("interval:100:400", "0 <= LOW <= HIGH <= 1"),
        ("interval:nan:1", "0 <= LOW <= HIGH <= 1"),
    ],
)
def test_a_schedule_with_mistakes_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WeightSchedule.parse(text)
