"""Base of trainers that learn from their own samples.

It has groups of images a prompt, rewards and advantages. Prompts and noise depend on (seed, iteration) alone, so that
resuming, and any number of processes, give the same samples.

Legend: B samples of one process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from rewards import RewardScores
from rewards.background import EarlyScores
from rlg.diffusion import sampling
from rlg.diffusion.conditioning import Conditioning, Predictor
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.guidance.guided import with_cfg
from rlg.models.fingerprint import Record
from rlg.models.policy import Policy
from rlg.models.prompt_cache import EncodedPrompts
from rlg.prompts import columns
from trainers.checkpoints import provenance
from trainers.checkpoints.nonfinite import finite_mean
from trainers.core.advantages import group_advantages
from trainers.core.config import AdvantageConfig, SamplingConfig
from trainers.core.log import Log
from trainers.core.loop import Trainer
from trainers.core.setup import Given, Prompts, Rewards


class Scored(Protocol):
    """One process's share of an iteration's images.

    An algorithm's record adds what it trains on.
    """

    @property
    def images_B3HW(self) -> Tensor:
        """The images, in [0, 1]."""

    @property
    def prompt_B(self) -> Tensor:
        """Index of each image's prompt."""

    @property
    def early(self) -> EarlyScores | None:
        """Scores that were begun during sampling; None if there are none."""


@dataclass(frozen=True)
class Samples:
    """Samples without their trajectories, in batches."""

    latents: list[Tensor]  # x0, (B, C, H, W) each
    conds: list[Conditioning]
    images_B3HW: Tensor
    prompt_B: Tensor  # index of each sample's prompt
    early: EarlyScores | None = None


@dataclass(frozen=True)
class Part:
    """The samples of one batch, before they are made.

    It has their identities, and the inputs of network and sampler.
    """

    prompt_B: Tensor  # index of each sample's prompt
    cond: Conditioning
    noise: SampleNoise


