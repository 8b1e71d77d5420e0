"""How the cost of an evaluation grows: with prompts, with scales w, and with processes.

    python -m rlg.benchmark growth --model tiny-sd3

Cost should be a fixed part and a part for each image: a line through the measured costs says by how much they leave
it at most. Memory should not grow at all: images are scored, written and let go in units of a batch, and what remains
of an image is its row, some 0.5 kB where all rows are read at once (the report). A network's weights are random but
for the base: cost does not depend on them. On a CPU seconds are the process's own; a process more is timed by the
wall clock besides, which says something only where there is a core for each.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from rewards import RewardMix
from rlg import measure
from rlg import prompts as prompt_sets
from rlg.allocations import peak_allocated
from rlg.architectures import ARCHITECTURES, random_policy
from rlg.cli import Parser, fail_cleanly
from rlg.eval_folder import merge
from rlg.evaluator import RLG, EvalSettings, Evaluator, evaluate
from rlg.flops import seconds_by_round
from rlg.policy import DTYPES, Policy

LINEAR = 0.05  # costs that leave the line by no more than this share are linear


@dataclass(frozen=True)
class Line:
    """cost = fixed + per_unit * x, and the largest share by which a measured cost differs from it."""

    fixed: float
    per_unit: float
    worst: float

    @property
    def linear(self) -> bool:
        """Whether the costs lie on it, within 5%."""
        return self.worst <= LINEAR


def fit(x: ArrayLike, cost: ArrayLike) -> Line:
    """The line whose relative errors are least in squares.

    Raises ValueError for less than three different x: two lie on a line whatever they are.
    """
    x_N, cost_N = np.asarray(x, dtype=np.float64), np.asarray(cost, dtype=np.float64)
    if len(np.unique(x_N)) < 3:
        raise ValueError(f"a line needs at least three different sizes, got {x_N.tolist()}")
    design_N2 = np.stack([np.ones_like(x_N), x_N], axis=1) / cost_N[:, None]
    fixed, per_unit = np.linalg.lstsq(design_N2, np.ones_like(x_N), rcond=None)[0]
    return Line(float(fixed), float(per_unit), float(np.abs((fixed + per_unit * x_N) / cost_N - 1).max()))


@dataclass(frozen=True)
class Growth:
    """Cost against one size."""

    of: str  # prompts, or scales
    sizes: list[int]
    seconds: list[float]  # of an evaluation, medians
    line: Line
    working_bytes: tuple[int, int]  # held by tensors at the peak, above the weights; of the smallest and the largest
    resident_bytes: tuple[int | None, int | None]  # of the process at the peak


def policy_with_lora(args: argparse.Namespace) -> Policy:
    """--arch or --model with a LoRA that is not zero. Raises ValueError for a model that is not there."""
    if args.arch:
        return random_policy(args.arch, args.dtype, args.device, args.lora_rank, t5=not args.no_t5)
    policy = Policy.load(args.model, args.dtype, args.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in policy.add_lora(args.lora_rank, 2 * args.lora_rank):
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.01)
    return policy


def add_model_arguments(parser: Parser) -> None:
    """What `policy_with_lora` reads."""
    parser.add_argument("--model", default="tiny-sd3", help="tiny-sd, tiny-sd3, tiny-sdxl, a folder or a hub id")
    parser.add_argument("--arch", choices=sorted(ARCHITECTURES), help="instead: an architecture with random weights")
    parser.add_argument("--no_t5", action="store_true", help="an architecture without its third text encoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    parser.add_argument("--resolution", type=int, help="image side in pixels (default: the model's own)")
    parser.add_argument("--lora_rank", type=int, default=32)


class Bench:
    """Evaluations of any size, of one model."""

    def __init__(self, args: argparse.Namespace):
        import rewards

        self.args = args
        self.prompts = prompt_sets.load(args.prompts)
        self.reward: RewardMix = rewards.build([args.reward], device=args.device)
        self.policy = policy_with_lora(args)

    def evaluate(self, prompts: int, scales: int, rank: int = 0, world: int = 1) -> None:
        """Make, score and write the images of some prompts at some w, each a blend of two passes."""
        if prompts > len(self.prompts):
            raise ValueError(f"{self.args.prompts} holds {len(self.prompts)} prompts, and {prompts} are asked for")
        args = self.args
        settings = EvalSettings(
            scales=tuple(1 + (i + 1) / 10 for i in range(scales)),
            modes=(RLG,),
            steps=args.num_steps,
            sampler="ode",
            level=0.0,
            cfg=args.guidance_scale,
            resolution=args.resolution,
            k=1,
            seed=0,
            batch_size=args.batch_size,
        )
        evaluator = Evaluator(self.policy, self.reward, self.prompts, settings)
        with TemporaryDirectory() as folder, tqdm(disable=True) as bar:
            evaluate(evaluator, Path(folder), range(prompts), lambda job: False, rank, world, bar)
            merge(Path(folder))

    def grow(self, of: str, sizes: Sequence[int], run: Callable[[int], None]) -> Growth:
        """Cost and memory of runs of some sizes."""
        args = self.args
        times = measure.interleaved({str(size): partial(run, size) for size in sizes}, args.repeats, args.device)
        seconds = [measure.median(seconds_by_round(row, args.device)).mean for row in times.values()]
        ends = (partial(run, min(sizes)), partial(run, max(sizes)))
        resident = tuple(measure.peak_memory(end, args.device) for end in ends)
        working = tuple(peak_allocated(end, args.device) for end in ends)
        return Growth(of, list(sizes), seconds, fit(sizes, seconds), working, resident)


def share(args: argparse.Namespace, prompts: int, scales: int, rank: int, world: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one process's share, after a first image; the body of a process."""
    torch.set_num_threads(1)
    bench = Bench(args)
    bench.evaluate(1, 1)
    return measure.stopwatch(partial(bench.evaluate, prompts, scales, rank, world), args.device)


