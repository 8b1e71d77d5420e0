"""GRPO for diffusion and flow models, one trainer for all families.

Flow-GRPO (arXiv 2505.05470), DanceGRPO (arXiv 2505.07818), DDPO (arXiv 2305.13301) on DDIM kernels.

    J = E[ 1/S sum_i min(rho_i A, clip(rho_i, 1 - epsilon, 1 + epsilon) A) ] - beta KL(pi_theta || pi_ref)
    rho_i = exp(log pi_theta(x_{i+1} | x_i) - log pi_old(x_{i+1} | x_i)),   A = (R - mean_group) / std

Log-probabilities are means over latent dimensions (every published epsilon, 1e-4 or 1e-5, presumes that), the loss is
taken per denoising step, and gradients accumulate over steps. KL, with gradient, to the model with its adapter off:

    kl_convention "gaussian"   the true KL of the two kernels, |mean - mean_ref|^2 / (2 std^2)
    kl_convention "flow_grpo"  without dt, |mean - mean_ref|^2 / (2 std^2 / dt): Flow-GRPO's published beta is in it

Deviations from the public code
1. Samples are shuffled before the rollout, not after it, and a training minibatch is a rollout batch: the ratio is
   exactly 1 before the first update, also where kernels are not batch-invariant.
2. `num_train_steps` trains on a random subset of the stochastic steps, the same for the whole batch.
3. Groups are keyed by the prompt's index in its data set, not by its text.
4. Prompts, noise and the window depend on (seed, iteration) alone, so that resuming, and any number of processes,
   give the same rollouts.

    accelerate launch train_grpo.py --config configs/tiny/grpo_sd3_compressibility.yaml
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from rewards import RewardMix
from rlg import process, sampling
from rlg.backbones import Conditioning
from rlg.guidance import Predictor, with_cfg
from rlg.process import Schedule
from rlg.prompts import Prompt, spread
from rlg.sampling import SampleId, SampleNoise, Trajectory
from trainers import common
from trainers.common import TrainConfig, TrainState

SCALES = ("group", "batch", "none")
KL_CONVENTIONS = ("gaussian", "flow_grpo")
RATIOS = ("ppo", "guard")
_MAXIMA = ("ratio_max",)  # metrics whose largest value counts; of the others it is the mean


@dataclass(kw_only=True)
class GRPOConfig(TrainConfig):
    """Options of GRPO; the defaults are Flow-GRPO's."""

    num_prompts: int = field(default=48, metadata={"help": "prompts an iteration, over all processes"})
    num_generations: int = field(default=24, metadata={"help": "images a prompt: the group"})
    per_device_batch_size: int = field(default=8, metadata={"help": "images a batch, in rollout and in training"})
    num_updates: int = field(default=1, metadata={"help": "optimizer steps for one pass over an iteration's images"})
    num_iterations: int = field(default=1, metadata={"help": "passes over an iteration's images (inner epochs)"})
    num_steps: int = field(default=10, metadata={"help": "denoising steps"})
    kernel: str = field(default="sde", metadata={"help": "sde (flow SDE, or DDIM) or cps"})
    noise_level: float = field(default=0.7, metadata={"help": "of the kernel; eta for DDIM"})
    window_size: int = field(default=0, metadata={"help": "stochastic steps, in one random window; 0: all steps"})
    window_end: int | None = field(default=None, metadata={"help": "windows lie before this step (default: half)"})
    num_train_steps: int | None = field(
        default=None, metadata={"help": "random stochastic steps trained (default: all)"}
    )
    skip_last_step: bool = field(default=True, metadata={"help": "never train on the last step (Flow-GRPO's 0.99)"})
    same_initial_noise: bool = field(default=False, metadata={"help": "a group starts from one noise (DanceGRPO)"})
    guidance_scale: float = field(default=4.5, metadata={"help": "classifier-free guidance, in rollout and training"})
    epsilon: float = field(default=1e-4, metadata={"help": "clip range of the ratio"})
    beta: float = field(default=0.0, metadata={"help": "KL coefficient"})
    kl_convention: str = field(default="gaussian", metadata={"help": "gaussian (true KL) or flow_grpo (without dt)"})
    scale_rewards: str = field(
        default="batch", metadata={"help": "divide advantages by the std of: group, batch, none"}
    )
    reward_aggregation: str = field(default="sum", metadata={"help": "mix rewards as their sum, or as advantages"})
    advantage_clip: float = field(default=5.0, metadata={"help": "advantages are clipped to this"})
    ratio: str = field(default="ppo", metadata={"help": "ppo, or guard (GRPO-Guard's normalised ratio)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (
            ("kernel", ("sde", "cps")),
            ("scale_rewards", SCALES),
            ("kl_convention", KL_CONVENTIONS),
            ("ratio", RATIOS),
            ("reward_aggregation", ("sum", "advantage")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if self.num_generations < 2:
            raise ValueError(f"a group needs at least 2 images, got num_generations {self.num_generations}")
        common.require_positive(self, "num_prompts", "per_device_batch_size", "num_updates", "num_iterations")
        common.require_positive(self, "num_steps", "noise_level", "num_train_steps", "window_end", "epsilon")
        common.require_positive(self, "advantage_clip")
        if self.beta < 0 or self.window_size < 0:
            raise ValueError(f"beta and window_size must not be negative, got {self.beta} and {self.window_size}")
        if self.window_size and not self.window_size <= self.last_window_step <= self.trained_steps:
            raise ValueError(
                f"a window of {self.window_size} steps must end by window_end = {self.last_window_step}, and that by "
                f"the last step that is trained, {self.trained_steps} of {self.num_steps}"
            )

    @property
    def last_window_step(self) -> int:
        """Windows lie before this step; the first half is Flow-GRPO-Fast's choice."""
        return self.window_end or self.num_steps // 2

    @property
    def trained_steps(self) -> int:
        """Steps before this one may be trained."""
        return self.num_steps - self.skip_last_step

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
            "updates_per_iteration": self.num_updates * self.num_iterations,
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
    centred_B = reward_B - mean_G[index_B]
    if scale == "group":
        variance_G = torch.zeros_like(count_G).index_add_(0, index_B, centred_B**2) / count_G
        centred_B = centred_B / (variance_G.sqrt()[index_B] + epsilon)
    elif scale == "batch":
        centred_B = centred_B / (reward_B.std(unbiased=False) + epsilon)
    return centred_B.clamp(-clip, clip)


def grpo_loss(
    log_ratio_B: Tensor, advantage_B: Tensor, epsilon: float, kl_B: Tensor | None = None, beta: float = 0.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy-gradient loss of one denoising step, and its metrics.

    log_ratio_B: log pi_theta - log pi_old, (B,), with gradient. kl_B: KL to the reference, (B,), with gradient.
    """
    ratio_B = log_ratio_B.exp()
    clipped_B = ratio_B.clamp(1 - epsilon, 1 + epsilon)
    policy_loss = torch.maximum(-advantage_B * ratio_B, -advantage_B * clipped_B).mean()
    loss = policy_loss if kl_B is None else policy_loss + beta * kl_B.mean()
    metrics = {
        "loss": loss,
        "policy_loss": policy_loss,
        "approx_kl": 0.5 * (log_ratio_B**2).mean(),
        "clip_fraction": ((ratio_B - 1).abs() > epsilon).float().mean(),
        "ratio_max": ratio_B.max(),
    }
    if kl_B is not None:
        metrics["kl"] = kl_B.mean()
    return loss, {name: value.detach() for name, value in metrics.items()}


def guard_log_ratio(log_ratio_B: Tensor, mean_BCHW: Tensor, old_mean_BCHW: Tensor, std: float) -> Tensor:
    """GRPO-Guard (arXiv 2510.22319): the log-ratio without its negative bias, and with equal scale in every step.

    The mean of log rho under the old policy is -|mean - old_mean|^2 / (2 std^2): it is added back, and the result is
    multiplied by std.
    """
    bias_B = ((mean_BCHW - old_mean_BCHW) ** 2).flatten(1).mean(dim=1) / (2 * std**2)
    return (log_ratio_B + bias_B) * std


@dataclass(frozen=True)
class Rollout:
    """One process's share of an iteration's images, as batches that training goes through again."""

    batches: list[Trajectory]
    conds: list[Conditioning]
    images_B3HW: Tensor
    prompt_B: Tensor  # index of each sample's prompt
    schedule: Schedule
    train_steps: list[int]  # the denoising steps to train on


class GRPOTrainer:
    """Rollout, reward, advantages, update; see the module's docstring."""

    def __init__(
        self,
        config: GRPOConfig,
        reward: RewardMix,
        prompts: Sequence[Prompt],
        eval_prompts: Sequence[Prompt] = (),
        accelerator: Accelerator | None = None,
        held_out: RewardMix | None = None,
    ):
        self.config, self.reward, self.held_out = config, reward, held_out
        self.prompts, self.eval_prompts = list(prompts), list(eval_prompts)
        self.accelerator = accelerator or common.make_accelerator(config)
        self.counts = config.derived(self.accelerator.num_processes)
        if config.num_prompts > len(self.prompts):
            raise ValueError(
                f"num_prompts = {config.num_prompts}, but {config.prompts} holds {len(self.prompts)} prompts"
            )
        policy, optimizer = common.prepare_policy(config, self.accelerator)
        ema = common.Ema(policy.trainable(), config.ema_decay, config.ema_every) if config.ema_decay else None
        self.state = TrainState(policy, optimizer, ema)
        self.policy = policy
        self.shape = policy.latent_shape(config.resolution)
        _, steps = self._schedule(torch.Generator())
        if len(steps) < (config.num_train_steps or 1):
            raise ValueError(
                f"num_train_steps = {config.num_train_steps or 1}, but {len(steps)} steps are stochastic and trained"
            )
        self.negative = policy.encode([""])
        self.tuned: Predictor = with_cfg(policy.predict, self.negative, config.guidance_scale)
        self.reference: Predictor = with_cfg(policy.reference, self.negative, config.guidance_scale)

    def train(self) -> None:
        """Run until `max_steps`, or until interrupted; always leaves a checkpoint behind."""
        config, state, accelerator = self.config, self.state, self.accelerator
        common.prepare_folder(config, accelerator)
        if config.resume:
            common.resume(config, accelerator, state)
        saved = state.step if config.resume else None
        log = common.Log(config, accelerator)
        if config.eval_steps and state.step == 0:
            log.metrics(0, self.evaluate())
        bar = tqdm(
            total=config.max_steps, initial=state.step, desc=config.name, disable=not accelerator.is_main_process
        )
        with bar, common.Interruption(accelerator) as interruption:
            while state.step < config.max_steps and not interruption.agreed():
                metrics = self.iteration(log)
                if config.eval_steps and state.step % config.eval_steps == 0:
                    metrics |= self.evaluate()
                log.metrics(state.step, metrics)
                shown = ("reward", "kl", "clip_fraction", "seconds_per_image")
                bar.set_postfix({k: f"{metrics[k]:.4g}" for k in shown if k in metrics})
                bar.update()
                if state.step % config.save_steps == 0:
                    common.save_checkpoint(config, accelerator, state)
                    saved = state.step
            if saved != state.step:
                common.save_checkpoint(config, accelerator, state)
        if accelerator.is_main_process:
            print(config.folder / f"checkpoint-{state.step}")
        accelerator.end_training()

    def iteration(self, log: common.Log | None = None) -> dict[str, float]:
        """One rollout and its updates; advances the step counter."""
        started = time.perf_counter()
        roll = self.rollout()
        sampled = time.perf_counter()
        advantage_B, metrics = self.score(roll)
        scored = time.perf_counter()
        metrics |= self.update(roll, advantage_B)
        finished = time.perf_counter()
        self.state.step += 1
        images = self.counts["images_per_iteration"]
        counters = self.state.counters
        counters["images"] = counters.get("images", 0) + images
        counters["seconds"] = counters.get("seconds", 0.0) + finished - started
        if log and self.config.sample_steps and self.state.step % self.config.sample_steps == 0:
            log.images(self.state.step, roll.images_B3HW[:32], [self.prompts[i].text for i in roll.prompt_B[:32]])
        return metrics | {
            "images": counters["images"],
            "seconds": counters["seconds"],
            "seconds_per_image": (finished - started) / images,
            "seconds_rollout": sampled - started,
            "seconds_reward": scored - sampled,
            "seconds_update": finished - scored,
        }

    def rollout(self) -> Rollout:
        """Sample this process's share of the iteration; what it is depends on (seed, iteration) alone."""
        config, step = self.config, self.state.step
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        schedule, train_steps = self._schedule(generator)
        chosen = torch.randperm(len(self.prompts), generator=generator)[: config.num_prompts]
        pairs = [(int(p), k) for p in chosen for k in range(config.num_generations)]
        order = torch.randperm(len(pairs), generator=generator)
        share = order.chunk(self.accelerator.num_processes)[self.accelerator.process_index]
        local = [pairs[i] for i in share.tolist()]
        batches, conds = [], []
        for start in range(0, len(local), config.per_device_batch_size):
            part = local[start : start + config.per_device_batch_size]
            cond = self._conditioning([p for p, _ in part])
            ids = [SampleId(config.seed * 1_000_003 + step, p, k) for p, k in part]
            noise = SampleNoise(ids, self.shape, self.policy.device, config.same_initial_noise)
            with self.accelerator.autocast():
                batches.append(sampling.rollout(self.tuned, schedule, cond, noise, keep_means=config.ratio == "guard"))
            conds.append(cond)
        images = torch.cat([self.policy.decode(b.x0, config.per_device_batch_size) for b in batches])
        return Rollout(batches, conds, images, torch.tensor([p for p, _ in local]), schedule, train_steps)

    def _schedule(self, generator: torch.Generator) -> tuple[Schedule, list[int]]:
        config = self.config
        window = None
        if config.window_size:
            latest = config.last_window_step - config.window_size
            first = int(torch.randint(latest + 1, (1,), generator=generator))
            window = (first, first + config.window_size)
        schedule = self.policy.schedule(config.num_steps, config.kernel, config.noise_level, window)
        steps = [i for i in schedule.stochastic_steps() if i < config.trained_steps]
        if config.num_train_steps:
            picked = torch.randperm(len(steps), generator=generator)[: config.num_train_steps].tolist()
            steps = sorted(steps[i] for i in picked)
        return schedule, steps

    def _conditioning(self, prompt_ids: Sequence[int]) -> Conditioning:
        unique = list(dict.fromkeys(prompt_ids))
        encoded = self.policy.encode([self.prompts[i].text for i in unique])
        return encoded[torch.tensor([unique.index(i) for i in prompt_ids], device=self.policy.device)]

    def score(self, roll: Rollout) -> tuple[Tensor, dict[str, float]]:
        """(advantages of this process's samples, metrics over all processes)."""
        config, accelerator = self.config, self.accelerator
        prompts = [self.prompts[i] for i in roll.prompt_B.tolist()]
        scores = self.reward(roll.images_B3HW, [p.text for p in prompts], [p.metadata for p in prompts])
        group_B = accelerator.gather(roll.prompt_B.to(accelerator.device)).cpu()
        total_B = accelerator.gather(scores.total_B.to(accelerator.device)).cpu().double()
        parts = {n: accelerator.gather(s.to(accelerator.device)).cpu().double() for n, s in scores.parts.items()}
        if config.reward_aggregation == "advantage":  # MixGRPO: each reward normalised on its own, then mixed
            advantage_B = sum(
                w * group_advantages(parts[n], group_B, config.scale_rewards, config.advantage_clip)
                for n, w in zip(self.reward.names, self.reward.weights, strict=True)
            )
        else:
            advantage_B = group_advantages(total_B, group_B, config.scale_rewards, config.advantage_clip)
        spread_G = [float(total_B[group_B == g].std(unbiased=False)) for g in group_B.unique()]
        metrics = {"reward": float(total_B.mean()), "reward_std": float(total_B.std(unbiased=False))}
        metrics |= {f"reward/{name}": float(part.mean()) for name, part in parts.items()}
        metrics["group_std"] = sum(spread_G) / len(spread_G)
        metrics["zero_std_ratio"] = sum(s < 1e-8 for s in spread_G) / len(spread_G)
        local = len(roll.prompt_B)
        start = accelerator.process_index * local
        return advantage_B[start : start + local].float().to(accelerator.device), metrics

    def update(self, roll: Rollout, advantage_B: Tensor) -> dict[str, float]:
        """All optimizer steps of the iteration; returns mean metrics."""
        config, accelerator = self.config, self.accelerator
        advantages = advantage_B.split(config.per_device_batch_size)
        per_update = len(roll.batches) // config.num_updates
        accelerator.gradient_accumulation_steps = per_update * len(roll.train_steps)
        accelerator.step = 0  # accelerate counts over its whole life: an update must begin with the iteration
        collected: list[dict[str, Tensor]] = []
        for epoch in range(config.num_iterations):
            for b in self._batch_order(len(roll.batches), epoch):
                for i in roll.train_steps:
                    with accelerator.accumulate(self.policy.wrapped):
                        loss, metrics = self.loss(roll, b, i, advantages[b])
                        accelerator.backward(loss)
                        if accelerator.sync_gradients:
                            norm = accelerator.clip_grad_norm_(self.policy.trainable(), config.max_grad_norm)
                            metrics["grad_norm"] = torch.as_tensor(norm).detach()
                        self.state.optimizer.step()
                        self.state.optimizer.zero_grad()
                        if accelerator.sync_gradients and self.state.ema:
                            self.state.ema.update()
                    collected.append(metrics)
        means = self._mean_metrics(collected)
        for name in ("loss", "grad_norm"):  # a gradient scaler (fp16) skips steps whose gradients overflow
            if not math.isfinite(means[name]) and (name == "loss" or not accelerator.scaler):
                raise ValueError(f"{name} is {means[name]} in iteration {self.state.step}; lower the learning rate")
        return means

    def _batch_order(self, count: int, epoch: int) -> Iterator[int]:
        seed = self.config.seed * 1_000_003 + self.state.step
        generator = torch.Generator().manual_seed(seed + 7919 * (epoch + 1))
        return iter(torch.randperm(count, generator=generator).tolist())

    def loss(self, roll: Rollout, b: int, i: int, advantage_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of batch b at denoising step i."""
        config, batch, schedule = self.config, roll.batches[b], roll.schedule
        x, x_next = batch.x_TBCHW[i], batch.x_TBCHW[i + 1]
        t_B = sampling.times(schedule, i, len(x))
        with self.accelerator.autocast():
            out = self.tuned(x, t_B, roll.conds[b])
        log_ratio_B = process.log_prob(schedule, i, x, out, x_next) - batch.logp_TB[i]
        if config.ratio == "guard":
            mean = process.mean(schedule, i, x, out)
            log_ratio_B = guard_log_ratio(log_ratio_B, mean, batch.mean_TBCHW[i], float(schedule.std[i]))
            advantage_B = advantage_B / schedule.dt[i]  # the policy loss over dt, and not the KL
        kl_B = None
        if config.beta:
            with torch.no_grad(), self.accelerator.autocast():
                reference = self.reference(x, t_B, roll.conds[b])
            kl_B = process.kl(schedule, i, out, reference, per_time=config.kl_convention == "flow_grpo")
        return grpo_loss(log_ratio_B, advantage_B, config.epsilon, kl_B, config.beta)

    def _mean_metrics(self, rows: Sequence[dict[str, Tensor]]) -> dict[str, float]:
        names = sorted({name for row in rows for name in row})
        columns = [torch.stack([row[n] for row in rows if n in row]).float() for n in names]
        local = torch.stack([c.max() if n in _MAXIMA else c.mean() for n, c in zip(names, columns, strict=True)])
        values = self.accelerator.gather(local[None].to(self.accelerator.device))  # (process, metric)
        reduced = [v.max() if n in _MAXIMA else v.mean() for n, v in zip(names, values.T, strict=True)]
        return dict(zip(names, map(float, reduced), strict=True))

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean rewards on held-out prompts, one image each, with the moving average if there is one.

        All processes make the same number of images, the last one again where they do not divide: a forward pass may
        be a collective operation, and one more of it on one process would wait forever.
        """
        config, accelerator = self.config, self.accelerator
        schedule = self.policy.schedule(config.num_steps, config.kernel, config.noise_level)
        chosen = spread(self.eval_prompts, config.eval_num_prompts)
        share = -(-len(chosen) // accelerator.num_processes)
        places = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        local = [chosen[min(place, len(chosen) - 1)] for place in places]
        batches = [local[i : i + config.per_device_batch_size] for i in range(0, share, config.per_device_batch_size)]
        with self.state.averaged():
            parts = [self._evaluate_batch(schedule, batch) for batch in batches]
        columns = {name: torch.cat([part[name] for part in parts]).to(accelerator.device) for name in parts[0]}
        return {f"eval/{n}": float(accelerator.gather(c)[: len(chosen)].mean()) for n, c in columns.items()}

    def _evaluate_batch(self, schedule: Schedule, ids: Sequence[int]) -> dict[str, Tensor]:
        prompts = [self.eval_prompts[i] for i in ids]
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        noise = SampleNoise([SampleId(self.config.seed, i, 0) for i in ids], self.shape, self.policy.device)
        with self.accelerator.autocast():
            latents = sampling.sample(self.tuned, schedule, self.policy.encode(texts), noise)
        images = self.policy.decode(latents, self.config.per_device_batch_size)
        mixes = filter(None, (self.reward, self.held_out))
        return {name: part for mix in mixes for name, part in mix(images, texts, metadata).parts.items()}
