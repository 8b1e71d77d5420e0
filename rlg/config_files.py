"""List the configs that ship with RLG, or find one.

    rlg configs                     # a line each
    rlg configs accelerate/cpu2     # its path, as for `accelerate launch --config_file`

`--config` takes these names as well. A file of the user comes first. A wheel holds configs/ and launch/accelerate/ as
data of the package. A clone has them beside the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from importlib import resources
from itertools import takewhile
from pathlib import Path

from rlg.cli import Parser, fail_cleanly, first_sentence

_SUFFIX = ".yaml"
_IN_CLONE = ("configs", "launch")  # folders of a clone; a config's name may also begin with one of them


def folders() -> list[Path]:
    """Folders with configs.

    They are in the installed package, or else in the clone that it is imported from.
    """
    package = Path(str(resources.files("rlg")))
    if (package / "configs").is_dir():
        return [package / "configs"]
    clone = package.parent
    return [clone / name for name in _IN_CLONE] if (clone / "pyproject.toml").is_file() else []


def shipped() -> dict[str, Path]:
    """The files that ship, by name, such as `tiny/demo`.

    They are sorted.
    """
    files = ((file.relative_to(folder), file) for folder in folders() for file in folder.rglob(f"*{_SUFFIX}"))
    return dict(sorted((inside.with_suffix("").as_posix(), file) for inside, file in files))


def find(name: str | Path) -> Path:
    """The file of a config.

    name: a file of the user, or a name in `shipped`, or that file's path in a clone. Raises ValueError with similar
    names.
    """
    path = Path(name)
    if path.is_file():
        return path
    known, asked = shipped(), _without_ends(path)
    if asked in known:
        return known[asked]
    near = difflib.get_close_matches(asked, known, n=3)
    like = f"; there is {', '.join(near)}" if near else ""
    raise ValueError(f"no such config: {path}{like}; `rlg configs` lists those that ship")


def _without_ends(path: Path) -> str:
    text = path.as_posix().removesuffix(_SUFFIX)
    top, _, rest = text.partition("/")
    return rest if top in _IN_CLONE else text


def table() -> str:
    """A line for each config: its name and its comment's first sentence."""
    rows = {name: _first_sentence(file) for name, file in shipped().items()}
    width = max(map(len, rows), default=0)
    return "\n".join(f"{name:{width}}  {sentence}".rstrip() for name, sentence in rows.items())


def _first_sentence(file: Path) -> str:
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return first_sentence("\n".join(line.removeprefix("#") for line in lines))


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = Parser(prog="rlg configs", description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", help="print the path of this one")
    args = parser.parse_args(argv)
    with fail_cleanly():
        print(table() if args.name is None else find(args.name))


if __name__ == "__main__":
    main()
