"""Detector for the world of shapes: connected blobs of a palette colour.

A blob is named by the shape that it overlaps best. This is plain image processing without weights, so a composition
reward costs about a millisecond an image and needs no download. It plays the part that Mask2Former plays in GenEval
(arXiv 2310.11513): image -> [(class, colour, box)]. The palette and the shapes are defined here, and
`rlg.tinyworld.scenes` draws with them.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import ndimage
from torch import Tensor

from rewards.detectors.detection import Detection

PALETTE: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.15),
    "green": (0.15, 0.62, 0.24),
    "blue": (0.18, 0.30, 0.86),
    "yellow": (0.96, 0.78, 0.10),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIGN = "sign"
SIGN_FRAME = (4 / 60, 4 / 38)  # thickness of the frame, as a fraction of the sign's width and height
CROSS_ARM = 0.4  # width of a cross's arm, as a fraction of its extent

# the palette, then paper and ink
_REFERENCES = np.array([*PALETTE.values(), (1.0, 1.0, 1.0), (0.1, 0.1, 0.1)], dtype=np.float32)
_MAX_COLOUR_DISTANCE = 0.42  # Euclidean, RGB in [0,1]: a third of the way to white still counts
_MIN_AREA = 48  # pixels, of 64 * 64: smaller blobs are specks, not objects
_MIN_IOU = 0.70  # IoU with the best shape's template: blobs below it are no recognisable object
_MAX_ASPECT = 1.5  # most that a shape's box may be wider than high, or higher than wide; signs are wide by design


def shape_mask(name: str, height: int, width: int) -> np.ndarray:
    """Boolean (height, width) mask of a shape that fills its box.

    Pixel centres are sampled.
    """
    y, x = np.mgrid[0:height, 0:width]
    u, v = (x + 0.5) / width, (y + 0.5) / height  # in (0, 1), v downwards
    if name == "circle":
        return (u - 0.5) ** 2 + (v - 0.5) ** 2 <= 0.25
    if name == "square":
        return np.ones((height, width), dtype=bool)
    if name == "triangle":
        return np.abs(u - 0.5) <= v / 2
    if name == "cross":
        return (np.abs(u - 0.5) <= CROSS_ARM / 2) | (np.abs(v - 0.5) <= CROSS_ARM / 2)
    if name == SIGN:
        fx, fy = SIGN_FRAME
        return (np.minimum(u, 1 - u) <= fx) | (np.minimum(v, 1 - v) <= fy)
    raise ValueError(f"unknown shape {name!r}; known: {', '.join((*SHAPES, SIGN))}")


@lru_cache(maxsize=4096)
def _templates(height: int, width: int) -> tuple[np.ndarray, ...]:
    return tuple(shape_mask(name, height, width) for name in (*SHAPES, SIGN))


def _classify(mask: np.ndarray) -> tuple[str, float]:
    height, width = mask.shape
    ious = [float((mask & t).sum() / (mask | t).sum()) for t in _templates(height, width)]
    wide = max(height / width, width / height) > _MAX_ASPECT
    candidates = [(iou, name) for iou, name in zip(ious, (*SHAPES, SIGN), strict=True) if (name == SIGN) == wide]
    iou, name = max(candidates)
    return name, iou


def detect(image_3HW: Tensor) -> list[Detection]:
    """Objects in one image, float RGB in [0, 1], largest first.

    The score of an object is its IoU with the shape's template.
    """
    if image_3HW.numel() == 0:
        return []
    nearest_HW = _nearest_colour(image_3HW.detach().float().cpu().numpy())
    found: list[tuple[int, Detection]] = []
    for index, colour in enumerate(PALETTE):
        labels_HW, _ = ndimage.label(nearest_HW == index)
        areas = np.bincount(labels_HW.ravel())
        areas[0] = 0  # label 0 is everything that is not of this colour
        if areas.max() < _MIN_AREA:
            continue  # noise makes hundreds of such specks
        boxes = ndimage.find_objects(labels_HW)
        for label in np.flatnonzero(areas >= _MIN_AREA):
            rows, cols = boxes[label - 1]
            name, iou = _classify(labels_HW[rows, cols] == label)
            if iou >= _MIN_IOU:
                box = (float(cols.start), float(rows.start), float(cols.stop), float(rows.stop))
                found.append((int(areas[label]), Detection(name, colour, box, iou)))
    return [detection for _, detection in sorted(found, key=lambda item: -item[0])]


def _nearest_colour(image_3HW: np.ndarray) -> np.ndarray:
    """(H, W) index into PALETTE of each pixel's colour.

    An index past the end of PALETTE is paper, ink, or no known colour.
    """
    pixels_3N = image_3HW.reshape(3, -1)
    squares_RN = (_REFERENCES**2).sum(axis=1)[:, None] - 2 * (_REFERENCES @ pixels_3N) + (pixels_3N**2).sum(axis=0)
    nearest_N = squares_RN.argmin(axis=0)
    known_N = squares_RN.min(axis=0) <= _MAX_COLOUR_DISTANCE**2  # false for NaN
    return np.where(known_N, nearest_N, len(PALETTE)).reshape(image_3HW.shape[1:])
