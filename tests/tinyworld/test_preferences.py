"""The tinyworld's preference pairs: Bradley-Terry's labels, a ceiling that is one, files that a trainer reads."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rewards import RewardMix
from rlg import preferences
from rlg.models import fingerprint
from rlg.models.policy import Policy
from rlg.preferences import ceiling, draw, entropy, win_probability, write
from rlg.pretraining.settings import PairSettings
from rlg.prompts import Prompt
from rlg.tasks import prompt_sets
from trainers.data import preference_pairs

PROMPTS = [Prompt(text, {"tag": text[-4:]}) for text in ("a red circle", "two blue crosses", "three green squares")]


def redness(images_B3HW: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> Tensor:
    return images_B3HW[:, 0].mean(dim=(1, 2)) - images_B3HW[:, 1].mean(dim=(1, 2))


UTILITY = RewardMix({"redness": redness}, (2.0,))


@pytest.fixture(scope="module")
def policy(tiny_folder: Callable[[str], Path]) -> Policy:
    return Policy.load(str(tiny_folder("sd")))


@pytest.fixture(scope="module")
def pairs(policy: Policy) -> preferences.Split:
    return draw(policy, UTILITY, PROMPTS, "train", 6, PairSettings(temperature=1e-9, steps=2, batch_size=8))


def pixels(png: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(png)))).permute(2, 0, 1).float() / 255


def test_bradley_terry_by_hand() -> None:
    utility = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.3], [0.2, 0.0]])
    expected = [0.7310585786, 0.2689414214, 0.5, 0.5498339973]
    assert win_probability(utility, 1.0).tolist() == pytest.approx(expected, abs=1e-8)
    assert win_probability(utility, 0.5)[0].item() == pytest.approx(0.8807970780, abs=1e-8)
    assert win_probability(utility, 1e-6).tolist() == [1.0, 0.0, 0.5, 1.0]
    probability = torch.tensor([1.0, 0.0, 0.5, 0.75], dtype=torch.float64)
    assert ceiling(probability) == (1 + 1 + 0.5 + 0.75) / 4
    assert entropy(probability) == pytest.approx((0.6931471806 + 0.5623351446) / 4, abs=1e-9)


def test_the_ceiling_is_what_the_best_annotator_reaches_and_nobody_passes() -> None:
    generator = torch.Generator().manual_seed(0)
    utility = torch.rand(300, 2, generator=generator, dtype=torch.float64)
    probability = win_probability(utility, 0.3)
    labels = torch.rand(4000, 300, generator=generator, dtype=torch.float64) < probability  # many annotations of each

    def accuracy(first_is_better: Tensor) -> float:
        return float((labels == first_is_better).double().mean())

    knows = utility[:, 0] > utility[:, 1]
    error = 0.5 / (4000 * 300) ** 0.5
    assert accuracy(knows) == pytest.approx(ceiling(probability), abs=4 * error)
    for rule in range(20):
        noisy = utility + 0.1 * torch.randn(300, 2, generator=generator, dtype=torch.float64)
        assert accuracy(noisy[:, 0] > noisy[:, 1]) < ceiling(probability), rule
    said = torch.where(labels, probability, 1 - probability).log()
    assert -said.mean().item() == pytest.approx(entropy(probability), abs=2e-3)
    for temperature in (0.2, 0.4):
        other = win_probability(utility, temperature)
        assert -torch.where(labels, other, 1 - other).log().mean().item() > entropy(probability)


def test_utilities_are_of_the_images_as_they_are_stored(pairs: preferences.Split) -> None:
    images = torch.stack([pixels(png) for pair in pairs.png_N2 for png in pair])
    assert images.shape == (12, 3, 64, 64)
    again = UTILITY(images, [""] * 12, [{}] * 12).total_B.double().reshape(6, 2)
    assert torch.equal(pairs.utility_N2, again)
    assert (images[::2] != images[1::2]).flatten(1).any(dim=1).all()  # two images of a prompt, not one twice


def test_prompts_take_turns_with_new_noise_each_time(pairs: preferences.Split) -> None:
    texts = [prompt.text for prompt in pairs.prompts]
    assert {*texts[:3]} == {*texts[3:6]} == {prompt.text for prompt in PROMPTS}
    assert len({png for pair in pairs.png_N2 for png in pair}) == 12


def test_at_a_low_temperature_the_better_image_wins(pairs: preferences.Split) -> None:
    assert pairs.first_wins_N.tolist() == (pairs.utility_N2[:, 0] > pairs.utility_N2[:, 1]).tolist()
    assert 0 < pairs.first_wins_N.sum() < 6
    summary = pairs.summary()
    assert (summary["ceiling"], summary["entropy"], summary["utility_agrees"]) == (1.0, 0.0, 1.0)


def test_labels_follow_the_probabilities() -> None:
    utility = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.3, 0.3], [0.2, 0.0]]).repeat(5000, 1)
    for temperature in (1.0, 0.5):
        probability, first_wins = preferences.annotate(utility, temperature, torch.Generator().manual_seed(0))
        assert torch.equal(probability, win_probability(utility, temperature))
        for case in range(4):
            p = probability[case].item()
            assert first_wins[case::4].double().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 5000) ** 0.5)
    again = preferences.annotate(utility, 0.5, torch.Generator().manual_seed(0))[1]
    assert torch.equal(again, first_wins)
    assert not torch.equal(preferences.annotate(utility, 0.5, torch.Generator().manual_seed(1))[1], first_wins)


def test_equal_utilities_are_a_coin_flip(policy: Policy) -> None:
    constant = RewardMix({"constant": lambda images, prompts, metadata: torch.ones(len(images))}, (1.0,))
    flipped = draw(policy, constant, PROMPTS, "train", 8, PairSettings(temperature=1e-9, steps=1, batch_size=16))
    assert flipped.probability_N.tolist() == [0.5] * 8
    assert 0 < flipped.first_wins_N.sum() < 8
    summary = flipped.summary()
    assert (summary["equal_utilities"], summary["ceiling"], summary["utility_agrees"]) == (8, 0.5, 0.5)
    assert summary["first_wins"] == int(flipped.first_wins_N.sum())
    assert summary["entropy"] == pytest.approx(0.6931471806)


def test_pairs_follow_from_seed_and_split(policy: Policy, pairs: preferences.Split) -> None:
    def again(split: str = "train", **changes: Any) -> preferences.Split:
        options = {"temperature": 1e-9, "steps": 2, "batch_size": 8} | changes
        return draw(policy, UTILITY, PROMPTS, split, 6, PairSettings(**options))

    assert again().columns() == pairs.columns()
    other_batches = again(batch_size=12)
    assert other_batches.prompts == pairs.prompts
    close = [
        (pixels(a[0]) - pixels(b[0])).abs().max() for a, b in zip(other_batches.png_N2, pairs.png_N2, strict=True)
    ]
    assert max(close) <= 1.01 / 255
    for other in (again(seed=1), again("test")):
        assert not {png for pair in other.png_N2 for png in pair} & {png for pair in pairs.png_N2 for png in pair}


def test_a_trainer_reads_what_was_written(tmp_path: Path, pairs: preferences.Split) -> None:
    metadata = write(tmp_path / "set", {"train": pairs, "test": pairs}, {"temperature": 1e-9})
    assert sorted(f.name for f in (tmp_path / "set").iterdir()) == ["metadata.json", "test.parquet", "train.parquet"]
    assert [f.name for f in tmp_path.iterdir()] == ["set"]
    assert json.loads((tmp_path / "set/metadata.json").read_text()) == metadata
    data = preference_pairs.load(str(tmp_path / "set"), "train", cache_dir=tmp_path / "cache")
    assert str(data.counts) == "6 rows: 6 kept, 0 ties dropped, 0 bad"
    batch = preference_pairs.Batches(data, 6, 64).batch(0)
    assert (redness(batch.winners_B3HW, [], []) > redness(batch.losers_B3HW, [], [])).all()
    assert batch.captions == [pairs.prompts[i].text for i in batch.indices_B.tolist()]
    rows = datasets.Dataset.from_parquet(str(tmp_path / "set/test.parquet"), cache_dir=str(tmp_path / "cache"))
    assert {*zip(rows["label_0"], rows["label_1"], strict=True)} == {(1.0, 0.0), (0.0, 1.0)}
    assert [json.loads(text) for text in rows["metadata"]] == [prompt.metadata for prompt in pairs.prompts]


def test_only_pairs_are_overwritten_and_only_if_asked(tmp_path: Path, pairs: preferences.Split) -> None:
    folder = tmp_path / "set"
    write(folder, {"train": pairs}, {"temperature": 1.0})
    with pytest.raises(ValueError, match="exists; give --overwrite"):
        write(folder, {"train": pairs}, {"temperature": 2.0})
    (folder / "notes.txt").write_text("mine")
    assert write(folder, {"train": pairs}, {"temperature": 2.0}, overwrite=True)["temperature"] == 2.0
    assert json.loads((folder / "metadata.json").read_text())["temperature"] == 2.0
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.json").write_text("[1]")
    with pytest.raises(ValueError, match="something else"):
        write(tmp_path / "other", {"train": pairs}, {}, overwrite=True)


def test_the_command(tmp_path: Path, tiny_folder: Callable[[str], Path], capsys: pytest.CaptureFixture) -> None:
    argv = ["--base", str(tiny_folder("sd")), "--output", str(tmp_path / "set"), "--steps", "1", "--cfg", "2"]
    argv += ["--pairs", "6", "--test_pairs", "4", "--device", "cpu", "--temperature", "0.5", "--seed", "7"]
    argv += ["--utility", "jpeg_compressibility", "composition", "--utility_weights", "0.5", "1"]
    preferences.main(argv)
    metadata = json.loads((tmp_path / "set" / "metadata.json").read_text())
    assert metadata["utility"] == {"jpeg_compressibility": 0.5, "composition": 1.0}
    assert (metadata["temperature"], metadata["seed"], metadata["cfg"]) == (0.5, 7, 2.0)
    assert metadata["model"] == str(tiny_folder("sd"))
    assert metadata["digests"]["base"] == fingerprint.of_model(str(tiny_folder("sd")))
    assert metadata["digests"].keys() == {"base", "train prompts", "test prompts"} and metadata["versions"]
    out = capsys.readouterr().out
    for split, count in (("train", 6), ("test", 4)):
        rows = datasets.Dataset.from_parquet(str(tmp_path / f"set/{split}.parquet"), cache_dir=str(tmp_path / "cache"))
        known = {prompt.text for prompt in prompt_sets.load(f"tinyworld:composition/{split}")}
        assert len(set(rows["caption"]) & known) == len(rows) == metadata["splits"][split]["pairs"] == count
        gap = (np.array(rows["utility_0"]) - np.array(rows["utility_1"])) / 0.5
        assert rows["first_wins_probability"] == pytest.approx((1 / (1 + np.exp(-gap))).tolist())
        best = float(np.mean(1 / (1 + np.exp(-np.abs(gap)))))
        assert metadata["splits"][split]["ceiling"] == pytest.approx(best)
        assert f"{split}: {count} pairs" in out
        assert f"best reachable accuracy {best:.1%}" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--utility", "compositon"], "unknown reward 'compositon'; did you mean 'composition'?"),
        (["--utility", "composition", "--utility_weights", "1", "2"], "1 rewards (composition) but 2 weights"),
        (["--temperature", "0"], "the temperature must be positive and finite, got 0.0"),
        (["--temperature", "nan"], "temperature must be finite, got nan"),
        (["--test_pairs", "0"], "--pairs (2) and --test_pairs (0) must be at least 1"),
        (["--batch_size", "1"], "batch_size (1) at least 2"),
        (["--prompts", "missing.txt"], "no such prompt file: missing.txt"),
        (["--base", "missing"], "cannot load the base model 'missing'"),
        (["--pears", "3"], "unrecognized arguments: --pears 3; see --help"),
        (["--output", "taken", "--overwrite"], "taken holds something else than preference pairs"),
    ],
)
def test_wrong_input_ends_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as stopped:
        preferences.main(["--output", "set", "--pairs", "2", "--test_pairs", "1", "--steps", "1", *options])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")] == ["taken", "taken/thesis.txt"]
