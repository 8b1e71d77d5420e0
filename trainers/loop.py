"""The loop of every trainer: iterate, log, evaluate, save, stop when asked to. An algorithm adds `iteration`.

Legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from rewards import RewardMix
from rlg import sampling
from rlg.guidance import Predictor, with_cfg
from rlg.policy import Policy
from rlg.process import Schedule
from rlg.prompts import Prompt, spread
from rlg.sampling import SampleId, SampleNoise
from rlg.together import Interruption
from trainers import checkpoint, common, engines, saving
from trainers.checkpoint import Ema, TrainState
from trainers.common import TrainConfig
from trainers.skips import SKIPPED, Skips, finite_mean


class Trainer:
    """A policy, its optimizer and its average, and the loop around `iteration`."""

    shown: tuple[str, ...] = ("loss",)  # metrics on the progress bar
    copies: tuple[str, ...] = ()  # names of frozen copies of the LoRA, which checkpoints hold too
    maxima: tuple[str, ...] = ()  # metrics whose largest value counts; of the others it is the mean

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator | None = None,
        reward: RewardMix | None = None,
        held_out: RewardMix | None = None,
        eval_prompts: Sequence[Prompt] = (),
    ):
        self.config = config
        self.reward, self.held_out = (mix and replace(mix, lenient=True) for mix in (reward, held_out))
        self.eval_prompts = list(eval_prompts)
        self.accelerator = accelerator or common.make_accelerator(config)
        self.counts: dict[str, int] = config.derived(self.accelerator.num_processes)
        policy, optimizer, copies = self.prepare()
        ema = Ema(policy.trainable(), config.ema_decay, config.ema_every) if config.ema_decay else None
        self.state = TrainState(policy, optimizer, ema, copies)
        self.skips = Skips(self.accelerator, config.folder, config.max_skipped)
        self.policy = policy
        self.shape = policy.latent_shape(config.resolution)
        self.negative = policy.encode([""])
        self.tuned: Predictor = with_cfg(policy.predict, self.negative, config.guidance_scale)
        self.reference: Predictor = with_cfg(policy.reference, self.negative, config.guidance_scale)

    def prepare(self) -> tuple[Policy, Optimizer, dict[str, list[nn.Parameter]]]:
        """As `common.prepare_policy`, which a benchmark of a policy made elsewhere replaces."""
        return common.prepare_policy(self.config, self.accelerator, self.copies)

    def iteration(self, log: common.Log | None = None) -> dict[str, float]:
        """One round of data and its updates; returns metrics and advances the step counter."""
        raise NotImplementedError

    def evaluation_schedule(self) -> Schedule:
        """The reverse process that held-out images are sampled with."""
        return self.policy.schedule(self.config.num_steps, "ode", 0.0)

    def train(self) -> None:
        """Run until `max_steps`, or until interrupted; always leaves a checkpoint behind."""
        config = self.config
        with common.run_folder(config, self.accelerator):
            if config.resume:
                checkpoint.resume(config, self.accelerator, self.state)
                self.skips.restore(self.state.counters)
            with saving.explaining(config.folder):
                self._loop()

    def _loop(self) -> None:
        config, state, accelerator = self.config, self.state, self.accelerator
        saved = state.step if config.resume else None
        log = common.Log(config, accelerator)
        if config.eval_steps and state.step == 0:
            log.metrics(0, self.evaluate())
        bar = tqdm(
            total=config.max_steps, initial=state.step, desc=config.name, disable=not accelerator.is_main_process
        )
        with bar, Interruption() as interruption:
            while state.step < config.max_steps and not interruption.agreed():
                metrics = self.iteration(log) | {SKIPPED: self.skips.total}
                state.counters |= self.skips.counters()
                if config.eval_steps and state.step % config.eval_steps == 0:
                    metrics |= self.evaluate()
                log.metrics(state.step, metrics)
                bar.set_postfix({k: f"{metrics[k]:.4g}" for k in self.shown if k in metrics})
                bar.update()
                if state.step % config.save_steps == 0:
                    checkpoint.save_checkpoint(config, accelerator, state)
                    saved = state.step
            if saved != state.step:
                checkpoint.save_checkpoint(config, accelerator, state)
        if accelerator.is_main_process:
            print(config.folder / f"checkpoint-{state.step}")
        if state.step >= config.max_steps:
            log.publish(config, config.folder / f"checkpoint-{state.step}")
        accelerator.end_training()

    def begin_updates(self, passes: int) -> None:
        """From here on, an optimizer step is taken after every `passes` calls of `backward`."""
        self.accelerator.gradient_accumulation_steps = passes
        self.accelerator.step = 0  # accelerate counts over its whole life: an update must begin with the iteration
        warm = min(1.0, (self.state.step + 1) / (self.config.warmup_steps + 1))
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * warm

    def backward(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Accumulate a loss's gradient, and take the optimizer step when it is due; adds grad_norm to the metrics.

        A step is skipped on all processes if a loss in it or its gradient is not finite on one. Raises ValueError
        after `max_skipped` of them in a row.
        Call it within `accelerator.accumulate(policy.wrapped)`, as the forward pass.
        """
        self.skips.watch(loss)
        self.accelerator.backward(engines.share(self.accelerator, loss))
        skipped = False
        if self.accelerator.sync_gradients:
            engines.average_gradients(self.accelerator, self.policy.trainable())
            norm = self.accelerator.clip_grad_norm_(self.policy.trainable(), self.config.max_grad_norm)
            metrics["grad_norm"] = torch.as_tensor(norm, device=self.accelerator.device).detach()
            skipped = self.skips.must(norm)
            if skipped:
                self.state.optimizer.zero_grad()  # a step without gradients changes nothing, moments included
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        if self.accelerator.sync_gradients and self.state.ema and not skipped:
            self.state.ema.update()

    def mean_metrics(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Means over rows and processes of what is finite; a metric that never is has no mean."""
        names = sorted({name for row in rows for name in row})
        columns = [torch.stack([row[n] for row in rows if n in row]).float() for n in names]
        local = torch.stack([self._pool(n, c) for n, c in zip(names, columns, strict=True)])
        values = self.accelerator.gather(local[None].to(self.accelerator.device))  # (process, metric)
        means = {n: float(self._pool(n, v)) for n, v in zip(names, values.T, strict=True)}
        return {name: value for name, value in means.items() if math.isfinite(value)}

    def _pool(self, name: str, values: Tensor) -> Tensor:
        finite = values[values.isfinite()]
        return finite.max() if name in self.maxima and len(finite) else finite.mean()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Mean rewards on held-out prompts, one image each, with the moving average if there is one.

        All processes make the same number of images, the last one again where they do not divide: a forward pass may
        be a collective operation, and one more of it on one process would wait forever.
        """
        config, accelerator = self.config, self.accelerator
        schedule = self.evaluation_schedule()
        chosen = spread(self.eval_prompts, config.eval_num_prompts)
        share = -(-len(chosen) // accelerator.num_processes)
        places = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        local = [chosen[min(place, len(chosen) - 1)] for place in places]
        batches = [local[i : i + config.per_device_batch_size] for i in range(0, share, config.per_device_batch_size)]
        silent = None if accelerator.is_main_process else True  # None: unless it is a terminal
        shown = tqdm(batches, desc="held-out images", unit="batch", leave=False, disable=silent)
        with self.state.averaged():
            parts = [self._evaluate_batch(schedule, batch) for batch in shown]
        columns = {name: torch.cat([part[name] for part in parts]).to(accelerator.device) for name in parts[0]}
        means = {n: float(finite_mean(accelerator.gather(c)[: len(chosen)])) for n, c in columns.items()}
        return {f"eval/{name}": mean for name, mean in means.items() if math.isfinite(mean)}

    def _evaluate_batch(self, schedule: Schedule, ids: Sequence[int]) -> dict[str, Tensor]:
        prompts = [self.eval_prompts[i] for i in ids]
        texts, metadata = [p.text for p in prompts], [p.metadata for p in prompts]
        noise = SampleNoise([SampleId(self.config.seed, i, 0) for i in ids], self.shape, self.policy.device)
        with self.accelerator.autocast():
            latents = sampling.sample(self.tuned, schedule, self.policy.encode(texts), noise)
        images = self.policy.decode(latents, self.config.per_device_batch_size)
        mixes = filter(None, (self.reward, self.held_out))
        return {name: part for mix in mixes for name, part in mix(images, texts, metadata).parts.items()}
