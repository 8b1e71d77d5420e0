"""The contact sheet of an evaluation: which pictures it shows, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from rlg.contact_sheet import draw, main
from rlg.reports.evaluation_data import read_run
from tests.reports.test_report import write_evaluation


def test_a_column_a_prompt_and_a_row_a_w(tmp_path: Path) -> None:
    folder = write_evaluation(tmp_path / "eval")  # image of prompt p at the i-th w: all (60 i, 100 p, 90)
    figure = draw(read_run(folder), [0.0, 2.0], columns=8)
    shown = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert all((pixels == pixels[0, 0]).all() for pixels in shown)
    assert [tuple(pixels[0, 0]) for pixels in shown] == [
        *((0, 0, 90), (0, 100, 90)),
        *((180, 0, 90), (180, 100, 90)),
    ]
    assert figure.axes[0].get_title() == "prompt 0"
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["w = 0\nbase", "w = 2"]


def test_the_command_writes_a_picture_or_says_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = write_evaluation(tmp_path / "eval"), tmp_path / "sheet.png"
    main([str(folder), "--columns", "1", "--output", str(output)])
    with Image.open(output) as image:
        assert image.height > 2 * image.width  # the four w of the evaluation, one prompt
    capsys.readouterr()
    bare = write_evaluation(tmp_path / "bare", images=False)
    for arguments, message in (
        ([str(folder), "--w", "7"], "0-0-7.png does not exist; --w are those of the evaluation"),
        ([str(bare)], "has no images; `rlg.evaluate --images N` keeps some"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--output", str(tmp_path / "no.png")])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()
