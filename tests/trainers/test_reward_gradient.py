"""Parts of the trainers by a reward's gradient: steps that are trained at, and products with Jacobians."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from trainers.core.reward_gradient import choose_steps, pull_back, weighted_mean


def test_steps_are_the_last_ones_and_one_of_each_part_before() -> None:
    """As often as in the paper of Adjoint Matching: 10 of the first 30, and the last 10."""
    generator, steps, found = torch.Generator().manual_seed(0), list(range(100, 140)), Counter[int]()
    for _ in range(300):
        chosen = choose_steps(steps, 20, 10, generator)
        assert chosen[10:] == steps[30:] and [(step - 100) // 3 for step in chosen[:10]] == list(range(10))
        found.update(chosen)
    assert all(60 < found[step] < 140 for step in steps[:30])
    assert choose_steps(steps, None, 10, generator) == choose_steps(steps, 40, 7, generator) == steps
    assert choose_steps(steps, 2, 2, generator) == [138, 139]
    assert choose_steps(steps, 1, 0, generator)[0] in steps
    with pytest.raises(ValueError, match="num_train_steps = 41, but only 40 steps"):
        choose_steps(steps, 41, 1, generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_small_vector_is_pulled_back_through_half_precision(dtype: torch.dtype) -> None:
    """y = x^2 / 2, so J^T v is x v: with v of 1e-9, which fp16 does not hold, or of 1e9; and a v of 0."""
    x = torch.tensor([1.0, 2.0, 4.0])[:, None]
    v = torch.tensor([1e-9, 1e9, 0.0])[:, None]
    y, product = pull_back(lambda x: x.to(dtype) ** 2 / 2, x, lambda y: v * (y > 0))
    assert y.flatten().tolist() == [0.5, 2.0, 8.0]
    assert product.flatten().tolist() == pytest.approx([1e-9, 2e9, 0.0], rel=1e-6)
    assert not y.requires_grad and not product.requires_grad


def test_a_value_without_weight_may_be_anything() -> None:
    value = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    mean = weighted_mean(value, torch.tensor([1.0, 0.0, 2.0]))
    assert mean.item() == pytest.approx(7 / 3)
    mean.backward()
    assert value.grad is not None and value.grad.tolist() == pytest.approx([1 / 3, 0.0, 2 / 3])
