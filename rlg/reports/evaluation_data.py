"""One evaluation as reports read it: its settings, rows and summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlg.evaluation import front
from rlg.evaluation.methods import BLEND_METHODS, METHODS, RLG
from rlg.evaluation.rows import Row, read_rows
from rlg.evaluation.summary import Best, best_w, has_base, summarise
from rlg.io.parsing import check_type, read_json
from rlg.io.run_folder import META, ROWS

_META = {  # types of the entries of meta.json that the report uses
    **{"base": str, "adapter": str, "trained_rewards": list[str], "schedule": str},
    **{"experts": list[str], "blend_scale": float},
}


@dataclass(frozen=True)
class Run:
    """An evaluation folder, read and summarised."""

    name: str
    folder: Path
    rows: list[Row]
    summary: dict[str, Any]  # the content of summary.json

    @property
    def sweep(self) -> str:
        """The method that the slider runs over."""
        methods = {point["method"] for point in self.summary["points"]}
        return next((method for method in BLEND_METHODS if method in methods), RLG)

    @property
    def is_blend(self) -> bool:
        """Tell whether w is the weight of the last of two experts."""
        return "pareto" in self.summary

    @property
    def scale(self) -> float:
        """Scale W of a blend; 1 for others."""
        return self.summary["meta"].get("blend_scale", 1.0)

    @property
    def named(self) -> dict[float, str]:
        """Names of models by their w.

        They are base and tuned model, or a blend's experts where its scale is 1.
        """
        meta = self.summary["meta"]
        if self.is_blend:
            return {float(w): name for w, name in enumerate(meta["experts"])} if self.scale == 1 else {}
        return {0.0: "base", 1.0: "tuned"} if has_base(meta) else {1.0: "tuned"}

    @property
    def formula(self) -> tuple[str, str]:
        """Formula of guidance, as text before and after the w."""
        if not self.is_blend:
            return "guided = base + ", " * (tuned - base)"
        a, b = self.summary["meta"]["experts"]
        if self.scale == 1:
            return f"guided = ({a}) + ", f" * (({b}) - ({a}))"
        return f"guided = base + {self.scale:g} * (({a}) - base + ", f" * (({b}) - ({a})))"

    def points(self, method: str) -> list[dict[str, Any]]:
        """The points of a method, by w."""
        return [point for point in self.summary["points"] if point["method"] == method]

    def curve(self, method: str) -> list[dict[str, Any]]:
        """The points of a method's line.

        All methods share those at w = 0 and 1, the base and the tuned model.
        """
        points = self.points(method)
        if METHODS[method].is_blend:
            keys = front.front([(point["method"], point["w"]) for point in self.summary["points"]], method, self.scale)
            points = [point for point in self.summary["points"] if (point["method"], point["w"]) in keys]
        if METHODS[method].ends == RLG and points:
            known = {point["w"] for point in points}
            points += [point for point in self.points(RLG) if point["w"] in self.named.keys() - known]
        return sorted(points, key=lambda point: point["w"])

    def best(self, reward: str) -> Best | None:
        """The w of the highest mean; None with one prompt.

        It is chosen on half of the prompts, and reported on the rest.
        """
        methods = {point["w"]: point["method"] for point in self.curve(self.sweep)}
        sweep = {w: [row for row in self.rows if (row.method, row.w) == (method, w)] for w, method in methods.items()}
        return best_w(sweep, reward, [row for row in self.rows if (row.method, row.w) == (RLG, 1.0)])

    @property
    def steps(self) -> str:
        """The number of denoising steps for a caption, if known."""
        steps = self.summary["meta"].get("steps")
        return "" if steps is None else f"{steps} steps"

    @property
    def under_cfg(self) -> bool:
        """Tell whether classifier-free guidance was on.

        The corrector's weights are then of no law.
        """
        return self.summary["meta"].get("cfg", 1.0) != 1.0


def read_run(folder: Path) -> Run:
    """Read and summarise an evaluation.

    Raises ValueError naming the file that is missing or wrong.
    """
    scores, meta_path = folder / ROWS, folder / META
    for path in (scores, meta_path):
        if not path.is_file():
            raise ValueError(f"{path} does not exist; `python -m rlg.evaluate` writes it")
    meta = read_json(meta_path)
    missing = {"base", "adapter", "trained_rewards"} - meta.keys()
    if missing:
        raise ValueError(f"{meta_path}: missing {', '.join(sorted(missing))}")
    for name in _META.keys() & meta.keys():
        check_type(f"{meta_path}: {name}", meta[name], _META[name])
    if "blend_scale" in meta and len(meta.get("experts", ())) != 2:
        raise ValueError(f"{meta_path}: a blend has two experts")
    rows = read_rows(scores)
    summary = summarise(rows, meta)
    if "blend_scale" in meta:
        summary["pareto"] = front.summarise_front(rows, meta["trained_rewards"], meta["blend_scale"])
    return Run(str(meta.get("name", folder.name)), folder, rows, summary)


def reward_names(runs: Sequence[Run]) -> list[tuple[str, bool]]:
    """(name, is trained) for every reward of the runs, trained ones first.

    A reward is trained if a run was trained on it.
    """
    trained = {name for run in runs for name in run.summary["meta"]["trained_rewards"]}
    names = dict.fromkeys(name for run in runs for point in run.summary["points"] for name in point["rewards"])
    return sorted(((name, name in trained) for name in names), key=lambda entry: not entry[1])
