"""Runs of an equivalence experiment: samples, scores, analysis, files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib

from rewards import RewardMix
from rlg.distributed import Interruption
from rlg.equivalence.analysis import analyse
from rlg.equivalence.experiment import Experiment
from rlg.equivalence.tables import markdown
from rlg.evaluation.evaluator import EvalSettings, Evaluator, evaluate, progress, units_left
from rlg.evaluation.folder import merge, prepare_folder
from rlg.evaluation.rows import Row, read_rows
from rlg.io.run_folder import ROWS
from rlg.models import fingerprint
from rlg.models.policy import Policy
from rlg.models.tuned_model import TunedModel, resolve
from rlg.prompts import Prompt, columns, spread
from rlg.tasks import prompt_sets


def draw_rows(
    experiment: Experiment, reward: RewardMix, prompts: Sequence[Prompt], ids: Sequence[int], folder: Path
) -> tuple[list[Row], list[Row], list[list[Row]]]:
    """Make the rows that are missing from the folder, and read all.

    Returns (rows of the base, of guidance, of each other model).
    """
    from rewards import places

    guided = experiment.settings(experiment.w, experiment.k, experiment.seed)
    jobs: list[tuple[str, TunedModel | None, EvalSettings]] = [
        ("base", None, experiment.settings([0.0], experiment.samples, experiment.seed + 1)),
        ("guided", resolve(experiment.ckpt), guided),
    ]
    single = experiment.settings([1.0], experiment.k, experiment.seed)
    jobs += [(f"trained-{i}", resolve(str(model["ckpt"])), single) for i, model in enumerate(experiment.trained)]
    for name, tuned, settings in jobs:
        own = {k: v for k, v in asdict(settings).items() if k not in ("scales", "methods", "batch_size")}
        meta = {
            "base": experiment.base,
            "adapter": tuned.path if tuned else "none",
            "trained_rewards": [experiment.reward],
            **own,
        }
        meta |= {"prompts": experiment.prompts, "num_prompts": len(ids), "dtype": experiment.dtype}
        models = places([experiment.reward])
        meta |= fingerprint.record({"adapter": tuned and tuned.digest}, experiment.base, {"prompts": prompts}, models)
        prepare_folder(folder / name, meta, overwrite=False)
        merge(folder / name)
    left = sum(len(unit) for name, _, settings in jobs for unit in units_left(settings, folder / name, ids))
    result = []
    with Interruption() as interruption, progress(left) as bar:
        for name, tuned, settings in jobs:
            policy = Policy.load(experiment.base, experiment.dtype)
            if tuned:
                policy.load_tuned(tuned)
            evaluator = Evaluator(policy, reward, prompts, settings)
            evaluate(evaluator, folder / name, ids, lambda job: False, bar=bar, interruption=interruption)
            merge(folder / name)
            interruption.leave()
            result.append(read_rows(folder / name / ROWS))
    return result[0], result[1], result[2:]


def measure(experiment: Experiment, reward: RewardMix, folder: Path) -> list[Path]:
    """Run an experiment; write equivalence.json, .md and .png into the folder.

    Returns the files.
    """
    from rlg.equivalence.figure import draw
    from rlg.reports.theme import STYLE

    (prompts,) = prompt_sets.load_each([experiment.prompts], experiment.prompt_column)
    ids = spread(prompts, experiment.num_prompts)
    reward.check(*columns([prompts[i] for i in ids]))
    result = analyse(experiment, *draw_rows(experiment, reward, prompts, ids, folder))
    record = _finite({"experiment": experiment.as_dict(), **asdict(result)})
    written = [folder / f"equivalence.{kind}" for kind in ("json", "md", "png")]
    written[0].write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    written[1].write_text(markdown(experiment, result))
    with matplotlib.rc_context(STYLE):
        draw(experiment, result).savefig(written[2], dpi=150)
    return written


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not know by null.

    They are beta / w at w = 0, and a share of no gap.
    """
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
