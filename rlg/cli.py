"""What every command shares: errors that a user can cause end in one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

TUNED_HELP = (
    "the tuned model, a path or hub id: checkpoint-N of a run, a PEFT folder, a diffusers or kohya LoRA file, or a "
    "full fine-tuned network (its folder, or a pipeline's; needs --base, and memory for two)"
)


def stop(message: str) -> NoReturn:
    """Print one line on stderr and exit with code 2; what a file holds does not steer the terminal."""
    line = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in " ".join(message.split()))
    print(f"error: {line}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors look like all others: one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        stop(f"{message}; see --help")


@contextmanager
def fail_cleanly() -> Iterator[None]:
    """Turn ValueError and OSError (wrong input, missing files) into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        stop(str(error))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was (training: with --resume)", file=sys.stderr)
        raise SystemExit(130) from None
