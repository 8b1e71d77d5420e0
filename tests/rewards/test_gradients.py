"""Scores with their gradient: against finite differences, the rounded path, and what each formula says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rewards import REWARDS, DifferentiableReward, RewardError, RewardMix, build, gradients, preprocessing
from rewards import weights as weights_of
from rewards.gradients import GradientReward
from rewards.ink import ink_of, steps
from rewards.jpeg import size_kb
from rlg.tinyworld.worlds import EMOJI, SHAPES, World
from tests.support import published
from tests.support.documented import python_blocks
from tests.support.paths import ROOT

pytestmark = pytest.mark.usefixtures("tiny_architectures")
PLAIN = ("ink", "smoothness", "colourfulness")
CROPPED = ("pickscore", "clipscore", "imagereward", "aesthetic")
ALL = (*PLAIN, *published.REWARDS)
PROMPTS = ["a red circle", "two blue crosses", "green squares", "red"]
SHAPE = (4, 3, 40, 61)


@pytest.fixture
def source(folders: dict[str, Path]) -> Callable[[str], str]:
    """The name as `build` takes it, with the folder of its tiny model where it has one."""
    return lambda name: f"{name}={folders[name]}" if name in folders else name


def pictures(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    """Smooth random images within [0.1, 0.9]."""
    coarse = torch.rand(shape[0], 3, 6, 6, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return 0.1 + 0.8 * functional.interpolate(coarse, shape[2:], mode="bilinear")


def on_levels(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def blank(batch: int = 4) -> list[dict]:
    return [{} for _ in range(batch)]


def scenes(world: World, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    prompts = world.composition_prompts("test")
    return world.draw(prompts[:: math.ceil(len(prompts) / count)], generator)


# The contract


def test_the_table_says_which_rewards_have_a_gradient(source: Callable[[str], str]) -> None:
    assert {name for name, spec in REWARDS.items() if spec.gradient} == set(ALL)
    here = [name for name, spec in REWARDS.items() if spec.needs == "-" and not spec.missing()]
    for name in {*here, *ALL}:
        (reward,) = build([source(name)]).rewards.values()
        assert isinstance(reward, DifferentiableReward) == REWARDS[name].gradient, name


@pytest.mark.parametrize("names", [["jpeg_compressibility"], ["ink", "geneval=no/such"], ["remote=http://no"]])
def test_a_reward_without_a_gradient_is_refused_in_one_line_that_names_vard(names: list[str]) -> None:
    with pytest.raises(ValueError, match=r"^reward '\w+' has no gradient: GRPO .* these have one: ink, ") as caught:
        gradients.build(names)
    assert "\n" not in str(caught.value)


def test_a_function_without_a_gradient_is_refused_too() -> None:
    with pytest.raises(ValueError, match="reward 'mine' has no gradient: GRPO"):
        GradientReward(RewardMix({"mine": lambda images, prompts, metadata: images.mean(dim=(1, 2, 3))}, (1.0,)))


def test_a_reward_of_weight_0_is_logged_and_needs_no_gradient() -> None:
    mixed = gradients.build(["ink", "jpeg_compressibility"], [1.0, 0.0])(pictures(), PROMPTS, blank())
    alone = gradients.build(["ink"])(pictures(), PROMPTS, blank())
    assert torch.equal(mixed.gradient_B3HW, alone.gradient_B3HW)
    assert torch.equal(mixed.total_B, alone.total_B)
    assert torch.equal(mixed.parts["jpeg_compressibility"], -size_kb(pictures()))


@pytest.mark.parametrize(
    ("names", "message"),
    [("ink", "must be a list of names"), (["inc"], "did you mean 'ink'"), (["ink", "ink"], "more than once")],
)
def test_names_are_those_of_build(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradients.build(names)
    with pytest.raises(ValueError, match=r"1 rewards \(ink\) but 2 weights"):
        gradients.build(["ink"], [1.0, 2.0])


@pytest.mark.parametrize("name", ALL)
def test_each_image_has_its_own_gradient_in_chunks_of_any_size(
    name: str, source: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reward = gradients.build([source(name)])
    whole = reward(pictures(), PROMPTS, blank())
    assert whole.total_B.shape == (4,) and whole.total_B.dtype == torch.float32
    assert whole.gradient_B3HW.shape == SHAPE and whole.gradient_B3HW.dtype == torch.float32
    size_B = whole.gradient_B3HW.abs().amax(dim=(1, 2, 3))
    assert (size_B > 0).all()
    monkeypatch.setattr(gradients, "AT_ONCE", 1)
    alone = reward(pictures(), PROMPTS, blank())
    assert torch.allclose(alone.total_B, whole.total_B, rtol=1e-5, atol=1e-5)
    assert torch.allclose(alone.gradient_B3HW, whole.gradient_B3HW, rtol=1e-3, atol=1e-4 * float(size_B.max()))


def test_no_images_have_no_scores() -> None:
    scored = gradients.build(["ink"])(torch.ones(0, 3, 8, 8), [], [])
    assert scored.total_B.shape == scored.parts["ink"].shape == (0,)
    assert scored.gradient_B3HW.shape == (0, 3, 8, 8)


def test_a_mix_has_the_weighted_gradient() -> None:
    names, weights = ["ink", "smoothness", "colourfulness"], [-1.0, 0.1, 0.01]
    mixed = gradients.build(names, weights)(pictures(), PROMPTS, blank())
    alone = [gradients.build([name])(pictures(), PROMPTS, blank()) for name in names]
    expected = sum(weight * each.gradient_B3HW for weight, each in zip(weights, alone, strict=True))
    assert torch.allclose(mixed.gradient_B3HW, expected, rtol=1e-5, atol=1e-9)
    assert [mixed.parts[name].tolist() for name in names] == [each.total_B.tolist() for each in alone]
    assert torch.allclose(
        mixed.total_B, sum(weight * each.total_B for weight, each in zip(weights, alone, strict=True))
    )


def test_it_works_without_grad_mode_and_keeps_no_graph() -> None:
    reward, images = gradients.build(["ink"]), pictures().requires_grad_()
    expected = reward(images, PROMPTS, blank())
    assert not expected.gradient_B3HW.requires_grad and not expected.total_B.requires_grad
    assert images.grad is None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(reward(pictures(), PROMPTS, blank()).gradient_B3HW, expected.gradient_B3HW)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(pictures(), PROMPTS, blank()).gradient_B3HW, expected.gradient_B3HW)
    half = reward(pictures().bfloat16(), PROMPTS, blank())
    assert half.gradient_B3HW.dtype == torch.float32
    assert reward(pictures().double(), PROMPTS, blank()).gradient_B3HW.dtype == torch.float64


def root_of(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
    """An infinite slope where the first pixel is 0, and NaN below."""
    return (images[:, 0, 0, 0] - 0.25).sqrt()


def test_what_is_not_finite_is_an_error_or_left_out() -> None:
    images = torch.full((3, 3, 4, 4), 0.5)
    images[1, 0, 0, 0], images[2, 0, 0, 0] = 0.25, 0.0
    mix = RewardMix({"root": DifferentiableReward(root_of, root_of)}, (2.0,))
    with pytest.raises(RewardError, match=r"'root' has a score or a gradient that is not finite \(score 0.0\) for im"):
        GradientReward(mix)(images, PROMPTS[:3], blank(3))
    scored = GradientReward(RewardMix(mix.rewards, mix.weights, lenient=True))(images, PROMPTS[:3], blank(3))
    assert scored.total_B.isnan().tolist() == scored.parts["root"].isnan().tolist() == [False, True, True]
    assert scored.gradient_B3HW[0, 0, 0, 0] == 2 * 0.5 / math.sqrt(0.25)
    assert not scored.gradient_B3HW[1:].any()


@pytest.mark.parametrize(
    ("unrounded", "got"),
    [
        (lambda images, prompts, metadata: images.mean(dim=(1, 2)), "shape (3, 4) with a graph"),
        (lambda images, prompts, metadata: images.detach().mean(dim=(1, 2, 3)), "shape (3,) without a graph"),
    ],
)
def test_scores_without_a_graph_or_of_another_shape_are_refused(unrounded: Callable[..., Tensor], got: str) -> None:
    reward = GradientReward(RewardMix({"wrong": DifferentiableReward(root_of, unrounded)}, (1.0,)))
    with pytest.raises(RewardError, match=re.escape(f"reward 'wrong' returned {got} for 3 images")):
        reward(torch.ones(3, 3, 4, 4), PROMPTS[:3], blank(3))


def test_the_page_shows_how_they_are_used() -> None:
    (block,) = python_blocks(ROOT / "docs" / "rewards.md")
    names = {"images": pictures(), "prompts": PROMPTS, "metadata": blank()}
    exec(block, names)
    assert names["scored"].gradient_B3HW.shape == SHAPE
    assert names["scored"].parts.keys() == {"ink", "smoothness"}


# The gradient


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 3, 9, 21), (1, 3, 1, 3)])
def test_gradients_are_those_of_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    (reward,) = build([name]).rewards.values()
    noise = 0.2 + 0.6 * torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def score(images: Tensor) -> Tensor:
        return reward.unrounded(images, PROMPTS[: len(images)], blank(len(images)))

    fast = shape[2] > 1  # random directions; every pixel by itself would take a second, and minutes on a busy machine
    assert torch.autograd.gradcheck(score, noise.requires_grad_(), atol=1e-5, rtol=1e-5, fast_mode=fast)


@pytest.mark.parametrize("name", published.REWARDS)
def test_gradients_of_models_are_those_of_finite_differences(name: str, source: Callable[[str], str]) -> None:
    """Along the gradient, and with the networks in float64."""
    reward = gradients.build([source(name)])
    (differentiable,) = reward.mix.rewards.values()
    for network in differentiable.networks:
        network.double()
    images = pictures(dtype=torch.float64)
    slope = reward(images, PROMPTS, blank()).gradient_B3HW
    step = 1e-5 * slope / slope.abs().amax(dim=(1, 2, 3), keepdim=True)
    with torch.no_grad():
        ahead, behind = (differentiable.unrounded(images + sign * step, PROMPTS, blank()) for sign in (1, -1))
    assert torch.allclose((ahead - behind) / 2, (step * slope).sum(dim=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(("size", "side"), [((9, 13), 7), ((14, 8), 8), ((5, 5), 8)])
def test_the_preprocessing_has_the_gradient_of_finite_differences(size: tuple[int, int], side: int) -> None:
    images = pictures((1, 3, *size), torch.float64).requires_grad_()
    for half in (preprocessing.floor_half, preprocessing.round_half):
        assert torch.autograd.gradcheck(lambda x, h=half: preprocessing.centre_crop(x, side, h, rounded=False), images)
    assert torch.autograd.gradcheck(lambda x: preprocessing.pad_to_square(x, side, rounded=False), images)


@pytest.mark.parametrize("name", ALL)
def test_a_step_along_the_gradient_raises_the_score_of_the_files(name: str, source: Callable[[str], str]) -> None:
    reward = gradients.build([source(name)])
    images = on_levels(pictures())
    slope = reward(images, PROMPTS, blank()).gradient_B3HW
    moved = (images + 0.02 * slope / slope.abs().amax(dim=(1, 2, 3), keepdim=True)).clamp(0, 1)
    before, after = (reward.mix(x, PROMPTS, blank()).total_B for x in (images, moved))
    assert (after > before).all()


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "imagereward", "aesthetic"])
def test_gradients_go_through_fp32_where_scores_were_fp16(
    name: str, source: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = gradients.build([source(name)])(pictures(), PROMPTS, blank())
    for module in ("clip", "aesthetic", "hpsv2", "imagereward"):
        monkeypatch.setattr(f"rewards.{module}.half_on_gpu", lambda device: torch.float16)
    reward = gradients.build([source(name)])
    (differentiable,) = reward.mix.rewards.values()
    assert {p.dtype for network in differentiable.networks for p in network.parameters()} == {torch.float32}
    found = reward(pictures(), PROMPTS, blank())
    assert torch.allclose(found.total_B, exact.total_B, rtol=0.02, atol=0.01)
    apart = (found.gradient_B3HW - exact.gradient_B3HW).norm() / exact.gradient_B3HW.norm()
    assert apart < 0.02  # the weights were rounded to fp16 when they were read


# The scores


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("size", [(28, 28), (28, 31), (37, 28)])
def test_scores_are_those_of_the_rounded_path_where_nothing_is_rounded(
    name: str, size: tuple[int, int], source: Callable[[str], str]
) -> None:
    """Images of 256 levels that a crop does not resize; padding resizes without rounding."""
    reward, images = gradients.build([source(name)]), on_levels(pictures((4, 3, *size)))
    expected = reward.mix(images, PROMPTS, blank()).total_B
    assert torch.allclose(reward(images, PROMPTS, blank()).total_B, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CROPPED)
def test_scores_are_those_of_the_rounded_path_up_to_rounding(name: str, source: Callable[[str], str]) -> None:
    """Resized images: an error of one level moves a score by at most its gradient's sum over the pixels."""
    reward, images = gradients.build([source(name)]), on_levels(pictures())
    scored, expected = reward(images, PROMPTS, blank()), reward.mix(images, PROMPTS, blank()).total_B
    bound = scored.gradient_B3HW.abs().sum(dim=(1, 2, 3)) / 255
    apart = (scored.total_B - expected).abs()
    assert (apart < bound).all()
    assert apart.max() < 0.05 * expected.std()


