"""Arithmetic on a denoiser's inputs and outputs of any form.

They are tensors in tuples, dicts, output objects and lists. Guidance combines every floating-point tensor of an output
in the same way (video and audio of one model, the images of a list). Any other value, such as a mask, must be equal in
both passes, and is kept. PyTorch's trees know diffusers' output objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

BRANCHES = (2, 3)  # rows an image under classifier-free guidance in one batch; 3 with perturbed attention


def lerp(base: Any, tuned: Any, w: float | Tensor) -> Any:
    """`base + w (tuned - base)` in fp32, in the form of `tuned`.

    Its precision is that of `tuned`, too. w: a number, or (B,) a weight for each row of the batch or each image.
    Raises ValueError where the outputs differ in form, or in a value that is no prediction.
    """
    ours, theirs = _flat(base), _flat(tuned)
    if ours[1] != theirs[1]:
        raise ValueError(f"base and tuned pass return outputs of two forms, {ours[1]} and {theirs[1]}")
    mixed = [_mix(b, t, w) for b, t in zip(ours[0], theirs[0], strict=True)]
    return tree_unflatten(mixed, theirs[1])


def first(out: Any) -> Tensor:
    """The first tensor of a denoiser's inputs or outputs.

    Raises ValueError if there is none.
    """
    found = next((leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, Tensor)), None)
    if found is None:
        raise ValueError("the denoiser was called without a tensor")
    return found


def with_first(out: Any, value: Tensor) -> Any:
    """A denoiser's output with another first tensor.

    The tensor gets the precision of the one that it replaces.
    """
    leaves, form = tree_flatten(out)
    i = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor))
    leaves[i] = value.to(leaves[i].dtype)
    return tree_unflatten(leaves, form)


def predictions(out: Any) -> int:
    """The number of floating-point tensors in an output."""
    return sum(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_flatten(out)[0])


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested value, with each tensor changed."""
    return tree_map_only(Tensor, change, value)


def check_no_memory(kwargs: dict[str, Any]) -> None:
    """Raise ValueError if a call has a store of keys and values.

    Both passes would write to it.
    """
    for name, value in kwargs.items():
        if name in ("kv_cache", "kv_caches") and value is not None:
            raise ValueError(
                f"the pipeline keeps its denoiser's keys and values from call to call ({name}), and base and tuned "
                "pass would share them; turn that off, or use w = 0 or 1"
            )


def rows(w_B: Tensor, batch: int, branches: tuple[int, ...] = BRANCHES) -> Tensor:
    """(N,) a weight for each row of the denoiser's batch.

    Weights for each image are repeated for each branch of guidance. branches: the numbers of rows that an image may
    have. Pipelines stack the branches: all images of one, then all of the next. Raises ValueError for another number
    of weights.
    """
    if len(w_B) == batch:
        return w_B
    if batch % len(w_B) == 0 and batch // len(w_B) in branches:
        return w_B.repeat(batch // len(w_B))
    raise ValueError(f"{len(w_B)} guidance weights for a batch of {batch}; give a number, or a weight for each image")


def column(w_B: Tensor, x: Tensor) -> Tensor:
    """Weights in fp32 that broadcast over the rows of x.

    They are on the device of x. Raises ValueError as `rows` does.
    """
    return rows(w_B, len(x)).to(x.device, torch.float32).reshape(-1, *[1] * (x.ndim - 1))


def _flat(out: Any) -> tuple[list[Any], TreeSpec]:
    """Leaves and form of an output.

    A list is one leaf, because its tensors are the images of a batch.
    """
    return tree_flatten(out, is_leaf=lambda value: isinstance(value, list))


def _mix(base: Any, tuned: Any, w: float | Tensor) -> Any:
    if isinstance(tuned, list):
        if len(base) != len(tuned):
            raise ValueError(f"base and tuned pass return lists of {len(base)} and {len(tuned)}")
        weights = rows(w, len(tuned)).tolist() if isinstance(w, Tensor) else [w] * len(tuned)
        return [lerp(b, t, each) for b, t, each in zip(base, tuned, weights, strict=True)]
    if isinstance(tuned, Tensor) and tuned.is_floating_point():
        factor = column(w, tuned) if isinstance(w, Tensor) else w
        return ((1 - factor) * base.float() + factor * tuned.float()).to(tuned.dtype)
    same = torch.equal(base, tuned) if isinstance(tuned, Tensor) else base == tuned
    if not same:
        raise ValueError(f"base and tuned pass return values that differ and can't be mixed ({type(tuned).__name__})")
    return tuned
