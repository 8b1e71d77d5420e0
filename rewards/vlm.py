"""Scores by a vision language model behind a server of OpenAI's protocol.

Such servers are vLLM, sglang and llama.cpp.

    unifiedreward=http://HOST:PORT/v1   how well the image follows its prompt, and how good it looks; x / 5
    qwenvl=http://HOST:PORT/v1          how good it looks, whatever the prompt; n / 5, whole numbers
    http://HOST:PORT/v1#MODEL           names another model

Models, scales and answer forms are Flow-GRPO's (flow_grpo/rewards.py). The wording is ours, so scores are not
comparable with published ones. The model sees a PNG, for unifiedreward of 512 x 512 as there, and answers at
temperature 0. Servers that batch requests may still round differently from one time to the next. An answer without a
score counts 0, as in Flow-GRPO. `VLM.unread` counts these answers, and the first one is shown.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards import Reward
from rewards.background import DaemonExecutor
from rewards.server.client import Server
from rewards.server.wire import to_png

CONCURRENT = 8  # requests at a time: servers batch them
MAX_TOKENS = 512

_ALIGNMENT = """This image was made by a generator from the following description.

Description: {prompt}

Judge two things. First, alignment: are all objects there, as many as described, with their attributes, relations and
actions? Second, quality: is the image sharp, coherent, free of artifacts and pleasant to look at? Weigh both, then
give one number from 1 (it fails at both) to 5 (nothing is left to wish for); decimals are welcome. Give your reasons
in at most three sentences, and end with a line of exactly this form:
Final Score: x"""

_AESTHETICS = """Judge how this picture looks; what it shows does not matter. Consider composition, light, colour,
sharpness and detail, and take points off for distortions and artifacts. The scale is

0: not recognisable as a picture
1: badly flawed
2: poor
3: ordinary
4: good, with small flaws
5: outstanding in every respect

Give your reasons in at most three sentences, and end with the whole number that fits, in exactly this form:
<Score>n</Score>"""


@dataclass(frozen=True)
class Rubric:
    """A question for a model, and the reading of its answer."""

    name: str  # name of the reward
    model: str  # model that is asked for where the source names none
    question: str  # may hold {prompt}
    answer: re.Pattern[str]  # its first group is the score; the last match counts
    best: float  # the score of the best image, which counts 1
    side: int | None  # side of the squares to which images are resized; None: sent as they are


UNIFIED = Rubric(
    "unifiedreward",
    "CodeGoat24/UnifiedReward-7b-v1.5",
    _ALIGNMENT,
    re.compile(r"Final Score:[\s*]*(\d+(?:\.\d+)?)", re.IGNORECASE),
    5.0,
    512,
)
QWEN = Rubric(
    "qwenvl",
    "Qwen/Qwen2.5-VL-7B-Instruct",
    _AESTHETICS,
    re.compile(r"<Score>\s*(\d+)\s*</Score>", re.IGNORECASE),
    5.0,
    None,
)


def read_score(rubric: Rubric, text: str) -> float | None:
    """The last score in an answer, as a share of the best.

    It is None if there is no score, or one that is off the scale.
    """
    found = rubric.answer.findall(text)
    score = float(found[-1]) / rubric.best if found else None
    return score if score is not None and score <= 1 else None


class VLM:
    """A reward that asks one question an image."""

    def __init__(self, rubric: Rubric, server: Server, model: str):
        self.rubric, self.server, self.model = rubric, server, model
        self.unread = 0  # answers without a score, up to now

    def __call__(self, images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        with DaemonExecutor(min(CONCURRENT, len(prompts))) as pool:
            answers = list(pool.map(self._ask, images_B3HW, prompts))
        scores = [read_score(self.rubric, answer) for answer in answers]
        missed = [answer for answer, score in zip(answers, scores, strict=True) if score is None]
        if missed and not self.unread:
            warnings.warn(
                f"{self.rubric.name}: {len(missed)} of {len(answers)} answers of {self.server.url} hold no score and "
                f"count 0, as will later ones without warning; the first: {textwrap.shorten(missed[0], 200)!r}",
                stacklevel=2,
            )
        self.unread += len(missed)
        return torch.tensor([score or 0.0 for score in scores])

    def _ask(self, image_3HW: Tensor, prompt: str) -> str:
        image = {"url": f"data:image/png;base64,{to_png(image_3HW, self.rubric.side)}"}
        text = self.rubric.question.replace("{prompt}", prompt)
        content = [{"type": "image_url", "image_url": image}, {"type": "text", "text": text}]
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        answer = self.server.post("/chat/completions", body)
        try:
            said = answer["choices"][0]["message"]["content"]
        except (TypeError, KeyError, IndexError):
            raise self.server.error("answered without a message under 'choices'") from None
        return said if isinstance(said, str) else ""


def unifiedreward(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `unifiedreward`; source: URL[#MODEL]. Raises as `qwenvl`."""
    return _connect(UNIFIED, source)


def qwenvl(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `qwenvl`; source: URL[#MODEL].

    Raises ValueError without a URL, with an unfit one, or for a model that the server does not list; ServerError when
    it does not answer.
    """
    return _connect(QWEN, source)


def _connect(rubric: Rubric, source: str | None) -> VLM:
    if source is None:
        raise ValueError(f"reward {rubric.name!r} needs its server: {rubric.name}=http://HOST:PORT/v1")
    url, _, model = source.partition("#")
    server, model = Server(url), model or rubric.model
    listed = server.get("/models")
    try:
        known = [row["id"] for row in listed["data"]]
    except (TypeError, KeyError):
        raise server.error("answered without a list of models under 'data'; does the URL end in /v1?") from None
    if model not in known:
        names = textwrap.shorten(", ".join(str(name)[:200] for name in known[:20]), 400)
        raise ValueError(f"{server.url} serves {names}, not {model}; name one: {rubric.name}={url}#MODEL")
    return VLM(rubric, server, model)
