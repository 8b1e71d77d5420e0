"""The sampling loop, rollouts, and noise that belongs to a sample.

    for step in trajectory(predict, schedule, cond, noise, moves=[...], observers=[...]):
        ...                                      # step.x -> step.x_next, the kernel of row step.i of the schedule

`advance` makes one step, and `trajectory` is the loop over it. There is no other loop over a schedule, except in
`trainers.benchmark.plain_grpo`, the plain reference. Grad mode and autocast are the caller's. Particles and inpainting
are moves; path KL and pass counts are observers. A tree calls `advance` itself, and so does a gradient through some
steps, with or without `torch.utils.checkpoint`. Noise depends only on (seed, prompt id, k, purpose). Base, tuned and
guided images are therefore paired, on any number of processes and in any batch.

Legend: B batch, T denoising steps.
"""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rlg.diffusion import process
from rlg.diffusion.conditioning import Conditioning, Outputs, OutputsPredictor, Predictor, pick
from rlg.diffusion.process import Schedule


@dataclass(frozen=True)
class SampleId:
    """Identity of a sample, which alone decides its noise."""

    seed: int
    prompt: int  # index of the prompt in its data set
    k: int  # index of the image among those of the prompt

    def generator(self, purpose: str) -> torch.Generator:
        """A generator that belongs to this sample and one purpose."""
        text = f"{self.seed}/{self.prompt}/{self.k}/{purpose}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Noise(Protocol):
    """The noise of a batch, as the loop uses it."""

    def initial(self) -> Tensor:
        """x_T, (B, C, H, W) fp32."""

    def step(self) -> Tensor:
        """The next stochastic step's noise, (B, C, H, W) fp32."""

    def gather(self, index_B: Tensor) -> Noise:
        """The noise of a batch whose rows come from these rows.

        No two rows of the new batch share their future noise.
        """


class SampleNoise:
    """The noise of a batch of samples.

    `initial` gives the first latents. `step` gives the noise of the next step, for stochastic samplers. With
    `same_start`, all images of a prompt start from the noise of its first image (DanceGRPO's init_same_noise).
    """

    def __init__(
        self,
        ids: Sequence[SampleId],
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        same_start: bool = False,
    ):
        self.ids, self.shape, self.device = list(ids), shape, device
        self.same_start = same_start
        self._samples, self._steps = self.ids, [sample.generator("steps") for sample in self.ids]
        self._places = list(range(len(self.ids)))  # index of each row's sample

    def initial(self) -> Tensor:
        """x_T, (B, C, H, W) fp32."""
        starts = [replace(sample, k=0) for sample in self.ids] if self.same_start else self.ids
        return self._draw([sample.generator("initial") for sample in starts])

    def step(self) -> Tensor:
        """The next step's noise, (B, C, H, W) fp32."""
        return self._draw([self._steps[place] for place in self._places])

    def gather(self, index_B: Tensor) -> SampleNoise:
        """The noise of a batch whose rows come from these rows.

        Noise belongs to a sample and not to a path. The n-th row of a prompt goes on with the noise of that prompt's
        n-th sample, wherever the row comes from. So copies of a row part at the next stochastic step. Where a prompt
        has more rows than samples, the samples take turns. Other prompts of the batch change nothing.
        """
        prompts = [(sample.seed, sample.prompt) for sample in self._samples]
        gathered, seen = copy.copy(self), Counter[tuple[int, int]]()
        gathered._places = []
        for row in index_B.tolist():
            prompt = prompts[self._places[row]]
            own = [place for place, other in enumerate(prompts) if other == prompt]
            gathered._places.append(own[seen[prompt] % len(own)])
            seen[prompt] += 1
        gathered.ids = [self._samples[place] for place in gathered._places]
        return gathered

    def _draw(self, generators: list[torch.Generator]) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in generators]).to(self.device)


