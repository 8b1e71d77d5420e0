"""The tables of rlg.diffusion.process against diffusers' own schedulers, published formulas, and Gaussians."""

from __future__ import annotations

import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.integrate import quad

from rlg.diffusion import process
from rlg.guidance.guided import rlg

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SD15 = {"_class_name": "PNDMScheduler", **BETAS, "steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}


def vp(kind: str = "epsilon") -> dict:
    return {**SD15, "prediction_type": kind}


def state(seed: int = 0, shape: tuple[int, ...] = (3, 4, 8, 8)) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, out, z = torch.randn(3, *shape, generator=generator)
    return x, out, z


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_step_is_diffusers_step(kind: str, eta: float) -> None:
    scheduler = DDIMScheduler.from_config(vp(kind))
    scheduler.set_timesteps(20)
    schedule = process.make_schedule(vp(kind), 20, "sde" if eta else "ode", eta)
    x, out, z = state()
    for i, t in enumerate(scheduler.timesteps):
        ours = process.step(schedule, i, x, out, z if eta else None)
        theirs = scheduler.step(out, t, x, eta=eta, variance_noise=z if eta else None)
        torch.testing.assert_close(ours, theirs.prev_sample, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            process.predict_x0(schedule, i, x, out), theirs.pred_original_sample, rtol=1e-4, atol=1e-4
        )


def euler_end(config: dict, steps: int, kind: str = "EulerDiscreteScheduler") -> tuple[torch.Tensor, torch.Tensor]:
    """(x_T, x_0) of diffusers' own loop with a constant output, in the coordinates alpha x0 + sigma noise."""
    scheduler = getattr(diffusers, kind).from_config(config)
    scheduler.set_timesteps(steps)
    x, out, _ = state()
    sigma = scheduler.sigmas[0]
    moving = x * (1 + sigma**2).sqrt()  # Euler's coordinate is x0 + sigma noise
    for t in scheduler.timesteps:
        scheduler.scale_model_input(moving, t)
        moving = scheduler.step(out, t, moving).prev_sample
    end = float(scheduler.sigmas[-1])
    return x, moving / math.sqrt(1 + end**2)


@pytest.mark.parametrize(
    ("name", "options", "final"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": True}, 1.0),
        ("DDIMScheduler", {"set_alpha_to_one": False}, None),
        ("DDIMScheduler", {}, 1.0),
        ("PNDMScheduler", {}, None),
        ("DDPMScheduler", {}, 1.0),
        ("EulerDiscreteScheduler", {}, 1.0),
        ("EulerDiscreteScheduler", {"set_alpha_to_one": False}, 1.0),  # SDXL's file says so, to a class that has none
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}, None),
        ("DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}, 1.0),
    ],
)
def test_an_ode_ends_where_the_scheduler_does(name: str, options: dict, final: float | None) -> None:
    """diffusers: final_alpha_cumprod, prev_t < 0 or sigmas[-1] of each class; None is abar of the first time."""
    config = {"_class_name": name, **BETAS, "steps_offset": 1, "clip_sample": False, **options}
    first = float(DDIMScheduler.from_config(config).alphas_cumprod[0])
    schedule = process.make_schedule(config, 20, "ode")
    assert float(schedule.alpha[-1]) ** 2 == pytest.approx(final or first, abs=1e-6)
    assert float(process.make_schedule(config, 20, "sde").alpha[-1]) ** 2 == pytest.approx(first, abs=1e-6)
    window = process.make_schedule(config, 20, "sde", 1.0, (2, 5))
    assert float(window.alpha[-1]) == float(schedule.alpha[-1])  # its last step has no noise


