"""What a GRPO iteration costs, by phase, side by side with one written the plain way (`trainers.benchmark_reference`).

    python -m rlg.benchmark grpo --model tiny-sd3
    python -m rlg.benchmark grpo --arch sd35-medium --resolution 512 --device cuda --compile --batch_sizes 1 2 4 8

Contenders make the same images and take the same optimizer step:

    plain            as the public scripts do it
    trainer          `trainers.grpo` with the same settings
    steps together   ... with all trained steps of a batch in one pass of the update (--update_batch_size)
    large rollouts   ... with all images in one batch of the rollout, and passes of the update as large as before
    compiled         (--compile) the trainer on a network that torch.compile made

They take turns in one process; ratios are medians over rounds, with intervals. On a CPU all seconds but those of the
column "wall" are the process's own, which other processes hardly touch. Memory is what tensors hold at the peak of an
iteration, above what they held before it (weights, the optimizer's state). An iteration's prompts are always the same
ones: text encodings that are kept are all found.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from rewards import RewardMix
from rlg import flops, measure
from rlg import prompts as prompt_sets
from rlg.allocations import peak_allocated
from rlg.benchmark_growth import add_model_arguments, policy_with_lora
from rlg.cli import Parser, fail_cleanly
from rlg.measure import Times
from rlg.phases import REST, Phases
from rlg.policy import DTYPES, Policy
from rlg.prompts import Prompt
from rlg.stats import Estimate
from trainers import common
from trainers.benchmark_reference import PlainGRPO
from trainers.grpo import GRPOConfig, GRPOTrainer

PHASES = ("text encoding", "denoising", "decoding", "reward", "forward-backward", "optimizer")
PLAIN, TRAINER, TOGETHER, ROLLOUTS, COMPILED = "plain", "trainer", "steps together", "large rollouts", "compiled"


def phases(policy: Policy) -> Phases:
    """A clock for the phases of an iteration."""
    return Phases(policy.device, time.process_time if policy.device.type == "cpu" else time.perf_counter)


class MeasuredTrainer(GRPOTrainer):
    """The trainer, with a policy that is there already, and with a clock in its phases."""

    def __init__(self, config: GRPOConfig, policy: Policy, reward: RewardMix, prompts: Sequence[Prompt]):
        self.given = policy
        super().__init__(config, reward, prompts, accelerator=Accelerator(cpu=policy.device.type == "cpu"))
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

    def prepare(self) -> Any:
        """The policy that was given."""
        return common.prepare_policy(self.config, self.accelerator, policy=self.given)


@dataclass(frozen=True)
class Side:
    """A contender: an iteration, and the clock that it runs by."""

    iteration: Callable[[], Any]
    phases: Phases
    rounds: list[dict[str, float]]  # seconds by phase of every iteration

    def run(self) -> None:
        """One iteration."""
        self.rounds.append(self.phases.whole(self.iteration))


class Bench:
    """Contenders of one batch size, made when they are asked for; the eager ones share one policy."""

    def __init__(self, args: argparse.Namespace, batch: int, reward: RewardMix, prompts: Sequence[Prompt]):
        self.args, self.batch, self.reward, self.prompts = args, batch, reward, prompts

    @property
    def names(self) -> list[str]:
        """The contenders that differ from one another at this batch size."""
        images = self.args.num_prompts * self.args.num_generations
        names = [PLAIN, TRAINER]
        names += [TOGETHER] if len(self._steps) > 1 else []
        names += [ROLLOUTS] if images > self.batch else []
        return names + ([COMPILED] if self.args.compile else [])

    @cached_property
    def _policy(self) -> Policy:
        return policy_with_lora(self.args)

    @cached_property
    def _trainer(self) -> MeasuredTrainer:
        return MeasuredTrainer(self.config(), self._policy, self.reward, self.prompts)

    @property
    def _steps(self) -> list[int]:
        return self._trainer._schedule(torch.Generator())[1]

    def config(self, **options: Any) -> GRPOConfig:
        """The trainer's options, as the command line gives them."""
        args = self.args
        given = {
            "model": args.arch or args.model,
            "name": "benchmark",
            "reward": [args.reward],
            "prompts": args.prompts,
            "resolution": args.resolution,
            "dtype": args.dtype,
            "lora_rank": args.lora_rank,
            "lora_alpha": 2 * args.lora_rank,
            "num_prompts": args.num_prompts,
            "num_generations": args.num_generations,
            "per_device_batch_size": self.batch,
            "num_steps": args.num_steps,
            "num_train_steps": args.num_train_steps,
            "guidance_scale": args.guidance_scale,
            "beta": args.beta,
            "gradient_checkpointing": args.gradient_checkpointing,
            "learning_rate": 1e-4,
            "ema_decay": 0.0,
        }
        return GRPOConfig(**given | options)

    def side(self, name: str) -> Side:
        """A contender."""
        if name == PLAIN:
            plain = PlainGRPO(self.config(), self._policy, self.reward, self.prompts, phases(self._policy))
            work = samples_of(self._trainer)
            return Side(lambda: plain.iteration(*work), plain.phases, [])
        images = self.args.num_prompts * self.args.num_generations
        options: dict[str, dict[str, Any]] = {
            TRAINER: {},
            TOGETHER: {"update_batch_size": self.batch * len(self._steps)},
            ROLLOUTS: {"per_device_batch_size": images, "update_batch_size": self.batch},
            COMPILED: {"compile": True},
        }
        policy = policy_with_lora(self.args) if name == COMPILED else self._policy
        trainer = MeasuredTrainer(self.config(**options[name]), policy, self.reward, self.prompts)
        return Side(trainer.iteration, trainer.phases, [])


