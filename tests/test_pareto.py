"""Fronts of two rewards: the area that they dominate (the figure is made in test_blend)."""

from __future__ import annotations

from rlg import pareto


def test_hypervolume_by_hand() -> None:
    assert pareto.hypervolume([[2.0, 3.0]], [0, 0]) == 6
    assert pareto.hypervolume([[1.0, 3.0], [2.0, 1.0]], [0, 0]) == 4
    assert pareto.hypervolume([[2.0, 1.0], [1.0, 3.0], [0.5, 0.5]], [0, 0]) == 4  # a dominated point adds nothing
    assert pareto.hypervolume([[1.0, 3.0], [1.0, 2.0]], [0, 0]) == 3
    assert pareto.hypervolume([[-1.0, 5.0], [2.0, 1.0]], [0, 0]) == 2  # not above the reference
    assert pareto.hypervolume([[1.0, 3.0], [float("nan"), 9.0]], [0, 0]) == 3
    assert pareto.hypervolume([[0.0, 0.0], [1.0, 1.0]], [-1, -1]) == 4
    stacked = pareto.hypervolume([[[1.0, 3.0], [2.0, 1.0]], [[2.0, 3.0], [0.0, 0.0]]], [0, 0])
    assert stacked.tolist() == [4, 6]
