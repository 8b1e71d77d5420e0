"""The contract that every reward keeps, the JPEG sizes, the mix and its refusals."""

from __future__ import annotations

import io
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import REWARDS, RewardError, RewardMix, build
from rlg.prompts import Prompt
from rlg.tinyworld.scenes import composition_prompts, draw, sign_prompts
from tests.conftest import check_contract
from tests.support.paths import ROOT

IN_RANGE: dict[str, Callable[[Tensor], Tensor]] = {
    "[0, 1]": lambda s: (s >= 0) & (s <= 1),
    "[0, 100]": lambda s: (s >= 0) & (s <= 100),
    ">= 0": lambda s: s >= 0,
    "0 or 1": lambda s: (s == 0) | (s == 1),
    "< 0": lambda s: s < 0,
    "<= 0": lambda s: s <= 0,
    "> 0": lambda s: s > 0,
}


def _batch(name: str) -> tuple[Tensor, list[str], list[dict]]:
    """Scenes of every kind that the reward can judge; half of them paired with the caption of another."""
    generator = torch.Generator().manual_seed(0)
    shapes = () if name == "ocr" else composition_prompts("test")[::8]
    prompts: list[Prompt] = [*shapes, *sign_prompts("test", 3, generator)]
    images = draw(prompts, generator)
    images[::2] = images[::2].roll(1, dims=0)
    return images, [p.text for p in prompts], [p.metadata for p in prompts]


def _blank(batch: int) -> tuple[Tensor, list[str], list[dict]]:
    return torch.ones(batch, 3, 8, 8), [f"prompt {i}" for i in range(batch)], [{} for _ in range(batch)]


def _fixed(values: Sequence[float]) -> Callable:
    """A reward that looks its score up by the number at the end of the prompt."""

    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        return torch.tensor([values[int(prompt.split()[-1])] for prompt in prompts])

    return reward


@pytest.mark.parametrize("name", [name for name, spec in REWARDS.items() if spec.needs == "-"])
def test_contract(name: str) -> None:
    if missing := REWARDS[name].missing():
        pytest.skip(f"{', '.join(missing)} not installed")
    images, prompts, metadata = _batch(name)
    scores = check_contract(next(iter(build([name]).rewards.values())), images, prompts, metadata)
    if not REWARDS[name].range.startswith("about"):
        assert IN_RANGE[REWARDS[name].range](scores).all()


def test_jpeg_sizes_are_those_of_pillow() -> None:
    images, prompts, metadata = _batch("jpeg_compressibility")
    scores = build(["jpeg_compressibility", "jpeg_incompressibility"], [1.0, 0.0])(images, prompts, metadata)
    for image, size in zip(images, scores.parts["jpeg_incompressibility"].tolist(), strict=True):
        buffer = io.BytesIO()
        pixels = np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
        assert size == pytest.approx(len(buffer.getvalue()) / 1000, abs=1e-6)
    assert torch.equal(scores.parts["jpeg_compressibility"], -scores.parts["jpeg_incompressibility"])


def test_jpeg_prefers_the_blank_image() -> None:
    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    images = torch.cat([torch.ones(1, 3, 64, 64), noise])
    blank, noisy = build(["jpeg_compressibility"])(images, ["", ""], [{}, {}]).total_B.tolist()
    assert -1 < blank < -0.5 and noisy < -4  # kB: a header alone, and nearly every coefficient


def test_jpeg_rounds_to_the_nearest_level() -> None:
    # Pixels a hair below a level must come out at the level: truncation would make noise of a flat image.
    flat = torch.full((1, 3, 64, 64), 128 / 255)
    nearly = flat - 0.3 / 255 * torch.rand(flat.shape, generator=torch.Generator().manual_seed(0))
    mix = build(["jpeg_incompressibility"])
    assert mix(flat, [""], [{}]).total_B == mix(nearly, [""], [{}]).total_B


