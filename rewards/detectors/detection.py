"""Record of an object that a detector found."""

from __future__ import annotations

from dataclasses import dataclass

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, y downwards


@dataclass(frozen=True)
class Detection:
    """One object found in an image."""

    name: str  # its class
    color: str  # name of its colour
    box: Box
    score: float  # the detector's confidence, in (0, 1]
