"""An evaluation's folder: other settings, older ones, and what is no evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlg.evaluation.folder import prepare_folder
from tests.evaluation.test_evaluator import SMALL, Fake, evaluated


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "eval"
    meta = {"base": "tiny-sd3", "steps": 10, "trained_rewards": ["a"]}
    prepare_folder(folder, meta, overwrite=False)
    evaluated(Fake(SMALL), folder)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    prepare_folder(folder, meta, overwrite=False)  # the same settings: go on
    with pytest.raises(ValueError, match=r"another steps \(10, not 20\); give --output another folder"):
        prepare_folder(folder, meta | {"steps": 20}, overwrite=False)
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
    prepare_folder(folder, meta | {"steps": 20}, overwrite=True)
    assert [f.name for f in folder.rglob("*") if f.is_file()] == ["meta.json"]
    assert json.loads((folder / "meta.json").read_text())["steps"] == 20


def test_a_folder_from_before_a_setting_goes_on_without_it(tmp_path: Path) -> None:
    prepare_folder(tmp_path, meta := {"base": "tiny-sd3"}, overwrite=False)
    prepare_folder(tmp_path, meta | {"schedule": "constant", "chosen": None, "origin": None}, overwrite=False)
    with pytest.raises(ValueError, match=r"another chosen \(None, not {'w': 2}\)"):
        prepare_folder(tmp_path, meta | {"chosen": {"w": 2}}, overwrite=False)
    with pytest.raises(ValueError, match=r"another schedule \('constant', not 'linear_up'\)"):
        prepare_folder(tmp_path, meta | {"schedule": "linear_up"}, overwrite=False)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "scores-of-my-students.jsonl").write_text("{}\n")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is not empty and holds no evaluation"):
            prepare_folder(tmp_path, {"base": "b"}, overwrite)
    assert [f.name for f in tmp_path.iterdir()] == ["scores-of-my-students.jsonl"]
