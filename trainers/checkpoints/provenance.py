"""Digests, versions and settings of a run, recorded and compared.

A checkpoint's state.json has digests and versions (`rlg.models.fingerprint`). config.yaml has the present settings.
Below them, a comment records each resume with other settings.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from rewards import REWARDS, places
from rlg.distributed import agree, together
from rlg.io.run_folder import CONFIG, read_config
from rlg.models import fingerprint
from rlg.models.fingerprint import Record
from rlg.prompts import Prompt
from trainers.core.config import RunConfig, TrainConfig, settings
from trainers.core.run_folder import write_config

_PACKAGES = ("accelerate", "trl", "datasets")  # besides those that decide the numbers of an evaluation
_CHANGED = "# changed at"  # beginning of such a comment in config.yaml
_MAY_CHANGE = (
    "name",
    "output_dir",
    "max_steps",
    "save_steps",
    "save_total_limit",
    "sample_steps",
    "max_skipped",
    "report_to",
    "project",
    "reward_seconds",
    "gradient_checkpointing",  # it changes numbers by rounding alone, as do the next two
    "compile",
    "update_batch_size",
    "log_adapter",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "adapter_license",
)


def record(
    config: RunConfig, accelerator: Accelerator, prompts: Mapping[str, Sequence[Prompt]], data: str | None = None
) -> Record:
    """Digests and versions of what a run is made of.

    One process a node reads the files of models and data, and all compare what they know. prompts: sets of them by
    their part in it. data: where the training data is. Raises ValueError where nodes hold different files under one
    name.
    """
    found: Record = {fingerprint.DIGESTS: {name: fingerprint.of_prompts(rows) for name, rows in prompts.items()}}
    with together():
        if accelerator.is_local_main_process:
            found = fingerprint.record({}, config.base, prompts, _models(config), _PACKAGES)
            if data and (digest := fingerprint.of_data(data)):
                found[fingerprint.DIGESTS]["data"] = digest
    flat = {name: value for part in found.values() for name, value in part.items()}
    agree(flat, "give every node the same files and packages")
    return found


def _models(config: RunConfig) -> dict[str, str]:
    """Places of the models of the rewards that have one."""
    if not isinstance(config, TrainConfig):
        return {}
    return places([name for name in (*config.reward, *config.held_out_reward) if name.partition("=")[0] in REWARDS])


def check_changes(config: RunConfig, record: Record, checkpoint: Path, made_of: Mapping[str, Any]) -> None:
    """Raise ValueError for settings and files of another run.

    With --allow_changes it warns of them instead. made_of: the checkpoint's state.json. Of other versions of the
    libraries it only warns.
    """
    file = checkpoint / CONFIG
    before = read_config(file) if file.is_file() else {}
    changed = [
        f"{name} = {value!r}, and not {before[name]!r}"
        for name, value in settings(config).items()
        if name in before and before[name] != value and name not in _MAY_CHANGE
    ]
    for part, found in ((part, fingerprint.differences(made_of, {part: record[part]})) for part in record):
        if part == fingerprint.VERSIONS and found:
            warnings.warn(f"{checkpoint} was written by other versions: {'; '.join(found)}", stacklevel=4)
        else:
            changed += found
    if not changed:
        return
    what = f"resuming {checkpoint} with {'; '.join(changed)}"
    if not config.allow_changes:
        raise ValueError(f"{what}; that is another run: take that back, or give --allow_changes")
    warnings.warn(what, stacklevel=4)


def changes_of(folder: Path) -> list[str]:
    """Comments in a run's config.yaml, one for each change."""
    file = folder / CONFIG
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if line.startswith(_CHANGED)]


def note_changes(config: RunConfig, step: int) -> None:
    """Bring a resumed run's config.yaml up to date.

    A comment keeps the former values. An option that did not exist before is no change.
    """
    before = read_config(config.folder / CONFIG) if (config.folder / CONFIG).is_file() else {}
    now = settings(config)
    changed = [f"{n} {before[n]!r} -> {value!r}" for n, value in now.items() if n in before and before[n] != value]
    lines = changes_of(config.folder)
    if changed:
        day = datetime.now(UTC).isoformat(timespec="seconds")
        lines.append(" ".join(f"{_CHANGED} step {step}, {day}: {'; '.join(changed)}".split()))
    if before != now:
        write_config(config, config.folder, lines)
