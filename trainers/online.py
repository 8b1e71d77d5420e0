"""What trainers share that learn from their own samples: groups of images a prompt, rewards, advantages.

Legend: B samples of one process. Prompts and noise depend on (seed, iteration) alone, so that resuming, and any number
of processes, give the same samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor

from rewards import RewardMix
from rewards.background import EarlyScores
from rlg import process, sampling
from rlg.backbones import Conditioning
from rlg.encoded_prompts import EncodedPrompts
from rlg.guidance import Predictor, with_cfg
from rlg.process import Process
from rlg.prompts import Prompt
from rlg.sampling import SampleId, SampleNoise
from trainers import common
from trainers.common import TrainConfig
from trainers.loop import Trainer
from trainers.skips import finite_mean

SCALES = ("group", "batch", "none")


@dataclass(kw_only=True)
class OnlineConfig(TrainConfig):
    """Options of sampling and of advantages; the defaults are Flow-GRPO's."""

    MIN_GENERATIONS: ClassVar[int] = 2  # an algorithm that compares within a group needs two

    reward: list[str] = field(metadata={"help": "rewards to train on"})
    prompts: str = field(
        metadata={"help": "training prompts: tinyworld:composition/train, a .txt or .jsonl file, hub:SET:SPLIT:COLUMN"}
    )
    num_prompts: int = field(default=48, metadata={"help": "prompts an iteration, over all processes"})
    num_generations: int = field(default=24, metadata={"help": "images a prompt: the group"})
    num_updates: int = field(default=1, metadata={"help": "optimizer steps for one pass over an iteration's images"})
    same_initial_noise: bool = field(default=False, metadata={"help": "a group starts from one noise (DanceGRPO)"})
    scale_rewards: str = field(
        default="batch", metadata={"help": "divide advantages by the std of: group, batch, none"}
    )
    reward_aggregation: str = field(default="sum", metadata={"help": "mix rewards as their sum, or as advantages"})
    advantage_clip: float = field(default=5.0, metadata={"help": "advantages are clipped to this"})

    def __post_init__(self) -> None:
        super().__post_init__()
        common.require_choice(self, "scale_rewards", SCALES)
        common.require_choice(self, "reward_aggregation", ("sum", "advantage"))
        if self.num_generations < self.MIN_GENERATIONS:
            raise ValueError(
                f"a group needs at least {self.MIN_GENERATIONS} images, got num_generations {self.num_generations}"
            )
        common.require_positive(self, "num_prompts", "num_updates", "advantage_clip")

    def derived(self, processes: int) -> dict[str, int]:
        """Counts that follow from the sizes. Raises ValueError, with both numbers, where sizes do not divide."""
        images = self.num_prompts * self.num_generations
        batch = processes * self.per_device_batch_size
        if images % batch:
            raise ValueError(
                f"num_prompts * num_generations = {images} images are not divisible by "
                f"processes * per_device_batch_size = {batch}"
            )
        if (images // batch) % self.num_updates:
            raise ValueError(f"{images // batch} batches are not divisible by num_updates = {self.num_updates}")
        return {
            "processes": processes,
            "images_per_iteration": images,
            "batches_per_process": images // batch,
            "images_per_update": images // self.num_updates,
            "updates_per_iteration": self.num_updates,
            "images_in_total": images * self.max_steps,
        }


def group_advantages(
    reward_B: Tensor, group_B: Tensor, scale: str = "batch", clip: float = 5.0, epsilon: float = 1e-4
) -> Tensor:
    """(B,) advantages: reward minus its group's mean, over a standard deviation, clipped.

    scale: "group" divides by the group's std, "batch" by the std of all rewards (Flow-GRPO's default), "none" by 1,
    which is what keeps beta the KL coefficient of the unscaled reward. epsilon is added to the std (Flow-GRPO).
    """
    _, index_B = torch.unique(group_B, return_inverse=True)
    count_G = torch.bincount(index_B).to(reward_B.dtype)
    mean_G = torch.zeros_like(count_G).index_add_(0, index_B, reward_B) / count_G
    low_G, high_G = (
        reward_B.new_zeros(len(count_G)).scatter_reduce_(0, index_B, reward_B, kind, include_self=False)
        for kind in ("amin", "amax")
    )
    # exactly 0 in a group without spread, whose mean may differ from its rewards by rounding
    centred_B = torch.where((low_G == high_G)[index_B], 0.0, reward_B - mean_G[index_B])
    if scale == "group":
        variance_G = torch.zeros_like(count_G).index_add_(0, index_B, centred_B**2) / count_G
        centred_B = centred_B / (variance_G.sqrt()[index_B] + epsilon)
    elif scale == "batch":
        centred_B = centred_B / (reward_B.std(unbiased=False) + epsilon)
    return centred_B.clamp(-clip, clip)


class Scored(Protocol):
    """One process's share of an iteration's images; an algorithm's record adds what it trains on."""

    @property
    def images_B3HW(self) -> Tensor:
        """In [0, 1]."""

    @property
    def prompt_B(self) -> Tensor:
        """Index of each image's prompt."""

    @property
    def early(self) -> EarlyScores | None:
        """Scores that were begun while sampling went on; None: none were."""


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
    """The samples of one batch: who they are, and what the network and the sampler need to make them."""

    prompt_B: Tensor  # index of each sample's prompt
    cond: Conditioning
    noise: SampleNoise


class OnlineTrainer(Trainer):
    """Sample, score, update. An algorithm adds `rollout` and `update`."""

    shown = ("reward", "kl", "clip_fraction", "seconds_per_image")
    neutral = 0.0  # the advantage that teaches nothing
    config: OnlineConfig

    def __init__(
        self,
        config: OnlineConfig,
        reward: RewardMix,
        prompts: Sequence[Prompt],
        eval_prompts: Sequence[Prompt] = (),
        accelerator: Accelerator | None = None,
        held_out: RewardMix | None = None,
    ):
        self.prompts = list(prompts)
        self.scores: dict[str, Tensor] = {}  # of this process's last images (B,), by reward
        if config.num_prompts > len(self.prompts):
            raise ValueError(
                f"num_prompts = {config.num_prompts}, but {config.prompts} holds {len(self.prompts)} prompts"
            )
        super().__init__(config, accelerator, reward, held_out, eval_prompts)
        self.encoded = EncodedPrompts(self.policy.encode)

    def rollout(self) -> Scored:
        """Sample this process's share of the iteration; what it is depends on (seed, iteration) alone."""
        raise NotImplementedError

    def update(self, samples: Scored, advantage_B: Tensor) -> dict[str, float]:
        """All optimizer steps of the iteration; returns mean metrics."""
        raise NotImplementedError

    def iteration(self, log: common.Log | None = None) -> dict[str, float]:
        """One rollout and its updates; advances the step counter."""
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
        """This process's batches: `num_generations` samples of `num_prompts` random prompts.

        Samples are shuffled over batches and processes, or, with `whole_groups`, prompts are.
        """
        config, size = self.config, self.config.per_device_batch_size
        chosen = torch.randperm(len(self.prompts), generator=generator)[: config.num_prompts]
        pairs = [(int(p), k) for p in chosen for k in range(config.num_generations)]
        order = torch.arange(len(pairs)) if whole_groups else torch.randperm(len(pairs), generator=generator)
        share = order.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        local = [pairs[i] for i in share.tolist()]
        return [self._part(local[start : start + size]) for start in range(0, len(local), size)]

    @torch.no_grad()
    def sample_groups(self, predict: Predictor, parts: Sequence[Part]) -> Samples:
        """Samples of a policy, by the solver of `evaluation_schedule` under the config's guidance."""
        guided, schedule = with_cfg(predict, self.negative, self.config.guidance_scale), self.evaluation_schedule()
        latents, images, early = [], [], EarlyScores(self.reward)
        for part in parts:
            with self.accelerator.autocast():
                latents.append(sampling.sample(guided, schedule, part.cond, part.noise))
            images.append(self.decode(latents[-1], part, early))
        prompt_B = torch.cat([part.prompt_B for part in parts])
        return Samples(latents, [part.cond for part in parts], torch.cat(images), prompt_B, early)

    def decode(self, x0_BCHW: Tensor, part: Part, early: EarlyScores | None) -> Tensor:
        """Images of a batch's ends; where scoring means waiting for a server, it begins now."""
        images_B3HW = self.policy.decode(x0_BCHW, self.config.per_device_batch_size)
        if early:
            early.add(images_B3HW, *self._texts(part.prompt_B))
        return images_B3HW

    def _texts(self, prompt_B: Tensor) -> tuple[list[str], list[dict[str, Any]]]:
        prompts = [self.prompts[i] for i in prompt_B.tolist()]
        return [p.text for p in prompts], [p.metadata for p in prompts]

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
        """(advantages of this process's samples, metrics over all processes).

        An advantage is relative to its whole group: one image whose reward is not finite takes its group out, which
        gets the advantage that teaches nothing. Where that takes out every group, there are no advantages: None.
        """
        accelerator = self.accelerator
        scorer = samples.early.finish if samples.early else self.reward
        scores = scorer(samples.images_B3HW, *self._texts(samples.prompt_B))
        self.scores = scores.parts
        group_B = accelerator.gather(samples.prompt_B.to(accelerator.device)).cpu()
        total_B = accelerator.gather(scores.total_B.to(accelerator.device)).cpu().double()
        parts = {n: accelerator.gather(s.to(accelerator.device)).cpu().double() for n, s in scores.parts.items()}
        whole_B = ~torch.isin(group_B, group_B[~total_B.isfinite()])
        metrics = {f"reward/{name}": float(finite_mean(part)) for name, part in parts.items()}
        metrics |= {"unscored": int((~total_B.isfinite()).sum())}
        if not whole_B.any():
            return None, {name: value for name, value in metrics.items() if math.isfinite(value)}
        kept = {name: part[whole_B].nan_to_num() for name, part in parts.items()}  # NaN: one of weight 0
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

    def advantages(self, total_B: Tensor, parts: dict[str, Tensor], group_B: Tensor) -> Tensor:
        """(B,) what each sample of all processes counts for, from its reward, the rewards in it, and its group."""
        config = self.config
        if config.reward_aggregation == "advantage":  # MixGRPO: each reward normalised on its own, then mixed
            return sum(
                w * group_advantages(parts[n], group_B, config.scale_rewards, config.advantage_clip)
                for n, w in zip(self.reward.names, self.reward.weights, strict=True)
            )
        return group_advantages(total_B, group_B, config.scale_rewards, config.advantage_clip)

    def batch_order(self, count: int, epoch: int = 0) -> list[int]:
        """The order in which a pass over the batches takes them."""
        generator = torch.Generator().manual_seed(self.iteration_seed() + 7919 * (epoch + 1))
        return torch.randperm(count, generator=generator).tolist()


class DenoisingTrainer(OnlineTrainer):
    """Fits samples at random noise levels, as pretraining does, each counting for its reward.

    An algorithm adds `rollout`, `loss` and, in its config, `num_train_steps`: the noise levels of a sample.
    """

    @cached_property
    def process(self) -> Process:
        """The base's own noising."""
        return self.policy.process()

    def loss(
        self, x0_BCHW: Tensor, cond: Conditioning, advantage_B: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a batch at one random noise level a sample."""
        raise NotImplementedError

    def noised(self, x0_BCHW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(rows of the noising, the network's time, x_t, training target), at one random noise level a sample."""
        rows_B = process.sample_t(self.process, len(x0_BCHW), generator)
        noise = torch.randn(x0_BCHW.shape, generator=generator).to(x0_BCHW.device)
        x_t, target = process.noise(self.process, rows_B, x0_BCHW, noise)
        return rows_B, self.process.time[rows_B].to(x_t.device), x_t, target

    def update(self, samples: Samples, advantage_B: Tensor) -> dict[str, float]:
        """All optimizer steps of the iteration; returns mean metrics."""
        config = self.config
        advantages = advantage_B.split(config.per_device_batch_size)
        self.begin_updates(len(samples.latents) // config.num_updates * config.num_train_steps)
        rank = self.accelerator.process_index
        generator = torch.Generator().manual_seed((self.iteration_seed() * 1009 + rank) * 2 + 1)
        collected: list[dict[str, Tensor]] = []
        for b in self.batch_order(len(samples.latents)):
            for _ in range(config.num_train_steps):
                with self.accelerator.accumulate(self.policy.wrapped):
                    loss, metrics = self.loss(samples.latents[b], samples.conds[b], advantages[b], generator)
                    self.backward(loss, metrics)
                collected.append(metrics)
        return self.mean_metrics(collected)


def start(config_type: type[OnlineConfig], trainer_type: type[OnlineTrainer], build: Callable[..., RewardMix]) -> None:
    """The command line of an online trainer; `build` is `rewards.build`, which entry points alone may call."""
    config, accelerator = common.begin(config_type)
    device = str(accelerator.device)
    reward = build(config.reward, config.reward_weights, device=device) if config.reward else None
    held_out = build(config.held_out_reward, device=device) if config.held_out_reward else None
    prompts, eval_prompts = common.load_prompts(config)
    trainer_type(config, reward, prompts, eval_prompts, accelerator, held_out).train()
