"""Text rendering: legibility of the text that a prompt quotes.

The reward is Flow-GRPO's (arXiv 2505.05470).

    target t: the first quotation of the prompt; r: all that is read; both without spaces, in lower case
    score = 1 if t is contained in r, else 1 - min(lev(t, r), |t|) / |t|          lev: Levenshtein's distance

PP-OCR models read, through rapidocr (its wheel holds them) or, with `ocr=paddleocr`, through PaddleOCR 3, which
downloads them. They are pinned by name (`MODELS`). Results name the model, because scores of two models do not
compare. The models need characters of about 16 pixels. So an image is enlarged by the least whole factor that brings
its shorter side to MIN_SIDE (Flow-GRPO's images have 512). The angle classifier is off, as there.

Deviations from the public code
1. It gives 0 when reading fails, and crashes for a prompt that quotes nothing. Here the first is an error that names
   the image, and the second is found before anything is sampled.
2. It takes the text between the first two ". Here `quotations` reads as people do: curly and escaped marks quote, and
   the mark of a 5" nail does not.
3. It reads with PaddleOCR 2.9's English models, en_PP-OCRv3_det and en_PP-OCRv4_rec, which PaddleOCR 3 cannot load.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rewards import CheckedReward, Reward
from rlg.io.pixels import to_pil

MIN_SIDE = 128  # pixels
BACKENDS = ("rapidocr", "paddleocr")
MODELS = {"rapidocr": "PP-OCRv6 small", "paddleocr": "PP-OCRv4_mobile_det, en_PP-OCRv4_mobile_rec"}
_MARK = re.compile(r'\\?["“”„«»]')
_ENDS = {'"': '"”', "“": '”"“', "„": '“”"', "«": "»"}  # marks that may end a quotation, the likeliest first
# signs after which a word may begin without a space; a straight mark after one begins a quotation
_BEFORE = "([{<:;,.!?-–—/"
_PLAIN = str.maketrans("‘’“”„", '\'\'"""')  # a reading has straight marks where a prompt has curly ones

Reader = Callable[[np.ndarray], Sequence[str]]  # (H, W, 3) BGR bytes -> the lines of text


def target(prompt: str) -> str:
    """The text that a prompt quotes, normalised.

    Raises ValueError where there is none.
    """
    for quotation in quotations(prompt):
        if text := normalised(quotation):
            return text
    raise ValueError(f"no text between double quotes to look for in the prompt {prompt!r}")


def quotations(prompt: str) -> Iterator[str]:
    """Yield the quotations of a prompt, in order.

    Straight, curly, low and angle marks quote, also with a backslash before them. A straight mark after a digit is a
    unit of length, unless it ends a quotation. Within a quotation it is a unit if a later mark can only be the end.
    """
    marks = list(_MARK.finditer(prompt))
    at = 0
    while at < len(marks):
        end = _end(prompt, marks, at) if _begins(prompt, marks[at]) else None
        if end is not None:
            yield prompt[marks[at].end() : marks[end].start()].replace('\\"', '"')
        at = at + 1 if end is None else end + 1


def _begins(prompt: str, mark: re.Match[str]) -> bool:
    """Tell whether a mark can be the first of a quotation."""
    kind, before, after = mark[0][-1], prompt[: mark.start()][-1:], prompt[mark.end() :][:1]
    if kind != '"':
        return kind in _ENDS
    apart = not before or before.isspace() or before in _BEFORE
    return apart or not (before.isdigit() or not after or after.isspace())


def _end(prompt: str, marks: Sequence[re.Match[str]], begin: int) -> int | None:
    """Index of the mark that ends the quotation which another begins."""
    kind, escaped = marks[begin][0][-1], len(marks[begin][0]) > 1
    later = range(begin + 1, len(marks))
    for same in (True, False):  # "say \"hi\"" ends with the kind of mark that it began with
        for end in _ENDS[kind]:
            for i in later:
                alike = marks[i][0][-1] == end and (len(marks[i][0]) > 1) == escaped
                if (alike if same else marks[i][0][-1] == end) and not _is_unit(prompt, marks, i):
                    return i
    return None


