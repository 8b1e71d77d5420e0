"""Images of one prompt at several w, with rewards, for the app.

Guidance is `rlg.guidance.guided` on the project's own samplers, so that an image here is the one that an evaluation
makes of the same noise:

    base + w * sum_i s_i (expert_i - base)

The shares s_i of the experts add up to one; of two experts it is the blend of `rlg.guidance.blend`. Memory is bounded:
one column of images is made at a time, and the last few are kept. So moving w makes one new column, and not all of
them.

Legend: K images of a column, E experts.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rewards import RewardError, RewardMix
from rlg.choices import KERNELS
from rlg.diffusion import sampling
from rlg.diffusion.conditioning import Conditioning, Predictor
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.guidance.guided import Guided, with_cfg
from rlg.io.pixels import to_pil
from rlg.models import adapter_files
from rlg.models.policy import Policy
from rlg.models.tuned_model import TunedModel
from rlg.tinyworld import worlds

MAX_TEXT, MAX_IMAGES, MAX_CFG, MAX_COLUMNS, MAX_EXPERTS = 500, 4, 20.0, 6, 6
KEPT = 16  # columns of images


@dataclass(frozen=True)
class ImageRequest:
    """A visitor's request for images, without w.

    Raises ValueError for values that are out of bounds.
    """

    prompt: str
    negative: str  # prompt of the unconditional pass; without effect at CFG 1
    seed: int
    k: int  # images of a column
    steps: int
    cfg: float
    sampler: str

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError("the prompt is empty")
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            if len(text) > MAX_TEXT:
                raise ValueError(f"the {name} has {len(text)} characters; at most {MAX_TEXT}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must be at least 0 and below 2^63, got {self.seed}")
        if not 1 <= self.k <= MAX_IMAGES:
            raise ValueError(f"between 1 and {MAX_IMAGES} images at each w, got {self.k}")
        if not 1 <= self.cfg <= MAX_CFG:
            raise ValueError(f"CFG must be between 1 and {MAX_CFG:g}, got {self.cfg:g}")


@dataclass(frozen=True)
class Column:
    """The images of one w."""

    images: tuple[Image.Image, ...]  # K of them
    scores: tuple[dict[str, float], ...]  # scores of each image; without rewards that cannot judge this prompt


def scales_of(text: str, w: float, largest: float) -> list[float]:
    """The w to show, in order.

    They are those of a text such as "0, 1" and the one of the slider. Raises ValueError for a wrong or too large w.
    """
    try:
        numbers = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"w to compare with must be numbers such as 0 1, got {text[:40]!r}") from None
    scales = sorted({float(f"{number:g}") for number in (*numbers, w)})
    outside = [number for number in scales if not 0 <= number <= largest]  # true for nan
    if outside:
        raise ValueError(f"w must be between 0 and {largest:g}, got {outside[0]:g}")
    if len(scales) > MAX_COLUMNS:
        raise ValueError(f"at most {MAX_COLUMNS} values of w side by side, got {len(scales)}")
    return scales


def weights_of(w: float, shares: Sequence[float]) -> tuple[float, ...]:
    """(E,) guidance weights: w, divided by shares.

    Raises ValueError unless the shares are >= 0 and one is positive.
    """
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares) > 0:
        raise ValueError("the shares of the adapters must be at least 0, and one of them above 0")
    return tuple(w * share / sum(shares) for share in shares)


class ImageGenerator:
    """Maker of columns of images, with a policy and its experts.

    It serves one caller at a time.
    """

    def __init__(
        self,
        policy: Policy,
        experts: Sequence[Predictor],
        reward: RewardMix | None = None,
        metadata: Mapping[str, dict[str, Any]] | None = None,
        level: float = 0.7,
        max_steps: int = 50,
        resolution: int | None = None,
    ):
        self.policy, self.experts, self.reward = policy, tuple(experts), reward
        self.metadata = dict(metadata or {})  # metadata by prompt, for rewards that need it
        self.level, self.max_steps = level, max_steps
        self.resolution, self.shape = resolution, policy.latent_shape(resolution)
        self.samplers = tuple(kernel for kernel in KERNELS if self._has(kernel))
        self._kept: OrderedDict[tuple[ImageRequest, tuple[float, ...]], Column] = OrderedDict()
        self._lock = threading.Lock()  # the network's adapters are switched on and off in place

    def _has(self, kernel: str) -> bool:
        try:
            self.policy.schedule(2, kernel, self.level, resolution=self.resolution)
        except ValueError:
            return False
        return True

    def column(
        self, request: ImageRequest, weights: tuple[float, ...], tick: Callable[[], None] = lambda: None
    ) -> Column:
        """The images of one w.

        `tick` is called before each denoising step. Raises ValueError for a bad setting.
        """
        if not 1 <= request.steps <= self.max_steps:
            raise ValueError(f"between 1 and {self.max_steps} steps, got {request.steps}")
        if request.sampler not in self.samplers:
            raise ValueError(f"unknown sampler {request.sampler[:20]!r}; known: {', '.join(self.samplers)}")
        worlds.check_words(self.policy.pipe.tokenizer.get_vocab(), [request.prompt])
        key = (request, weights)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._make(request, weights, tick)
            self._kept.move_to_end(key)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._kept[key]

    @torch.no_grad()
    def _make(self, request: ImageRequest, weights: tuple[float, ...], tick: Callable[[], None]) -> Column:
        negative = self.policy.encode([request.negative])
        models = (with_cfg(model, negative, request.cfg) for model in (self.policy.reference, *self.experts))
        base, *experts = models
        guided = Guided(base, tuple(experts), weights)

        def ticking(x_BCHW: Tensor, t_B: Tensor, cond: Conditioning) -> Tensor:
            tick()
            return guided(x_BCHW, t_B, cond)

        noise = SampleNoise([SampleId(request.seed, 0, k) for k in range(request.k)], self.shape, self.policy.device)
        schedule = self.policy.schedule(request.steps, request.sampler, self.level, resolution=self.resolution)
        latents = sampling.sample(ticking, schedule, self.policy.encode([request.prompt] * request.k), noise)
        pixels_K3HW = self.policy.decode(latents, batch=1).cpu()
        return Column(tuple(map(to_pil, pixels_K3HW)), self._scores(pixels_K3HW, request.prompt))

    def unscorable(self, prompt: str) -> dict[str, str]:
        """Reasons by reward why it cannot judge this prompt.

        Only rewards that know it before they see an image are in it.
        """
        if self.reward is None:
            return {}
        metadata = self.metadata.get(prompt.strip(), {})
        return {name: reasons[0] for name, reasons in self.reward.unscorable([prompt], [metadata]).items()}

    def _scores(self, pixels_K3HW: Tensor, prompt: str) -> tuple[dict[str, float], ...]:
        count, parts = len(pixels_K3HW), {}
        metadata = self.metadata.get(prompt.strip(), {})
        unable = self.unscorable(prompt)
        for name in () if self.reward is None else [name for name in self.reward.names if name not in unable]:
            try:
                parts |= self.reward.parts([name], pixels_K3HW, [prompt] * count, [metadata] * count)
            except RewardError:
                continue  # it needs to know more of this prompt than its text
        return tuple({name: float(part[i]) for name, part in parts.items()} for i in range(count))


def load_experts(policy: Policy, models: Sequence[TunedModel]) -> list[Predictor]:
    """Load one tuned model of any kind, or several adapters.

    Returns a predictor for each. Raises ValueError for one that does not fit the policy's model, and for more than
    MAX_EXPERTS.
    """
    if len(models) > MAX_EXPERTS:
        raise ValueError(f"{len(models)} --ckpt are given; at most {MAX_EXPERTS} blend")
    if len(models) > 1 and any(model.is_network for model in models):
        raise ValueError("a full network does not blend; give adapters, or one --ckpt")
    policy.load_tuned(models[0])
    if len(models) == 1:
        return [policy.predict]
    names = [adapter_files.NAME, *(f"expert_{i}" for i in range(1, len(models)))]
    for name, model in zip(names[1:], models[1:], strict=True):
        policy.load_expert(name, model)
    return [partial(policy.predict_as, name) for name in names]