@dataclass(frozen=True)
class Step:
    """One step of a batch, with its inputs and results."""

    schedule: Schedule
    i: int  # row of the schedule
    x_BCHW: Tensor  # before the step
    cond: Conditioning
    outputs: Outputs  # outputs at x of the network or of guidance
    x_next_BCHW: Tensor

    @property
    def t_B(self) -> Tensor:
        """(B,) the time that the network was given."""
        return times(self.schedule, self.i, len(self.x_BCHW))

    @property
    def is_last(self) -> bool:
        """Tell whether x_next is the end of the chain."""
        return self.i == len(self.schedule) - 1

    @property
    def is_stochastic(self) -> bool:
        """Tell whether the step has a density."""
        return bool(self.schedule.std[self.i] > 0)

    @property
    def x0_BCHW(self) -> Tensor:
        """The network's estimate of x0 at x, (B, C, H, W) fp32."""
        return process.predict_x0(self.schedule, self.i, self.x_BCHW, self.outputs.out_BCHW)

    def __getitem__(self, index_B: Tensor) -> Step:
        """Some rows."""
        x, x_next = pick(self.x_BCHW, index_B), pick(self.x_next_BCHW, index_B)
        return Step(self.schedule, self.i, x, self.cond[index_B], self.outputs[index_B], x_next)


@dataclass(frozen=True)
class Moved:
    """A batch after a move."""

    x_BCHW: Tensor  # the loop goes on from it
    index_B: Tensor | None = None  # the previous row of each row of x; None if no row has moved
    outputs: Outputs | None = None  # outputs at x and the next time, if the move has called `predict` already


class Follower:
    """Base class of all that may hold a value for each sample."""

    def gather(self, index_B: Tensor) -> None:
        """Let each row come from this row of the previous batch.

        A follower without values of rows has nothing to do.
        """


class Observer(Follower):
    """Base class for looking at steps as drawn, before any move."""

    def see(self, step: Step) -> None:
        """Take in a step."""
        raise NotImplementedError


class Move(Follower):
    """Base class for changing a batch between steps.

    Examples are resampling, a blend with a known image, and a correction of x. After a move with an index, all values
    of rows follow the index: those of the step, the conditioning, the noise (`Noise.gather`), the observers and all
    moves. A predictor's own values by row, such as a w for each sample, do not follow it. Therefore an index may only
    exchange rows that share these values.
    """

    def move(self, step: Step) -> Moved:
        """The batch to go on from, instead of `step.x_next_BCHW`."""
        raise NotImplementedError


# A proposal's change of a kernel's mean, (schedule, i, x, outputs) -> (B, C, H, W), such as std^2 grad log psi.
Shift = Callable[[Schedule, int, Tensor, Outputs], Tensor]


def times(schedule: Schedule, i: int, batch: int) -> Tensor:
    """(B,) the network's time at step i."""
    return schedule.t[i].expand(batch)


def given(outputs: Outputs) -> OutputsPredictor:
    """A predictor that returns outputs which are known already."""
    return lambda x_BCHW, t_B, cond: outputs


def advance(
    schedule: Schedule,
    i: int,
    x_BCHW: Tensor,
    predict: Predictor | OutputsPredictor,
    cond: Conditioning,
    z_BCHW: Tensor | None,
    shift: Shift | None = None,
) -> Step:
    """Make step i from x.

    This function is pure: it changes neither the grad mode nor a generator. z_BCHW ~ N(0, 1), or None where the step
    is deterministic. predict may return `Outputs`, with the base's output.
    """
    found = predict(x_BCHW, times(schedule, i, len(x_BCHW)), cond)
    outputs = found if isinstance(found, Outputs) else Outputs(found)
    x_next = process.step(schedule, i, x_BCHW, outputs.out_BCHW, z_BCHW)
    if shift is not None:
        x_next = x_next + shift(schedule, i, x_BCHW, outputs)
    return Step(schedule, i, x_BCHW, cond, outputs, x_next)


