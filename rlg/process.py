"""Noise processes as tables: every sampler that the project knows is affine in the network's output.

Legend: B batch, T denoising steps, N training times. x_t = alpha x0 + sigma noise, and the network is trained to put
out = out_x0 x0 + out_noise noise, which covers epsilon-, v-, sample- and velocity-prediction with four numbers a row.
Solving the two equations gives x0_hat and noise_hat, affine in (x, out), and hence each kernel

    x_next ~ N( a_x[i] x + a_out[i] out,  std[i]^2 )

    ancestral   x_next = alpha' x0_hat + sqrt(sigma'^2 - std^2) noise_hat + std z
                DDIM (arXiv 2010.02502, eq. 12): std = eta sqrt((1-S)/(1-A) (1 - A/S)), A = alpha^2, S = alpha'^2
                CPS  (arXiv 2509.05952): std = sigma' sin(level pi/2)
                ODE: std = 0
    flow SDE    (Flow-GRPO, arXiv 2505.05470, eq. 9): g = level sqrt(sigma/(1-sigma)), dt = sigma' - sigma,
                a_x = 1 + g^2 dt/(2 sigma), a_out = (1 + g^2 (1-sigma)/(2 sigma)) dt, std = g sqrt(-dt)

`step`, `log_prob`, `kl` and the training pair `sample_t`, `noise` read these tables and never ask for the family.
All kernel arithmetic is fp32: the ratio of two policies lives in the fifth decimal, where bf16 has nothing left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

KERNELS = ("ode", "sde", "cps")


@dataclass(frozen=True)
class Process:
    """The forward process, a row for each training time; fp32, shape (N,)."""

    time: Tensor  # what the network is told
    alpha: Tensor  # weight of x0 in x_t
    sigma: Tensor  # weight of the noise in x_t
    out_x0: Tensor  # weight of x0 in the training target
    out_noise: Tensor  # weight of the noise in the training target
    density: Tensor  # probability of a row when training times are drawn


@dataclass(frozen=True)
class Schedule:
    """The reverse process, a row for each denoising step; fp32, shape (T,) unless said otherwise."""

    t: Tensor  # what the network is told
    alpha: Tensor  # (T+1,) weight of x0 before each step, and after the last
    sigma: Tensor  # (T+1,) noise level before each step, and after the last
    a_x: Tensor
    a_out: Tensor
    std: Tensor  # 0 where the step is deterministic
    dt: Tensor  # length of the step in the process's own time, > 0; 1 where it has none (DDIM)
    x0_x: Tensor
    x0_out: Tensor

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device | str) -> Schedule:
        """The same table on a device."""
        return Schedule(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def stochastic_steps(self) -> list[int]:
        """Indices of the steps that have a density, hence a log-probability."""
        return [i for i, std in enumerate(self.std.tolist()) if std > 0]


def config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config with its class name, which diffusers adds only when it saves."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def process_from_config(config: Mapping[str, Any]) -> Process:
    """The forward process of a diffusers scheduler config (a dict with `_class_name`; see `config_of`).

    Raises ValueError for a scheduler whose forward process is not a table of these numbers.
    """
    if _is_flow(config):
        sigma = torch.arange(1, 1001, dtype=torch.float64) / 1000
        logit = torch.logit(sigma.clamp(max=1 - 5e-4)) - math.log(config.get("shift") or 1.0)
        # logit-normal(0, 1) and then the scheduler's shift, which moves a logit by log(shift): SD3's own training
        density = torch.exp(-0.5 * logit**2) / (sigma * (1 - sigma).clamp(min=5e-4))
        ones = torch.ones_like(sigma)
        rows = (1000 * sigma, 1 - sigma, sigma, -ones, ones, density / density.sum())
    else:
        abar = _alphas_cumprod(config)
        alpha, sigma = abar.sqrt(), (1 - abar).sqrt()
        out_x0, out_noise = _prediction(config, alpha, sigma)
        steps = torch.arange(len(abar), dtype=torch.float64)
        rows = (steps, alpha, sigma, out_x0, out_noise, torch.full_like(steps, 1 / len(abar)))
    return Process(*(row.float() for row in rows))


def make_schedule(
    config: Mapping[str, Any],
    steps: int,
    kernel: str = "ode",
    level: float = 1.0,
    window: tuple[int, int] | None = None,
) -> Schedule:
    """The reverse process of a diffusers scheduler config.

    kernel: "ode" (Euler / DDIM eta 0); "sde" (Flow-GRPO's SDE at noise `level`, or DDIM with eta = `level`); "cps"
    (coefficients-preserving sampling, flow models only). window = (first, last): noise is injected in steps
    first <= i < last and the others are deterministic (Flow-GRPO-Fast, MixGRPO); None means every step.
    Raises ValueError for an unknown scheduler or kernel, a non-positive number of steps or an empty window.
    """
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; known: {', '.join(KERNELS)}")
    if steps < 1:
        raise ValueError(f"the number of steps must be at least 1, got {steps}")
    first, last = window if window is not None else (0, steps)
    if not 0 <= first < last <= steps:
        raise ValueError(f"the window {window} is not inside the {steps} steps")
    levels = torch.zeros(steps, dtype=torch.float64)
    if kernel != "ode":
        levels[first:last] = level
    return _flow_schedule(config, steps, kernel, levels) if _is_flow(config) else _vp_schedule(config, levels, kernel)


def _flow_schedule(config: Mapping[str, Any], steps: int, kernel: str, levels: Tensor) -> Schedule:
    from diffusers import FlowMatchEulerDiscreteScheduler

    if config.get("use_dynamic_shifting"):
        raise ValueError("use_dynamic_shifting depends on the image size; set it to false and give `shift` a number")
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double()
    now, after = sigma[:-1], sigma[1:]
    ones = torch.ones_like(now)
    if kernel == "sde":
        dt = after - now
        g2 = levels**2 * now / (1 - torch.where(now >= 1, after, now))  # at sigma = 1 the next sigma stands in
        a_x = 1 + g2 * dt / (2 * now)
        a_out = (1 + g2 * (1 - now) / (2 * now)) * dt
        std = (g2 * -dt).sqrt()
    else:
        std = after * torch.sin(levels * math.pi / 2)
        a_x, a_out = _ancestral((1 - now, now), (1 - after, after), std, (-ones, ones))
    x0_x, x0_out, _, _ = _solve(1 - now, now, -ones, ones)
    rows = (scheduler.timesteps, 1 - sigma, sigma, a_x, a_out, std, now - after, x0_x, x0_out)
    return Schedule(*(row.float() for row in rows))


def _vp_schedule(config: Mapping[str, Any], levels: Tensor, kernel: str) -> Schedule:
    from diffusers import DDIMScheduler

    if kernel == "cps":
        raise ValueError("kernel 'cps' is for flow-matching models; use 'sde' with eta as its level")
    abar_N = _alphas_cumprod(config)
    scheduler = DDIMScheduler.from_config(dict(config))
    scheduler.set_timesteps(len(levels))
    times = scheduler.timesteps.long()
    # clamped to abar[0]: with "alpha to one" the last step would have std 0 and log std = -inf (as ddpo-pytorch does)
    previous = (times - scheduler.config.num_train_timesteps // len(levels)).clamp(min=0)
    A, S = abar_N[times], abar_N[previous]
    std = levels * ((1 - S) / (1 - A) * (1 - A / S)).clamp(min=0).sqrt()
    targets = _prediction(config, A.sqrt(), (1 - A).sqrt())
    now, after = (A.sqrt(), (1 - A).sqrt()), (S.sqrt(), (1 - S).sqrt())
    a_x, a_out = _ancestral(now, after, std, targets)
    x0_x, x0_out, _, _ = _solve(*now, *targets)
    alpha, sigma = (torch.cat([before, last[-1:]]) for before, last in zip(now, after, strict=True))
    rows = (times, alpha, sigma, a_x, a_out, std, torch.ones_like(std), x0_x, x0_out)
    return Schedule(*(row.float() for row in rows))


def _solve(alpha: Tensor, sigma: Tensor, out_x0: Tensor, out_noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x0_hat = x0_x x + x0_out out and noise_hat = n_x x + n_out out, by the equations of the module's legend."""
    determinant = alpha * out_noise - sigma * out_x0
    return out_noise / determinant, -sigma / determinant, -out_x0 / determinant, alpha / determinant


def _ancestral(
    now: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], std: Tensor, targets: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    x0_x, x0_out, noise_x, noise_out = _solve(*now, *targets)
    rest = (after[1] ** 2 - std**2).clamp(min=0).sqrt()
    return after[0] * x0_x + rest * noise_x, after[0] * x0_out + rest * noise_out


def _class_name(config: Mapping[str, Any]) -> str:
    return str(config.get("_class_name", "a scheduler without _class_name"))


def _is_flow(config: Mapping[str, Any]) -> bool:
    return _class_name(config).startswith("FlowMatch") or config.get("prediction_type") == "flow_prediction"


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    from diffusers import DDIMScheduler

    name = _class_name(config)
    if "beta_schedule" not in config:
        raise ValueError(f"scheduler {name} has no beta schedule; known: DDPM-type and FlowMatchEuler schedulers")
    for key in ("clip_sample", "thresholding"):  # DDIM's own default is True, others leave the key out
        if config.get(key, name == "DDIMScheduler" and key == "clip_sample"):
            raise ValueError(f"scheduler {name} has {key}=True, which is not affine in the output; set it to false")
    return DDIMScheduler.from_config(dict(config)).alphas_cumprod.double()


def _prediction(config: Mapping[str, Any], alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(out_x0, out_noise) of the prediction type."""
    kind = config.get("prediction_type", "epsilon")
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    targets = {"epsilon": (zero, one), "sample": (one, zero), "v_prediction": (-sigma, alpha)}
    if kind not in targets:
        raise ValueError(f"unknown prediction_type {kind!r}; known: {', '.join(targets)}, and flow matching")
    return targets[kind]


def _column(values_B: Tensor, like: Tensor) -> Tensor:
    return values_B.to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def sample_t(process: Process, batch: int, generator: torch.Generator) -> Tensor:
    """(B,) row indices of training times, drawn from the process's density."""
    return torch.multinomial(process.density, batch, replacement=True, generator=generator)


def noise(process: Process, rows_B: Tensor, x0_BCHW: Tensor, noise_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, training target) at the given rows, both (B, C, H, W) fp32."""
    x0, eps = x0_BCHW.float(), noise_BCHW.float()

    def at(table_N: Tensor) -> Tensor:
        return _column(table_N[rows_B.cpu()], x0)

    x_t = at(process.alpha) * x0 + at(process.sigma) * eps
    return x_t, at(process.out_x0) * x0 + at(process.out_noise) * eps


def clean(process: Process, rows_B: Tensor, x_BCHW: Tensor, out_BCHW: Tensor) -> Tensor:
    """The network's estimate of x0 at the given rows, (B, C, H, W) fp32: the inverse of `noise`."""
    tables = (process.alpha, process.sigma, process.out_x0, process.out_noise)
    x0_x, x0_out, _, _ = _solve(*(table[rows_B.cpu()].double() for table in tables))
    return _column(x0_x.float(), x_BCHW) * x_BCHW.float() + _column(x0_out.float(), x_BCHW) * out_BCHW.float()


def mean(schedule: Schedule, i: int, x_BCHW: Tensor, out_BCHW: Tensor) -> Tensor:
    """Mean of the kernel of step i, (B, C, H, W) fp32."""
    return schedule.a_x[i] * x_BCHW.float() + schedule.a_out[i] * out_BCHW.float()


def predict_x0(schedule: Schedule, i: int, x_BCHW: Tensor, out_BCHW: Tensor) -> Tensor:
    """The network's estimate of x0 at step i, (B, C, H, W) fp32."""
    return schedule.x0_x[i] * x_BCHW.float() + schedule.x0_out[i] * out_BCHW.float()


def step(schedule: Schedule, i: int, x_BCHW: Tensor, out_BCHW: Tensor, z_BCHW: Tensor | None) -> Tensor:
    """One draw from the kernel of step i, with z ~ N(0, 1); z may be None where the step is deterministic."""
    if z_BCHW is None:
        if schedule.std[i] > 0:
            raise ValueError(f"step {i} is stochastic and needs noise")
        return mean(schedule, i, x_BCHW, out_BCHW)
    return mean(schedule, i, x_BCHW, out_BCHW) + schedule.std[i] * z_BCHW


def log_prob(schedule: Schedule, i: int, x_BCHW: Tensor, out_BCHW: Tensor, x_next_BCHW: Tensor) -> Tensor:
    """(B,) log-density of x_next under the kernel of step i, as a mean over latent dimensions.

    The mean, not the sum, is the convention behind every published clip range (1e-4): see ddpo-pytorch and Flow-GRPO.
    Raises ValueError where the step is deterministic.
    """
    std = _positive_std(schedule, i)
    error = x_next_BCHW.detach().float() - mean(schedule, i, x_BCHW, out_BCHW)
    return _mean_d(-(error**2) / (2 * std**2)) - math.log(std) - 0.5 * math.log(2 * math.pi)


def log_prob_at(schedule: Schedule, step_B: Tensor, x_BCHW: Tensor, out_BCHW: Tensor, x_next_BCHW: Tensor) -> Tensor:
    """(B,) as `log_prob`, with a step of its own for each sample: step_B are their indices, on the schedule's device.

    Raises ValueError where one of the steps is deterministic.
    """
    std_B = schedule.std[step_B]
    if not bool((std_B > 0).all()):
        raise ValueError(f"step {int(step_B[std_B <= 0][0])} is deterministic: it has no density")
    x, out = x_BCHW.float(), out_BCHW.float()
    means = _column(schedule.a_x[step_B], x) * x + _column(schedule.a_out[step_B], x) * out
    error = (x_next_BCHW.detach().float() - means) / _column(std_B, x)
    return -0.5 * _mean_d(error**2) - std_B.log() - 0.5 * math.log(2 * math.pi)


def kl(schedule: Schedule, i: int, out_BCHW: Tensor, reference_BCHW: Tensor, per_time: bool = False) -> Tensor:
    """(B,) KL between the kernels of step i under two network outputs at the same x, as a mean over latent dimensions.

    Both kernels have variance std^2, so KL = |mean - mean_ref|^2 / (2 std^2), exactly. per_time=True divides by
    2 std^2 / dt instead: Flow-GRPO's published convention, in which beta is 10 times larger at 10 steps.
    """
    std = _positive_std(schedule, i)
    gap = schedule.a_out[i] * (out_BCHW.float() - reference_BCHW.float())
    scale = float(schedule.dt[i]) if per_time else 1.0
    return _mean_d(gap**2) * scale / (2 * std**2)


def tilt(schedule: Schedule, i: int, out_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """(B,) nats: 1/2 g^2 |score - score_ref|^2 dt over step i, as a sum over latent dimensions.

    g is the forward process's own, whatever noise the kernel injects: with S = alpha^2 / (alpha^2 + sigma^2), in VP
    terms abar, it is 1/2 |x0_hat - x0_hat_ref|^2 (S' - S) / (1 - S)^2. Over the step the gap of the scores is taken to
    be what it is between two Gaussians of unit variance, which is finite at pure noise and at no noise.
    """
    alpha, sigma = schedule.alpha[i : i + 2], schedule.sigma[i : i + 2]
    before, after = (alpha**2 / (alpha**2 + sigma**2)).tolist()
    gap_B = (schedule.x0_out[i] * (out_BCHW.float() - reference_BCHW.float())).flatten(1).square().sum(dim=1)
    return gap_B * (0.5 * (after - before) / (1 - before) ** 2)


def _positive_std(schedule: Schedule, i: int) -> float:
    std = float(schedule.std[i])
    if std <= 0:
        raise ValueError(f"step {i} is deterministic: it has no density")
    return std


def _mean_d(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(1).mean(dim=1)