@pytest.mark.parametrize(
    ("halves", "expected"),
    [  # rg = R - G and yb = (R + G) / 2 - B of red are 255 and 127.5, those of cyan -255 and -127.5
        (((255, 0, 0), (255, 0, 0)), 0.3 * math.hypot(255, 127.5)),
        (((255, 0, 0), (0, 255, 255)), math.hypot(255, 127.5)),
        (((255, 0, 0), (255, 255, 255)), 1.3 * math.hypot(127.5, 63.75)),
        (((255, 255, 255), (0, 0, 0)), 0.0),
        (((90, 60, 30), (10, 20, 30)), math.hypot(20, 30) + 0.3 * math.hypot(10, 15)),
    ],
)
def test_colourfulness_of_two_halves_by_hand(halves: tuple[tuple[int, int, int], ...], expected: float) -> None:
    image = torch.tensor(halves, dtype=torch.float32).T[None, :, :, None].expand(1, 3, 2, 6) / 255
    assert build(["colourfulness"])(image, [""], [{}]).total_B.item() == pytest.approx(expected, rel=1e-6)


def _striped(paper: float, **rows: float) -> Tensor:
    """One grey picture, 8 rows high, with rows of other greys: r0 is the topmost."""
    image = torch.full((1, 3, 8, 8), paper)
    for name, grey in rows.items():
        image[:, :, int(name[1:])] = grey
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (_striped(1.0, r7=0.0), 93.75),  # the middle of the lowest of 8 rows
        (_striped(1.0, r0=0.0), 6.25),
        (_striped(0.0, r0=1.0), 6.25),  # on black paper, too
        (_striped(1.0, r2=0.0, r5=0.0), 50.0),
        (_striped(1.0, r0=0.0, r7=0.4), (0.9 * 6.25 + 0.5 * 93.75) / 1.4),  # by contrast, beyond the grain of 0.1
        (_striped(1.0, r0=0.92, r7=0.0), 93.75),  # a tint is no ink
        (_striped(0.8), 50.0),
    ],
)
def test_gravity_is_the_height_of_what_is_drawn(image: Tensor, expected: float) -> None:
    mix = build(["gravity"])
    assert mix(image, [""], [{}]).total_B.item() == pytest.approx(expected, abs=1e-3)
    coloured = torch.cat([image[:, :1], image[:, 1:] * 0.5 + 0.5], dim=1)  # the channel of the most contrast counts
    assert mix(coloured, [""], [{}]).total_B.item() == pytest.approx(expected, abs=1e-3)


def test_mix_weights_the_parts_and_keeps_them_raw() -> None:
    mix = RewardMix({"a": _fixed([1.0, 2.0]), "b": _fixed([10.0, -4.0])}, (0.5, -2.0))
    scores = mix(*_blank(2))
    assert scores.total_B.tolist() == [0.5 * 1 - 2 * 10, 0.5 * 2 + 2 * 4]
    assert scores.parts["a"].tolist() == [1, 2] and scores.parts["b"].tolist() == [10, -4]
    assert (mix.names, mix.weights) == (("a", "b"), (0.5, -2.0))
    assert scores.total_B.dtype == torch.float32


def test_mix_defaults_to_weight_one() -> None:
    images, prompts, metadata = _batch("composition")
    scores = build(["composition", "jpeg_compressibility"])(images, prompts, metadata)
    assert torch.equal(scores.total_B, scores.parts["composition"] + scores.parts["jpeg_compressibility"])


def test_mix_of_an_empty_batch_is_empty() -> None:
    scores = build(["composition", "jpeg_compressibility"])(torch.ones(0, 3, 8, 8), [], [])
    assert scores.total_B.shape == scores.parts["composition"].shape == (0,)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_names_reward_prompt_and_image(value: float) -> None:
    mix = RewardMix({"good": _fixed([0.0] * 4), "bad": _fixed([0.0, 0.0, value, 0.0])}, (1.0, 0.0))
    with pytest.raises(RewardError, match=r"'bad' returned -?(nan|inf) for image 2 of 4 \(prompt 'prompt 2'\)$"):
        mix(*_blank(4))


