"""Mask2Former as an instance detector (arXiv 2112.01527).

It finds objects with class, confidence, box and mask in an image. The network is transformers'
Mask2FormerForUniversalSegmentation with published weights. The steps around it are detectron2's, which are
mmdetection's, too (Mask2Former's maskformer_model.py; mmdet's maskformer_fusion_head.py):

    before   shorter side to 800 by PIL's bilinear, longer side to 1333 at most, ImageNet's mean and std, zeros below
             and to the right up to a multiple of 32
    after    the 100 best pairs of query and class by softmax, "no object" left out; masks, as logits, back to the
             image's size; confidence = the pair's probability * the mean probability inside of the mask

transformers' own image processor is not used: it squares the image to 384, and its instance masks may not overlap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Mask2FormerForUniversalSegmentation

from rewards.detectors.detection import Box
from rewards.preprocessing import bounded
from rewards.weights import Origin, pretrained

COCO_INSTANCE = "facebook/mask2former-swin-small-coco-instance"
SHORTER, LONGER = 800, 1333  # pixels, sides of the network's input
BATCH = 8  # images of a forward pass
_STRIDE = 32  # pixels, of the coarsest feature map
_MAX_INSTANCES = 100  # most instances of an image, before the threshold


@dataclass(frozen=True)
class Instance:
    """One object found in an image."""

    label: int  # index of its class
    score: float  # confidence, in (0, 1]
    box: Box
    mask_HW: Tensor  # bool


@dataclass(frozen=True)
class Mask2Former:
    """The network as a detector, with a checked number of classes."""

    model: Mask2FormerForUniversalSegmentation

    @classmethod
    def load(cls, origin: Origin, device: torch.device | str, classes: int) -> Mask2Former:
        """Load in fp32, from a folder or the hub.

        Raises ValueError if it is missing or knows another number of classes.
        """
        model = pretrained(Mask2FormerForUniversalSegmentation, "Mask2Former", origin, device, torch.float32)
        if model.config.num_labels != classes:
            known = f"{model.config.num_labels} classes, not {classes}"
            raise ValueError(f"reward {origin.reward!r}: the Mask2Former in {origin.place} knows {known}")
        return cls(model)

    def __call__(self, images_B3HW: Tensor, thresholds: Sequence[float]) -> list[list[Instance]]:
        """Objects of each image above its threshold of confidence, best first.

        Images are in [0, 1].
        """
        found: list[list[Instance]] = []
        for start in range(0, len(images_B3HW), BATCH):
            found += self._batch(images_B3HW[start : start + BATCH], thresholds[start : start + BATCH])
        return found

    def _batch(self, images_B3HW: Tensor, thresholds: Sequence[float]) -> list[list[Instance]]:
        pixels_B3hw = bounded(images_B3HW, SHORTER, LONGER).to(self.model.device)
        height, width = pixels_B3hw.shape[2:]
        out = self.model(functional.pad(pixels_B3hw, (0, -width % _STRIDE, 0, -height % _STRIDE)))
        rows = zip(out.class_queries_logits, out.masks_queries_logits, thresholds, strict=True)
        sizes = (height, width), tuple(images_B3HW.shape[2:])
        return [instances(classes_QC, masks_Qhw, *sizes, threshold) for classes_QC, masks_Qhw, threshold in rows]


def instances(
    classes_QC: Tensor, masks_Qhw: Tensor, resized: tuple[int, int], size: tuple[int, int], threshold: float
) -> list[Instance]:
    """Objects of one image, best first, by a network's output.

    classes_QC: logits, "no object" last. masks_Qhw: logits at a quarter of the padded input. resized: height and width
    of the input without its padding; size: those of the image. threshold: confidences at or below it are dropped.
    """
    probabilities_QK = classes_QC.softmax(dim=1)[:, :-1]
    best_N, index_N = probabilities_QK.flatten().topk(min(_MAX_INSTANCES, probabilities_QK.numel()))
    likely_N = best_N > threshold  # a mask can only lower the confidence
    best_N, index_N = best_N[likely_N], index_N[likely_N]
    if not len(best_N):
        return []
    logits_NHW = _enlarged(masks_Qhw[index_N // probabilities_QK.shape[1]], resized, size)
    masks_NHW = logits_NHW > 0
    inside_N = (logits_NHW.sigmoid() * masks_NHW).flatten(1).sum(dim=1)
    scores_N = best_N * inside_N / (masks_NHW.flatten(1).sum(dim=1) + 1e-6)
    order = [i for i in scores_N.argsort(descending=True, stable=True).tolist() if scores_N[i] > threshold]
    labels_N = index_N % probabilities_QK.shape[1]
    return [Instance(int(labels_N[i]), float(scores_N[i]), bounds(masks_NHW[i]), masks_NHW[i]) for i in order]


def _enlarged(masks_Nhw: Tensor, resized: tuple[int, int], size: tuple[int, int]) -> Tensor:
    padded = [-(-side // _STRIDE) * _STRIDE for side in resized]
    masks_N1hw = functional.interpolate(masks_Nhw[:, None], padded, mode="bilinear", align_corners=False)
    masks_N1hw = masks_N1hw[:, :, : resized[0], : resized[1]]
    return functional.interpolate(masks_N1hw, size, mode="bilinear", align_corners=False)[:, 0]


def bounds(mask_HW: Tensor) -> Box:
    """The box around a mask that is not empty.

    Its last row and column are inside.
    """
    rows, columns = mask_HW.any(dim=1).nonzero(), mask_HW.any(dim=0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
