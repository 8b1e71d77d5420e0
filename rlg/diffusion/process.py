"""Noise processes as tables of scalars.

Every sampler here is affine in the network's output. Two equations define x_t and the training target:

    x_t = alpha x0 + sigma noise          out = out_x0 x0 + out_noise noise

These four numbers cover epsilon-, v-, sample- and velocity-prediction. The two equations are solved for x0_hat and
noise_hat, which are affine in (x, out). Every kernel follows from them:

    x_next ~ N( a_x[i] x + a_out[i] out,  std[i]^2 )

    ancestral   x_next = alpha' x0_hat + sqrt(sigma'^2 - std^2) noise_hat + std z
                DDIM (arXiv 2010.02502, eq. 12): std = eta sqrt((1-S)/(1-A) (1 - A/S)), A = alpha^2, S = alpha'^2
                CPS  (arXiv 2509.05952): std = sigma' sin(level pi/2)
                ODE: std = 0
    flow SDE    (Flow-GRPO, arXiv 2505.05470, eq. 9): g = level sqrt(sigma/(1-sigma)), dt = sigma' - sigma,
                a_x = 1 + g^2 dt/(2 sigma), a_out = (1 + g^2 (1-sigma)/(2 sigma)) dt, std = g sqrt(-dt)

No function that reads these tables asks for the model family. All kernel arithmetic is fp32, because the ratio of two
policies lies in the fifth decimal, which bf16 does not hold.

Legend: B batch, T denoising steps, N training times.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from rlg.choices import KERNELS

TRAINING_TIMES = 1000  # rows of a flow's forward process
_LEAST_ABAR = 2.0**-24  # for epsilon-prediction at zero terminal SNR; from diffusers' EulerDiscreteScheduler


@dataclass(frozen=True)
class Process:
    """Forward process: fp32 tables (N,), one row a training time."""

    time: Tensor  # the network's input
    alpha: Tensor  # weight of x0 in x_t
    sigma: Tensor  # weight of the noise in x_t
    out_x0: Tensor  # weight of x0 in the training target
    out_noise: Tensor  # weight of the noise in the training target
    density: Tensor  # probability of a row when training times are drawn


@dataclass(frozen=True)
class Schedule:
    """Reverse process: fp32 tables, (T,) unless noted, one row a step."""

    t: Tensor  # the network's input
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
        """Indices of the steps that have a density and a log-probability."""
        return [i for i, std in enumerate(self.std.tolist()) if std > 0]


def config_of(scheduler: Any) -> dict[str, Any]:
    """A scheduler's config with its class name, which `scheduler.config` lacks."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def shifts_by_size(config: Mapping[str, Any]) -> bool:
    """Tell whether a scheduler's noise levels depend on the image's size.

    The tables of such a scheduler need `mu`.
    """
    return _is_flow(config) and bool(config.get("use_dynamic_shifting"))


def memoryless_level(config: Mapping[str, Any]) -> float:
    """Level of "sde" whose end forgets its start (arXiv 2409.08861, table 1)."""
    return math.sqrt(2) if _is_flow(config) else 1.0


def linear_mu(config: Mapping[str, Any], tokens: int) -> float:
    """`mu` of an image that has so many tokens.

    It lies on the line through the two sizes in the scheduler's config. This is `calculate_shift` of diffusers'
    pipelines (SD3, Flux and later ones), with its defaults. Raises ValueError where the config's numbers give no line.
    """
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    try:
        slope = (high - low) / (many - few)
    except (TypeError, ZeroDivisionError):
        raise ValueError(
            f"a scheduler shifts from base_shift={low} at base_image_seq_len={few} to max_shift={high} at "
            f"max_image_seq_len={many}: that is no line"
        ) from None
    return tokens * slope + low - slope * few


