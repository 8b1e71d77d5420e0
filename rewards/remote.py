"""Any reward behind HTTP, by `remote=http://HOST:PORT`.

`python -m rewards.serve` serves it, by the protocol in docs/remote.md. The score is the server's total. Images travel
as PNGs, hence rounded to 8 bits a channel (see rewards.server.wire).
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rewards import Reward
from rewards.server.client import Server
from rewards.server.wire import to_png

_LARGEST = torch.finfo(torch.float32).max  # limit for whole numbers, too: JSON has larger ones than floats
BATCH = 16  # images of a request: 70 MB at most at 1024 x 1024


def remote(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `remote`; source: the server's URL.

    It sends one empty request, so that a wrong URL or token shows at once. Raises ValueError without a URL, or with an
    unfit one; ServerError when the server does not answer as it should.
    """
    if source is None:
        raise ValueError("reward 'remote' needs its server: remote=http://HOST:PORT")
    server = Server(source)
    ask(server, torch.zeros(0, 3, 1, 1), [], [])

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        parts = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
        return torch.tensor([s for p in parts for s in ask(server, images_B3HW[p], prompts[p], metadata[p])])

    return reward


def ask(
    server: Server, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> list[float]:
    """The server's totals for one request's images.

    Raises ServerError unless they are as many finite numbers.
    """
    body = {"images": [to_png(image) for image in images_B3HW], "prompts": list(prompts), "metadata": list(metadata)}
    answer = server.post("/score", body)
    scores = answer.get("total") if isinstance(answer, dict) else None
    if not isinstance(scores, list):
        raise server.error("answered without a list of scores under 'total'")
    if len(scores) != len(prompts):
        raise server.error(f"returned {len(scores)} scores for {len(prompts)} images")
    for index, score in enumerate(scores):
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not abs(score) <= _LARGEST:
            raise server.error(
                f"returned {textwrap.shorten(repr(score), 80)} as the score of image {index} of {len(prompts)}"
            )
    return [float(score) for score in scores]
