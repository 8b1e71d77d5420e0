"""The table of rewards: a line for each.

It costs nothing to read.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class RewardSpec:
    """A line of the table of rewards."""

    factory: str  # "module:function", called as (device, source)
    summary: str  # one line
    range: str  # range of the raw score; "about" marks typical values, not bounds
    model: str  # model that computes it
    needs: str = "-"  # downloads, servers
    source: str = ""  # SOURCE that NAME=SOURCE may give instead of the model; empty: it takes none
    modules: tuple[str, ...] = ()  # modules that the factory imports, beyond the project's own dependencies
    extra: str = ""  # extra of pyproject.toml that brings them
    # mostly waits for a server: called while sampling goes on, maybe by two threads (background.py)
    waits: bool = False
    gradient: bool = False  # the factory makes a `DifferentiableReward`; see `rewards.gradients`

    def missing(self) -> list[str]:
        """Modules that are not installed."""
        return [module for module in self.modules if importlib.util.find_spec(module) is None]


# Ranges and models: the publications and public ports.
# fmt: off
REWARDS: dict[str, RewardSpec] = {
    "jpeg_compressibility": RewardSpec("rewards.jpeg:compressibility", "minus the JPEG's kB", "< 0", "Pillow"),
    "jpeg_incompressibility": RewardSpec("rewards.jpeg:incompressibility", "the JPEG's kB", "> 0", "Pillow"),
    "ink": RewardSpec("rewards.ink:ink", "a soft size of the JPEG", ">= 0", "-", gradient=True),
    "smoothness": RewardSpec("rewards.smoothness:smoothness", "minus total variation", "<= 0", "-", gradient=True),
    "colourfulness": RewardSpec(
        "rewards.colourfulness:colourfulness", "colours far apart and pure", ">= 0", "-", gradient=True
    ),
    "gravity": RewardSpec("rewards.gravity:gravity", "things lie low in the picture", "[0, 100]", "-"),
    "composition": RewardSpec("rewards.composition:partial", "GenEval's partial credit", "[0, 1]", "blobs"),
    "composition_strict": RewardSpec("rewards.composition:strict", "GenEval's verdict", "0 or 1", "blobs"),
    "pickscore": RewardSpec(
        "rewards.clip:pickscore", "human preference", "about 18 to 24", "yuvalkirstain/PickScore_v1",
        "download", "a folder or hub id with a CLIP", gradient=True,
    ),
    "hpsv2": RewardSpec(
        "rewards.hpsv2:v2_1", "human preference", "about 0.14 to 0.31", "xswu/HPSv2 (v2.1)",
        "download", "HPS_v2.1_compressed.pt, or its folder", ("ftfy",), "hpsv2", gradient=True,
    ),
    "hpsv2_v2.0": RewardSpec(
        "rewards.hpsv2:v2_0", "human preference", "about 0.23 to 0.28", "xswu/HPSv2 (v2.0)",
        "download", "HPS_v2_compressed.pt, or its folder", ("ftfy",), "hpsv2", gradient=True,
    ),
    "imagereward": RewardSpec(
        "rewards.imagereward:imagereward", "human preference", "about -2 to 2", "ImageReward-v1.0",
        "download", "ImageReward.pt, or its folder", gradient=True,
    ),
    "aesthetic": RewardSpec(
        "rewards.aesthetic:aesthetic", "LAION aesthetics", "about 4 to 7", "CLIP ViT-L/14 + linear head",
        "download", "sac+logos+ava1-l14-linearMSE.pth, or its folder", gradient=True,
    ),
    "clipscore": RewardSpec(
        "rewards.clip:clipscore", "text-image cosine", "about 0.15 to 0.35", "CLIP ViT-L/14",
        "download", "a folder or hub id with a CLIP", gradient=True,
    ),
    "ocr": RewardSpec("rewards.ocr:ocr", "the quoted text is legible", "[0, 1]", "PP-OCRv6 small",
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


def lookup(name: str) -> RewardSpec:
    """The table's line for NAME or NAME=SOURCE.

    Raises ValueError, with the nearest name, for one that it lacks.
    """
    name, _, source = str(name).partition("=")
    if name not in REWARDS:
        nearest = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown reward {name!r}{hint} (known: {', '.join(REWARDS)})")
    if source and not REWARDS[name].source:
        raise ValueError(f"reward {name!r} takes no source, got {source!r}")
    return REWARDS[name]


def require_gradients(names: Sequence[str]) -> None:
    """Raise ValueError for a reward without a gradient.

    names: each as NAME or NAME=SOURCE.
    """
    for name in names:
        if not lookup(name).gradient:
            raise ValueError(no_gradient(str(name).partition("=")[0]))


def no_gradient(name: str) -> str:
    """The error for a reward without a gradient, with the way out."""
    able = ", ".join(known for known, spec in REWARDS.items() if spec.gradient)
    return f"reward {name!r} has no gradient: GRPO and NFT train with any reward; these have one: {able}"


def places(names: Sequence[str]) -> dict[str, str]:
    """Places of the models of rewards, by reward.

    A place is the given source, or the hub id of the reward's own model. Rewards behind servers have none.
    """
    pairs = {str(name).partition("=")[0]: str(name).partition("=")[2] for name in names}
    found = {name: source or lookup(name).model for name, source in pairs.items() if not lookup(name).waits}
    return {name: place for name, place in found.items() if pairs[name] or "/" in place}
