"""Text rendering: how much of the text that a prompt quotes can be read in the image (Flow-GRPO, arXiv 2505.05470).

    target t: what stands between the first two " of the prompt; r: all that is read; both without spaces, lower case
    score = 1 if t is contained in r, else 1 - min(lev(t, r), |t|) / |t|          lev: Levenshtein's distance

PP-OCR models read, through rapidocr (its wheel holds them) or, with `ocr=paddleocr`, through PaddleOCR 3, which
downloads them. They need characters of about 16 pixels: an image is enlarged by the least whole factor that brings its
shorter side to MIN_SIDE (Flow-GRPO's images have 512). The angle classifier is off, as there.

Deviation: the public code gives 0 when reading fails, and crashes for a prompt that quotes nothing; both are errors
that name the image here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards import Reward

MIN_SIDE = 128  # pixels
BACKENDS = ("rapidocr", "paddleocr")
_QUOTED = re.compile(r'"([^"]*)"')

Reader = Callable[[np.ndarray], Sequence[str]]  # (H, W, 3) BGR bytes -> the lines of text


def target(prompt: str) -> str:
    """The text that a prompt quotes, normalised. Raises ValueError where there is none."""
    found = _QUOTED.search(prompt)
    text = normalised(found[1]) if found else ""
    if not text:
        raise ValueError(f"no text between double quotes to look for in the prompt {prompt!r}")
    return text


def normalised(text: str) -> str:
    """Without spaces, in lower case."""
    return text.replace(" ", "").lower()


def similarity(wanted: str, read: str) -> float:
    """The score of the module's docstring, of two normalised texts."""
    from rapidfuzz.distance import Levenshtein

    if wanted in read:
        return 1.0
    return 1 - min(Levenshtein.distance(wanted, read), len(wanted)) / len(wanted)


def enlarged(image_3HW: Tensor) -> np.ndarray:
    """(H, W, 3) BGR bytes of an image in [0, 1] whose shorter side has at least MIN_SIDE pixels."""
    pixels_HW3 = (image_3HW.float().cpu() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels_HW3)
    factor = -(-MIN_SIDE // min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def ocr(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `ocr`; source: rapidocr or paddleocr. Raises ValueError for another, or one not installed."""
    backend = source or BACKENDS[0]
    if backend not in BACKENDS:
        raise ValueError(f"unknown OCR backend {backend!r}; known: {', '.join(BACKENDS)}")
    read = _rapidocr() if backend == "rapidocr" else _paddleocr(device)

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        wanted = [target(prompt) for prompt in prompts]
        texts = [normalised("".join(read(enlarged(image)))) for image in images_B3HW]
        return torch.tensor([similarity(*pair) for pair in zip(wanted, texts, strict=True)], dtype=torch.float32)

    return reward


def _rapidocr() -> Reader:
    from rapidocr import RapidOCR

    options = {
        "Global.log_level": "error",
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        "Det.limit_type": "min",
        "Det.limit_side_len": MIN_SIDE,  # not its 736, to which it would enlarge every image: seven times slower
    }
    engine = RapidOCR(params=options)
    return lambda pixels: engine(pixels, use_cls=False).txts or ()


def _paddleocr(device: torch.device | str) -> Reader:
    try:
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise ValueError("reward 'ocr=paddleocr' needs paddleocr: pip install 'paddleocr>=3' paddlepaddle") from error
    engine = PaddleOCR(
        lang="en",
        device="gpu" if torch.device(device).type == "cuda" else "cpu",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )
    return lambda pixels: engine.predict(pixels)[0]["rec_texts"]
