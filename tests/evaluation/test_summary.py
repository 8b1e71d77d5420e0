"""The summary of an evaluation: guards, the best w, the effective share, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlg.evaluation.rows import Row
from rlg.evaluation.summary import best_w, effective_share, first_fall, perhaps_best, summarise
from tests.evaluation.test_rows import make_row


def test_summary_refuses_what_cannot_be_compared():
    meta = {"base": "b", "adapter": "a", "trained_rewards": ["composition"]}
    with pytest.raises(ValueError, match="mix the samplers ode, sde"):
        summarise([make_row(), make_row(k=2, sampler="ode")], meta)
    with pytest.raises(ValueError, match="rewards differ"):
        summarise([make_row(), make_row(k=2, rewards={"clip": 1})], meta)


def test_summary_warns_of_images_without_partner():
    rows = [make_row(w=1), make_row(w=2), make_row(w=2, k=7)]
    with pytest.warns(UserWarning, match="rlg w=2: 1 of 2 images have no tuned partner"):
        summarise(rows, {"base": "b", "adapter": "a"})


def sweep_of(means: dict[float, float], noise: float = 0.0) -> dict[float, list[Row]]:
    """40 prompts an image each; `noise` is the paired noise of each w."""
    rng = np.random.default_rng(0)
    rows = {w: rng.normal(mean, noise, size=40) for w, mean in means.items()}
    easy = rng.normal(size=40)  # a prompt's ease, shared by all w
    return {
        w: [make_row(prompt_id=i, w=w, rewards={"held": float(v + easy[i])}) for i, v in enumerate(values)]
        for w, values in rows.items()
    }


def test_a_held_out_reward_falls_where_all_pairs_of_w_say_so() -> None:
    fall = first_fall(sweep_of({0: 1.0, 1: 1.2, 2: 1.1, 3: 0.9}, noise=0.01), "held")
    assert (fall["w"], fall["from"]) == (2, 1)  # its best so far, not the base
    assert fall["delta"] == pytest.approx(-0.1, abs=0.01)
    low, high = fall["delta_ci95"]
    assert -0.12 < low < -0.1 < high < -0.08
    assert first_fall(sweep_of({0: 1.0, 1: 1.2, 2: 1.2}), "held") is None
    assert first_fall(sweep_of({0: 1.0, 1: 0.95, 2: 0.5}, noise=0.3), "held")["w"] == 2  # 0.05 lies within the noise
    assert first_fall(sweep_of({-1: 2.0, 0: 1.0, 1: 1.1}), "held") is None  # w < 0 leads away from the tuned model
    assert first_fall(sweep_of({0: 1.0}), "held") is None


def test_a_few_prompts_prove_no_fall() -> None:
    """All of 3 prompts fall in one of 4 sweeps that are flat; all of 8 in one of 128."""
    rows = sweep_of({0: 1.0, 1: 0.5})
    few = {w: group[:3] for w, group in rows.items()}
    assert first_fall(few, "held") is None
    assert first_fall({w: group[:8] for w, group in rows.items()}, "held")["delta"] == pytest.approx(-0.5)


def test_only_held_out_rewards_are_guarded() -> None:
    rows = [row for w in (0, 1) for row in sweep_of({0: 1.0, 1: 0.5})[w]]
    meta = {"base": "b", "adapter": "a"}
    assert summarise(rows, meta | {"trained_rewards": []})["falls"]["held"]["w"] == 1
    assert summarise(rows, meta | {"trained_rewards": ["held"]})["falls"] == {}


def test_the_best_w_is_chosen_on_every_other_prompt_and_reported_on_the_rest() -> None:
    """At w = 2 the even prompts are the best by far, the odd ones the worst."""
    sweep = sweep_of({0: 1.0, 1: 1.2, 2: 1.1})
    sweep[2] = [
        make_row(prompt_id=r.prompt_id, w=2, rewards={"held": r.rewards["held"] + (-1) ** r.prompt_id})
        for r in sweep[2]
    ]
    best = best_w(sweep, "held", sweep[1])
    odd = [row for row in sweep[2] if row.prompt_id % 2]
    assert (best.w, best.n) == (2, 20)
    assert best.mean.mean == pytest.approx(np.mean([row.rewards["held"] for row in odd]))
    assert best.delta.mean == pytest.approx(1.1 - 1 - 1.2) and best.win.mean == 0
    assert best.between == (1.0, 2.0)  # the base is beaten; 1 and 2 are torn
    assert best_w(sweep, "held", sweep[2]).delta is None  # it is the reference
    assert best_w({w: group[:1] for w, group in sweep.items()}, "held") is None


def test_the_w_that_may_be_best() -> None:
    assert perhaps_best(sweep_of({0: 0.0, 1: 1.0, 2: 0.5}, noise=0.01), "held") == (1, 1)
    assert perhaps_best(sweep_of({0: 0.0, 1: 1.0, 2: 1.0}, noise=0.2), "held") == (1, 2)
    assert perhaps_best(sweep_of({1: 1.0}), "held") == (1, 1)


def weighed(*log_weights: list[float]) -> list[Row]:
    """A prompt for each list."""
    return [
        make_row(prompt_id=p, k=k, log_weight=log) for p, logs in enumerate(log_weights) for k, log in enumerate(logs)
    ]


def test_the_effective_share_by_hand() -> None:
    """Weights 1 and 3: (1 + 3)^2 / (2 (1 + 9)) = 0.8, the heaviest 0.75; equal ones: 1 and 0.5."""
    share = effective_share(weighed([0.0, math.log(3)], [1e3, 1e3]))
    assert (share.mean, share.largest, share.k) == (pytest.approx(0.9), pytest.approx(0.625), 2)
    assert share.mean < share.at_most <= 1
    assert effective_share(weighed([0.0], [1.0])) is None  # nothing to compare
    assert effective_share([make_row()]) is None
    point = summarise(weighed([0.0, math.log(3)]), {"base": "b", "adapter": "a"})["points"][0]
    assert point["ess"] == pytest.approx(0.8) and point["ess_k"] == 2 and point["ess_largest"] == pytest.approx(0.75)


def test_a_point_against_itself_is_no_estimate() -> None:
    rows = [make_row(prompt_id=p, w=w, rewards={"strict": float(p % 2)}) for p in range(9) for w in (1, 2)]
    points = {p["w"]: p["rewards"]["strict"] for p in summarise(rows, {"base": "b", "adapter": "a"})["points"]}
    assert (points[1]["delta_vs_tuned"], points[1]["delta_vs_tuned_ci95"]) == (0, [0, 0])
    assert points[1]["win_vs_tuned_ci95"] == [0.5, 0.5]
    low, high = points[2]["delta_vs_tuned_ci95"]  # of 9 images none changed: others may
    assert low == -high and 0.2 < high < 0.4


def test_corrected_rows_have_no_path_kl() -> None:
    rows = [make_row(prompt_id=p, method=mode, w=2, kl=3.0) for p in range(2) for mode in ("rlg", "corrected")]
    points = {p["method"]: p["kl"] for p in summarise(rows, {"base": "b", "adapter": "a"})["points"]}
    assert points == {"corrected": None, "rlg": 3.0}