def test_a_reward_that_raises_names_reward_prompt_and_image() -> None:
    def bad(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        if "prompt 3" in prompts:
            raise KeyError("two\nlines")
        return torch.zeros(len(prompts))

    with pytest.raises(RewardError) as caught:
        RewardMix({"bad": bad}, (1.0,))(*_blank(5))
    message = str(caught.value)
    assert message.startswith("reward 'bad' failed on image 3 of 5 (prompt 'prompt 3'): KeyError: ")
    assert "\n" not in message
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_reward_that_fails_on_the_whole_batch_alone_scores_its_images_one_by_one() -> None:
    """Out of memory, say: no image is to blame, and each score is of its own image."""

    def bad(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        if len(prompts) > 1:
            raise RuntimeError("out of memory")
        return torch.tensor([float(prompts[0][-1])])

    with pytest.warns(UserWarning, match="'bad' failed on 3 images at once, and on none of them alone: .*memory"):
        scores = RewardMix({"bad": bad}, (1.0,))(*_blank(3))
    assert scores.total_B.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(RewardError, match="failed on no images at all: ValueError: x"):
        RewardMix({"bad": _raises(ValueError("x"))}, (1.0,))(*_blank(0))


def _raises(error: BaseException, when: str = "") -> Callable[..., Tensor]:
    def reward(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        if not prompts or any(when in prompt for prompt in prompts):
            raise error
        return torch.ones(len(prompts))

    return reward


def test_to_a_lenient_mix_an_image_that_fails_is_one_without_a_score() -> None:
    mix = RewardMix({"bad": _raises(KeyError("k"), "prompt 2")}, (1.0,), lenient=True)
    with pytest.warns(
        UserWarning, match=r"'bad' failed on image 2 of 4 \(prompt 'prompt 2'\), left out: KeyError: 'k'"
    ):
        total = mix(*_blank(4)).total_B
    assert total.isnan().tolist() == [False, False, True, False]
    with pytest.warns(UserWarning, match="left out"):
        assert RewardMix({"bad": _raises(KeyError("k"))}, (1.0,), lenient=True)(*_blank(1)).total_B.isnan().all()
    with pytest.raises(RewardError, match=r"'bad' failed on image 0 of 4 .*: KeyError: 'k'"):  # no image's fault
        RewardMix({"bad": _raises(KeyError("k"))}, (1.0,), lenient=True)(*_blank(4))


def test_sys_exit_in_a_reward_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RewardError, match=r"'bad' failed on image 1 of 3 .*: it called sys.exit\(0\)"):
        RewardMix({"bad": _raises(SystemExit(0), "prompt 1")}, (1.0,))(*_blank(3))
    monkeypatch.setattr("rewards.jpeg.compressibility", lambda device, source: sys.exit(0))
    with pytest.raises(RewardError, match=r"rewards.jpeg:compressibility called sys.exit\(0\)"):
        build(["jpeg_compressibility"])


def test_what_a_reward_writes_into_is_its_own() -> None:
    def vandal(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        images.numpy()[:] = 0
        prompts.clear()
        metadata[0].setdefault("inner", []).append(1)
        return torch.zeros(len(images))

    def mean(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        assert len(prompts) == 2 and metadata == [{"inner": []}, {}]
        return images.mean(dim=(1, 2, 3))

    images, prompts, metadata = torch.full((2, 3, 4, 4), 0.5), ["a", "b"], [{"inner": []}, {}]
    scores = RewardMix({"vandal": vandal, "mean": mean}, (1.0, 1.0))(images, prompts, metadata)
    assert scores.total_B.tolist() == [0.5, 0.5] and bool((images == 0.5).all())
    assert (prompts, metadata) == (["a", "b"], [{"inner": []}, {}])


def test_a_reward_that_hangs_is_not_waited_for() -> None:
    ends = threading.Event()

    def hangs(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict]) -> Tensor:
        assert not torch.is_grad_enabled()
        if len(prompts) > 1:
            ends.wait(60)
        return torch.zeros(len(prompts))

    mix = RewardMix({"slow": hangs}, (1.0,), seconds=0.2)
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"'slow' has not answered for 2 images in 0.2 s; .*\(reward_seconds\)"):
        mix(*_blank(2))
    assert time.monotonic() - started < 30
    assert mix(*_blank(1)).total_B.tolist() == [0.0]
    ends.set()
    assert replace(mix, seconds=0.0)(*_blank(2)).total_B.tolist() == [0.0, 0.0]


def test_a_total_that_fp32_does_not_hold_is_an_error_that_names_the_reward() -> None:
    mix = RewardMix({"small": _fixed([1.0, 1.0]), "big": _fixed([1.0, 3e38])}, (1.0, 10.0))
    with pytest.raises(RewardError, match=r"'big' returned 3e\+38 for image 1, and with its weight, 10, the total is"):
        mix(*_blank(2))
    assert replace(mix, lenient=True)(*_blank(2)).total_B.isnan().tolist() == [False, True]
    both = RewardMix({"up": _fixed([3e38]), "down": _fixed([-3e38])}, (10.0, 10.0))  # inf - inf
    with pytest.raises(RewardError, match="'up' returned 3e"):
        both(*_blank(1))


@pytest.mark.parametrize("result", [torch.zeros(3, 1), torch.zeros(2), torch.tensor(0.0), [0.0, 0.0, 0.0]])
def test_a_result_of_another_shape_is_refused(result: object) -> None:
    with pytest.raises(RewardError, match=r"'bad' returned .* for 3 images"):
        RewardMix({"bad": lambda images, prompts, metadata: result}, (1.0,))(*_blank(3))


def test_a_reward_whose_packages_are_missing_prints_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(REWARDS["composition"], modules=("PIL", "no_such_package"), extra="thing")
    monkeypatch.setitem(REWARDS, "composition", spec)
    with pytest.raises(
        ValueError, match=r"^reward 'composition' needs no_such_package: pip install '\.\[thing\]' in a clone"
    ):
        build(["jpeg_compressibility", "composition"])


def test_a_source_reaches_the_factory_of_its_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="reward 'composition' takes no source, got 'a=b'"):
        build(["composition=a=b"])
    seen = []
    monkeypatch.setattr("rewards.composition.partial", lambda device, source: seen.append((device, source)))
    monkeypatch.setitem(REWARDS, "composition", replace(REWARDS["composition"], source="a folder"))
    assert build(["composition=a=b"]).names == build(["composition"]).names == ("composition",)
    assert seen == [("cpu", "a=b"), ("cpu", None)]
    with pytest.raises(ValueError, match="more than once: composition"):
        build(["composition=a", "composition=b"])


def test_unknown_names_are_refused_with_the_nearest_and_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown reward 'jpeg_compresibility'; did you mean 'jpeg_compressibility'"):
        build(["jpeg_compresibility"])
    with pytest.raises(ValueError) as caught:
        build(["zzz"])
    assert all(name in str(caught.value) for name in REWARDS) and "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        (["composition", "composition"], None, "more than once: composition"),
        (["composition"], [1.0, 2.0], r"1 rewards \(composition\) but 2 weights"),
        (["composition"], [], "1 rewards .* but 0 weights"),
        (["composition"], [float("nan")], "weight of reward 'composition' must be a finite number, got nan"),
        (["composition"], [float("inf")], "got inf"),
        (["composition"], ["1"], "got '1'"),
        ([], None, "no reward is named"),
        ("composition", None, "must be a list of names"),
    ],
)
def test_unfit_mixes_are_refused(names: list[str], weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(names, weights)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.ones(2, 3, 8), r"\(B, 3, H, W\)"),
        (torch.ones(2, 1, 8, 8), r"\(B, 3, H, W\)"),
        (torch.ones(2, 3, 8, 8, dtype=torch.uint8), "float tensor"),
        (torch.ones(3, 3, 8, 8), "3 images, but 2 prompts"),
        (torch.stack([torch.zeros(3, 8, 8), -torch.ones(3, 8, 8)]), r"image 1 .*prompt 1.* from -1 to -1"),
        (torch.stack([torch.zeros(3, 8, 8), 255 * torch.ones(3, 8, 8)]), "image 1 .*prompt 1.* from 255 to 255"),
        (torch.stack([torch.zeros(3, 8, 8), torch.full((3, 8, 8), torch.nan)]), "image 1 .*prompt 1.* from nan"),
    ],
)
def test_unfit_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(["jpeg_compressibility"])(images, ["prompt 0", "prompt 1"], [{}, {}])


def test_reading_the_table_imports_no_model_code() -> None:
    heavy = ("PIL", "scipy", "transformers", "diffusers", "httpx")
    code = f"import sys, rewards; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("options", [[], ["--list"]])
def test_every_reward_is_listed(options: list[str]) -> None:
    command = [sys.executable, "-m", "rewards", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    rows = {line.split()[0]: line for line in done.stdout.splitlines()[2:]}
    assert rows.keys() == REWARDS.keys()
    header = done.stdout.splitlines()[0]
    for column, answers in (("gradient", {"yes", "-"}), ("installed", {"yes", "no"})):
        start = header.index(column)
        assert {line[start : start + len(column)].strip() for line in rows.values()} <= answers, "not aligned"
