"""Start of a training, from Python or from its command line.

Every refusal comes before slow work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator

from rlg.distributed import agree, together
from rlg.io import folders
from rlg.publishing import hub_upload, wandb_runs
from trainers.checkpoints import engines
from trainers.core import dry_run
from trainers.core.config import ConfigT, RunConfig, TrainConfig, parse_config
from trainers.core.run_folder import check_folder
from trainers.core.setup import make_accelerator


class Trains(Protocol):
    """Protocol of a trainer, as a command sees it."""

    accelerator: Accelerator

    def train(self) -> Path:
        """Train to the end or an interruption; return the last checkpoint."""


def begin(config: RunConfig) -> Accelerator:
    """Make the engine of a run that may begin.

    It touches no file. Raises ValueError for sizes that do not fit together, processes that disagree, a folder that is
    taken, and a tracker or hub that would refuse at the end.
    """
    if config.dry_run:
        raise ValueError("dry_run is of the command line, which prints and exits; a trainer trains")
    accelerator = make_accelerator(config)
    config.derived(accelerator.num_processes)
    agree(dataclasses.asdict(config), "start all with the same config and options")
    with together():
        if accelerator.is_main_process:
            check_folder(config)
            folders.check(config.folder)
    check_publishing(config, accelerator)
    if isinstance(config, TrainConfig):
        engines.require_scaler(accelerator, config.dtype)
    return accelerator


def check_publishing(config: RunConfig, accelerator: Accelerator) -> None:
    """Raise ValueError for a tracker or hub that would refuse later.

    It touches nothing.
    """
    if accelerator.is_main_process and config.report_to == "wandb":
        wandb_runs.require()
    if isinstance(config, TrainConfig) and config.push_to_hub:
        hub_upload.check_token()


def run(config_type: type[ConfigT], trainer: Callable[[ConfigT], Trains]) -> None:
    """Train by the command line; with --dry_run print a report and exit."""
    config = parse_config(config_type)
    if config.dry_run:
        accelerator = make_accelerator(config)
        config.check_inputs()
        dry_run.report(config, config.processes or accelerator.num_processes)
        raise SystemExit(0)
    made = trainer(config)
    made.train()
    made.accelerator.end_training()  # takes the process group down, since nothing is trained after a command
