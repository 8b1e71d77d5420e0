"""Decoding with a gradient: the images of the plain decode, autograd's gradient, and one part's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from rlg.models.policy import Policy


def latents_of(policy: Policy, batch: int = 5) -> Tensor:
    noise = torch.randn(batch, *policy.latent_shape(), generator=torch.Generator().manual_seed(0))
    return noise.requires_grad_()


def weights_like(images_B3HW: Tensor) -> Tensor:
    """The gradient of a reward that is linear in the pixels."""
    return torch.randn(images_B3HW.shape, generator=torch.Generator().manual_seed(1))


def in_parts_of(policy: Policy, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_at_once", lambda batch, height, width, cost=1: count)


def test_it_is_the_plain_decode_with_the_gradient_of_the_whole_batch(
    family: str, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(str(tiny_folder(family)))
    latents = latents_of(policy)
    whole = policy.backbone.decode(policy.pipe, latents)
    (expected,) = torch.autograd.grad(whole, latents, weights_like(whole))
    assert expected.abs().amax(dim=(1, 2, 3)).min() > 0
    for count in (64, 2):
        in_parts_of(policy, count, monkeypatch)
        images = policy.decode_with_grad(latents)
        assert torch.allclose(images, policy.decode(latents), atol=1e-6)
        (found,) = torch.autograd.grad(images, latents, weights_like(images))
        assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max(), rtol=1e-4)
    assert all(parameter.grad is None for parameter in policy.pipe.vae.parameters())


def test_the_gradient_is_that_of_finite_differences(tiny_folder: Callable[[str], Path]) -> None:
    """Of each image by itself, along a random direction; a long step would cross the clamp of some pixels."""
    policy = Policy.load(str(tiny_folder("sd")))
    policy.pipe.vae.double()
    latents = latents_of(policy, 3)
    images = policy.decode_with_grad(latents)
    (gradient,) = torch.autograd.grad(images, latents, weights_like(images))
    direction = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-4
    ahead, behind = (policy.decode(latents.detach() + sign * step * direction) for sign in (1, -1))
    slope_B = ((ahead - behind).double() * weights_like(images)).sum(dim=(1, 2, 3)) / (2 * step)
    assert torch.allclose((gradient * direction).sum(dim=(1, 2, 3)).double(), slope_B, rtol=2e-2, atol=1e-3)


def test_the_graph_holds_images_and_the_backward_pass_one_part(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(str(tiny_folder("sd")))
    plain = policy.backbone.decode
    live: list[tuple[int, int]] = []  # (images decoded at once, bytes that their graph keeps)

    def spy(pipe: Any, part: Tensor) -> Tensor:
        kept: dict[int, Tensor] = {}
        with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
            plain(pipe, part.detach().requires_grad_())
        live.append((len(part), sum(t.nbytes for t in kept.values())))
        return plain(pipe, part)

    policy.backbone = replace(policy.backbone, decode=spy)
    in_parts_of(policy, 2, monkeypatch)
    latents, kept = latents_of(policy), {}
    with saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        images = policy.decode_with_grad(latents)
    assert [count for count, _ in live] == [2, 2, 1]
    assert sum(t.nbytes for t in kept.values()) < live[0][1] / 10  # the forward pass keeps no activations
    images.sum().backward()
    assert [count for count, _ in live[3:]] == [1, 2, 2]  # decoded again, from the last part on


def test_an_image_with_a_graph_counts_as_eight(tiny_folder: Callable[[str], Path]) -> None:
    policy = Policy.load(str(tiny_folder("sd")))
    sizes: list[int] = []

    def spy(pipe: Any, part: Tensor) -> Tensor:
        sizes.append(len(part))
        return part[:, :3]

    policy.backbone = replace(policy.backbone, decode=spy)
    policy.pipe.vae.to(torch.bfloat16)
    for side, expected in ((1024, [1, 1, 1, 1, 1]), (512, [2, 2, 1]), (256, [5])):
        sizes.clear()
        policy.decode_with_grad(torch.zeros(5, 4, side // policy.pipe.vae_scale_factor, side // 8))
        assert sizes == expected
    policy.decode_with_grad(torch.zeros(5, 4, 32, 32), batch=3)
    assert sizes[-2:] == [3, 2]
