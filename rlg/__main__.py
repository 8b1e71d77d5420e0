"""The console command `rlg`.

    rlg                                         # lists the subcommands
    rlg train grpo --config tiny/demo           # several processes: accelerate launch -m rlg train grpo ...
    rlg evaluate --ckpt runs/NAME/checkpoint-N

There is a subcommand for each `python -m rlg.NAME`, and for each `train_NAME.py`. A subcommand imports only what it
needs, so that the list, --help and a typo are answered at once.
"""

from __future__ import annotations

import ast
import difflib
import runpy
import sys
from collections.abc import Iterable
from pathlib import Path

from rlg import __version__, cli, own_packages

TRAIN = "train"
COMMANDS = {  # subcommand: its module; the list shows them in this order
    TRAIN: "trainers.commands",
    "evaluate": "rlg.evaluate",
    "report": "rlg.report",
    "sample": "rlg.sample",
    "app": "rlg.app",
    "status": "rlg.status",
    "sweep": "rlg.sweep",
    "grid": "rlg.grid",
    "average": "rlg.average",
    "pool": "rlg.pool",
    "push": "rlg.push",
    "rewards": "rewards.__main__",
    "serve": "rewards.serve",
    "configs": "rlg.config_files",
    "equivalence": "rlg.equivalence",
    "benchmark": "rlg.benchmark",
    "preferences": "rlg.preferences",
    "pretraining": "rlg.pretraining",
    "show": "rlg.pretraining.show",
    "sprites": "rlg.pretraining.sprites",
    "agreement": "rlg.pretraining.agreement",
    "contact_sheet": "rlg.contact_sheet",
    "guidance_figure": "rlg.benchmark.guidance_figure",
}
_HELP = ("-h", "--help")
_HOME = Path(__file__).parent.parent


def main() -> None:
    """Run the subcommand that sys.argv names.

    It runs as `python -m` would run its module.
    """
    own_packages.guard()
    start, words = _start(), sys.argv[1:]
    cli.start_as(start)
    if not words or words[0] in _HELP:
        print(f"{start} COMMAND [options]; {start} COMMAND --help says more\n\n{_table(COMMANDS)}")
    elif words[0] == "--version":
        print(f"rlg {__version__}")
    elif words[0] == TRAIN:
        _train(start, words[1:])
    else:
        module = COMMANDS[_known(words[0], COMMANDS, start)]
        sys.argv = words
        runpy.run_module(module.removesuffix(".__main__"), run_name="__main__", alter_sys=True)


def _train(start: str, words: list[str]) -> None:
    from trainers.commands import TRAINERS

    if not words or words[0] in _HELP:
        listed = _table({name: f"trainers.{name}" for name in TRAINERS})
        print(f"{start} {TRAIN} NAME --config FILE [options]; {start} {TRAIN} NAME --help says more\n\n{listed}")
        return
    train = TRAINERS[_known(words[0], TRAINERS, f"{start} {TRAIN}")]
    sys.argv = [f"{start} {TRAIN} {words[0]}", *words[1:]]
    with cli.fail_cleanly():
        train()


def _start() -> str:
    return "python -m rlg" if Path(sys.argv[0]).name == "__main__.py" else "rlg"


def _known(word: str, names: Iterable[str], start: str) -> str:
    """The word itself.

    Prints one line and exits with code 2 if it is none of the names.
    """
    if word in names:
        return word
    near = difflib.get_close_matches(word, names, n=1)
    like = f"did you mean {start} {near[0]}? " if near else ""
    cli.stop(f"no such command: {start} {word}; {like}`{start}` lists all")


def _table(modules: dict[str, str]) -> str:
    width = max(map(len, modules))
    return "\n".join(f"  {name:{width}}  {_summary(module)}" for name, module in modules.items())


def _summary(module: str) -> str:
    """The first sentence of a module's docstring.

    The file is read and not imported.
    """
    place = _HOME.joinpath(*module.split("."))
    file = place / "__main__.py" if place.is_dir() else place.with_suffix(".py")
    source = file.read_text(encoding="utf-8")
    return cli.first_sentence(ast.get_docstring(ast.parse(source)) or "")


if __name__ == "__main__":
    main()