def _is_unit(prompt: str, marks: Sequence[re.Match[str]], i: int) -> bool:
    """Tell whether a mark within a quotation is a unit of length.

    It follows a digit, and a later mark can only be the end.
    """
    if not _after_digit(prompt, marks[i]):
        return False
    others = [mark for mark in marks[i + 1 :] if not _after_digit(prompt, mark)]
    return bool(others) and not _begins(prompt, others[0])


def _after_digit(prompt: str, mark: re.Match[str]) -> bool:
    return prompt[: mark.start()][-1:].isdigit()


def normalised(text: str) -> str:
    """The text without spaces, in lower case, with straight quotation marks."""
    return text.replace(" ", "").translate(_PLAIN).lower()


def similarity(wanted: str, read: str) -> float:
    """The score of two normalised texts; see the module's docstring."""
    from rapidfuzz.distance import Levenshtein

    if wanted in read:
        return 1.0
    return 1 - min(Levenshtein.distance(wanted, read), len(wanted)) / len(wanted)


def enlarged(image_3HW: Tensor) -> np.ndarray:
    """(H, W, 3) BGR bytes of an image in [0, 1].

    Its shorter side has at least MIN_SIDE pixels.
    """
    image = to_pil(image_3HW)
    factor = -(-MIN_SIDE // min(image.size))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(image)[:, :, ::-1])


def ocr(device: torch.device | str, source: str | None = None) -> Reward:
    """Factory of `ocr`; source: rapidocr or paddleocr.

    Raises ValueError for another source, or one that is not installed.
    """
    backend = source or BACKENDS[0]
    if backend not in BACKENDS:
        raise ValueError(f"unknown OCR backend {backend!r}; known: {', '.join(BACKENDS)}")
    read = _rapidocr() if backend == "rapidocr" else _paddleocr(device)

    def reward(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
        wanted = [target(prompt) for prompt in prompts]
        texts = [normalised("".join(read(enlarged(image)))) for image in images_B3HW]
        return torch.tensor([similarity(*pair) for pair in zip(wanted, texts, strict=True)], dtype=torch.float32)

    return CheckedReward(reward, lambda prompt, row: target(prompt), MODELS[backend])


def _rapidocr() -> Reader:
    from rapidocr import LangDet, LangRec, ModelType, OCRVersion, RapidOCR

    options = {
        "Det.ocr_version": OCRVersion.PPOCRV6,  # pinned, because rapidocr's own choice changes with its release
        "Det.model_type": ModelType.SMALL,
        "Det.lang_type": LangDet.CH,  # Chinese and English
        "Rec.ocr_version": OCRVersion.PPOCRV6,
        "Rec.model_type": ModelType.SMALL,
        "Rec.lang_type": LangRec.CH,
        "Global.log_level": "error",
        "EngineConfig.onnxruntime.intra_op_num_threads": torch.get_num_threads(),
        "Det.limit_type": "min",
        "Det.limit_side_len": MIN_SIDE,  # rapidocr's own 736 would enlarge every image, and take seven times as long
    }
    engine = RapidOCR(params=options)
    return lambda pixels: engine(pixels, use_cls=False).txts or ()


def _paddleocr(device: torch.device | str) -> Reader:
    try:
        from paddleocr import PaddleOCR
    except ImportError as error:
        raise ValueError("reward 'ocr=paddleocr' needs paddleocr: pip install 'paddleocr>=3' paddlepaddle") from error
    detector, recogniser = MODELS["paddleocr"].split(", ")
    engine = PaddleOCR(
        text_detection_model_name=detector,
        text_recognition_model_name=recogniser,
        device="gpu" if torch.device(device).type == "cuda" else "cpu",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )
    return lambda pixels: engine.predict(pixels)[0]["rec_texts"]
