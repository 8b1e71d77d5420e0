"""Preference data: who wins, what is dropped and said of it, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.preference_sets import SIDE, Load, batches, drawn, jsonl, parquet, picture, png, row, same, shards
from trainers.data import preference_formats, preference_pairs
from trainers.data.preference_formats import MapPairs
from trainers.data.preference_pairs import PairBatch, crop_geometry, pixels

LABELS = "label_0, label_1 not 1/0, 0/1 or 0.5/0.5"


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def streaming(request: pytest.FixtureRequest) -> bool:
    return request.param


def test_label_1_wins(tmp_path: Path, load: Load, streaming: bool) -> None:
    wins = [True, False, False, True, False]
    source = parquet(tmp_path / "a.parquet", [row(i, first) for i, first in enumerate(wins)])
    batch = batches(load(source, streaming=streaming), 5).batch(0)
    assert sorted(batch.indices_B.tolist()) == [0, 1, 2, 3, 4]
    assert len(batch) == 5
    for place, i in enumerate(batch.indices_B.tolist()):
        assert batch.captions[place] == f"caption {i}"
        for images, is_winner in ((batch.winners_B3HW, True), (batch.losers_B3HW, False)):
            first = wins[i] == is_winner
            colour = torch.tensor([i / 255, 0.0 if first else 1.0, 0.0])
            assert torch.equal(images[place], colour[:, None, None].expand(3, SIDE, SIDE))


def bad_rows() -> list[dict[str, Any]]:
    whole = png(picture(9, 0, (64, 64)))
    return [
        row(0),
        row(1, caption=None),
        row(2, caption=" \n"),
        row(3, label_0=0.5, label_1=0.5),
        row(4, jpg_0=None),
        row(5, jpg_1=b""),
        row(6, jpg_0=whole[: len(whole) // 2]),
        row(7, label_0=1.0, label_1=1.0),
        row(8, label_0=0.0, label_1=0.0),
        row(9, label_0=0.3, label_1=0.7),
        row(10, label_0=math.nan, label_1=0.0),
        row(11, label_1=None),
        row(12, jpg_1=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n"),
        row(13, first_wins=False),
        row(14, label_0=0.5, label_1=0.5, caption=""),
    ]


def test_bad_rows_are_counted_by_reason_and_never_trained_on(tmp_path: Path, load: Load, streaming: bool) -> None:
    data = load(parquet(tmp_path / "a.parquet", bad_rows()), streaming=streaming, buffer_size=1)
    assert set(drawn(data, range(12))) == {0, 13}
    counts = data.counts
    assert (counts.rows, counts.kept, counts.ties) == (15, 2, 1)
    assert counts.bad == {
        "no caption": 1,
        "empty caption": 2,
        "no jpg_0": 1,
        "image without bytes": 1,
        "image cannot be decoded": 2,
        LABELS: 4,
        "no label_1": 1,
    }
    assert counts.first == {
        "no caption": "row 1",
        "empty caption": "row 2",
        "no jpg_0": "row 4",
        "image without bytes": "row 5",
        "image cannot be decoded": "row 6",
        LABELS: "row 7",
        "no label_1": "row 11",
    }
    text = str(counts)
    assert text.startswith("15 rows: 2 kept, 1 ties dropped, 12 bad (1 x no caption, first row 1; ")
    assert f"; 4 x {LABELS}, first row 7" in text
    assert "\n" not in text


def test_a_half_file_of_every_format_is_broken() -> None:
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    for kind in ("PNG", "JPEG", "WEBP"):
        buffer = io.BytesIO()
        image.save(buffer, kind)
        data = buffer.getvalue()
        assert preference_formats.decode(data).size == (64, 64)
        with pytest.raises(Exception, match="image cannot be decoded"):
            preference_formats.decode(data[: len(data) // 2])
    assert preference_formats.decode(png(Image.new("LA", (4, 4)))).mode == "RGB"
    with pytest.raises(Exception, match="image cannot be decoded"):  # a format that is not on the list
        preference_formats.decode(b"P6 1 1 255 abc")


def test_the_place_of_a_broken_image_goes_to_the_next_good_row(tmp_path: Path, load: Load, streaming: bool) -> None:
    broken = {2, 3, 7}
    rows = [row(i, **({"jpg_0": b"no image"} if i in broken else {})) for i in range(10)]
    source = parquet(tmp_path / "a.parquet", rows)
    data = load(source, streaming=streaming, verify=False)
    order = [r.index for r, _ in zip(data.rows(0, 0), range(24), strict=False)]
    assert sorted(order[:10]) == list(range(10))
    wanted = [next(i for i in order[place:] if i not in broken) for place in range(20)]
    assert drawn(data, range(5)) == wanted
    assert data.counts.bad == {"image cannot be decoded": 3}  # each once, though two epochs have met it
    for rank in () if streaming else (0, 1):  # nothing depends on who else has met it
        fresh = load(source, streaming=streaming, verify=False)
        part = batches(fresh, rank=rank, world=2).batch(2).indices_B.tolist()
        assert part == wanted[8 + 2 * rank : 10 + 2 * rank]


def test_small_sets_are_verified_and_large_ones_only_if_asked(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(0, jpg_1=b"x"), row(1), row(2, jpg_0=b"x"), row(3)]
    source = parquet(tmp_path / "a.parquet", rows)
    assert load(source).counts.kept == 2
    monkeypatch.setattr(preference_pairs, "VERIFY_ROWS", 3)
    assert load(source).counts.kept == 3  # one was met while looking for a first good one
    assert load(source, verify=True).counts.kept == 2


@pytest.fixture
def image_root(tmp_path: Path) -> Path:
    """A folder with images a0.png, b0.png, a1.png ..., a file that is none, and a way out."""
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    for i in range(4):
        for which, letter in enumerate("ab"):
            picture(i, which).save(root / "images" / f"{letter}{i}.png")
    (root / "images" / "text.png").write_text("no image")
    picture(9, 0).save(tmp_path / "secret.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    return root


def test_an_image_folder(image_root: Path, load: Load, streaming: bool) -> None:
    a, b = "images/a{}.png", "images/b{}.png"
    geneval = {"include": [{"class": "circle", "position": ["left of", 0]}], "tag": "position"}
    outside = ["../secret.png", str(image_root / "images/a0.png"), "images/../../secret.png", "link.png"]
    windows = ["C:\\secret.png", "images\\..\\..\\secret.png", "\\\\host\\share\\secret.png"]
    rows = [
        {"caption": "zero", "chosen": a.format(0), "rejected": b.format(0), "metadata": geneval},
        {"caption": "one", "chosen": b.format(1), "rejected": a.format(1)},
        {"caption": "two", "chosen": a.format(2)},
        {"caption": "two", "chosen": a.format(2), "rejected": ""},
        {"caption": 2, "chosen": a.format(2), "rejected": b.format(2)},
        {"caption": "two", "chosen": 2, "rejected": b.format(2)},
        {"caption": "two", "chosen": "images/missing.png", "rejected": b.format(2)},
        {"caption": "two", "chosen": "images", "rejected": b.format(2)},
        {"caption": "two", "chosen": "images/text.png", "rejected": b.format(2)},
        *({"caption": "out", "chosen": path, "rejected": b.format(2)} for path in outside),
        *({"caption": "out", "chosen": a.format(2), "rejected": path} for path in windows),
    ]
    jsonl(image_root / "metadata.jsonl", rows)
    data = load(str(image_root), streaming=streaming, buffer_size=1)
    assert set(drawn(data, range(6))) == {0, 1}
    assert data.counts.bad == {
        "no rejected": 1,
        "no image path": 2,
        "caption is not text": 1,
        "no such image file": 2,
        "image cannot be decoded": 1,
        "path outside the image root": 7,
    }
    assert data.counts.first["path outside the image root"] == "row 9"
    batch = batches(data, 2).batch(0)
    by_caption = {caption: batch.winners_B3HW[i, 1, 0, 0].item() for i, caption in enumerate(batch.captions)}
    assert by_caption == {"zero": 0.0, "one": 1.0}


@pytest.mark.parametrize("column", ["image_path", "file_path"])
def test_hpdv2(tmp_path: Path, image_root: Path, load: Load, streaming: bool, column: str) -> None:
    def pair(i: int, preference: list[float], **changes: Any) -> dict[str, Any]:
        return {"prompt": f"p{i}", column: [f"a{i}.png", f"b{i}.png"], "human_preference": preference} | changes

    rows = [
        pair(0, [1, 0]),
        pair(1, [0, 1]),
        pair(2, [0.5, 0.5]),
        pair(2, [1, 1]),
        pair(2, [1, 0, 0]),
        pair(2, [1, 0], **{column: ["a2.png"]}),
        pair(2, [1, 0], prompt=""),
        pair(2, [1, 0], **{column: ["a2.png", "../../secret.png"]}),
    ]
    file = tmp_path / "train.json"
    file.write_text(json.dumps(rows))
    data = load(str(file), streaming=streaming, image_root=image_root / "images", buffer_size=1)
    batch = batches(data, 2).batch(0)
    winners = {caption: batch.winners_B3HW[i, :2, 0, 0].tolist() for i, caption in enumerate(batch.captions)}
    assert winners == {"p0": [0.0, 0.0], "p1": [pytest.approx(1 / 255), 1.0]}
    batches(data, 2).batch(1)
    assert data.counts.ties == 1
    assert data.counts.bad == {
        "human_preference not 1/0, 0/1 or 0.5/0.5": 1,
        "human_preference does not hold two values": 1,
        f"{column} does not hold two values": 1,
        "empty prompt": 1,
        "path outside the image root": 1,
    }
    with pytest.raises(ValueError, match=r"not a single usable pair.*2 x no such image file, first row 0"):
        load(str(file), streaming=streaming, image_root=tmp_path)  # the images are elsewhere
    with pytest.raises(ValueError, match="no such folder of images"):
        load(str(file), streaming=streaming, image_root=tmp_path / "nowhere")


def test_resuming_sees_what_an_uninterrupted_run_sees(tmp_path: Path, load: Load, streaming: bool) -> None:
    source = shards(tmp_path / "set", (7, 5, 9))
    options = {"streaming": streaming, "buffer_size": 4}
    whole = batches(load(source, **options), seed=3, random_crop=True)
    run = [whole.batch(step) for step in range(14)]
    resumed = batches(load(source, **options), seed=3, random_crop=True)
    for step in (6, 7, 13, 2, 8):  # from the middle, on, ahead, back, ahead
        assert same(resumed.batch(step), run[step])
    assert all(same(a, b) for a, b in zip(resumed.iterate(3, 9), run[3:9], strict=True))
    order = [i for batch in run for i in batch.indices_B.tolist()]
    epochs = [order[:21], order[21:42]]
    assert all(len(set(epoch)) == 21 for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != sorted(epochs[0])
    assert drawn(load(source, **options), range(6), seed=4)[:21] != epochs[0]
    assert load(source, **options).counts.bad == {}


def test_processes_share_the_global_batch(tmp_path: Path, load: Load) -> None:
    source = shards(tmp_path / "set", (9, 8))
    alone = batches(load(source), 6, random_crop=True)
    ranks = [batches(load(source), 6, random_crop=True, rank=r, world=3) for r in range(3)]
    for step in (0, 1, 5):
        parts = [rank.batch(step) for rank in ranks]
        assert [len(part) for part in parts] == [2, 2, 2]
        columns = {name: [getattr(part, name) for part in parts] for name in vars(parts[0])}
        captions = [text for texts in columns.pop("captions") for text in texts]
        joined = {name: torch.cat(tensors) for name, tensors in columns.items()}
        assert same(PairBatch(captions, **joined), alone.batch(step))
    with pytest.raises(ValueError, match="6 pairs is not divisible by 4 processes"):
        batches(alone.data, 6, world=4)


def test_crop_geometry() -> None:
    assert crop_geometry((64, 64), 64) == (0, 0)
    assert crop_geometry((100, 300), 100) == (0, 100)
    assert crop_geometry((300, 100), 50) == (50, 0)
    assert crop_geometry((768, 1024), 512) == (0, 86)  # 683 wide: 171 too many
    assert crop_geometry((10, 14), 10, (0.0, 0.0)) == (0, 0)
    assert crop_geometry((10, 14), 10, (0.99, 0.99)) == (0, 4)
    hits = [crop_geometry((10, 14), 10, (0.3, u))[1] for u in torch.linspace(0, 0.999, 1000).tolist()]
    assert [hits.count(left) for left in range(5)] == pytest.approx([200] * 5, abs=2)
    for size in ((333, 517), (517, 333), (1, 9), (64, 65)):
        for place in ((0.0, 0.0), (0.5, 0.5), (0.9999, 0.9999)):
            top, left = crop_geometry(size, 40, place)
            assert 0 <= top <= round(size[0] * 40 / min(size)) - 40
            assert 0 <= left <= round(size[1] * 40 / min(size)) - 40


def test_pixels_are_those_of_the_crop() -> None:
    values = np.arange(6 * 10 * 3, dtype=np.uint8).reshape(6, 10, 3)
    cut = pixels(Image.fromarray(values), 6, (0, 3))  # no resizing: exactly those pixels
    assert torch.equal(cut, torch.from_numpy(values[:, 3:9].copy()).permute(2, 0, 1).float() / 255)
    assert cut.dtype == torch.float32
    halves = Image.new("RGB", (400, 100), (255, 0, 0))
    halves.paste((0, 0, 255), (200, 0, 400, 100))
    left, centre = (pixels(halves, 20, crop) for crop in (crop_geometry((100, 400), 20, (0, 0)), (0, 30)))
    assert torch.equal(left[0], torch.ones(20, 20))
    assert torch.equal(centre[0, :, :6], torch.ones(20, 6))
    assert torch.equal(centre[2, :, 14:], torch.ones(20, 6))
    for size in ((1, 20000), (333, 517), (517, 333)):  # the last offset, whatever was rounded
        image = Image.new("RGB", size[::-1], (10, 20, 30))
        assert pixels(image, 40, crop_geometry(size, 40, (0.9999, 0.9999))).shape == (3, 40, 40)
    for size in ((3, 4), (4, 3)):  # 2.67 is rounded up to 3
        assert pixels(Image.new("RGB", size[::-1]), 2, crop_geometry(size, 2, (0.9999, 0.9999))).shape == (3, 2, 2)


def test_a_batch_carries_sizes_and_crops(tmp_path: Path, load: Load) -> None:
    wide, high = png(picture(0, 0, (24, 16))), png(picture(0, 1, (8, 40)))
    source = parquet(tmp_path / "a.parquet", [row(0, jpg_0=wide, jpg_1=high)])
    batch = batches(load(source), 1).batch(0)
    assert batch.winners_B3HW.shape == batch.losers_B3HW.shape == (1, 3, SIDE, SIDE)
    assert (batch.sizes_B2.tolist(), batch.crops_B2.tolist()) == ([[16, 24]], [[0, 2]])
    assert (batch.loser_sizes_B2.tolist(), batch.loser_crops_B2.tolist()) == ([[40, 8]], [[16, 0]])
    random = [batches(load(source), 1, random_crop=True).batch(step) for step in range(12)]
    assert {b.crops_B2[0, 1].item() for b in random} == {0, 1, 2, 3, 4}
    assert {b.crops_B2[0, 0].item() for b in random} == {0}


def test_random_crops_of_a_pair_are_at_the_same_place(tmp_path: Path, load: Load) -> None:
    same_size = {"jpg_0": png(picture(0, 0, (32, 8))), "jpg_1": png(picture(0, 1, (32, 8)))}
    batch = batches(load(parquet(tmp_path / "a.parquet", [row(0, **same_size)])), 16, random_crop=True).batch(0)
    assert torch.equal(batch.crops_B2, batch.loser_crops_B2)
    assert len({left for _, left in batch.crops_B2.tolist()}) > 6


def test_sources(tmp_path: Path, load: Load, streaming: bool) -> None:
    rows = {split: [row(i + start) for i in range(3)] for split, start in (("train", 0), ("test", 10))}
    sets = datasets.DatasetDict({split: datasets.Dataset.from_list(r) for split, r in rows.items()})
    sets.save_to_disk(str(tmp_path / "dict"))
    sets["test"].with_format("pandas").save_to_disk(str(tmp_path / "one"))
    images = sets["test"].cast_column("jpg_0", datasets.Image()).cast_column("jpg_1", datasets.Image())
    images.to_parquet(str(tmp_path / "images" / "data" / "test-00000.parquet"))
    for split, r in rows.items():
        parquet(tmp_path / "files" / f"{split}.parquet", r)
    for source in ("dict", "one", "images", "files", "files/test.parquet"):
        batch = batches(load(str(tmp_path / source), "test", streaming=streaming), 3).batch(0)
        assert sorted(batch.captions) == ["caption 10", "caption 11", "caption 12"], source
        assert sorted((batch.winners_B3HW[:, 0, 0, 0] * 255).round().tolist()) == [10, 11, 12], source
    if not streaming:
        assert sorted(drawn(load(str(tmp_path / "files"), "test[1:]"), [0], batch_size=2)) == [0, 1]
    with pytest.raises(ValueError, match=r"split 'val'.*splits train, test"):
        load(str(tmp_path / "dict"), "val", streaming=streaming)


def test_a_file_that_has_changed_is_read_anew(tmp_path: Path, load: Load) -> None:
    source = parquet(tmp_path / "a.parquet", [row(0)])
    assert load(source).counts.rows == 1
    assert load(parquet(tmp_path / "a.parquet", [row(0), row(1)])).counts.rows == 2


def test_what_cannot_be_used_is_refused(tmp_path: Path, load: Load, streaming: bool) -> None:
    ties = parquet(tmp_path / "ties.parquet", [row(i, label_0=0.5, label_1=0.5) for i in range(3)])
    with pytest.raises(ValueError, match="not a single usable pair: 3 rows: 0 kept, 3 ties dropped, 0 bad"):
        load(ties, streaming=streaming)
    broken = parquet(tmp_path / "broken.parquet", [row(i, jpg_0=b"x") for i in range(3)])
    with pytest.raises(ValueError, match=r"not a single usable pair: 3 rows: 0 kept.*3 x image cannot be decoded"):
        load(broken, streaming=streaming, verify=False)
    captionless = [{k: v for k, v in row(0).items() if k != "caption"}]
    with pytest.raises(ValueError, match=r"no known format has the columns jpg_0, .*Pick-a-Pic: caption, jpg_0"):
        load(parquet(tmp_path / "captionless.parquet", captionless), streaming=streaming)
    (tmp_path / "broken.jsonl").write_text('{"caption": "a", "cho\n')
    (tmp_path / "empty").mkdir()
    (tmp_path / "set.csv").write_text("caption\n")
    for source, message in (
        (str(tmp_path / "broken.jsonl"), "JSON parse error"),
        (str(tmp_path / "empty"), "the folder holds none of train.parquet"),
        (str(tmp_path / "set.csv"), "ends in none of .parquet"),
        (str(tmp_path / "missing"), "neither a file, a folder nor a hub id"),
        ("nobody/nothing-of-the-kind", "cannot read preference data 'nobody/nothing-of-the-kind', split 'train'"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load(source, streaming=streaming)
        assert "\n" not in str(error.value)


def test_options_that_contradict_or_are_ignored(tmp_path: Path, load: Load) -> None:
    source = parquet(tmp_path / "a.parquet", [row(0)])
    with pytest.raises(ValueError, match="verify reads every image"):
        load(source, streaming=True, verify=True)
    with pytest.raises(ValueError, match="buffer_size must be at least 1, got 0"):
        load(source, streaming=True, buffer_size=0)
    with pytest.warns(UserWarning, match="image_root is ignored"):
        data = load(source, image_root=tmp_path)
    assert isinstance(data, MapPairs)
    assert len(data) == 1
    with pytest.raises(ValueError, match="batch_size 0 and resolution 8 must be positive"):
        batches(data, 0)
