"""Publish an adapter on the hub.

python -m rlg.push CHECKPOINT REPO
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlg.config_parser import Command, option


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """Options of `python -m rlg.push`."""

    ckpt: Path = option(help="checkpoint-N of a run")
    repo: str = option(help="repository, made if there is none", metavar="USER/NAME")
    private: bool = option(False, "of a repository that is made: only you see it")
    license: str | None = option(
        None, "of the adapter, an id of the hub's such as apache-2.0 (default: none is stated)"
    )


COMMAND = Command(
    "python -m rlg.push",
    PushOptions,
    "Publish an adapter on the hub, with its model card and the evaluations' curves.",
)
if __name__ == "__main__":
    COMMAND.answer()

from collections.abc import Sequence

from rlg.cli import fail_cleanly
from rlg.publishing.hub_upload import push


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; prints the repository's address."""
    with fail_cleanly():
        options = COMMAND.parse(argv)
        print(push(options.ckpt, options.repo, options.private, options.license))


if __name__ == "__main__":
    main()
