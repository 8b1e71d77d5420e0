"""What the demo app makes: the images of an evaluation, from one adapter or a blend, within bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import ImageChops

from rewards import RewardMix
from rlg.app import generator
from rlg.app.generator import ImageGenerator, ImageRequest, load_experts, scales_of, weights_of
from rlg.diffusion.conditioning import Predictor
from rlg.evaluation.evaluator import EvalSettings, Evaluator
from rlg.evaluation.folder import Job, to_pil
from rlg.models.policy import Policy
from rlg.models.tuned_model import resolve
from rlg.prompts import Prompt
from tests.support.smooth_rewards import brightness

PROMPT = "two red circles"


def asked(**changes) -> ImageRequest:
    return ImageRequest(
        **{"prompt": PROMPT, "negative": "", "seed": 3, "k": 2, "steps": 3, "cfg": 1.0, "sampler": "ode"} | changes
    )


def pixels(made: generator.Column) -> list[bytes]:
    return [image.tobytes() for image in made.images]


@pytest.fixture(scope="module")
def second(tiny_policy: Callable[..., Policy], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another adapter of the tiny sd3."""
    policy = tiny_policy("sd3", fresh=True)
    torch.manual_seed(5)
    for parameter in policy.trainable():
        torch.nn.init.normal_(parameter, std=0.05)
    policy.save_adapter(tmp_path_factory.mktemp("second") / "adapter")
    return tmp_path_factory.getbasetemp() / "second0" / "adapter"


@pytest.fixture(scope="module")
def made(tiny_folder: Callable[[str], Path], tiny_checkpoint: Callable[[str], Path]) -> Callable[..., ImageGenerator]:
    """A generator of a family with the tiny adapter and maybe others; its policy is loaded once."""

    @cache
    def loaded(family: str, others: tuple[Path, ...]) -> tuple[Policy, list[Predictor]]:
        policy = Policy.load(str(tiny_folder(family)))
        return policy, load_experts(policy, [resolve(path) for path in (tiny_checkpoint(family), *others)])

    def make(*others: Path, family: str = "sd3", **options) -> ImageGenerator:
        return ImageGenerator(*loaded(family, others), **options)

    return make


@pytest.mark.parametrize(("family", "cfg", "sampler"), [("sd", 1.0, "ode"), ("sd3", 3.0, "sde")])
def test_images_are_those_of_an_evaluation(
    made: Callable[..., ImageGenerator], family: str, cfg: float, sampler: str
) -> None:
    own = made(family=family)
    settings = EvalSettings((0.0, 1.0, 2.0), ("rlg",), 3, sampler, 0.7, cfg, None, k=2, seed=3, batch_size=2)
    evaluator = Evaluator(own.policy, None, [Prompt(PROMPT)], settings)
    columns = [own.column(asked(cfg=cfg, sampler=sampler), (w,)) for w in settings.scales]
    for w, column in zip(settings.scales, columns, strict=True):
        expected = evaluator.generate([Job(0, k, w, "rlg") for k in range(2)]).pixels_B3HW
        for image, other in zip(column.images, map(to_pil, expected), strict=True):
            assert max(max(pair) for pair in ImageChops.difference(image, other).getextrema()) <= 1  # batches round
    assert len({image for column in columns for image in pixels(column)}) == 6


def test_a_blend_is_between_its_experts(made: Callable[..., ImageGenerator], second: Path) -> None:
    blend, first = made(second), made()
    policy = Policy.load(first.policy.base)
    other = ImageGenerator(policy, load_experts(policy, [resolve(second)]))
    assert pixels(blend.column(asked(), (1.5, 0.0))) == pixels(first.column(asked(), (1.5,)))
    assert pixels(blend.column(asked(), (0.0, 1.5))) == pixels(other.column(asked(), (1.5,)))
    assert pixels(blend.column(asked(), (0.0, 0.0))) == pixels(first.column(asked(), (0.0,)))
    half = pixels(blend.column(asked(), (0.75, 0.75)))
    assert half not in (pixels(first.column(asked(), (1.5,))), pixels(other.column(asked(), (1.5,))))


def test_the_negative_prompt_is_for_cfg(made: Callable[..., ImageGenerator]) -> None:
    own = made()
    plain, negative = (
        own.column(asked(cfg=cfg, negative=text), (1.0,)) for cfg, text in ((3.0, ""), (3.0, "a cross"))
    )
    assert pixels(plain) != pixels(negative)
    off = [pixels(own.column(asked(negative=text), (1.0,))) for text in ("", "a cross")]
    assert off[0] == off[1]


