"""The emoji world's second detector and the comparison of both: by hand, and as a command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rewards.detectors.detection import Detection
from rewards.detectors.sprites import DRAWINGS
from rlg.pretraining import agreement, keypoints
from rlg.prompts import Prompt
from rlg.tinyworld import emoji, networks
from rlg.tinyworld.worlds import EMOJI

FOX, OWL = (DRAWINGS.index((noun, "")) for noun in ("fox", "owl"))


def logits(*things: tuple[int, int, int]) -> Tensor:
    """(1, drawings + 1, 16, 16): each thing (class, row, column) is sure, and everywhere else is nothing."""
    out = torch.zeros(1, keypoints.NOTHING + 1, 16, 16)
    out[:, keypoints.NOTHING] = 20.0
    for index, y, x in things:
        out[0, index, y, x] = 40.0
    return out


def seen(name: str, color: str = "", x: float = 16.0, y: float = 16.0) -> Detection:
    return Detection(name, color, (x - 14, y - 14, x + 14, y + 14), 0.9)


def test_targets_by_hand() -> None:
    """A fox of 28 pixels at (2, 6) has its centre at (16, 20): the square in column 4 and row 5."""
    target_HW = keypoints.targets([[(FOX, 2, 6, 28)]])[0]
    assert target_HW[5, 4] == FOX
    assert (target_HW[4:7, 3:6] == keypoints.UNSAID).sum() == 8
    assert (target_HW == keypoints.NOTHING).sum() == 256 - 9


def test_a_centre_is_read_once_and_at_its_place() -> None:
    """Two things 8 squares apart are two; an answer 4 squares beside the first is too near to be another thing."""
    (found,) = keypoints.detect(torch.nn.Identity(), logits((FOX, 3, 4), (OWL, 3, 12), (OWL, 4, 8)))
    assert {(thing.name, thing.box) for thing in found} == {
        ("fox", (4.25, 0.25, 31.75, 27.75)),
        ("owl", (36.25, 0.25, 63.75, 27.75)),
    }
    assert keypoints.detect(torch.nn.Identity(), logits()) == [[]]


def test_spoilt_scenes_stay_what_they_show() -> None:
    images, layouts = keypoints.scenes(8, torch.Generator().manual_seed(0))
    spoilt = keypoints.spoilt(images, torch.Generator().manual_seed(1))
    assert spoilt.shape == images.shape and spoilt.min() >= 0 and spoilt.max() <= 1
    assert 0.01 < (spoilt - images).abs().mean() < 0.2
    assert [len(placed) for placed in layouts] == [
        sum(clause["count"] for clause in prompt.metadata["include"])
        for prompt in emoji.training_prompts(8, torch.Generator().manual_seed(0))
    ]


def test_precision_and_recall_by_hand() -> None:
    """Three things are there, two of four that are read are right: one fox of two, and the apple in its colour."""
    truth = [[("fox", ""), ("apple", "red")], [("owl", "")]]
    read = [[("fox", ""), ("fox", ""), ("apple", "red")], [("pig", "")]]
    assert agreement.precision_and_recall(truth, read) == (2 / 4, 2 / 3)
    assert agreement.precision_and_recall([[]], [[]]) == (0, 0)


def test_agreement_by_hand() -> None:
    """Verdicts 1 1 0 0 and 1 0 0 0: the same in 3 of 4; by chance in 1/2 * 1/4 + 1/2 * 3/4 = 1/2; kappa 1/2."""
    fox = Prompt("a fox", {"tag": "single_object", "include": [{"class": "fox", "count": 1}]})
    first = [[seen("fox")], [seen("fox")], [], [seen("owl")]]
    second = [[seen("fox")], [seen("pig")], [], [seen("owl")]]
    row = agreement.agreement([fox] * 4, {agreement.FIRST: first, agreement.SECOND: second})
    assert row["n"] == 4 and row["prompts"] == 1
    assert [row["strict"][name]["mean"] for name in (agreement.FIRST, agreement.SECOND, "same")] == [0.5, 0.25, 0.75]
    assert row["kappa"] == pytest.approx(0.5)
    assert row["tags"] == {"single_object": 0.5}
    assert row["things"] == pytest.approx((2 / 3, 2 / 3))


def test_the_command_writes_what_both_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model shows nothing, so both say so; a network of one step reads less of drawn scenes than matching."""
    torch.manual_seed(0)
    networks.save(networks.build("sd", EMOJI), tmp_path / "random")
    few = replace(EMOJI, composition_prompts=lambda split: EMOJI.composition_prompts(split)[:3])
    monkeypatch.setattr(agreement, "EMOJI", few)
    monkeypatch.setattr(agreement, "world_of_words", lambda words: few)
    monkeypatch.setattr(agreement, "Sampling", lambda **told: _Sampling(steps=1, **told))
    options = ["--base", str(tmp_path / "random"), "--output", str(tmp_path / "out"), "--train_steps", "1"]
    agreement.main([*options, "--scenes", "4", "--k", "1", "--cfg", "2"])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "out" / "README.md")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["options"]["base"] == "random"
    assert summary["scenes"]["plain"][agreement.FIRST] == [1.0, 1.0]
    (row,) = summary["images"]
    assert (row["cfg"], row["n"], row["strict"][agreement.FIRST]["mean"]) == (2.0, 3, 0.0)
    assert "| plain | matching (the reward) | 100.0% | 100.0% |" in (tmp_path / "out" / "README.md").read_text()


_Sampling = agreement.Sampling


def test_a_model_of_shapes_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        agreement.main(["--base", "tiny-sd3", "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: tiny-sd3 draws no emoji")
    assert not (tmp_path / "out").exists()


def test_a_learnt_detector_finds_what_it_was_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss falls: twenty steps on one batch of scenes."""
    torch.manual_seed(0)
    images, layouts = keypoints.scenes(4, torch.Generator().manual_seed(0))
    model, target = keypoints.network(), keypoints.targets(layouts)
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(images), target, ignore_index=keypoints.UNSAID)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