def test_the_ode_of_sdxls_own_scheduler_is_diffusers_euler_to_the_end() -> None:
    config = {
        "_class_name": "EulerDiscreteScheduler",
        **BETAS,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
        "set_alpha_to_one": False,
        "clip_sample": False,
    }
    x, expected = euler_end(config, 10)
    _, out, _ = state()
    schedule = process.make_schedule(config, 10, "ode")
    for i in range(10):
        x = process.step(schedule, i, x, out, None)
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kernel", ["ode", "sde"])
def test_zero_terminal_snr_of_a_model_of_noise_is_finite_as_diffusers_euler(kernel: str) -> None:
    config = {
        "_class_name": "EulerDiscreteScheduler",
        **BETAS,
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
        "clip_sample": False,
    }
    schedule = process.make_schedule(config, 4, kernel)
    assert all(getattr(schedule, name).isfinite().all() for name in ("a_x", "a_out", "std", "x0_x", "x0_out"))
    forward = process.process_from_config(config)
    assert process.clean(forward, torch.tensor([999]), *(t[:1] for t in state()[:2])).isfinite().all()
    if kernel == "ode":
        x, expected = euler_end(config, 4)
        for i in range(4):
            x = process.step(schedule, i, x, state()[1], None)
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-2 * float(expected.abs().max()))
    velocity = process.make_schedule(config | {"prediction_type": "v_prediction"}, 4, kernel)
    assert float(velocity.alpha[0]) == 0  # a velocity says what x0 is there, too


def test_flow_schedules_of_multistep_solvers_are_shifted() -> None:
    solver = {"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction", "flow_shift": 3.0}
    ours, expected = (process.make_schedule(config, 10, "ode") for config in (solver, FLOW))
    torch.testing.assert_close(ours.sigma, expected.sigma)


