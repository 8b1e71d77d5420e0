"""Runs of Weights & Biases: accounts, options, pictures and adapters.

docs/wandb.md has the keys that are logged.
"""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rlg import extras
from rlg.io.pixels import levels

AWAY = ("offline", "disabled", "dryrun")  # W&B's modes without a server
_RUN_ID = Path("wandb", "run_id")  # file in a folder: the W&B run that goes on when the folder's work does


@dataclass(frozen=True)
class Tracking:
    """Place on W&B to which an evaluation is mirrored."""

    project: str
    adapters: tuple[Path, ...] = ()  # checkpoints to keep as artifacts


@contextmanager
def one_line() -> Iterator[None]:
    """Turn errors of W&B into ValueError.

    Causes are no account, no network, or a deleted run.
    """
    import wandb

    try:
        yield
    except wandb.errors.Error as error:
        hint = "`wandb login` signs in, WANDB_MODE=offline keeps the run here for `wandb sync`"
        raise ValueError(f"W&B: {str(error).rstrip('. ')}; {hint}") from error


def require(extra: str = "wandb") -> None:
    """Raise ValueError unless W&B is installed and signed in.

    An offline mode needs no account. It writes nothing here.
    """
    try:
        import wandb
    except ImportError as error:
        raise ValueError(f"report_to is wandb, which is not installed: {extras.install(extra)}") from error
    with one_line():
        if wandb.setup().settings.mode not in AWAY:
            wandb.login()


def options(folder: Path, name: str, job_type: str, group: str) -> dict[str, Any]:
    """Arguments of wandb.init, besides project and config.

    folder: that of the work's files. The run's id is kept there, so that work which is resumed goes on in the same
    run; an agent's id comes first. W&B gets the machine's load and packages: no host, user, path, command line or
    console.
    """
    common = {"name": name, "dir": str(folder), "resume": "allow", "job_type": job_type, "group": group}
    common["settings"] = quiet_settings()
    if "WANDB_RUN_ID" in os.environ:
        return common
    file = folder / _RUN_ID
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4))
    return common | {"id": file.read_text().strip()}


def quiet_settings(**more: Any) -> Any:
    """wandb.Settings that hide where and by whom a run was made."""
    import wandb

    hidden = {"host": "", "username": "", "console": "off", "x_disable_meta": True, "disable_git": True}
    return wandb.Settings(save_code=False, **hidden, **more)


def forget(folder: Path) -> None:
    """Make the next work in a folder another W&B run."""
    (folder / _RUN_ID).unlink(missing_ok=True)


def caption(prompt: str, scores: Mapping[str, float]) -> str:
    """One line below an image: its prompt and its rewards."""
    rewards = ", ".join(f"{name} {value:.4g}" for name, value in scores.items())
    return " ".join(f"{prompt} | {rewards}".split()) if rewards else " ".join(prompt.split())


def pictures(images_B3HW: Tensor, captions: Sequence[str]) -> list[Any]:
    """Images in [0, 1] for W&B, each with its caption."""
    import wandb

    pixels = levels(images_B3HW).permute(0, 2, 3, 1).cpu().numpy()
    return [wandb.Image(image, caption=text) for image, text in zip(pixels, captions, strict=True)]


def log_adapter(run: Any, checkpoint: Path, name: str) -> None:
    """Keep an adapter as an artifact of type `model`.

    Its files are those that are published, too; see `model_card.files`.
    """
    import wandb

    from rlg.publishing import hub_upload, model_card

    model_card.write(checkpoint)
    artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", f"adapter-{name}")[:128], type="model")
    with tempfile.TemporaryDirectory(prefix="rlg-artifact-") as place:
        hub_upload.stage(checkpoint, Path(place))
        for inside in model_card.files(checkpoint):
            artifact.add_file(str(Path(place) / inside), name=inside)  # W&B keeps a copy of it
        run.log_artifact(artifact, aliases=["latest", checkpoint.name])
