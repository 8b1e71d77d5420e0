"""Training of SPO's step-aware preference model on pairs (arXiv 2406.04314).

    L = cross entropy of softmax( score(x0_hat_0, prompt, t), score(x0_hat_1, prompt, t) ) against the label
    x_t = alpha x0 + sigma n,  the same t and n for both images;  x0_hat: the base's one-step estimate, decoded

The base model makes x0_hat in one evaluation, with classifier-free guidance. Labels may be soft. The loss is the
cross entropy less the label's entropy, so that 0 is the best value for a tie, too. With `compare`, a second scorer
shows what the time adds: it has the same size, start and batches, but is time-blind and sees clean images.
accuracy.json and accuracy.png hold the accuracy of both on held-out pairs, by noise level.

Deviations from the paper and the official code
1. Pairs count alike (there: 1 / number of pairs of their prompt), and ties are dropped, as by our preference data.
2. Latents are the mean of the autoencoder's posterior; the learning rate is constant after its warm-up.

    accelerate launch train_spm.py --config configs/tiny/spm_sd3.yaml

Legend: B pairs of a batch, 2B their images, winners first; N held-out pairs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from tqdm import tqdm

from rewards import step_aware
from rewards.step_aware import StepAwareModel
from rlg.diffusion import process
from rlg.diffusion.sampling import SampleId
from rlg.distributed import Interruption, together
from rlg.guidance.guided import with_cfg
from rlg.io.optimizer_state import load_optimizer, save_optimizer
from rlg.io.run_folder import METRICS, TRAINER_STATE, checkpoint_at, state_file
from rlg.models.fingerprint import Record
from rlg.models.policy import Policy
from rlg.stats import Estimate, grouped_mean, paired_difference
from trainers.checkpoints import checkpoint_folder, engines, provenance
from trainers.checkpoints.checkpoint import DAMAGED, read_state, truncate_metrics
from trainers.checkpoints.nonfinite import SKIPPED, Skips, finite_mean
from trainers.core.log import Log
from trainers.core.run_folder import run_folder, write_config
from trainers.core.setup import Given, load_policy, named, round_products
from trainers.core.start import begin
from trainers.core.zero_gradients import ADAPTER, dense_parameters, zero_share
from trainers.data import preference_pairs
from trainers.data.preference_pairs import Batches, PairBatch, Pairs
from trainers.spm_config import SPMConfig

AWARE, BLIND = "step_aware", "time_blind"
REPORT = "accuracy.json"
FIGURE = "accuracy.png"
TINY = "tiny"


def spm_loss(margin_B: Tensor, label_B: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross entropy less the label's entropy, and metrics.

    margin: score of the first image less that of the second, with gradient. label: probability that the first wins.
    """
    best_B = -torch.xlogy(label_B, label_B) - torch.xlogy(1 - label_B, 1 - label_B)
    loss = (-label_B * logsigmoid(margin_B) - (1 - label_B) * logsigmoid(-margin_B) - best_B).mean()
    agrees_B = torch.where(margin_B > 0, label_B, 1 - label_B)
    accuracy = torch.where(margin_B == 0, 0.5, agrees_B).mean()
    return loss, {"loss": loss.detach(), "accuracy": accuracy.detach()}


@dataclass(frozen=True)
class Scorer:
    """A model in training, with its optimizer."""

    name: str
    model: StepAwareModel
    wrapped: nn.Module  # the model as accelerate wrapped it
    optimizer: Any

    @property
    def aware(self) -> bool:
        """Tell whether it gets the time and the base's estimates from noise."""
        return self.name == AWARE

    def margin(self, images_2B3HW: Tensor, captions: Sequence[str], t_B: Tensor) -> Tensor:
        """(B,) scores of the winners less those of the losers.

        The time-blind model is always given time 0.
        """
        t_B = t_B if self.aware else torch.zeros_like(t_B)
        ids = self.model.prompt_ids(captions)
        # One process measures alone, so it calls the bare model.
        network = self.wrapped if self.model.training else self.model
        scores = network(self.model.pixels(images_2B3HW), torch.cat([ids, ids]), torch.cat([t_B, t_B]))
        winner, loser = scores.float().chunk(2)
        return winner - loser


