"""Peak of the bytes that tensors hold, counted without running the call.

Only shapes are computed, and nothing is held. Tensors are fake ones of the CPU: attention is then the fused one, as on
GPUs. A kernel's own workspace is not in it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Mode that counts the bytes of live tensors made within it."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._sizes = {id(tensor.untyped_storage()): 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation; torch calls this for each."""
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._sizes:
            return
        self._sizes[id(storage)] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, id(storage))

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


def peak(run: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """Bytes of a call's own tensors, at its peak.

    `known` ones are not counted.
    """
    with Live(known) as live:
        run()
    return live.peak
