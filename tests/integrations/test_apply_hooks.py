"""rlg.apply among hooks: offloading, step caches, compilation, against guidance by hand of two networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxPipeline,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading
from torch import Tensor

import rlg
from rlg.integrations.guided_network import guided
from rlg.models import lora
from tests.support.by_hand import copies, guided_by_hand
from tests.support.guided_pipelines import (
    ULPS,
    Folder,
    W,
    flux,
    flux_image,
    flux_lora,
    image,
    load,
    save_flux,
    sequentially,
)


def offloaded(pipe: Any, kind: str) -> None:
    device = torch.device("cpu")
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu:0")
    else:
        groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(pipe.transformer, onload_device=device, offload_type=kind, **groups)


@pytest.mark.parametrize("kind", ["model", "block_level", "leaf_level"])
@pytest.mark.parametrize("first", ["offload", "guide"])
def test_offloading(
    first: str,
    kind: str,
    sd3_pipe: Any,
    lora_files: dict[str, Path],
    guided_latents: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Guided in every call: diffusers takes accelerate's hooks off after each one, and puts them on again."""
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    if first == "offload":
        offloaded(sd3_pipe, kind)
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], W)
    if first == "guide":
        offloaded(sd3_pipe, kind)
    for _ in range(2):
        torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    guide.remove()
    hooks = ("_hf_hook", "_diffusers_hook")
    assert any(hasattr(module, hook) for module in sd3_pipe.transformer.modules() for hook in hooks)
    assert guided(sd3_pipe.transformer) is None
    at_one = image(sd3_pipe)
    torch.testing.assert_close(image(sd3_pipe), at_one)
    assert (at_one - guided_latents).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["model", "block_level"])
def test_offloading_of_a_peft_folder(
    kind: str, tiny_folder: Folder, tiny_checkpoint: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    plain, pipe = load(tiny_folder("sd3")), load(tiny_folder("sd3"))
    offloaded(pipe, kind)
    for each in (plain, pipe):
        rlg.apply(each, tiny_checkpoint("sd3") / "adapter", W)
    torch.testing.assert_close(image(pipe), image(plain), **ULPS)


@pytest.mark.parametrize("first", ["offload", "guide"])
def test_sequential_offloading(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer by layer, as loading an adapter finds it and puts it back."""
    monkeypatch.setattr(FluxPipeline, "enable_sequential_cpu_offload", sequentially)
    reference, pipe = flux(), flux()
    base, tuned = copies(reference.transformer, flux_lora)
    with guided_by_hand(reference.transformer, base, tuned, W):
        expected = flux_image(reference, steps=2)
    if first == "offload":
        pipe.enable_sequential_cpu_offload(device="cpu:0")
    guide = rlg.apply(pipe, save_flux(tmp_path), W)
    if first == "guide":
        pipe.enable_sequential_cpu_offload(device="cpu:0")
    assert {p.device.type for p in pipe.transformer.parameters()} == {"meta"}
    for _ in range(2):
        torch.testing.assert_close(flux_image(pipe, steps=2), expected, **ULPS)
    guide.remove()
    assert hasattr(pipe.transformer.proj_out, "_hf_hook")


# --- step caches


CACHES: dict[str, Callable[[Any], Any]] = {
    "first_block": lambda pipe: FirstBlockCacheConfig(threshold=0.5),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1),
    "mag": lambda pipe: MagCacheConfig(
        threshold=0.5, max_skip_steps=2, num_inference_steps=8, mag_ratios=torch.linspace(1.0, 0.9, 8)
    ),
    "pyramid": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        spatial_attention_block_identifiers=("transformer_blocks",),
        current_timestep_callback=lambda: 500,
    ),
}


@pytest.mark.parametrize("first", ["cache", "guide"])
@pytest.mark.parametrize("cache", CACHES)
def test_each_pass_has_its_own_step_cache(cache: str, first: str, tmp_path: Path) -> None:
    plain, reference, pipe, file = flux(), flux(), flux(), save_flux(tmp_path)
    base, tuned = copies(reference.transformer, flux_lora)
    for one in (base, tuned):
        one.enable_cache(CACHES[cache](reference))
    with guided_by_hand(reference.transformer, base, tuned, W, around=lambda one: one.cache_context("mine")):
        expected = flux_image(reference)
    if first == "cache":
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    guide = rlg.apply(pipe, file, W)
    if first == "guide":
        pipe.transformer.enable_cache(CACHES[cache](pipe))
    for _ in range(2):  # the second call begins with empty caches
        torch.testing.assert_close(flux_image(pipe), expected, **ULPS)
    guide.remove()
    pipe.transformer.disable_cache()
    rlg.apply(plain, file, W)
    assert (flux_image(plain) - expected).abs().max() > 1e-5, "the cache had nothing to do"


# --- compilation


COMPILED = [("wrapper", "guide"), ("in_place", "compile")]
SLOW = [("wrapper", "compile"), ("in_place", "guide")]  # the same code paths the other way round


@pytest.mark.parametrize(
    ("how", "first"), [*COMPILED, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_compilation(how: str, first: str, sd3_pipe: Any, lora_files: dict[str, Path], guided_latents: Tensor) -> None:
    """Base and tuned pass are a graph each, without a break, and the guide stands outside of them."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def compiled() -> None:
        if how == "in_place":
            sd3_pipe.transformer.compile(backend=backend, fullgraph=True)
        else:
            sd3_pipe.transformer = torch.compile(sd3_pipe.transformer, backend=backend, fullgraph=True)

    torch._dynamo.reset()
    if first == "compile":
        compiled()
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], W)
    if first == "guide":
        compiled()
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    guide.scale = 1.0
    image(sd3_pipe)
    assert len(graphs) == 2
    guide.unload()
    assert not lora.layers(lora.unwrapped(sd3_pipe.transformer))
