"""Optimizer state as safetensors, so that a checkpoint needs no pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlg.io.parsing import parse_json


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimizer's state."""
    save_optimizer_state(optimizer.state_dict(), path)


def save_optimizer_state(state: Mapping[str, Any], path: Path) -> None:
    """Write torch's `state_dict` of an optimizer.

    Tensors are stored by "index.name". All else is JSON in the header.
    """
    tensors, plain = {}, {}
    for index, slots in state["state"].items():
        for name, value in slots.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    header = {"plain": json.dumps(plain), "groups": json.dumps(state["param_groups"])}
    save_file(tensors, path, metadata=header)


def load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Restore what `save_optimizer` wrote.

    Raises ValueError where the parameters do not match. Raises KeyError or TypeError for content that `save_optimizer`
    never writes.
    """
    state = read_optimizer_state(path)
    check_shapes(state, [tuple(p.shape) for group in optimizer.param_groups for p in group["params"]], path)
    optimizer.load_state_dict(state)


def check_shapes(state: Mapping[str, Any], shapes: Sequence[tuple[int, ...]], path: Path) -> None:
    """Raise ValueError if a tensor of a `state_dict` has a wrong shape.

    A tensor must be a single number, or have the shape of its parameter.
    """
    for index, slots in state["state"].items():
        known = shapes[index] if 0 <= index < len(shapes) else None
        for name, value in slots.items():
            if isinstance(value, torch.Tensor) and value.ndim and tuple(value.shape) != known:
                raise ValueError(f"{path}: {index}.{name} has another shape than its parameter")


def read_optimizer_state(path: Path) -> dict[str, Any]:
    """The `state_dict` that `save_optimizer_state` wrote."""
    state: dict[int, dict] = {}
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        for key in file.keys():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = file.get_tensor(key)
    for key, value in parse_json(header["plain"]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": parse_json(header["groups"])}
