"""Cost of a GRPO iteration by phase, against a plain implementation.

    python -m rlg.benchmark grpo --base tiny-sd3
    python -m rlg.benchmark grpo --arch sd35-medium --resolution 512 --device cuda --compile --batch_sizes 1 2 4 8

Contenders make the same images and take the same optimizer step:

    plain            as the public scripts do it (`trainers.benchmark.plain_grpo`)
    trainer          `trainers.grpo` with the same settings
    steps together   ... with all trained steps of a batch in one pass of the update (--update_batch_size)
    large rollouts   ... with all images in one batch of the rollout, and passes of the update as large as before
    compiled         (--compile) the trainer on a network that torch.compile made

They take turns in one process. Ratios are medians over rounds, with intervals. On a CPU, seconds are the process's
own, which other processes hardly touch; only the column "wall" has wall seconds. Memory is that of tensors at the
peak of an iteration, above what they held before it (weights, the optimizer's state). The prompts of an iteration are
always the same, so that every kept text encoding is found.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from accelerate import Accelerator

from rewards import RewardMix
from rlg import stats
from rlg.benchmark import flops, timing
from rlg.benchmark.allocations import peak_allocated
from rlg.benchmark.growth import policy_with_lora
from rlg.benchmark.options import GRPO, GRPOOptions
from rlg.benchmark.phases import REST, Phases
from rlg.benchmark.timing import Times
from rlg.cli import check_new, fail_cleanly
from rlg.io import tables
from rlg.models.loading import DTYPES, device_of
from rlg.models.policy import Policy
from rlg.prompts import Prompt, spread
from rlg.stats import Estimate
from rlg.tasks import prompt_sets
from trainers.benchmark.plain_grpo import PlainGRPO
from trainers.grpo import GRPOConfig, GRPOTrainer

PHASES = ("text encoding", "denoising", "decoding", "reward", "forward-backward", "optimizer")
PLAIN, TRAINER, TOGETHER, ROLLOUTS, COMPILED = "plain", "trainer", "steps together", "large rollouts", "compiled"


def phases(policy: Policy) -> Phases:
    """Make a clock for the phases of an iteration."""
    return Phases(policy.device, time.process_time if policy.device.type == "cpu" else time.perf_counter)


class MeasuredTrainer(GRPOTrainer):
    """The trainer with an existing policy, and a clock in its phases."""

    def __init__(self, config: GRPOConfig, policy: Policy, reward: RewardMix, prompts: Sequence[Prompt]):
        engine = Accelerator(cpu=policy.device.type == "cpu")
        super().__init__(config, policy=policy, reward=reward, prompts=prompts, accelerator=engine)
        self.phases = phases(policy)
        places = {
            "text encoding": [(self, "encoded")],
            "denoising": [(self, "rollout")],
            "decoding": [(self, "decode")],
            "reward": [(self, "score")],
            "forward-backward": [(self, "update")],
            "optimizer": [
                (self.accelerator, "clip_grad_norm_"),
                (self.state.optimizer, "step"),
                (self.state.optimizer, "zero_grad"),
            ],
        }
        for name, owners in places.items():
            for owner, attribute in owners:
                setattr(owner, attribute, self.phases.wrap(name, getattr(owner, attribute)))


@dataclass(frozen=True)
class Contender:
    """A contender: an iteration, and the clock that it runs by."""

    iteration: Callable[[], Any]
    phases: Phases
    rounds: list[dict[str, float]]  # seconds by phase, for each iteration

    def run(self) -> None:
        """Run one iteration."""
        self.rounds.append(self.phases.whole(self.iteration))


class Bench:
    """Contenders of one batch size, made on demand.

    All but the compiled one share a policy.
    """

    def __init__(self, options: GRPOOptions, batch: int, reward: RewardMix, prompts: Sequence[Prompt]):
        self.options, self.batch, self.reward, self.prompts = options, batch, reward, prompts

    @property
    def names(self) -> list[str]:
        """Names of the contenders that differ at this batch size."""
        images = self.options.num_prompts * self.options.num_generations
        names = [PLAIN, TRAINER]
        names += [TOGETHER] if len(self._steps) > 1 else []
        names += [ROLLOUTS] if images > self.batch else []
        return names + ([COMPILED] if self.options.compile else [])

    @cached_property
    def _policy(self) -> Policy:
        return policy_with_lora(self.options)

    @cached_property
    def _trainer(self) -> MeasuredTrainer:
        return MeasuredTrainer(self.config(), self._policy, self.reward, self.prompts)

    @property
    def _steps(self) -> list[int]:
        return self._trainer._schedule(torch.Generator())[1]

    def config(self, **changes: Any) -> GRPOConfig:
        """The trainer's options, as the command line gives them."""
        options = self.options
        given = {
            "base": options.arch or options.base,
            "name": "benchmark",
            "reward": [options.reward],
            "prompts": options.prompts,
            "resolution": options.resolution,
            "dtype": options.dtype,
            "lora_rank": options.lora_rank,
            "lora_alpha": 2 * options.lora_rank,
            "num_prompts": options.num_prompts,
            "num_generations": options.num_generations,
            "batch_size": self.batch,
            "steps": options.steps,
            "num_train_steps": options.num_train_steps,
            "cfg": options.cfg,
            "beta": options.beta,
            "gradient_checkpointing": options.gradient_checkpointing,
            "learning_rate": 1e-4,
            "ema_decay": 0.0,
        }
        return GRPOConfig(**given | changes)

    def contender(self, name: str) -> Contender:
        """Make a contender."""
        if name == PLAIN:
            plain = PlainGRPO(self.config(), self._policy, self.reward, self.prompts, phases(self._policy))
            work = samples_of(self._trainer)
            return Contender(lambda: plain.iteration(*work), plain.phases, [])
        images = self.options.num_prompts * self.options.num_generations
        options: dict[str, dict[str, Any]] = {
            TRAINER: {},
            TOGETHER: {"update_batch_size": self.batch * len(self._steps)},
            ROLLOUTS: {"batch_size": images, "update_batch_size": self.batch},
            COMPILED: {"compile": True},
        }
        policy = policy_with_lora(self.options) if name == COMPILED else self._policy
        trainer = MeasuredTrainer(self.config(**options[name]), policy, self.reward, self.prompts)
        return Contender(trainer.iteration, trainer.phases, [])