def samples_of(trainer: GRPOTrainer) -> tuple[Any, Any, list[int]]:
    """(identities of the samples of each batch, schedule, steps to train) of a trainer's next iteration."""
    generator = torch.Generator().manual_seed(trainer.iteration_seed())
    schedule, steps = trainer._schedule(generator)
    return [part.noise.ids for part in trainer.parts(generator)], schedule, steps


@dataclass(frozen=True)
class Result:
    """One contender at one batch size."""

    name: str
    batch: int
    seconds: float  # of an iteration, the median
    phases: dict[str, float]  # its parts, medians
    images_per_second: float
    speedup: Estimate | None  # over plain; None for plain itself
    wall_speedup: Estimate | None  # the same by the wall clock
    utilisation: float  # of the peak of a matrix product
    working_bytes: int  # at the peak of an iteration, above what was held before it


def compare(bench: Bench, repeats: int, device: str, peak: float) -> list[Result]:
    """All contenders of a batch size."""
    sides = {name: bench.side(name) for name in bench.names}
    times = measure.interleaved({name: side.run for name, side in sides.items()}, repeats, device)
    operations = {name: flops.flops(side.iteration) for name, side in sides.items() if name != COMPILED}
    operations[COMPILED] = operations[TRAINER]
    images = bench.args.num_prompts * bench.args.num_generations
    results = []
    for name, side in sides.items():
        seconds = measure.median(flops.seconds_by_round(times[name], device)).mean
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
        measure.ratio(flops.seconds_by_round(plain, device), flops.seconds_by_round(times, device)),
        measure.ratio(plain.wall_R, times.wall_R),
    )


def _medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: measure.median([row.get(name, 0.0) for row in rounds]).mean for name in (*PHASES, REST)}


def table(results: Sequence[Result]) -> str:
    """Markdown."""
    heads = ["contender", "batch", "s", *PHASES, REST, "images/s", "faster", "wall", "FLOP util.", "MB"]
    rows = [heads]
    for r in results:
        phases = [f"{r.phases.get(name, 0.0):.3g}" for name in (*PHASES, REST)]
        numbers = [r.name, str(r.batch), f"{r.seconds:.3g}", *phases, f"{r.images_per_second:.3g}"]
        numbers += [_estimate(r.speedup), _estimate(r.wall_speedup), f"{r.utilisation:.1%}"]
        rows.append([*numbers, f"{r.working_bytes / 1e6:.0f}"])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _estimate(value: Estimate | None) -> str:
    return "1" if value is None else f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"


def _parser() -> Parser:
    parser = Parser(prog="python -m rlg.benchmark grpo", description=__doc__, formatter_class=_FORMAT)
    add_model_arguments(parser)
    parser.add_argument("--reward", default="jpeg_compressibility")
    parser.add_argument("--prompts", default="tinyworld:composition/train")
    parser.add_argument("--num_prompts", type=int, default=4)
    parser.add_argument("--num_generations", type=int, default=8)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8], help="images a batch")
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--num_train_steps", type=int, help="(default: all but the last)")
    parser.add_argument("--guidance_scale", type=float, default=4.5)
    parser.add_argument("--beta", type=float, default=0.04)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true", help="also the trainer under torch.compile")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="a .json file for the numbers")
    return parser


_FORMAT = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    with fail_cleanly():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure, print and, with --output, write."""
    import rewards

    if args.dtype == "float16":
        raise ValueError("--dtype float16 needs a gradient scaler, which is not measured here; take bfloat16")
    everything = prompt_sets.load(args.prompts)
    chosen = [everything[i] for i in prompt_sets.spread(everything, args.num_prompts)]
    reward = rewards.build([args.reward], device=args.device)
    peak = flops.matmul_peak(DTYPES[args.dtype], args.device)
    results = []
    for batch in args.batch_sizes:
        results += compare(Bench(args, batch, reward, chosen), args.repeats, args.device, peak)
    where = measure.machine(args.device) | {"dtype": args.dtype, "matmul_peak_gflops": round(peak / 1e9, 1)}
    rates = {r.batch: r.images_per_second for r in results if r.name == TRAINER}
    print(table(results), flops.saturation(TRAINER, rates), json.dumps(where), sep="\n\n")
    if args.output:
        args.output.write_text(json.dumps({"machine": where, "results": [asdict(r) for r in results]}, indent=1))


if __name__ == "__main__":
    main()
