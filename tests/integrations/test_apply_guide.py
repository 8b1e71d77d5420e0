"""The guide itself: weights, schedules, passes in one batch, saving, and SD3's equal text tokens."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor, nn

import rlg
from rlg.integrations.guided_network import guided
from tests.support.by_hand import add_random_lora
from tests.support.guided_pipelines import PROMPTS, ULPS, Folder, W, aligned, by_hand, flux, image, load, save


@pytest.mark.numerics
def test_the_difference_that_w_makes_is_large(sd3_pipe: Any, guided_latents: Tensor) -> None:
    plain, tuned = by_hand(sd3_pipe, w=0.0), by_hand(sd3_pipe, w=1.0)
    assert (plain - image(sd3_pipe)).abs().max() < 1e-3
    assert (guided_latents - tuned).abs().max() > 0.1 < (tuned - plain).abs().max()


@pytest.mark.parametrize("scale", [[0.0, 2.0], (0, 2), np.array([0.0, 2.0]), lambda t: torch.tensor([0.0, 2.0])])
@pytest.mark.parametrize("cfg", [1.0, 3.0])
def test_a_weight_an_image(scale: Any, cfg: float, sd3_pipe: Any, lora_files: dict[str, Path]) -> None:
    guide = rlg.apply(sd3_pipe, lora_files["aligned"])
    alone = []
    for w in (0.0, 2.0):
        guide.scale = w
        alone.append(image(sd3_pipe, cfg))
    guide.scale = scale
    together = image(sd3_pipe, cfg)
    torch.testing.assert_close(together[0], alone[0][0], **ULPS)
    torch.testing.assert_close(together[1], alone[1][1], **ULPS)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("1.5", "must be a number"),
        (True, "must be a number"),
        (None, "must be a number, a list"),
        ({"w": 1}, "must be a number, a list"),
        ([], "must be a number an image"),
        ([[1.0, 2.0]], "must be a number an image"),
        ([1.0, float("nan")], "finite"),
    ],
)
def test_what_is_no_weight_is_refused_when_it_is_set(
    scale: Any, message: str, sd3_pipe: Any, lora_files: dict[str, Path]
) -> None:
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], 1.5)
    with pytest.raises(ValueError, match=message):
        guide.scale = scale
    assert guide.scale == 1.5
    with pytest.raises(ValueError, match="unknown schedule"):
        guide.schedule = "sometimes"


def test_a_wrong_number_of_weights(sd3_pipe: Any, lora_files: dict[str, Path]) -> None:
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="3 guidance weights for a batch of 4; give a number, or a weight for each"):
        image(sd3_pipe)
    guide.scale = [2.0]  # the pipeline says that it runs without CFG, where a row is an image
    with pytest.raises(ValueError, match="1 guidance weights for a batch of 2"):
        image(sd3_pipe, cfg=1.0)


def test_schedules_by_name(sd3_pipe: Any, lora_files: dict[str, Path]) -> None:
    """Noise levels 1, 0.5005 and 0.001 of three steps without shift; w - 1 times the share of each."""
    sd3_pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    guide = rlg.apply(sd3_pipe, lora_files["aligned"], 3.0, schedule="interval:0.5:0.9")
    in_the_middle = image(sd3_pipe)
    guide.schedule = "constant"
    times = sd3_pipe.scheduler.timesteps.tolist()
    assert times == pytest.approx([1000, 500.5, 1])
    guide.scale = lambda t: 3.0 if t == pytest.approx(times[1]) else 1.0
    torch.testing.assert_close(in_the_middle, image(sd3_pipe), rtol=1e-2, atol=1e-3)  # w = 3, rounded twice
    guide.scale = lambda t: 1 + 2 * t / 1000
    down = image(sd3_pipe)
    guide.scale, guide.schedule = 3.0, "linear_down"
    torch.testing.assert_close(down, image(sd3_pipe), rtol=1e-2, atol=1e-3)


def test_with_and_repr_and_another_pipeline_of_the_same_parts(sd3_pipe: Any, lora_files: dict[str, Path]) -> None:
    before, keys, kind = image(sd3_pipe), set(sd3_pipe.transformer.state_dict()), type(sd3_pipe.transformer)
    with rlg.apply(sd3_pipe, lora_files["aligned"], 1.6, mode="reuse:2") as guide:
        shown = repr(guide)
        assert all(part in shown for part in (str(lora_files["aligned"]), "transformer", "w=1.6", "reuse:2"))
        assert (image(sd3_pipe) - before).abs().max() > 1e-2
        other = AutoPipelineForImage2Image.from_pipe(sd3_pipe)
        assert guided(other.transformer) is not None
        assert guided(copy.deepcopy(sd3_pipe.transformer)) is None
    assert "removed" in repr(guide)
    assert torch.equal(image(sd3_pipe), before)
    assert set(sd3_pipe.transformer.state_dict()) == keys and type(sd3_pipe.transformer) is kind


def test_saving_a_guided_pipeline_writes_the_base(sd3_pipe: Any, lora_files: dict[str, Path], tmp_path: Path) -> None:
    before = image(sd3_pipe)
    rlg.apply(sd3_pipe, lora_files["aligned"], W)
    sd3_pipe.save_pretrained(tmp_path)
    torch.testing.assert_close(image(load(tmp_path)), before)


@pytest.mark.numerics
def test_the_two_passes_in_one_batch(
    sd3_pipe: Any, lora_files: dict[str, Path], guided_latents: Tensor, tiny_folder: Folder
) -> None:
    calls = []
    sd3_pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: calls.append(1))
    rlg.apply(sd3_pipe, lora_files["aligned"], W, mode="full+batch")
    torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    assert len(calls) == 3
    unet = load(tiny_folder("sd"))
    network = copy.deepcopy(unet.unet)
    expected = by_hand(unet)
    aligned(network)
    folder = tmp_folder(tiny_folder, network)
    rlg.apply(unet, folder, W, mode="full+batch")
    torch.testing.assert_close(image(unet), expected, **ULPS)
    with pytest.raises(ValueError, match="not known to stack the arguments of a FluxTransformer2DModel"):
        tuned = flux()
        add_random_lora(tuned.transformer, "mine")
        rlg.apply(tuned, adapters=["mine"], mode="full+batch")


def tmp_folder(tiny_folder: Folder, network: nn.Module) -> Path:
    return save(network, tiny_folder("sd").parent / "aligned-sd", kind="unet")


# --- SD3 without T5


@contextmanager
def text_tokens(network: nn.Module) -> Iterator[list[int]]:
    """A list that grows with each pass by the number of text tokens in its first block."""
    seen: list[int] = []
    handle = network.context_embedder.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    yield seen
    handle.remove()


def test_equal_text_tokens_are_passed_once(sd3_pipe: Any, lora_files: dict[str, Path], guided_latents: Tensor) -> None:
    rlg.apply(sd3_pipe, lora_files["aligned"], W)
    with text_tokens(sd3_pipe.transformer) as seen:
        torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    full = image_tokens(sd3_pipe)
    assert set(seen) == {full - 255}
    processors = {type(block.attn.processor).__name__ for block in sd3_pipe.transformer.transformer_blocks}
    assert processors == {"JointAttnProcessor2_0"}  # put back after each pass
    for block in sd3_pipe.transformer.transformer_blocks:
        block.attn.processor._attention_backend = "native"  # the user's choice of kernel stays
    with text_tokens(sd3_pipe.transformer) as seen:
        torch.testing.assert_close(image(sd3_pipe), guided_latents, **ULPS)
    assert set(seen) == {full}


def image_tokens(pipe: Any) -> int:
    """Text tokens that the pipeline makes."""
    return pipe.encode_prompt(PROMPTS, None, None, do_classifier_free_guidance=False)[0].shape[1]
