"""The record of one requested evaluation.

The command line is read into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line must not load torch, which takes seconds
    from rlg.evaluation.choose_w import Goal
    from rlg.evaluation.evaluator import EvalSettings
    from rlg.models.tuned_model import TunedModel


@dataclass(frozen=True)
class EvalRequest:
    """A requested evaluation.

    It is checked as far as possible without prompts, rewards and base model.
    """

    models: tuple[TunedModel, ...]  # the tuned model, or the two experts of a blend
    morl: tuple[TunedModel, ...]  # for a blend: models that were trained on a mix of its rewards
    base: str
    base_is_given: bool  # the user gave the base; otherwise the adapter names it
    settings: EvalSettings  # BlendSettings for a blend
    goal: Goal | None  # w is chosen for it, and replaces the values in settings
    calibration_prompts: int  # number of prompts that w is chosen on
    prompts: str  # source of the prompts
    prompt_column: str | None
    num_prompts: int | None  # None means all
    trained_rewards: tuple[str, ...]  # NAME or NAME=SOURCE
    rewards: tuple[str, ...]  # all rewards; those that were trained on come first
    dtype: str
    vae_dtype: str | None
    t5_length: int | None
    output: Path | None  # None means a folder of the run, by `naming.names_of`
    images: int  # prompts whose images are kept; -1 keeps all
    project: str | None  # the tracker's project; None means no tracker
    log_adapter: bool  # the tracker keeps the adapter
    overwrite: bool
