"""Evaluation rows: what is read, refused and paired."""

from __future__ import annotations

import json
import warnings

import pytest

from rlg.evaluation.rows import Row, pair, read_rows

RECORD = {
    "prompt_id": 3,
    "prompt": "a red cube",
    "tag": None,
    "k": 1,
    "seed": 0,
    "w": 0.1 + 0.2,
    "sampler": "sde",
    "method": "rlg",
    "rewards": {"composition": 0.5},
    "kl": 1.25,
    "diversity": None,
    "nfe": 20,
    "seconds": 0.5,
}


def make_row(**changes) -> Row:
    return Row.from_json(RECORD | changes)


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
        ({"method": "magic"}, "unknown method 'magic'; known: rlg"),
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
    assert one.prompt is other.prompt and one.tag is other.tag and one.method is other.method
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
