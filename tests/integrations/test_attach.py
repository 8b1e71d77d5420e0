"""rlg.apply on pipelines of plain diffusers: equal to our sampler, on any scheduler, and gone without a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    StableDiffusionImg2ImgPipeline,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from torch import Tensor, nn

import rlg
from rlg.diffusion.sampling import SampleId, SampleNoise, sample
from rlg.guidance import guided as guidance
from rlg.integrations.guided_network import guided
from rlg.models import adapter_files, lora
from rlg.models.backbones import pipeline_cfg
from rlg.models.policy import Policy
from tests.support.tiny_families import FAMILIES

PROMPTS = ["a red circle", "two blue crosses"]
STEPS = 3


def plain(folder: Path) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: Any, latents: Tensor | None = None, cfg: float = 4.0, **more: Any) -> Tensor:
    """Final latents of a pipeline, as it keeps them; noise from seeded generators where no latents are given."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(PROMPTS))]
    options = {"num_inference_steps": STEPS, "generator": generators, "output_type": "latent"}
    return pipe(PROMPTS, height=64, width=64, latents=latents, **options, **pipeline_cfg(pipe, cfg), **more).images


@contextmanager
def recorded_passes(network: nn.Module) -> Iterator[list[bool]]:
    """A list that grows with each pass of the network by whether the adapter was on."""
    passes: list[bool] = []
    layer = lora.layers(network)[0]
    handle = layer.register_forward_pre_hook(
        lambda *_: passes.append(bool(layer.active_adapters) and not layer.disable_adapters)
    )
    yield passes
    handle.remove()


