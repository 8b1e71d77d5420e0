"""A GRPO iteration written the plain way, as in public scripts.

`trainers.benchmark` compares the trainer with it. It follows scripts/train_sd3.py of Flow-GRPO
(github.com/yifan123/flow_grpo) and scripts/train.py of ddpo-pytorch (github.com/kvablack/ddpo-pytorch). A test holds
it to the samples, loss and gradient of `trainers.grpo`. It makes them with

    - text encoders that run for each image of each batch, in every iteration
    - an autoencoder in float32, whatever the network's precision
    - rewards after all sampling
    - its own loop over the schedule, where the rest of the project uses `rlg.diffusion.sampling.trajectory`
    - states and next states, embeddings and log-probabilities of all images in one table, cut into batches again
    - a pass for each batch and denoising step, and one of the base where there is a KL
    - a pass for every sample, also where its advantage is 0 (Flow-GRPO skips those; the benchmark's reward has none)

As there, classifier-free guidance at scale 1 has no unconditional branch, and beta 0 no pass of the base. Network,
kernels and optimizer are the project's own, so that both differ in what they compute, and not in the speed of a layer.
It has the plain ratio only (no GRPO-Guard), one process and no mixed precision.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from rewards import RewardMix
from rlg.benchmark.phases import Phases
from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning
from rlg.diffusion.process import Schedule
from rlg.diffusion.sampling import SampleId, SampleNoise
from rlg.models.policy import Policy
from rlg.prompts import Prompt
from trainers.grpo import GRPOConfig

Table = dict[str, Tensor]


class PlainGRPO:
    """The plain loop: sample, score, normalise, train."""

    def __init__(
        self, config: GRPOConfig, policy: Policy, reward: RewardMix, prompts: Sequence[Prompt], phases: Phases
    ):
        self.config, self.policy, self.reward, self.prompts = config, policy, reward, list(prompts)
        self.phases = phases
        self.shape = policy.latent_shape(config.resolution)
        self.vae = copy.deepcopy(policy.pipe.vae).float()
        self.negative = policy.encode([""])
        self.optimizer = torch.optim.AdamW(
            policy.trainable(),
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
        )

    def iteration(self, batches: Sequence[Sequence[SampleId]], schedule: Schedule, steps: Sequence[int]) -> float:
        """Run an iteration from identities of samples to the optimizer step.

        steps: those that are trained. Returns the loss.
        """
        table = self.sample(batches, schedule)
        with self.phases("reward"):
            table["advantage_B"] = self.advantages(batches, table.pop("image_B3HW"))
        loss = self.accumulate(table, schedule, steps)
        with self.phases("optimizer"):
            torch.nn.utils.clip_grad_norm_(self.policy.trainable(), self.config.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss

    @torch.no_grad()
    def sample(self, batches: Sequence[Sequence[SampleId]], schedule: Schedule) -> Table:
        """Sample all images, with inputs of training joined along the batch."""
        rows: list[Table] = []
        for ids in batches:
            with self.phases("text encoding"):
                cond = self.policy.encode([self.prompts[sample.prompt].text for sample in ids])
            with self.phases("denoising"):
                row = self.denoise(cond, SampleNoise(ids, self.shape, self.policy.device), schedule)
            with self.phases("decoding"):
                row["image_B3HW"] = self.decode(row.pop("x0_BCHW"))
            rows.append(row | cond.tensors)
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def denoise(self, cond: Conditioning, noise: SampleNoise, schedule: Schedule) -> Table:
        """Denoise.

        Returns states before and after every step, and the log-probabilities of the steps that have one.
        """
        x = noise.initial()
        before, after, logps = [], [], []
        for i in range(len(schedule)):
            out = self.predict(x, schedule.t[i], cond)
            stochastic = bool(schedule.std[i] > 0)
            x_next = process.step(schedule, i, x, out, noise.step() if stochastic else None)
            logp_B = process.log_prob(schedule, i, x, out, x_next) if stochastic else torch.zeros(len(x)).to(x)
            before.append(x)
            after.append(x_next)
            logps.append(logp_B)
            x = x_next
        stacked = {"before_BTCHW": before, "after_BTCHW": after, "logp_BT": logps}
        return {name: torch.stack(values, dim=1) for name, values in stacked.items()} | {"x0_BCHW": x}

    def predict(self, x_BCHW: Tensor, t: Tensor, cond: Conditioning, base: bool = False) -> Tensor:
        """The network's output under classifier-free guidance.

        Both branches are one batch; at scale 1 there is one branch.
        """
        network = self.policy.reference if base else self.policy.predict
        if self.config.cfg == 1:
            return network(x_BCHW, t.expand(len(cond)), cond)
        both = Conditioning.cat([self.negative.expand(len(cond)), cond])
        unconditional, conditional = network(torch.cat([x_BCHW] * 2), t.expand(2 * len(cond)), both).chunk(2)
        return unconditional + self.config.cfg * (conditional - unconditional)

    def decode(self, x0_BCHW: Tensor) -> Tensor:
        """Images of latents, in [0, 1]."""
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        image = self.vae.decode(x0_BCHW / self.vae.config.scaling_factor + shift).sample
        return (image / 2 + 0.5).clamp(0, 1)

    def advantages(self, batches: Sequence[Sequence[SampleId]], image_B3HW: Tensor) -> Tensor:
        """(B,) rewards less their prompt's mean, over a standard deviation.

        The standard deviation is that of the prompt's rewards, or of all.
        """
        chosen = [sample.prompt for ids in batches for sample in ids]
        prompts = [self.prompts[p] for p in chosen]
        reward_B = self.reward(image_B3HW, [p.text for p in prompts], [p.metadata for p in prompts]).total_B.double()
        advantage_B = torch.zeros_like(reward_B)
        for prompt in set(chosen):
            mine = torch.tensor([p == prompt for p in chosen])
            advantage_B[mine] = reward_B[mine] - reward_B[mine].mean()
            if self.config.scale_rewards == "group":
                advantage_B[mine] /= reward_B[mine].std(unbiased=False) + 1e-4
        if self.config.scale_rewards == "batch":
            advantage_B /= reward_B.std(unbiased=False) + 1e-4
        clip = self.config.advantage_clip
        return advantage_B.clamp(-clip, clip).float().to(self.policy.device)

    def accumulate(self, table: Table, schedule: Schedule, steps: Sequence[int]) -> float:
        """Accumulate the gradients of one update; return the mean loss.

        It goes batch by batch and step by step.
        """
        size = self.config.batch_size
        count = len(table["advantage_B"]) // size
        total = 0.0
        for b in range(count):
            batch = {name: values[b * size : (b + 1) * size] for name, values in table.items()}
            for i in steps:
                with self.phases("forward-backward"):
                    loss = self.loss(batch, schedule, i) / (count * len(steps))
                    loss.backward()
                    total += float(loss.detach())
        return total

    def loss(self, batch: Table, schedule: Schedule, i: int) -> Tensor:
        """Clipped policy loss, with KL, of a batch at one step."""
        config = self.config
        cond = Conditioning({name: batch[name] for name in self.negative.tensors})
        x, x_next = batch["before_BTCHW"][:, i], batch["after_BTCHW"][:, i]
        out = self.predict(x, schedule.t[i], cond)
        ratio_B = (process.log_prob(schedule, i, x, out, x_next) - batch["logp_BT"][:, i]).exp()
        unclipped_B = -batch["advantage_B"] * ratio_B
        clipped_B = -batch["advantage_B"] * ratio_B.clamp(1 - config.epsilon, 1 + config.epsilon)
        loss = torch.maximum(unclipped_B, clipped_B).mean()
        if not config.beta:
            return loss
        with torch.no_grad():
            reference = self.predict(x, schedule.t[i], cond, base=True)
        kl_B = process.kl(schedule, i, out, reference, per_time=config.kl_convention == "flow_grpo")
        return loss + config.beta * kl_B.mean()
