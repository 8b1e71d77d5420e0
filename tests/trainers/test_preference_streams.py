"""Streams of preference pairs: shares of processes, bookmarks, and rows by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.preference_sets import Load, batches, parquet, row, same, shards
from trainers.data.preference_pairs import Batches
from trainers.data.preference_streams import StreamPairs


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that streams have read."""
    seen: list[int] = []
    inner = StreamPairs._accept

    def counted(self: StreamPairs, values: Any, *rest: Any) -> bool:
        seen.append(int(values["caption"].split()[1]))
        return inner(self, values, *rest)

    monkeypatch.setattr(StreamPairs, "_accept", counted)
    return seen


def stream(load: Load, source: str, rank: int = 0, world: int = 1, batch_size: int = 4) -> Batches:
    data = load(source, streaming=True, buffer_size=2, rank=rank, world=world)
    return batches(data, batch_size, seed=3, rank=rank, world=world)


@pytest.mark.parametrize(("sizes", "world"), [((6, 4, 5, 3, 6), 2), ((12,), 4), ((8, 8), 3)])
def test_each_process_of_a_stream_reads_its_share(
    sizes: tuple[int, ...], world: int, tmp_path: Path, load: Load, read: list[int]
) -> None:
    """Whole shards, or every m-th row of one where there are more processes; together they are the set."""
    source, shares = shards(tmp_path / "set", sizes), []
    for rank in range(world):
        own = stream(load, source, rank, world, batch_size=2 * world)
        read.clear()
        drawn_rows = [caption for step in range(20) for caption in own.batch(step).captions]
        shares.append(set(read))
        assert {int(caption.split()[1]) for caption in drawn_rows} == shares[-1]
        assert len(read) < 40 + 8 + len(shares[-1])  # not one more than it gives, but for the buffer
    assert set.union(*shares) == set(range(sum(sizes)))
    assert sum(map(len, shares)) == sum(sizes)


def test_a_stream_is_resumed_from_a_bookmark(tmp_path: Path, load: Load, read: list[int]) -> None:
    """Bit for bit what an uninterrupted run sees, without reading all that came before."""
    source = shards(tmp_path / "set", (30, 24, 27))
    whole = stream(load, source)
    expected = [whole.batch(step) for step in range(60)]  # nearly three epochs
    for step in (1, 7, 19, 33, 50):
        run = stream(load, source)
        list(run.iterate(max(0, step - 6), step + 2))  # it has read ahead when it is saved
        run.save_place(step, tmp_path)
        resumed = stream(load, source)
        resumed.load_place(step, tmp_path)
        read.clear()
        assert all(same(a, b) for a, b in zip(resumed.iterate(step, 60), expected[step:], strict=True))
        assert len(read) <= 4 * (60 - step) + 2 * 8 + 2  # two segments at most, of 4 buffers of 2
    resumed = stream(load, source)
    assert same(resumed.batch(33), expected[33])  # without a file it reads from the beginning
    (tmp_path / "stream-0.json").write_text('{"world": "two"}')
    with pytest.raises(ValueError, match=r"stream-0\.json: world"):
        stream(load, source).load_place(3, tmp_path)


def test_another_number_of_processes_goes_on_with_the_next_epoch(tmp_path: Path, load: Load, read: list[int]) -> None:
    source = shards(tmp_path / "set", (8, 8))
    alone = stream(load, source)
    alone.batch(2)
    alone.save_place(3, tmp_path)
    for rank in range(2):
        part = stream(load, source, rank, world=2)
        part.load_place(3, tmp_path)
        read.clear()
        captions = [caption for step in range(3, 7) for caption in part.batch(step).captions]
        assert len(set(captions)) == 8 and len(read) <= 8  # its shard, once


def test_a_set_on_disk_needs_no_bookmark(tmp_path: Path, load: Load) -> None:
    own = batches(load(shards(tmp_path / "set", (5,))))
    own.save_place(3, tmp_path)
    own.load_place(3, tmp_path)
    assert not list(tmp_path.glob("stream-*"))


def test_a_stream_names_rows_by_shard_and_mixes_them(tmp_path: Path, load: Load) -> None:
    source = shards(tmp_path / "set", (6, 6, 6))
    data = load(source, streaming=True, buffer_size=5)
    assert isinstance(data, StreamPairs)
    batch = batches(data, 18).batch(0)
    red = (batch.winners_B3HW[:, 0, 0, 0] * 255).round().long()
    assert torch.equal(batch.indices_B, (red % 6) * 3 + red // 6)  # row * shards + shard
    assert (red[1:] - red[:-1] != 1).sum() > 6
    parquet(tmp_path / "set" / "train-00001.parquet", [row(0), row(1, caption="")])
    data = load(source, streaming=True)
    assert str(data.counts) == "1 rows: 1 kept, 0 ties dropped, 0 bad"  # a first look
    batches(data, 13).batch(0)
    assert str(data.counts) == "14 rows: 13 kept, 0 ties dropped, 1 bad (1 x empty caption, first row 1 of shard 1)"
