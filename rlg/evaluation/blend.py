"""The evaluator of blends of two experts.

    python -m rlg.evaluate --ckpt A --ckpt B --blend 0:1:0.1

Both experts are adapters of one network. lambda, a row's `w`, is the weight of the last one. These are compared at
every lambda, on the same prompts and noises:

    blend      base + W ((1 - lambda) (A - base) + lambda (B - base)): a pass for each expert (DB-MPA at W = 1)
    blend_ls   one of them drawn at each step, one pass (DB-MPA-LS; stochastic samplers, W <= 1)
    soup       the weights averaged, one pass: base + W times the mean of the dense updates (rewarded soups,
               arXiv 2306.04488); a mean of the LoRA factors would add cross terms

These are single points:

    rlg        the base, at w = 0
    expert     each expert alone, at w = 0 and 1; at W = 1 all methods meet there, so it is made once
    morl       models that were trained on a mix of the rewards, w counting them from 0: a training for each lambda
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rewards import RewardMix
from rlg.choices import CONSTANT
from rlg.diffusion import process
from rlg.evaluation.evaluator import EvalSettings, Evaluator
from rlg.evaluation.folder import Job
from rlg.evaluation.methods import BLEND, BLEND_LS, BLEND_METHODS, EXPERT, MORL, RLG, SOUP
from rlg.guidance import blend
from rlg.guidance.guided import Guided, rlg
from rlg.io import atomic
from rlg.io.parsing import read_json
from rlg.io.run_folder import META
from rlg.models import adapter_files, fingerprint
from rlg.models.policy import Policy
from rlg.models.tuned_model import TunedModel
from rlg.prompts import Prompt

EXPERTS = (adapter_files.NAME, "expert_1")  # names of the adapters in the network


def morl_name(i: int) -> str:
    """Adapter name of the i-th model that was trained on a mix."""
    return f"morl_{i}"


@dataclass(frozen=True)
class BlendSettings(EvalSettings):
    """The settings that decide the rows of a blend.

    `scales` are the lambdas.
    """

    blend_scale: float = 1.0  # W
    morl: int = 0  # number of models trained on a mix

    def __post_init__(self) -> None:
        super().__post_init__()
        if not math.isfinite(self.blend_scale):
            raise ValueError(f"--blend_scale must be finite, got {self.blend_scale}")
        if self.origin is not None:
            raise ValueError("--origin does not go with --blend, which starts from the base")
        if self.schedule != CONSTANT:
            raise ValueError(f"--schedule {self.schedule} does not go with --blend, whose weights stay over the steps")
        if BLEND_LS in self.methods:
            weights = blend.pair_weights(torch.tensor(self.scales), self.blend_scale).tolist()
            blend.check_drawn(BLEND_LS, weights, self.sampler, self.level)

    @staticmethod
    def known() -> tuple[str, ...]:
        """The methods of a blend."""
        return BLEND_METHODS

    def sweeps(self) -> Iterator[tuple[str, tuple[float, ...]]]:
        """Each method, with the lambdas that may share a batch."""
        yield RLG, (0.0,)
        yield EXPERT, (0.0, 1.0)
        lambdas = tuple(w for w in self.scales if self.blend_scale != 1 or w not in (0.0, 1.0))
        yield from ((method, lambdas) for method in (BLEND, BLEND_LS) if lambdas and method in self.methods)
        yield from ((SOUP, (w,)) for w in lambdas if SOUP in self.methods)
        yield from ((MORL, (float(i),)) for i in range(self.morl))

    def shows(self, job: Job) -> bool:
        """Tell whether the report's slider stops at a job.

        It stops at the first method, and at the experts as its ends.
        """
        return job.method == self.methods[0] or (job.method == EXPERT and self.blend_scale == 1)


def load_experts(policy: Policy, experts: Sequence[TunedModel], morl: Sequence[TunedModel]) -> None:
    """Load two experts, and models trained on a mix, into one network.

    Raises ValueError as `load_adapter` does.
    """
    policy.load_adapter(experts[0])
    policy.load_expert(EXPERTS[1], experts[1])
    for i, model in enumerate(morl):
        policy.load_expert(morl_name(i), model)


def check_pair(experts: Sequence[TunedModel], morl: Sequence[TunedModel], rewards: Sequence[str]) -> None:
    """Raise ValueError unless there are two experts and two rewards.

    All adapters that name a base must name the same one.
    """
    if len(rewards) != 2:
        raise ValueError(f"--blend draws a front over two rewards; give --reward A B, got {', '.join(rewards)}")
    if len(experts) != 2:
        raise ValueError(f"--blend mixes two experts, got {len(experts)} --ckpt; give --ckpt A --ckpt B")
    named = {model.path: model.adapter.base for model in (*experts, *morl)}
    (first, base), *others = [(path, base) for path, base in named.items() if base] or [("", None)]
    for path, other in others:
        if other != base:
            raise ValueError(f"{path} was trained on {other}, and {first} on {base}")


class BlendEvaluator(Evaluator):
    """Make and score images of a policy that `load_experts` has prepared."""

    def __init__(self, policy: Policy, reward: RewardMix, prompts: Sequence[Prompt], settings: BlendSettings):
        super().__init__(policy, reward, prompts, settings)
        self.settings: BlendSettings
        self.experts = tuple(self.with_cfg(partial(policy.predict_as, name)) for name in EXPERTS)

    def guided(self, unit: Sequence[Job], schedule: process.Schedule) -> Guided:
        """The predictor for a batch of jobs of one method."""
        method, w = unit[0].method, unit[0].w
        if method == RLG:
            return super().guided(unit, schedule)
        if method == MORL:
            one = partial(self.policy.predict_as, morl_name(int(w)))
            return rlg(self.base, self.with_cfg(one), 1.0)
        scale = 1.0 if method == EXPERT else self.settings.blend_scale
        weights_BE = blend.pair_weights(torch.tensor([job.w for job in unit]), scale)
        if method == SOUP:
            mix = dict(zip(EXPERTS, weights_BE[0].tolist(), strict=True))
            return rlg(self.base, self.with_cfg(partial(self.policy.predict_mixed, mix)), 1.0)
        if method == BLEND_LS:
            return Guided(self.base, self.experts, blend.one_at_a_time(weights_BE, schedule, self.ids(unit)))
        return Guided(self.base, self.experts, tuple(weights_BE.unbind(dim=1)))


def allow_more_morl(folder: Path, meta: Mapping[str, Any]) -> None:
    """Let an existing evaluation go on with more models of mixed training.

    The models that it has must stay the first ones.
    """
    file, morl = folder / META, list(meta["morl"])
    before = read_json(file) if file.is_file() else {}
    known = before.get("morl")
    if isinstance(known, list) and known == morl[: len(known)]:
        digests = dict(before.get(fingerprint.DIGESTS) or {})
        added = {name: meta[fingerprint.DIGESTS].get(name) for name in map(morl_name, range(len(known), len(morl)))}
        changes = {"morl": morl} | ({fingerprint.DIGESTS: digests | added} if digests else {})
        atomic.write_text(file, json.dumps(before | changes, indent=1))
