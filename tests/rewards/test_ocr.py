"""The OCR reward: its score by hand, what it reads of rendered signs, both backends, and its errors."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rewards import RewardError, RewardMix, build, ocr
from rlg.tasks import prompt_sets
from rlg.tinyworld.scenes import draw

pytest.importorskip("rapidfuzz")


@pytest.mark.parametrize(
    ("wanted", "read", "score"),
    [
        ("stop", "stop", 1.0),
        ("stop", "xxstopyy", 1.0),  # contained
        ("stop", "step", 0.75),
        ("stop", "", 0.0),
        ("stop", "sotp", 0.5),  # two substitutions
        ("ab", "something else", 0.0),  # a distance beyond the target's length counts as its length
        ("stop", "stoop", 0.75),
    ],
)
def test_similarity_by_hand(wanted: str, read: str, score: float) -> None:
    assert ocr.similarity(wanted, read) == score


QUOTATIONS = [
    ('a sign that says "Hello World" above "no"', ["Hello World", "no"]),
    ("a sign that says “OPEN”", ["OPEN"]),
    ("„OPEN“ and «SHUT»", ["OPEN", "SHUT"]),
    ('two signs, "A” and “B”', ["A", "B"]),
    (r"a sign that says \"OPEN\"", ["OPEN"]),  # a prompt that was escaped on its way here
    (r'a poster with "say \"hi\" now"', ['say "hi" now']),
    ('a 5" nail beside a sign that says "OPEN"', ["OPEN"]),
    ("a 5” nail beside a sign, “OPEN”", ["OPEN"]),
    ('a 12"x16" poster of "ART"', ["ART"]),
    ('a sign "5" nails" in red', ['5" nails']),
    ('a sign: "2" by 4" lumber"', ['2" by 4" lumber']),
    ('a sign "5" on a 6" board', ["5"]),
    ('the numbers "1", "2", and "3"', ["1", "2", "3"]),
    ('"24" on a door and "ROUTE 66" on a road', ["24", "ROUTE 66"]),
    ('she wrote ("STOP"), it says:"GO" and says"WAIT"', ["STOP", "GO", "WAIT"]),
    ('a sign" that says "GO"', ["GO"]),
    ('a 6" ruler and a 7" screen', []),
]


@pytest.mark.parametrize(("prompt", "expected"), QUOTATIONS)
def test_quotations_are_what_a_reader_takes_for_them(prompt: str, expected: list[str]) -> None:
    assert list(ocr.quotations(prompt)) == expected


def test_the_target_is_the_first_quotation_that_is_not_empty() -> None:
    assert ocr.target('a sign that says "Hello World" above "no"') == "helloworld"
    assert ocr.target('"" and then "A"') == "a"
    assert ocr.target("“Don’t”") == ocr.normalised("DON'T")  # a reading has straight marks
    for prompt in ("a sign", 'a "sign', 'a sign that says " "'):
        with pytest.raises(ValueError, match="no text between double quotes to look for in the prompt"):
            ocr.target(prompt)


def test_small_images_are_enlarged_and_large_ones_are_not() -> None:
    image = torch.zeros(3, 60, 100)
    image[0] = 1.0
    assert ocr.enlarged(image).shape == (180, 300, 3)  # the least whole factor that brings 60 to 128
    assert ocr.enlarged(image)[0, 0].tolist() == [0, 0, 255]  # BGR
    assert ocr.enlarged(torch.rand(3, 128, 200)).shape == (128, 200, 3)


def test_rendered_signs_are_read() -> None:
    """The score of perfect images of 64x64 pixels, and that it falls for the text of another image."""
    pytest.importorskip("rapidocr")
    rows = prompt_sets.load("tinyworld:text/test")[:40]
    images = draw(rows, torch.Generator().manual_seed(0))
    reward = build(["ocr"])
    texts, metadata = [row.text for row in rows], [row.metadata for row in rows]
    assert reward(images, texts, metadata).total_B.mean() >= 0.95
    assert reward(images[:12].roll(1, dims=0), texts[:12], metadata[:12]).total_B.mean() < 0.5
    assert reward(torch.ones(2, 3, 64, 64), texts[:2], metadata[:2]).total_B.tolist() == [0, 0]  # nothing to read


def test_paddleocr_is_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    class PaddleOCR:
        def __init__(self, **options: Any):
            names = options["text_detection_model_name"], options["text_recognition_model_name"]
            assert ", ".join(names) == ocr.MODELS["paddleocr"] and options["device"] == "cpu"
            assert not any(value for name, value in options.items() if name.startswith("use_"))

        def predict(self, pixels: np.ndarray) -> list[dict[str, list[str]]]:
            assert pixels.dtype == np.uint8 and pixels.shape == (128, 128, 3)
            return [{"rec_texts": ["ST", "O P"]}]

    monkeypatch.setitem(sys.modules, "paddleocr", SimpleNamespace(PaddleOCR=PaddleOCR))
    reward = ocr.ocr("cpu", "paddleocr")
    assert reward(torch.ones(2, 3, 64, 64), ['says "Stop"', 'says "Step"'], [{}, {}]).tolist() == [1.0, 0.75]
    assert RewardMix({"ocr": reward}, (1.0,)).models == {"ocr": "PP-OCRv4_mobile_det, en_PP-OCRv4_mobile_rec"}


def test_rapidocr_reads_with_the_models_that_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rapidocr = pytest.importorskip("rapidocr")
    asked: dict[str, Any] = {}
    monkeypatch.setattr(rapidocr, "RapidOCR", lambda params: asked.update(params) or (lambda pixels, use_cls: None))
    assert ocr.ocr("cpu").model == "PP-OCRv6 small"
    for part in ("Det", "Rec"):
        assert (asked[f"{part}.ocr_version"].value, asked[f"{part}.model_type"].value) == ("PP-OCRv6", "small")


def test_errors_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"unknown OCR backend 'tesseract'; known: rapidocr, paddleocr"):
        ocr.ocr("cpu", "tesseract")
    monkeypatch.setitem(sys.modules, "paddleocr", None)
    with pytest.raises(ValueError, match="needs paddleocr: pip install"):
        ocr.ocr("cpu", "paddleocr")
    pytest.importorskip("rapidocr")
    with pytest.raises(RewardError, match=r"'ocr' failed on image 0 of 1 .*no text between double quotes"):
        build(["ocr"])(torch.ones(1, 3, 64, 64), ["a red circle"], [{}])
