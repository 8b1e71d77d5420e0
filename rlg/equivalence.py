"""Does guidance with w play the KL coefficient beta / w?

    python -m rlg.equivalence --toy                                                  # laws that are known exactly
    python -m rlg.equivalence --config configs/equivalence/tiny_sd3_compressibility.yaml

The second draws many images of the base, whose rewards say what the exact optimum of every beta would score
(`rlg.oracle`), then images of one tuned model guided with several w, and of others trained at betas of their own; it
goes on where it was interrupted. It reports, with intervals, how far guidance with w misses the oracle at beta / w, as
a share of the gap between base and tuned model: once with the beta that the model was trained at, and once with the
beta whose oracle scores what the tuned model does, which leaves out how well training hit its own target. Models that
were really trained at another beta are held against guidance with w = beta_0 / beta, image by image of one noise.

A guided reward is the base's mean over all its images, plus the paired difference to w = 0 from the same noise.

KL: the oracle's is that of the images. That of guidance is of the sampler's path and bounds it from above.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, get_type_hints

import matplotlib
import numpy as np

from rewards import RewardMix
from rlg import prompts as prompt_sets
from rlg import run_lock
from rlg.cli import Parser, fail_cleanly
from rlg.config import check_type, read_yaml
from rlg.eval_folder import ROWS, merge, prepare_folder
from rlg.evaluator import RLG, EvalSettings, Evaluator, evaluate, progress, units_left
from rlg.oracle import Array, Oracle, tilted
from rlg.policy import Policy
from rlg.prompts import Prompt
from rlg.stats import Estimate, Row, read_rows
from rlg.together import Interruption


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A configs/equivalence/*.yaml."""

    base: str
    reward: str
    ckpt: str  # the tuned model that is guided
    beta: float  # the KL coefficient that it was trained at, in units of the reward
    prompts: str = "tinyworld:composition/test"
    num_prompts: int = 24
    samples: int = 512  # of the base, a prompt
    k: int = 64  # images a prompt at each w
    scales: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
    trained: tuple[dict[str, Any], ...] = ()  # other models: ckpt, beta and a name
    steps: int = 10
    sampler: str = "sde"
    level: float = 1.0
    cfg: float = 1.0
    dtype: str = "bfloat16"
    seed: int = 0
    batch_size: int = 128

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not {0.0, 1.0} <= set(self.scales):
            raise ValueError(f"scales must hold 0 and 1, between which errors are measured, got {list(self.scales)}")
        for model in self.trained:
            if not isinstance(model, dict) or set(model) != {"ckpt", "beta", "name"}:
                raise ValueError(f"each of `trained` has ckpt, beta and name, got {model!r}")

    @classmethod
    def read(cls, path: Path, **changes: Any) -> Experiment:
        """From YAML, with the changes that are not None. Raises ValueError for an unknown or a missing key."""
        row = read_yaml(path) | {name: value for name, value in changes.items() if value is not None}
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(row) - set(known))
        if unknown:
            raise ValueError(f"{path}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
        hints = get_type_hints(cls)
        for name, value in row.items():
            check_type(f"{path}: {name}", value, hints[name])
        row = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
        try:
            return cls(**row)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from error

    def settings(self, scales: Sequence[float], k: int, seed: int) -> EvalSettings:
        """What decides the rows of one of its evaluations."""
        return EvalSettings(
            scales=tuple(scales),
            modes=(RLG,),
            steps=self.steps,
            sampler=self.sampler,
            level=self.level,
            cfg=self.cfg,
            resolution=None,
            k=k,
            seed=seed,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Point:
    """Guidance with one w, against the oracle at beta / w."""

    w: float
    beta: float  # the trained beta over w; inf at w = 0
    reward: Estimate  # of guidance
    path_kl: Estimate | None
    oracle: Estimate  # reward at beta / w
    oracle_kl: Estimate  # nats
    ess: float  # effective number of base samples a prompt behind the oracle
    miss: Estimate  # (reward - oracle) / (tuned - base)
    matched: Estimate  # the same, against the oracle at the tuned model's own beta over w
    effective_w: float  # matched beta of the tuned model over that of this point


@dataclass(frozen=True)
class Trained:
    """A model that was trained at a beta of its own, which guidance with w = beta_0 / beta claims to stand in for."""

    name: str
    beta: float
    w: float
    reward: Estimate
    path_kl: Estimate | None
    oracle: Estimate
    ess: float  # of the oracle
    miss: Estimate | None  # (guided with w - this model) / (tuned - base), where that w was run


@dataclass(frozen=True)
class Slope:
    """dE / dKL of the oracle at a beta, or of guidance between two w on the paths' KL: the beta it should equal."""

    beta: float
    slope: Estimate
    ess: float | None = None  # of the oracle


@dataclass(frozen=True)
class Result:
    """An experiment's numbers."""

    points: list[Point]
    trained: list[Trained]
    slopes: list[Slope]
    guided_slopes: list[Slope]  # between neighbouring w, where beta / w is that of their middle
    frontier: list[tuple[float, float, float, float]]  # (beta, reward, KL, ess) along the oracle
    matched_beta: float  # whose oracle scores what the tuned model does; 0 where no sample of the base reaches it
    base: Estimate
    prompts: int


def table_of(rows: Sequence[Row], value: str, w: float) -> Array:
    """(P, K) rewards of the name `value`, or path KLs, of one w; prompts and images in order."""
    chosen = sorted((row for row in rows if row.w == w), key=lambda row: (row.prompt_id, row.k))
    prompts = len({row.prompt_id for row in chosen})
    values = [row.kl if value == "kl" else row.rewards[value] for row in chosen]
    return np.array(values, dtype=np.float64).reshape(prompts, -1)


def analyse(
    experiment: Experiment, base: Sequence[Row], guided: Sequence[Row], trained: Sequence[Sequence[Row]]
) -> Result:
    """Numbers of an experiment from the rows of the base, of guidance, and of each other trained model at w = 1."""
    name, beta = experiment.reward, experiment.beta
    oracle = Oracle(table_of(base, name, 0.0), seed=experiment.seed)
    start = table_of(guided, name, 0.0)
    rewards = {w: oracle.base() + oracle.images(table_of(guided, name, w) - start) for w in experiment.scales}
    gap = rewards[1.0] - oracle.base()
    matched = oracle.matching(float(rewards[1.0][0].mean()))

    def at(w: float, start: float) -> Array:
        if not start:  # no beta does: the tuned model is beyond what the base's samples reach
            return np.full_like(gap, np.nan)
        return oracle.base() if w == 0 or start == float("inf") else oracle.at(start / w)[0]

    def path_kl(rows: Sequence[Row], w: float) -> Estimate | None:
        known = [row for row in rows if row.w == w and row.kl is not None]
        return oracle.estimate(oracle.images(table_of(known, "kl", w))) if known else None

    points = []
    for w in sorted(experiment.scales):
        if w < 0:
            continue
        own = oracle.matching(float(rewards[w][0].mean()))
        points.append(
            Point(
                w=w,
                beta=beta / w if w else float("inf"),
                reward=oracle.estimate(rewards[w]),
                path_kl=path_kl(guided, w),
                oracle=oracle.estimate(at(w, beta)),
                oracle_kl=oracle.estimate(oracle.at(beta / w)[1]) if w else Estimate(0.0, 0.0, 0.0),
                ess=oracle.ess(beta / w) if w else float(oracle.reward_PN.shape[1]),
                miss=oracle.estimate(rewards[w] - at(w, beta), gap),
                matched=oracle.estimate(rewards[w] - at(w, matched), gap),
                effective_w=_ratio(matched, own),
            )
        )
    others = []
    for model, rows in zip(experiment.trained, trained, strict=True):
        own = float(model["beta"])
        reward = oracle.base() + oracle.images(table_of(rows, name, 1.0) - start)
        same = [guided for w, guided in rewards.items() if math.isclose(w, beta / own, rel_tol=1e-6)]
        others.append(
            Trained(
                name=model["name"],
                beta=own,
                w=beta / own,
                reward=oracle.estimate(reward),
                path_kl=path_kl(rows, 1.0),
                oracle=oracle.estimate(oracle.at(own)[0]),
                ess=oracle.ess(own),
                miss=oracle.estimate(same[0] - reward, gap) if same else None,
            )
        )
    betas = [beta * factor for factor in (4.0, 2.0, 1.0, 1 / 1.5, 1 / 2, 1 / 3)]
    slopes = [Slope(b, oracle.slope(b), oracle.ess(b)) for b in betas]
    spent = {w: oracle.images(table_of(guided, "kl", w)) for w in rewards if points[0].path_kl and w >= 0}
    steps = [
        Slope(2 * beta / (a + b), oracle.estimate(rewards[b] - rewards[a], spent[b] - spent[a]))
        for a, b in pairwise(sorted(spent))
    ]
    near = [each for each in (beta, matched) if 0 < each < math.inf]
    grid = np.geomspace(20 * max(near), 0.2 * min(near), 41)
    frontier = [(float(b), *(float(values.mean()) for values in tilted(oracle.reward_PN, b))) for b in grid]
    return Result(
        points, others, slopes, steps, frontier, matched, oracle.estimate(oracle.base()), len(oracle.reward_PN)
    )


def _ratio(matched: float, own: float) -> float:
    """The beta of the tuned model over that of a guided one; nan where the first is out of the samples' reach."""
    if not matched:
        return math.nan
    return matched / own if own else math.inf


def draw_rows(
    experiment: Experiment, reward: RewardMix, prompts: Sequence[Prompt], ids: Sequence[int], folder: Path
) -> tuple[list[Row], list[Row], list[list[Row]]]:
    """(rows of the base, of guidance, of each other model), making what is missing from the folder."""
    guided = experiment.settings(experiment.scales, experiment.k, experiment.seed)
    jobs: list[tuple[str, str | None, EvalSettings]] = [
        ("base", None, experiment.settings([0.0], experiment.samples, experiment.seed + 1)),
        ("guided", experiment.ckpt, guided),
    ]
    single = experiment.settings([1.0], experiment.k, experiment.seed)
    jobs += [(f"trained-{i}", str(model["ckpt"]), single) for i, model in enumerate(experiment.trained)]
    for name, ckpt, settings in jobs:
        own = {k: v for k, v in asdict(settings).items() if k not in ("scales", "modes", "batch_size")}
        meta = {"base": experiment.base, "adapter": ckpt or "none", "trained_rewards": [experiment.reward], **own}
        meta |= {"prompts": experiment.prompts, "num_prompts": len(ids), "dtype": experiment.dtype}
        prepare_folder(folder / name, meta, overwrite=False)
        merge(folder / name)
    left = sum(len(unit) for name, _, settings in jobs for unit in units_left(settings, folder / name, ids))
    result = []
    with Interruption() as interruption, progress(left) as bar:
        for name, ckpt, settings in jobs:
            policy = Policy.load(experiment.base, experiment.dtype)
            if ckpt:
                policy.load_tuned(ckpt)
            evaluator = Evaluator(policy, reward, prompts, settings)
            evaluate(evaluator, folder / name, ids, lambda job: False, bar=bar, interruption=interruption)
            merge(folder / name)
            interruption.leave()
            result.append(read_rows(folder / name / ROWS))
    return result[0], result[1], result[2:]


def markdown(experiment: Experiment, result: Result) -> str:
    """The numbers as tables."""

    def cell(estimate: Estimate | None, form: str = ".3f") -> str:
        if estimate is None or not math.isfinite(estimate.mean):
            return ""
        return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"

    matched = f"the oracle scores what it does at beta = {result.matched_beta:.3g}"
    if not result.matched_beta:
        matched = "no beta of the oracle scores what it does, as the base's samples do not reach that far"
    lines = [
        f"{experiment.reward} on {experiment.base}: {experiment.ckpt}, trained at beta = {experiment.beta:g}; "
        f"{matched}. {result.prompts} prompts, {experiment.k} "
        f"images at each w, {experiment.samples} of the base; {experiment.sampler}, {experiment.steps} steps.",
        "",
        "| w | reward | oracle at beta / w | miss, % of the gap | miss, matched beta | effective w | path KL | KL of "
        "the oracle | ESS |",
        "|" + "---|" * 9,
    ]
    for point in result.points:
        acts_like = f"{point.effective_w:.2f}" if result.matched_beta else ""
        lines.append(
            f"| {point.w:g} | {cell(point.reward)} | {cell(point.oracle)} | {cell(point.miss, '+.0%')} | "
            f"{cell(point.matched, '+.0%')} | {acts_like} | {cell(point.path_kl, '.2f')} | "
            f"{cell(point.oracle_kl, '.2f')} | {point.ess:.0f} |"
        )
    lines += ["", "| oracle's slope at beta | dE / dKL | ESS |", "|---|---|---|"]
    lines += [f"| {s.beta:.3g} | {cell(s.slope, '.4f')} | {s.ess:.0f} |" for s in result.slopes]
    if result.guided_slopes:
        lines += ["", "| guidance, beta / w | dE / dKL of the paths |", "|---|---|"]
        lines += [f"| {s.beta:.3g} | {cell(s.slope, '.4f')} |" for s in result.guided_slopes]
    if result.trained:
        lines += [
            "",
            "| trained | beta | reward | path KL | w | guided with w against it, % of the gap | oracle at its beta "
            "| ESS |",
            "|" + "---|" * 8,
        ]
        lines += [
            f"| {t.name} | {t.beta:g} | {cell(t.reward)} | {cell(t.path_kl, '.2f')} | {t.w:.3g} | "
            f"{cell(t.miss, '+.0%')} | {cell(t.oracle)} | {t.ess:.0f} |"
            for t in result.trained
        ]
    return "\n".join(lines) + "\n"


def measure(experiment: Experiment, reward: RewardMix, folder: Path) -> list[Path]:
    """Run an experiment and write equivalence.json, .md and .png into the folder; returns them."""
    from rlg.equivalence_figure import draw
    from rlg.style import STYLE

    prompts = prompt_sets.load(experiment.prompts)
    ids = prompt_sets.spread(prompts, experiment.num_prompts)
    result = analyse(experiment, *draw_rows(experiment, reward, prompts, ids, folder))
    record = _finite({"experiment": asdict(experiment), **asdict(result)})
    written = [folder / f"equivalence.{kind}" for kind in ("json", "md", "png")]
    written[0].write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    written[1].write_text(markdown(experiment, result))
    with matplotlib.rc_context(STYLE):
        draw(experiment, result).savefig(written[2], dpi=150)
    return written


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON does not know: beta / w at w = 0, a share of no gap."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def build_parser() -> Parser:
    """The command line."""
    parser = Parser(prog="python -m rlg.equivalence", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--toy", action="store_true", help="laws with known scores, against the exact tilted law")
    add("--samples", type=int, help="of each toy law (default: 10000); of the base, a prompt")
    add("--steps", type=int, help="denoising steps (default: 250 for a toy, else the config's)")
    add("--config", type=Path, help="configs/equivalence/NAME.yaml")
    add("--ckpt", help="the tuned model that is guided (default: the config's)")
    add("--seed", type=int)
    add("--output", type=Path, help="folder to write to (default: runs/equivalence/NAME)")
    return parser


def run(args: argparse.Namespace) -> None:
    """Do what the options say and print what was written."""
    import rewards
    from rlg import equivalence_toy

    if args.toy == (args.config is not None):
        raise ValueError("give either --toy or --config FILE")
    if args.toy:
        folder = args.output or Path("runs/equivalence/toy")
        with run_lock.held(folder):
            written = equivalence_toy.run(folder, args.samples or 10_000, args.steps or 250, args.seed or 0)
    else:
        own = {"ckpt": args.ckpt, "samples": args.samples, "steps": args.steps, "seed": args.seed}
        experiment = Experiment.read(args.config, **own)
        folder = args.output or Path("runs/equivalence") / args.config.stem
        with run_lock.held(folder):
            written = measure(experiment, rewards.build([experiment.reward]), folder)
        print(written[1].read_text())
    for path in written:
        print(path)


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = build_parser().parse_args(argv)
    with fail_cleanly():
        run(args)


if __name__ == "__main__":
    main()
