"""Evaluation rows and their paired statistics."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from rlg.stats import (
    Estimate,
    Row,
    bootstrap_mean,
    first_fall,
    pair,
    paired_difference,
    read_rows,
    summarise,
    win_rate,
)

RECORD = {
    "prompt_id": 3,
    "prompt": "a red cube",
    "tag": None,
    "k": 1,
    "seed": 0,
    "w": 0.1 + 0.2,
    "sampler": "sde",
    "mode": "rlg",
    "rewards": {"composition": 0.5},
    "kl": 1.25,
    "diversity": None,
    "nfe": 20,
    "seconds": 0.5,
}


def make_row(**changes) -> Row:
    return Row.from_json(RECORD | changes)


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def clustered(rng: np.random.Generator, prompts: int = 40, k: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Values of true mean 0 whose prompt effect has twice the standard deviation of the noise."""
    values = 2 * rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, k))
    return values.ravel(), np.repeat(np.arange(prompts), k)


def test_interval_of_independent_values_is_the_normal_one():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    estimate = bootstrap_mean(values, np.arange(400), resamples=8000)
    assert estimate.mean == pytest.approx(values.mean())
    assert width(estimate) == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_resampling_equals_drawing_prompts_one_by_one():
    values, groups = np.array([1.0, 5.0, 2.0, 8.0, 3.0, 3.5]), np.array([0, 0, 1, 1, 1, 2])
    draws = np.random.default_rng(7).integers(3, size=(300, 3))
    means = [np.concatenate([values[groups == g] for g in row]).mean() for row in draws]
    estimate = bootstrap_mean(values, groups, resamples=300, seed=7)
    np.testing.assert_allclose([estimate.low, estimate.high], np.percentile(means, [2.5, 97.5]))


def test_copies_of_an_image_add_no_certainty():
    values = np.random.default_rng(1).normal(size=30)
    once = bootstrap_mean(values, np.arange(30))
    copied = bootstrap_mean(np.repeat(values, 4), np.repeat(np.arange(30), 4))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
    naive = bootstrap_mean(np.repeat(values, 4), np.arange(120))
    assert width(naive) == pytest.approx(width(once) / 2, rel=0.1)


def test_coverage_on_a_clustered_design():
    rng = np.random.default_rng(2)
    hits = {"clustered": 0, "naive": 0}
    for _ in range(300):
        values, groups = clustered(rng)
        for name, by in (("clustered", groups), ("naive", np.arange(len(values)))):
            estimate = bootstrap_mean(values, by, resamples=500)
            hits[name] += estimate.low <= 0 <= estimate.high
    assert 0.90 <= hits["clustered"] / 300 <= 0.98
    assert hits["naive"] / 300 < 0.80


def test_pairing_removes_the_prompt_effect():
    rng = np.random.default_rng(3)
    shared, groups = clustered(rng)
    ours = shared + 0.3 + 0.1 * rng.normal(size=len(shared))
    difference = paired_difference(ours, shared, groups)
    assert difference.low < 0.3 < difference.high
    assert width(difference) < width(bootstrap_mean(ours, groups)) / 10


def test_win_rate_counts_a_tie_as_half():
    groups = [0, 0, 1, 2]
    ours, theirs = [1.0, 2.0, 3.0, 0.0], [0.0, 2.0, 4.0, 0.0]
    assert win_rate(ours, theirs, groups).mean == 0.5
    assert win_rate([1.0, 2.0], [0.0, 2.0], [0, 1]).mean == 0.75
    assert win_rate(ours, theirs, groups).mean + win_rate(theirs, ours, groups).mean == 1
    assert win_rate(ours, ours, groups) == Estimate(0.5, 0.5, 0.5)
    assert paired_difference(ours, ours, groups) == Estimate(0, 0, 0)


def test_same_seed_same_interval_in_any_order():
    values, groups = clustered(np.random.default_rng(4))
    order = np.random.default_rng(5).permutation(len(values))
    first, again = bootstrap_mean(values, groups), bootstrap_mean(values[order], groups[order])
    assert bootstrap_mean(values, groups) == first
    assert (again.low, again.high) == pytest.approx((first.low, first.high))
    assert bootstrap_mean(values, groups, seed=1) != first


def test_confidence_widens_the_interval():
    values, groups = clustered(np.random.default_rng(6))
    assert width(bootstrap_mean(values, groups, confidence=0.99)) > width(bootstrap_mean(values, groups))