@pytest.mark.parametrize("size", [(40, 61), (61, 40), (28, 90), (17, 23), (300, 301), (512, 512)])
def test_the_unrounded_crop_is_pils_up_to_its_rounding(size: tuple[int, int]) -> None:
    """Noise with edges, so that the bicubic filter leaves [0, 1], and what is clamped matters."""
    noise = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0)).round()
    for half in (preprocessing.floor_half, preprocessing.round_half):
        rounded, floats = (preprocessing.centre_crop(noise, published.SIDE, half, rounded=r) for r in (True, False))
        levels_apart = (rounded - floats) * torch.tensor(preprocessing.CLIP_STD).view(3, 1, 1) * 255
        assert levels_apart.abs().max() < 1.5  # half a level in each direction, and PIL's weights of 8 bits
        assert levels_apart.square().mean().sqrt() < 0.6


# The formulas


def test_ink_of_a_blank_picture_is_its_first_mean() -> None:
    """White has luma 127 above JPEG's zero, whose DCT is 8 times that; the other blocks do not differ from it."""
    white = torch.full((1, 3, 32, 48), 255.0, dtype=torch.float64)
    expected = math.log2(1 + (2 * 8 * 127 / steps()[0][0]) ** 2) / 2 / 8000
    assert ink_of(white).item() == pytest.approx(expected, rel=1e-9)


