"""Log of a training: metrics.jsonl, trackers and sheets of samples."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from rlg.io import public_names
from rlg.io.pixels import levels
from rlg.io.run_folder import METRICS, SAMPLES, sample_name
from rlg.publishing import hub_upload, wandb_runs
from trainers.core.config import RunConfig, TrainConfig, settings


class Log:
    """Log of metrics.jsonl, sample grids and the tracker.

    Only the main process writes.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator):
        self.folder, self.accelerator = config.folder, accelerator
        if config.report_to == "wandb" and accelerator.is_main_process:
            options = wandb_runs.options(config.folder, config.name, "train", config.name)
            with wandb_runs.one_line():
                accelerator.init_trackers(config.project, public_names.value(settings(config)), {"wandb": options})
        elif config.report_to == "tensorboard":
            flat = {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in vars(config).items()}
            accelerator.init_trackers(config.project, flat)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        """End the trackers.

        Another training of this process thus begins with none.
        """
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else ():
            if tracker.name == "wandb":
                tracker.tracker.finish(exit_code=int(kind is not None))
            else:
                tracker.finish()
        self.accelerator.trackers = []

    def metrics(self, step: int, row: Mapping[str, float]) -> None:
        """Append a row, and send it to the tracker."""
        if not self.accelerator.is_main_process:
            return
        rounded = {k: float(f"{v:.8g}") for k, v in row.items()}
        with (self.folder / METRICS).open("a") as file:
            file.write(json.dumps({"step": step} | rounded) + "\n")
        self.accelerator.log(dict(row), step=step)

    def images(
        self, step: int, images_B3HW: Tensor, prompts: Sequence[str], scores: Mapping[str, Tensor] | None = None
    ) -> None:
        """Save a grid of samples with captions; send it to the tracker.

        A caption has an image's prompt and its rewards, (B,) each.
        """
        if not self.accelerator.is_main_process:
            return
        folder = self.folder / SAMPLES
        folder.mkdir(exist_ok=True)
        rows = [{name: float(score_B[i]) for name, score_B in (scores or {}).items()} for i in range(len(prompts))]
        captions = [wandb_runs.caption(prompt, row) for prompt, row in zip(prompts, rows, strict=True)]
        grid(images_B3HW).save(folder / sample_name(step, ".png"))
        (folder / sample_name(step, ".txt")).write_text("\n".join(captions) + "\n", errors="replace")
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log({"samples": wandb_runs.pictures(images_B3HW, captions)}, step=step)
            else:
                pixels = levels(images_B3HW).permute(0, 2, 3, 1).cpu().numpy()
                tracker.log_images({"samples": pixels}, step=step, dataformats="NHWC")

    def publish(self, config: TrainConfig, checkpoint: Path) -> None:
        """Publish what a finished run's config asks for.

        That is its adapter, as an artifact and on the hub. Raises ValueError where the hub refuses; the checkpoint is
        whole then.
        """
        if not self.accelerator.is_main_process:
            return
        if config.log_adapter:
            wandb_runs.log_adapter(self.accelerator.get_tracker("wandb", unwrap=True), checkpoint, config.name)
        if config.push_to_hub:
            print(hub_upload.push(checkpoint, config.hub_model_id or config.name, config.hub_private_repo))


def grid(images_B3HW: Tensor, columns: int = 8) -> Image.Image:
    """Images side by side, row by row; empty places are white."""
    count, _, height, width = images_B3HW.shape
    columns = min(columns, count)
    rows = -(-count // columns)
    white = images_B3HW.new_ones(rows * columns - count, 3, height, width)
    table = torch.cat([images_B3HW, white]).reshape(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray(levels(table.reshape(rows * height, columns * width, 3)).cpu().numpy())