def trajectory(
    predict: Predictor | OutputsPredictor,
    schedule: Schedule,
    cond: Conditioning,
    noise: Noise,
    *,
    start: int = 0,
    stop: int | None = None,
    x: Tensor | None = None,
    outputs: Outputs | None = None,
    shift: Shift | None = None,
    moves: Sequence[Move] = (),
    observers: Sequence[Observer] = (),
) -> Iterator[Step]:
    """Make steps start <= i < stop, and yield each one.

    x: the latents to start from; the default is the initial noise. outputs: the network's outputs at x, if they are
    known already. Observers see a step first, and then the moves change it in turn. Grad mode and autocast are the
    caller's.
    """
    x = noise.initial() if x is None else x
    for i in range(start, len(schedule) if stop is None else stop):
        z = noise.step() if schedule.std[i] > 0 else None
        step = advance(schedule, i, x, predict if outputs is None else given(outputs), cond, z, shift)
        for observer in observers:
            observer.see(step)
        outputs = None
        for move in moves:
            moved = move.move(step)
            if moved.index_B is not None:
                step, noise = step[moved.index_B], noise.gather(moved.index_B)
                for follower in (*observers, *moves):
                    follower.gather(moved.index_B)
            step, outputs = replace(step, x_next_BCHW=moved.x_BCHW), moved.outputs
        yield step
        x, cond = step.x_next_BCHW, step.cond


@dataclass(frozen=True)
class Trajectory:
    """A rollout; all tensors are fp32."""

    x_TBCHW: Tensor  # (T+1, B, C, H, W): before each step, and the final latents
    logp_TB: Tensor  # (T, B): mean log-density over latent dimensions; 0 where the step is deterministic
    mean_TBCHW: Tensor | None  # (T, B, C, H, W): means of the kernels, with `keep_means`

    @property
    def x0(self) -> Tensor:
        """The final latents, (B, C, H, W)."""
        return self.x_TBCHW[-1]

    def rows(self, index: Tensor) -> Trajectory:
        """Some of the samples."""
        means = None if self.mean_TBCHW is None else self.mean_TBCHW[:, index]
        return Trajectory(self.x_TBCHW[:, index], self.logp_TB[:, index], means)

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Join along the batch."""
        means = None
        if parts[0].mean_TBCHW is not None:
            means = torch.cat([p.mean_TBCHW for p in parts], dim=1)
        return Trajectory(
            torch.cat([p.x_TBCHW for p in parts], dim=1), torch.cat([p.logp_TB for p in parts], dim=1), means
        )


@torch.no_grad()
def rollout(
    predict: Predictor, schedule: Schedule, cond: Conditioning, noise: Noise, keep_means: bool = False
) -> Trajectory:
    """Sample, and keep the values that policy gradients need.

    These are every state and the log-probability of every stochastic step.
    """
    states, logps, means = [noise.initial()], [], []
    for step in trajectory(predict, schedule, cond, noise, x=states[0]):
        row = schedule, step.i, step.x_BCHW, step.outputs.out_BCHW
        x_next = step.x_next_BCHW
        logps.append(process.log_prob(*row, x_next) if step.is_stochastic else torch.zeros_like(x_next[:, 0, 0, 0]))
        if keep_means:
            means.append(process.mean(*row))
        states.append(x_next)
    return Trajectory(torch.stack(states), torch.stack(logps), torch.stack(means) if keep_means else None)


@torch.no_grad()
def sample(
    predict: Predictor | OutputsPredictor,
    schedule: Schedule,
    cond: Conditioning,
    noise: Noise,
    moves: Sequence[Move] = (),
    observers: Sequence[Observer] = (),
) -> Tensor:
    """Final latents, (B, C, H, W) fp32, in constant memory."""
    for step in trajectory(predict, schedule, cond, noise, moves=moves, observers=observers):
        x = step.x_next_BCHW
    return x


@torch.no_grad()
def path_kl_step(schedule: Schedule, i: int, out_BCHW: Tensor, base_BCHW: Tensor) -> Tensor:
    """(B,) nats that step i adds to KL(path || base path).

    This is Girsanov's formula, with the variance that is really injected.
    """
    dimensions = out_BCHW[0].numel()
    return process.kl(schedule, i, out_BCHW, base_BCHW) * dimensions
