"""rlg.apply under schedulers of diffusers, and named schedules of w in every unit of time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest

from tests.support.pipelines_by_hand import AGREE, MATTERS, Case, applied, distance

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
VP = {"beta_schedule": "scaled_linear", "clip_sample": False, "steps_offset": 1}
SOLVERS = {
    "ddim": ("DDIMScheduler", VP),
    "ddpm": ("DDPMScheduler", VP),
    "pndm": ("PNDMScheduler", VP | {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", VP),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", VP),
    "heun": ("HeunDiscreteScheduler", VP),
    "lms": ("LMSDiscreteScheduler", VP),
    "kdpm2": ("KDPM2DiscreteScheduler", VP),
    "kdpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", VP),
    "dpm_multistep": ("DPMSolverMultistepScheduler", VP),
    "dpm_sde": ("DPMSolverMultistepScheduler", VP | {"algorithm_type": "sde-dpmsolver++"}),
    "dpm_karras": ("DPMSolverMultistepScheduler", VP | {"use_karras_sigmas": True}),
    "dpm_singlestep": ("DPMSolverSinglestepScheduler", VP),
    "unipc": ("UniPCMultistepScheduler", VP),
    "deis": ("DEISMultistepScheduler", VP),
    "lcm": ("LCMScheduler", VP),
    "tcd": ("TCDScheduler", VP),
    "sa_solver": ("SASolverScheduler", VP),
}
LOGARITHMIC = {
    "edm_euler": ("EDMEulerScheduler", {}),
    "edm_dpm": ("EDMDPMSolverMultistepScheduler", {}),
    "euler_continuous": (
        "EulerDiscreteScheduler",
        VP | {"timestep_type": "continuous", "prediction_type": "v_prediction"},
    ),
}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
FLOWS = {
    "flow_euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    "flow_heun": ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
    "flow_unipc": ("UniPCMultistepScheduler", FLOW),
    "flow_dpm": ("DPMSolverMultistepScheduler", FLOW),
}
ALL = {**SOLVERS, **LOGARITHMIC, **FLOWS}


@pytest.fixture
def case(tmp_path: Path) -> Callable[[str], Case]:
    """Tiny-SD under a scheduler, or tiny-SD3 under one of flow models."""

    def make(solver: str) -> Case:
        kind, config = ALL[solver]
        return applied("sd3" if solver in FLOWS else "sd", tmp_path, getattr(diffusers, kind).from_config(config))

    return make


@pytest.mark.parametrize("solver", ALL)
def test_a_scheduler_by_hand(solver: str, case: Callable[..., Case]) -> None:
    made = case(solver)
    steps = {"num_inference_steps": 3}
    assert distance(made.guided(0.0, **steps), plain := made.plain(**steps)) < AGREE
    expected = made.by_hand(2.0, **steps)
    assert distance(made.guided(2.0, **steps), expected) < AGREE
    assert distance(expected, plain) > MATTERS


@pytest.mark.parametrize("solver", {**SOLVERS, **FLOWS})
def test_a_schedule_of_w_under_a_scheduler(solver: str, case: Callable[..., Case]) -> None:
    """`linear_down` with w = 2 is 1 + t / t_first at the time t that the denoiser is told, in every call."""
    made = case(solver)
    made.guide.schedule = "linear_down"
    first: list[float] = []

    def w_of(_: int, t: float) -> float:
        first.append(t)
        return 1 + t / first[0]

    steps = {"num_inference_steps": 3}
    assert distance(made.guided(2.0, **steps), made.by_hand(w_of, **steps)) < AGREE


@pytest.mark.parametrize("solver", LOGARITHMIC)
def test_times_that_are_logarithms(solver: str, case: Callable[..., Case]) -> None:
    """A straight line over them would be another schedule; an interval of noise levels is what it says."""
    made = case(solver)
    made.guide.schedule = "linear_down"
    with pytest.raises(ValueError, match="schedule linear_down needs times that fall to 0"):
        made.guided(2.0, num_inference_steps=3)
    made.guide.schedule = "interval:0.9:1"
    levels = made.pipe.scheduler.sigmas[:3] / made.pipe.scheduler.config.get("sigma_data", 1.0)
    inside = [bool(level / (1 + level**2) ** 0.5 > 0.9) for level in levels]
    assert inside[0] and not inside[2]
    expected = made.by_hand(lambda i, _: 2.0 if inside[i] else 1.0, num_inference_steps=3)
    assert distance(made.guided(2.0, num_inference_steps=3), expected) < AGREE


@pytest.mark.parametrize(
    ("name", "calls", "shares"),
    [
        ("sd", 1, (1, 334 / 667, 1 / 667)),  # DDIM's leading steps: 667, 334, 1
        ("sd3", 1, (1, 500.5 / 1000, 1 / 1000)),  # 1000 to 1, told as they are
        ("flux", 1, (1, 2 / 3, 1 / 3)),  # told t / 1000
        ("qwen_image", 2, (1, 2 / 3, 1 / 3)),  # as flux; the branches of CFG are two calls
        ("z_image", 1, (1, 2 / 3, 1 / 3)),  # told 1 - t / 1000
        ("lumina2", 2, (1, 2 / 3, 1 / 3)),  # as z_image
        ("lumina", 1, (1, 500.5 / 1000, 1 / 1000)),  # times as sd3, told as z_image
        ("hidream", 1, (1, 500.5 / 1000, 1 / 1000)),  # as sd3, by another name
        ("ltx_img2video", 1, (1, 2 / 3, 1 / 3)),  # told a time a token, 0 for those of the image
        ("mochi", 1, (1, 0.975, 0.71875)),  # its scheduler's times rise: 0, 25, 281.25
    ],
)
def test_a_schedule_of_w_in_every_unit_of_time(
    name: str, calls: int, shares: tuple[float, ...], tmp_path: Path
) -> None:
    """w_t = 1 + share (w - 1), with shares that follow from the pipeline's rule for its times."""
    flow = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=name == "mochi")
    made = applied(name, tmp_path, None if name == "sd" else flow)
    steps = {"num_inference_steps": 3}
    for schedule, share_of in (
        ("linear_down", lambda i: shares[i]),
        ("linear_up", lambda i: 1 - shares[i]),
        ("interval:0.99:1", lambda i: float(i == 0)),
    ):
        if name == "sd" and schedule.startswith("interval"):
            continue  # noise levels of VP models are not their times
        made.guide.schedule = schedule
        expected = made.by_hand(lambda i, _, share=share_of: 1 + share(i // calls), **steps)
        assert distance(made.guided(2.0, **steps), expected) < AGREE, schedule
    assert distance(made.by_hand(2.0, **steps), expected) > MATTERS


def test_times_by_another_rule(tmp_path: Path) -> None:
    """SANA-Sprint tells its network sin t / (sin t + cos t); a named schedule of w is refused there."""
    made = applied("sana_sprint", tmp_path)
    made.guide.schedule = "linear_down"
    with pytest.raises(ValueError, match=r"called at t = 1\b.*no step of the scheduler has that time"):
        made.guided(2.0)
