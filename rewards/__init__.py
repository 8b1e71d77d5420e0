"""Rewards: what a reward is, the table of those that exist, and `build`, which mixes several.

A reward is one file with one factory and one line in `REWARDS`; its heavy imports live inside the factory, so that
this table costs nothing to read. It is asked for by name, or as NAME=SOURCE: `pickscore=path/to/model`,
`remote=http://127.0.0.1:8000`. A mix keeps every part, raw, next to the weighted total: a trainer may weight rewards
(the total) or normalise each one's advantages first (the parts; GDPO, MixGRPO), as their scales differ a thousandfold.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

_PIXEL_SLACK = 1e-3  # how far outside [0, 1] rounding may take a pixel


class Reward(Protocol):
    """Scores images; higher is better. Deterministic, and a score depends on its own image, prompt and metadata alone.

    images_B3HW: float RGB in [0, 1], any device; prompts and metadata: one per image. Returns B scores, fp32 on CPU.
    May raise ValueError for metadata that it cannot work with.
    """

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor: ...


class RewardError(ValueError):
    """A reward failed; the message names the reward, the prompt and the index of the image in the batch."""


class ServerError(OSError):
    """A reward's server failed, whatever the image is; the message names the server and what it said."""


@dataclass(frozen=True)
class RewardSpec:
    """A line of the table of rewards."""

    factory: str  # "module:function", called as (device, source)
    summary: str  # one line
    range: str  # of the raw score; "about" where it is typical rather than a bound
    model: str  # what computes it
    needs: str = "-"  # downloads, servers
    source: str = ""  # what NAME=SOURCE may give instead of the model; empty: it takes none
    modules: tuple[str, ...] = ()  # imported by the factory, beyond the project's own dependencies
    extra: str = ""  # the optional dependency that brings them: pip install 'rlg[EXTRA]'
    waits: bool = False  # mostly for a server: called while sampling goes on, maybe by two threads (background.py)

    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [module for module in self.modules if importlib.util.find_spec(module) is None]


# Ranges and models: the publications and public ports.
# fmt: off
REWARDS: dict[str, RewardSpec] = {
    "jpeg_compressibility": RewardSpec("rewards.jpeg:compressibility", "minus the JPEG's kB", "< 0", "Pillow"),
    "jpeg_incompressibility": RewardSpec("rewards.jpeg:incompressibility", "the JPEG's kB", "> 0", "Pillow"),
    "composition": RewardSpec("rewards.composition:partial", "GenEval's partial credit", "[0, 1]", "blobs"),
    "composition_strict": RewardSpec("rewards.composition:strict", "GenEval's verdict", "0 or 1", "blobs"),
    "pickscore": RewardSpec(
        "rewards.clip:pickscore", "human preference", "about 18 to 24", "yuvalkirstain/PickScore_v1",
        "download", "a folder or hub id with a CLIP",
    ),
    "hpsv2": RewardSpec(
        "rewards.hpsv2:v2_1", "human preference", "about 0.14 to 0.31", "xswu/HPSv2 (v2.1)",
        "download", "HPS_v2.1_compressed.pt, or its folder", modules=("ftfy",), extra="hpsv2",
    ),
    "hpsv2_v2.0": RewardSpec(
        "rewards.hpsv2:v2_0", "human preference", "about 0.23 to 0.28", "xswu/HPSv2 (v2.0)",
        "download", "HPS_v2_compressed.pt, or its folder", modules=("ftfy",), extra="hpsv2",
    ),
    "imagereward": RewardSpec(
        "rewards.imagereward:imagereward", "human preference", "about -2 to 2", "ImageReward-v1.0",
        "download", "ImageReward.pt, or its folder",
    ),
    "aesthetic": RewardSpec(
        "rewards.aesthetic:aesthetic", "LAION aesthetics", "about 4 to 7", "CLIP ViT-L/14 + linear head",
        "download", "sac+logos+ava1-l14-linearMSE.pth, or its folder",
    ),
    "clipscore": RewardSpec(
        "rewards.clip:clipscore", "text-image cosine", "about 0.15 to 0.35", "CLIP ViT-L/14",
        "download", "a folder or hub id with a CLIP",
    ),
    "ocr": RewardSpec("rewards.ocr:ocr", "the quoted text is legible", "[0, 1]", "PP-OCR",
                      source="rapidocr or paddleocr", modules=("rapidocr", "onnxruntime", "rapidfuzz"), extra="ocr"),
    "geneval": RewardSpec(
        "rewards.geneval:partial", "composition of photos", "[0, 1]", "Mask2Former + CLIP ViT-L/14",
        "download", "a folder or hub id with a Mask2Former",
    ),
    "geneval_strict": RewardSpec(
        "rewards.geneval:strict", "its verdict", "0 or 1", "Mask2Former + CLIP ViT-L/14",
        "download", "a folder or hub id with a Mask2Former",
    ),
    "unifiedreward": RewardSpec(
        "rewards.vlm:unifiedreward", "a VLM's score", "[0, 1]", "CodeGoat24/UnifiedReward-7b-v1.5",
        "OpenAI-compatible server", "http://HOST:PORT/v1[#MODEL]", ("httpx",), "remote", waits=True,
    ),
    "qwenvl": RewardSpec(
        "rewards.vlm:qwenvl", "a VLM's score", "[0, 1]", "Qwen/Qwen2.5-VL-7B-Instruct",
        "OpenAI-compatible server", "http://HOST:PORT/v1[#MODEL]", ("httpx",), "remote", waits=True,
    ),
    "remote": RewardSpec(
        "rewards.remote:remote", "any reward behind HTTP", "the server's", "the server's",
        "python -m rewards.serve", "http://HOST:PORT", ("httpx",), "remote", waits=True,
    ),
}
# fmt: on


