"""The sheet of drawings, made from a package as it is published."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rewards.detectors.sprites import CELL, COLUMNS, DRAWINGS, SHEET
from rlg.pretraining import sprites


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package whose drawings are one colour each: their number in DRAWINGS."""
    folder = tmp_path / "package" / "img" / "google" / "64"
    folder.mkdir(parents=True)
    rows = []
    for index, drawing in enumerate(DRAWINGS):
        Image.new("RGBA", (64, 64), (index, 0, 0, 255)).save(folder / f"{index}.png")
        names = [sprites.short_name(*drawing)]
        rows.append({"short_names": names, "image": f"{index}.png", "has_img_google": True})
    (tmp_path / "package" / "emoji.json").write_text(json.dumps(rows))
    return tmp_path / "package"


def test_names_of_the_package_by_hand() -> None:
    drawings = [
        ("apple", "red"),
        ("apple", "green"),
        ("fox", ""),
        ("heart", "red"),
        ("heart", "purple"),
        ("ball", "red"),
    ]
    drawings += [("ball", "blue"), ("book", "red"), ("book", "orange"), ("car", "blue"), ("owl", "")]
    names = (
        "apple green_apple fox_face heart purple_heart red_circle large_blue_circle closed_book orange_book blue_car"
    )
    assert [sprites.short_name(*drawing) for drawing in drawings] == [*names.split(), "owl"]


def test_the_sheet_holds_every_drawing_in_its_place(package: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "sheet.png"
    sprites.main(["--package", str(package), "--output", str(output)])
    assert capsys.readouterr().out.split() == [str(output)]
    with Image.open(output) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (7 * CELL, 9 * CELL, 4)  # 61 drawings
    centres = pixels[CELL // 2 :: CELL, CELL // 2 :: CELL, 0].flatten()
    assert centres.tolist() == [*range(61), 0, 0]
    with Image.open(SHEET) as image:
        assert (image.mode, image.size) == ("RGBA", (COLUMNS * CELL, 7 * CELL))


def test_mistakes_are_one_line(package: Path, tmp_path: Path, capsys) -> None:
    def said(*argv: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            sprites.main(list(argv))
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1
        return err

    output = str(tmp_path / "sheet.png")
    assert "no emoji.json in" in said("--package", str(tmp_path), "--output", output)
    table = package / "emoji.json"
    table.write_text(json.dumps(json.loads(table.read_text())[1:]))
    assert "has no drawing 'apple'; version 16.0.0" in said("--package", str(package), "--output", output)
    assert not Path(output).exists()
    Path(output).write_bytes(b"mine")
    assert "is there already" in said("--package", str(package), "--output", output)
    assert Path(output).read_bytes() == b"mine"


def test_what_ships_is_small_and_says_whose_it_is() -> None:
    files = {file.name: file.stat().st_size for file in SHEET.parent.iterdir()}
    assert set(files) == {"sprites.png", "LICENSE", "ATTRIBUTION.md"}
    assert sum(files.values()) < 300_000
    assert "Apache License" in (SHEET.parent / "LICENSE").read_text()
    assert "Noto Emoji by Google" in (SHEET.parent / "ATTRIBUTION.md").read_text()
