"""`python -m rlg.sample --correct`: the corrector's grid (the plain one is in test_cli)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlg import sample
from rlg.evaluation import evaluator


def tiles(path: Path, columns: int, rows: int) -> list[list[np.ndarray]]:
    """Pixels by column and row."""
    pixels = np.asarray(Image.open(path))
    return [np.split(column, rows, axis=0) for column in np.split(pixels, columns, axis=1)]


def test_a_corrected_column_is_drawn_from_the_guided_one(
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evaluator, "RESAMPLE_BELOW", 1e-9)  # at the last step alone, among guided images
    arguments = ["--ckpt", str(tiny_checkpoint("sd3")), "--prompt", "a", "b", "--k", "4", "--steps", "2"]
    sample.main([*arguments, "--w", "0", "1", "3", "--correct", "--output", str(tmp_path / "grid.png")])
    base, tuned, corrected = tiles(tmp_path / "grid.png", columns=3, rows=8)
    for prompt in (slice(0, 4), slice(4, 8)):
        assert len({image.tobytes() for image in base[prompt]}) == 4  # w = 0 and w = 1 are exact as they are
        assert len({image.tobytes() for image in tuned[prompt]}) == 4
    out = capsys.readouterr()
    assert "w = 0: without correction 4 images a prompt show an effective share of 100%" in out.out + out.err
    assert "w = 3" in out.out + out.err and str(tmp_path / "grid.png") in out.out
    assert not np.array_equal(corrected[0], base[0])


def test_a_group_of_one_is_left_alone(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    arguments = ["--ckpt", str(tiny_checkpoint("sd")), "--prompt", "a", "--k", "1", "--steps", "2", "--w", "2"]
    sample.main([*arguments, "--correct", "--kernel", "ode", "--output", str(tmp_path / "one.png")])
    assert Image.open(tmp_path / "one.png").size == (64, 64)