class OnlineTrainer(Trainer):
    """Trainer that samples, scores and updates.

    An algorithm adds `rollout`, `advantages` and `update`.
    """

    shown = ("reward", "kl", "clip_fraction", "seconds_per_image")
    neutral = 0.0  # the advantage that teaches nothing
    config: SamplingConfig

    def __init__(
        self,
        config: SamplingConfig,
        *,
        policy: Policy | None = None,
        reward: Rewards | None = None,
        prompts: Prompts | None = None,
        held_out: Rewards | None = None,
        eval_prompts: Prompts | None = None,
        accelerator: Accelerator | None = None,
    ):
        """Take what is given; load the rest by the config.

        See `setup.Given` and `Trainer`.
        """
        self.scores: dict[str, Tensor] = {}  # rewards of this process's last images, (B,) by name
        given = Given(policy=policy, reward=reward, prompts=prompts, held_out=held_out, eval_prompts=eval_prompts)
        super().__init__(config, given, accelerator)
        self.encoded = EncodedPrompts(self.policy.encode)

    def load(self, given: Given) -> None:
        """Load rewards and prompts.

        Raises ValueError for too few prompts, and for one that a reward cannot score.
        """
        super().load(given)
        count, source = self.config.num_prompts, self.config.prompts or "what is given"
        if count > len(self.prompts):
            raise ValueError(f"num_prompts = {count}, but {source} holds {len(self.prompts)} prompts")
        if self.reward:
            self.reward.check(*columns(self.prompts))

    def record(self) -> Record:
        """Digests and versions of what the run is made of."""
        prompts = {"prompts": self.prompts, "eval_prompts": self.eval_prompts}
        return provenance.record(self.config, self.accelerator, prompts)

    def rollout(self) -> Scored:
        """Sample this process's share of the iteration.

        The samples depend on (seed, iteration) alone.
        """
        raise NotImplementedError

    def update(self, samples: Scored, advantage_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration; return mean metrics."""
        raise NotImplementedError

    def iteration(self, log: Log | None = None) -> dict[str, float]:
        """Take one rollout and its updates; advance the step counter."""
        started = time.perf_counter()
        samples = self.rollout()
        sampled = time.perf_counter()
        advantage_B, metrics = self.score(samples)
        scored = time.perf_counter()
        if advantage_B is None:
            self.skips.count("the reward of every group")
        else:
            metrics |= self.update(samples, advantage_B)
        finished = time.perf_counter()
        self.state.step += 1
        images = self.counts["images_per_iteration"]
        counters = self.state.counters
        counters["images"] = counters.get("images", 0) + images
        counters["seconds"] = counters.get("seconds", 0.0) + finished - started
        if log and self.config.sample_steps and self.state.step % self.config.sample_steps == 0:
            shown = [self.prompts[i].text for i in samples.prompt_B[:32]]
            log.images(self.state.step, samples.images_B3HW[:32], shown, self.scores)
        return metrics | {
            "images": counters["images"],
            "seconds": counters["seconds"],
            "seconds_per_image": (finished - started) / images,
            "seconds_rollout": sampled - started,
            "seconds_reward": scored - sampled,
            "seconds_update": finished - scored,
        }

    def iteration_seed(self) -> int:
        """The seed of all draws of this iteration."""
        return self.config.seed * 1_000_003 + self.state.step

    def parts(self, generator: torch.Generator, whole_groups: bool = False) -> list[Part]:
        """Batches of this process: `num_generations` samples of `num_prompts` random prompts.

        Samples are shuffled over batches and processes, or, with `whole_groups`, prompts are.
        """
        config, size = self.config, self.config.batch_size
        chosen = torch.randperm(len(self.prompts), generator=generator)[: config.num_prompts]
        pairs = [(int(p), k) for p in chosen for k in range(config.num_generations)]
        order = torch.arange(len(pairs)) if whole_groups else torch.randperm(len(pairs), generator=generator)
        share = order.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        local = [pairs[i] for i in share.tolist()]
        return [self._part(local[start : start + size]) for start in range(0, len(local), size)]

    @torch.no_grad()
    def sample_groups(self, predict: Predictor, parts: Sequence[Part]) -> Samples:
        """Sample with a bare policy by `sampler`, under the config's classifier-free guidance."""
        guided = with_cfg(predict, self.negative, self.config.cfg)
        schedule = self.sampler(self.config.steps)
        latents, images, early = [], [], EarlyScores(self.reward)
        for part in parts:
            with self.accelerator.autocast():
                latents.append(sampling.sample(guided, schedule, part.cond, part.noise))
            images.append(self.decode(latents[-1], part, early))
        prompt_B = torch.cat([part.prompt_B for part in parts])
        return Samples(latents, [part.cond for part in parts], torch.cat(images), prompt_B, early)

    def decode(self, x0_BCHW: Tensor, part: Part, early: EarlyScores | None) -> Tensor:
        """Decode the last latents of a batch.

        Rewards that wait for a server begin to score them.
        """
        images_B3HW = self.policy.decode(x0_BCHW, self.config.batch_size)
        if early:
            early.add(images_B3HW, *self._texts(part.prompt_B))
        return images_B3HW

    def _texts(self, prompt_B: Tensor) -> tuple[list[str], list[dict[str, Any]]]:
        return columns([self.prompts[i] for i in prompt_B.tolist()])

    def _part(self, pairs: Sequence[tuple[int, int]]) -> Part:
        prompt_ids = [prompt for prompt, _ in pairs]
        ids = [SampleId(self.iteration_seed(), prompt, k) for prompt, k in pairs]
        noise = SampleNoise(ids, self.shape, self.policy.device, self.config.same_initial_noise)
        return Part(torch.tensor(prompt_ids), self._conditioning(prompt_ids), noise)

    def _conditioning(self, prompt_ids: Sequence[int]) -> Conditioning:
        unique = list(dict.fromkeys(prompt_ids))
        encoded = self.encoded([self.prompts[i].text for i in unique]).to(self.policy.device)
        return encoded[torch.tensor([unique.index(i) for i in prompt_ids], device=self.policy.device)]

    def score(self, samples: Scored) -> tuple[Tensor | None, dict[str, float]]:
        """Score the images of the iteration.

        Returns (advantages of this process's samples, metrics over all processes). An advantage is relative to its
        whole group. So one reward that is not finite gives its whole group the advantage that teaches nothing. If no
        group is left, None stands for the advantages.
        """
        accelerator = self.accelerator
        scores = self.scores_of(samples)
        self.scores = scores.parts
        group_B = accelerator.gather(samples.prompt_B.to(accelerator.device)).cpu()
        total_B = accelerator.gather(scores.total_B.to(accelerator.device)).cpu().double()
        parts = {n: accelerator.gather(s.to(accelerator.device)).cpu().double() for n, s in scores.parts.items()}
        whole_B = ~torch.isin(group_B, group_B[~total_B.isfinite()])
        metrics = {f"reward/{name}": float(finite_mean(part)) for name, part in parts.items()}
        metrics |= {"unscored": int((~total_B.isfinite()).sum())}
        if not whole_B.any():
            return None, {name: value for name, value in metrics.items() if math.isfinite(value)}
        kept = {name: part[whole_B].nan_to_num() for name, part in parts.items()}  # a reward of weight 0 may be NaN
        total_N, group_N = total_B[whole_B], group_B[whole_B]
        advantage_B = torch.full_like(total_B, self.neutral)
        advantage_B[whole_B] = self.advantages(total_N, kept, group_N)
        spread_G = [float(total_N[group_N == g].std(unbiased=False)) for g in group_N.unique()]
        metrics |= {"reward": float(total_N.mean()), "reward_std": float(total_N.std(unbiased=False))}
        metrics["group_std"] = sum(spread_G) / len(spread_G)
        metrics["zero_std_ratio"] = sum(s < 1e-8 for s in spread_G) / len(spread_G)
        local = len(samples.prompt_B)
        start = accelerator.process_index * local
        return advantage_B[start : start + local].float().to(accelerator.device), metrics

    def scores_of(self, samples: Scored) -> RewardScores:
        """Scores of this process's images."""
        scorer = samples.early.finish if samples.early else self.reward
        return scorer(samples.images_B3HW, *self._texts(samples.prompt_B))

    def advantages(self, total_B: Tensor, parts: dict[str, Tensor], group_B: Tensor) -> Tensor:
        """(B,) weights of the samples of all processes in the loss.

        They follow from a sample's total, its rewards, and its group.
        """
        raise NotImplementedError

    def batch_order(self, count: int, epoch: int = 0) -> list[int]:
        """The order of the batches in a pass over them."""
        generator = torch.Generator().manual_seed(self.iteration_seed() + 7919 * (epoch + 1))
        return torch.randperm(count, generator=generator).tolist()


class AdvantageTrainer(OnlineTrainer):
    """Trainer whose samples count by their advantage.

    An advantage is a reward relative to those of its group.
    """

    config: AdvantageConfig

    def advantages(self, total_B: Tensor, parts: dict[str, Tensor], group_B: Tensor) -> Tensor:
        """(B,) advantages, as the config scales, clips and mixes them."""
        config = self.config
        if config.reward_aggregation == "advantage":  # MixGRPO normalises each reward on its own, then mixes them
            return sum(
                w * group_advantages(parts[n], group_B, config.scale_rewards, config.advantage_clip)
                for n, w in zip(self.reward.names, self.reward.weights, strict=True)
            )
        return group_advantages(total_B, group_B, config.scale_rewards, config.advantage_clip)