def processes(args: argparse.Namespace, worlds: Sequence[int]) -> dict[int, list[tuple[float, float]]]:
    """(wall, CPU) seconds of every process, by how many there are; all of them have one thread."""
    prompts, scales = args.num_prompts * max(args.growth), args.scales[0]
    found = {}
    for world in worlds:
        with ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(share, args, prompts, scales, rank, world) for rank in range(world)]
            found[world] = [job.result() for job in jobs]
    return found


def shown(growth: Growth) -> str:
    """Markdown: a table and what it means."""
    costs = [f"{s:.3g}" for s in growth.seconds]
    rows = [[growth.of, *map(str, growth.sizes)], ["---"] * (len(costs) + 1), ["s", *costs]]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    line, working, resident = growth.line, growth.working_bytes, growth.resident_bytes
    verdict = "linear within 5%" if line.linear else "NOT linear"
    text += (
        f"\n\n{line.fixed:.3g} s + {line.per_unit:.3g} s each, off by {line.worst:.1%} at most: {verdict}. Tensors "
    )
    text += f"hold {working[0] / 1e6:.1f} MB at the smallest and {working[1] / 1e6:.1f} MB at the largest size"
    if None not in resident:
        text += f", the process {resident[0] / 1e6:.0f} and {resident[1] / 1e6:.0f} MB"
    return text + "."


def shown_processes(found: Mapping[int, Sequence[tuple[float, float]]]) -> str:
    """Markdown: a row for each number of processes."""
    one = found[min(found)]
    lines = ["| processes | s until the last is done | CPU s of all | faster |", "| --- | --- | --- | --- |"]
    for world, rows in found.items():
        wall, cpu = max(wall for wall, _ in rows), sum(cpu for _, cpu in rows)
        lines.append(f"| {world} | {wall:.3g} | {cpu:.3g} | {max(wall for wall, _ in one) / wall:.2f} |")
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(
        prog="python -m rlg.benchmark growth",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_arguments(parser)
    parser.add_argument("--reward", default="jpeg_compressibility")
    parser.add_argument("--prompts", default="tinyworld:composition/test")
    parser.add_argument("--num_prompts", type=int, default=4, help="of the smallest evaluation")
    parser.add_argument("--growth", type=int, nargs="+", default=[1, 2, 5, 10], help="how many times as many prompts")
    parser.add_argument(
        "--scales", type=int, nargs="+", default=[2, 4, 8], help="how many w; the first is for prompts"
    )
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_steps", type=int, default=10)
    parser.add_argument("--guidance_scale", type=float, default=1.0)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2], help="numbers of processes to compare")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a .json file for the numbers")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = _parser().parse_args(argv)
    with fail_cleanly():
        run(args)


def run(args: argparse.Namespace) -> None:
    """Measure, print and, with --output, write."""
    for name in ("growth", "scales"):
        fit(getattr(args, name), np.ones(len(getattr(args, name))))  # too few sizes are refused before anything runs
    bench = Bench(args)
    sizes = [args.num_prompts * factor for factor in args.growth]
    grown = [
        bench.grow("prompts", sizes, lambda n: bench.evaluate(n, args.scales[0])),
        bench.grow("scales", args.scales, lambda n: bench.evaluate(args.num_prompts, n)),
    ]
    where = measure.machine(args.device) | {"dtype": args.dtype}
    print(*map(shown, grown), sep="\n\n")
    found = processes(args, args.processes) if args.processes else {}
    if found:
        print("", shown_processes(found), sep="\n")
    print("", json.dumps(where), sep="\n")
    if args.output:
        row: dict[str, Any] = {"machine": where, "growth": [asdict(g) for g in grown], "processes": found}
        args.output.write_text(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
