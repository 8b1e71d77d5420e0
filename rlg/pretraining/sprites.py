"""Make the sheet of the emoji world's drawings.

It needs the unpacked package `emoji-datasource-google`, version 16.0.0:

npm pack emoji-datasource-google@16.0.0 && tar xzf emoji-datasource-google-16.0.0.tgz
python -m rlg.pretraining.sprites --package package --output sprites.png
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from rlg.cli import Parser, fail_cleanly

# The package's short names, where they differ from our nouns.
SHORT_NAMES = {
    ("apple", "red"): "apple",
    ("apple", "green"): "green_apple",
    ("fox", ""): "fox_face",
    ("panda", ""): "panda_face",
    ("unicorn", ""): "unicorn_face",
    ("cupcake", ""): "cupcake",
    ("tree", ""): "deciduous_tree",
    ("leaf", ""): "maple_leaf",
    ("car", "red"): "car",
    ("car", "blue"): "blue_car",
    ("train", ""): "steam_locomotive",
    ("robot", ""): "robot_face",
    ("book", "red"): "closed_book",
    ("heart", "red"): "heart",
    ("ball", "red"): "red_circle",
}


def short_name(noun: str, color: str) -> str:
    """Name of a drawing in the package's emoji.json."""
    if noun == "ball" and color != "red":
        return f"large_{color}_circle"
    return SHORT_NAMES.get((noun, color)) or (f"{color}_{noun}" if color else noun)


def sheet(package: Path) -> Image.Image:
    """All drawings in one RGBA image, row by row. Raises ValueError if the package lacks one."""
    from rewards.detectors.sprites import CELL, COLUMNS, DRAWINGS

    files = _files(package)
    canvas = Image.new("RGBA", (COLUMNS * CELL, -(-len(DRAWINGS) // COLUMNS) * CELL))
    for index, (noun, color) in enumerate(DRAWINGS):
        name = short_name(noun, color)
        if name not in files:
            raise ValueError(f"{package} has no drawing {name!r}; version 16.0.0 of the package has it")
        with Image.open(files[name]) as image:
            canvas.paste(image.convert("RGBA").resize((CELL, CELL)), (index % COLUMNS * CELL, index // COLUMNS * CELL))
    return canvas


def _files(package: Path) -> dict[str, Path]:
    """Files of the drawings by short name. Raises ValueError if this is no such package."""
    table = package / "emoji.json"
    if not table.is_file():
        raise ValueError(f"no emoji.json in {package}; --package is the unpacked emoji-datasource-google")
    rows = json.loads(table.read_text(encoding="utf-8"))
    folder = package / "img" / "google" / "64"
    return {name: folder / row["image"] for row in rows for name in row["short_names"] if row["has_img_google"]}


def parser() -> Parser:
    """Options of the command."""
    parser = Parser(
        prog="python -m rlg.pretraining.sprites", description="Make the sheet of the emoji world's drawings."
    )
    parser.add_argument("--package", type=Path, required=True, help="folder of the unpacked emoji-datasource-google")
    parser.add_argument("--output", type=Path, required=True, help="PNG file to write; it must not be there")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parser().parse_args(argv)
    with fail_cleanly():
        if args.output.exists():
            raise ValueError(f"{args.output} is there already; remove it first, or name another --output")
        sheet(args.package).save(args.output, optimize=True)
        print(args.output)


if __name__ == "__main__":
    main()