def test_flow_ode_is_diffusers_euler_step() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(FLOW)
    scheduler.set_timesteps(10)
    schedule = process.make_schedule(FLOW, 10, "ode")
    x, out, _ = state()
    for i, t in enumerate(scheduler.timesteps):
        theirs = scheduler.step(out, t, x).prev_sample
        torch.testing.assert_close(process.step(schedule, i, x, out, None), theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(schedule.t, scheduler.timesteps)


def flow_grpo_reference(x, out, z, sigma, sigma_next, sigma_second, level):
    """yifan123/flow_grpo, diffusers_patch/sd3_sde_with_logprob.py, written from its formula."""
    dt = sigma_next - sigma
    std = math.sqrt(sigma / (1 - (sigma_second if sigma == 1 else sigma))) * level
    mean = x * (1 + std**2 / (2 * sigma) * dt) + out * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    scale = std * math.sqrt(-dt)
    x_next = mean + scale * z
    logp = -((x_next - mean) ** 2) / (2 * scale**2) - math.log(scale) - 0.5 * math.log(2 * math.pi)
    return x_next, logp.mean(dim=(1, 2, 3))


def test_flow_sde_log_prob_is_flow_grpos() -> None:
    schedule = process.make_schedule(FLOW, 10, "sde", 0.7)
    sigmas = schedule.sigma.double().tolist()
    x, out, z = (tensor.double() for tensor in state())
    for i in range(10):
        x_next, logp = flow_grpo_reference(x, out, z, sigmas[i], sigmas[i + 1], sigmas[1], 0.7)
        torch.testing.assert_close(process.step(schedule, i, x, out, z).float(), x_next.float(), rtol=1e-5, atol=1e-5)
        ours = process.log_prob(schedule, i, x, out, x_next)
        torch.testing.assert_close(ours.double(), logp, rtol=1e-5, atol=2e-6)


def test_ddim_log_prob_is_ddpo_pytorchs() -> None:
    """kvablack/ddpo-pytorch, ddim_with_logprob.py, written from its formula: prev_t is clamped to 0."""
    steps, eta = 50, 1.0
    scheduler = DDIMScheduler.from_config(vp())
    scheduler.set_timesteps(steps)
    abar = scheduler.alphas_cumprod.double()
    schedule = process.make_schedule(vp(), steps, "sde", eta)
    x, out, z = (tensor.double() for tensor in state())
    for i in (0, 10, 25, 48, 49):
        t = int(scheduler.timesteps[i])
        a, s = abar[t], abar[max(t - 1000 // steps, 0)]
        sigma = eta * torch.sqrt((1 - s) / (1 - a)) * torch.sqrt(1 - a / s)
        x0 = (x - (1 - a).sqrt() * out) / a.sqrt()
        mean = s.sqrt() * x0 + (1 - s - sigma**2).sqrt() * out
        x_next = mean + sigma * z
        logp = -((x_next - mean) ** 2) / (2 * sigma**2) - sigma.log() - 0.5 * math.log(2 * math.pi)
        assert sigma > 0
        ours = process.log_prob(schedule, i, x, out, x_next)
        # at the last step std is 2e-3, so fp32 states alone move the density by 1e-3
        tolerance = 1e-5 if i < 48 else 5e-3
        torch.testing.assert_close(ours.double(), logp.mean(dim=(1, 2, 3)), rtol=tolerance, atol=tolerance)


def test_cps_keeps_the_coefficients() -> None:
    """Flow-CPS: alpha' and the total noise level after a step are those of the ODE, whatever the level."""
    schedule = process.make_schedule(FLOW, 10, "cps", 0.8)
    x, out, _ = state()
    for i in range(10):
        sigma, after = schedule.sigma[i], schedule.sigma[i + 1]
        std = after * math.sin(0.8 * math.pi / 2)
        x0, noise = x - sigma * out, x + (1 - sigma) * out
        expected = (1 - after) * x0 + (after**2 - std**2).clamp(min=0).sqrt() * noise
        torch.testing.assert_close(process.mean(schedule, i, x, out), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(schedule.std[i], std)
    assert schedule.std[-1] == 0


@pytest.mark.parametrize("config", [vp(), vp("v_prediction"), vp("sample"), FLOW], ids=["eps", "v", "x0", "flow"])
def test_training_pair_round_trip(config: dict) -> None:
    """From (x_t, target) the schedule's own x0 formula returns x0."""
    forward, schedule = process.process_from_config(config), process.make_schedule(config, 10)
    x0, eps, _ = state()
    for i in range(10):
        row = int((forward.time - schedule.t[i]).abs().argmin())
        if abs(float(forward.time[row] - schedule.t[i])) > 1e-3 or forward.alpha[row] < 1e-3:
            continue  # flow sigmas between the 1000 training times, and pure noise, which says nothing of x0
        x_t, target = process.noise(forward, torch.full((3,), row), x0, eps)
        torch.testing.assert_close(process.predict_x0(schedule, i, x_t, target), x0, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("w", [-0.5, 0.3, 2.0])
def test_mixing_is_the_same_in_every_parameterisation(w: float) -> None:
    """eps-, v- and x0-mixing give one x_next: the weights sum to one and the maps are affine."""
    results = []
    x, base_x0, tuned_x0 = state()
    for kind in ("epsilon", "v_prediction", "sample"):
        schedule = process.make_schedule(vp(kind), 10, "sde", 1.0)
        i = 4
        base, tuned = ((x0 - schedule.x0_x[i] * x) / schedule.x0_out[i] for x0 in (base_x0, tuned_x0))
        results.append(process.mean(schedule, i, x, base + w * (tuned - base)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-4)


def test_guided_kernel_is_the_geometric_mean_of_the_kernels() -> None:
    schedule = process.make_schedule(FLOW, 10, "sde", 0.7)
    x, base, tuned = state()
    w, i = 1.7, 3
    guided = base + w * (tuned - base)
    points = [process.step(schedule, i, x, guided, z) for z in state(1)[:2]]

    def unnormalised(out: torch.Tensor, x_next: torch.Tensor) -> torch.Tensor:
        return process.log_prob(schedule, i, x, out, x_next)

    geometric = [(1 - w) * unnormalised(base, p) + w * unnormalised(tuned, p) for p in points]
    direct = [unnormalised(guided, p) for p in points]
    torch.testing.assert_close(geometric[0] - geometric[1], direct[0] - direct[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", [vp(), FLOW], ids=["eps", "flow"])
def test_kl_is_the_divergence_of_the_two_gaussians(config: dict) -> None:
    schedule = process.make_schedule(config, 10, "sde", 0.7)
    x, out, reference = state()
    i = 5
    normal = torch.distributions.Normal
    p = normal(process.mean(schedule, i, x, out), schedule.std[i])
    q = normal(process.mean(schedule, i, x, reference), schedule.std[i])
    expected = torch.distributions.kl_divergence(p, q).mean(dim=(1, 2, 3))
    torch.testing.assert_close(process.kl(schedule, i, out, reference), expected, rtol=1e-4, atol=1e-6)
    scaled = process.kl(schedule, i, out, reference, per_time=True)
    torch.testing.assert_close(scaled, expected * schedule.dt[i], rtol=1e-4, atol=1e-6)


def test_kl_carries_gradient_to_the_policy() -> None:
    schedule = process.make_schedule(FLOW, 10, "sde", 0.7)
    _, out, reference = state()
    out.requires_grad_(True)
    process.kl(schedule, 2, out, reference).sum().backward()
    assert out.grad is not None and float(out.grad.abs().sum()) > 0


# --- Gaussians -------------------------------------------------------------------------------------
# base N(0, 1), tuned N(m, s2), one dimension: every network output is affine in x, so the moments of the sampler can
# be followed exactly through the real tables, and compared with the continuous-time law (derivation below).


def gaussian_output(config: dict, alpha: float, sigma: float, m: float, s2: float, x: torch.Tensor) -> torch.Tensor:
    """The ideal network's output for data N(m, s2)."""
    x0 = m + alpha * s2 / (alpha**2 * s2 + sigma**2) * (x - alpha * m)
    eps = sigma / (alpha**2 * s2 + sigma**2) * (x - alpha * m)
    return eps - x0 if process._is_flow(config) else eps


def guided_moments(config: dict, steps: int, kernel: str, level: float, w: float, m: float, s2: float) -> tuple:
    """(mean, variance) of the samples that RLG draws from exact models with the real schedule."""
    schedule = process.make_schedule(config, steps, kernel, level)
    mean, variance = 0.0, 1.0
    points = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    for i in range(steps):
        sigma = float(schedule.sigma[i])
        alpha = 1 - sigma if process._is_flow(config) else math.sqrt(1 - sigma**2)
        guided = rlg(
            lambda x, t, c, a=alpha, s=sigma: gaussian_output(config, a, s, 0.0, 1.0, x),
            lambda x, t, c, a=alpha, s=sigma: gaussian_output(config, a, s, m, s2, x),
            w,
        )
        at_0, at_1 = (
            process.mean(schedule, i, points, guided(points, schedule.t[i].expand(2), None)).double().flatten()
        )
        slope = float(at_1 - at_0)
        mean = slope * mean + float(at_0)
        variance = slope**2 * variance + float(schedule.std[i]) ** 2
    return mean, variance


def continuous_variance(w: float, s2: float, churn: float) -> float:
    """Variance of RLG between N(0, 1) and N(0, s2), in continuous time.

    In VE coordinates (x / alpha, tau = sigma^2 / alpha^2) the guided score is -x a(tau) with
    a = (1-w)/(1+tau) + w/(s2+tau), and sampling with churn c (0: ODE, 1: the reverse SDE) has
    dV/dtau = (1 + c) a V - c. The integrating factor is (1+tau)^{(1-w)(1+c)} (s2+tau)^{w(1+c)}; V ~ tau at infinity.
    """
    if churn == 0:
        return s2**w
    power = 1 + churn

    def inverse_factor(tau: float) -> float:
        return (1 + tau) ** (-(1 - w) * power) * (s2 + tau) ** (-w * power)

    return s2 ** (w * power) * churn * quad(inverse_factor, 0, math.inf)[0]


def test_continuous_variance_reproduces_the_known_reverse_sde_values() -> None:
    for w, expected in ((0.5, 0.698), (1.5, 0.378), (2.0, 0.294)):  # simulated elsewhere, VE, 1e5 samples
        assert continuous_variance(w, 0.5, 1.0) == pytest.approx(expected, abs=0.006)


UNSHIFTED = {**FLOW, "shift": 1.0}


@pytest.mark.parametrize("w", [0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("churn", [0.0, 0.245, 1.0])
def test_flow_samplers_reach_the_continuous_law(w: float, churn: float) -> None:
    """Flow-GRPO's SDE at noise level a has churn a^2 / 2: level sqrt(2) is the memoryless reverse SDE."""
    level = math.sqrt(2 * churn)
    _, variance = guided_moments(UNSHIFTED, 800, "sde" if churn else "ode", level, w, 0.0, 0.5)
    assert variance == pytest.approx(continuous_variance(w, 0.5, churn), rel=0.01)


@pytest.mark.parametrize("w", [0.5, 2.0])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_samplers_reach_the_continuous_law(w: float, eta: float) -> None:
    _, variance = guided_moments(vp(), 500, "sde" if eta else "ode", eta, w, 0.0, 0.5)
    assert variance == pytest.approx(continuous_variance(w, 0.5, eta), rel=0.03)


@pytest.mark.parametrize("config", [vp(), UNSHIFTED], ids=["eps", "flow"])
@pytest.mark.parametrize("kernel", ["ode", "sde"])
@pytest.mark.parametrize("w", [-1.0, 0.5, 2.0, 3.0])
def test_linear_reward_is_exact(config: dict, kernel: str, w: float) -> None:
    """tuned = N(1, 1) is the optimum for a linear reward: RLG's mean is w and its variance 1."""
    mean, variance = guided_moments(config, 200, kernel, 1.0, w, 1.0, 1.0)
    start = 0.0 if process._is_flow(config) else math.sqrt(float(process._alphas_cumprod(config)[-1]))
    # the eps model starts from N(0, 1) instead of N(w sqrt(abar_T), 1); an ODE keeps that gap, an SDE forgets it
    assert mean == pytest.approx(w, abs=abs(w) * start + 0.02)
    assert variance == pytest.approx(1.0, rel=0.04)  # the ancestral DDIM kernel is 3% narrow at 200 steps


def test_the_sampler_draws_what_the_moments_say() -> None:
    """The same law by simulation with `step`: 40,000 draws, 4 standard errors."""
    steps, w, s2 = 50, 2.0, 0.5
    schedule = process.make_schedule(UNSHIFTED, steps, "sde", 0.7)
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    x = torch.randn(n, 1, 1, 1, generator=generator)
    for i in range(steps):
        sigma = float(schedule.sigma[i])
        base = gaussian_output(UNSHIFTED, 1 - sigma, sigma, 0.0, 1.0, x)
        tuned = gaussian_output(UNSHIFTED, 1 - sigma, sigma, 0.0, s2, x)
        x = process.step(schedule, i, x, base + w * (tuned - base), torch.randn(n, 1, 1, 1, generator=generator))
    _, variance = guided_moments(UNSHIFTED, steps, "sde", 0.7, w, 0.0, s2)
    assert float(x.var()) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / n))


# --- what users can get wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({"_class_name": "LCMScheduler"}, (10,), "LCMScheduler"),
        ({**SD15, "clip_sample": True}, (10,), "clip_sample"),
        ({"_class_name": "DDIMScheduler", **BETAS}, (10,), "clip_sample"),
        ({**SD15, "thresholding": True}, (10,), "thresholding"),
        ({**SD15, "prediction_type": "score"}, (10,), "prediction_type"),
        ({**FLOW, "use_dynamic_shifting": True}, (10,), "use_dynamic_shifting"),
        (SD15, (10, "cps"), "cps"),
        (FLOW, (10, "euler"), "euler"),
        (FLOW, (0,), "at least 1"),
        (FLOW, (10, "sde", 0.7, (5, 5)), "window"),
    ],
)
def test_refusals_name_the_value(config: dict, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process.make_schedule(config, *arguments)


def test_windows_are_stochastic_inside_and_odes_outside() -> None:
    schedule, ode = process.make_schedule(FLOW, 10, "sde", 0.7, (2, 5)), process.make_schedule(FLOW, 10, "ode")
    assert schedule.stochastic_steps() == [2, 3, 4]
    torch.testing.assert_close(schedule.a_out[5:], ode.a_out[5:])
    torch.testing.assert_close(schedule.a_x[5:], ode.a_x[5:])
    x, out, _ = state()
    with pytest.raises(ValueError, match="deterministic"):
        process.log_prob(schedule, 0, x, out, x)
    with pytest.raises(ValueError, match="needs noise"):
        process.step(schedule, 2, x, out, None)