def test_ink_of_a_wave_is_that_of_its_coefficient() -> None:
    """A row of the DCT, in every second block of one row; grey has no chroma, and its mean is that of the rest."""
    place = torch.arange(8, dtype=torch.float64)
    wave = 10 * (math.pi / 8 * 3 * (place + 0.5)).cos() * math.sqrt(2 / 8) / math.sqrt(8)  # frequency 3, of length 10
    image = torch.full((1, 3, 16, 16), 128.0, dtype=torch.float64)
    image[:, :, :8, 8:] += wave
    expected = math.log2(1 + (2 * 10 / steps()[0][3]) ** 2) / 2 / 8000
    assert ink_of(image).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("world", [SHAPES, EMOJI], ids=lambda world: world.name)
def test_ink_ranks_scenes_as_their_files_do(world: World) -> None:
    """Spearman's rank correlation with the JPEG's size, of drawn scenes, and of scenes with noise of many sizes."""
    images = scenes(world, 90)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator) * torch.rand(len(images), 1, 1, 1, generator=generator)
    for pictured in (images, (images + 0.05 * noise).clamp(0, 1), functional.avg_pool2d(images, 3, 1, 1)):
        ranks = torch.stack(
            [score.argsort().argsort().double() for score in (ink_of(pictured * 255), size_kb(pictured))]
        )
        assert len(pictured) > 60 and torch.corrcoef(ranks)[0, 1] > 0.97


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ([[0.0, 1.0], [0.0, 1.0]], -255 * 2 / 4),
        ([[0.2, 0.2, 0.2]], 0.0),
        ([[0.0, 0.4], [0.2, 1.0]], -255 * (0.4 + 0.8 + 0.2 + 0.6) / 4),
    ],
)
def test_smoothness_by_hand(image: list[list[float]], expected: float) -> None:
    picture = torch.tensor(image).expand(1, 3, -1, -1)
    assert build(["smoothness"])(picture, [""], blank(1)).total_B.item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("colour", [(0.5, 0.5, 0.5), (0.25, 0.5, 1.0)])
def test_colourfulness_has_a_finite_gradient_where_its_roots_are_0(colour: tuple[float, float, float]) -> None:
    flat = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 6, 6)
    scored = gradients.build(["colourfulness"])(flat, [""], blank(1))
    assert scored.gradient_B3HW.isfinite().all()
    red, green, blue = (255 * level for level in colour)
    length = math.hypot(red - green, (red + green) / 2 - blue)
    assert scored.total_B.item() == pytest.approx(0.3 * length, rel=1e-6)
    assert bool(scored.gradient_B3HW.any()) == (length > 0)


def test_the_batch_of_a_model_is_a_reward_with_its_networks() -> None:
    network = torch.nn.Linear(1, 1)
    reward = weights_of.batched(lambda images, prompts, *, rounded: images.mean(dim=(1, 2, 3)) + rounded, network)
    assert reward.networks == (network,)
    assert (reward(torch.zeros(2, 3, 4, 4), PROMPTS[:2], blank(2)) == 1).all()
    assert (reward.unrounded(torch.zeros(2, 3, 4, 4), PROMPTS[:2], blank(2)) == 0).all()