def test_one_prompt_resamples_its_images():
    values = np.arange(10.0)
    assert bootstrap_mean(values, np.zeros(10)) == bootstrap_mean(values, np.arange(10))
    assert bootstrap_mean([0.7], [0]) == Estimate(0.7, 0.7, 0.7)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_named(bad):
    with pytest.raises(ValueError, match=r"value 2 \(group 11\) is (nan|inf)"):
        bootstrap_mean([0.0, 1.0, bad], [10, 10, 11])
    for statistic in (paired_difference, win_rate):
        with pytest.raises(ValueError, match=r"value 1 \(group 5\)"):
            statistic([0.0, bad], [0.0, 1.0], [4, 5])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_mean([], [])
    with pytest.raises(ValueError, match="as many values as groups"):
        bootstrap_mean([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="one shape"):
        win_rate([1.0, 2.0], [1.0], [0, 0])


def test_pair_matches_noise_not_position():
    ours = [make_row(prompt_id=p, k=k, w=2) for p, k in ((0, 0), (0, 1), (1, 0), (9, 9))]
    reference = [make_row(prompt_id=p, k=k, w=1) for p, k in ((1, 0), (0, 1), (0, 0))]
    matched = pair(ours, reference)
    assert [row.noise for row, _ in matched] == [(0, 0, 0), (0, 1, 0), (1, 0, 0)]
    assert all(row.noise == partner.noise and partner.w == 1 for row, partner in matched)
    assert pair(ours, [make_row(prompt_id=0, k=0, seed=5)]) == []
    with pytest.raises(ValueError, match="several rows"):
        pair(ours, reference + reference[:1])


def test_row_keeps_what_it_read():
    row = make_row(extra="ignored", seed=2**63 - 1)
    assert row.w == 0.3  # as in the image's file name
    assert (row.kl, row.diversity, row.tag, row.seed) == (1.25, None, None, 2**63 - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"w": float("nan")}, "w must be a finite number"),
        ({"rewards": {"clip": float("nan")}}, "clip must be a finite number, got nan"),
        ({"rewards": {}}, "at least one"),
        ({"mode": "magic"}, "unknown mode 'magic'; known: rlg"),
        ({"sampler": ["ode"]}, "unknown sampler"),
        ({"prompt_id": "3"}, "prompt_id must be an integer"),
        ({"k": 1.5}, "k must be an integer"),
        ({"nfe": True}, "nfe must be an integer"),
        ({"prompt": None}, "prompt must be a string"),
    ],
)
def test_bad_field_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        make_row(**change)


def write_lines(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def test_rows_of_a_prompt_hold_its_text_once(tmp_path):
    """A report holds every row of an evaluation: 0.5 kB each, where it was 0.9."""
    one, other = read_rows(write_lines(tmp_path / "s", *(json.dumps(RECORD | {"k": k, "tag": "two"}) for k in (0, 1))))
    assert one.prompt is other.prompt and one.tag is other.tag and one.mode is other.mode
    assert next(iter(one.rewards)) is next(iter(other.rewards))
    assert not hasattr(one, "__dict__")


def test_last_line_cut_off_is_ignored(tmp_path):
    lines = [json.dumps(RECORD | {"k": k, "prompt": "a café"}, ensure_ascii=False).encode() for k in (0, 1)]
    cut = lines[1].index("é".encode()) + 1  # in the middle of a character
    with pytest.warns(UserWarning, match="scores.jsonl:2: the last line is cut off"):
        rows = read_rows(write_lines(tmp_path / "scores.jsonl", lines[0], lines[1][:cut]))
    assert [row.k for row in rows] == [0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_rows(write_lines(tmp_path / "scores.jsonl", *lines))) == 2


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt_id": 1, "pro', json.dumps(RECORD), ""], "scores.jsonl:1: not JSON"),
        ([json.dumps(RECORD), '{"prompt_id": 1, "pro', ""], "scores.jsonl:2: not JSON"),
        ([json.dumps(RECORD), "[1, 2]"], "scores.jsonl:2: expected an object"),
        ([json.dumps({k: v for k, v in RECORD.items() if k != "kl"})], "scores.jsonl:1: missing kl"),
        ([json.dumps(RECORD), json.dumps(RECORD), ""], "scores.jsonl:2: a second row for"),
        (["", ""], "scores.jsonl has no rows"),
    ],
)
def test_other_bad_lines_are_errors(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write_lines(tmp_path / "scores.jsonl", *lines))


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


def test_a_held_out_reward_falls_where_its_paired_interval_does():
    assert first_fall(sweep_of({0: 1.0, 1: 1.2, 2: 1.1, 3: 0.9}), "held") == {
        "w": 2,
        "from": 1,  # its best so far, not the base
        "delta": pytest.approx(-0.1),
        "delta_ci95": pytest.approx([-0.1, -0.1]),
    }
    assert first_fall(sweep_of({0: 1.0, 1: 1.2, 2: 1.2}), "held") is None
    assert first_fall(sweep_of({0: 1.0, 1: 0.95, 2: 0.5}, noise=0.3), "held")["w"] == 2  # 0.05 lies within the noise
    assert first_fall(sweep_of({-1: 2.0, 0: 1.0, 1: 1.1}), "held") is None  # w < 0 leads away from the tuned model


def test_only_held_out_rewards_are_guarded():
    rows = [row for w in (0, 1) for row in sweep_of({0: 1.0, 1: 0.5})[w]]
    meta = {"base": "b", "adapter": "a"}
    assert summarise(rows, meta | {"trained_rewards": []})["falls"]["held"]["w"] == 1
    assert summarise(rows, meta | {"trained_rewards": ["held"]})["falls"] == {}
