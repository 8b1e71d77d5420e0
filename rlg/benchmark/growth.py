"""Growth of the cost of an evaluation, with prompts, w and processes.

    python -m rlg.benchmark growth --base tiny-sd3

The cost should be a fixed part and a part for each image. A line is fitted to the measured costs, and the largest
distance from it is reported. Memory should not grow: images are scored, written and let go in units of a batch. The
rest of an image is its row, some 0.5 kB where all rows are read at once (the report). Only the base's weights are read
from a file; others are random, because cost does not depend on them. On a CPU seconds are the process's own. Runs of
several processes have wall seconds, too, which mean something only with a core for each process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
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
from rlg import stats
from rlg.benchmark import timing
from rlg.benchmark.allocations import peak_allocated
from rlg.benchmark.architectures import random_policy
from rlg.benchmark.flops import seconds_by_round
from rlg.benchmark.options import GROWTH, GrowthOptions, RandomModelOptions
from rlg.cli import check_new, fail_cleanly
from rlg.evaluation.evaluator import EvalSettings, Evaluator, evaluate
from rlg.evaluation.folder import merge
from rlg.evaluation.methods import RLG
from rlg.io import tables
from rlg.models.loading import device_of
from rlg.models.policy import Policy
from rlg.tasks import prompt_sets

LINEAR = 0.05  # distance from the line, as a share, up to which costs count as linear


@dataclass(frozen=True)
class Line:
    """A line: cost = fixed + per_unit * x.

    worst: the largest share by which a measured cost differs from it.
    """

    fixed: float
    per_unit: float
    worst: float

    @property
    def linear(self) -> bool:
        """Tell whether the costs lie on it, within 5%."""
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
    seconds: list[float]  # median seconds of an evaluation
    line: Line
    # bytes of tensors at the peak, above the weights; of the smallest and the largest size
    working_bytes: tuple[int, int]
    resident_bytes: tuple[int | None, int | None]  # bytes of the process at the peak


def policy_with_lora(options: RandomModelOptions) -> Policy:
    """The model of --arch or --base, with a nonzero LoRA.

    Raises ValueError for a model that is not there.
    """
    if options.arch:
        return random_policy(options.arch, options.dtype, options.device, options.lora_rank, t5=not options.no_t5)
    policy = Policy.load(options.base, options.dtype, options.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for parameter in policy.add_lora(options.lora_rank, 2 * options.lora_rank):
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.01)
    return policy


class Bench:
    """Evaluations of any size, of one model."""

    def __init__(self, options: GrowthOptions):
        import rewards

        self.options = options
        self.prompts = prompt_sets.load(options.prompts)
        self.reward: RewardMix = rewards.build([options.reward], device=options.device)
        self.policy = policy_with_lora(options)

    def evaluate(self, prompts: int, scales: int, rank: int = 0, world: int = 1) -> None:
        """Make, score and write the images of some prompts and w.

        Each image is a blend of two passes.
        """
        if prompts > len(self.prompts):
            raise ValueError(f"{self.options.prompts} holds {len(self.prompts)} prompts, and {prompts} are asked for")
        options = self.options
        settings = EvalSettings(
            scales=tuple(1 + (i + 1) / 10 for i in range(scales)),
            methods=(RLG,),
            steps=options.steps,
            sampler="ode",
            level=0.0,
            cfg=options.cfg,
            resolution=options.resolution,
            k=1,
            seed=0,
            batch_size=options.batch_size,
        )
        evaluator = Evaluator(self.policy, self.reward, self.prompts, settings)
        with TemporaryDirectory() as folder, tqdm(disable=True) as bar:
            evaluate(evaluator, Path(folder), range(prompts), lambda job: False, rank, world, bar)
            merge(Path(folder))

    def grow(self, of: str, sizes: Sequence[int], run: Callable[[int], None]) -> Growth:
        """Cost and memory of runs of some sizes."""
        options = self.options
        times = timing.interleaved({str(size): partial(run, size) for size in sizes}, options.repeats, options.device)
        seconds = [stats.median(seconds_by_round(row, options.device)).mean for row in times.values()]
        ends = (partial(run, min(sizes)), partial(run, max(sizes)))
        resident = tuple(timing.peak_memory(end, options.device) for end in ends)
        working = tuple(peak_allocated(end, options.device) for end in ends)
        return Growth(of, list(sizes), seconds, fit(sizes, seconds), working, resident)


def share(options: GrowthOptions, prompts: int, scales: int, rank: int, world: int) -> tuple[float, float]:
    """(wall, CPU) seconds of one process's share of an evaluation.

    It is the body of a process, and makes an image before the clock starts.
    """
    torch.set_num_threads(1)
    bench = Bench(options)
    bench.evaluate(1, 1)
    return timing.stopwatch(partial(bench.evaluate, prompts, scales, rank, world), options.device)


def processes(options: GrowthOptions, worlds: Sequence[int]) -> dict[int, list[tuple[float, float]]]:
    """(wall, CPU) seconds of every process, by the number of processes.

    Each process has one thread.
    """
    prompts, scales = options.num_prompts * max(options.growth), options.num_w[0]
    found = {}
    for world in worlds:
        with ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(share, options, prompts, scales, rank, world) for rank in range(world)]
            found[world] = [job.result() for job in jobs]
    return found


def shown(growth: Growth) -> str:
    """A table in Markdown, and its meaning in words."""
    costs = [f"{s:.3g}" for s in growth.seconds]
    text = tables.markdown([growth.of, *map(str, growth.sizes)], [["s", *costs]])
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
    """A table in Markdown: a row for each number of processes."""
    one = found[min(found)]
    lines = []
    for world, rows in found.items():
        wall, cpu = max(wall for wall, _ in rows), sum(cpu for _, cpu in rows)
        lines.append([str(world), f"{wall:.3g}", f"{cpu:.3g}", f"{max(wall for wall, _ in one) / wall:.2f}"])
    return tables.markdown(["processes", "s until the last is done", "CPU s of all", "faster"], lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    with fail_cleanly():
        run(GROWTH.parse(argv))


def run(options: GrowthOptions) -> None:
    """Measure, print and, with --output, write."""
    for name in ("growth", "num_w"):
        sizes = getattr(options, name)
        fit(sizes, np.ones(len(sizes)))  # refuses too few sizes before anything runs
    options = replace(options, device=device_of(options.device))
    check_new(options.output, options.overwrite)
    bench = Bench(options)
    sizes = [options.num_prompts * factor for factor in options.growth]
    grown = [
        bench.grow("prompts", sizes, lambda n: bench.evaluate(n, options.num_w[0])),
        bench.grow("scales", options.num_w, lambda n: bench.evaluate(options.num_prompts, n)),
    ]
    where = timing.machine(options.device) | {"dtype": options.dtype}
    print(*map(shown, grown), sep="\n\n")
    found = processes(options, options.processes) if options.processes else {}
    if found:
        print("", shown_processes(found), sep="\n")
    print("", json.dumps(where), sep="\n")
    if options.output:
        row: dict[str, Any] = {"machine": where, "growth": [asdict(g) for g in grown], "processes": found}
        options.output.write_text(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
