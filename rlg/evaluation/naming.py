"""Names of trainings and experts, as evaluations and the app show them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlg.choices import CONSTANT
from rlg.evaluation.blend import BlendSettings
from rlg.evaluation.request import EvalRequest
from rlg.io.run_folder import EVALUATIONS
from rlg.models.backbones.networks import MAIN_DENOISERS
from rlg.models.tuned_model import TunedModel


def labels_of(experts: Sequence[tuple[str, str]]) -> list[str]:
    """Labels of experts, from their runs and files.

    The run is enough unless two experts have the same run. Then the file is added.
    """
    names = [name for name, _ in experts]
    return names if len(set(names)) == len(names) else [f"{name}/{file}" for name, file in experts]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without the words that all of them begin with."""
    words = [re.split("(?<=[-_/ ])", name) for name in names]
    start = 0
    while all(len(row) > start + 1 for row in words) and len({row[start] for row in words}) == 1:
        start += 1
    return ["".join(row[start:]) for row in words]


def home_of(model: TunedModel) -> tuple[str, Path]:
    """`(name, folder)` of the run that made an adapter.

    For a hub id, and for a full network, it is runs/NAME.
    """
    path = Path(model.path)
    if model.source.repo:
        name = "--".join(path.parts[:2])
    elif model.is_network:
        path = path.resolve()
        name = path.parent.name if path.name in MAIN_DENOISERS else path.name
    else:
        folder = path.resolve().parent
        return folder.name, folder
    return name, Path("runs") / name


def names_of(request: EvalRequest) -> tuple[Path, dict[str, Any]]:
    """The output folder, and meta.json's entries about the models."""
    settings, goal = request.settings, request.goal
    runs = [(*home_of(model), Path(model.path).resolve().name) for model in request.models]
    name, home, file = runs[0]
    parts = [f"{settings.sampler}{settings.steps}", f"cfg{settings.cfg:g}", f"seed{settings.seed}"]
    naming: dict[str, Any] = {"name": name, "adapter": " + ".join(str(Path(model.path)) for model in request.models)}
    if settings.origin is not None:
        naming["name"] += f" from {Path(settings.origin).stem}"
        parts.append(f"from-{Path(settings.origin).stem}")
    if settings.schedule != CONSTANT:
        parts.append(settings.schedule.replace(":", "_"))
    if goal:
        parts.append(f"{goal.option}{goal.value:g}")
    if isinstance(settings, BlendSettings):
        labels = labels_of([(name, file) for name, _, file in runs])
        file = "-with-".join([file, *(f"{n}-{f}" for n, _, f in runs[1:])])
        parts += [] if settings.blend_scale == 1 else [f"scale{settings.blend_scale:g}"]
        morl = [str(Path(model.path)) for model in request.morl]
        naming |= {"name": " + ".join(labels), "experts": short_names(labels), "morl": morl}
    return request.output or home / EVALUATIONS / "-".join([file, *parts]), naming
