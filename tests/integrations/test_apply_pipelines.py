"""rlg.apply on pipelines of diffusers: each is what guidance by hand on its denoiser's outputs makes of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
from PIL import Image
from torch import Tensor

import rlg
from rlg.integrations import cfg_rules
from tests.support.pipelines_by_hand import (
    AGREE,
    MATTERS,
    PIPELINES,
    Case,
    applied,
    distance,
    guide_by_hand,
    result,
    with_lora,
)
from tests.support.tiny_pipelines import randn, stable_cascade_prior

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def case(tmp_path: Path) -> Callable[..., Case]:
    """A tiny pipeline under `rlg.apply`, by name."""
    return lambda name, scheduler=None: applied(name, tmp_path, scheduler)


@pytest.mark.parametrize("name", PIPELINES)
def test_by_hand(name: str, case: Callable[..., Case]) -> None:
    """w = 0 is the base pipeline, w = 1 the tuned one, w = 2 beyond; one weight an image is each image's own."""
    made = case(name)
    plain, at = made.plain(), {w: made.guided(w) for w in (0.0, 1.0, 2.0)}
    assert distance(at[0.0], plain) < AGREE
    for w in (1.0, 2.0):
        expected = made.by_hand(w)
        assert distance(at[w], expected) < AGREE
        assert distance(expected, plain) > MATTERS
    assert distance(at[2.0], at[1.0]) > MATTERS
    per_image = made.guided([0.0, 2.0])
    for i, w in enumerate((0.0, 2.0)):
        assert distance([x[i] for x in per_image], [x[i] for x in at[w]]) < AGREE
    made.guide.unload()
    assert distance(result(made.pipe, made.tiny), plain) < AGREE


def test_qwen_image_without_cfg(case: Callable[..., Case]) -> None:
    """The latents after one step are linear in the update: guidance of the denoiser is guidance of the two updates."""
    made = case("qwen_image")
    one = {"true_cfg_scale": 1.0, "num_inference_steps": 1, "negative_prompt_embeds": None}
    (base,), (tuned,), (guided,) = (made.by_hand(0.0, **one), made.by_hand(1.0, **one), made.guided(2.0, **one))
    assert distance([guided], [base + 2 * (tuned - base)]) < AGREE


def test_qwen_image_rescales_its_cfg(case: Callable[..., Case]) -> None:
    """Its rule is applied to the guided outputs; guidance of the two rescaled updates is another function.

    After one step from the same noise: latents = noise - rule(cond, uncond), rule = c |cond| / |c| for
    c = uncond + 3 (cond - uncond), norms over the channels of each token.
    """
    made = case("qwen_image")
    outputs: dict[str, list[Tensor]] = {}
    one = {"num_inference_steps": 1, "true_cfg_scale": 3.0}
    for name, w in (("base", 0.0), ("tuned", 1.0)):
        pipe = made.build()
        guide_by_hand(pipe.transformer, made.tensors["transformer"], lambda *_, w=w: w)
        found = outputs[name] = []
        pipe.transformer.register_forward_hook(lambda _, __, out, found=found: found.append(out[0]))
        result(pipe, made.tiny, **one)
    (guided,) = made.guided(2.0, **one)
    (start,) = made.by_hand(0.0, **one)
    noise = start + qwen_rule(*outputs["base"])
    cond, uncond = (b + 2 * (t - b) for b, t in zip(outputs["base"], outputs["tuned"], strict=True))
    after_guidance = noise - qwen_rule(cond, uncond)
    base, tuned = (noise - qwen_rule(*outputs[name]) for name in ("base", "tuned"))
    before_guidance = base + 2 * (tuned - base)
    assert distance([guided], [after_guidance]) < AGREE
    assert 0.05 < distance([guided], [before_guidance]) < 1


def qwen_rule(cond: Tensor, uncond: Tensor) -> Tensor:
    combined = uncond + 3.0 * (cond - uncond)
    return combined * cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)


def test_a_rescaled_cfg_is_said(tmp_path: Path) -> None:
    """At `rlg.apply` where a pipeline does it by default, in the call where an option turns it on."""
    for name, default in (("qwen_image", True), ("lumina2", True), ("sd", False), ("z_image", False)):
        made = Case(PIPELINES[name], tmp_path / name)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            made.guide = rlg.apply(made.pipe, made.tuned, 2.0)
        assert any("its classifier-free guidance" in str(w.message) for w in caught) == default, name
        option = {"sd": {"guidance_rescale": 0.7}, "z_image": {"cfg_normalization": True}}.get(name)
        if option:
            with pytest.warns(UserWarning, match="rescales the classifier-free guidance of this call"):
                made.guided(2.0, **option)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        made.guided(2.0)


RULES = ("noise_norm", "normalized_guidance(", "AdaptiveProjectedMixGuidance(", "guidance_rescale: float = 0.7")
BY_OPTION = ("QwenImageLayeredPipeline", "HunyuanImageRefinerPipeline")  # off unless an option or a part says so


def test_the_list_of_rescaling_pipelines_is_that_of_diffusers() -> None:
    """Every pipeline whose source names such a rule is known to have it; it is looked for in the installed source."""
    sources = Path(diffusers.__file__).parent.glob("pipelines/*/pipeline_*.py")
    texts = [path.read_text() for path in sources]
    with_rule = [text for text in texts if any(rule in text for rule in RULES)]
    found = [re.findall(r"^class (\w*Pipeline\w*)\(", text, re.MULTILINE) for text in with_rule]
    names = {name for names in found for name in names}
    assert len(names) >= 18
    for name in names:
        known = cfg_rules.by_default(type(name, (), {})()) is not None
        assert known == (name not in BY_OPTION), name


def test_keys_and_values_that_both_passes_would_write_to(case: Callable[..., Case]) -> None:
    """The pipeline keeps those of its reference image; guidance runs without one, and is refused with one."""
    made = case("flux2_klein_kv")
    picture = {"image": Image.new("RGB", (64, 64), "red"), "prompt_embeds": randn(1, 5, 16), "generator": None}
    made.guided(1.0, **picture)
    with pytest.raises(ValueError, match=r"values that differ and can't be mixed \(Flux2KVCache\)"):
        made.guided(2.0, **picture)
    with pytest.raises(ValueError, match=r"keeps its denoiser's keys and values from call to call \(kv_cache\)"):
        made.guided(lambda t: 1.0 if t == 1 else 0.0, **picture)


def test_a_denoiser_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="StableCascadePriorPipeline has no denoiser named transformer"):
        rlg.apply(stable_cascade_prior(), tmp_path)


def test_two_experts_from_the_folder_of_one_pipeline(tmp_path: Path) -> None:
    """Each denoiser gets the tuned network of its own name."""
    tiny = PIPELINES["wan_2_experts"]
    made = Case(tiny, tmp_path)
    for name, tensors in made.tensors.items():
        with_lora(getattr(made.pipe, name), tensors).save_pretrained(tmp_path / "tuned" / name)
    made.guide = rlg.apply(made.pipe, dict.fromkeys(tiny.denoisers, tmp_path / "tuned"), 2.0)
    assert distance(made.guided(2.0), made.by_hand(2.0)) < AGREE
