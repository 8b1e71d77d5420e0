"""GenEval on photos: objects, numbers, colours and positions (arXiv 2310.11513).

    geneval          the partial credit
    geneval_strict   the verdict of GenEval, 0 or 1

rewards/composition.py has the formulas. Detections are made as in GenEval's evaluate_images.py (djghosh13/geneval,
16f1681). They are Mask2Former's objects of a confidence above 0.3, or above 0.9 for the tag counting: at most 16 of
each class, overlapping or not. CLIP ViT-L/14 names an object's colour, the best of ten, zero-shot. It sees the
object's box with everything else in grey #999. Metadata is a row of evaluation_metadata.jsonl.

    SOURCE     a Mask2Former, as a folder or hub id (default facebook/mask2former-swin-small-coco-instance)
    clip/      in a folder: the CLIP (default openai/clip-vit-large-patch14)
    detector/  in a folder: the Mask2Former, if it is not in the folder itself

Differences from GenEval's
1. The detector: the authors' weights of Mask2Former with Swin-S, where GenEval has mmdetection's, trained anew. Scores
   are not equal to GenEval's, and the distance is not measured yet.
2. Classes are taken by index: the names that the weights carry are not those of GenEval's prompts.
3. The partial credit is not below 0, where that of public ports is with more than twice the objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPTokenizer

from rewards import CheckedReward, Reward
from rewards.clip import CLIP_L, Clip, read
from rewards.composition import CompositionScore, Requirements, check_vocabulary, parse, score
from rewards.detectors.detection import Detection
from rewards.detectors.mask2former import COCO_INSTANCE, Instance, Mask2Former
from rewards.preprocessing import centre_crop, round_half
from rewards.weights import Origin, half_on_gpu

THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidences of the detector
MAX_OBJECTS = 16  # most objects of a class
GREY = 0x99 / 255  # colour of everything but the object, when its colour is asked for
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# COCO's classes, in its order, in the words of GenEval's object_names.txt.
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on

Detect = Callable[[Tensor, Sequence[float]], list[list[Instance]]]  # (B3HW, a threshold each) -> objects, best first
Paint = Callable[[Sequence[Tensor], str], list[str]]  # ((3, h, w) crops, their class) -> names of colours


@dataclass(frozen=True)
class Colors:
    """CLIP's choice among `COLORS`, for crops of one class."""

    clip: Clip
    _texts: dict[str, Tensor] = field(default_factory=dict)  # class -> (colours, D)

    def __call__(self, crops: Sequence[Tensor], name: str) -> list[str]:
        """The colour of each crop (3, h, w), in [0, 1]."""
        if name not in self._texts:
            self._texts[name] = self._features(name)
        images_ND = torch.cat([self.clip.image_features(crop[None]) for crop in crops])
        return [COLORS[index] for index in (images_ND @ self._texts[name].T).argmax(dim=1).tolist()]

    def _features(self, name: str) -> Tensor:
        """A unit vector for each colour: the mean over the templates."""
        texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
        return normalize(self.clip.text_features(texts).unflatten(0, (len(COLORS), -1)).mean(dim=1), dim=1)


def threshold(metadata: Mapping[str, Any]) -> float:
    """The confidence above which an object counts, by the prompt's tag."""
    return COUNTING_THRESHOLD if metadata.get("tag") == "counting" else THRESHOLD


def crop(image_3HW: Tensor, thing: Instance) -> Tensor:
    """(3, h, w) box of an object, with everything else in grey."""
    left, top, right, bottom = map(int, thing.box)
    masked_3HW = torch.where(thing.mask_HW.to(image_3HW.device), image_3HW, GREY)
    return masked_3HW[:, top:bottom, left:right]


def detections(image_3HW: Tensor, things: Sequence[Instance], needed: Requirements, paint: Paint) -> list[Detection]:
    """The best `MAX_OBJECTS` of each class.

    They have a colour where the prompt asks for one of their class.
    """
    coloured = {clause.name for clause in needed.include if clause.color is not None}
    by_name: dict[str, list[Instance]] = {}
    for thing in things:
        by_name.setdefault(CLASSES[thing.label], []).append(thing)
    found = []
    for name, rows in by_name.items():
        rows = rows[:MAX_OBJECTS]
        colors = paint([crop(image_3HW, row) for row in rows], name) if name in coloured else [""] * len(rows)
        found += [Detection(name, color, row.box, row.score) for row, color in zip(rows, colors, strict=True)]
    return found


def judge(detect: Detect, paint: Paint, pick: Callable[[CompositionScore], float]) -> Reward:
    """Make a reward.

    detect finds objects, paint names their colours, and pick chooses one of the two scores.
    """

    def require(prompt: str, row: dict[str, Any]) -> Requirements:
        needed = parse(row)
        check_vocabulary(needed, CLASSES, COLORS)
        return needed

    @torch.no_grad()
    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        needed = [require(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        things = detect(images_B3HW, [threshold(row) for row in metadata])
        rows = zip(images_B3HW, things, needed, metadata, strict=True)
        results = [score(row, detections(image, found, wanted, paint)) for image, found, wanted, row in rows]
        return torch.tensor([pick(result) for result in results], dtype=torch.float32)

    return CheckedReward(reward, require)


def partial(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `geneval`; source: see the module's docstring.

    Raises ValueError for models that are missing or do not fit.
    """
    return _load("geneval", device, source, lambda result: result.partial)


def strict(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `geneval_strict`; source: see the module's docstring.

    Raises ValueError for models that are missing or do not fit.
    """
    return _load("geneval_strict", device, source, lambda result: float(result.strict))


def _load(
    name: str, device: torch.device | str, source: str | None, pick: Callable[[CompositionScore], float]
) -> Reward:
    origin = Origin.of(name, source, COCO_INSTANCE)
    detector, clip = _inside(origin, "detector") or origin, _inside(origin, "clip") or Origin(name, CLIP_L)
    detect = Mask2Former.load(detector, device, len(CLASSES))
    model = read(clip, device, half_on_gpu(device))
    return judge(detect, Colors(Clip(model, clip.tokenizer(CLIPTokenizer, CLIP_L), _square)), pick)


def _inside(origin: Origin, name: str) -> Origin | None:
    folder = Path(origin.place) / name
    return Origin(origin.reward, str(folder)) if folder.is_dir() else None


def _square(images_B3HW: Tensor, side: int, *, rounded: bool = True) -> Tensor:
    return centre_crop(images_B3HW, side, round_half, rounded=rounded)  # open_clip's crop is torchvision's