@pytest.fixture(scope="module")
def pipelines(
    tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> tuple[DiffusionPipeline, DiffusionPipeline, DiffusionPipeline]:
    """tiny-sd three times: the base, with the LoRA as plain diffusers loads it, and one for `rlg.apply`."""
    base, tuned, ours = (plain(tiny_folder("sd")) for _ in range(3))
    tuned.load_lora_weights(tiny_checkpoint("sd"))
    return base, tuned, ours


@pytest.mark.parametrize("cfg", [1.0, 4.5])
def test_a_plain_pipeline_equals_our_sampler(
    family: str, cfg: float, tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """ODE mode, to 1e-4 in the final latents. (Ours encodes tiny-sd3's 256 empty T5 tokens as one.)"""
    policy = Policy.load(str(tiny_folder(family)))
    policy.load_adapter(tiny_checkpoint(family))
    ids = [SampleId(7, i, 0) for i in range(2)]
    noise = SampleNoise(ids, policy.latent_shape())
    schedule, cond = policy.schedule(STEPS, "ode", 0.0), policy.encode(PROMPTS)
    base, tuned = (
        guidance.with_cfg(predict, policy.encode([""]), cfg) for predict in (policy.reference, policy.predict)
    )
    pipe, tiny = plain(tiny_folder(family)), FAMILIES[family]
    guide = rlg.apply(pipe, tiny_checkpoint(family))
    results = []
    for w in (0.0, 0.5, 1.0, 2.0):
        guide.scale = w
        expected = tiny.pack(sample(guidance.rlg(base, tuned, w), schedule, cond, noise))
        results.append(run(pipe, tiny.pack(noise.initial()), cfg, **tiny.options))
        torch.testing.assert_close(results[-1], expected, rtol=1e-4, atol=1e-4)
    assert min(float((a - b).abs().max()) for a, b in pairwise(results)) > 1e-3


def test_the_256_empty_tokens_are_there_in_the_plain_pipeline(tiny_folder: Callable[[str], Path]) -> None:
    pipe, policy = plain(tiny_folder("sd3")), Policy.load(str(tiny_folder("sd3")))
    theirs, _, _, _ = pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)
    ours = policy.encode(PROMPTS).tensors
    assert theirs.shape[1] == ours["encoder_hidden_states"].shape[1] + 255
    assert torch.equal(theirs[:, :-255], ours["encoder_hidden_states"])
    assert not theirs[:, -256:].any()
    assert ours["last_token_count"].tolist() == [256, 256]


@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize(
    "scheduler",
    [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler],
)
def test_any_scheduler(
    scheduler: type, pipelines: tuple[Any, Any, Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """w = 0 is the base and w = 1 the tuned pipeline of plain diffusers, bitwise; also where steps are stochastic."""
    base, tuned, ours = pipelines
    for pipe in pipelines:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    guide = rlg.apply(ours, tiny_checkpoint("sd"), scale=0.0)
    try:
        at_zero = run(ours)
        guide.scale = 1.0
        at_one = run(ours)
        guide.scale = 1.5
        beyond = run(ours)
        guide.scale = 1.0
        ours.disable_lora()  # the user's own switch wins over ours
        assert torch.equal(at_zero, run(ours))
        guide.scale = 0.0
        assert torch.equal(at_zero, run(ours))
        guide.scale = 1.0
        assert torch.equal(at_zero, run(ours))
        ours.enable_lora()
        assert torch.equal(at_one, run(ours))
    finally:
        guide.remove()
        ours.unload_lora_weights()
    assert torch.equal(at_zero, run(base))
    assert torch.equal(at_one, run(tuned))
    assert (at_one - at_zero).abs().max() > 1e-2
    assert (beyond - at_one).abs().max() > 1e-2
    assert beyond.isfinite().all()


def test_remove_and_unload_leave_the_pipeline_as_it_was(
    pipelines: tuple[Any, Any, Any], tiny_checkpoint: Callable[[str], Path]
) -> None:
    base, tuned, ours = pipelines
    for pipe in pipelines:
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    guide = rlg.apply(ours, tiny_checkpoint("sd"), scale=2.0)
    assert (run(ours) - run(tuned)).abs().max() > 1e-3
    guide.remove()
    assert guided(ours.unet) is None
    assert torch.equal(run(ours), run(tuned))  # the adapter stays, at w = 1
    ours.unload_lora_weights()
    assert torch.equal(run(ours), run(base))
    assert not lora.layers(ours.unet)


def test_remove_restores_a_forward_that_was_wrapped_before(
    tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    pipe = plain(tiny_folder("sd"))
    forward = pipe.unet.forward
    pipe.unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    wrapped, plain_class = pipe.unet.forward, type(pipe.unet)
    rlg.apply(pipe, tiny_checkpoint("sd")).remove()
    assert pipe.unet.forward is wrapped and type(pipe.unet) is plain_class


def test_passes_and_a_scale_as_a_function_of_t(
    tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    policy = Policy.load(str(tiny_folder("sd3")))
    policy.load_adapter(tiny_checkpoint("sd3"))
    noise = SampleNoise([SampleId(1, i, 0) for i in range(2)], policy.latent_shape())
    schedule = policy.schedule(STEPS, "ode", 0.0)
    middle = guidance.interval(2.5, float(schedule.t[1]) - 1, float(schedule.t[1]) + 1)
    expected = sample(guidance.rlg(policy.reference, policy.predict, middle), schedule, policy.encode(PROMPTS), noise)

    pipe = plain(tiny_folder("sd3"))
    guide = rlg.apply(pipe, tiny_checkpoint("sd3"))
    made = {}
    for name, scale in {"zero": 0, "one": torch.tensor(1.0), "two": 2.0, "interval": middle}.items():
        guide.scale = scale
        with recorded_passes(pipe.transformer) as made[name]:
            latents = run(pipe, noise.initial(), cfg=1.0)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    assert made["zero"] == [False] * STEPS
    assert made["one"] == [True] * STEPS
    assert made["two"] == [False, True] * STEPS
    assert made["interval"] == [True, False, True, True]


def test_a_scale_per_sample(tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]) -> None:
    pipe = plain(tiny_folder("sd"))
    guide = rlg.apply(pipe, tiny_checkpoint("sd"), scale=torch.tensor([0.0, 2.0]))
    together = run(pipe, cfg=1.0)
    for i, w in enumerate((0.0, 2.0)):
        guide.scale = w
        torch.testing.assert_close(together[i], run(pipe, cfg=1.0)[i], rtol=1e-5, atol=1e-5)
    guide.scale = torch.ones(3)
    with pytest.raises(ValueError, match="3 guidance weights for a batch of 2"):
        run(pipe, cfg=1.0)


@pytest.mark.parametrize("w", [float("nan"), float("inf"), torch.tensor([1.0, float("nan")])])
def test_a_scale_that_is_not_finite_is_refused(
    w: float | Tensor, tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    pipe = plain(tiny_folder("sd"))
    with pytest.raises(ValueError, match="must be finite"):
        rlg.apply(pipe, tiny_checkpoint("sd"), scale=w)
    assert not lora.layers(pipe.unet)  # refused before anything was touched
    assert guided(pipe.unet) is None
    guide = rlg.apply(pipe, tiny_checkpoint("sd"), scale=1.5)
    with pytest.raises(ValueError, match="must be finite"):
        guide.scale = w
    assert guide.scale == 1.5
    guide.scale = lambda t: w
    with pytest.raises(ValueError, match="must be finite"):
        run(pipe, cfg=1.0)


def test_a_pipeline_without_a_denoiser_is_refused(tiny_checkpoint: Callable[[str], Path]) -> None:
    class VaePipeline:
        vae = nn.Linear(1, 1)
        unet = None

    with pytest.raises(
        ValueError,
        match=r"VaePipeline has no denoiser named transformer, transformer_2,.* or unet",
    ):
        rlg.apply(VaePipeline(), tiny_checkpoint("sd"))

    class OddPipeline:
        unet = nn.Linear(1, 1)

    with pytest.raises(ValueError, match="Linear takes no LoRA"):
        rlg.apply(OddPipeline(), tiny_checkpoint("sd"))


def test_a_refused_adapter_leaves_the_pipeline_as_it_was(
    tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    pipe = plain(tiny_folder("sd"))
    before = run(pipe)
    for path, message in ((tiny_checkpoint("sd3"), "does not fit"), (tmp_path / "none", "no such checkpoint")):
        with pytest.raises(ValueError, match=message):
            rlg.apply(pipe, path)
        assert not lora.layers(pipe.unet)
        assert guided(pipe.unet) is None
        assert torch.equal(run(pipe), before)
    rlg.apply(pipe, tiny_checkpoint("sd"), scale=0.0)
    with pytest.raises(ValueError, match="is guided already; call unload"):
        rlg.apply(pipe, tiny_checkpoint("sd"), scale=2.0)
    assert torch.equal(run(pipe), before)


def test_image_to_image(tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]) -> None:
    """A pipeline class without a backbone of ours; one step is linear in w."""
    pipe = StableDiffusionImg2ImgPipeline(**plain(tiny_folder("sd")).components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    before = run_image(pipe, image)
    guide = rlg.apply(pipe, tiny_checkpoint("sd"))
    at = {w: (setattr(guide, "scale", w), run_image(pipe, image))[1] for w in (0.0, 1.0, 2.0)}
    assert torch.equal(at[0.0], before)
    assert (at[1.0] - at[0.0]).abs().max() > 1e-3
    torch.testing.assert_close(at[2.0], 2 * at[1.0] - at[0.0], rtol=1e-3, atol=1e-3)


def run_image(pipe: Any, image: Tensor) -> Tensor:
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    options = {"strength": 0.5, "num_inference_steps": 2, "generator": generators, "output_type": "latent"}
    return pipe(PROMPTS, image, guidance_scale=3.0, **options).images


def test_flux(tmp_path: Path) -> None:
    """Another family altogether, without a backbone of ours: a transformer that is told its guidance."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(8,), norm_num_groups=4, use_quant_conv=False)
    scheduler = FlowMatchEulerDiscreteScheduler()
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, transformer)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["to_q", "to_v", "proj_mlp"]))
    for name, parameter in pipe.transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapter_files.save(pipe, "transformer", tmp_path, "tiny-flux")
    tuned = run_flux(pipe)
    pipe.unload_lora_weights()
    base = run_flux(pipe)
    for path in (tmp_path, tmp_path / "pytorch_lora_weights.safetensors"):
        guide = rlg.apply(pipe, path, scale=0.0)
        assert torch.equal(run_flux(pipe), base)
        guide.scale = 1.0
        assert torch.equal(run_flux(pipe), tuned)
        guide.scale = 3.0
        torch.testing.assert_close(run_flux(pipe), base + 3 * (tuned - base), rtol=1e-4, atol=1e-4)
        guide.remove()
        pipe.unload_lora_weights()
    assert (tuned - base).abs().max() > 1e-3


def run_flux(pipe: FluxPipeline) -> Tensor:
    """One step, which is linear in w."""
    embeds, pooled = (torch.randn(*s, generator=torch.Generator().manual_seed(1)) for s in ((1, 5, 32), (1, 32)))
    options = {"height": 16, "width": 16, "num_inference_steps": 1, "output_type": "latent"}
    generator = torch.Generator().manual_seed(2)
    return pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, generator=generator, **options).images
