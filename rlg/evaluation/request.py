"""One evaluation as it is asked for: the record that the command line ends in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line does without torch, which takes seconds to load
    from rlg.evaluation.choose_w import Goal
    from rlg.evaluation.evaluator import EvalSettings
    from rlg.models.tuned_model import TunedModel


@dataclass(frozen=True)
class EvalRequest:
    """An evaluation, checked as far as that goes without its prompts, its rewards and its base model."""

    models: tuple[TunedModel, ...]  # the tuned model, or the two experts of a blend
    morl: tuple[TunedModel, ...]  # of a blend: models that were trained on a mix of its rewards
    base: str
    base_is_given: bool  # by the user; otherwise the adapter names it
    settings: EvalSettings  # BlendSettings for a blend
    goal: Goal | None  # by which w is chosen, in place of the settings' own
    calibration_prompts: int  # how many w is chosen on
    prompts: str  # where they are from
    prompt_column: str | None
    num_prompts: int | None  # None: all
    trained_rewards: tuple[str, ...]  # NAME or NAME=SOURCE
    rewards: tuple[str, ...]  # all of them: those that were trained on come first
    dtype: str
    vae_dtype: str | None
    t5_length: int | None
    output: Path | None  # None: beside the run, see `naming.names_of`
    images: int  # prompts whose images are kept; -1 keeps all
    project: str | None  # of the tracker; None: there is none
    log_adapter: bool  # keep the adapter with the tracker
    overwrite: bool
