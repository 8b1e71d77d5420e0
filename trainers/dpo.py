"""Diffusion-DPO, offline on preference pairs or online on own samples.

The paper is arXiv 2311.12908. The form for flow models and the online pairs follow Flow-GRPO's train_sd3_dpo.py.

    L = -log sigmoid( -beta/2 [ (|out(x_t^w) - y^w|^2 - |ref(x_t^w) - y^w|^2) - (the same of the loser) ] )

    x_t      alpha x0 + sigma n, with one t and one noise n for winner and loser
    y        the model's own training target
    |.|^2    mean over latent dimensions
    ref      the network with its adapter off
    beta     the paper's, with the factor 1/2: 5000 for models of noise, 100 for flow models. diffusers' LoRA script
             leaves the 1/2 out: its beta_dpo 2500 is 5000 here

The margin m is the argument of the sigmoid. Two other losses use it:

    hinge   max(0, 1 - m)
    ipo     (m - 1/2)^2 = beta^2 (m / beta - 1 / (2 beta))^2             (arXiv 2310.12036, eq. 17, with tau = beta)

IPO regresses the log-ratio of the policies, m / beta, on 1 / (2 beta). The margin's target is thus 1/2 at every beta.
The factor beta^2 keeps the gradient, and so the effect of clipping, at the size of the sigmoid's. diffusers' script
has no such factor: with its own beta, its loss is ours times 4 / beta^2.

Deviations from the public code
1. Pairs without a preference are dropped and counted (diffusers' script trains on them as if the first had won).
2. t has the density of the model's own pretraining (`process.sample_t`), shifted where the scheduler shifts.
3. Latents are the mean of the autoencoder's posterior, not a draw from it, so that they can be cached.

    accelerate launch train_dpo.py --config configs/tiny/dpo_sd3.yaml
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Process
from rlg.models.fingerprint import Record
from rlg.models.policy import Policy
from trainers.checkpoints import provenance
from trainers.core.log import Log
from trainers.core.loop import Trainer
from trainers.core.online import AdvantageTrainer, Samples
from trainers.core.setup import Given, Prompts, Rewards
from trainers.data import preference_pairs
from trainers.data.preference_pairs import Batches, PairBatch, Pairs
from trainers.dpo_config import DPOConfig


@dataclass(frozen=True)
class Errors:
    """Mean squared errors of B pairs, (B,) each.

    Those of the model have a gradient.
    """

    winner_B: Tensor
    loser_B: Tensor
    ref_winner_B: Tensor
    ref_loser_B: Tensor


def margin(errors: Errors, beta: float) -> Tensor:
    """(B,) margins: implicit rewards of the winners less those of the losers.

    The loss takes a sigmoid of them.
    """
    model_B, ref_B = errors.winner_B - errors.loser_B, errors.ref_winner_B - errors.ref_loser_B
    return -0.5 * beta * (model_B - ref_B)


def accuracy(margin_B: Tensor) -> Tensor:
    """Share of margins above 0.

    A margin of exactly 0 counts as half: this is the official code's rule.
    """
    return (margin_B > 0).float().mean() + 0.5 * (margin_B == 0).float().mean()


def dpo_loss(errors: Errors, beta: float, loss_type: str = "sigmoid") -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of B pairs and its metrics."""
    margin_B = margin(errors, beta)
    if loss_type == "sigmoid":
        loss_B = -logsigmoid(margin_B)
    elif loss_type == "hinge":
        loss_B = (1 - margin_B).relu()
    else:
        loss_B = (margin_B - 0.5) ** 2
    loss = loss_B.mean()
    metrics = {
        "loss": loss,
        "accuracy": accuracy(margin_B),
        "margin": margin_B.mean(),
        "model_mse": (errors.winner_B + errors.loser_B).mean() / 2,
        "ref_mse": (errors.ref_winner_B + errors.ref_loser_B).mean() / 2,
        "winner_gain": (errors.ref_winner_B - errors.winner_B).mean(),
        "loser_gain": (errors.ref_loser_B - errors.loser_B).mean(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


@dataclass(frozen=True)
class LatentPairs:
    """B pairs of latents, as the loss takes them.

    The two conditionings differ in sizes and crops alone.
    """

    winner_BCHW: Tensor
    loser_BCHW: Tensor
    winner_cond: Conditioning
    loser_cond: Conditioning


def noisier(whole: Process, share: float) -> Process:
    """The process without noise levels below this share of its rows.

    High noise decides where objects go. In the error of predicted noise, the low levels outweigh it.
    """
    density = whole.density * (torch.arange(len(whole.density)) >= share * len(whole.density))
    return replace(whole, density=density / density.sum())


class PairLoss:
    """The loss of latent pairs under a trainer's policy.

    Offline and online DPO share it.
    """

    def __init__(self, trainer: Trainer, config: DPOConfig):
        self.policy, self.accelerator, self.config = trainer.policy, trainer.accelerator, config
        self.process = noisier(trainer.policy.process(trainer.config.resolution), config.min_noise)

    def __call__(self, pairs: LatentPairs, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) at one random noise level a pair."""
        return dpo_loss(self.errors(pairs, generator), self.config.beta, self.config.loss_type)

    def errors(self, pairs: LatentPairs, generator: torch.Generator) -> Errors:
        """Errors at one random noise level a pair.

        Winner and loser share the level and the noise.
        """
        x0 = torch.cat([pairs.winner_BCHW, pairs.loser_BCHW])
        count, *shape = pairs.winner_BCHW.shape
        total = count * self.accelerator.num_processes
        rows_B = self._own(process.sample_t(self.process, total, generator)).repeat(2)
        noise = self._own(torch.randn(total, *shape, generator=generator)).to(x0.device).repeat(2, 1, 1, 1)
        x_t, target = process.noise(self.process, rows_B, x0, noise)
        t_B, cond = self.process.time[rows_B].to(x0.device), Conditioning.cat([pairs.winner_cond, pairs.loser_cond])
        with self.accelerator.autocast():
            with torch.no_grad():
                ref = self.policy.reference(x_t, t_B, cond)
            out = self.policy.predict(x_t, t_B, cond)
        model_B, ref_B = ((y.float() - target).square().flatten(1).mean(dim=1) for y in (out, ref))
        return Errors(*model_B.split(count), *ref_B.split(count))

    def drop_captions(self, captions: Sequence[str], generator: torch.Generator) -> list[str]:
        """The captions, a random part of them emptied."""
        draws = torch.rand(len(captions) * self.accelerator.num_processes, generator=generator)
        dropped = self._own(draws) < self.config.caption_dropout
        return ["" if drop else text for text, drop in zip(captions, dropped.tolist(), strict=True)]

    def _own(self, draws: Tensor) -> Tensor:
        """This process's share of draws for the whole batch.

        Every process draws them all, so that the number of processes changes nothing.
        """
        return draws.chunk(self.accelerator.num_processes)[self.accelerator.process_index]


class PairEncoder:
    """Encoder of pairs of images and captions.

    It keeps latents and conditionings in memory where the config says so.
    """

    def __init__(self, policy: Policy, config: DPOConfig, resolution: int):
        self.policy, self.config, self.resolution = policy, config, resolution
        self._latents: dict[int, tuple[Tensor, Tensor]] = {}
        self._conds: dict[str, Conditioning] = {}

    @torch.no_grad()
    def __call__(self, batch: PairBatch, captions: Sequence[str]) -> LatentPairs:
        """The batch's pairs, encoded with these captions."""
        winners, losers = self._encode_images(batch)
        cond = self._encode(captions)
        if not self.config.true_sizes:
            return LatentPairs(winners, losers, cond, cond)
        sizes = ((batch.sizes_B2, batch.crops_B2), (batch.loser_sizes_B2, batch.loser_crops_B2))
        conds = (self.policy.with_sizes(cond, size, crop, self.resolution) for size, crop in sizes)
        return LatentPairs(winners, losers, *conds)

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        if not self.config.cache:
            return self.policy.encode(captions)
        new = [text for text in dict.fromkeys(captions) if text not in self._conds]
        if new:
            encoded = self.policy.encode(new).to("cpu")
            self._conds |= {text: encoded[i : i + 1] for i, text in enumerate(new)}
        return Conditioning.cat([self._conds[text] for text in captions]).to(self.policy.device)

    def _encode_images(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        indices = batch.indices_B.tolist()
        if not all(i in self._latents for i in indices):
            latents = self.policy.encode_images(torch.cat([batch.winners_B3HW, batch.losers_B3HW]))
            winners, losers = latents.chunk(2)
            if not self.config.cache:
                return winners, losers
            rows = zip(indices, winners.cpu(), losers.cpu(), strict=True)
            self._latents |= {i: (winner, loser) for i, winner, loser in rows}
        winners, losers = zip(*(self._latents[i] for i in indices), strict=True)
        return torch.stack(winners).to(self.policy.device), torch.stack(losers).to(self.policy.device)


class DPOTrainer(Trainer):
    """Trainer on pairs from a data set; see the module's docstring."""

    shown = ("loss", "accuracy", "margin", "seconds_per_pair")
    config: DPOConfig

    def __init__(
        self,
        config: DPOConfig,
        *,
        policy: Policy | None = None,
        reward: Rewards | None = None,
        data: str | Path | Pairs | None = None,
        held_out: Rewards | None = None,
        eval_prompts: Prompts | None = None,
        accelerator: Accelerator | None = None,
    ):
        """Take what is given; load the rest by the config.

        See `setup.Given` and `Trainer`.
        """
        if config.online:
            raise ValueError("online is on: OnlineDPOTrainer trains on its own samples, DPOTrainer on pairs")
        given = Given(policy=policy, reward=reward, data=data, held_out=held_out, eval_prompts=eval_prompts)
        super().__init__(config, given, accelerator)
        config = self.config
        self.pair_loss = PairLoss(self, config)
        self.encode, self.encode_test = self._encoder(), self._encoder()
        self.batches = self._batches(config.data_split, data if isinstance(data, Pairs) else None)
        self.test = self._batches(config.test_split) if config.test_split else None
        self._stream: Iterator[PairBatch] | None = None
        self.state.data = self

    def _encoder(self) -> PairEncoder:
        return PairEncoder(self.policy, self.config, self._resolution)

    def save_place(self, step: int, folder: Path) -> None:
        """Write how far the pairs are read before iteration `step`."""
        self.batches.save_place(step * self.config.accumulation_steps, folder)

    def load_place(self, step: int, folder: Path) -> None:
        """Read on from the place in a checkpoint."""
        self.batches.load_place(step * self.config.accumulation_steps, folder)

    @property
    def _resolution(self) -> int:
        return self.config.resolution or self.policy.image_size()

    def _batches(self, split: str, pairs: Pairs | None = None) -> Batches:
        config, accelerator = self.config, self.accelerator
        rank, world = accelerator.process_index, accelerator.num_processes
        if pairs is None:
            streaming = config.streaming and split == config.data_split
            pairs = preference_pairs.load(
                config.data, split, streaming, image_root=config.image_root, rank=rank, world=world
            )
        if accelerator.is_main_process:
            print(f"{split}: {pairs.counts}")
        size = config.batch_size * world
        crop = config.random_crop and split == config.data_split
        return Batches(pairs, size, self._resolution, config.seed, crop, rank, world)

    def record(self) -> Record:
        """Digests and versions of the files and packages behind the run."""
        prompts = {"eval_prompts": self.eval_prompts}
        return provenance.record(self.config, self.accelerator, prompts, self.config.data)

    def iteration(self, log: Log | None = None) -> dict[str, float]:
        """Take one optimizer step.

        Its data depends on (seed, step) alone.
        """
        started, config = time.perf_counter(), self.config
        self.begin_updates(config.accumulation_steps)
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + self.state.step) * 1009)
        collected: list[dict[str, Tensor]] = []
        for batch in self._next_batches():
            pairs = self.encode(batch, self.pair_loss.drop_captions(batch.captions, generator))
            with self.accelerator.accumulate(self.policy.wrapped):
                loss, metrics = self.pair_loss(pairs, generator)
                self.backward(loss, metrics)
            collected.append(metrics)
        self.state.step += 1
        pairs_seen = self.counts["pairs_per_update"]
        counters = self.state.counters
        counters["pairs"] = counters.get("pairs", 0) + pairs_seen
        seconds = time.perf_counter() - started
        return self.mean_metrics(collected) | {"pairs": counters["pairs"], "seconds_per_pair": seconds / pairs_seen}

    def _next_batches(self) -> Iterator[PairBatch]:
        """The batches of this step, read ahead in the background."""
        count = self.config.accumulation_steps
        if self._stream is None:
            first, last = self.state.step * count, self.config.max_steps * count
            self._stream = self.batches.iterate(first, max(last, first + count))
        for _ in range(count):
            yield next(self._stream)

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Measure rewards of held-out prompts, and the accuracy on held-out pairs.

        Accuracy says how often the implicit reward orders a pair as its label does.
        """
        return super().evaluate() | (self._test() if self.test else {})

    def _test(self) -> dict[str, float]:
        """Measure the margins of held-out pairs.

        A margin is a mean over noise levels and noises. They are the same in every evaluation.
        """
        config, accelerator = self.config, self.accelerator
        count = min(config.test_pairs, len(self.test.data))
        margins = []
        with self.state.averaged():
            for number in range(-(-count // self.test.batch_size)):
                batch = self.test.batch(number)
                pairs = self.encode_test(batch, batch.captions)
                generator = torch.Generator().manual_seed((config.seed * 1_000_003 + number) * 1009)
                draws = [
                    margin(self.pair_loss.errors(pairs, generator), config.beta) for _ in range(config.test_draws)
                ]
                margins.append(accelerator.gather(torch.stack(draws).mean(dim=0)))
        margin_N = torch.cat(margins)[:count]
        values = {"accuracy": accuracy(margin_N), "margin": margin_N.mean(), "loss": -logsigmoid(margin_N).mean()}
        return {f"test/{name}": float(value) for name, value in values.items()}


class OnlineDPOTrainer(AdvantageTrainer):
    """Trainer on pairs of the policy's own samples.

    A pair is the best and the worst of a group under the reward.
    """

    shown = ("reward", "loss", "accuracy", "seconds_per_image")
    config: DPOConfig

    def load(self, given: Given) -> None:
        """Load rewards and prompts.

        Raises ValueError for a config of offline DPO.
        """
        if not self.config.online:
            raise ValueError("online is off: DPOTrainer trains on pairs, OnlineDPOTrainer on its own samples")
        super().load(given)

    @cached_property
    def pair_loss(self) -> PairLoss:
        """The loss of latent pairs, which offline DPO has too."""
        return PairLoss(self, self.config)

    def rollout(self) -> Samples:
        """Sample this process's groups with the current policy."""
        generator = torch.Generator().manual_seed(self.iteration_seed())
        return self.sample_groups(self.policy.predict, self.parts(generator, whole_groups=True))

    def update(self, samples: Samples, advantage_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration.

        A group whose images score alike has no pair; its loss is 0.
        """
        config = self.config
        x0, size = torch.cat(samples.latents), config.num_generations
        best, worst, differ = best_and_worst(advantage_B.cpu().view(-1, size))
        generator = torch.Generator().manual_seed(self.iteration_seed() * 1009)
        chunks = torch.arange(len(best)).split(-(-len(best) // config.num_updates))
        collected: list[dict[str, Tensor]] = []
        for chunk in chunks:
            batches = chunk.split(config.batch_size)
            self.begin_updates(len(batches))
            for groups in batches:
                captions = [self.prompts[i].text for i in samples.prompt_B[groups * size].tolist()]
                cond = self.policy.encode(self.pair_loss.drop_captions(captions, generator))
                kept = differ[groups].to(x0.device)
                pairs = LatentPairs(x0[best[groups]], x0[worst[groups]], cond, cond)
                with self.accelerator.accumulate(self.policy.wrapped):
                    loss, metrics = self.pair_loss(pairs, generator)
                    self.backward(loss, metrics)
                collected.append(metrics | {"pairs_kept": kept.float().mean()})
        return self.mean_metrics(collected)


def best_and_worst(score_GK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Find the best and the worst sample of each of G groups.

    Returns (indices of the best, of the worst, a flag that says if they differ). K samples of a group follow one
    another.
    """
    start_G = torch.arange(len(score_GK)) * score_GK.shape[1]
    best_G, worst_G = score_GK.argmax(dim=1), score_GK.argmin(dim=1)
    return start_G + best_G, start_G + worst_G, best_G != worst_G


def trainer_of(config: DPOConfig) -> type[DPOTrainer] | type[OnlineDPOTrainer]:
    """The trainer of a config: offline or online."""
    return OnlineDPOTrainer if config.online else DPOTrainer
