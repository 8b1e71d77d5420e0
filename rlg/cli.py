"""What every command shares: errors that a user can cause end in one line and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake of the user's, with the fix in its message."""


@contextmanager
def fail_cleanly() -> Iterator[None]:
    """Turn ValueError and OSError (wrong input, missing files) into one line on stderr and exit code 2."""
    try:
        yield
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on from the last checkpoint", file=sys.stderr)
        raise SystemExit(130) from None
