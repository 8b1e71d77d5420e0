"""The loop of every trainer: iterate, log, evaluate, save, stop.

An algorithm adds `iteration`. An interruption stops the loop after a checkpoint.

Legend: B batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from rlg.diffusion import sampling
from rlg.diffusion.conditioning import Predictor
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.distributed import Interruption
from rlg.guidance.guided import with_cfg
from rlg.io.run_folder import checkpoint_at
from rlg.models.fingerprint import Record
from rlg.models.loading import DTYPES
from rlg.models.policy import Policy
from rlg.prompts import columns, spread
from trainers.checkpoints import checkpoint, checkpoint_folder, engines, provenance
from trainers.checkpoints.checkpoint import Ema, TrainState
from trainers.checkpoints.nonfinite import SKIPPED, Skips, finite_mean
from trainers.core.config import TrainConfig
from trainers.core.log import Log
from trainers.core.run_folder import run_folder
from trainers.core.setup import Given, load_prompts, load_rewards, named, prepare_policy, round_products
from trainers.core.start import begin
from trainers.core.zero_gradients import ZeroGradients, live


class Trainer:
    """The loop around `iteration`, with a policy, its optimizer and its average."""

    shown: tuple[str, ...] = ("loss",)  # metrics on the progress bar
    copies: tuple[str, ...] = ()  # names of frozen copies of the LoRA, which checkpoints hold, too
    maxima: tuple[str, ...] = ()  # metrics that are reduced by their maximum; others by their mean

    def __init__(self, config: TrainConfig, given: Given, accelerator: Accelerator | None = None):
        """Load inputs that are not given, and set all up.

        The config names them. accelerator: an existing one; the run's folder is then not checked before `train`.
        Raises ValueError for inputs that are missing or do not fit, and as `start.begin`.
        """
        self.config = config = named(config, given)
        config.check_inputs(given.unnamed)
        self.accelerator = accelerator or begin(config)
        self.counts: dict[str, int] = config.derived(self.accelerator.num_processes)
        self.load(given)
        policy, optimizer, copies = prepare_policy(config, self.accelerator, self.copies, given.policy)
        ema = self._ema(policy)
        self.state = TrainState(policy, optimizer, ema, copies)
        self.skips = Skips(self.accelerator, config.folder, config.max_skipped)
        self.policy = policy
        self.shape = policy.latent_shape(config.resolution)
        self.negative = policy.encode([""])
        self.tuned_with_cfg: Predictor = with_cfg(policy.predict, self.negative, config.cfg)
        self.base_with_cfg: Predictor = with_cfg(policy.reference, self.negative, config.cfg)
        self.zeros = ZeroGradients(self.accelerator, DTYPES[config.dtype])
        policy.watch = self.zeros.watch
        self.set_up()

    def load(self, given: Given) -> None:
        """Load rewards and prompts, before the policy.

        Raises ValueError for a prompt that a reward cannot score.
        """
        self.reward, self.held_out = load_rewards(self.config, given, self.accelerator.device)
        self.prompts, self.eval_prompts = load_prompts(self.config, given)
        chosen = spread(self.eval_prompts, self.config.eval_num_prompts) if self.config.eval_steps else ()
        for mix in filter(None, (self.reward, self.held_out)):
            mix.check(*columns([self.eval_prompts[i] for i in chosen]))

    def set_up(self) -> None:
        """Add what an algorithm needs besides the policy.

        Raises ValueError for settings that do not fit the model.
        """

    def _ema(self, policy: Policy) -> Ema | None:
        config = self.config
        if not config.ema_decay:
            return None
        return Ema(policy.trainable(), config.ema_decay, config.ema_every, config.ema_repeats)

    def iteration(self, log: Log | None = None) -> dict[str, float]:
        """Take one round of data and its updates; return metrics.

        It advances the step counter.
        """
        raise NotImplementedError

    def sampler(self, steps: int) -> Schedule:
        """The reverse process of so many steps that makes training samples."""
        return self.schedule(steps, "ode", 0.0)

    def evaluation_schedule(self) -> Schedule:
        """The reverse process that makes held-out images."""
        steps = self.config.eval_num_steps or self.config.steps
        return self.schedule(steps, "ode", 0.0) if self.config.eval_kernel == "ode" else self.sampler(steps)

    def schedule(self, steps: int, kernel: str, level: float, window: tuple[int, int] | None = None) -> Schedule:
        """A reverse process of the policy, for images of the run's size."""
        return self.policy.schedule(steps, kernel, level, window, resolution=self.config.resolution)

    def record(self) -> Record:
        """Digests and versions of what the run is made of."""
        return provenance.record(self.config, self.accelerator, {"eval_prompts": self.eval_prompts})

    def train(self) -> Path:
        """Train until `max_steps` or an interruption; return the last checkpoint.

        There is always one.
        """
        config = self.config
        round_products(config, self.accelerator)
        with run_folder(config, self.accelerator):
            self.state.record = self.record()
            if config.resume:
                checkpoint.resume(config, self.accelerator, self.state)
                self.skips.restore(self.state.counters)
                if self.state.step:
                    self.zeros.skip()
            with checkpoint_folder.explaining(config.folder), Log(config, self.accelerator) as log:
                self._loop(log)
        return checkpoint_at(config.folder, self.state.step)

    def _loop(self, log: Log) -> None:
        config, state, accelerator = self.config, self.state, self.accelerator
        saved = state.step if config.resume else None
        if config.eval_steps and state.step == 0:
            log.metrics(0, self.evaluate())
        bar = tqdm(
            total=config.max_steps, initial=state.step, desc=config.name, disable=not accelerator.is_main_process
        )
        with bar, Interruption() as interruption:
            while state.step < config.max_steps and not interruption.agreed():
                metrics = self.iteration(log) | {SKIPPED: self.skips.total}
                metrics |= self.zeros.report()
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
            print(checkpoint_at(config.folder, state.step))
        if state.step >= config.max_steps:
            log.publish(config, checkpoint_at(config.folder, state.step))

    def begin_updates(self, passes: int) -> None:
        """Begin updates whose optimizer step takes `passes` calls of `backward`."""
        self.accelerator.gradient_accumulation_steps = passes
        self.accelerator.step = 0  # accelerate counts over its whole life, and an update must begin with the iteration
        warm = min(1.0, (self.state.step + 1) / (self.config.warmup_steps + 1))
        for group in self.state.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * warm

    def backward(self, loss: Tensor, metrics: dict[str, Tensor]) -> None:
        """Accumulate a loss's gradient; take the optimizer step when due.

        It adds grad_norm to the metrics. All processes skip a step if a loss in it or its gradient is not finite on
        one. Call it within `accelerator.accumulate(policy.wrapped)`, as the forward pass. Raises ValueError after
        `max_skipped` skips in a row.
        """
        self.skips.watch(loss)
        self.accelerator.backward(engines.share(self.accelerator, loss))
        skipped = False
        if self.accelerator.sync_gradients:
            self._close_zeros()
            engines.average_gradients(self.accelerator, self.policy.trainable())
            norm = self.accelerator.clip_grad_norm_(self.policy.trainable(), self.config.max_grad_norm)
            metrics["grad_norm"] = torch.as_tensor(norm, device=self.accelerator.device).detach()
            skipped = self.skips.must_skip(norm)
            if skipped:
                self.state.optimizer.zero_grad()  # a step without gradients changes nothing, moments included
        self.state.optimizer.step()
        self.state.optimizer.zero_grad()
        if self.accelerator.sync_gradients and self.state.ema and not skipped:
            self.state.ema.update()

    def _close_zeros(self) -> None:
        """Count the zeros in the gradient of the run's first update."""
        if self.zeros.waiting:
            parameters = self.policy.trainable()
            # DeepSpeed has made the step by now, and freed the gradient
            visible = not engines.is_deepspeed(self.accelerator)
            self.zeros.close(live(self.policy.network, parameters) if visible else ())

    def mean_metrics(self, rows: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Means over rows and processes of the finite values.

        A metric without a finite value has no mean.
        """
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
        """Mean rewards on held-out prompts, one image each.

        The images are those of the moving average, if there is one. All processes make the same number of images; the
        last one is repeated where they do not divide. A forward pass may be a collective operation, and one process
        would wait for ever in an extra one.
        """
        config, accelerator = self.config, self.accelerator
        schedule = self.evaluation_schedule()
        chosen = spread(self.eval_prompts, config.eval_num_prompts)
        share = -(-len(chosen) // accelerator.num_processes)
        places = range(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        local = [chosen[min(place, len(chosen) - 1)] for place in places]
        batches = [local[i : i + config.batch_size] for i in range(0, share, config.batch_size)]
        silent = None if accelerator.is_main_process else True  # None: shown only on a terminal
        shown = tqdm(batches, desc="held-out images", unit="batch", leave=False, disable=silent)
        with self.state.averaged():
            parts = [self._evaluate_batch(schedule, batch) for batch in shown]
        columns = {name: torch.cat([part[name] for part in parts]).to(accelerator.device) for name in parts[0]}
        means = {n: float(finite_mean(accelerator.gather(c)[: len(chosen)])) for n, c in columns.items()}
        return {f"eval/{name}": mean for name, mean in means.items() if math.isfinite(mean)}

    def _evaluate_batch(self, schedule: Schedule, ids: Sequence[int]) -> dict[str, Tensor]:
        prompts = [self.eval_prompts[i] for i in ids]
        texts, metadata = columns(prompts)
        noise = SampleNoise([SampleId(self.config.seed, i, 0) for i in ids], self.shape, self.policy.device)
        with self.accelerator.autocast():
            latents = sampling.sample(self.tuned_with_cfg, schedule, self.policy.encode(texts), noise)
        images = self.policy.decode(latents, self.config.batch_size)
        mixes = filter(None, (self.reward, self.held_out))
        return {name: part for mix in mixes for name, part in mix(images, texts, metadata).parts.items()}
