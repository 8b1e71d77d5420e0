"""Options of an equivalence experiment.

It has a base, a tuned model at beta, and models trained at beta / w.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlg.choices import DTYPES, KERNELS
from rlg.config_parser import Command, option
from rlg.evaluation.methods import RLG

if TYPE_CHECKING:  # it loads torch
    from rlg.evaluation.evaluator import EvalSettings

_NEEDED = ("base", "reward", "ckpt")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment, as in configs/equivalence/*.yaml.

    Raises ValueError for settings that make no experiment.
    """

    base: str = option("", "base model")
    reward: str = option("", "the reward that the models were trained on")
    ckpt: str = option("", "the tuned model that is guided")
    beta: float = option(0.0, "the KL coefficient that it was trained at, in units of the reward; needed")
    prompts: str = option("tinyworld:composition/test", "prompt set")
    prompt_column: str | None = option(None, "of a prompt file with columns (default: prompt)")
    num_prompts: int = option(24, "how many of them, spread evenly")
    samples: int = option(512, "images of the base, a prompt")
    k: int = option(64, "images a prompt at each w")
    w: tuple[float, ...] = option((0.0, 0.5, 1.0, 1.5, 2.0, 3.0), "values of w; 0 and 1 among them")
    trained: tuple[dict[str, Any], ...] = option((), "other models: ckpt, beta and a name", file_only=True)
    steps: int = option(10, "denoising steps")
    kernel: str = option("sde", "sampler", choices=KERNELS)
    level: float = option(1.0, "noise level of a stochastic sampler")
    cfg: float = option(1.0, "classifier-free guidance scale; 1 is off")
    dtype: str = option("bfloat16", "of the weights", choices=DTYPES)
    seed: int = option(0, "decides the noise")
    batch_size: int = option(128, "images a batch")

    def __post_init__(self) -> None:
        if missing := [name for name in _NEEDED if not getattr(self, name)]:
            raise ValueError(f"an experiment needs {missing[0]}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not {0.0, 1.0} <= set(self.w):
            raise ValueError(f"w must hold 0 and 1, between which errors are measured, got {list(self.w)}")
        for model in self.trained:
            if not isinstance(model, dict) or set(model) != {"ckpt", "beta", "name"}:
                raise ValueError(f"each of `trained` has ckpt, beta and name, got {model!r}")

    def as_dict(self) -> dict[str, Any]:
        """Its settings, by name."""
        return {field.name: getattr(self, field.name) for field in fields(Experiment)}

    def settings(self, scales: Sequence[float], k: int, seed: int) -> EvalSettings:
        """Settings of one of its evaluations."""
        from rlg.evaluation.evaluator import EvalSettings

        return EvalSettings(
            scales=tuple(scales),
            methods=(RLG,),
            steps=self.steps,
            sampler=self.kernel,
            level=self.level,
            cfg=self.cfg,
            resolution=None,
            k=k,
            seed=seed,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True, kw_only=True)
class EquivalenceOptions(Experiment):
    """Options of `python -m rlg.equivalence`: an experiment, or known laws."""

    config: Path | None = None  # it names the folder
    samples: int | None = option(None, "images of the base, a prompt (default: 512); with --toy of each law (10000)")
    steps: int | None = option(None, "denoising steps (default: 10; with --toy 250)")
    toy: bool = option(False, "laws with known scores, against the exact tilted law")
    output: Path | None = option(None, "folder to write to (default: runs/equivalence/NAME)")

    def __post_init__(self) -> None:
        if self.toy == (self.config is not None):
            raise ValueError("give either --toy or --config FILE")
        samples, steps = (10_000, 250) if self.toy else (Experiment.samples, Experiment.steps)
        object.__setattr__(self, "samples", samples if self.samples is None else self.samples)
        object.__setattr__(self, "steps", steps if self.steps is None else self.steps)
        if not self.toy:
            super().__post_init__()


COMMAND = Command(
    "python -m rlg.equivalence", EquivalenceOptions, "Does guidance with w play the KL coefficient beta / w?"
)
