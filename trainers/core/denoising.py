"""Trainers that regress on noisy versions of their own samples."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Process
from trainers.core.online import OnlineTrainer, Samples


class DenoisingTrainer(OnlineTrainer):
    """Trainer that fits its samples at random noise levels.

    Pretraining does the same, but here each sample counts by its reward. An algorithm adds `rollout`, `loss` and, in
    its config, `num_train_steps`: the noise levels of a sample.
    """

    @cached_property
    def process(self) -> Process:
        """The noising process of the base."""
        return self.policy.process(self.config.resolution)

    def loss(
        self, x0_BCHW: Tensor, cond: Conditioning, advantage_B: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, metrics) of a batch at one random noise level a sample."""
        raise NotImplementedError

    def noised(self, x0_BCHW: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noise each sample to a random level.

        Returns (rows of the noising, the network's time, x_t, training target).
        """
        rows_B = process.sample_t(self.process, len(x0_BCHW), generator)
        noise = torch.randn(x0_BCHW.shape, generator=generator).to(x0_BCHW.device)
        x_t, target = process.noise(self.process, rows_B, x0_BCHW, noise)
        return rows_B, self.process.time[rows_B].to(x_t.device), x_t, target

    def update(self, samples: Samples, advantage_B: Tensor) -> dict[str, float]:
        """Take all optimizer steps of the iteration; return mean metrics."""
        config = self.config
        advantages = advantage_B.split(config.batch_size)
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