def test_rewards_are_those_that_can_judge_the_prompt(made: Callable[..., ImageGenerator]) -> None:
    def picky(images_B3HW, prompts, metadata):
        return torch.tensor([row["bonus"] for row in metadata]) + brightness(images_B3HW, prompts, metadata)

    mix = RewardMix({"brightness": brightness, "picky": picky}, (1.0, 1.0))
    own = made(reward=mix, metadata={PROMPT: {"bonus": 2.0}})
    for column, names in (
        (own.column(asked(prompt=f" {PROMPT} "), (0.0,)), ["brightness", "picky"]),
        (own.column(asked(prompt="else"), (0.0,)), ["brightness"]),
    ):
        assert [list(scores) for scores in column.scores] == [names] * 2
        for image, scores in zip(column.images, column.scores, strict=True):
            mean = sum(image.tobytes()) / len(image.tobytes()) / 255
            assert scores["brightness"] == pytest.approx(mean, abs=2e-3)
            assert scores.get("picky", 2 + scores["brightness"]) == pytest.approx(2 + scores["brightness"])


def test_moving_w_makes_one_new_column(made: Callable[..., ImageGenerator], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generator, "KEPT", 3)
    own, ticks = made(), []

    def make(w: float, **changes) -> generator.Column:
        return own.column(asked(**changes), (w,), lambda: ticks.append(w))

    columns = [make(w) for w in (0.0, 1.0, 2.0)]
    assert [make(w) for w in (0.0, 1.0, 2.0)] == columns
    assert ticks == [0.0] * 3 + [1.0] * 3 + [2.0] * 3
    make(0.0), make(3.0)
    assert len(own._kept) == 3
    ticks.clear()
    make(0.0), make(3.0)
    assert ticks == []
    assert pixels(make(1.0)) == pixels(columns[1])  # forgotten: it was the one that was not asked for lately
    assert ticks == [1.0] * 3
    make(1.0, seed=4)
    assert len(ticks) == 6


def test_samplers_are_those_of_the_family(made: Callable[..., ImageGenerator]) -> None:
    assert made(family="sd3").samplers == ("ode", "sde", "cps")
    assert made(family="sd").samplers == ("ode", "sde")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "a" * 501}, "the prompt has 501 characters; at most 500"),
        ({"negative": "a" * 501}, "the negative prompt has 501"),
        ({"seed": -1}, "at least 0"),
        ({"seed": 2**63}, "below 2^63"),
        ({"k": 0}, "between 1 and 4 images"),
        ({"k": 5}, "between 1 and 4 images"),
        ({"cfg": 0.5}, "CFG must be between 1 and 20"),
        ({"cfg": float("nan")}, "CFG must be between 1 and 20"),
        ({"steps": 0}, "between 1 and 5 steps, got 0"),
        ({"steps": 6}, "between 1 and 5 steps, got 6"),
        ({"sampler": "euler"}, "unknown sampler 'euler'; known: ode, sde, cps"),
    ],
)
def test_what_is_out_of_bounds_is_refused(made: Callable[..., ImageGenerator], changes: dict, message: str) -> None:
    own = made(max_steps=5)
    with pytest.raises(ValueError, match=re.escape(message)):
        own.column(asked(**changes), (1.0,))


def test_scales_of_a_text() -> None:
    assert scales_of("0, 1", 1.5, 4) == scales_of("1 0 1.0,1.5", 1.5, 4) == [0.0, 1.0, 1.5]
    assert scales_of("", 0.30000000000000004, 4) == [0.3]
    for text, w, message in (
        ("0 one", 1, "must be numbers such as 0 1, got '0 one'"),
        ("-1", 1, "between 0 and 4, got -1"),
        ("0", 5, "between 0 and 4, got 5"),
        ("nan", 1, "between 0 and 4, got nan"),
        ("0 1 2 3 4 0.5", 1.5, "at most 6 values of w side by side, got 7"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            scales_of(text, w, 4)


def test_shares_divide_w() -> None:
    assert weights_of(2.0, (1.0,)) == weights_of(2.0, (0.3,)) == (2.0,)
    assert weights_of(2.0, (0.25, 0.75)) == (0.5, 1.5) == pytest.approx(weights_of(2.0, (0.1, 0.3)))
    for shares in ((0.0, 0.0), (-1.0, 2.0), (float("nan"), 1.0), (float("inf"), 1.0)):
        with pytest.raises(ValueError, match="shares of the adapters"):
            weights_of(1.0, shares)


def test_what_does_not_blend_is_refused(tiny_folder: Callable[[str], Path], tiny_checkpoint) -> None:
    policy, adapter = Policy.load(str(tiny_folder("sd3"))), str(tiny_checkpoint("sd3"))
    with pytest.raises(ValueError, match="7 --ckpt are given; at most 6 blend"):
        load_experts(policy, [resolve(adapter)] * 7)
    with pytest.raises(ValueError, match="a full network does not blend"):
        load_experts(policy, [resolve(adapter), resolve(tiny_folder("sd3"))])
