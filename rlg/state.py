"""Optimizer and generator state as safetensors, so that a checkpoint never needs a pickle."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from rlg.config import parse_json


def save_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Write an optimizer's state: tensors by "index.name", everything else as JSON in the header."""
    state = optimizer.state_dict()
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
    """Restore what `save_optimizer` wrote. Raises ValueError where the parameters don't match, KeyError or TypeError
    for what it never writes.
    """
    state: dict[int, dict] = {}
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        for key in file.keys():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = file.get_tensor(key)
    for key, value in parse_json(header["plain"]).items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    shapes = dict(enumerate(tuple(p.shape) for group in optimizer.param_groups for p in group["params"]))
    for index, slots in state.items():
        for name, value in slots.items():
            if isinstance(value, torch.Tensor) and value.ndim and tuple(value.shape) != shapes.get(index):
                raise ValueError(f"{path}: {index}.{name} has another shape than its parameter")
    optimizer.load_state_dict({"state": state, "param_groups": parse_json(header["groups"])})