def samples_of(trainer: GRPOTrainer) -> tuple[Any, Any, list[int]]:
    """Samples of a trainer's next iteration, for the plain one.

    Returns (identities of the samples of each batch, schedule, steps to train).
    """
    generator = torch.Generator().manual_seed(trainer.iteration_seed())
    schedule, steps = trainer._schedule(generator)
    return [part.noise.ids for part in trainer.parts(generator)], schedule, steps


@dataclass(frozen=True)
class Result:
    """One contender at one batch size."""

    name: str
    batch: int
    seconds: float  # median of an iteration
    phases: dict[str, float]  # medians of its phases
    images_per_second: float
    speedup: Estimate | None  # over plain; None for plain itself
    wall_speedup: Estimate | None  # the same by the wall clock
    utilisation: float  # share of the peak of a matrix product
    working_bytes: int  # bytes at the peak of an iteration, above those held before it


def compare(bench: Bench, repeats: int, device: str, peak: float) -> list[Result]:
    """Measure all contenders of a batch size."""
    sides = {name: bench.contender(name) for name in bench.names}
    times = timing.interleaved({name: side.run for name, side in sides.items()}, repeats, device)
    operations = {name: flops.flops(side.iteration) for name, side in sides.items() if name != COMPILED}
    operations[COMPILED] = operations[TRAINER]
    images = bench.options.num_prompts * bench.options.num_generations
    results = []
    for name, side in sides.items():
        seconds = stats.median(flops.seconds_by_round(times[name], device)).mean
        results.append(
            Result(
                name,
                bench.batch,
                seconds,
                _medians(side.rounds[-repeats:]),
                images / seconds,
                *(None if name == PLAIN else faster for faster in _speedups(times[name], times[PLAIN], device)),
                flops.utilisation(operations[name], seconds, peak),
                peak_allocated(side.iteration, device),
            )
        )
    return results


def _speedups(times: Times, plain: Times, device: str) -> tuple[Estimate, Estimate]:
    return (
        timing.ratio(flops.seconds_by_round(plain, device), flops.seconds_by_round(times, device)),
        timing.ratio(plain.wall_R, times.wall_R),
    )


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: stats.median([row.get(name, 0.0) for row in rounds]).mean for name in (*PHASES, REST)}


def table(results: Sequence[Result]) -> str:
    """Results as a table in Markdown."""
    heads = ["contender", "batch", "s", *PHASES, REST, "images/s", "faster", "wall", "FLOP util.", "MB"]
    rows = []
    for r in results:
        phases = [f"{r.phases.get(name, 0.0):.3g}" for name in (*PHASES, REST)]
        numbers = [r.name, str(r.batch), f"{r.seconds:.3g}", *phases, f"{r.images_per_second:.3g}"]
        numbers += [_estimate(r.speedup), _estimate(r.wall_speedup), f"{r.utilisation:.1%}"]
        rows.append([*numbers, f"{r.working_bytes / 1e6:.0f}"])
    return tables.markdown(heads, rows)


def _estimate(value: Estimate | None) -> str:
    return "1" if value is None else f"{value:.2f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with fail_cleanly():
        run(GRPO.parse(argv))


def run(options: GRPOOptions) -> None:
    """Measure, print and, with --output, write."""
    import rewards

    if options.dtype == "float16":
        raise ValueError("--dtype float16 needs a gradient scaler, which is not measured here; take bfloat16")
    options = replace(options, device=device_of(options.device))
    check_new(options.output, options.overwrite)
    everything = prompt_sets.load(options.prompts)
    chosen = [everything[i] for i in spread(everything, options.num_prompts)]
    reward = rewards.build([options.reward], device=options.device)
    peak = flops.matmul_peak(DTYPES[options.dtype], options.device)
    results = []
    for batch in options.batch_sizes:
        results += compare(Bench(options, batch, reward, chosen), options.repeats, options.device, peak)
    where = timing.machine(options.device) | {"dtype": options.dtype, "matmul_peak_gflops": round(peak / 1e9, 1)}
    rates = {r.batch: r.images_per_second for r in results if r.name == TRAINER}
    print(table(results), flops.saturation(TRAINER, rates), json.dumps(where), sep="\n\n")
    if options.output:
        options.output.write_text(json.dumps({"machine": where, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
