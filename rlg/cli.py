"""Shared parts of all commands.

An error that a user can cause ends in one line and exit code 2.
"""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from rlg.io import out_of_memory
from rlg.io.spellings import canonical_words

TUNED_HELP = (
    "the tuned model, a path or hub id: checkpoint-N of a run, a PEFT folder, a diffusers or kohya LoRA file, or a "
    "full fine-tuned network (its folder, or a pipeline's; needs --base, and memory for two)"
)
_WIDTH = 90  # most characters of a sentence in a list
_CLAUSE = 25  # least characters of a clause that may stand for a sentence
_started_as: str | None = None


def start_as(command: str) -> None:
    """Remember how the console command started this process.

    command: `rlg` or `python -m rlg`.
    """
    global _started_as
    _started_as = command


def called(command: str) -> str:
    """A command in the form in which the user called it.

    `python -m rlg.NAME ...` becomes `rlg NAME ...` if the console command started it.
    """
    if _started_as is None or not command.startswith("python -m ") or command.startswith(f"{_started_as} "):
        return command
    module, _, rest = command.removeprefix("python -m ").partition(" ")
    return " ".join(filter(None, (_started_as, module.rpartition(".")[2], rest)))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring or a comment, for a list.

    A long sentence is cut at its colon.
    """
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0].removesuffix(".")
    clause = re.split("[:;] ", sentence)[0]
    if len(sentence) > _WIDTH and len(clause) >= _CLAUSE:
        sentence = clause
    return textwrap.shorten(sentence, _WIDTH, placeholder=" ...")


def stop(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2.

    Signs that a terminal would act on are replaced, because the message may hold a file's content.
    """
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def check_new(output: Path | None, overwrite: bool) -> None:
    """Raise ValueError for an output that exists already.

    A file may be replaced with `overwrite`.
    """
    if output is not None and (output.is_dir() or (output.exists() and not overwrite)):
        raise ValueError(f"{output} exists; give --overwrite, or --output another name")


class Parser(argparse.ArgumentParser):
    """An argument parser with errors of one line and no usage."""

    @property
    def prog(self) -> str:
        """The command in the usage line, as the user called it."""
        return called(self._prog)

    @prog.setter
    def prog(self, command: str) -> None:
        self._prog = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, with other names of options.

        See `rlg.io.spellings`.
        """
        words = sys.argv[1:] if args is None else args
        known = {name.removeprefix("--") for name in self._option_string_actions}
        try:
            words = canonical_words(words, known)
        except ValueError as error:
            self.error(str(error))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """End the command with one line; argparse calls this."""
        stop(f"{message}; see --help")


@contextmanager
def fail_cleanly() -> Iterator[None]:
    """Turn a user's error into one line and exit code 2.

    Such errors are ValueError and OSError (wrong input, missing files), and a shortage of memory.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        stop(str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory.is_shortage(error):
            raise
        told = out_of_memory.told(error)
        stop(f"out of memory ({told}): lower the batch size or the resolution, or use a smaller dtype")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was (training: with --resume)", file=sys.stderr)
        raise SystemExit(130) from None
