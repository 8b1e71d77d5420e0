"""A cache of encoded prompts.

Text encoders are frozen, so that a prompt needs to be encoded only once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from rlg.diffusion.conditioning import Conditioning

LIMIT = 2**30  # bytes of host memory, enough for about 370 prompts of SD3.5 with T5 in bf16


class EncodedPrompts:
    """Encode prompts, and keep the latest ones in host memory.

    They take up to `limit` bytes. Each prompt is encoded alone, so that its encoding does not depend on other prompts.
    A resumed run therefore equals one that was never stopped.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Conditioning], limit: int = LIMIT):
        self.encode, self.limit = encode, limit
        self.bytes = 0  # size of the cache at the moment
        self._kept: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, prompts: Sequence[str]) -> Conditioning:
        """The prompts' conditioning, in host memory."""
        return Conditioning.cat([self._one(prompt) for prompt in prompts])

    def _one(self, prompt: str) -> Conditioning:
        if prompt in self._kept:
            self._kept.move_to_end(prompt)
            return self._kept[prompt]
        cond = self.encode([prompt]).to("cpu")
        self._kept[prompt] = cond
        self.bytes += _bytes(cond)
        while self.bytes > self.limit:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])
        return cond


def _bytes(cond: Conditioning) -> int:
    return sum(tensor.nbytes for tensor in cond.tensors.values())