def process_from_config(config: Mapping[str, Any], mu: float | None = None) -> Process:
    """The forward process of a diffusers scheduler config.

    config: a dict with `_class_name` (see `config_of`). mu: as for `make_schedule`. Raises ValueError for a scheduler
    whose forward process is not a table of these numbers, and for one that needs mu.
    """
    if _is_flow(config):
        sigma = torch.arange(1, TRAINING_TIMES + 1, dtype=torch.float64) / TRAINING_TIMES
        logit = torch.logit(sigma.clamp(max=1 - 5e-4)) - math.log(_shift(config, mu))
        # SD3 was trained so: logit-normal(0, 1), then the scheduler's shift, which moves a logit by log(shift).
        density = torch.exp(-0.5 * logit**2) / (sigma * (1 - sigma).clamp(min=5e-4))
        ones = torch.ones_like(sigma)
        rows = (TRAINING_TIMES * sigma, 1 - sigma, sigma, -ones, ones, density / density.sum())
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
    *,
    mu: float | None = None,
    sigmas: Sequence[float] | None = None,
) -> Schedule:
    """The reverse process of a diffusers scheduler config.

    kernel: "ode" (Euler, or DDIM with eta 0); "sde" (Flow-GRPO's SDE at noise `level`, or DDIM with eta = `level`);
    "cps" (coefficients-preserving sampling, for flow models only).
    window: (first, last). Noise is injected in steps first <= i < last, and the others are deterministic
    (Flow-GRPO-Fast, MixGRPO). None means every step. A deterministic last step ends at the scheduler's own final
    value.
    mu: how far a flow scheduler with `use_dynamic_shifting` shifts its noise levels. It follows from the image's size
    (`linear_mu`). No other scheduler needs it.
    sigmas: (steps,) a flow's noise levels before the shift, where a pipeline does not leave them to its scheduler.
    Raises ValueError for an unknown scheduler or kernel, a non-positive number of steps, an empty window, or a missing
    mu.
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
    if _is_flow(config):
        return _flow_schedule(_flow_times(config, steps, mu, sigmas), kernel, levels)
    return _vp_schedule(config, levels, kernel)


def _flow_times(
    config: Mapping[str, Any], steps: int, mu: float | None, sigmas: Sequence[float] | None
) -> tuple[Tensor, Tensor]:
    """Times and noise levels of diffusers' own flow scheduler.

    Returns (T,) the network's times and (T+1,) the noise levels.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if config.get("invert_sigmas"):
        raise ValueError("a scheduler with invert_sigmas counts its noise levels from the data; set it to false")
    shift = _shift(config, mu)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config({**config, "shift": shift})
    scheduler.set_timesteps(steps, sigmas=sigmas, mu=mu)
    return scheduler.timesteps, scheduler.sigmas.double()


def _flow_schedule(times: tuple[Tensor, Tensor], kernel: str, levels: Tensor) -> Schedule:
    t, sigma = times
    now, after = sigma[:-1], sigma[1:]
    ones = torch.ones_like(now)
    if kernel == "sde":
        dt = after - now
        # At sigma = 1 the denominator would be 0, so the next sigma is used.
        g2 = levels**2 * now / (1 - torch.where(now >= 1, after, now))
        a_x = 1 + g2 * dt / (2 * now)
        a_out = (1 + g2 * (1 - now) / (2 * now)) * dt
        std = (g2 * -dt).sqrt()
    else:
        std = after * torch.sin(levels * math.pi / 2)
        a_x, a_out = _ancestral((1 - now, now), (1 - after, after), std, (-ones, ones))
    x0_x, x0_out, _, _ = _solve(1 - now, now, -ones, ones)
    rows = (t, 1 - sigma, sigma, a_x, a_out, std, now - after, x0_x, x0_out)
    return Schedule(*(row.float() for row in rows))


def _vp_schedule(config: Mapping[str, Any], levels: Tensor, kernel: str) -> Schedule:
    from diffusers import DDIMScheduler

    if kernel == "cps":
        raise ValueError("kernel 'cps' is for flow-matching models; use 'sde' with eta as its level")
    abar_N = _alphas_cumprod(config)
    scheduler = DDIMScheduler.from_config(dict(config))
    scheduler.set_timesteps(len(levels))
    times = scheduler.timesteps.long()
    previous = times - scheduler.config.num_train_timesteps // len(levels)
    # A stochastic last step ends at abar[0], as in ddpo-pytorch: at 1 its std would be 0 and its log std -inf.
    final_T = torch.where(levels > 0, abar_N[0], _final_abar(config, abar_N))
    A, S = abar_N[times], torch.where(previous >= 0, abar_N[previous.clamp(min=0)], final_T)
    std = levels * ((1 - S) / (1 - A) * (1 - A / S)).clamp(min=0).sqrt()
    targets = _prediction(config, A.sqrt(), (1 - A).sqrt())
    now, after = (A.sqrt(), (1 - A).sqrt()), (S.sqrt(), (1 - S).sqrt())
    a_x, a_out = _ancestral(now, after, std, targets)
    x0_x, x0_out, _, _ = _solve(*now, *targets)
    alpha, sigma = (torch.cat([before, last[-1:]]) for before, last in zip(now, after, strict=True))
    rows = (times, alpha, sigma, a_x, a_out, std, torch.ones_like(std), x0_x, x0_out)
    return Schedule(*(row.float() for row in rows))


