"""The signature that every network and every guidance rule shares.

`Conditioning` and `Predictor` are the inputs and the call. `Outputs` is a result with the base's output beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def pick(values: Tensor, index: Any) -> Tensor:
    """Some rows of a tensor.

    An index that is a tensor may be on another device.
    """
    return values[index.to(values.device) if isinstance(index, Tensor) else index]


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: the network's text inputs by name.

    The batch is the first dimension of each tensor.
    """

    tensors: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> Conditioning:
        """Some rows.

        A tensor of indices may be on another device than the tensors.
        """
        return Conditioning({k: pick(v, index) for k, v in self.tensors.items()})

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """Call `Tensor.to` on every tensor."""
        return Conditioning({k: v.to(*args, **kwargs) for k, v in self.tensors.items()})

    def repeat_interleave(self, times: int) -> Conditioning:
        """Repeat each prompt `times` times in a row."""
        return Conditioning({k: v.repeat_interleave(times, dim=0) for k, v in self.tensors.items()})

    def expand(self, batch: int) -> Conditioning:
        """Expand one prompt's conditioning to a whole batch, without a copy."""
        return Conditioning({k: v.expand(batch, *v.shape[1:]) for k, v in self.tensors.items()})

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch.

        Raises ValueError for parts with different inputs.
        """
        if any(part.tensors.keys() != parts[0].tensors.keys() for part in parts):
            raise ValueError(
                f"conditionings do not go together: {', '.join(map(str, map(list, (p.tensors for p in parts))))}"
            )
        return Conditioning({k: torch.cat([p.tensors[k] for p in parts]) for k in parts[0].tensors})


Predictor = Callable[[Tensor, Tensor, Conditioning], Tensor]


@dataclass(frozen=True)
class Outputs:
    """A guided output, with its base's output if that is known."""

    out_BCHW: Tensor
    base_BCHW: Tensor | None = None  # 0 where the base's pass was skipped; None if there is no base
    known_B: Tensor | None = None  # True where the base's pass was made; on the CPU

    def __getitem__(self, index: Any) -> Outputs:
        """Some rows."""
        return Outputs(*(None if part is None else pick(part, index) for part in vars(self).values()))


# A predictor that also returns its base's output, such as `guidance.Guided.with_base`.
OutputsPredictor = Callable[[Tensor, Tensor, Conditioning], Outputs]
