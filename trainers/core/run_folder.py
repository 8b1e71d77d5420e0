"""Folder of a training run: checked, locked, and its config written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import yaml
from accelerate import Accelerator

from rlg.distributed import together
from rlg.io import atomic, folders
from rlg.io.folders import check_links
from rlg.io.run_folder import CONFIG
from trainers.core.config import RunConfig, settings


def check_folder(config: RunConfig) -> None:
    """Raise ValueError where `prepare_folder` would.

    It touches nothing, so that it can come before slow work.
    """
    folder = config.folder
    check_links(folder)
    if config.resume:
        if not folder.is_dir():
            raise ValueError(f"nothing to resume: {folder} does not exist")
    elif folders.content(folder):
        if not config.overwrite:
            raise ValueError(f"{folder} exists; give --resume, --overwrite or another --name")
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} is no run folder (it has no {CONFIG}); it is not overwritten")


@contextmanager
def run_folder(config: RunConfig, accelerator: Accelerator) -> Iterator[None]:
    """Hold the run's folder for the block, against other runs.

    Raises ValueError as `check_folder`, or if another run holds it.
    """
    with ExitStack() as stack:
        with together():
            if accelerator.is_main_process:
                check_folder(config)
                stack.enter_context(folders.held(config.folder))
        prepare_folder(config, accelerator)
        yield


def prepare_folder(config: RunConfig, accelerator: Accelerator) -> None:
    """Create the run's folder, once nothing else can be refused.

    Raises ValueError as `check_folder`.
    """
    with together():
        if accelerator.is_main_process:
            check_folder(config)
            if not config.resume:
                config.folder.mkdir(parents=True, exist_ok=True)
                for lock in config.folder.rglob(f"*/{folders.LOCK}"):
                    folders.check(lock.parent)  # an evaluation may be running inside a run that is to be discarded
                # the folder counts as a run's until the end; see `check_folder`
                atomic.clear(config.folder, keep=(folders.LOCK, CONFIG))
                write_config(config, config.folder)


def write_config(config: RunConfig, folder: Path, changes: Sequence[str] = ()) -> None:
    """Write config.yaml, as --config reads it again.

    `changes` are comments below it (`checkpoints.provenance`).
    """
    lines = [yaml.safe_dump(settings(config), sort_keys=False), *(f"{line}\n" for line in changes)]
    atomic.write_text(folder / CONFIG, "".join(lines))
