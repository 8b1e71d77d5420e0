"""What every command shares: errors that a user can cause end in one line and exit code 2."""

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


_WIDTH, _CLAUSE = 90, 25  # characters of a sentence in a list, at most, and of its first clause, at least
_started_as: str | None = None


def start_as(command: str) -> None:
    """Remember that the console command started this process, as `rlg` or as `python -m rlg`."""
    global _started_as
    _started_as = command


def called(command: str) -> str:
    """`python -m rlg.NAME ...` as it was called: `rlg NAME ...`, where the console command started it."""
    if _started_as is None or not command.startswith("python -m ") or command.startswith(f"{_started_as} "):
        return command
    module, _, rest = command.removeprefix("python -m ").partition(" ")
    return " ".join(filter(None, (_started_as, module.rpartition(".")[2], rest)))


def first_sentence(text: str) -> str:
    """The first sentence of a docstring or a comment, for a line of a list; of a long one what its colon ends."""
    sentence = " ".join(text.split("\n\n")[0].split()).split(". ")[0].removesuffix(".")
    clause = re.split("[:;] ", sentence)[0]
    if len(sentence) > _WIDTH and len(clause) >= _CLAUSE:
        sentence = clause
    return textwrap.shorten(sentence, _WIDTH, placeholder=" ...")


def stop(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2; what a file holds does not steer the terminal."""
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


def check_new(output: Path | None, overwrite: bool) -> None:
    """Raise ValueError for an output that is there already, unless it is a file that is to be replaced."""
    if output is not None and (output.is_dir() or (output.exists() and not overwrite)):
        raise ValueError(f"{output} exists; give --overwrite, or --output another name")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all others: one line, without the usage."""

    @property
    def prog(self) -> str:
        """The command in a usage line, as it was called."""
        return called(self._prog)

    @prog.setter
    def prog(self, command: str) -> None:
        self._prog = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with options under their other names, too (see `rlg.io.spellings`)."""
        words = sys.argv[1:] if args is None else args
        known = {name.removeprefix("--") for name in self._option_string_actions}
        try:
            words = canonical_words(words, known)
        except ValueError as error:
            self.error(str(error))
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        stop(f"{message}; see --help")


@contextmanager
def fail_cleanly() -> Iterator[None]:
    """Turn ValueError, OSError (wrong input, missing files) and no memory into one line on stderr and exit code 2."""
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