@dataclass(frozen=True)
class RewardScores:
    """What a mix says of B images; fp32 on CPU."""

    total_B: Tensor  # sum over rewards of weight * part
    parts: dict[str, Tensor]  # name -> (B,) raw scores, before the weight


@dataclass(frozen=True)
class RewardMix:
    """A weighted sum of rewards that checks each of them on every call.

    Raises ValueError for no rewards at all, or weights that are not as many finite numbers.
    """

    rewards: Mapping[str, Reward]
    weights: tuple[float, ...]  # one per reward, in order; a reward of weight 0 is scored and logged
    waits: frozenset[str] = frozenset()  # names of those that mostly wait for a server; see rewards.background
    lenient: bool = False  # a score that is not finite is NaN, for the caller to leave out, and no error

    def __post_init__(self) -> None:
        if not self.rewards:
            raise ValueError(f"no reward is named; known: {', '.join(REWARDS)}")
        if len(self.weights) != len(self.rewards):
            raise ValueError(f"{len(self.rewards)} rewards ({', '.join(self.names)}) but {len(self.weights)} weights")
        for name, weight in zip(self.names, self.weights, strict=True):
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
                raise ValueError(f"the weight of reward {name!r} must be a finite number, got {weight!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards' names, in the order of the weights."""
        return tuple(self.rewards)

    @torch.no_grad()
    def __call__(
        self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> RewardScores:
        """Total and parts for B images in [0, 1].

        Raises ValueError for images of another shape, type or range and for as many prompts or metadata as there are
        not images; RewardError when a reward raises, or returns another shape, NaN or an infinity (see `lenient`).
        """
        return self.weigh(self.parts(self.names, images_B3HW, prompts, metadata))

    @torch.no_grad()
    def parts(
        self, names: Collection[str], images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> dict[str, Tensor]:
        """name -> (B,) raw scores by some of the rewards. Raises as the whole mix does."""
        _check_batch(images_B3HW, prompts, metadata)
        return {name: self._part(name, images_B3HW, prompts, metadata) for name in names}

    def _part(
        self, name: str, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> Tensor:
        scores_B = _score(name, self.rewards[name], images_B3HW, prompts, metadata)
        broken = (~scores_B.isfinite()).nonzero()
        if len(broken) and not self.lenient:
            index = int(broken[0])
            raise RewardError(f"reward {name!r} returned {scores_B[index].item()} for {_place(index, prompts)}")
        return scores_B.where(scores_B.isfinite(), torch.nan)

    def weigh(self, parts: Mapping[str, Tensor]) -> RewardScores:
        """The total of every reward's (B,) scores."""
        ordered = {name: parts[name] for name in self.names}
        total_B = torch.zeros(len(ordered[self.names[0]]))
        for part_B, weight in zip(ordered.values(), self.weights, strict=True):
            total_B += weight * (part_B if weight else part_B.nan_to_num())  # 0 is for looking on
        return RewardScores(total_B, ordered)


def lookup(name: str) -> RewardSpec:
    """The table's line for NAME or NAME=SOURCE. Raises ValueError, with the nearest name, for one that it lacks."""
    name, _, source = str(name).partition("=")
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown reward {name!r}{hint} (known: {', '.join(REWARDS)})")
    if source and not REWARDS[name].source:
        raise ValueError(f"reward {name!r} takes no source, got {source!r}")
    return REWARDS[name]


def build(
    names: Sequence[str], weights: Sequence[float] | None = None, device: torch.device | str = "cpu"
) -> RewardMix:
    """Load the named rewards, NAME or NAME=SOURCE each, on a device; all weights are 1 unless given.

    Raises ValueError for an unknown name, one whose packages are not installed, a duplicate, or unfit weights;
    ServerError when a reward's server does not answer.
    """
    if isinstance(names, str):
        raise ValueError(f"the rewards must be a list of names, got the string {names!r}")
    asked = [(text.partition("=")[0], text.partition("=")[2] or None, lookup(text)) for text in map(str, names)]
    specs = {name: spec for name, _, spec in asked}
    if len(specs) < len(names):
        plain = [name for name, _, _ in asked]
        twice = sorted({name for name in plain if plain.count(name) > 1})
        raise ValueError(f"reward named more than once: {', '.join(twice)}; give it one weight instead")
    for name, spec in specs.items():
        if missing := spec.missing():
            raise ValueError(f"reward {name!r} needs {', '.join(missing)}: pip install 'rlg[{spec.extra}]'")
    chosen = (1.0,) * len(names) if weights is None else tuple(weights)
    RewardMix(dict.fromkeys(specs, _unloaded), chosen)  # refuse unfit weights before anything is downloaded
    rewards = {name: _load(spec, device, source) for name, source, spec in asked}
    return RewardMix(rewards, chosen, frozenset(name for name, spec in specs.items() if spec.waits))


def _unloaded(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    raise AssertionError("a reward that was never loaded")


def _load(spec: RewardSpec, device: torch.device | str, source: str | None) -> Reward:
    module, function = spec.factory.split(":")
    return getattr(importlib.import_module(module), function)(device, source)


def _check_batch(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> None:
    if images_B3HW.ndim != 4 or images_B3HW.shape[1] != 3 or not images_B3HW.is_floating_point():
        shape = tuple(images_B3HW.shape)
        raise ValueError(f"images must be a float tensor (B, 3, H, W), got {images_B3HW.dtype} {shape}")
    if not len(images_B3HW) == len(prompts) == len(metadata):
        raise ValueError(f"{len(images_B3HW)} images, but {len(prompts)} prompts and {len(metadata)} metadata")
    if images_B3HW.numel() == 0:
        return
    low_B, high_B = images_B3HW.flatten(1).aminmax(dim=1)
    inside_B = (low_B >= -_PIXEL_SLACK) & (high_B <= 1 + _PIXEL_SLACK)  # false for NaN
    if not inside_B.all():
        index = int((~inside_B).nonzero()[0])
        span = f"from {low_B[index]:.3g} to {high_B[index]:.3g}"
        raise ValueError(f"{_place(index, prompts)} has pixels {span}; rewards take images in [0, 1]")


def _place(index: int, prompts: Sequence[str]) -> str:
    return f"image {index} of {len(prompts)} (prompt {textwrap.shorten(prompts[index], 200)!r})"


def _score(
    name: str, reward: Reward, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> Tensor:
    try:
        scores_B = reward(images_B3HW, prompts, metadata)
    except ServerError as error:
        raise RewardError(f"reward {name!r}: {error}") from error
    except Exception as error:  # whatever a reward's model throws, the user learns which image it was
        index, cause = _culprit(reward, images_B3HW, prompts, metadata, error)
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise RewardError(f"reward {name!r} failed on {_place(index, prompts)}: {reason}") from error
    if not isinstance(scores_B, Tensor) or scores_B.shape != (len(prompts),):
        got = f"shape {tuple(scores_B.shape)}" if isinstance(scores_B, Tensor) else type(scores_B).__name__
        raise RewardError(f"reward {name!r} returned {got} for {len(prompts)} images, first prompt {prompts[:1]!r}")
    return scores_B.detach().float().cpu()


def _culprit(
    reward: Reward,
    images_B3HW: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    error: Exception,
) -> tuple[int, Exception]:
    """Index of the first image that fails alone, and how; 0 and `error` if only the whole batch fails."""
    for i in range(len(prompts)):
        try:
            reward(images_B3HW[i : i + 1], prompts[i : i + 1], metadata[i : i + 1])
        except Exception as alone:
            return i, alone
    return 0, error