def _solve(alpha: Tensor, sigma: Tensor, out_x0: Tensor, out_noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Solve the two equations of the module's docstring.

    Returns the four coefficients of x0_hat = x0_x x + x0_out out and noise_hat = n_x x + n_out out.
    """
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


def _shift(config: Mapping[str, Any], mu: float | None) -> float:
    """Factor of a flow scheduler's shift of sigma / (1 - sigma), its flow_shift."""
    if not shifts_by_size(config):
        return config.get("shift") or config.get("flow_shift") or 1.0
    if mu is None:
        raise ValueError("use_dynamic_shifting depends on the image's size, which is not known here")
    shift = mu if config.get("time_shift_type") == "linear" else math.exp(mu)
    if shift <= 0:
        raise ValueError(f"a scheduler of time_shift_type linear gets mu = {mu:g} at this image size; it must be > 0")
    return shift


def _alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    from diffusers import DDIMScheduler

    name = _class_name(config)
    if "beta_schedule" not in config:
        raise ValueError(f"scheduler {name} has no beta schedule; known: DDPM-type and FlowMatchEuler schedulers")
    for key in ("clip_sample", "thresholding"):  # DDIM's own default is True; other schedulers do not have the key
        if config.get(key, name == "DDIMScheduler" and key == "clip_sample"):
            raise ValueError(f"scheduler {name} has {key}=True, which is not affine in the output; set it to false")
    abar_N = DDIMScheduler.from_config(dict(config)).alphas_cumprod.double()
    noise_only = config.get("prediction_type", "epsilon") == "epsilon"  # noise does not determine x0 where abar is 0
    return abar_N.clamp(min=_LEAST_ABAR) if noise_only else abar_N


def _final_abar(config: Mapping[str, Any], abar_N: Tensor) -> Tensor:
    """abar after the last step of the scheduler's own ODE.

    It is 1, or abar[0] if the scheduler's class and config say so.
    """
    import diffusers

    kind = getattr(diffusers, _class_name(config), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        kind = diffusers.DDIMScheduler
    own = {name: option.default for name, option in inspect.signature(kind.__init__).parameters.items()}
    told = own | {name: value for name, value in config.items() if name in own}  # the class ignores other keys
    to_one = told.get("set_alpha_to_one", told.get("final_sigmas_type") != "sigma_min")
    return torch.ones_like(abar_N[0]) if to_one else abar_N[0]


def _prediction(config: Mapping[str, Any], alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """`(out_x0, out_noise)` of the prediction type."""
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
    """`(x_t, training target)` at the given rows, both (B, C, H, W) fp32."""
    x0, eps = x0_BCHW.float(), noise_BCHW.float()

    def at(table_N: Tensor) -> Tensor:
        return _column(table_N[rows_B.cpu()], x0)

    x_t = at(process.alpha) * x0 + at(process.sigma) * eps
    return x_t, at(process.out_x0) * x0 + at(process.out_noise) * eps


def clean(process: Process, rows_B: Tensor, x_BCHW: Tensor, out_BCHW: Tensor) -> Tensor:
    """The network's estimate of x0 at the given rows.

    Returns (B, C, H, W) in fp32. This is the inverse of `noise`.
    """
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
    """Draw from the kernel of step i.

    z_BCHW ~ N(0, 1), or None where the step is deterministic. Raises ValueError for a stochastic step without noise.
    """
    if z_BCHW is None:
        if schedule.std[i] > 0:
            raise ValueError(f"step {i} is stochastic and needs noise")
        return mean(schedule, i, x_BCHW, out_BCHW)
    return mean(schedule, i, x_BCHW, out_BCHW) + schedule.std[i] * z_BCHW


def log_prob(schedule: Schedule, i: int, x_BCHW: Tensor, out_BCHW: Tensor, x_next_BCHW: Tensor) -> Tensor:
    """(B,) log-density of x_next under the kernel of step i.

    It is a mean over latent dimensions, not a sum, because every published clip range (1e-4) rests on that convention
    (ddpo-pytorch, Flow-GRPO). Raises ValueError where the step is deterministic.
    """
    std = _positive_std(schedule, i)
    error = x_next_BCHW.detach().float() - mean(schedule, i, x_BCHW, out_BCHW)
    return _mean_d(-(error**2) / (2 * std**2)) - math.log(std) - 0.5 * math.log(2 * math.pi)


def log_prob_at(schedule: Schedule, step_B: Tensor, x_BCHW: Tensor, out_BCHW: Tensor, x_next_BCHW: Tensor) -> Tensor:
    """(B,) log-density as in `log_prob`, at each sample's own step.

    step_B: indices of the steps, on the schedule's device. Raises ValueError where one of the steps is deterministic.
    """
    std_B = schedule.std[step_B]
    if not bool((std_B > 0).all()):
        raise ValueError(f"step {int(step_B[std_B <= 0][0])} is deterministic: it has no density")
    x, out = x_BCHW.float(), out_BCHW.float()
    means = _column(schedule.a_x[step_B], x) * x + _column(schedule.a_out[step_B], x) * out
    error = (x_next_BCHW.detach().float() - means) / _column(std_B, x)
    return -0.5 * _mean_d(error**2) - std_B.log() - 0.5 * math.log(2 * math.pi)


def kl(schedule: Schedule, i: int, out_BCHW: Tensor, reference_BCHW: Tensor, per_time: bool = False) -> Tensor:
    """(B,) KL of step i between the kernels of two outputs.

    Both outputs are made at the same x, and the KL is a mean over latent dimensions. Both kernels have variance std^2,
    so KL = |mean - mean_ref|^2 / (2 std^2) is exact. per_time=True divides by 2 std^2 / dt instead. That is
    Flow-GRPO's published convention, in which beta is 10 times larger at 10 steps.
    """
    std = _positive_std(schedule, i)
    gap = schedule.a_out[i] * (out_BCHW.float() - reference_BCHW.float())
    scale = float(schedule.dt[i]) if per_time else 1.0
    return _mean_d(gap**2) * scale / (2 * std**2)


def score_gap(schedule: Schedule, i: int, out_BCHW: Tensor, reference_BCHW: Tensor) -> Tensor:
    """(B,) distance of two scores at step i in fp64, for `tilt`.

    It is |x0_hat - x0_hat_ref| / (1 - S) with S = alpha^2 / (alpha^2 + sigma^2), which is abar in VP terms. Between
    two Gaussians of unit variance, this is the distance of their means at every noise level, from pure noise to none.
    """
    gap_B = (out_BCHW.float() - reference_BCHW.float()).flatten(1).double().norm(dim=1)
    return gap_B * (abs(float(schedule.x0_out[i])) / _noise_share(schedule, i))


def tilt(schedule: Schedule, i: int, gap_B: Tensor, next_gap_B: Tensor) -> Tensor:
    """(B,) nats that step i adds to the integral of `score_gap`.

        1/2 g^2 |score - score_ref|^2 dt, as a sum over latent dimensions

    gap_B, next_gap_B: `score_gap` at the step's two ends. g belongs to the forward process, so that the kernel's own
    noise does not matter. The integral is that of gap^2 / 2 over S, and the rule is gap next_gap (S' - S) / 2. Between
    two Gaussians of the same variance, 1 / gap is a line in S. Then the rule is exact for any number of steps.
    """
    return gap_B * next_gap_B * (0.5 * (_noise_share(schedule, i) - _noise_share(schedule, i + 1)))


def gap_at_end(schedule: Schedule, before_B: Tensor, last_B: Tensor) -> Tensor:
    """(B,) `score_gap` after the last step, without a network pass.

    It lies on the line of 1 / gap through the last two steps. The line may cross 0, so the result stays within a
    factor of 4 of the last gap.
    """
    first, last, end = (_noise_share(schedule, len(schedule) + place) for place in (-2, -1, 0))
    slope_B = torch.nan_to_num(1 - last_B / before_B, nan=0.0)
    return last_B / (1 + slope_B * ((last - end) / (first - last))).clamp(0.25, 4.0)


def _noise_share(schedule: Schedule, i: int) -> float:
    """1 - S before step i; i = T is after the last step."""
    alpha, sigma = float(schedule.alpha[i]), float(schedule.sigma[i])
    return sigma**2 / (alpha**2 + sigma**2)


def _positive_std(schedule: Schedule, i: int) -> float:
    std = float(schedule.std[i])
    if std <= 0:
        raise ValueError(f"step {i} is deterministic: it has no density")
    return std


def _mean_d(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.flatten(1).mean(dim=1)
