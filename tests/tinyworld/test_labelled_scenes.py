"""The emoji world's detector on 200 generated scenes that were labelled by eye.

labelled/scenes.png holds them, 20 in a row: samples for held-out prompts (CFG 3, 20 ODE steps, seed 1) of a
tiny-sd3-emoji in the middle of its training, so that they hold mistakes. labelled/labels.json has the four cells of
each, row by row, or what is `anywhere` in a scene of one thing: a noun with its colour, "-" for nothing, "?" for a
thing that the eye could not name, which counts neither way.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rewards.detectors import matching
from rewards.detectors.detection import Detection
from rewards.detectors.sprites import DRAWINGS

HERE = Path(__file__).parent / "labelled"
UNCLEAR, NOTHING = "?", "-"
NAMES = {f"{color}-{noun}".strip("-"): (noun, color) for noun, color in DRAWINGS}


def scenes() -> torch.Tensor:
    with Image.open(HERE / "scenes.png") as image:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).float() / 255
    return pixels.reshape(10, 64, 20, 64, 3).permute(0, 2, 4, 1, 3).reshape(200, 3, 64, 64)


def cell_of(found: Detection) -> int:
    left, top, right, bottom = found.box
    return 2 * (top + bottom > 64) + (left + right > 64)


def verdicts(label: dict[str, list[str]], found: list[Detection]) -> Counter[str]:
    """Things that are found, missed, and seen where there are none, in the places whose label is clear."""
    places = label.get("cells") or label["anywhere"]
    counts: Counter[str] = Counter()
    for place, name in enumerate(places):
        here = [(f.name, f.color) for f in found if len(places) == 1 or cell_of(f) == place]
        if name != UNCLEAR:
            right = NAMES.get(name) in here
            counts += Counter(found=right, missed=name != NOTHING and not right, wrong=len(here) - right)
    return counts


def test_verdicts_by_hand() -> None:
    """Of a fox, a red apple and an owl one is found, one is seen in another colour, one is missed."""
    places = {"cells": ["fox", "red-apple", "?", "owl"]}
    boxes = [(2.0, 2.0, 30.0, 30.0), (34.0, 2.0, 62.0, 30.0), (2.0, 34.0, 30.0, 62.0)]
    names = [("fox", ""), ("apple", "green"), ("pig", "")]
    found = [Detection(*name, box, 0.9) for name, box in zip(names, boxes, strict=True)]
    assert verdicts(places, found) == Counter(found=1, missed=2, wrong=1)


@pytest.mark.numerics
def test_precision_and_recall_on_generated_scenes() -> None:
    labels = json.loads((HERE / "labels.json").read_text(encoding="utf-8"))
    assert len(labels) == 200
    clear = [name for label in labels for name in (label.get("cells") or label["anywhere"]) if name in NAMES]
    counts: Counter[str] = Counter()
    for label, image in zip(labels, scenes(), strict=True):
        counts += verdicts(label, matching.detect(image))
    assert counts["found"] + counts["missed"] == len(clear) > 300
    precision = counts["found"] / (counts["found"] + counts["wrong"])
    recall = counts["found"] / len(clear)
    assert precision >= 0.98, counts
    assert recall >= 0.96, counts