class SPMTrainer:
    """Trainer of both scorers, with the base model that makes their images."""

    def __init__(
        self,
        config: SPMConfig,
        *,
        policy: Policy | None = None,
        data: str | Path | Pairs | None = None,
        accelerator: Accelerator | None = None,
    ):
        """Take what is given; load the rest by the config.

        See `setup.Given` and `loop.Trainer`.
        """
        given = Given(policy=policy, data=data)
        self.config = config = named(config, given)
        config.check_inputs(given.unnamed)
        self.step = 0
        self.record: Record = {}
        self.accelerator = accelerator or begin(config)
        engines.require_plain(self.accelerator, "two models at once")
        self.skips = Skips(self.accelerator, config.folder, config.max_skipped)
        self.policy = load_policy(config, self.accelerator, policy)
        self.process = self.policy.process(config.resolution)
        self.base_with_cfg = with_cfg(self.policy.reference, self.policy.encode([""]), config.cfg)
        pairs = data if isinstance(data, Pairs) else self._pairs(config.data_split, config.streaming)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        size = config.batch_size
        self.batches = self._batches(pairs, size * world, rank, world)
        self.test = None if config.test_split is None else self._batches(self._pairs(config.test_split), size)
        self.scorers = [self._scorer(name) for name in ((AWARE, BLIND) if config.compare else (AWARE,))]

    def _pairs(self, split: str, streaming: bool = False) -> Pairs:
        pairs = preference_pairs.load(
            self.config.data,
            split,
            streaming,
            image_root=self.config.image_root,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        if self.accelerator.is_main_process:
            print(f"{split}: {pairs.counts}")
        return pairs

    def _batches(self, pairs: Pairs, size: int, rank: int = 0, world: int = 1) -> Batches:
        side = self.config.resolution or self.policy.image_size()
        return Batches(pairs, size, side, self.config.seed, rank=rank, world=world)

    def _scorer(self, name: str) -> Scorer:
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if config.clip == TINY:
                tokenizer = self.policy.pipe.tokenizer
                clip = step_aware.tiny_config(tokenizer, config.resolution or self.policy.image_size())
                model = StepAwareModel(clip, tokenizer)
            else:
                model = step_aware.from_clip(config.clip)
        model.train().to(self.accelerator.device)
        if name == BLIND:
            for key, parameter in model.named_parameters():
                parameter.requires_grad_("adaLN" not in key and "t_embedder" not in key)
        optimizer = torch.optim.AdamW(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        wrapped, optimizer = self.accelerator.prepare(model, optimizer)
        return Scorer(name, model, wrapped, optimizer)

    @torch.no_grad()
    def estimates(self, batch: PairBatch, rows_B: Tensor, noise_BCHW: Tensor) -> Tensor:
        """(2B, 3, H, W) estimates of both images by the base model.

        Each pair has its row of the process. The model is evaluated once.
        """
        latents = self.policy.encode_images(torch.cat([batch.winners_B3HW, batch.losers_B3HW]))
        rows, noise = rows_B.repeat(2), noise_BCHW.to(latents.device).repeat(2, 1, 1, 1)
        x_t, _ = process.noise(self.process, rows, latents, noise)
        out = self.base_with_cfg(x_t, self.process.time[rows].to(x_t.device), self.policy.encode(batch.captions * 2))
        return self.policy.decode(process.clean(self.process, rows, x_t, out))

    def iteration(self, batches: Iterator[PairBatch]) -> dict[str, float]:
        """Take one optimizer step.

        Its data depends on (seed, step) alone.
        """
        config, accelerator, started = self.config, self.accelerator, time.perf_counter()
        accelerator.gradient_accumulation_steps, accelerator.step = config.accumulation_steps, 0
        warm = min(1.0, (self.step + 1) / (config.warmup_steps + 1))
        for group in (group for scorer in self.scorers for group in scorer.optimizer.param_groups):
            group["lr"] = config.learning_rate * warm
        seed = (config.seed * 1_000_003 + self.step) * 1009 + accelerator.process_index
        generator = torch.Generator().manual_seed(seed)
        rows: list[dict[str, Tensor]] = []
        for _ in range(config.accumulation_steps):
            rows.append(self._train_on(next(batches), generator))
        self.step += 1
        local = {name: finite_mean(torch.stack([row[name] for row in rows if name in row])) for name in rows[-1]}
        means = {name: float(finite_mean(accelerator.gather(value[None]))) for name, value in local.items()}
        means = {name: value for name, value in means.items() if math.isfinite(value)}
        return means | {"seconds": time.perf_counter() - started}

    def _train_on(self, batch: PairBatch, generator: torch.Generator) -> dict[str, Tensor]:
        rows_B = torch.randint(len(self.process.time), (len(batch),), generator=generator)
        noise = torch.randn(len(batch), *self._latent_shape, generator=generator)
        noisy, clean = self.estimates(batch, rows_B, noise), torch.cat([batch.winners_B3HW, batch.losers_B3HW])
        t_B = self.process.time[rows_B].to(self.accelerator.device)
        metrics = {}
        with self.accelerator.accumulate(*(scorer.wrapped for scorer in self.scorers)):
            for scorer in self.scorers:
                margin_B = scorer.margin(noisy if scorer.aware else clean, batch.captions, t_B)
                loss, row = spm_loss(margin_B, torch.ones_like(margin_B))
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    parameters = [p for p in scorer.wrapped.parameters() if p.requires_grad]
                    norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
                    row["grad_norm"] = torch.as_tensor(norm).detach()
                    if self.step == 0:
                        row[ADAPTER] = zero_share(dense_parameters(scorer.wrapped))
                    if self.skips.must_skip(norm):  # a margin that is not finite makes the norm not finite
                        scorer.optimizer.zero_grad()
                scorer.optimizer.step()
                scorer.optimizer.zero_grad()
                metrics |= {f"{scorer.name}/{name}": value.to(self.accelerator.device) for name, value in row.items()}
        return metrics

    @property
    def _latent_shape(self) -> tuple[int, int, int]:
        return self.policy.latent_shape(self.config.resolution)

    def train(self) -> Path:
        """Train until `max_steps` or an interruption, save, and measure accuracy.

        Returns the last checkpoint.
        """
        config = self.config
        round_products(config, self.accelerator)
        with run_folder(config, self.accelerator):
            self.record = provenance.record(config, self.accelerator, {}, config.data)
            if config.resume:
                self.resume()
            with checkpoint_folder.explaining(config.folder), Log(config, self.accelerator) as log:
                self._loop(log)
        return checkpoint_at(config.folder, self.step)

    def _loop(self, log: Log) -> None:
        config, accelerator, count = self.config, self.accelerator, self.config.accumulation_steps
        batches = self.batches.iterate(self.step * count, config.max_steps * count)
        saved = self.step if config.resume else None
        main = accelerator.is_main_process
        bar = tqdm(total=config.max_steps, initial=self.step, desc=config.name, disable=not main)
        with bar, Interruption() as interruption:
            while self.step < config.max_steps and not interruption.agreed():
                metrics = self.iteration(batches) | {SKIPPED: self.skips.total}
                log.metrics(self.step, metrics)
                bar.set_postfix(
                    {name: f"{metrics[f'{name}/accuracy']:.3f}" for name in (s.name for s in self.scorers)}
                )
                bar.update()
                if self.step % config.save_steps == 0:
                    saved = self.save()
            if saved != self.step:
                self.save()
        if accelerator.is_main_process:
            if self.test is not None and self.step == config.max_steps:
                write_report(self.accuracy_by_noise(), config.folder)
            print(checkpoint_at(config.folder, self.step))
        accelerator.wait_for_everyone()

    def save(self) -> int:
        """Write checkpoint-N, whole or not at all; return N."""
        with checkpoint_folder.written(self.config, self.accelerator, self.step) as folder:
            (folder / TRAINER_STATE).mkdir(exist_ok=True)
            self.batches.save_place(self.step * self.config.accumulation_steps, folder / TRAINER_STATE)
            if self.accelerator.is_main_process:
                for scorer in self.scorers:
                    scorer.model.save(folder / scorer.name)
                    save_optimizer(scorer.optimizer, state_file(folder, scorer.name))
                write_config(self.config, folder, provenance.changes_of(self.config.folder))
                row = {"step": self.step, "base": self.config.base, "counters": self.skips.counters()}
                checkpoint_folder.write_state(folder, row | self.record)
        return self.step

    def resume(self) -> None:
        """Restore the last whole checkpoint.

        Raises ValueError if there is none, or it does not fit.
        """
        found = checkpoint_folder.to_resume(self.config.folder, self.accelerator)
        with together():
            provenance.check_changes(self.config, self.record, found, read_state(found))
        try:
            for scorer in self.scorers:
                scorer.model.load_state_dict(load_file(found / scorer.name / step_aware.WEIGHTS))
                load_optimizer(scorer.optimizer, state_file(found, scorer.name))
            row = read_state(found)
        except DAMAGED as error:
            reason = " ".join(str(error).split())[:240]
            raise ValueError(f"cannot resume from {found} with these settings: {reason}") from error
        self.step = row["step"]
        self.skips.restore(row.get("counters", {}))
        self.batches.load_place(self.step * self.config.accumulation_steps, found / TRAINER_STATE)
        if self.accelerator.is_main_process:
            truncate_metrics(self.config.folder / METRICS, self.step)
            provenance.note_changes(self.config, self.step)

    @torch.no_grad()
    def accuracy_by_noise(self) -> dict[str, Any]:
        """Accuracy of each scorer on held-out pairs, by noise level.

        Bins have equal width over the rows of the process; clean images are a bin of their own. Both scorers see the
        same images. Each pair and bin has its own draw of a noise level and a noise.
        """
        config, edges = self.config, self._edges()
        count = min(config.test_pairs, len(self.test.data))
        right = {scorer.name: [[] for _ in range(config.test_bins + 1)] for scorer in self.scorers}
        captions: list[str] = []
        for scorer in self.scorers:
            scorer.model.eval()
        for number in tqdm(range(-(-count // config.batch_size)), desc="held-out pairs", disable=None):
            batch = self.test.batch(number)
            captions += batch.captions
            for place in range(config.test_bins + 1):
                images, t_B = self._test_images(batch, number, place, edges)
                for scorer in self.scorers:
                    margin_B = scorer.margin(images, batch.captions, t_B).cpu()
                    right[scorer.name][place] += torch.where(margin_B == 0, 0.5, (margin_B > 0).float()).tolist()
        for scorer in self.scorers:
            scorer.model.train()
        correct = {name: torch.tensor(rows)[:, :count] for name, rows in right.items()}
        return _report(correct, captions[:count], [float(self.process.time[min(e, edges[-1] - 1)]) for e in edges])

    def _edges(self) -> list[int]:
        return [round(i * len(self.process.time) / self.config.test_bins) for i in range(self.config.test_bins + 1)]

    def _test_images(self, batch: PairBatch, number: int, place: int, edges: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(images, t) of a bin.

        The place after the last bin has clean images.
        """
        device = self.accelerator.device
        if place == self.config.test_bins:
            return torch.cat([batch.winners_B3HW, batch.losers_B3HW]), torch.zeros(len(batch), device=device)
        first = number * self.config.batch_size
        seeds = [SampleId(self.config.seed, first + i, place).generator("held-out noise") for i in range(len(batch))]
        rows_B = torch.cat([torch.randint(edges[place], edges[place + 1], (1,), generator=g) for g in seeds])
        noise = torch.stack([torch.randn(self._latent_shape, generator=g) for g in seeds])
        return self.estimates(batch, rows_B, noise), self.process.time[rows_B].to(device)


def _report(correct: dict[str, Tensor], captions: Sequence[str], edges: Sequence[float]) -> dict[str, Any]:
    """The content of accuracy.json.

    correct: (bins + 1, N) for each scorer; the last row is of clean images.
    """
    bins, groups = len(edges) - 1, list(captions)

    def point(rows: dict[str, Tensor], groups: list[str]) -> dict[str, Any]:
        values = {name: row.numpy() for name, row in rows.items()}
        found = {name: _interval(grouped_mean(row, groups)) for name, row in values.items()}
        if BLIND in values:
            found["difference"] = _interval(paired_difference(values[AWARE], values[BLIND], groups))
        return found

    high = range(bins // 2, bins)
    pooled = {name: table[list(high)].flatten() for name, table in correct.items()}
    return {
        "pairs": len(groups),
        "bins": [
            {"t": [edges[i], edges[i + 1]]} | point({name: table[i] for name, table in correct.items()}, groups)
            for i in range(bins)
        ],
        "high_noise": {"t": [edges[high[0]], edges[-1]]} | point(pooled, groups * len(high)),
        "clean": point({name: table[-1] for name, table in correct.items()}, groups),
    }


def _interval(estimate: Estimate) -> dict[str, Any]:
    return {"mean": estimate.mean, "ci95": [estimate.low, estimate.high]}


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write accuracy.json and accuracy.png, and print a line."""
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    names = [name for name in (AWARE, BLIND) if name in report["clean"]]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    middles = [sum(row["t"]) / 2 for row in report["bins"]]
    for name in names:
        points = [row[name] for row in report["bins"]]
        means = [point["mean"] for point in points]
        low, high = zip(*(point["ci95"] for point in points), strict=True)
        (line,) = axes.plot(middles, means, marker="o", label=name.replace("_", "-"))
        axes.fill_between(middles, low, high, alpha=0.2, color=line.get_color())
        axes.plot(0, report["clean"][name]["mean"], marker="*", color=line.get_color(), linestyle="none")
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    axes.set(xlabel="noise level t (star: clean images)", ylabel=f"accuracy on {report['pairs']} held-out pairs")
    axes.legend()
    figure.savefig(folder / FIGURE, dpi=150)
    high_noise = ", ".join(f"{name} {report['high_noise'][name]['mean']:.1%}" for name in names)
    print(f"accuracy at t > {report['high_noise']['t'][0]:g}: {high_noise}; {folder / REPORT}")
