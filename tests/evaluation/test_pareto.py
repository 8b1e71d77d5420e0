"""Fronts of two rewards: the area that they dominate (the figure is made in test_blend)."""

from __future__ import annotations

from rlg.evaluation import front


def test_hypervolume_by_hand() -> None:
    assert front.hypervolume([[2.0, 3.0]], [0, 0]) == 6
    assert front.hypervolume([[1.0, 3.0], [2.0, 1.0]], [0, 0]) == 4
    assert front.hypervolume([[2.0, 1.0], [1.0, 3.0], [0.5, 0.5]], [0, 0]) == 4  # a dominated point adds nothing
    assert front.hypervolume([[1.0, 3.0], [1.0, 2.0]], [0, 0]) == 3
    assert front.hypervolume([[-1.0, 5.0], [2.0, 1.0]], [0, 0]) == 2  # not above the reference
    assert front.hypervolume([[1.0, 3.0], [float("nan"), 9.0]], [0, 0]) == 3
    assert front.hypervolume([[0.0, 0.0], [1.0, 1.0]], [-1, -1]) == 4
    stacked = front.hypervolume([[[1.0, 3.0], [2.0, 1.0]], [[2.0, 3.0], [0.0, 0.0]]], [0, 0])
    assert stacked.tolist() == [4, 6]
