"""Text encodings, kept: encoders are frozen, so a prompt is encoded once, however often training meets it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from rlg.diffusion.conditioning import Conditioning

LIMIT = 2**30  # bytes of host memory: of SD3.5 with T5, in bf16, some 370 prompts


class EncodedPrompts:
    """Encodes prompts, and keeps in host memory those that were asked for last, up to `limit` bytes.

    Each prompt is encoded alone: what comes out depends on the prompt, and not on those that happened to be new with
    it, so that a run that was resumed is the one that was not.
    """

    def __init__(self, encode: Callable[[Sequence[str]], Conditioning], limit: int = LIMIT):
        self.encode, self.limit = encode, limit
        self.bytes = 0  # held at the moment
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
